//! `rootlet diff`

use std::path::PathBuf;

use serde::Serialize;

use super::args::DiffArgs;
use super::boxes::failed;
use super::output::{self, Failure};
use crate::log::escape_os;
use crate::sandbox::StateRoot;

/// One change of `diff --json`.
#[derive(Debug, Serialize)]
struct Listed {
    #[serde(serialize_with = "crate::spec::os::serialize")]
    path: PathBuf,
    /// `added`, `modified`, `deleted` or `metadata`.
    kind: &'static str,
}

/// Lists what a box changed.
pub(super) fn diff(args: &DiffArgs) -> Result<u8, Failure> {
    let found = StateRoot::open().and_then(|state| state.find(&args.name)).map_err(|error| failed(&error))?;
    let record = found.record().map_err(|error| failed(&error))?;
    let changes = record.changes().map_err(|error| Failure::new(&error))?;
    let kind_of = |kind| match kind {
        fsoverlay::ChangeKind::Added => ("A", "added"),
        fsoverlay::ChangeKind::Modified => ("M", "modified"),
        fsoverlay::ChangeKind::Deleted => ("D", "deleted"),
        fsoverlay::ChangeKind::Metadata => ("m", "metadata"),
    };
    if args.json {
        let listed: Vec<Listed> = changes
            .into_iter()
            .map(|change| Listed { path: change.path, kind: kind_of(change.kind).1 })
            .collect();
        output::print_json(&listed);
    } else {
        let lines = changes
            .iter()
            .map(|change| format!("{} {}\n", kind_of(change.kind).0, escape_os(change.path.as_os_str())));
        output::print(&lines.collect::<String>());
    }
    Ok(0)
}
