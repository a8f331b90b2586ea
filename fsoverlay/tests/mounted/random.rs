//! Random sequences of operations, on the mount and on a plain directory: the same
//! results, the same trees, also after a remount and as the kernel's overlayfs sees it.
//!
//! `FSOVERLAY_SEEDS=FROM..TO` runs other seeds.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, XattrFlags, renameat_with};

use crate::harness::{Case, Check, Failure, World, errno_of, no_kernel_overlay, same};
use crate::semantics::{make_tree, no_leftovers};

pub(crate) const CASES: &[Case] =
    &[Case { name: "random_operations_match_a_plain_directory", outside: seeds, inside: compare }];

/// splitmix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or(0)
    }
}

/// A lower with several directories of one shape, so that names meet. Without hard
/// links: which names of one are in the upper when it is mounted again depends on which
/// were looked up before.
fn make_lower(dir: &Path) -> Check {
    for name in [".", "p", "q"] {
        make_tree(&dir.join(name))?;
        fs::remove_file(dir.join(name).join("dir/a2"))?;
    }
    Ok(())
}

fn seeds(world: &mut World) -> Check {
    let range = std::env::var("FSOVERLAY_SEEDS").unwrap_or_else(|_| "1..13".to_owned());
    let (from, to) = range.split_once("..").ok_or("FSOVERLAY_SEEDS=FROM..TO is wanted")?;
    let (lower, plain) = (world.lower(), world.path("other"));
    for seed in from.parse::<u64>()?..to.parse()? {
        world.empty_upper()?;
        for dir in [&lower, &plain] {
            crate::harness::remove(dir)?;
            fs::create_dir(dir)?;
            make_lower(dir)?;
        }
        let pristine = tree(&lower)?;
        let step = |count: u32, from: u64| {
            let mount = world.mount().arg(from.to_string()).arg(count.to_string());
            mount.arg(plain.display().to_string()).run().map_err(|failure| match failure {
                Failure::Wrong(text) => Failure::Wrong(format!("seed {seed}: {text}")),
                skip @ Failure::Skip(_) => skip,
            })
        };
        for part in 0..3 {
            step(250, seed * 1000 + part)?;
        }
        same!(tree(&lower)?, pristine, "seed {seed} changed the lower");
        no_leftovers(world)?;
        let in_words = |view: &str, failure| match failure {
            Failure::Wrong(text) => Failure::Wrong(format!("seed {seed}, {view}: {text}")),
            skip @ Failure::Skip(_) => skip,
        };
        // The upper as a layer, once with its redirects and once without.
        let as_layer = || {
            let layers = world.bare().with("--lower", &lower).with("--lower", world.upper());
            layers.arg("0").arg("0").arg(plain.display().to_string()).run()
        };
        as_layer().map_err(|failure| in_words("as a layer", failure))?;
        fsoverlay::export(&crate::disk::spec(world))?;
        as_layer().map_err(|failure| in_words("exported, as a layer", failure))?;
        let by_kernel = world.mount().flag("--kernel").arg("0").arg("0").arg(plain.display().to_string());
        match by_kernel.run() {
            Err(failure) if no_kernel_overlay(&failure) => {}
            other => {
                other.map_err(|failure| in_words("the kernel's view", failure))?;
            }
        }
        let _ = fs::set_permissions(world.path("work/work"), fs::Permissions::from_mode(0o700));
    }
    Ok(())
}

/// What is compared of each object.
fn tree(dir: &Path) -> Result<BTreeMap<PathBuf, String>, Failure> {
    fn add(dir: &Path, at: &Path, all: &mut BTreeMap<PathBuf, String>) -> Check {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let shown = at.join(path.file_name().ok_or("no name")?);
            let meta = path.symlink_metadata()?;
            let mut text = if meta.is_dir() {
                add(&path, &shown, all)?;
                format!("dir {:o}", meta.mode() & 0o7777)
            } else if meta.is_symlink() {
                format!("link {}", fs::read_link(&path)?.display())
            } else {
                let data = fs::read(&path)?;
                format!("file {:o} {} {:?}", meta.mode() & 0o7777, meta.len(), String::from_utf8_lossy(&data))
            };
            let mut buf = [0; 64];
            if let Ok(n) = rustix::fs::lgetxattr(&path, "user.test", &mut buf[..]) {
                text.push_str(&format!(" [{}]", String::from_utf8_lossy(&buf[..n])));
            }
            all.insert(shown, text);
        }
        Ok(())
    }
    let mut all = BTreeMap::new();
    add(dir, Path::new(""), &mut all)?;
    Ok(all)
}

const NAMES: [&str; 7] = ["dir", "sub", "file", "a", "b", "new", "empty"];
const TOPS: [&str; 3] = [".", "p", "q"];

fn path(random: &mut Random) -> PathBuf {
    let mut path = PathBuf::from(TOPS[random.below(TOPS.len())]);
    for _ in 0..=random.below(3) {
        path.push(NAMES[random.below(NAMES.len())]);
    }
    path
}

/// One operation, described by numbers so that it can be done in two places.
#[derive(Debug)]
struct Operation {
    what: usize,
    a: PathBuf,
    b: PathBuf,
    number: usize,
}

impl Operation {
    fn random(random: &mut Random) -> Self {
        Self { what: random.below(17), a: path(random), b: path(random), number: random.below(5000) }
    }

    fn run(&self, base: &Path) -> std::io::Result<String> {
        let (a, b, number) = (base.join(&self.a), base.join(&self.b), self.number);
        let text = format!("{number};");
        let nothing = |()| String::new();
        let flags = |flags| renameat_with(CWD, &a, CWD, &b, flags).map_err(std::io::Error::from).map(nothing);
        match self.what {
            0 | 1 => fs::write(&a, text.repeat(number % 40)).map(nothing),
            2 => OpenOptions::new()
                .write(true)
                .open(&a)?
                .write_all_at(text.as_bytes(), number as u64)
                .map(nothing),
            3 => {
                use std::io::Write;
                OpenOptions::new().append(true).open(&a)?.write_all(text.as_bytes()).map(nothing)
            }
            4 => OpenOptions::new().write(true).open(&a)?.set_len(number as u64 % 300).map(nothing),
            5 => fs::create_dir(&a).map(nothing),
            6 => fs::remove_file(&a).map(nothing),
            7 => fs::remove_dir(&a).map(nothing),
            8 | 9 => fs::rename(&a, &b).map(nothing),
            10 => flags(RenameFlags::NOREPLACE),
            11 => flags(RenameFlags::EXCHANGE),
            12 => fs::hard_link(&a, &b).map(nothing),
            13 => symlink(format!("../{}", NAMES[number % NAMES.len()]), &a).map(nothing),
            14 => {
                // The plain directory is worked on by its owner, who needs his rights.
                let mode = if a.symlink_metadata()?.is_dir() { 0o700 } else { 0o600 };
                if a.symlink_metadata()?.is_symlink() {
                    return Ok(String::new());
                }
                let mode = mode | u32::try_from(number % 64).unwrap_or(0);
                fs::set_permissions(&a, fs::Permissions::from_mode(mode)).map(nothing)
            }
            15 => {
                if a.symlink_metadata()?.is_symlink() {
                    return Ok(String::new());
                }
                rustix::fs::setxattr(&a, "user.test", text.as_bytes(), XattrFlags::empty())?;
                Ok(String::new())
            }
            _ => {
                // A descriptor from before goes on after the object changed its name.
                let file = File::open(&a)?;
                let moved = fs::rename(&a, &b).is_ok();
                let mut buf = [0; 32];
                let read = file.read_at(&mut buf, 0);
                Ok(format!("{moved} {read:?} {:?} {}", &buf[..8], file.metadata()?.is_dir()))
            }
        }
    }
}

fn compare(args: &[String]) -> Check {
    let [seed, count, plain] = args else { return Err("three arguments are wanted".into()) };
    let (plain, mount) = (Path::new(plain), Path::new("."));
    let mut random = Random::new(seed.parse()?);
    for i in 0..count.parse::<u32>()? {
        let operation = Operation::random(&mut random);
        let show = |result: std::io::Result<String>| result.map_err(|err| errno_of(&err));
        let (ours, theirs) = (show(operation.run(mount)), show(operation.run(plain)));
        same!(ours, theirs, "operation {i}: {operation:?}");
    }
    let (ours, theirs) = (tree(mount)?, tree(plain)?);
    for (path, what) in &theirs {
        same!(ours.get(path), Some(what), "{}", path.display());
    }
    same!(
        ours.len(),
        theirs.len(),
        "{:?}",
        ours.keys().filter(|k| !theirs.contains_key(*k)).collect::<Vec<_>>()
    );
    Ok(())
}
