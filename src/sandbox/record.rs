//! `box.json`: what is known of a box.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::plan::{IdPlan, Plan, RootPlan, UpperPlan};
use crate::report::Outcome;

/// The version of the format; a reader refuses a later one.
pub(super) const FORMAT: u32 = 1;

/// Everything stored of a box. No values of variables: they may be secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoxRecord {
    /// Version of this format.
    pub format: u32,
    /// Its name.
    pub name: String,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// Command and arguments.
    #[serde(with = "crate::spec::os::list")]
    pub command: Vec<OsString>,
    /// The ids inside: they say what owners on disk mean.
    pub ids: IdPlan,
    /// What its root was made of, and where its changes are.
    pub root: RootPlan,
    /// The directory of all state, which was hidden inside.
    #[serde(with = "crate::spec::os")]
    pub state_root: PathBuf,
    /// `--upper` was given: the changes are not the box's own.
    pub upper_is_external: bool,
    /// `--rm` was given.
    pub remove: bool,
    /// The supervisor.
    pub supervisor: ProcessId,
    /// How far it came.
    pub state: BoxState,
}

/// A process, safe against reuse of its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

/// How far a box came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BoxState {
    /// The run has begun. Whether it still goes on, the lock says.
    Started,
    /// The run is over.
    Ended(Outcome),
}

impl ProcessId {
    /// This process.
    #[must_use]
    pub fn own() -> Self {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        Self { pid, start_time: start_time("self").unwrap_or(0) }
    }

    /// Whether the process with this id is still the one that was meant.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        start_time(&self.pid.to_string()) == Some(self.start_time)
    }
}

fn start_time(pid: &str) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; field 3 follows the last one.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

impl BoxRecord {
    /// The record of a run that is about to begin.
    #[must_use]
    pub fn new(plan: &Plan, upper_is_external: bool) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            format: FORMAT,
            name: plan.name.clone(),
            created_ms: now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX)),
            command: plan.process.args.clone(),
            ids: plan.ids.clone(),
            root: plan.root.clone(),
            state_root: plan.state_dir.ancestors().nth(2).unwrap_or(Path::new("/")).to_owned(),
            upper_is_external,
            remove: plan.remove,
            supervisor: ProcessId::own(),
            state: BoxState::Started,
        }
    }

    /// Where its changes are; `None`: it was read-only.
    #[must_use]
    pub fn upper(&self) -> Option<&UpperPlan> {
        self.root.upper.as_ref()
    }

    /// The changes that belong to the box, if they do.
    #[must_use]
    pub fn own_upper(&self) -> Option<&Path> {
        self.upper().filter(|_| !self.upper_is_external).map(|upper| upper.dir.as_path())
    }

    /// What it changed, by path, parents first.
    ///
    /// # Errors
    /// When a layer or the upper is gone or cannot be read.
    pub fn changes(&self) -> Result<Vec<fsoverlay::Change>, fsoverlay::Error> {
        let mut spec = self.root.overlay_spec(&self.ids, 1);
        if let Some(upper) = &mut spec.upper
            && !upper.work.exists()
        {
            // It held nothing worth keeping and is gone; reading needs none.
            upper.work.clone_from(&upper.dir);
        }
        let mut changes = fsoverlay::changes_of(&spec)?;
        // Another rootlet inside, that kept nothing, leaves an empty directory where ours is hidden.
        let of_state = |path: &Path| path.starts_with(&self.state_root);
        let boxes = self.state_root.join("boxes");
        if changes.iter().filter(|change| of_state(&change.path)).all(|change| change.path == boxes) {
            changes.retain(|change| !of_state(&change.path));
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_time() {
        let own = ProcessId::own();
        assert!(own.is_alive());
        assert!(!ProcessId { start_time: own.start_time + 1, ..own }.is_alive());
        assert!(!ProcessId { pid: i32::MAX, start_time: 1 }.is_alive());
    }
}
