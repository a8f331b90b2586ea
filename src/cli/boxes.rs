//! `rootlet ls`, `rm` and `prune`

use std::ffi::OsString;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::args::{LsArgs, PruneArgs, RmArgs};
use super::output::{self, Failure};
use crate::log::escape_os;
use crate::report::Outcome;
use crate::sandbox::{BoxState, FoundBox, StateError, StateRoot};

pub(super) fn failed(error: &StateError) -> Failure {
    let hint = error.hint();
    Failure::new(error).hint(hint)
}

/// One box of `ls --json`.
#[derive(Debug, Serialize)]
struct Listed<'a> {
    name: &'a str,
    /// `running`, `exited`, `signaled`, `timed-out`, `killed` (the supervisor was) or `damaged`.
    state: &'static str,
    /// Exit status, or number of the signal.
    code: Option<i32>,
    /// Seconds since 1970.
    created: Option<u64>,
    #[serde(serialize_with = "crate::spec::os::list::serialize")]
    command: &'a [OsString],
    #[serde(serialize_with = "crate::spec::os::option::serialize")]
    upper: Option<&'a Path>,
}

fn state_of(found: &FoundBox) -> (&'static str, Option<i32>) {
    if found.running {
        return ("running", None);
    }
    match found.record.as_ref().map(|record| &record.state) {
        Some(BoxState::Ended(Outcome::Exited(code))) => ("exited", Some(*code)),
        Some(BoxState::Ended(Outcome::Signaled(signal))) => ("signaled", Some(*signal)),
        Some(BoxState::Ended(Outcome::TimedOut)) => ("timed-out", None),
        Some(BoxState::Started) => ("killed", None),
        None => ("damaged", None),
    }
}

/// Lists boxes.
pub(super) fn ls(args: &LsArgs) -> Result<u8, Failure> {
    let found = StateRoot::open().and_then(|state| state.list()).map_err(|error| failed(&error))?;
    if args.quiet {
        output::print(&found.iter().map(|found| format!("{}\n", found.name)).collect::<String>());
        return Ok(0);
    }
    if args.json {
        let listed: Vec<Listed<'_>> = found
            .iter()
            .map(|found| {
                let (state, code) = state_of(found);
                let record = found.record.as_ref();
                Listed {
                    name: &found.name,
                    state,
                    code,
                    created: record.map(|record| record.created_ms / 1000),
                    command: record.map_or(&[], |record| record.command.as_slice()),
                    upper: record.and_then(|record| Some(record.upper()?.dir.as_path())),
                }
            })
            .collect();
        output::print_json(&listed);
        return Ok(0);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let mut rows = vec![["NAME", "STATE", "AGE", "COMMAND"].map(str::to_owned)];
    for found in &found {
        let state = match state_of(found) {
            (state, Some(code)) => format!("{state} {code}"),
            (state, None) => state.to_owned(),
        };
        let record = found.record.as_ref();
        rows.push([
            found.name.clone(),
            state,
            record.map_or_else(|| "-".into(), |record| age(now.saturating_sub(record.created_ms / 1000))),
            record.map_or_else(String::new, |record| {
                shorten(&record.command.iter().map(|arg| escape_os(arg)).collect::<Vec<_>>().join(" "))
            }),
        ]);
    }
    output::print_escaped(&output::table(&rows));
    Ok(0)
}

fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn shorten(text: &str) -> String {
    const MAX: usize = 60;
    if text.chars().count() <= MAX {
        return text.to_owned();
    }
    text.chars().take(MAX - 1).chain(['…']).collect()
}

/// Removes boxes; each one that cannot be is told of, and the others go.
pub(super) fn rm(args: &RmArgs) -> Result<u8, Failure> {
    let state = StateRoot::open().map_err(|error| failed(&error))?;
    let mut code = 0;
    for name in &args.names {
        let removed = state.find(name).and_then(|found| {
            let locked = if args.force { found.end_and_lock() } else { found.lock() }?;
            found.remove(locked)?;
            Ok(found.name)
        });
        match removed {
            Ok(name) => output::print_escaped(&format!("{name}\n")),
            // With --force a box that is gone is what was wanted.
            Err(StateError::NoSuchBox { .. }) if args.force => {}
            Err(error) => {
                output::fail(&failed(&error));
                code = 1;
            }
        }
    }
    Ok(code)
}

/// What `prune --json` prints of a box.
#[derive(Debug, Serialize)]
struct Pruned {
    name: String,
    reason: &'static str,
}

/// Removes leftovers, or with `--all` every box that is not running.
pub(super) fn prune(args: &PruneArgs) -> Result<u8, Failure> {
    let state = StateRoot::open().map_err(|error| failed(&error))?;
    let mut removed = Vec::new();
    let mut code = 0;
    for found in state.list().map_err(|error| failed(&error))? {
        let Some(reason) = leftover(&found, args.all) else { continue };
        // Once more with the lock held: a run may have begun or ended in between.
        let gone = found.lock().and_then(|locked| match state.find(locked.name()) {
            Ok(again) if again.record == found.record => again.remove(locked).map(|()| true),
            _ => Ok(false),
        });
        match gone {
            Ok(true) => removed.push(Pruned { name: found.name, reason }),
            Ok(false) | Err(StateError::Running { .. } | StateError::NoSuchBox { .. }) => {}
            Err(error) => {
                output::fail(&failed(&error));
                code = 1;
            }
        }
    }
    if args.json {
        output::print_json(&removed);
    } else {
        let lines = removed.iter().map(|pruned| format!("{}: {}\n", pruned.name, pruned.reason));
        output::print_escaped(&lines.collect::<String>());
    }
    Ok(code)
}

fn leftover(found: &FoundBox, all: bool) -> Option<&'static str> {
    if found.running {
        return None;
    }
    let killed = match &found.record {
        None => true,
        Some(record) => record.state == BoxState::Started,
    };
    let unwanted = found.record.as_ref().is_some_and(|record| record.remove);
    if killed && unwanted {
        Some("its run was killed, and it was to keep nothing")
    } else if killed && found.is_unchanged() {
        Some("its run was killed, and it holds no changes")
    } else {
        all.then_some("it is not running")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_and_long_commands_are_short() {
        assert_eq!(["5s", "2m", "2h", "2d"], [5, 120, 7200, 172_800].map(age).each_ref().map(String::as_str));
        assert_eq!(shorten(&"x".repeat(61)).chars().count(), 60);
        assert_eq!(shorten("make"), "make");
    }
}
