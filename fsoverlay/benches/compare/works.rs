//! The kinds of work. Each gives its parts with their times.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::trees::{deb_name, js_name, sh, source_name};

/// One kind of work over one tree.
pub(crate) struct Work {
    pub(crate) name: &'static str,
    pub(crate) tree: &'static str,
    /// Its tree can be spread over layers.
    pub(crate) layered: bool,
    /// It changes the tree.
    pub(crate) writes: bool,
    pub(crate) asks: Asks,
    /// The server's memory afterwards is of interest.
    pub(crate) memory: bool,
    pub(crate) run: fn(&Path) -> Vec<(&'static str, Duration)>,
    /// Fails unless the work was done, which costs nothing that is measured. (The scale of the tree.)
    pub(crate) check: fn(&Path, usize),
}

/// Who asks the file system for something while a work goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asks {
    /// One thread, which waits for each answer. (git's few, for the files that it knows, are taken for one.)
    InTurns,
    /// One thread, and the kernel for it: it reads ahead, and writes back.
    Ahead,
    /// Several at once.
    AtOnce,
}

const fn work(
    name: &'static str,
    tree: &'static str,
    run: fn(&Path) -> Vec<(&'static str, Duration)>,
) -> Work {
    Work {
        name,
        tree,
        layered: false,
        writes: false,
        asks: Asks::InTurns,
        memory: false,
        run,
        check: |_, _| {},
    }
}

pub(crate) const WORKS: &[Work] = &[
    Work { layered: true, memory: true, ..work("walk", "files", walk) },
    Work { layered: true, ..work("readdir", "flat", readdir) },
    Work { layered: true, ..work("missing", "files", missing) },
    Work { layered: true, ..work("small", "files", small) },
    Work { layered: true, ..work("small with stat", "files", small_with_stat) },
    Work { asks: Asks::AtOnce, ..work("threads", "files", threads) },
    Work { asks: Asks::Ahead, ..work("read", "big", read) },
    Work { writes: true, asks: Asks::Ahead, ..work("read upper", "big", read_upper) },
    Work { writes: true, asks: Asks::Ahead, check: check_write, ..work("write", "big", write) },
    Work { writes: true, check: check_create, ..work("create", "empty", create) },
    Work { writes: true, check: check_untar, ..work("untar", "tar", untar) },
    Work { writes: true, check: check_git, ..work("git", "repo", git) },
    Work { writes: true, asks: Asks::AtOnce, check: check_make, ..work("make", "c", make) },
    Work { writes: true, asks: Asks::AtOnce, check: check_dpkg, ..work("dpkg", "deb", dpkg) },
    Work { writes: true, asks: Asks::AtOnce, check: check_npm, ..work("npm", "npm", npm) },
    Work { writes: true, asks: Asks::AtOnce, check: check_cargo, ..work("cargo", "rust", cargo) },
];

pub(crate) const SMALL_DIRS: usize = 1000;
pub(crate) const PER_DIR: usize = 100;
pub(crate) const GROUPS: usize = 10;
pub(crate) const FLAT: usize = 50_000;
pub(crate) const C_SOURCES: usize = 60;
pub(crate) const DEB_FILES: usize = 2000;
pub(crate) const NPM_PACKAGES: usize = 20;
pub(crate) const CRATES: usize = 12;

pub(crate) fn scaled(count: usize, scale: usize) -> usize {
    (count * scale / 100).max(1)
}

pub(crate) fn dir_name(dir: usize) -> String {
    format!("group-{}/dir-{dir:04}", dir % GROUPS)
}

fn timed(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

/// Twice the same.
fn twice(mut run: impl FnMut()) -> Vec<(&'static str, Duration)> {
    vec![("first", timed(&mut run)), ("again", timed(&mut run))]
}

/// Lists every directory and asks for the attributes of every entry.
fn walk(at: &Path) -> Vec<(&'static str, Duration)> {
    fn visit(dir: &Path) -> usize {
        let mut seen = 0;
        for entry in std::fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            seen += 1;
            if entry.metadata().unwrap().is_dir() {
                seen += visit(&entry.path());
            }
        }
        seen
    }
    twice(|| assert!(visit(at) > 1000))
}

fn readdir(at: &Path) -> Vec<(&'static str, Duration)> {
    twice(|| assert!(std::fs::read_dir(at.join("flat")).unwrap().count() >= 500))
}

/// The directories that there are.
fn dirs(at: &Path) -> Vec<PathBuf> {
    (0..SMALL_DIRS).map(|dir| at.join(dir_name(dir))).filter(|dir| dir.exists()).collect()
}

/// 20,000 names that do not exist.
fn missing(at: &Path) -> Vec<(&'static str, Duration)> {
    let dirs = dirs(at);
    twice(|| {
        for dir in &dirs {
            for i in 0..20 {
                assert!(dir.join(format!("missing-{i}.h")).symlink_metadata().is_err());
            }
        }
    })
}

/// 10,000 files opened, read and closed, and nothing else.
fn small(at: &Path) -> Vec<(&'static str, Duration)> {
    read_small(at, |_| {})
}

/// The same with a look at their size in between, as cat(1) and whoever makes room for all of a file do.
fn small_with_stat(at: &Path) -> Vec<(&'static str, Duration)> {
    read_small(at, |file| assert_eq!(file.metadata().unwrap().len(), 200))
}

fn read_small(at: &Path, look: impl Fn(&File)) -> Vec<(&'static str, Duration)> {
    let dirs = dirs(at);
    // (read_to_end would ask for the size and the position.)
    let mut buf = [0; 4096];
    twice(|| {
        for dir in &dirs {
            for file in 0..10 {
                let mut file = File::open(dir.join(format!("file-{file:03}.txt"))).unwrap();
                look(&file);
                assert_eq!(file.read(&mut buf).unwrap(), 200);
                assert_eq!(file.read(&mut buf).unwrap(), 0);
            }
        }
    })
}

/// As many small files read by one thread as, after it, others by four together.
fn threads(at: &Path) -> Vec<(&'static str, Duration)> {
    let dirs = dirs(at);
    let read_all = |dirs: &[PathBuf], files: std::ops::Range<usize>| {
        for dir in dirs {
            for file in files.clone() {
                std::fs::read(dir.join(format!("file-{file:03}.txt"))).unwrap();
            }
        }
    };
    let one = timed(|| read_all(&dirs, 20..30));
    let four = timed(|| {
        std::thread::scope(|scope| {
            for part in dirs.chunks(dirs.len().div_ceil(4)) {
                scope.spawn(|| read_all(part, 30..40));
            }
        });
    });
    vec![("one reader", one), ("four readers", four)]
}

/// Numbers that look random and are the same for all.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Reads of a large file, from the kernel's cache where that holds it.
fn read(at: &Path) -> Vec<(&'static str, Duration)> {
    let file = File::open(at.join("big")).unwrap();
    let size = file.metadata().unwrap().len();
    let sequential = || {
        let mut buf = vec![0; 1 << 20];
        let mut offset = 0;
        while offset < size {
            offset += file.read_at(&mut buf, offset).unwrap() as u64;
        }
    };
    let first = timed(sequential);
    let again = timed(sequential);
    let random = timed(|| {
        let mut buf = [0; 4096];
        let mut state = 1;
        for _ in 0..100_000 {
            file.read_exact_at(&mut buf, random(&mut state) % (size / 4096) * 4096).unwrap();
        }
    });
    let mapped = timed(|| {
        #[expect(unsafe_code, reason = "a mapping is what is measured")]
        // SAFETY: the file is ours and keeps its length, and the mapping is only read, within its length.
        let sum = unsafe {
            let length = usize::try_from(size).unwrap();
            let start = nix::sys::mman::mmap(
                None,
                length.try_into().unwrap(),
                nix::sys::mman::ProtFlags::PROT_READ,
                nix::sys::mman::MapFlags::MAP_SHARED,
                &file,
                0,
            )
            .unwrap();
            let bytes = std::slice::from_raw_parts(start.as_ptr().cast::<u8>(), length);
            let sum: u64 = bytes.iter().step_by(4096).map(|&b| u64::from(b)).sum();
            nix::sys::mman::munmap(start, length).unwrap();
            sum
        };
        assert_eq!(sum, 7 * size / 4096);
    });
    vec![("first", first), ("sequential", again), ("random", random), ("mmap", mapped)]
}

/// The same of a file that was changed.
fn read_upper(at: &Path) -> Vec<(&'static str, Duration)> {
    OpenOptions::new().write(true).open(at.join("big")).unwrap().write_all_at(&[7], 0).unwrap();
    read(at)
}

/// Buffered writes to new files; closing one counts.
fn write(at: &Path) -> Vec<(&'static str, Duration)> {
    let size: u64 = 256 << 20;
    let sequential = timed(|| {
        let mut file = File::create(at.join("sequential")).unwrap();
        let buf = vec![1; 1 << 20];
        for _ in 0..size >> 20 {
            file.write_all(&buf).unwrap();
        }
    });
    let random = timed(|| {
        let file = OpenOptions::new().read(true).write(true).open(at.join("sequential")).unwrap();
        let mut state = 1;
        for _ in 0..50_000 {
            file.write_all_at(&[2; 4096], random(&mut state) % (size / 4096) * 4096).unwrap();
        }
    });
    vec![("1 MiB seq", sequential), ("4 KiB random", random)]
}

fn check_write(at: &Path, _scale: usize) {
    let bytes = std::fs::read(at.join("sequential")).unwrap();
    assert_eq!(bytes.len(), 256 << 20);
    let random = bytes.chunks(4096).filter(|page| **page == [2; 4096]).count();
    let sequential = bytes.chunks(4096).filter(|page| **page == [1; 4096]).count();
    assert!(random > 30_000 && random + sequential == 65_536, "{random} and {sequential} pages");
}

fn create(at: &Path) -> Vec<(&'static str, Duration)> {
    let name = |i: usize| at.join(format!("dir/file-{i:05}"));
    let create = timed(|| {
        for i in 0..20_000 {
            File::create_new(name(i)).unwrap();
        }
    });
    let rename = timed(|| {
        for i in 0..20_000 {
            std::fs::rename(name(i), at.join(format!("dir/renamed-{i:05}"))).unwrap();
        }
    });
    let unlink = timed(|| {
        for i in 0..20_000 {
            std::fs::remove_file(at.join(format!("dir/renamed-{i:05}"))).unwrap();
        }
    });
    vec![("create", create), ("rename", rename), ("unlink", unlink)]
}

fn check_create(at: &Path, _scale: usize) {
    assert_eq!(std::fs::read_dir(at.join("dir")).unwrap().count(), 0);
}

fn untar(at: &Path) -> Vec<(&'static str, Duration)> {
    let untar = timed(|| sh(at, "tar xf files.tar --no-same-owner"));
    // A look at a few, which the kernel then knows.
    for dir in (0..).step_by(50).map(|dir| at.join("src").join(dir_name(dir))).take_while(|dir| dir.exists())
    {
        assert_eq!(std::fs::read(dir.join("file-099.txt")).unwrap(), [b'x'; 200]);
    }
    assert!(at.join("src").join(dir_name(0)).exists());
    vec![("untar", untar), ("rm -r", timed(|| sh(at, "rm -r src")))]
}

fn check_untar(at: &Path, _scale: usize) {
    assert!(at.join("src").symlink_metadata().is_err());
}

fn git(at: &Path) -> Vec<(&'static str, Duration)> {
    let repo = at.join("repo");
    // (The tree is as it was committed: it has nothing to say.)
    let status = || sh(&repo, "test -z \"$(git status --porcelain)\"");
    vec![
        ("status", timed(status)),
        ("status again", timed(status)),
        ("checkout", timed(|| sh(&repo, "git checkout -q two"))),
    ]
}

fn check_git(at: &Path, scale: usize) {
    let repo = at.join("repo");
    for i in (0..scaled(5000, scale)).take(100) {
        let text = std::fs::read_to_string(repo.join(source_name(i))).unwrap();
        assert!(text.starts_with(if i % 4 == 0 { "second" } else { "first" }), "{i}");
    }
    sh(&repo, "test \"$(git branch --show-current)\" = two && test -z \"$(git status --porcelain)\"");
}

fn make(at: &Path) -> Vec<(&'static str, Duration)> {
    vec![("make -j2", timed(|| sh(at, "make -j2")))]
}

fn check_make(at: &Path, scale: usize) {
    for i in 0..scaled(C_SOURCES, scale) {
        assert!(std::fs::read(at.join(format!("f{i}.o"))).unwrap().starts_with(b"\x7fELF"));
    }
}

fn dpkg(at: &Path) -> Vec<(&'static str, Duration)> {
    let install =
        "PATH=$PATH:/usr/sbin:/sbin dpkg --root=$PWD/root --force-not-root --log=/dev/null -i bench.deb";
    vec![("dpkg -i", timed(|| sh(at, install)))]
}

fn check_dpkg(at: &Path, scale: usize) {
    let status = std::fs::read_to_string(at.join("root/var/lib/dpkg/status")).unwrap();
    assert!(status.contains("Package: bench\nStatus: install ok installed\n"), "{status}");
    for i in 0..scaled(DEB_FILES, scale) {
        assert_eq!(at.join("root").join(deb_name(i)).metadata().unwrap().len(), 1500);
    }
}

fn npm(at: &Path) -> Vec<(&'static str, Duration)> {
    vec![("npm ci", timed(|| sh(at, "HOME=$PWD/home npm ci --offline --no-audit --no-fund")))]
}

fn check_npm(at: &Path, scale: usize) {
    for package in 0..scaled(NPM_PACKAGES, scale) {
        let package = at.join(format!("node_modules/p{package}"));
        assert!(package.join("package.json").exists());
        for i in 0..100 {
            assert_eq!(package.join(js_name(i)).metadata().unwrap().len(), 400);
        }
    }
}

fn cargo(at: &Path) -> Vec<(&'static str, Duration)> {
    assert!(at.join("target").symlink_metadata().is_err());
    vec![("cargo build", timed(|| sh(at, "cargo build --offline")))]
}

fn check_cargo(at: &Path, scale: usize) {
    for i in 0..scaled(CRATES, scale) {
        let library = std::fs::read(at.join(format!("target/debug/libc{i}.rlib"))).unwrap();
        assert!(library.starts_with(b"!<arch>"));
    }
}
