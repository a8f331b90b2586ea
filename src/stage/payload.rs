//! The payload's process from fork to execve: gives up power step by step.
//!
//! It takes away, in this order (each needs what a later one takes): the inherited session
//! and terminal, capabilities of the bounding set, groups and ids, the remaining
//! capabilities, the right to gain any (no_new_privs), the host's abstract sockets, and system
//! calls. It must not take away: the working directory, the environment of the plan, standard
//! input, output and error.
//!
//! It executes the command in two steps. The first is our own program on a read-only mount, as
//! [`exec_stage`]: so `/proc/self/exe`, which a hostile command or interpreter may name, never is
//! our program on a writable mount (CVE-2019-5736). The second is one of the command's candidates.

use std::ffi::CString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::command;
use super::users::Identity;
use crate::launch::SoftLimit;
use crate::launch::handshake::{Channel, SetupFailure, Step};
use crate::plan::{Plan, SeccompPlan};
use crate::seccomp::{self, FilterSpec};
use crate::supervise::streams::Inside;
use crate::sys::{self, exec_stage};

/// What init hands to the payload's process.
pub(super) struct Handover<'a> {
    pub(super) plan: &'a Plan,
    pub(super) identity: &'a Identity,
    pub(super) program: &'a OwnedFd,
    pub(super) terminal: Option<&'a OwnedFd>,
    pub(super) streams: &'a Inside,
    pub(super) limits: &'a [SoftLimit],
}

/// From the fork to our own program's second start. Returns only on failure.
pub(super) fn run(handover: &Handover<'_>, report: &Channel) -> SetupFailure {
    match confine(handover, report) {
        Ok(never) => never,
        Err(failure) => failure,
    }
}

fn confine(handover: &Handover<'_>, report: &Channel) -> Result<SetupFailure, SetupFailure> {
    let plan = handover.plan;
    let spawn = |what: &'static str| move |errno: Errno| SetupFailure::new(Step::Spawn, what, errno);
    let confine = |what: &'static str| move |errno: Errno| SetupFailure::new(Step::Confine, what, errno);

    attach_stdio(handover)?;
    for (limit, soft) in handover.limits {
        let (_, hard) = nix::sys::resource::getrlimit(*limit).map_err(spawn("reading limits"))?;
        nix::sys::resource::setrlimit(*limit, (*soft).min(hard), hard).map_err(spawn("restoring limits"))?;
    }

    let keep = capability_set(&plan.confine.keep_caps);
    drop_bounding_set(keep).map_err(confine("the bounding set"))?;
    become_identity(handover)?;
    let effective = if handover.identity.uid == 0 { keep } else { CapabilitySet::empty() };
    let sets = CapabilitySets { effective, permitted: effective, inheritable: CapabilitySet::empty() };
    rustix::thread::clear_ambient_capability_set().map_err(errno).map_err(confine("ambient capabilities"))?;
    rustix::thread::set_capabilities(None, sets).map_err(errno).map_err(confine("capabilities"))?;
    if !enter_workdir(plan)? {
        report.send(&PayloadMessage::WithoutWorkdir, None).map_err(errno).map_err(spawn("report channel"))?;
    }

    nix::sys::prctl::set_no_new_privs().map_err(confine("no_new_privs"))?;
    if plan.confine.scope_abstract_sockets {
        sys::landlock::scope_abstract_sockets().map_err(confine("Landlock scope"))?;
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).map_err(spawn("signal mask"))?;
    let listener = plan.confine.seccomp == SeccompPlan::Default;
    let filter = seccomp::build(&FilterSpec {
        profile: plan.confine.seccomp,
        uids: &plan.ids.uids,
        gids: &plan.ids.gids,
        fake_setgroups: plan.ids.deny_setgroups,
        listener,
    });
    let listener = sys::seccomp::install(&filter, listener).map_err(confine("system call filter"))?;
    if let Some(listener) = &listener {
        let sent = report.send(&PayloadMessage::Listener, Some(listener.as_fd()));
        sent.map_err(errno).map_err(spawn("handing over the listener"))?;
    }

    // Rust's runtime ignores it, and what is ignored stays so over execve.
    sys::process::default_signal(Signal::SIGPIPE).map_err(spawn("SIGPIPE"))?;
    // The report channel is closed by the second execve; everything else by the first.
    sys::process::cloexec_from(3).map_err(spawn("closing descriptors"))?;
    rustix::io::fcntl_setfd(report, rustix::io::FdFlags::empty())
        .map_err(errno)
        .map_err(spawn("report channel"))?;
    let text =
        |bytes: Vec<u8>| CString::new(bytes).map_err(|_| spawn("a NUL byte in an argument")(Errno::EINVAL));
    let candidates = command::candidates(&plan.process);
    let mut args = exec_stage::start_of_arguments(report.as_fd(), candidates.len());
    for path in &candidates {
        args.push(text(path.as_os_str().as_bytes().to_vec())?);
    }
    for arg in &plan.process.args {
        args.push(text(arg.as_bytes().to_vec())?);
    }
    let mut env = Vec::with_capacity(plan.process.env.len());
    for (name, value) in &plan.process.env {
        env.push(text([name.as_bytes(), b"=", value.as_bytes()].concat())?);
    }
    let failed = sys::process::exec_fd(handover.program.as_fd(), &args, &env);
    let command = plan.process.args.first().map(|c| c.to_string_lossy()).unwrap_or_default();
    Err(match failed {
        Errno::E2BIG => {
            SetupFailure::new(Step::Exec, format!("{command}: its arguments and environment"), failed)
        }
        other => SetupFailure::new(Step::OwnProgram, "our own program", other),
    })
}

/// What the payload's process tells init on the report channel.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(super) enum PayloadMessage {
    /// The filter's listener comes with this message.
    Listener,
    /// The working directory cannot be entered and was not asked for: it stands in `/`.
    WithoutWorkdir,
    /// A step failed.
    Failed(SetupFailure),
}

fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error())
}

/// A session of its own, so no terminal of the caller is the payload's controlling terminal;
/// its own terminal becomes that, if it has one.
fn attach_stdio(handover: &Handover<'_>) -> Result<(), SetupFailure> {
    let failed = |errno: rustix::io::Errno| SetupFailure::new(Step::Terminal, "standard streams", errno);
    rustix::process::setsid().map_err(failed)?;
    if let Some(terminal) = handover.terminal {
        rustix::process::ioctl_tiocsctty(terminal).map_err(failed)?;
        rustix::stdio::dup2_stdin(terminal).map_err(failed)?;
        rustix::stdio::dup2_stdout(terminal).map_err(failed)?;
        rustix::stdio::dup2_stderr(terminal).map_err(failed)?;
    }
    let [input, output, error] = handover.streams;
    if let Some(input) = input {
        rustix::stdio::dup2_stdin(input).map_err(failed)?;
    }
    if let Some(output) = output {
        rustix::stdio::dup2_stdout(output).map_err(failed)?;
    }
    if let Some(error) = error {
        rustix::stdio::dup2_stderr(error).map_err(failed)?;
    }
    Ok(())
}

fn capability_set(names: &[String]) -> CapabilitySet {
    names.iter().filter_map(|name| CapabilitySet::from_name(name)).fold(CapabilitySet::empty(), |a, b| a | b)
}

fn drop_bounding_set(keep: CapabilitySet) -> Result<(), Errno> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if keep.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // Beyond the kernel's last capability.
            Err(rustix::io::Errno::INVAL) => break,
            other => other.map_err(errno)?,
        }
    }
    Ok(())
}

fn become_identity(handover: &Handover<'_>) -> Result<(), SetupFailure> {
    let Identity { uid, gid, groups } = handover.identity;
    let failed = |what: String| move |errno: Errno| SetupFailure::new(Step::Become, what, errno);
    if !handover.plan.ids.deny_setgroups {
        let groups: Vec<Gid> = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        nix::unistd::setgroups(&groups).map_err(failed(format!("a member of {groups:?}")))?;
    }
    let (uid, gid) = (Uid::from_raw(*uid), Gid::from_raw(*gid));
    nix::unistd::setresgid(gid, gid, gid).map_err(failed(format!("gid {gid}")))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(failed(format!("uid {uid}")))
}

/// Whether it stands in the plan's working directory; in `/` otherwise.
fn enter_workdir(plan: &Plan) -> Result<bool, SetupFailure> {
    let workdir = &plan.process.workdir;
    let entered = rustix::process::chdir(workdir.as_path()).and_then(|()| {
        // getcwd(2) fails or starts with "(unreachable)" where a magic link led out of the root
        // (CVE-2024-21626).
        match rustix::process::getcwd(Vec::new()) {
            Ok(path) if path.as_bytes().starts_with(b"/") => Ok(()),
            Ok(_) => Err(rustix::io::Errno::XDEV),
            Err(errno) => Err(errno),
        }
    });
    match entered {
        Ok(()) => Ok(true),
        Err(_) if !plan.process.workdir_required => rustix::process::chdir("/")
            .map(|()| false)
            .map_err(|errno| SetupFailure::new(Step::Workdir, "/", errno)),
        Err(errno) => Err(SetupFailure::new(Step::Workdir, workdir.to_string_lossy(), errno)),
    }
}
