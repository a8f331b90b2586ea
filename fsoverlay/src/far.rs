//! What is mounted below a layer, and file systems that may never answer.
//!
//! The table of mounts is read once, when a layer is opened; what is mounted later is crossed like any
//! directory. Each mount below the layer's root goes by a rule, which its type decides:
//!
//! - what the kernel makes up (proc, sysfs, control groups, …) is an empty directory: it is this machine's, not
//!   part of a tree; so is an automounter's, which looking would set going;
//! - what is reached over a network or served by a program (NFS, CIFS, FUSE, …) is *far*: it is shown, but
//!   no worker ever makes a system call on it;
//! - anything else is shown as it is.
//!
//! A far mount has threads of its own ([`MAX_THREADS`]), started when a request needs one. In a hurry
//! ([`crate::errno::hurried`]), as workers always are where there is a far mount, whatever would touch
//! one ends with [`FAR`] before it takes a lock that one of those threads may hold, and the request goes
//! there. If there is no answer in [`crate::OverlaySpec::patience`], it gets `EIO`; the thread goes on
//! waiting, and while it does the next ones get a tenth of that, and nothing once [`MAX_JOBS`] of them
//! wait for a thread. A signal has its effect then at the latest, since a request that the server has
//! cannot be interrupted otherwise.
//!
//! What makes that hold:
//!
//! - directories above a far mount are not asked about it under a lock: its root is a directory with made-up
//!   attributes until a thread of its own has seen it ([`Far::root`]), and its attributes are never cached;
//! - its files' descriptors are closed by the thread that opened them, since closing asks the server, too;
//!   those of its directories are `O_PATH`, which does not;
//! - it cannot be removed or renamed, as no mount point can.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};

use crate::attr::{Key, Kind, Stat};
use crate::engine::Engine;
use crate::errno::{FAR, Res, is_hurried, note_far};
use crate::handle::Fd;
use crate::inode::Node;
use crate::layer::{mix, stat_fd};
use crate::sync::{Mutex, start};

/// Threads of one mount. A kernel has up to 64 reads under way; more at once make no network faster.
pub(crate) const MAX_THREADS: usize = 16;

/// How many requests wait for a thread; those beyond get the error of the ones that were given up. Only a mount
/// that has not answered for long has so many, since what is given up stays in the queue until a thread
/// comes to it.
const MAX_JOBS: usize = 1024;

/// How long a thread waits for more to do. (A test sees what ends it before.)
const LINGER: Duration = Duration::from_secs(if cfg!(test) { 3600 } else { 5 });

/// How long the first look at all far mounts may hold up the start.
const FIRST_LOOK: Duration = Duration::from_millis(100);

/// What is not part of a tree.
#[rustfmt::skip]
const MADE_UP: &[&str] = &[
    "proc", "sysfs", "cgroup", "cgroup2", "devpts", "devtmpfs", "securityfs", "debugfs", "tracefs", "configfs", "bpf",
    "pstore", "efivarfs", "mqueue", "hugetlbfs", "binfmt_misc", "fusectl", "rpc_pipefs", "nfsd", "selinuxfs",
    "smackfs", "nsfs", "autofs",
];

/// What may never answer. Those that a program serves have `fuse.` before their name.
#[rustfmt::skip]
const REMOTE: &[&str] = &[
    "fuse", "fuseblk", "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "afs", "coda", "ncpfs", "lustre", "gfs2",
    "ocfs2", "orangefs", "beegfs", "pvfs2", "vboxsf", "prl_fs",
];

/// How a mount below a layer is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    Hidden,
    Far,
    Shown,
}

impl Rule {
    fn of(fstype: &[u8]) -> Self {
        let is = |name: &&str| name.as_bytes() == fstype;
        if MADE_UP.iter().any(is) {
            Self::Hidden
        } else if fstype.starts_with(b"fuse.") || REMOTE.iter().any(is) {
            Self::Far
        } else {
            Self::Shown
        }
    }
}

/// A line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    dev: u64,
    /// All of the file system, rather than a part of it.
    whole: bool,
    at: PathBuf,
    rule: Rule,
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|&b| b == b' ');
        let dev = std::str::from_utf8(fields.nth(2)?).ok()?;
        let (major, minor) = dev.split_once(':')?;
        let dev = u64::from(major.parse::<u32>().ok()?) << 32 | u64::from(minor.parse::<u32>().ok()?);
        let whole = fields.next()? == b"/";
        let at = unescaped(fields.next()?);
        // Optional fields end with a dash.
        fields.find(|field| *field == b"-")?;
        Some(Self { dev, whole, at: std::ffi::OsString::from_vec(at).into(), rule: Rule::of(fields.next()?) })
    }
}

/// Octal escapes of blanks and backslashes.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| first == b'\\').and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    out
}

/// What is mounted in this process's mount namespace.
#[derive(Debug, Default)]
pub(crate) struct MountTable {
    mounts: Vec<Mount>,
}

impl MountTable {
    pub(crate) fn read() -> Self {
        match std::fs::read("/proc/self/mountinfo") {
            Ok(text) => Self::parse(&text),
            Err(err) => {
                tracing::debug!(%err, "the table of mounts cannot be read");
                Self::default()
            }
        }
    }

    pub(crate) fn parse(text: &[u8]) -> Self {
        Self { mounts: text.split(|&b| b == b'\n').filter_map(Mount::parse).collect() }
    }

    /// Whether a file system may never answer.
    pub(crate) fn is_remote(&self, dev: u64) -> bool {
        self.mounts.iter().any(|mount| mount.dev == dev && mount.rule == Rule::Far)
    }
}

/// The mounts below a directory of which there is something to say, by path relative to it.
#[derive(Debug, Default)]
pub(crate) struct Below {
    /// Those that are not simply shown: hidden, or far.
    pub(crate) special: Vec<(PathBuf, Option<Arc<Far>>)>,
    /// Those that show what is seen elsewhere below the directory, too.
    pub(crate) repeated: Vec<PathBuf>,
}

/// Goes by the table; each mount below the directory has a rule.
pub(crate) fn mounts_below(root: &Fd, table: &MountTable) -> Below {
    let Ok(path) = std::fs::read_link(format!("/proc/self/fd/{}", root.as_raw_fd())) else {
        return Below::default();
    };
    let mounts = select(&path, table);
    let repeated = repeated(&path, table, &mounts);
    let special = mounts
        .into_iter()
        .filter_map(|(path, mount)| match mount.rule {
            Rule::Shown => None,
            // A file (a namespace, a device) stays one. Looking at what the kernel makes up is over at once.
            Rule::Hidden => is_dir(root, &path).then_some((path, None)),
            Rule::Far => {
                let far = Far::new(root.clone(), path.clone(), mount.dev);
                Some((path, Some(far)))
            }
        })
        .collect();
    Below { special, repeated }
}

/// All mounts of a file system below a directory but one: the first by path, of those that show all of it if there is
/// one. (So that the answer is the same on another day.)
fn repeated(root: &Path, table: &MountTable, below: &BTreeMap<PathBuf, &Mount>) -> Vec<PathBuf> {
    let mut shown: Vec<_> = below.iter().filter(|(_, mount)| mount.rule == Rule::Shown).collect();
    if shown.is_empty() {
        return Vec::new();
    }
    let own = table.mounts.iter().filter(|mount| root.starts_with(&mount.at));
    let mut seen: Vec<u64> =
        own.max_by_key(|mount| mount.at.as_os_str().len()).map(|mount| mount.dev).into_iter().collect();
    shown.sort_by_key(|(_, mount)| !mount.whole);
    let mut again = Vec::new();
    for (path, mount) in shown {
        if seen.contains(&mount.dev) {
            again.push(path.clone());
        } else {
            seen.push(mount.dev);
        }
    }
    again
}

fn is_dir(root: &Fd, path: &Path) -> bool {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(root, path, flags, StatxFlags::TYPE)
        .is_ok_and(|stat| Kind::from_mode(stat.stx_mode.into()) == Some(Kind::Dir))
}

/// Of several mounts at one place the last is seen, and none of those below what was covered later.
fn select<'a>(root: &Path, table: &'a MountTable) -> BTreeMap<PathBuf, &'a Mount> {
    let mut mounts: BTreeMap<PathBuf, &Mount> = BTreeMap::new();
    for mount in &table.mounts {
        let Ok(relative) = mount.at.strip_prefix(root) else { continue };
        if relative.as_os_str().is_empty() {
            continue;
        }
        let relative = relative.to_owned();
        mounts.retain(|path, _| !path.starts_with(&relative));
        mounts.insert(relative, mount);
    }
    // What is mounted in a far one is as far.
    let far: Vec<PathBuf> =
        mounts.iter().filter(|(_, mount)| mount.rule == Rule::Far).map(|(path, _)| path.clone()).collect();
    mounts.retain(|path, _| !far.iter().any(|far| path != far && path.starts_with(far)));
    mounts
}

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Pool {
    jobs: VecDeque<Job>,
    /// Those that are about to be there included.
    threads: usize,
    idle: usize,
    /// How often there was none to be had.
    missed: u64,
    /// Requests that may still be given up, by the moment at which they are.
    waiting: VecDeque<(Instant, Weak<dyn GiveUp>)>,
    /// When somebody will look after `waiting`.
    watched: Option<Instant>,
    /// The last that was heard was nothing.
    silent: bool,
    /// There is nothing to do any more.
    over: bool,
}

/// A request that can be answered without an answer.
pub(crate) trait GiveUp: Send + Sync {
    /// Answers with an error, unless it is answered. Whether it was not.
    fn give_up(&self) -> bool;
}

/// A mount that may never answer; see the module.
pub(crate) struct Far {
    layer: Fd,
    path: PathBuf,
    dev: u64,
    /// What stands there, and the id of the file system.
    seen: OnceLock<(Stat, Option<u64>)>,
    pool: Mutex<Pool>,
    changed: Condvar,
}

impl std::fmt::Debug for Far {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Far").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Far {
    fn new(layer: Fd, path: PathBuf, dev: u64) -> Arc<Self> {
        let (seen, pool, changed) = (OnceLock::new(), Mutex::default(), Condvar::new());
        Arc::new(Self { layer, path, dev, seen, pool, changed })
    }

    /// What stands at the mount point, as far as it is known.
    pub(crate) fn root(&self) -> (Stat, Option<u64>) {
        self.seen.get().copied().unwrap_or_else(|| {
            let ino = self.path.as_os_str().as_bytes().iter().fold(1, |h, &b| mix(h ^ u64::from(b)));
            let key = Key { dev: self.dev, ino };
            (Stat { key, mode: 0o040_755, nlink: 2, blksize: 4096, ..Stat::default() }, None)
        })
    }

    fn look(&self) -> Res<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let fd = rustix::fs::openat2(&self.layer, &self.path, flags, Mode::empty(), resolve)?;
        let _ = self.seen.set((stat_fd(fd.as_fd())?, crate::numbers::fsid(fd.as_fd())));
        Ok(())
    }

    /// `FAR`, if whoever asks is in a hurry.
    pub(crate) fn check(self: &Arc<Self>) -> Res<()> {
        if !is_hurried() {
            return Ok(());
        }
        note_far(self);
        Err(FAR)
    }

    /// Runs something on a thread of the mount's. False, and it is dropped, if too much waits already, or
    /// if it is over, or if there is no thread and none to be had. (What others gave meanwhile, since one was about to be there, is dropped
    /// then, too.)
    pub(crate) fn run(self: &Arc<Self>, job: impl FnOnce() + Send + 'static) -> bool {
        let mut pool = self.pool.lock();
        if pool.over {
            return false;
        }
        let room = pool.jobs.len() < MAX_JOBS;
        if room {
            pool.jobs.push_back(Box::new(job));
        }
        if pool.idle >= pool.jobs.len() || pool.threads >= MAX_THREADS {
            drop(pool);
            self.changed.notify_one();
            return room;
        }
        // It counts from now on, and is started without the lock: that may take long.
        pool.threads += 1;
        drop(pool);
        let far = self.clone();
        let Err(err) = start("fsoverlay-far", move || far.serve()) else { return room };
        let mut pool = self.pool.lock();
        pool.threads -= 1;
        // Those that there are take it. Without any it must not wait: not all that does is ever given up.
        let dropped = if pool.threads == 0 { std::mem::take(&mut pool.jobs) } else { VecDeque::new() };
        pool.missed += 1;
        let missed = pool.missed;
        drop(pool);
        // The payload can bring it about.
        if missed.is_power_of_two() {
            tracing::warn!(%err, count = missed, "no thread for a remote file system");
        }
        // (Another one that was about to be there may have done it and gone again. To take it for dropped does no harm.)
        room && dropped.is_empty()
    }

    fn serve(&self) {
        let mut pool = self.pool.lock();
        loop {
            if let Some(job) = pool.jobs.pop_front() {
                drop(pool);
                job();
                pool = self.pool.lock();
                pool.silent = false;
                continue;
            }
            if pool.over {
                pool.threads -= 1;
                return;
            }
            pool.idle += 1;
            let waited = self.changed.wait_timeout(pool, LINGER).unwrap_or_else(PoisonError::into_inner);
            pool = waited.0;
            pool.idle -= 1;
            if pool.jobs.is_empty() && waited.1.timed_out() {
                pool.threads -= 1;
                return;
            }
        }
    }

    /// Notes a request that is to be given up after a while; gives the moment at which
    /// [`Far::give_up_late`] must be called, if nobody does so by then.
    pub(crate) fn wait_for(&self, request: Weak<dyn GiveUp>, patience: Duration) -> Option<Instant> {
        let mut pool = self.pool.lock();
        while pool.waiting.front().is_some_and(|(_, request)| request.strong_count() == 0) {
            pool.waiting.pop_front();
        }
        let patience = if pool.silent { patience / 10 } else { patience };
        let due = Instant::now() + patience;
        // Not always the last: patience becomes less.
        let at = pool.waiting.partition_point(|(other, _)| *other <= due);
        pool.waiting.insert(at, (due, request));
        let watch = pool.watched.is_none_or(|watched| due < watched);
        watch.then(|| *pool.watched.insert(due))
    }

    /// Gives up what has waited too long by `now`; gives the next moment to do so, if nobody else does.
    pub(crate) fn give_up_late(&self, now: Instant) -> Option<Instant> {
        loop {
            let mut pool = self.pool.lock();
            let Some((due, request)) = pool.waiting.pop_front() else {
                pool.watched = None;
                return None;
            };
            let Some(request) = request.upgrade() else { continue };
            if due > now {
                pool.waiting.push_front((due, Arc::downgrade(&request)));
                if pool.watched.is_some_and(|watched| now < watched && watched <= due) {
                    return None;
                }
                return Some(*pool.watched.insert(due));
            }
            drop(pool);
            if request.give_up() {
                tracing::debug!(mount = %self.path.display(), "no answer");
                self.pool.lock().silent = true;
            }
        }
    }

    /// Gives up whatever may be: nobody will look after it.
    pub(crate) fn give_up_all(&self) {
        let waiting = {
            let mut pool = self.pool.lock();
            pool.watched = None;
            std::mem::take(&mut pool.waiting)
        };
        for (_, request) in waiting {
            if let Some(request) = request.upgrade() {
                request.give_up();
            }
        }
    }

    /// What nobody has begun is not begun any more, and whoever waits for something to do ends.
    pub(crate) fn stop(&self) {
        let jobs = {
            let mut pool = self.pool.lock();
            pool.over = true;
            std::mem::take(&mut pool.jobs)
        };
        self.changed.notify_all();
        drop(jobs);
    }
}

impl Engine {
    /// Looks at all far mounts for the first time, and waits for a moment: what is there is known then,
    /// unless it does not answer.
    pub(crate) fn look_far(&self) {
        let (sender, receiver) = std::sync::mpsc::channel();
        for far in &self.far {
            let (mount, sender) = (far.clone(), sender.clone());
            // The first in its queue.
            let _ = far.run(move || {
                if let Err(err) = mount.look() {
                    tracing::debug!(?err, mount = %mount.path.display(), "cannot be looked at");
                }
                let _ = sender.send(());
            });
        }
        // Those that were refused are not waited for.
        drop(sender);
        let until = Instant::now() + FIRST_LOOK;
        for _ in &self.far {
            let left = until.saturating_duration_since(Instant::now());
            if receiver.recv_timeout(left).is_err() {
                return;
            }
        }
    }

    /// What a lookup has made up of a far mount's root is replaced by what it is.
    pub(crate) fn see_far_root(&self, node: &Node) -> Res<()> {
        let Some(part) = &node.dir else { return Ok(()) };
        let lower = {
            let state = part.state.read();
            let explicit = state.generated.is_some_and(|g| self.generated.node(g).explicit);
            state.lowers.first().filter(|_| part.upper.get().is_none() && !explicit).cloned()
        };
        let Some(dir) = lower else { return Ok(()) };
        let Some((parent, name)) = dir.position() else { return Ok(()) };
        let Some(far) = parent.far_at(&name).filter(|far| far.seen.get().is_none()) else { return Ok(()) };
        let stat = stat_fd(self.fd(&dir)?.as_fd())?;
        if let Some(meta) = self.layers[dir.layer as usize].meta(&stat).filter(|meta| meta.kind == Kind::Dir)
        {
            node.inner.lock().meta = self.owners.shown(meta);
        }
        let _ = far.seen.set((stat, None));
        Ok(())
    }
}

impl Node {
    /// Whether it is a far mount's root, which can no more be removed or renamed than any mount.
    pub(crate) fn is_far_root(&self) -> bool {
        self.far.get().is_some_and(|(_, root)| *root)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use super::*;
    use crate::sync::tests::{in_time, while_starting, without_threads};

    #[test]
    fn all_but_one_mount_of_a_file_system_repeat_it() {
        let table = b"\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 8:2 / /home rw - ext4 /dev/sda2 rw
24 22 8:1 /srv /mnt/srv rw - ext4 /dev/sda1 rw
25 22 8:2 /me /export rw - ext4 /dev/sda2 rw
26 23 8:3 / /home/me/disk rw - xfs /dev/sda3 rw
27 22 0:21 / /proc rw - proc proc rw
28 22 0:21 / /mnt/proc rw - proc proc rw
";
        let below = |root: &str| {
            let (root, table) = (Path::new(root), MountTable::parse(table));
            repeated(root, &table, &select(root, &table))
        };
        assert_eq!(below("/"), [Path::new("export"), Path::new("mnt/srv")]);
        assert_eq!(below("/home"), [] as [PathBuf; 0]);
        assert_eq!(below("/mnt"), [Path::new("srv")]);
    }

    #[test]
    fn each_mount_below_goes_by_its_rule() {
        let table = b"\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw shared:2 - proc proc rw
24 22 0:44 / /mnt/my\\040share rw shared:9 master:3 - nfs4 host:/ rw
25 22 0:45 / /home/me/phone rw - fuse.sshfs me@phone: rw
26 22 0:46 / /auto rw - autofs systemd-1 rw
27 26 8:2 / /auto rw - xfs /dev/sda2 rw
28 22 0:47 / /over/deep rw - fuse.a a rw
29 22 8:3 / /over rw - ext4 b rw
30 22 0:48 / /homely rw - proc c rw
nonsense
";
        let below = |root: &str| -> Vec<(String, Rule)> {
            select(Path::new(root), &MountTable::parse(table))
                .into_iter()
                .map(|(path, mount)| (path.display().to_string(), mount.rule))
                .collect()
        };
        let rule = |path: &str, rule| (path.to_owned(), rule);
        assert_eq!(
            below("/"),
            [
                rule("auto", Rule::Shown),
                rule("home/me/phone", Rule::Far),
                rule("homely", Rule::Hidden),
                rule("mnt/my share", Rule::Far),
                rule("over", Rule::Shown),
                rule("proc", Rule::Hidden),
            ]
        );
        assert_eq!(below("/home"), [rule("me/phone", Rule::Far)]);
        assert_eq!(below("/home/me/phone"), []);
        let line = b"25 22 0:45 / /x rw - fuse.sshfs me@phone: rw";
        assert_eq!(Mount::parse(line).map(|mount| mount.dev), Some(45));
    }

    #[test]
    fn what_waits_for_a_thread_is_bounded() {
        let far = some_far();
        let ((began, begun), (release, gate)) = (channel(), channel::<()>());
        let gate = Arc::new(Mutex::new(gate));
        for _ in 0..MAX_THREADS {
            let (began, gate) = (began.clone(), gate.clone());
            assert!(far.run(move || {
                let _ = began.send(());
                let _ = gate.lock().recv();
            }));
        }
        for _ in 0..MAX_THREADS {
            assert_eq!(begun.recv(), Ok(()));
        }
        // Every thread waits for an answer.
        let done = Arc::new(AtomicUsize::new(0));
        let count = || {
            let done = done.clone();
            move || {
                done.fetch_add(1, Ordering::AcqRel);
            }
        };
        let accepted = (0..MAX_JOBS + 10).filter(|_| far.run(count())).count();
        assert_eq!(accepted, MAX_JOBS);
        drop(release);
        in_time(|| (done.load(Ordering::Acquire) == MAX_JOBS).then_some(()));
        assert!(far.run(count()));
    }

    pub(crate) fn some_far() -> Arc<Far> {
        let root = crate::layer::open_root(Path::new("/")).expect("there");
        Far::new(Arc::new(root), PathBuf::from("far"), 1)
    }

    #[test]
    fn no_thread_waits_for_more_when_it_is_over() {
        let far = some_far();
        let (sender, receiver) = channel();
        assert!(far.run(move || sender.send(()).expect("somebody listens")));
        assert_eq!(receiver.recv(), Ok(()));
        far.stop();
        assert!(!far.run(|| ()));
        // Each thread has it, too.
        in_time(|| (Arc::strong_count(&far) == 1).then_some(()));
    }

    #[test]
    fn what_no_thread_can_take_is_refused() {
        let far = some_far();
        let (sender, receiver) = channel();
        let job = |name: &'static str| {
            let sender = sender.clone();
            move || sender.send(name).expect("somebody listens")
        };
        assert!(!without_threads(|| far.run(job("none"))));
        assert_eq!(far.pool.lock().jobs.len(), 0);
        // Once there is one, it takes what comes, and nothing of before.
        assert!(far.run(job("first")));
        assert_eq!(receiver.recv(), Ok("first"));
        assert!(without_threads(|| far.run(job("second"))));
        assert_eq!(receiver.recv(), Ok("second"));
    }

    #[test]
    fn nobody_waits_for_a_thread_that_is_being_started_or_relies_on_one_that_is_not() {
        let far = some_far();
        let (sender, receiver) = channel();
        let job = |name: &'static str| {
            let sender = sender.clone();
            move || sender.send(name).expect("somebody listens")
        };
        // Whoever comes while the first one is being started has the lock, and relies on that thread or his own.
        let (theirs, relies) = (far.clone(), job("relies"));
        let comes = move || assert!(without_threads(|| theirs.run(relies)));
        assert!(!while_starting(comes, || without_threads(|| far.run(job("first")))));
        {
            let pool = far.pool.lock();
            assert_eq!((pool.jobs.len(), pool.threads), (0, 0), "what nobody would do is dropped");
        }
        let (theirs, relies) = (far.clone(), job("relies"));
        let comes = move || assert!(without_threads(|| theirs.run(relies)));
        assert!(while_starting(comes, || far.run(job("first"))));
        assert_eq!([receiver.recv(), receiver.recv()], [Ok("first"), Ok("relies")]);
        drop(sender);
        assert!(receiver.try_recv().is_err());
        assert_eq!(far.pool.lock().threads, 1);
    }

    /// Whether it was given up.
    #[derive(Default)]
    struct Asked(std::sync::atomic::AtomicBool);

    impl GiveUp for Asked {
        fn give_up(&self) -> bool {
            !self.0.swap(true, Ordering::AcqRel)
        }
    }

    #[test]
    fn what_was_asked_last_may_be_given_up_first() {
        const HOUR: Duration = Duration::from_secs(3600);
        let far = some_far();
        let asked: Vec<_> = (0..4).map(|_| Arc::new(Asked::default())).collect();
        let wait_for = |n: usize, patience| {
            let request: Arc<dyn GiveUp> = asked[n].clone();
            far.wait_for(Arc::downgrade(&request), patience)
        };
        let given_up = || asked.iter().map(|asked| asked.0.load(Ordering::Acquire)).collect::<Vec<_>>();

        let first = wait_for(0, Duration::ZERO).expect("nobody looks after it");
        let second = wait_for(1, 10 * HOUR);
        assert_eq!(second, None);
        let second = far.give_up_late(first).expect("one is left");
        assert_eq!(given_up(), [true, false, false, false]);
        // Now it is silent.
        let third = wait_for(2, 10 * HOUR).expect("nobody looks after it in time");
        assert!(third < second);
        assert_eq!(wait_for(3, 10 * HOUR), None);
        let fourth = far.give_up_late(third).expect("two are left");
        assert_eq!(given_up(), [true, false, true, false]);
        assert!(third < fourth && fourth < second);
        assert_eq!(far.give_up_late(fourth), Some(second));
        assert_eq!(given_up(), [true, false, true, true]);
        // The one who was to come for the second from the beginning does so.
        assert_eq!(far.give_up_late(second), None);
        assert_eq!(far.give_up_late(second), None);
        assert_eq!(given_up(), [true; 4]);
    }
}
