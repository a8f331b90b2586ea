//! The file systems that it all is on.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// A line for above the table.
pub(crate) fn describe(dir: &Path, tmpfs: bool) -> String {
    let kind = fs_type(dir);
    let (uppers, why) = match (tmpfs, avoids_deleted(dir)) {
        (true, true) => ("tmpfs", ", since this ext4 has no journal that could be seen"),
        (true, false) => ("tmpfs", ""),
        (false, true) => {
            (&*kind, ", which has no journal that could be seen: creating files may take too long")
        }
        (false, false) => (&*kind, ""),
    };
    format!("trees in {} on {kind}, uppers on {uppers}{why}", dir.display())
}

/// The type of the file system of a directory: that of the mount nearest above it.
fn fs_type(dir: &Path) -> String {
    let dir = dir.canonicalize().unwrap();
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounts = table.lines().filter_map(|line| {
        let (place, rest) = line.split_once(" - ")?;
        let at = PathBuf::from(place.split(' ').nth(4)?.replace("\\040", " "));
        dir.starts_with(&at).then(|| (at, rest.split(' ').next().unwrap_or_default().to_owned()))
    });
    // Of several at one place the last is seen.
    mounts.max_by_key(|(at, _)| at.as_os_str().len()).map_or_else(|| "?".to_owned(), |(_, kind)| kind)
}

/// Whether new files do not get the numbers of files that were deleted lately, as on an ext4 without a journal.
/// (Where procfs does not show journals there is none.)
pub(crate) fn avoids_deleted(dir: &Path) -> bool {
    if fs_type(dir) != "ext4" {
        return false;
    }
    let dev = dir.metadata().unwrap().dev();
    let device = format!("/sys/dev/block/{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev));
    let Ok(device) = std::fs::read_link(device) else { return true };
    let Some(name) = device.file_name().and_then(|name| name.to_str()) else { return true };
    // A journal of its own has the number of its file behind the name.
    let journals = std::fs::read_dir("/proc/fs/jbd2").into_iter().flatten().flatten();
    let is_its = |journal: &str| journal.strip_prefix(name).is_some_and(|rest| rest.starts_with('-'));
    !journals.map(|entry| entry.file_name()).any(|journal| journal.to_str().is_some_and(is_its))
}
