//! `--enable-sandbox` and `--enable-seccomp`: what the program gives up before it reads the first frame.
//!
//! The sandbox, as slirp4netns's: a mount namespace in which only /etc and /run of the host are, read-only, and no
//! capability but that of binding low ports (which means something for root only). Who may not make a mount namespace
//! makes a user namespace for it. It stays in the host's network namespace. What was asked for either holds or the
//! program ends. The child that stays in the target's namespaces ([`super::maker`]) gives up more, in any case.

use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::cli::output::Failure;
use crate::error::errno_text;
use crate::plan::SeccompPlan;
use crate::seccomp::{self, FilterSpec};
use crate::sys;

pub(super) fn failed(what: &'static str) -> impl Fn(Errno) -> Failure {
    move |errno| Failure::text(format!("cannot confine this program ({what})")).cause(errno_text(errno))
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> Failure {
    move |error| {
        Failure::text(format!("cannot confine this program ({what})"))
            .cause(crate::error::errno_of(&error).map_or_else(|| error.to_string(), errno_text))
    }
}

/// Leaves everything but /etc and /run, and the capabilities. The process must have one thread.
pub(super) fn enter_sandbox() -> Result<(), Failure> {
    leave_files(&["etc", "run"])?;
    drop_capabilities(CapabilitySet::NET_BIND_SERVICE)
}

/// Leaves all of the host's files but those in the directories `keep` of its root, which are read-only from here on.
pub(super) fn leave_files(keep: &[&str]) -> Result<(), Failure> {
    if unshare(CloneFlags::CLONE_NEWNS).is_err() {
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).map_err(failed("namespaces"))?;
        let write = |file: &str, text: String| {
            std::fs::write(format!("/proc/self/{file}"), text).map_err(io("identity"))
        };
        write("uid_map", format!("{uid} {uid} 1"))?;
        write("setgroups", "deny".to_owned())?;
        write("gid_map", format!("{gid} {gid} 1"))?;
    }
    let none = None::<&Path>;
    let bind =
        |flags, from: &str, to: &str| mount(Some(from), to, none, flags, none).map_err(failed("mounts"));
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).map_err(failed("mounts"))?;
    // Any directory will do: it is only seen from here.
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), "/tmp", Some("tmpfs"), flags, Some("size=64k,mode=755")).map_err(failed("root"))?;
    for name in keep.iter().chain(&["old"]) {
        nix::unistd::mkdir(&*format!("/tmp/{name}"), nix::sys::stat::Mode::S_IRWXU)
            .map_err(failed("root"))?;
    }
    for name in keep {
        bind(MsFlags::MS_BIND | MsFlags::MS_REC, &format!("/{name}"), &format!("/tmp/{name}"))?;
    }
    nix::unistd::pivot_root("/tmp", "/tmp/old").map_err(failed("root"))?;
    std::env::set_current_dir("/").map_err(io("root"))?;
    umount2("/old", MntFlags::MNT_DETACH).map_err(failed("old root"))?;
    std::fs::remove_dir("/old").map_err(io("old root"))?;
    let root = rustix::fs::open(
        "/",
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .map_err(|errno| failed("root")(Errno::from_raw(errno.raw_os_error())))?;
    let read_only = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    sys::mount::set_attributes(std::os::fd::AsFd::as_fd(&root), read_only, true).map_err(failed("read-only"))
}

/// Gives up every capability but these, for good.
pub(super) fn drop_capabilities(keep: CapabilitySet) -> Result<(), Failure> {
    let rustix_failed =
        |errno: rustix::io::Errno| failed("capabilities")(Errno::from_raw(errno.raw_os_error()));
    rustix::thread::set_no_new_privs(true).map_err(rustix_failed)?;
    for bit in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        if keep.contains(one) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(one) {
            // Beyond the kernel's last one; or there is none to remove it with.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => {}
            Err(errno) => return Err(rustix_failed(errno)),
        }
    }
    rustix::thread::clear_ambient_capability_set().map_err(rustix_failed)?;
    let had = rustix::thread::capabilities(None).map_err(rustix_failed)?;
    let left = had.permitted & keep;
    let sets = CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(rustix_failed)
}

/// From here on the system calls that a sandbox's programs are refused are refused to this one.
pub(super) fn limit_system_calls() -> Result<(), Failure> {
    install(&seccomp::build(&FilterSpec {
        profile: SeccompPlan::Default,
        uids: &[],
        gids: &[],
        fake_setgroups: false,
        listener: false,
    }))
}

/// From here on the only system calls are those that a [`netstack::SocketMaker`] needs.
pub(super) fn allow_only_sockets() -> Result<(), Failure> {
    install(&seccomp::socket_maker())
}

fn install(filter: &[sys::seccomp::Instruction]) -> Result<(), Failure> {
    rustix::thread::set_no_new_privs(true)
        .map_err(|errno| failed("no_new_privs")(Errno::from_raw(errno.raw_os_error())))?;
    sys::seccomp::install(filter, false).map(drop).map_err(failed("system calls"))
}
