"""Everything at once on one tree, by several processes, a bounded number of times, then what must be true
of it. Run where there is a directory `tree` as tests/escape/overlay_storm.rs makes it; also outside a
sandbox, where the same must be true.

    overlay_storm.py SEED
"""

import errno
import mmap
import os
import random
import resource
import shutil
import sys
import traceback

SEED = int(sys.argv[1])
WORKERS, FILES, PIECE = 4, 200, 4096
# What a name may meet that others change at the same time.
RACE = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.ESTALE}


def content(number):
    return (b"%06d\n" % number) * (PIECE // 7 * 4)


def in_processes(count, work):
    """Each ends with 0, or everything does."""
    children = []
    for number in range(count):
        if (child := os.fork()) == 0:
            status = 1
            try:
                work(number)
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    assert not failed, f"{len(failed)} of {work.__name__} failed"


def links_and_renames(worker):
    """Names of the lower's files are linked, renamed over each other, exchanged with new ones and removed,
    while writing, truncating and changing modes copies them up. No operation invents content: a file holds
    lines of one number, whichever names it has."""
    own = random.Random(f"{SEED} {worker}")
    some = lambda: f"tree/d{own.randrange(4)}/f{own.randrange(FILES)}"
    for _ in range(1500):
        one, other = some(), some()
        try:
            match own.randrange(10):
                case 0 | 1:
                    os.link(one, other)
                case 2 | 3:
                    os.rename(one, other)
                case 4:
                    with open(one, "r+b") as file:
                        line = file.read(7)
                        if len(line) == 7:
                            file.seek(0, os.SEEK_END)
                            file.write(line)
                case 5:
                    os.truncate(one, own.randrange(8) * 700)
                case 6:
                    os.chmod(one, own.choice((0o600, 0o644, 0o755)))
                case 7:
                    os.unlink(one)
                case 8:
                    name = f"tree/d{own.randrange(4)}/new-{worker}"
                    with open(name, "wb") as file:
                        file.write(content(1000 + worker))
                    os.rename(name, one)
                case 9:
                    os.rename(f"tree/d{own.randrange(4)}/sub{own.randrange(3)}", f"tree/d{own.randrange(4)}/sub{own.randrange(3)}")
        except OSError as error:
            if error.errno not in RACE:
                raise


def check_tree():
    """Every name leads to a file of one number; a file has as many links as it has names."""
    names, files = {}, 0
    for directory, _, found in os.walk("tree"):
        for name in found:
            path = os.path.join(directory, name)
            stat = os.stat(path)
            names.setdefault(stat.st_ino, []).append(path)
            with open(path, "rb") as file:
                data = file.read()
            assert len(data) == stat.st_size, path
            lines = set(data[: len(data) // 7 * 7].split(b"\n")) - {b""}
            # What was truncated longer than it was is filled with zeros.
            lines = {line.strip(b"\0") for line in lines} - {b""}
            whole = {line for line in lines if len(line) == 6}
            assert len(whole) <= 1, (path, sorted(lines)[:4])
            files += 1
    for inode, paths in names.items():
        links = {os.stat(path).st_nlink for path in paths}
        assert links == {len(paths)}, (inode, paths, links)
    assert files > 100, files


def open_and_unlinked(worker):
    """Files that are read and written after their names are gone, some copied up after that."""
    held = []
    for number in range(worker, 400, WORKERS):
        path = f"tree/gone/f{number}"
        file = os.open(path, os.O_RDWR if number % 3 else os.O_RDONLY)
        os.unlink(path)
        held.append((number, file))
    for number, file in held:
        if number % 3:
            os.pwrite(file, b"after", 100)
            os.fchmod(file, 0o640)
            os.ftruncate(file, 200)
    for number, file in held:
        expected = content(number)
        if number % 3:
            expected = (expected[:100] + b"after" + expected[105:])[:200]
        assert os.pread(file, 1 << 20, 0) == expected, number
        assert os.fstat(file).st_nlink == 0, number
        os.close(file)


def open_handles(worker):
    """As many as the limit allows, of the lower's files and of new ones."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    held = []
    try:
        while len(held) < 5000:
            number = len(held)
            held.append((number % 400, os.open(f"tree/many/f{number % 400}", os.O_RDWR if number % 7 == 0 else os.O_RDONLY)))
    except OSError as error:
        assert error.errno == errno.EMFILE, error
    assert len(held) > most * 3 // 4 or len(held) == 5000, len(held)
    for number, file in held[:: 1 + worker % 3]:
        assert os.pread(file, 7, 7) == b"%06d\n" % number, number


def xattrs(worker):
    """Large ones and many; full means an error, and the file is as good as before."""
    path = f"tree/xattr/f{worker}"
    right = {}
    for size in (1, 255, 4000, 65535, 65536, 65537, 1 << 20):
        value = bytes([worker]) * size
        try:
            os.setxattr(path, "user.large", value)
            right["user.large"] = value
        except OSError as error:
            assert error.errno in (errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EDQUOT), error
    for number in range(300):
        name = f"user.{number:03}" + "n" * 200
        try:
            os.setxattr(path, name, b"v" * 500)
            right[name] = b"v" * 500
        except OSError as error:
            assert error.errno in (errno.ENOSPC, errno.E2BIG, errno.EDQUOT), error
            break
    for name, value in right.items():
        assert os.getxattr(path, name) == value, name
    assert set(os.listxattr(path)) >= set(right)
    for name in right:
        os.removexattr(path, name)
    with open(path, "rb") as file:
        assert file.read() == content(worker)


def symlink_loops(worker):
    base = f"tree/loops{worker}"
    os.mkdir(base)
    os.symlink("self", f"{base}/self")
    os.symlink("b", f"{base}/a")
    os.symlink("a", f"{base}/b")
    os.symlink(".", f"{base}/here")
    os.symlink("l0", f"{base}/l50")
    for number in range(50):
        os.symlink(f"l{number + 1}", f"{base}/l{number}")
    for name in ("self", "a", "l0", "self/x", "here/" * 41 + "a"):
        for attempt in (os.stat, os.listdir, lambda p: open(p, "w"), lambda p: os.setxattr(p, "user.x", b""), os.chdir):
            try:
                attempt(f"{base}/{name}")
                raise AssertionError(name)
            except OSError as error:
                assert error.errno == errno.ELOOP, (name, error)
    assert os.listdir(f"{base}/here/here/here") and os.readlink(f"{base}/a") == "b"
    try:
        os.symlink("x" * 4096, f"{base}/long")
        raise AssertionError("a link of 4096 bytes")
    except OSError as error:
        assert error.errno == errno.ENAMETOOLONG, error
    shutil.rmtree(base)


def mapped(worker):
    """A mapping from before the copy-up shows what is written after it, by whatever way."""
    for number in range(worker, 40, WORKERS):
        path = f"tree/mapped/f{number}"
        reader = os.open(path, os.O_RDONLY)
        view = mmap.mmap(reader, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        private = mmap.mmap(reader, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        private[0:6] = b"secret"
        assert view[:7] == b"%06d\n" % number
        writer = os.open(path, os.O_RDWR)
        written = mmap.mmap(writer, 0, mmap.MAP_SHARED)
        os.pwrite(writer, b"by-write", 0)
        written[5000:5006] = b"by-map"
        assert view[:8] == b"by-write" and view[5000:5006] == b"by-map" and os.pread(reader, 6, 5000) == b"by-map"
        os.rename(path, path + "-moved")
        os.unlink(path + "-moved")
        written[8000:8003] = b"end"
        assert view[8000:8003] == b"end" and private[0:6] == b"secret"
        for thing in (view, private, written):
            thing.close()
        os.close(reader)
        os.close(writer)


def deep(worker):
    """Deeper than a path can be long."""
    top = os.open("tree", os.O_RDONLY)
    os.chdir("tree")
    os.mkdir(f"deep{worker}")
    os.chdir(f"deep{worker}")
    for _ in range(300):
        os.mkdir("a-longer-name")
        os.chdir("a-longer-name")
    with open("leaf", "w") as file:
        file.write("leaf")
    os.rename(f"deep{worker}", f"moved{worker}", src_dir_fd=top, dst_dir_fd=top)
    with open("leaf") as file:
        assert file.read() == "leaf"
    os.unlink("leaf")
    for _ in range(300):
        os.chdir("..")
        os.rmdir("a-longer-name")
    os.chdir("..")
    os.rmdir(f"moved{worker}")
    assert f"moved{worker}" not in os.listdir(".")


for work, count in ((links_and_renames, WORKERS), (open_and_unlinked, WORKERS), (open_handles, 24), (xattrs, WORKERS),
                    (symlink_loops, WORKERS), (mapped, WORKERS), (deep, WORKERS)):
    in_processes(count, work)
    if work is links_and_renames:
        check_tree()
    print(work.__name__, flush=True)
shutil.rmtree("tree")
assert not os.path.exists("tree")
print("storm over", flush=True)
sys.stdin.read()
os.mkdir("tree")
with open("tree/new", "w") as file:
    file.write("new")
assert os.listdir("tree") == ["new"]
