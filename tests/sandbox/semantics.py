"""What build tools rely on, tried on the overlay. Argument: a directory of a lower layer with
`existing` (0123456789) and `dir/inner`."""

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import stat
import sys
import threading

LOWER = sys.argv[1]
WORK = os.path.join(os.path.dirname(LOWER), "semantics-work")
libc = ctypes.CDLL(None, use_errno=True)
failures = []


def check(function):
    """Runs a check in a directory of its own, with a fresh name for each."""
    directory = os.path.join(WORK, function.__name__)
    os.makedirs(directory)
    os.chdir(directory)
    try:
        function()
    except BaseException as error:  # every check is to be told of, whatever it raised
        import traceback
        failures.append(function.__name__)
        print("FAILED", function.__name__, repr(error))
        traceback.print_exc(limit=-1, file=sys.stdout)


def fails(number, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except OSError as error:
        assert error.errno == number, f"{errno.errorcode[error.errno]} rather than {errno.errorcode[number]}"
        return
    raise AssertionError(f"{call} succeeded rather than {errno.errorcode[number]}")


def write(path, data, mode="wb"):
    with open(path, mode) as file:
        file.write(data)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def renameat2(old, new, flags):
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def lower_copy(name):
    """A fresh path of the lower with known content: copied up by what the check does."""
    return os.path.join(LOWER, name)


@check
def append_and_truncate_of_a_lower_file():
    path = lower_copy("existing")
    before = os.stat(path)
    write(path, b"ABC", "ab")
    assert read(path) == b"0123456789ABC"
    os.truncate(path, 4)
    assert read(path) == b"0123"
    assert os.stat(path).st_ino == before.st_ino, "the inode number changed with the copy-up"
    with open(path, "r+b") as file:
        file.seek(2)
        file.write(b"xy")
    assert read(path) == b"01xy"


@check
def descriptors_opened_before_the_copy_up_see_the_change():
    path = lower_copy("dir/inner")
    reader = os.open(path, os.O_RDONLY)
    write(path, b"changed")
    assert os.pread(reader, 100, 0) == b"changed"
    os.close(reader)


@check
def exclusive_creation():
    os.close(os.open("f", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    fails(errno.EEXIST, os.open, "f", os.O_CREAT | os.O_EXCL)
    fails(errno.ENOENT, os.open, "missing", os.O_RDONLY)
    fails(errno.EISDIR, os.open, ".", os.O_WRONLY)
    fails(errno.ENOTDIR, os.open, "f/x", os.O_RDONLY)


@check
def shared_mappings():
    write("m", b"\0" * 8192)
    fd = os.open("m", os.O_RDWR)
    one = mmap.mmap(fd, 8192)
    two = mmap.mmap(fd, 8192)
    one[4096:4100] = b"mmap"
    assert two[4096:4100] == b"mmap"
    one.flush()
    assert os.pread(fd, 4, 4096) == b"mmap"
    os.pwrite(fd, b"pwrite", 0)
    assert one[:6] == b"pwrite"
    one.close(), two.close(), os.close(fd)
    assert read("m")[4096:4100] == b"mmap"


@check
def private_mapping_of_a_lower_file():
    fd = os.open(lower_copy("existing"), os.O_RDONLY)
    view = mmap.mmap(fd, 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
    assert view[:2] == b"01"


@check
def rename_of_files():
    write("a", b"a"), write("b", b"b")
    os.rename("a", "b")
    assert read("b") == b"a" and not os.path.exists("a")
    write("c", b"c")
    fails(errno.EEXIST, renameat2, "b", "c", 1)
    renameat2("b", "fresh", 1)
    renameat2("fresh", "c", 2)
    assert read("fresh") == b"c" and read("c") == b"a"
    fails(errno.ENOENT, renameat2, "fresh", "missing", 2)


@check
def rename_of_directories():
    os.makedirs("d/e"), write("d/e/f", b"x")
    os.rename("d", "moved")
    assert read("moved/e/f") == b"x"
    os.mkdir("empty")
    os.rename("moved", "empty")
    assert read("empty/e/f") == b"x"
    os.mkdir("full"), write("full/x", b"")
    fails(errno.ENOTEMPTY, os.rename, "empty", "full")
    fails(errno.EINVAL, os.rename, "empty", "empty/e/inside")
    write("file", b"")
    fails(errno.ENOTDIR, os.rename, "empty", "file")
    fails(errno.EISDIR, os.rename, "file", "empty")


@check
def rename_of_a_lower_directory():
    source = os.path.join(LOWER, "dir")
    target = os.path.join(LOWER, "dir-renamed")
    # EXDEV is what the kernel's overlay says; mv and build tools then copy. Ours should do it.
    os.rename(source, target)
    assert os.listdir(target) == ["inner"] and not os.path.exists(source)
    os.mkdir(source)
    assert os.listdir(source) == [], "a directory made again shows what was there before"


@check
def hard_links():
    write("one", b"x")
    os.link("one", "two")
    assert os.stat("one").st_nlink == 2 and os.stat("one").st_ino == os.stat("two").st_ino
    write("two", b"changed")
    assert read("one") == b"changed"
    os.unlink("one")
    assert os.stat("two").st_nlink == 1 and read("two") == b"changed"
    fails(errno.EEXIST, os.link, "two", "two")
    os.mkdir("d")
    fails(errno.EPERM, os.link, "d", "d2")
    os.symlink("two", "s")
    os.link("s", "s2", follow_symlinks=False)
    assert os.readlink("s2") == "two"


@check
def hard_link_of_a_lower_file():
    path = lower_copy("existing")
    os.link(path, "linked")
    write("linked", b"both", "wb")
    assert read(path) == b"both"


@check
def symbolic_links():
    os.symlink("x" * 4000, "long")
    assert os.readlink("long") == "x" * 4000
    os.symlink("loop", "loop")
    fails(errno.ELOOP, os.open, "loop", os.O_RDONLY)
    fails(errno.ELOOP, os.open, "long", os.O_RDONLY | os.O_NOFOLLOW)
    assert os.lstat("long").st_size == 4000


@check
def unlinked_files_live_while_open():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"still")
    os.unlink("f")
    assert os.pread(fd, 10, 0) == b"still" and os.fstat(fd).st_nlink == 0
    os.write(fd, b" here")
    os.ftruncate(fd, 7)
    assert os.pread(fd, 20, 0) == b"still h"
    os.fchmod(fd, 0o640)
    assert not os.path.exists("f") and os.listdir(".") == []
    os.close(fd)
    path = os.path.join(LOWER, "open-then-unlinked")
    write(path, b"y")
    fd = os.open(path, os.O_RDONLY)
    os.unlink(path)
    assert os.read(fd, 5) == b"y"


@check
def unlinked_directories_stay_usable():
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir("d")
    assert os.listdir(fd) == []
    fails(errno.ENOENT, os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=fd)


@check
def temporary_files_without_a_name():
    # O_TMPFILE or the error by which callers know that they must fall back.
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        assert error.errno in (errno.EOPNOTSUPP, errno.EISDIR), errno.errorcode[error.errno]
    else:
        os.write(fd, b"x")
        os.link(f"/proc/self/fd/{fd}", "named", follow_symlinks=True)
        assert read("named") == b"x"
    import tempfile
    with tempfile.TemporaryFile(dir=".") as file:
        file.write(b"fallback")


@check
def extended_attributes():
    write("f", b"")
    os.setxattr("f", "user.name", b"value")
    assert os.getxattr("f", "user.name") == b"value" and os.listxattr("f") == ["user.name"]
    fails(errno.EEXIST, os.setxattr, "f", "user.name", b"x", os.XATTR_CREATE)
    fails(errno.ENODATA, os.setxattr, "f", "user.other", b"x", os.XATTR_REPLACE)
    os.setxattr("f", "user.name", b"v" * 2000)
    assert len(os.getxattr("f", "user.name")) == 2000
    os.removexattr("f", "user.name")
    fails(errno.ENODATA, os.getxattr, "f", "user.name")
    assert os.listxattr("f") == [], os.listxattr("f")
    os.mkdir("d"), os.setxattr("d", "user.d", b"")
    assert os.getxattr("d", "user.d") == b""


@check
def our_own_attributes_do_not_show():
    path = lower_copy("existing")
    os.chmod(path, 0o600)
    os.chown(path, 5, 6)
    names = os.listxattr(path)
    assert not any("overlay" in name or "containers" in name or "rootlet" in name for name in names), names


@check
def overlay_attributes_of_the_payload_stay_its_own():
    os.mkdir("d"), write("d/inside", b"x")
    # A nested overlay stores these. They must not act on ours.
    os.setxattr("d", "user.overlay.opaque", b"y")
    assert os.getxattr("d", "user.overlay.opaque") == b"y" and os.listdir("d") == ["inside"]
    assert "user.overlay.opaque" in os.listxattr("d")


@check
def sparse_files():
    with open("s", "wb") as file:
        file.seek(100 << 20)
        file.write(b"end")
    s = os.stat("s")
    assert s.st_size == (100 << 20) + 3 and s.st_blocks * 512 < 10 << 20, s.st_blocks
    fd = os.open("s", os.O_RDONLY)
    assert os.pread(fd, 4, 50 << 20) == b"\0\0\0\0"


@check
def fallocate():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.posix_fallocate(fd, 0, 100000)
    assert os.fstat(fd).st_size == 100000
    os.pwrite(fd, b"x" * 8192, 0)
    FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
    result = libc.fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(4096))
    assert result == 0, errno.errorcode[ctypes.get_errno()]
    assert os.pread(fd, 8192, 0) == b"\0" * 4096 + b"x" * 4096


@check
def copy_file_range_and_sendfile():
    write("from", bytes(range(256)) * 1000)
    source, target = os.open("from", os.O_RDONLY), os.open("to", os.O_CREAT | os.O_RDWR)
    done = 0
    while done < 256000:
        done += os.copy_file_range(source, target, 256000 - done)
    assert read("to") == read("from")
    os.lseek(target, 0, 0), os.ftruncate(target, 0)
    assert os.sendfile(target, source, 0, 1000) == 1000


@check
def locks():
    write("l", b"")
    one, two = os.open("l", os.O_RDWR), os.open("l", os.O_RDWR)
    fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fails(errno.EAGAIN, fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(one, fcntl.LOCK_UN)
    fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(one, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)
    if (child := os.fork()) == 0:
        try:
            fcntl.lockf(two, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
            os._exit(1)
        except OSError:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "a byte range was locked twice"


@check
def fsync_and_statfs():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"x")
    os.fsync(fd), os.fdatasync(fd)
    directory = os.open(".", os.O_RDONLY)
    os.fsync(directory)
    os.sync()
    s = os.statvfs(".")
    assert s.f_bsize > 0 and s.f_blocks > 0 and s.f_namemax == 255 and s.f_bavail <= s.f_blocks


@check
def times():
    write("f", b"")
    os.utime("f", ns=(1_000_000_001, 2_000_000_002))
    s = os.stat("f")
    assert (s.st_atime_ns, s.st_mtime_ns) == (1_000_000_001, 2_000_000_002), s
    os.utime("f", ns=(-5_000_000_000, 5_000_000_000_000_000_000))
    os.symlink("f", "s")
    os.utime("s", ns=(7, 8), follow_symlinks=False)
    assert os.lstat("s").st_mtime_ns == 8
    before = os.stat("f").st_mtime_ns
    write("f", b"new")
    assert os.stat("f").st_mtime_ns != before
    parent = os.stat(".").st_mtime_ns
    os.utime(".", ns=(0, 0))
    write("another", b"")
    assert os.stat(".").st_mtime_ns >= parent, "a new entry does not touch the directory's time"


@check
def modes_and_the_umask():
    os.umask(0o027)
    os.close(os.open("f", os.O_CREAT | os.O_WRONLY, 0o666))
    os.mkdir("d", 0o777)
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o640 and stat.S_IMODE(os.stat("d").st_mode) == 0o750
    os.umask(0o022)
    os.chmod("f", 0o7751)
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o7751
    # Writing takes set-id bits away, unless the writer may keep them (fake root may).
    os.chmod("d", 0o2775)
    os.mkdir("d/sub")
    assert os.stat("d/sub").st_mode & 0o2000, "set-group-ID is not inherited by directories"


@check
def directories():
    os.mkdir("d"), write("d/x", b"")
    fails(errno.ENOTEMPTY, os.rmdir, "d")
    fails(errno.ENOTDIR, os.rmdir, "d/x")
    fails(errno.EISDIR, os.unlink, "d")
    fails(errno.EEXIST, os.mkdir, "d")
    assert os.stat("d").st_nlink >= 1
    os.unlink("d/x"), os.rmdir("d")
    fails(errno.ENOENT, os.stat, "d")


@check
def listing_while_removing():
    os.mkdir("d")
    for i in range(3000):
        write(f"d/{i}", b"")
    seen = 0
    with os.scandir("d") as entries:
        for entry in entries:
            os.unlink(entry.path)
            seen += 1
    assert seen == 3000 and os.listdir("d") == [], seen
    os.rmdir("d")


@check
def sockets_and_fifos():
    server = socket.socket(socket.AF_UNIX)
    server.bind("s"), server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("s")
    client.send(b"x")
    assert server.accept()[0].recv(1) == b"x"
    os.mkfifo("p")
    reader = threading.Thread(target=lambda: write("got", read("p")))
    reader.start()
    write("p", b"through a fifo")
    reader.join()
    assert read("got") == b"through a fifo"
    assert stat.S_ISSOCK(os.stat("s").st_mode) and stat.S_ISFIFO(os.stat("p").st_mode)


@check
def appends_of_many_processes_do_not_mix():
    def work(mark):
        fd = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for _ in range(500):
            os.write(fd, mark * 100 + b"\n")
        os._exit(0)
    children = []
    for mark in (b"a", b"b", b"c", b"d"):
        pid = os.fork()
        if pid == 0:
            work(mark)
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    lines = read("log").splitlines()
    assert len(lines) == 2000 and all(len(set(line)) == 1 and len(line) == 100 for line in lines), len(lines)


@check
def concurrent_copy_up_of_one_file():
    path = os.path.join(LOWER, "existing")
    os.chmod(path, 0o644)
    def work(index):
        fd = os.open(path, os.O_RDWR)
        os.pwrite(fd, bytes([65 + index]), 100 + index)
        os.close(fd)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert read(path)[100:116] == bytes(range(65, 81))


@check
def long_names():
    name = "n" * 255
    write(name, b"x")
    os.rename(name, "m" * 255)
    os.unlink("m" * 255)
    os.mkdir(name), os.rmdir(name)
    fails(errno.ENAMETOOLONG, os.stat, "n" * 256)


@check
def one_file_system_from_the_lower_to_the_upper():
    assert os.stat(LOWER).st_dev == os.stat(".").st_dev == os.stat("/").st_dev


print("failed:", ", ".join(failures) if failures else "none")
print("all held" if not failures else "not all held")
sys.exit(1 if failures else 0)
