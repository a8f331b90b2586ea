//! Servers that are killed at random moments of a workload.
//!
//! The workload is a random sequence; it notes each operation before and after in a file. Whatever was done
//! must be there when the upper is mounted again; the operation that was under way is done or not; and what
//! was deleted stays deleted. The kernel's overlayfs shows the same.
//!
//! The moments are counted in operations, and by strace in system calls of the server. They come from the
//! seed; `FSOVERLAY_SEEDS=FROM..TO` tries others.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::harness::{Case, Check, Failure, World, errno_of, holds, no_kernel_overlay, same};
use crate::operation::{CHANGES, Operation, Random, Rules, Site, TOPS};
use crate::random::{Tree, kernels_view, nameless, tree, without};
use crate::semantics::{make_tree, no_leftovers};

pub(crate) const CASES: &[Case] = &[
    Case { name: "killed_between_operations_nothing_is_lost", outside: by_operations, inside },
    Case { name: "killed_between_system_calls_nothing_is_lost", outside: by_calls, inside },
];

/// Operations of a workload.
const OPERATIONS: usize = 120;

/// What the server does to the disk; what changes names comes more often.
fn calls() -> Vec<&'static str> {
    [&CHANGES[1..5], &CHANGES[..], &["pwrite64", "ftruncate"]].concat()
}

const RULES: Rules = Rules::NARROW;

/// One step of the workload.
#[derive(Debug)]
enum Step {
    Random(Operation),
    /// A file that is written, synced and not closed.
    Synced(usize),
}

impl Step {
    fn of(seed: u64) -> impl Iterator<Item = Self> {
        let mut random = Random::new(seed);
        (0..OPERATIONS).map(move |i| {
            // A descriptor that stays open holds back what was written to it.
            let operation = std::iter::repeat_with(|| Operation::random(&mut random)).find(|o| !o.keeps());
            match operation {
                Some(operation) if i % 10 != 0 => Self::Random(operation),
                _ => Self::Synced(i),
            }
        })
    }

    fn run(&self, site: &mut Site, at: &Path, open: &mut Vec<File>) -> Check {
        match self {
            // Whether it fails is not what is tested here; without a server it was not done.
            Self::Random(operation) => {
                use rustix::io::Errno;
                if let Err(err) = operation.run(site)
                    && matches!(errno_of(&err), Some(Errno::NOTCONN | Errno::CONNABORTED))
                {
                    return Err(err.into());
                }
            }
            Self::Synced(i) => {
                let mut file =
                    OpenOptions::new().create(true).append(true).open(at.join(format!("synced{}", i % 3)))?;
                file.write_all(format!("{i};").repeat(100).as_bytes())?;
                file.sync_all()?;
                open.push(file);
            }
        }
        Ok(())
    }
}

/// Seeds that find a whiteout which is not put in one step, and the like.
const WORTHWHILE: [u64; 1] = [139];

fn seeds(usual: std::ops::Range<u64>) -> Result<Vec<u64>, Failure> {
    let Ok(range) = std::env::var("FSOVERLAY_SEEDS") else {
        return Ok(WORTHWHILE.into_iter().chain(usual).collect());
    };
    let (from, to) = range.split_once("..").ok_or("FSOVERLAY_SEEDS=FROM..TO is wanted")?;
    Ok((from.parse()?..to.parse()?).collect())
}

fn make_lower(dir: &Path) -> Check {
    for name in TOPS {
        let top = dir.join(name);
        make_tree(&top)?;
        fs::remove_file(top.join("dir/a2"))?;
        fs::hard_link(top.join("file"), top.join("dir/sub/a"))?;
        fs::hard_link(top.join("dir/b"), top.join("b"))?;
        fs::hard_link(top.join("dir/b"), top.join("dir/sub/b"))?;
    }
    Ok(())
}

fn by_operations(world: &mut World) -> Check {
    for seed in seeds(1..16)? {
        prepare(world)?;
        let lines = 1 + Random::new(seed).below(OPERATIONS);
        let mut server = world
            .mount()
            .arg("work")
            .arg(seed.to_string())
            .command_under(&[])?
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let progress = BufReader::new(server.stdout.take().ok_or("no output")?);
        let seen = progress.lines().take(lines).count();
        server.kill()?;
        server.wait()?;
        same!(seen, lines);
        survived(world, seed).map_err(|failure| at(&format!("seed {seed}, killed at {lines}"), failure))?;
    }
    Ok(())
}

fn by_calls(world: &mut World) -> Check {
    if std::process::Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        return Err(Failure::Skip("there is no strace".to_owned()));
    }
    let mut killed = 0;
    let seeds = seeds(1..41)?;
    let count = seeds.len();
    for seed in seeds {
        prepare(world)?;
        let mut random = Random::new(seed);
        let calls = calls();
        let call = calls[random.below(calls.len())];
        // Of some there are many.
        let when = 1 + random.below(if matches!(call, "openat" | "utimensat") { 60 } else { 8 });
        let inject = format!("inject={call}:signal=KILL:when={when}");
        // The command in the mount, which is executed, is not the server.
        let strace = ["strace", "-f", "-b", "execve", "-qq", "-o", "/dev/null", "-e", &inject];
        let mount = world.bare().with("--workers", "1").with("--lower", world.lower()).upper(world);
        let mut server = mount
            .arg("work")
            .arg(seed.to_string())
            .command_under(&strace)?
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        killed += usize::from(!server.wait()?.success());
        survived(world, seed).map_err(|failure| at(&format!("seed {seed}, {inject}"), failure))?;
    }
    // Some calls are rarer than others.
    holds!(killed * 4 >= count, "{killed} of {count} were killed");
    Ok(())
}

fn at(moment: &str, failure: Failure) -> Failure {
    match failure {
        Failure::Wrong(text) => Failure::Wrong(format!("{moment}: {text}")),
        skip @ Failure::Skip(_) => skip,
    }
}

fn prepare(world: &World) -> Check {
    world.empty_upper()?;
    for dir in [world.lower(), world.path("other")] {
        crate::harness::remove(&dir)?;
        fs::create_dir(&dir)?;
    }
    make_lower(&world.lower())
}

/// Compares what is there with what the notes say.
fn survived(world: &World, seed: u64) -> Check {
    let notes = fs::read_to_string(world.path("other/notes")).unwrap_or_default();
    let count = |what: &str| notes.lines().filter(|line| *line == what).count();
    let (begun, done) = (count("begun"), count("done"));
    let plain = world.path("other/plain");
    make_lower(&plain)?;
    let (mut site, mut open) = (Site::new(&plain, RULES), Vec::new());
    let mut steps = Step::of(seed);
    for step in steps.by_ref().take(done) {
        step.run(&mut site, &plain, &mut open)?;
    }
    let before = seen(&plain)?;
    let last = steps.next().filter(|_| begun > done);
    if let Some(step) = &last {
        step.run(&mut site, &plain, &mut open)?;
    }
    let after = seen(&plain)?;
    world.mount().arg("look").run()?;
    no_leftovers(world)?;
    let now = read(&world.path("other/now"))?;
    let is_right = |path: &PathBuf| -> bool {
        let what = now.get(path);
        if what == before.get(path) || what == after.get(path) {
            return true;
        }
        let (before, after) = (before.get(path), after.get(path));
        // Made or truncated, and not written yet.
        before != after && what.is_some_and(|what| what.starts_with("file ") && what.contains(" 0 bytes"))
            // In between an object has both names.
            || last.as_ref().is_some_and(|step| matches!(step, Step::Random(operation) if operation.counts_names()))
                && [before, after].into_iter().flatten().any(|one| what.is_some_and(|what| nameless(what) == nameless(one)))
    };
    for path in now.keys().chain(before.keys()).chain(after.keys()) {
        holds!(
            is_right(path),
            "{}: {:?}, before {:?}, after {:?}, done {done}, begun {begun}: {last:?}",
            path.display(),
            now.get(path),
            before.get(path),
            after.get(path)
        );
    }
    // What was to get another name has one of them.
    if let Some(Step::Random(operation)) = &last
        && let Some((from, to)) = operation.renames()
        && before != after
    {
        let has = |tree: &Tree, path: &Path| {
            tree.get(path)
                .is_some_and(|what| now.get(path).is_some_and(|now| nameless(now) == nameless(what)))
        };
        holds!(has(&before, &from) || has(&after, &to), "{operation:?} lost it");
    }
    fsoverlay::export(&crate::disk::spec(world))?;
    match world.mount().flag("--kernel").arg("look").run() {
        Err(failure) if no_kernel_overlay(&failure) => {}
        other => {
            other?;
            let kernels = read(&world.path("other/now"))?;
            for (path, what) in &now {
                let special = what.starts_with("fifo ") || what.starts_with("socket ");
                // Names of a hard link that stay in a layer are another file's for the kernel.
                let theirs = kernels.get(path).map(|what| nameless(&kernels_view(what, false)));
                holds!(
                    special && theirs.is_some() || theirs.as_ref() == Some(&nameless(what)),
                    "the kernel sees {theirs:?}, not {what:?} at {path:?}"
                );
            }
            same!(kernels.len(), now.len());
        }
    }
    let _ = fs::set_permissions(world.path("work/work"), std::os::unix::fs::PermissionsExt::from_mode(0o700));
    Ok(())
}

/// The tree without times, which for directories may be the copy's, and without owners, who are others
/// outside.
fn seen(dir: &Path) -> Result<Tree, Failure> {
    let strip = |what: String| {
        let what = without(&what.replacen(", of ", " of ", 1), 2..3);
        match what.split(' ').position(|word| word == "of") {
            Some(at) => without(&what, at..at + 2),
            None => what,
        }
    };
    Ok(tree(dir)?.into_iter().map(|(path, what)| (path, strip(what))).collect())
}

fn read(file: &Path) -> Result<Tree, Failure> {
    let mut tree = BTreeMap::new();
    for line in fs::read_to_string(file)?.lines() {
        let (path, what) = line.split_once('\t').ok_or("not a line of a tree")?;
        tree.insert(path.into(), what.to_owned());
    }
    Ok(tree)
}

fn inside(args: &[String]) -> Check {
    let mount = std::env::current_dir()?;
    let other = mount.parent().ok_or("no parent")?.join("other");
    match args {
        [step, seed] if step == "work" => {
            let mut notes = OpenOptions::new().create(true).append(true).open(other.join("notes"))?;
            let (mut site, mut open) = (Site::new(&mount, RULES), Vec::new());
            for step in Step::of(seed.parse()?) {
                notes.write_all(b"begun\n")?;
                writeln!(std::io::stdout(), "begun")?;
                step.run(&mut site, &mount, &mut open)?;
                notes.write_all(b"done\n")?;
            }
            Ok(())
        }
        [step] if step == "look" => {
            let mut file = File::create(other.join("now"))?;
            for (path, what) in seen(&mount)? {
                writeln!(file, "{}\t{what}", path.display())?;
            }
            Ok(())
        }
        _ => Err("unknown step".into()),
    }
}
