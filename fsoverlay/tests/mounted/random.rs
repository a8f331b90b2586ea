//! Random sequences of operations: the same results, the same trees, the same in the upper.
//!
//! Each sequence is done on the mount and on a second place, also across remounts of both:
//!
//! - `kernel`: the kernel's overlayfs over the same layers. What it refuses with `EXDEV` (it does not
//!   rename directories of layers) is left out here as well. At the end the uppers are compared, and each
//!   of the two shows the other's upper.
//! - `plain`: a copy in one plain directory, for everything that the kernel's overlayfs cannot do or does
//!   otherwise than a file system would;
//! - `native`: the same, where the overlay keeps owners and modes on the disk itself. In the end the kernel's
//!   overlayfs shows them, too.
//!
//! The layers are 1, 3 or 30. All but the lowest are uppers that the kernel's overlayfs made, with
//! whiteouts and opaque directories.
//!
//! `FSOVERLAY_SEEDS=FROM..TO` runs these seeds in all ways, `FSOVERLAY_LOG=FILE` says what they do. What failed once is in [`FAILED_ONCE`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::harness::{
    Case, Check, Failure, World, errno_of, holds, mapped_ids, need_range, no_kernel_overlay, same,
};
use crate::operation::{Operation, Random, Rules, Site, TOPS, describe, shorten, xattrs};
use crate::semantics::{make_tree, no_leftovers};

pub(crate) const CASES: &[Case] = &[
    Case { name: "random_operations_match_a_plain_directory", outside: as_plain, inside },
    Case {
        name: "random_operations_with_owners_on_disk_match_a_plain_directory",
        outside: as_native,
        inside,
    },
    Case { name: "random_operations_match_the_kernels_overlay", outside: as_kernel, inside },
    Case { name: "threads_match_plain_directories", outside: threads, inside: inside_threads },
];

/// `(layers, seed)` of sequences that found something, by the place they were compared with.
const FAILED_ONCE: [(Reference, &[(usize, u64)]); 3] =
    [(Reference::Plain, &[(1, 204)]), (Reference::Native, &[]), (Reference::Kernel, &[])];

/// Numbers of layers with the seeds for each of them.
const ALWAYS: [(usize, std::ops::Range<u64>); 3] = [(1, 1..6), (3, 1..5), (30, 1..3)];

/// Operations between two remounts.
const OPERATIONS: u32 = 250;

/// What is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reference {
    Plain,
    Native,
    Kernel,
}

impl Reference {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Native => "native",
            Self::Kernel => "kernel",
        }
    }

    fn rules(self, owners: bool) -> Rules {
        match self {
            Self::Plain | Self::Native => {
                Rules { keep_readers: true, any_mode: true, owners, acls: true, maps: true }
            }
            Self::Kernel => Rules::NARROW,
        }
    }
}

fn as_plain(world: &mut World) -> Check {
    all(world, Reference::Plain)
}

fn as_native(world: &mut World) -> Check {
    need_range()?;
    all(world, Reference::Native)
}

fn as_kernel(world: &mut World) -> Check {
    all(world, Reference::Kernel)
}

fn all(world: &World, reference: Reference) -> Check {
    let mut seeds = Vec::new();
    match std::env::var("FSOVERLAY_SEEDS") {
        Ok(range) => {
            let (from, to) = range.split_once("..").ok_or("FSOVERLAY_SEEDS=FROM..TO is wanted")?;
            let range = from.parse()?..to.parse()?;
            seeds.extend(ALWAYS.iter().flat_map(|(layers, _)| range.clone().map(|seed| (*layers, seed))));
        }
        Err(_) => {
            for (_, failed) in FAILED_ONCE.iter().filter(|(of, _)| *of == reference) {
                seeds.extend_from_slice(failed);
            }
            seeds.extend(ALWAYS.iter().flat_map(|(layers, seeds)| seeds.clone().map(|seed| (*layers, seed))));
        }
    }
    for (layers, seed) in seeds {
        let done = sequence(world, reference, layers, seed);
        // Others than the user may own what the sequence left in namespaces of its own.
        let cleared = outer(world, reference, 0, 0, &["clear"]).flag("--kernel").run();
        match done {
            Err(Failure::Skip(why)) if layers > 1 && reference != Reference::Kernel => {
                // The layers cannot be made without the kernel's overlayfs.
                tell(&format!("{layers} layers left out: {why}"));
            }
            Err(Failure::Wrong(text)) => {
                let case = format!("({layers}, {seed}), compared with {reference:?}: {text}");
                return Err(Failure::Wrong(case));
            }
            other => other?,
        }
        match cleared {
            Err(failure) if no_kernel_overlay(&failure) => {}
            other => other.map(drop)?,
        }
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "a note of the test runner")]
fn tell(text: &str) {
    eprintln!("{text}");
}

fn layer(world: &World, at: usize) -> PathBuf {
    world.path("other").join(format!("layer{at}"))
}

/// A mount of the inner half, without layers and upper yet.
fn outer(
    world: &World,
    reference: Reference,
    layers: usize,
    seed: u64,
    step: &[&str],
) -> crate::harness::Mount {
    let mut mount = world.bare();
    if need_range().is_ok() {
        mount = mount.flag("--range");
    }
    if reference == Reference::Native {
        // The server must be root where the owners are.
        mount = mount.flag("--native");
        if !nix::unistd::getuid().is_root() {
            mount = mount.under(&["unshare", "-U", "--map-root-user", "--map-auto"]);
        }
    }
    let words = [reference.name().to_owned(), layers.to_string(), seed.to_string()];
    for word in words.into_iter().chain(step.iter().map(|&word| word.to_owned())) {
        mount = mount.arg(word);
    }
    for at in 0..layers {
        mount.option("--lower", layer(world, at));
    }
    if layers == 0 {
        // Any two directories, to have a namespace.
        mount.option("--lower", world.lower());
        mount.option("--lower", world.path("lower2"));
    }
    mount
}

fn sequence(world: &World, reference: Reference, layers: usize, seed: u64) -> Check {
    let other = world.path("other");
    crate::harness::remove(&other)?;
    fs::create_dir(&other)?;
    world.empty_upper()?;
    for dir in ["ref", "ref/upper", "ref/work", "ref/work2", "ref/at", "ref/plain"] {
        fs::create_dir(other.join(dir))?;
    }
    for at in 0..layers {
        fs::create_dir(layer(world, at))?;
    }
    for name in TOPS {
        let top = layer(world, 0).join(name);
        make_tree(&top)?;
        fs::remove_file(top.join("dir/a2"))?;
        if reference != Reference::Kernel && layers == 1 {
            // What is one file in a layer is several in the kernel's upper; and a layer goes on counting
            // names that others above it hide.
            fs::hard_link(top.join("file"), top.join("dir/sub/a"))?;
            fs::hard_link(top.join("dir/b"), top.join("b"))?;
            fs::hard_link(top.join("dir/b"), top.join("dir/sub/b"))?;
        }
    }
    set_old_times(&layer(world, 0))?;
    let step = |step: &[&str]| outer(world, reference, layers, seed, step);
    let kernel = |mount: crate::harness::Mount| match mount.flag("--kernel").run() {
        Err(failure) if no_kernel_overlay(&failure) => {
            Err(Failure::Skip("the kernel does not mount an overlay here".to_owned()))
        }
        other => other.map(drop),
    };
    if layers > 1 {
        kernel(outer(world, reference, 0, seed, &["layers", &layers.to_string()]))?;
    } else if reference == Reference::Kernel {
        kernel(outer(world, reference, 0, seed, &["nothing"]))?;
    }
    let pristine = lowers(world, layers)?;
    for part in ["0", "1", "2"] {
        step(&["run", part]).upper(world).run()?;
        no_leftovers(world)?;
    }
    same!(lowers(world, layers)?, pristine, "a layer was changed");
    if reference == Reference::Kernel {
        let theirs = step(&["look", "theirs"])
            .with("--upper", other.join("ref/upper"))
            .with("--work", other.join("ref/work2"));
        theirs.run()?;
    }
    // The upper as a layer, once with its redirects and once without.
    let as_layer = |whose| step(&["look", whose]).with("--lower", world.upper()).run();
    as_layer("layer").map_err(|failure| in_words("as a layer", failure))?;
    if reference == Reference::Native {
        step(&["export"]).run()?;
    } else {
        fsoverlay::export(&spec(world, layers))?;
    }
    as_layer("exported").map_err(|failure| in_words("exported, as a layer", failure))?;
    match kernel(step(&["look", "ours"]).upper(world)) {
        Err(Failure::Skip(_)) => {}
        other => other.map_err(|failure| in_words("exported, in the kernel's eyes", failure))?,
    }
    let _ = fs::set_permissions(world.path("work/work"), fs::Permissions::from_mode(0o700));
    Ok(())
}

fn in_words(view: &str, failure: Failure) -> Failure {
    match failure {
        Failure::Wrong(text) => Failure::Wrong(format!("{view}: {text}")),
        skip @ Failure::Skip(_) => skip,
    }
}

fn spec(world: &World, layers: usize) -> fsoverlay::OverlaySpec {
    let mut spec = crate::disk::spec(world);
    let one = spec.layers.remove(0);
    spec.layers.extend((0..layers).map(|at| fsoverlay::LayerSpec { dir: layer(world, at), ..one.clone() }));
    spec
}

/// The same in a namespace where the owners are those on disk.
fn native_spec(other: &Path, layers: usize) -> fsoverlay::OverlaySpec {
    let layer = |at| fsoverlay::LayerSpec { dir: other.join(format!("layer{at}")), ..Default::default() };
    let (dir, work) = (other.join("../upper"), other.join("../work"));
    fsoverlay::OverlaySpec {
        layers: (0..layers).map(layer).collect(),
        upper: Some(fsoverlay::UpperSpec { dir, work, ..Default::default() }),
        owner_form: fsoverlay::OwnerForm::Native,
        ..Default::default()
    }
}

/// All layers as they are on disk.
fn lowers(world: &World, layers: usize) -> Result<Vec<Tree>, Failure> {
    (0..layers).map(|at| tree(&layer(world, at))).collect()
}

fn set_old_times(dir: &Path) -> Check {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};
    for path in tree(dir)?.into_keys().map(|path| dir.join(path)).chain([dir.to_owned()]) {
        let time = Timespec { tv_sec: 1_200_000_000, tv_nsec: 123_456_789 };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// What is compared of each object, by its path.
pub(crate) type Tree = BTreeMap<PathBuf, String>;

pub(crate) fn tree(dir: &Path) -> Result<Tree, Failure> {
    fn add(dir: &Path, at: &Path, all: &mut Tree) -> Check {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let shown = at.join(path.file_name().ok_or("no name")?);
            let meta = path.symlink_metadata()?;
            let mut text = describe(&meta);
            if meta.is_dir() {
                add(&path, &shown, all)?;
            } else if meta.is_symlink() {
                text.push_str(&format!(", to {}", fs::read_link(&path)?.display()));
            } else if meta.is_file() {
                text.push_str(&format!(" {}", shorten(&fs::read(&path)?)));
            }
            if meta.is_dir() || meta.is_file() {
                text.push_str(&format!(" {}", xattrs(&path)?));
            }
            all.insert(shown, text);
        }
        Ok(())
    }
    let mut all = BTreeMap::new();
    add(dir, Path::new(""), &mut all)?;
    Ok(all)
}

/// Fails unless two trees are the same.
pub(crate) fn same_trees(ours: &Tree, theirs: &Tree) -> Check {
    for (path, what) in theirs {
        same!(ours.get(path), Some(what), "{}", path.display());
    }
    let more = ours.keys().filter(|path| !theirs.contains_key(*path)).collect::<Vec<_>>();
    holds!(more.is_empty(), "{more:?}");
    Ok(())
}

fn inside(args: &[String]) -> Check {
    let [reference, layers, seed, step, rest @ ..] = args else { return Err("what is to be done?".into()) };
    let reference = match reference.as_str() {
        "plain" => Reference::Plain,
        "native" => Reference::Native,
        _ => Reference::Kernel,
    };
    let (layers, seed): (usize, u64) = (layers.parse()?, seed.parse()?);
    let ours = std::env::current_dir()?;
    let other = ours.parent().ok_or("no parent")?.join("other");
    // The kernel takes a page of text about a mount: names are given from here.
    std::env::set_current_dir(&other)?;
    match (step.as_str(), rest) {
        ("nothing", []) => Ok(()),
        ("layers", [layers]) => make_layers(layers.parse()?, seed),
        ("run", [part]) => run(&ours, reference, layers, seed, part.parse()?),
        ("export", []) => Ok(fsoverlay::export(&native_spec(&other, layers)).map(drop)?),
        ("look", [whose]) => look(&ours, reference, whose),
        ("clear", []) => {
            fs::remove_dir_all("ref")?;
            if reference == Reference::Native {
                fs::remove_dir_all("../upper")?;
                fs::create_dir("../upper")?;
            }
            Ok(())
        }
        _ => Err(format!("unknown step {step}").into()),
    }
}

fn has_xattr(path: &Path, name: &str, value: Option<&[u8]>) -> bool {
    let mut buf = [0; 256];
    rustix::fs::lgetxattr(path, name, &mut buf[..])
        .is_ok_and(|n| value.is_none_or(|value| value == &buf[..n]))
}

fn mount_kernels(
    lowers: impl DoubleEndedIterator<Item = String>,
    upper: &str,
    work: &str,
    at: &str,
) -> Check {
    let lowers = lowers.rev().collect::<Vec<_>>().join(":");
    let data = format!("userxattr,lowerdir={lowers},upperdir={upper},workdir={work}");
    mount(Some("overlay"), at, Some("overlay"), MsFlags::empty(), Some(data.as_str()))?;
    Ok(())
}

fn names(layers: usize) -> impl DoubleEndedIterator<Item = String> {
    (0..layers).map(|at| format!("layer{at}"))
}

/// Changes some things in each layer, over those below it, by the kernel's overlayfs.
fn make_layers(layers: usize, seed: u64) -> Check {
    for at in 1..layers {
        mount_kernels(names(at), &format!("layer{at}"), "ref/work", "ref/at")?;
        let mut random = Random::new(seed * 1000 + 500 + at as u64);
        let mut site = Site::new("ref/at", Reference::Kernel.rules(false));
        for _ in 0..40 {
            let operation = Operation::random(&mut random);
            // A layer goes on counting names that others above it hide.
            if !operation.links() {
                let _ = operation.run(&mut site);
            }
        }
        if at % 3 == 1 {
            // What random operations seldom do.
            let top = Path::new("ref/at").join(TOPS[random.below(TOPS.len())]);
            let dir = top.join(["dir", "dir/sub", "empty"][random.below(3)]);
            if dir.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
                fs::remove_dir_all(&dir)?;
                if at % 2 == 1 {
                    fs::create_dir(&dir)?;
                    fs::write(dir.join("new"), format!("of {at}"))?;
                }
            }
        }
        drop(site);
        umount2("ref/at", MntFlags::empty())?;
        // Where the kernel works there must be nothing when it is mounted with another upper.
        fs::remove_dir_all("ref/work")?;
        fs::create_dir("ref/work")?;
    }
    Ok(())
}

/// Operations on both places; then compares them.
fn run(ours: &Path, reference: Reference, layers: usize, seed: u64, part: u64) -> Check {
    let merged = || tree(ours);
    let theirs = match reference {
        Reference::Plain | Reference::Native => PathBuf::from("ref/plain"),
        Reference::Kernel => PathBuf::from("ref/at"),
    };
    if reference == Reference::Kernel {
        mount_kernels(names(layers), "ref/upper", "ref/work", "ref/at")?;
    }
    if part == 0 {
        fs::write("ref/below", "")?;
        if reference != Reference::Kernel {
            let copied =
                std::process::Command::new("cp").arg("-a").arg(ours.join(".")).arg(&theirs).status()?;
            holds!(copied.success());
        }
        same_trees(&merged()?, &tree(&theirs)?)?;
    }
    let pristine = match reference {
        Reference::Plain | Reference::Native => Tree::new(),
        Reference::Kernel => below(layers)?,
    };
    let rules = reference.rules(mapped_ids()? >= 65536);
    let (mut here, mut there) = (Site::new(ours, rules), Site::new(&theirs, rules));
    let mut random = Random::new(seed * 1000 + part);
    let mut log = std::env::var_os("FSOVERLAY_LOG")
        .map(|path| fs::OpenOptions::new().append(true).create(true).open(path))
        .transpose()?;
    for i in 0..OPERATIONS {
        let operation = Operation::random(&mut random);
        let show = |result: std::io::Result<String>| result.map_err(|err| errno_of(&err));
        let wanted = show(operation.run(&mut there));
        if reference == Reference::Kernel && wanted == Err(Some(rustix::io::Errno::XDEV)) {
            continue;
        }
        if let Some(log) = &mut log {
            writeln!(log, "{seed}, part {part}, operation {i}: {operation:?}: {wanted:?}")?;
        }
        same!(show(operation.run(&mut here)), wanted, "part {part}, operation {i}: {operation:?}");
    }
    drop((here, there));
    // What nobody looked at before the remount must be right as well.
    if !seed.is_multiple_of(2) && part < 2 {
        return Ok(());
    }
    let now = merged()?;
    same_trees(&now, &tree(&theirs)?)?;
    if reference == Reference::Kernel {
        let upper = ours.parent().ok_or("no parent")?.join("upper");
        let (mut held, mut wanted) = (Tree::new(), Tree::new());
        upper_holds(&upper, Path::new(""), true, &pristine, &mut held)?;
        upper_holds(Path::new("ref/upper"), Path::new(""), true, &pristine, &mut wanted)?;
        // What is only a copy of what is below: the kernel copies what is opened for writing, ours what is
        // written to.
        for holds in [&mut held, &mut wanted] {
            holds.retain(|path, what| {
                let copy = what == "an object" || what == "a merged directory";
                !(copy && pristine.contains_key(path) && pristine.get(path) == now.get(path))
            });
        }
        same_trees(&held, &wanted).map_err(|failure| in_words("in the upper", failure))?;
    }
    let mut file = fs::File::create("ref/final")?;
    for (path, what) in now {
        writeln!(file, "{}\t{what}", path.display())?;
    }
    Ok(())
}

/// The layers merged, without an upper.
fn below(layers: usize) -> Result<Tree, Failure> {
    fs::create_dir_all("ref/none")?;
    let lowers = ["ref/none".to_owned()].into_iter().chain(names(layers)).rev().collect::<Vec<_>>().join(":");
    let data = format!("userxattr,lowerdir={lowers}");
    fs::create_dir_all("ref/below-at")?;
    mount(Some("overlay"), "ref/below-at", Some("overlay"), MsFlags::empty(), Some(data.as_str()))?;
    let pristine = tree(Path::new("ref/below-at"))?;
    umount2("ref/below-at", MntFlags::empty())?;
    Ok(pristine)
}

/// What each name of an upper is there for. `merges`: what is below shows here.
fn upper_holds(dir: &Path, at: &Path, merges: bool, pristine: &Tree, all: &mut Tree) -> Check {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let shown = at.join(path.file_name().ok_or("no name")?);
        let meta = path.symlink_metadata()?;
        let below = pristine.get(&shown).filter(|_| merges);
        let whiteout = meta.file_type().is_char_device() && meta.rdev() == 0
            || meta.is_file() && meta.size() == 0 && has_xattr(&path, "user.overlay.whiteout", None);
        let opaque = has_xattr(&path, "user.overlay.opaque", Some(b"y"));
        let dir_below = below.is_some_and(|what| what.starts_with("dir "));
        let what = match (whiteout, meta.is_dir(), below) {
            (true, _, Some(_)) => "a whiteout",
            (true, _, None) => "a whiteout of nothing",
            // Elsewhere the kernel sets the mark as well, as a precaution.
            (_, true, _) if dir_below && opaque => "another directory",
            (_, true, _) if dir_below => "a merged directory",
            _ => "an object",
        };
        all.insert(shown.clone(), what.to_owned());
        if meta.is_dir() {
            upper_holds(&path, &shown, dir_below && !opaque, pristine, all)?;
        }
    }
    Ok(())
}

/// Whether the tree is what it was at the end of the sequence: our upper as a "layer", and when it is
/// "exported", and then in the kernel's eyes ("ours"); or the kernel's upper in our eyes ("theirs").
fn look(at: &Path, reference: Reference, whose: &str) -> Check {
    let mut wanted = Tree::new();
    for line in fs::read_to_string("ref/final")?.lines() {
        let (path, what) = line.split_once('\t').ok_or("not a line of a tree")?;
        wanted.insert(path.into(), what.to_owned());
    }
    let mut now = tree(at)?;
    let special: BTreeSet<PathBuf> = wanted
        .iter()
        .filter(|(_, what)| what.starts_with("fifo ") || what.starts_with("socket "))
        .map(|(path, _)| path.clone())
        .collect();
    for tree in [&mut wanted, &mut now] {
        for (path, what) in tree {
            match whose {
                // What is special is an empty file on disk.
                "ours" if special.contains(path) => "special".clone_into(what),
                "ours" => *what = nameless(&kernels_view(what, reference == Reference::Plain)),
                // The owners of links are in the work directory.
                "layer" | "exported" if what.starts_with("link ") => *what = without(what, 2..3),
                // Names of a hard link that stay in a layer are another file's then.
                "exported" => *what = nameless(what),
                _ => {}
            }
        }
    }
    same_trees(&now, &wanted)
}

/// The text about an object without the number of its names.
pub(crate) fn nameless(what: &str) -> String {
    let words = what.split(' ').collect::<Vec<_>>();
    let at = words.iter().position(|word| word.starts_with("names"));
    at.map_or_else(|| what.to_owned(), |at| without(what, at - 1..at + 1))
}

/// The text about an object without some words.
pub(crate) fn without(what: &str, words: std::ops::Range<usize>) -> String {
    let left = what.split(' ').enumerate().filter(|(at, _)| !words.contains(at));
    left.map(|(_, word)| word).collect::<Vec<_>>().join(" ")
}

/// The text about an object without our marks, which are attributes to others, and perhaps without mode and
/// owner, which they record.
pub(crate) fn kernels_view(what: &str, recorded: bool) -> String {
    let mut text = if recorded { without(what, 1..3) } else { what.to_owned() };
    if let Some((start, marks)) = text.rsplit_once('{') {
        let marks = marks.trim_end_matches('}').split("\", \"").map(|mark| mark.trim_matches('"'));
        let theirs = marks.filter(|mark| {
            let ours = ["user.fsoverlay.", "user.containers.override_stat"];
            let acl = recorded && mark.starts_with("system.posix_acl_");
            !acl && !ours.iter().any(|name| mark.starts_with(name))
        });
        let theirs = theirs.map(|mark| format!("{mark:?}")).collect::<Vec<_>>().join(", ");
        text = if theirs.is_empty() { start.to_owned() } else { format!("{start}{{{theirs}}}") };
    }
    text
}

/// Threads with a directory each, and threads that share one.
const OWN: usize = 4;
const SHARED: u64 = 3;

fn threads(world: &mut World) -> Check {
    let seeds = match std::env::var("FSOVERLAY_SEEDS") {
        Ok(range) => {
            let (from, to) = range.split_once("..").ok_or("FSOVERLAY_SEEDS=FROM..TO is wanted")?;
            from.parse()?..to.parse()?
        }
        Err(_) => 0..2,
    };
    for seed in seeds {
        let done = threads_once(world, seed);
        let cleared = world.mount().arg("clear").run();
        done.map_err(|failure| in_words(&format!("seed {seed}"), failure))?;
        cleared?;
    }
    Ok(())
}

fn threads_once(world: &World, seed: u64) -> Check {
    let other = world.path("other");
    world.empty_upper()?;
    crate::harness::remove(&world.lower())?;
    let roots = (0..OWN).map(|i| format!("t{i}")).chain(["shared".to_owned()]);
    for root in roots {
        for name in TOPS {
            make_tree(&world.lower().join(&root).join(name))?;
            fs::remove_file(world.lower().join(&root).join(name).join("dir/a2"))?;
        }
    }
    for dir in ["ref", "ref/plain"] {
        fs::create_dir(other.join(dir))?;
    }
    set_old_times(&world.lower())?;
    let pristine = tree(&world.lower())?;
    for part in 0..3 {
        let part = (seed * 3 + part).to_string();
        world.mount().with("--workers", "4").arg("run").arg(part).run()?;
        no_leftovers(world)?;
        world.mount().arg("again").run()?;
    }
    same!(tree(&world.lower())?, pristine, "the layer was changed");
    Ok(())
}

fn inside_threads(args: &[String]) -> Check {
    let ours = std::env::current_dir()?;
    let other = ours.parent().ok_or("no parent")?.join("other/ref");
    match args {
        [step] if step == "again" => {
            let wanted = fs::read_to_string(other.join("final"))?;
            same!(format!("{:#?}", tree(&ours)?), wanted);
            Ok(())
        }
        [step] if step == "clear" => Ok(fs::remove_dir_all(other)?),
        [step, part] if step == "run" => run_threads(&ours, &other, part.parse()?),
        _ => Err("unknown step".into()),
    }
}

fn run_threads(ours: &Path, other: &Path, part: u64) -> Check {
    let plain = other.join("plain");
    if part.is_multiple_of(3) {
        let copied = std::process::Command::new("cp").arg("-a").arg(ours.join(".")).arg(&plain).status()?;
        holds!(copied.success());
    }
    let rules = Reference::Plain.rules(false);
    let alone = |i: usize| -> Check {
        let name = format!("t{i}");
        let mut random = Random::new(part * 100 + i as u64);
        let (mut here, mut there) = (Site::new(ours.join(&name), rules), Site::new(plain.join(&name), rules));
        for count in 0..OPERATIONS {
            let operation = Operation::random(&mut random);
            let show = |result: std::io::Result<String>| result.map_err(|err| errno_of(&err));
            let (got, wanted) = (show(operation.run(&mut here)), show(operation.run(&mut there)));
            same!(got, wanted, "{name}, part {part}, operation {count}: {operation:?}");
        }
        Ok(())
    };
    let together = |i: u64| -> Check {
        use rustix::io::Errno as E;
        let mut random = Random::new(part * 100 + 50 + i);
        let mut site = Site::new(ours.join("shared"), Rules { maps: false, ..rules });
        for count in 0..OPERATIONS {
            let operation = Operation::random(&mut random);
            if let Err(err) = operation.run(&mut site) {
                let wrong = [E::IO, E::STALE, E::NOSYS, E::INPROGRESS, E::BADF, E::NOTCONN, E::TIMEDOUT];
                holds!(
                    !errno_of(&err).is_some_and(|err| err != E::BADF && wrong.contains(&err)),
                    "shared, part {part}, operation {count}: {operation:?}: {err}"
                );
            }
        }
        Ok(())
    };
    let results: Vec<Check> = std::thread::scope(|scope| {
        let own: Vec<_> = (0..OWN).map(|i| scope.spawn(move || alone(i))).collect();
        let shared: Vec<_> = (0..SHARED).map(|i| scope.spawn(move || together(i))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Check>| {
            thread.join().unwrap_or_else(|_| Err(Failure::Wrong("a thread panicked".to_owned())))
        };
        own.into_iter().chain(shared).map(join).collect()
    });
    for result in results {
        result?;
    }
    let now = tree(ours)?;
    for i in 0..OWN {
        let name = format!("t{i}");
        same_trees(&tree(&ours.join(&name))?, &tree(&plain.join(&name))?)?;
    }
    fs::write(other.join("final"), format!("{now:#?}"))?;
    Ok(())
}
