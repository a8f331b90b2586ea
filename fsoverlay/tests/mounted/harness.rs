//! Directories of a case, starting the mount, and checks that give errors.

use std::fmt::Display;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

/// The inner half's status for "cannot be tested here".
pub(crate) const SKIPPED: u8 = 77;

/// Why a case did not pass.
#[derive(Debug)]
pub(crate) enum Failure {
    Skip(String),
    Wrong(String),
}

impl<E: Display> From<E> for Failure {
    #[track_caller]
    fn from(err: E) -> Self {
        Self::Wrong(format!("{}: {err}", std::panic::Location::caller()))
    }
}

pub(crate) type Check = Result<(), Failure>;

/// Fails unless two values are equal.
macro_rules! same {
    ($left:expr, $right:expr $(, $($more:tt)+)?) => {{
        let (left, right) = (&$left, &$right);
        if left != right {
            let note = [String::new() $(, format!(" ({})", format_args!($($more)+)))?].concat();
            return Err($crate::harness::Failure::Wrong(format!(
                "{}:{}: {} is {left:?}, not {right:?}{note}",
                file!(), line!(), stringify!($left),
            )));
        }
    }};
}

/// Fails unless a condition holds.
macro_rules! holds {
    ($condition:expr $(, $($more:tt)+)?) => {
        if !$condition {
            let note = [String::new() $(, format!(" ({})", format_args!($($more)+)))?].concat();
            return Err($crate::harness::Failure::Wrong(format!(
                "{}:{}: not so: {}{note}", file!(), line!(), stringify!($condition),
            )));
        }
    };
}

/// Fails unless an operation fails with this errno.
macro_rules! errno {
    ($operation:expr, $errno:ident) => {{
        let wanted = rustix::io::Errno::$errno;
        match $operation {
            Ok(_) => {
                return Err($crate::harness::Failure::Wrong(format!(
                    "{}:{}: {} succeeded",
                    file!(),
                    line!(),
                    stringify!($operation),
                )));
            }
            Err(err) => {
                let got = $crate::harness::errno_of(&err.into());
                if got != Some(wanted) {
                    return Err($crate::harness::Failure::Wrong(format!(
                        "{}:{}: {} gave {got:?}, not {wanted:?}",
                        file!(),
                        line!(),
                        stringify!($operation),
                    )));
                }
            }
        }
    }};
}

pub(crate) use {errno, holds, same};

pub(crate) fn errno_of(err: &std::io::Error) -> Option<rustix::io::Errno> {
    rustix::io::Errno::from_io_error(err)
}

/// One case; see the crate's documentation.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) outside: fn(&mut World) -> Check,
    pub(crate) inside: fn(&[String]) -> Check,
}

/// The directories of a case: two lowers, an upper, a work directory, a mount point and
/// a place for anything else.
pub(crate) struct World {
    pub(crate) name: &'static str,
    pub(crate) dir: PathBuf,
}

impl World {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn lower(&self) -> PathBuf {
        self.path("lower")
    }

    pub(crate) fn upper(&self) -> PathBuf {
        self.path("upper")
    }

    /// The mount of the lower and the upper, running the inner half.
    pub(crate) fn mount(&self) -> Mount {
        let mut mount = self.bare();
        mount.option("--lower", self.lower());
        mount.upper(self)
    }

    /// A mount without layers and upper, running the inner half.
    pub(crate) fn bare(&self) -> Mount {
        let mut options = vec!["--translated".into(), "--at".into(), self.path("mnt").into()];
        options.push("--report".into());
        Mount { options, args: Vec::new(), name: self.name, wrapper: Vec::new() }
    }

    pub(crate) fn empty_upper(&self) -> Check {
        for name in ["upper", "work"] {
            remove(&self.path(name))?;
            std::fs::create_dir(self.path(name))?;
        }
        Ok(())
    }
}

/// A mount about to be made.
pub(crate) struct Mount {
    options: Vec<std::ffi::OsString>,
    args: Vec<String>,
    name: &'static str,
    wrapper: Vec<String>,
}

impl Mount {
    pub(crate) fn upper(mut self, world: &World) -> Self {
        self.option("--upper", world.upper());
        self.option("--work", world.path("work"));
        self
    }

    pub(crate) fn option(&mut self, name: &str, value: impl Into<std::ffi::OsString>) {
        self.options.push(name.into());
        self.options.push(value.into());
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<std::ffi::OsString>) -> Self {
        self.option(name, value);
        self
    }

    pub(crate) fn flag(mut self, name: &str) -> Self {
        self.options.push(name.into());
        self
    }

    /// Arguments of the inner half.
    pub(crate) fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Runs the whole under another command.
    pub(crate) fn under(mut self, command: &[&str]) -> Self {
        self.wrapper = command.iter().map(|&w| w.to_owned()).collect();
        self
    }

    pub(crate) fn command(&self) -> Result<Command, Failure> {
        // A request that is never answered must fail, not hang.
        let limit = if std::env::var_os("FSOVERLAY_FULL").is_some() { "3600" } else { "300" };
        self.command_under(&["timeout", "-s", "KILL", limit])
    }

    /// The command under another one; of the server itself if that is empty.
    pub(crate) fn command_under(&self, first: &[&str]) -> Result<Command, Failure> {
        let me = std::env::current_exe()?;
        let mut words = first.iter().map(std::ffi::OsString::from).collect::<Vec<_>>();
        words.extend(self.wrapper.iter().map(std::ffi::OsString::from));
        words.extend([me.clone().into(), "--mount".into()]);
        let mut command = Command::new(words.remove(0));
        command
            .args(words)
            .args(&self.options)
            .arg("--")
            .arg(me)
            .arg("--inside")
            .arg(self.name)
            .args(&self.args);
        Ok(command)
    }

    pub(crate) fn output(&self) -> Result<Output, Failure> {
        Ok(self.command()?.output()?)
    }

    /// Runs the inner half; its failure is ours. Gives whether the server found the
    /// upper changed.
    pub(crate) fn run(&self) -> Result<bool, Failure> {
        let output = self.output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() == Some(i32::from(SKIPPED)) {
            return Err(Failure::Skip(text));
        }
        if !output.status.success() {
            return Err(Failure::Wrong(format!("{}\n{text}", output.status)));
        }
        if text.contains("panicked") || text.contains("internal error") {
            return Err(Failure::Wrong(text));
        }
        Ok(text.contains("changed=true"))
    }
}

/// One of the counts that the server reports in the end.
pub(crate) fn count_in(report: &str, name: &str) -> Result<u64, Failure> {
    let (_, rest) = report.split_once(&format!(" {name}: ")).ok_or(format!("no {name} in {report}"))?;
    Ok(rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default().parse()?)
}

/// The example that mounts and serves.
pub(crate) fn mount_program() -> Result<Command, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--mount");
    Ok(command)
}

/// Another mount, made in a mount of the case `name` in `dir`, with its upper in `home`; it runs the inner half
/// with the argument `above`.
pub(crate) fn mount_above(name: &'static str, dir: &Path, home: &Path) -> Mount {
    let world = World { name, dir: dir.to_owned() };
    let mount = world.bare().with("--at", dir.join("other/mnt"));
    mount.with("--upper", home.join("upper")).with("--work", home.join("work")).arg("above")
}

/// Runs the outer half in fresh directories.
pub(crate) fn run(case: &Case) -> Check {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    if !Path::new("/dev/fuse").exists() {
        return Err(Failure::Skip("there is no /dev/fuse".to_owned()));
    }
    let unique = format!("fsoverlay-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let dir = std::env::temp_dir().join(unique);
    std::fs::create_dir(&dir)?;
    // Inside other ids look at it.
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755))?;
    for name in ["lower", "lower2", "upper", "work", "mnt", "other"] {
        std::fs::create_dir(dir.join(name))?;
    }
    let mut world = World { name: case.name, dir };
    let result = (case.outside)(&mut world);
    // Whatever the payload did, its user can remove what is stored.
    let removed = Command::new("rm").arg("-rf").arg(world.upper()).arg(world.path("work")).status()?;
    remove(&world.dir)?;
    result?;
    holds!(removed.success());
    Ok(())
}

/// Removes a tree of ours, whatever modes it has.
pub(crate) fn remove(dir: &Path) -> Check {
    let status = Command::new("rm").arg("-rf").arg(dir).status()?;
    if status.success() {
        return Ok(());
    }
    // Directories without rights of the lowers made here; the upper has none such.
    Command::new("chmod").args(["-R", "u+rwX"]).arg(dir).status()?;
    Command::new("rm").arg("-rf").arg(dir).status()?;
    Ok(())
}

/// Whether this user has subordinate ids (or is root, who needs none).
pub(crate) fn need_range() -> Check {
    let uid = nix::unistd::getuid();
    if uid.is_root() {
        // In a namespace of its own root may hold fewer ids than it would map.
        if mapped_ids()? >= 65536 {
            return Ok(());
        }
    }
    let name = nix::unistd::User::from_uid(uid)?.map(|u| u.name).unwrap_or_default();
    let subuids = std::fs::read_to_string("/etc/subuid").unwrap_or_default();
    if subuids.lines().any(|l| l.split(':').next() == Some(&name)) {
        Ok(())
    } else {
        Err(Failure::Skip("no subordinate ids".to_owned()))
    }
}

/// How many uids this process's namespace has.
pub(crate) fn mapped_ids() -> Result<u64, Failure> {
    let map = std::fs::read_to_string("/proc/self/uid_map")?;
    Ok(map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum())
}

/// Whether the failure is the kernel's refusal to mount its own overlay here: in a
/// container, or because the directories are on a file system that cannot be its upper.
pub(crate) fn no_kernel_overlay(failure: &Failure) -> bool {
    matches!(failure, Failure::Wrong(text) if text.contains("Error: EPERM") || text.contains("Error: EINVAL"))
}

pub(crate) fn nothing(_: &[String]) -> Check {
    Ok(())
}
