//! The kinds of work. Each gives its parts with their times.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::trees::sh;

/// One kind of work over one tree.
pub(crate) struct Work {
    pub(crate) name: &'static str,
    pub(crate) tree: &'static str,
    /// Its tree can be spread over layers.
    pub(crate) layered: bool,
    /// It changes the tree.
    pub(crate) writes: bool,
    /// The server's memory afterwards is of interest.
    pub(crate) memory: bool,
    pub(crate) run: fn(&Path) -> Vec<(&'static str, Duration)>,
}

const fn work(
    name: &'static str,
    tree: &'static str,
    run: fn(&Path) -> Vec<(&'static str, Duration)>,
) -> Work {
    Work { name, tree, layered: false, writes: false, memory: false, run }
}

pub(crate) const WORKS: &[Work] = &[
    Work { layered: true, memory: true, ..work("walk", "files", walk) },
    Work { layered: true, ..work("readdir", "flat", readdir) },
    Work { layered: true, ..work("missing", "files", missing) },
    Work { layered: true, ..work("small", "files", small) },
    work("threads", "files", threads),
    work("read", "big", read),
    Work { writes: true, ..work("write", "big", write) },
    Work { writes: true, ..work("create", "empty", create) },
    Work { writes: true, ..work("untar", "tar", untar) },
    Work { writes: true, ..work("git", "repo", git) },
    Work { writes: true, ..work("make", "c", make) },
    Work { writes: true, ..work("dpkg", "deb", dpkg) },
    Work { writes: true, ..work("npm", "npm", npm) },
    Work { writes: true, ..work("cargo", "rust", cargo) },
];

pub(crate) const SMALL_DIRS: usize = 1000;
pub(crate) const PER_DIR: usize = 100;
pub(crate) const GROUPS: usize = 10;
pub(crate) const FLAT: usize = 50_000;

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

/// 10,000 files opened, read and closed.
fn small(at: &Path) -> Vec<(&'static str, Duration)> {
    let dirs = dirs(at);
    let mut buf = Vec::new();
    twice(|| {
        for dir in &dirs {
            for file in 0..10 {
                buf.clear();
                File::open(dir.join(format!("file-{file:03}.txt"))).unwrap().read_to_end(&mut buf).unwrap();
                assert_eq!(buf.len(), 200);
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

fn untar(at: &Path) -> Vec<(&'static str, Duration)> {
    vec![
        ("untar", timed(|| sh(at, "tar xf files.tar --no-same-owner"))),
        ("rm -r", timed(|| sh(at, "rm -r src"))),
    ]
}

fn git(at: &Path) -> Vec<(&'static str, Duration)> {
    let repo = at.join("repo");
    let status = || sh(&repo, "git status --porcelain");
    vec![
        ("status", timed(status)),
        ("status again", timed(status)),
        ("checkout", timed(|| sh(&repo, "git checkout -q two"))),
    ]
}

fn make(at: &Path) -> Vec<(&'static str, Duration)> {
    vec![("make -j2", timed(|| sh(at, "make -j2")))]
}

fn dpkg(at: &Path) -> Vec<(&'static str, Duration)> {
    let install =
        "PATH=$PATH:/usr/sbin:/sbin dpkg --root=$PWD/root --force-not-root --log=/dev/null -i bench.deb";
    vec![("dpkg -i", timed(|| sh(at, install)))]
}

fn npm(at: &Path) -> Vec<(&'static str, Duration)> {
    vec![("npm ci", timed(|| sh(at, "HOME=$PWD/home npm ci --offline --no-audit --no-fund")))]
}

fn cargo(at: &Path) -> Vec<(&'static str, Duration)> {
    vec![("cargo build", timed(|| sh(at, "cargo build --offline")))]
}
