//! Setup: from the clone to a complete root, as pid 1 of the sandbox.
//!
//! Runs in the new namespaces with every capability in them and none outside, on paths of
//! the host until `pivot_root`. Files of the root are only reached through descriptors, with
//! `RESOLVE_IN_ROOT`, so a hostile rootfs cannot lead a mount outside. What the kernel can do
//! without the overlay's server (devices, network, detached mounts) comes before the first
//! path in the overlay is touched, because the supervisor starts the server meanwhile.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, statat, symlinkat,
};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};

use super::Inherited;
use crate::launch::handshake::{Channel, FromSetup, SetupFailure, Step, ToSetup};
use crate::plan::{IdPlan, MapWriter, MountStep, Namespace, NetPlan, Plan, StackPlan};
use crate::spec::IdExtent;
use crate::sys;

/// What init needs of the finished root.
#[derive(Debug)]
pub(super) struct Ready {
    /// Our own program on a read-only mount.
    pub(super) program: OwnedFd,
    /// The payload's side of its terminal.
    pub(super) terminal: Option<OwnedFd>,
}

type Result<T> = std::result::Result<T, SetupFailure>;

/// Names a failed step.
trait During<T> {
    fn during(self, step: Step, object: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<crate::launch::handshake::ErrnoLike>> During<T> for std::result::Result<T, E> {
    fn during(self, step: Step, object: impl AsRef<Path>) -> Result<T> {
        self.map_err(|errno| SetupFailure::new(step, object.as_ref().to_string_lossy(), errno))
    }
}

const PRIVATE_MOUNT: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV);

/// CLONE_NEWTIME (time_namespaces(7)), which nix does not name.
const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(0x80);

/// Builds the sandbox from inside.
///
/// # Errors
/// The step that failed. Nothing needs to be undone: all of it dies with the namespaces.
pub(super) fn run(plan: &Plan, inherited: &Inherited) -> Result<Ready> {
    let channel = &inherited.channel;
    die_with_supervisor()?;
    let streams = inherited.streams.iter().flatten().map(OwnedFd::as_fd);
    let maker = inherited.maker.iter().map(netstack::SocketMaker::as_fd);
    let keep: Vec<BorrowedFd<'_>> = std::iter::once(channel.as_fd()).chain(maker).chain(streams).collect();
    sys::process::close_all_but(&keep).during(Step::Inherit, "")?;
    // These need no id, and newuidmap is a whole program's start: it runs meanwhile.
    make_namespaces(&plan.namespaces)?;
    set_names(plan)?;
    set_up_network(&plan.net, channel)?;
    map_ids(&plan.ids, channel)?;

    let proc = plan.mounts.contains(&MountStep::Proc).then(new_proc).transpose()?;
    let overlay = mount_overlay(channel, proc.as_ref())?;
    if let Some(offsets) = plan.time {
        unshare(CLONE_NEWTIME).during(Step::Time, "unshare")?;
        let text = format!("monotonic {} 0\nboottime {} 0\n", offsets.monotonic, offsets.boottime);
        std::fs::write("/proc/self/timens_offsets", text).during(Step::Time, "/proc/self/timens_offsets")?;
    }
    let program = read_only_program()?;
    let prepare = |step| prepare(step, proc.as_ref());
    let prepared = plan.mounts.iter().map(prepare).collect::<Result<Vec<_>>>()?;

    // From here on the overlay is used: its server answers by now, or we wait for it.
    let root = attach_root(&overlay)?;
    let attached: Vec<_> =
        plan.mounts.iter().zip(&prepared).map(|(step, p)| attach(root.as_fd(), step, p)).collect();
    attached.into_iter().collect::<Result<Vec<()>>>()?;
    pivot_into(root.as_fd())?;
    let terminal = plan.process.terminal.then(|| open_terminal(channel)).transpose()?;

    // After the last change of credentials, which would clear the first and set the second.
    die_with_supervisor()?;
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .during(Step::Confine, "PR_SET_DUMPABLE")?;
    Ok(Ready { program, terminal })
}

/// Asks the kernel to kill us when the supervisor's main thread ends. If it ended before this
/// line, the channel's end tells: init sees it on its first wait.
fn die_with_supervisor() -> Result<()> {
    nix::sys::prctl::set_pdeathsig(Some(Signal::SIGKILL)).during(Step::Inherit, "PR_SET_PDEATHSIG")
}

/// Makes the namespaces that the user namespace of the clone is to own. Only the pid namespace was
/// made with it: a process cannot move into one.
fn make_namespaces(namespaces: &[Namespace]) -> Result<()> {
    let flag = |namespace: &Namespace| match namespace {
        Namespace::User | Namespace::Pid => CloneFlags::empty(),
        Namespace::Mnt => CloneFlags::CLONE_NEWNS,
        Namespace::Uts => CloneFlags::CLONE_NEWUTS,
        Namespace::Ipc => CloneFlags::CLONE_NEWIPC,
        Namespace::Net => CloneFlags::CLONE_NEWNET,
        Namespace::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        // Made later, by itself: its offsets can only be set before a process is in it.
        Namespace::Time => CloneFlags::empty(),
    };
    let flags: CloneFlags = namespaces.iter().map(flag).collect();
    unshare(flags).during(Step::Unshare, "")
}

fn map_ids(ids: &IdPlan, channel: &Channel) -> Result<()> {
    if ids.writer == MapWriter::Setup {
        write_maps(Path::new("/proc/self"), ids)?;
    } else {
        match channel.receive::<ToSetup>().during(Step::Handshake, "")? {
            Some((ToSetup::MapsWritten, _)) => {}
            _ => return Err(SetupFailure::new(Step::Handshake, "no id maps", nix::errno::Errno::EPIPE)),
        }
    }
    let (uid, gid) = (first_id(&ids.uids), first_id(&ids.gids));
    if !ids.deny_setgroups {
        nix::unistd::setgroups(&[]).during(Step::Become, "no supplementary group")?;
    }
    let (uid, gid) = (nix::unistd::Uid::from_raw(uid), nix::unistd::Gid::from_raw(gid));
    if nix::unistd::getegid() != gid {
        nix::unistd::setresgid(gid, gid, gid).during(Step::Become, format!("gid {gid}"))?;
    }
    if nix::unistd::geteuid() != uid {
        nix::unistd::setresuid(uid, uid, uid).during(Step::Become, format!("uid {uid}"))?;
    }
    Ok(())
}

/// The id setup takes inside: 0 where there is one, else the lowest.
fn first_id(map: &[IdExtent]) -> u32 {
    map.iter().map(|extent| extent.inside).min().unwrap_or(0)
}

/// Writes setgroups, uid_map and gid_map below `proc_dir` (user_namespaces(7)): also used by
/// the supervisor where it may map ids itself.
pub(crate) fn write_maps(proc_dir: &Path, ids: &IdPlan) -> Result<()> {
    let write = |name: &str, text: String| {
        let path = proc_dir.join(name);
        std::fs::write(&path, text).during(Step::WriteMaps, &path)
    };
    if ids.deny_setgroups {
        write("setgroups", "deny".into())?;
    }
    write("uid_map", map_lines(&ids.uids))?;
    write("gid_map", map_lines(&ids.gids))
}

fn map_lines(extents: &[IdExtent]) -> String {
    extents.iter().map(|e| format!("{} {} {}\n", e.inside, e.outside, e.count)).collect()
}

/// The sandbox's procfs, detached.
fn new_proc() -> Result<OwnedFd> {
    new_mount("proc", "", PRIVATE_MOUNT | MountAttrFlags::MOUNT_ATTR_NOEXEC).during(Step::Mount, "/proc")
}

/// Mounts the overlay, detached, and hands its descriptor to the supervisor, after the procfs that knows
/// the processes which its requests name. /dev/fuse must be opened here: the kernel wants the opener in
/// the user namespace that mounts.
fn mount_overlay(channel: &Channel, proc: Option<&OwnedFd>) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let fuse = openat(CWD, "/dev/fuse", flags, Mode::empty()).during(Step::FuseOpen, "/dev/fuse")?;
    let mount = || -> rustix::io::Result<OwnedFd> {
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", "rootlet")?;
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        configure(&context, &fsoverlay::mount_data(fuse.as_raw_fd(), uid, gid))?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, PRIVATE_MOUNT)
    };
    let overlay = mount().during(Step::FuseMount, "")?;
    if let Some(proc) = proc {
        channel.send(&FromSetup::Proc, Some(proc.as_fd())).during(Step::Handshake, "")?;
    }
    channel.send(&FromSetup::Fuse, Some(fuse.as_fd())).during(Step::Handshake, "")?;
    Ok(overlay)
}

fn set_names(plan: &Plan) -> Result<()> {
    nix::unistd::sethostname(&plan.hostname).during(Step::Hostname, &plan.hostname)?;
    let domain = plan.domainname.as_deref().unwrap_or("(none)");
    rustix::system::setdomainname(domain.as_bytes()).during(Step::Hostname, domain)
}

fn set_up_network(net: &NetPlan, channel: &Channel) -> Result<()> {
    if *net == NetPlan::Host {
        return Ok(());
    }
    let during = |object: &'static str| move |errno| SetupFailure::new(Step::Network, object, errno);
    let route = sys::netlink::Route::open().map_err(during("routing socket"))?;
    route.set_up(1, None, None).map_err(during("lo"))?;
    let NetPlan::Stack(stack) = net else { return Ok(()) };
    let tap = netstack::open_tap(&stack.tap).during(Step::TapOpen, &stack.tap)?;
    netstack::leave_tap_to_namespace(tap.as_fd()).during(Step::TapOpen, &stack.tap)?;
    channel.send(&FromSetup::Tap, Some(tap.as_fd())).during(Step::Handshake, "")?;
    let index = nix::net::if_::if_nametoindex(stack.tap.as_str()).map_err(during("interface index"))?;
    // There is one router, and nobody else on the link: no need to ask for either. A kernel without
    // IPv6, or a read-only /proc/sys, only means a few packets more.
    for setting in ["accept_ra", "accept_dad"] {
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/{setting}", stack.tap), "0").ok();
    }
    route.set_up(index, Some(StackPlan::GUEST_MAC), Some(stack.mtu)).map_err(during("link"))?;
    let addresses = [
        (IpAddr::V4(stack.guest_v4.0), stack.guest_v4.1, IpAddr::V4(stack.gateway_v4)),
        (IpAddr::V6(stack.guest_v6.0), stack.guest_v6.1, IpAddr::V6(stack.gateway_v6)),
    ];
    for (address, prefix, gateway) in addresses {
        match route.add_address(index, address, prefix) {
            // A kernel without IPv6, or with it switched off, still has IPv4.
            Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::EACCES) if address.is_ipv6() => continue,
            other => other.map_err(during("address"))?,
        }
        route.add_default_route(index, gateway).map_err(during("default route"))?;
    }
    Ok(())
}

/// Our program as the payload's process executes it: on a mount that is read-only, so that
/// no /proc/PID/exe leads to a writable file (CVE-2019-5736).
fn read_only_program() -> Result<OwnedFd> {
    // By its path: the magic link leads to the supervisor's mount namespace, of which nothing may
    // be cloned here.
    let running = Path::new("/proc/self/exe");
    let path = std::fs::read_link(running).during(Step::OwnProgram, running)?;
    let program = open_tree(CWD, &path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
        .during(Step::OwnProgram, &path)?;
    let found = statat(&program, "", AtFlags::EMPTY_PATH).during(Step::OwnProgram, &path)?;
    let wanted = rustix::fs::stat(running).during(Step::OwnProgram, running)?;
    if (found.st_dev, found.st_ino) != (wanted.st_dev, wanted.st_ino) {
        // Replaced since it was started.
        return Err(SetupFailure::new(Step::OwnProgram, path.to_string_lossy(), nix::errno::Errno::ESTALE));
    }
    sys::mount::set_attributes(program.as_fd(), libc::MOUNT_ATTR_RDONLY, false)
        .during(Step::OwnProgram, &path)?;
    Ok(program)
}

/// A mount that is ready to be attached, with the sources that only the host's tree has.
enum Prepared {
    /// One detached mount.
    Mount(OwnedFd),
    /// /dev, with its pts, shm and mqueue, and the nodes by name.
    Dev { dev: OwnedFd, children: Vec<(&'static str, OwnedFd)>, nodes: Vec<(String, OwnedFd)> },
    /// Nothing to prepare: it concerns what is already mounted.
    Later,
}

/// Gives a file system its options, as in mount(8)'s `-o`, and creates it.
fn configure(context: &OwnedFd, options: &str) -> rustix::io::Result<()> {
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(context, key, value)?,
            None => fsconfig_set_flag(context, option)?,
        }
    }
    fsconfig_create(context)
}

/// Makes a file system, detached.
fn new_mount(kind: &str, options: &str, attributes: MountAttrFlags) -> rustix::io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", kind)?;
    configure(&context, options)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Clones the mount at a path of the host, with everything below it: a mount namespace of a
/// user namespace may not uncover what a mount hides.
fn clone_of_host(path: &Path, step: Step) -> Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    open_tree(CWD, path, flags).during(step, path)
}

/// The same for a volume's source, whose links the caller followed when it was planned: one that stands
/// there since then, made by a payload that shares the directory, would lead past what the plan masks
/// (CVE-2021-30465).
fn clone_of_source(path: &Path) -> Result<OwnedFd> {
    let open = |flags| openat2(CWD, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::NO_SYMLINKS);
    // As a directory first: that has an automount point mounted, O_PATH by itself has not.
    let source = match open(OFlags::PATH | OFlags::DIRECTORY) {
        Err(rustix::io::Errno::NOTDIR) => open(OFlags::PATH),
        other => other,
    };
    let source = source.during(Step::VolumeSource, path)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(&source, "", flags).during(Step::VolumeSource, path)
}

/// `proc` is the sandbox's procfs, of which there is one: the supervisor knows it, too.
fn prepare(step: &MountStep, proc: Option<&OwnedFd>) -> Result<Prepared> {
    let no_exec = PRIVATE_MOUNT | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(match step {
        MountStep::Proc => {
            let proc = proc.ok_or(rustix::io::Errno::NOENT).and_then(|proc| fcntl_dupfd_cloexec(proc, 0));
            Prepared::Mount(proc.during(Step::Mount, "/proc")?)
        }
        MountStep::Sys => Prepared::Mount(prepare_sys(no_exec)?),
        MountStep::Dev { nodes } => {
            let no_exec_dev = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
            let dev = new_mount("tmpfs", "mode=0755,size=64k", no_exec_dev).during(Step::Mount, "/dev")?;
            let pts = new_mount("devpts", "mode=0620,ptmxmode=0666", no_exec_dev)
                .during(Step::Mount, "/dev/pts")?;
            let shm = new_mount("tmpfs", "mode=1777", PRIVATE_MOUNT).during(Step::Mount, "/dev/shm")?;
            let mut children = vec![("pts", pts), ("shm", shm)];
            match new_mount("mqueue", "", no_exec) {
                Ok(mqueue) => children.push(("mqueue", mqueue)),
                // A kernel without POSIX message queues has no mq_open either.
                Err(rustix::io::Errno::NODEV) => {}
                Err(errno) => return Err(SetupFailure::new(Step::Mount, "/dev/mqueue", errno)),
            }
            let node = |name: &String| {
                let host_path = Path::new("/dev").join(name);
                clone_of_host(&host_path, Step::Mount).map(|mount| (name.clone(), mount))
            };
            Prepared::Dev { dev, children, nodes: nodes.iter().map(node).collect::<Result<_>>()? }
        }
        MountStep::Tmpfs { root_path, options } => {
            Prepared::Mount(new_mount("tmpfs", options, PRIVATE_MOUNT).during(Step::Mount, root_path)?)
        }
        MountStep::Bind { host_path, read_only, .. } => {
            let mount = clone_of_source(host_path)?;
            let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
            if *read_only {
                attributes |= libc::MOUNT_ATTR_RDONLY;
            }
            sys::mount::set_attributes(mount.as_fd(), attributes, true).during(Step::Mount, host_path)?;
            Prepared::Mount(mount)
        }
        MountStep::Mask(_) | MountStep::ReadOnly(_) => Prepared::Later,
    })
}

/// A new sysfs shows the devices of the net namespace it is mounted in. Where the kernel
/// refuses (host network; a container whose own /sys is partly covered), the caller's /sys is
/// shown read-only.
fn prepare_sys(attributes: MountAttrFlags) -> Result<OwnedFd> {
    if let Ok(sys) = new_mount("sysfs", "", attributes | MountAttrFlags::MOUNT_ATTR_RDONLY) {
        return Ok(sys);
    }
    let sys = clone_of_host(Path::new("/sys"), Step::Mount)?;
    let attributes =
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    sys::mount::set_attributes(sys.as_fd(), attributes, true).during(Step::Mount, "/sys")?;
    Ok(sys)
}

/// Attaches the overlay where pivot_root(2) can find it and opens its root. /proc is free to
/// be covered: nothing of the host's is needed from it any more.
fn attach_root(overlay: &OwnedFd) -> Result<OwnedFd> {
    move_mount(overlay, "", CWD, "/proc", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .during(Step::Mount, "the overlay")?;
    openat(overlay, ".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .during(Step::Mount, "the overlay")
}

/// Opens a path of the root as a place to mount on; links in it are followed inside the root only.
fn open_in_root(root: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<OwnedFd> {
    let relative: std::path::PathBuf =
        path.components().filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir)).collect();
    let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { &relative };
    openat2(
        root,
        relative,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// The same for what need not exist. Any other failure must not pass for absence.
fn open_if_there(root: BorrowedFd<'_>, path: &Path) -> Result<Option<OwnedFd>> {
    match open_in_root(root, path) {
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
        other => other.map(Some).during(Step::Mount, path),
    }
}

/// Makes a missing place for `mount`: a directory, or an empty file for a file. The plan has
/// places in the layers made up; what is missing still is in a file system mounted just before.
fn make_place(root: BorrowedFd<'_>, path: &Path, mount: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(rustix::io::Errno::NOENT);
    };
    let directory = match open_in_root(root, parent) {
        Err(rustix::io::Errno::NOENT) => {
            make_place(root, parent, &rustix::io::fcntl_dupfd_cloexec(root, 0)?)?
        }
        other => other?,
    };
    let wanted = statat(mount, "", AtFlags::EMPTY_PATH)?;
    if FileType::from_raw_mode(wanted.st_mode) == FileType::Directory {
        mkdirat(&directory, name, Mode::from_raw_mode(0o755))?;
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        drop(openat(&directory, name, flags, Mode::from_raw_mode(0o644))?);
    }
    open_in_root(root, path)
}

fn move_onto(mount: &OwnedFd, place: &OwnedFd) -> rustix::io::Result<()> {
    move_mount(
        mount,
        "",
        place,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

fn attach(root: BorrowedFd<'_>, step: &MountStep, prepared: &Prepared) -> Result<()> {
    let at = |path: &Path, mount: &OwnedFd| {
        let place = match open_in_root(root, path) {
            Err(rustix::io::Errno::NOENT) => make_place(root, path, mount),
            other => other,
        };
        let place = place.during(Step::MountPoint, path)?;
        move_onto(mount, &place).during(Step::MountPoint, path)
    };
    match (step, prepared) {
        (MountStep::Proc, Prepared::Mount(mount)) => at(Path::new("/proc"), mount),
        (MountStep::Sys, Prepared::Mount(mount)) => at(Path::new("/sys"), mount),
        (MountStep::Dev { .. }, Prepared::Dev { dev, children, nodes }) => {
            at(Path::new("/dev"), dev)?;
            fill_dev(dev, children, nodes)
        }
        (MountStep::Tmpfs { root_path, .. } | MountStep::Bind { root_path, .. }, Prepared::Mount(mount)) => {
            at(root_path, mount)
        }
        (MountStep::Mask(path), _) => mask(root, path),
        (MountStep::ReadOnly(path), _) => make_read_only(root, path),
        _ => Err(SetupFailure::new(Step::Mount, format!("{step:?}"), nix::errno::Errno::EINVAL)),
    }
}

/// Fills the attached tmpfs of /dev.
fn fill_dev(dev: &OwnedFd, children: &[(&str, OwnedFd)], nodes: &[(String, OwnedFd)]) -> Result<()> {
    let path_of = |name: &str| Path::new("/dev").join(name);
    let open =
        |name: &str, flags: OFlags| openat(dev, name, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o666));
    for (name, mount) in children {
        mkdirat(dev, *name, Mode::from_raw_mode(0o755)).during(Step::Mount, path_of(name))?;
        let place = open(name, OFlags::PATH | OFlags::DIRECTORY).during(Step::Mount, path_of(name))?;
        move_onto(mount, &place).during(Step::Mount, path_of(name))?;
    }
    for (name, mount) in nodes {
        if let Some(parent) = Path::new(name).parent().filter(|p| !p.as_os_str().is_empty()) {
            mkdirat(dev, parent, Mode::from_raw_mode(0o755)).during(Step::Mount, path_of(name))?;
        }
        drop(open(name, OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY).during(Step::Mount, path_of(name))?);
        let place = open(name, OFlags::PATH).during(Step::Mount, path_of(name))?;
        move_onto(mount, &place).during(Step::Mount, path_of(name))?;
    }
    let links = [
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
        ("pts/ptmx", "ptmx"),
    ];
    for (target, name) in links {
        symlinkat(target, dev, name).during(Step::Mount, path_of(name))?;
    }
    Ok(())
}

/// Covers a path of the root, if it exists, with something empty and unwritable.
fn mask(root: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let Some(place) = open_if_there(root, path)? else { return Ok(()) };
    let kind = statat(&place, "", AtFlags::EMPTY_PATH).during(Step::Mount, path)?;
    let cover = if FileType::from_raw_mode(kind.st_mode) == FileType::Directory {
        let attributes =
            PRIVATE_MOUNT | MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        new_mount("tmpfs", "mode=0555,size=4k,nr_inodes=1", attributes)
    } else {
        // The host's null device, by the host's path: never a /dev/null of the rootfs (CVE-2025-31133).
        open_tree(CWD, "/dev/null", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
    };
    let cover = cover.during(Step::Mount, path)?;
    move_onto(&cover, &place).during(Step::Mount, path)
}

/// Makes a path of the root, if it exists, read-only with everything below it.
fn make_read_only(root: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let Some(place) = open_if_there(root, path)? else { return Ok(()) };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let copy = open_tree(&place, "", flags).during(Step::Mount, path)?;
    sys::mount::set_attributes(copy.as_fd(), libc::MOUNT_ATTR_RDONLY, true).during(Step::Mount, path)?;
    move_onto(&copy, &place).during(Step::Mount, path)
}

/// Makes the overlay the root and lets go of the host's tree. pivot_root(".", ".") stacks the
/// old root on the new one, so one detaching umount does it and no directory is needed.
fn pivot_into(root: BorrowedFd<'_>) -> Result<()> {
    rustix::process::fchdir(root).during(Step::PivotRoot, "fchdir")?;
    rustix::process::pivot_root(".", ".").during(Step::PivotRoot, "pivot_root")?;
    unmount(".", UnmountFlags::DETACH).during(Step::PivotRoot, "detaching the old root")?;
    rustix::process::chdir("/").during(Step::PivotRoot, "chdir")
}

/// Makes the payload's terminal on the sandbox's own devpts: the supervisor gets the master.
fn open_terminal(channel: &Channel) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master =
        openat(CWD, "/dev/pts/ptmx", flags, Mode::empty()).during(Step::Terminal, "/dev/pts/ptmx")?;
    rustix::pty::unlockpt(&master).during(Step::Terminal, "unlockpt")?;
    let peer_flags =
        rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY | rustix::pty::OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, peer_flags).during(Step::Terminal, "TIOCGPTPEER")?;
    channel.send(&FromSetup::Terminal, Some(master.as_fd())).during(Step::Handshake, "")?;
    Ok(slave)
}

/// Opens /proc of the sandbox for [`super::notify`].
pub(super) fn open_proc() -> std::io::Result<File> {
    File::open("/proc")
}
