//! Id maps that setup may not write itself.

use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use super::handshake::{Channel, ErrnoLike, SetupFailure, Step, ToSetup};
use super::{LaunchError, during};
use crate::plan::{IdPlan, MapWriter};
use crate::spec::IdExtent;

/// How long newuidmap and newgidmap may take: they read /etc/subuid, but may ask a directory
/// service for it.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);

/// Writes the maps of setup's user namespace and tells it so.
pub(super) fn write(ids: &IdPlan, setup: Pid, channel: &Channel) -> Result<(), LaunchError> {
    match &ids.writer {
        MapWriter::Setup => return Ok(()),
        MapWriter::Supervisor => {
            let proc_dir = Path::new("/proc").join(setup.to_string());
            crate::stage::write_maps(&proc_dir, ids)?;
        }
        MapWriter::Helpers { newuidmap, newgidmap } => {
            // Both at once: each is a whole program's start, during which its starter waits.
            std::thread::scope(|scope| {
                let gids = std::thread::Builder::new()
                    .spawn_scoped(scope, || run_helper(newgidmap, setup, &ids.gids))
                    .map_err(|e| SetupFailure::new(Step::MapHelper, newgidmap.to_string_lossy(), e))?;
                let uids = run_helper(newuidmap, setup, &ids.uids);
                let gids = gids.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                uids.and(gids)
            })?;
        }
    }
    tracing::debug!(uids = ?ids.uids, gids = ?ids.gids, "ids are mapped");
    channel
        .send(&ToSetup::MapsWritten, None)
        .map_err(|errno| SetupFailure::new(Step::Handshake, "", errno).into())
}

/// Runs newuidmap(1) or newgidmap(1) for the process `setup`.
fn run_helper(program: &Path, setup: Pid, extents: &[IdExtent]) -> Result<(), LaunchError> {
    let failed = |said: &str| LaunchError::MapHelper { helper: program.into(), said: said.into() };
    let at_step = |errno: ErrnoLike| SetupFailure::new(Step::MapHelper, program.to_string_lossy(), errno);
    let mut command = Command::new(program);
    command.arg(setup.to_string());
    for extent in extents {
        command.args([extent.inside, extent.outside, extent.count].map(|n| n.to_string()));
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| at_step(e.into()))?;
    let pidfd = i32::try_from(child.id())
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()))
        .map_err(|errno| at_step(errno.into()))?;
    let timeout = PollTimeout::try_from(HELPER_TIMEOUT).unwrap_or(PollTimeout::MAX);
    let ended = poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout);
    if ended.map_err(during("waiting for an id map helper"))? == 0 {
        child.kill().ok();
        child.wait().ok();
        return Err(failed("it did not end within 10 seconds"));
    }
    let status = child.wait().map_err(|_| failed("its exit status is lost"))?;
    if status.success() {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(4096).read_to_string(&mut said).ok();
    }
    Err(failed(said.trim()))
}
