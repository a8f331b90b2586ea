//! Layers as they are found: changed by others, of several kinds.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::{Case, Check, Failure, World, errno, holds, same};
use crate::semantics::no_leftovers;

pub(crate) const CASES: &[Case] =
    &[Case { name: "changes_of_a_live_layer_show", outside: live_layer, inside: change_layer }];

fn live_layer(world: &mut World) -> Check {
    let lower = world.lower();
    for dir in ["dir/sub", "replaced", "kind", "merged", "emptied"] {
        fs::create_dir_all(lower.join(dir))?;
    }
    for file in ["file", "grows", "gone", "dir/sub/deep", "replaced/old", "merged/old", "upper", "emptied/x"]
    {
        fs::write(lower.join(file), format!("old {file}"))?;
    }
    symlink("old", lower.join("link"))?;
    world.mount().with("--live", "100").arg(lower.display().to_string()).run()?;
    no_leftovers(world)
}

/// Waits until something is so.
fn becomes<T: PartialEq + std::fmt::Debug>(what: &str, wanted: T, look: impl Fn() -> T) -> Check {
    let start = Instant::now();
    loop {
        let found = look();
        if found == wanted {
            return Ok(());
        }
        if start.elapsed() > Duration::from_secs(30) {
            return Err(Failure::Wrong(format!("{what}: still {found:?}, not {wanted:?}")));
        }
        std::thread::yield_now();
    }
}

fn names(dir: &str) -> Option<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .ok()?
        .map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect::<Option<_>>()?;
    names.sort();
    Some(names)
}

fn change_layer(args: &[String]) -> Check {
    let [lower] = args else { return Err("the layer is wanted".into()) };
    let lower = Path::new(lower);
    let text = |path: &str| fs::read_to_string(path).ok();
    let is = |path: &'static str, wanted: &str| becomes(path, Some(wanted.to_owned()), || text(path));

    // All of it known before.
    for path in ["file", "grows", "gone", "dir/sub/deep", "replaced/old", "merged/old", "upper", "emptied/x"]
    {
        same!(text(path), Some(format!("old {path}")));
    }
    same!(fs::read_link("link")?, Path::new("old"));
    same!((text("new"), text("merged/new"), names("kind")), (None, None, Some(vec![])));
    same!(names("merged"), Some(vec!["old".to_owned()]));
    fs::write("upper", "ours")?;
    fs::write("merged/ours", "ours")?;
    fs::create_dir("later")?;
    fs::write("later/ours", "ours")?;
    let open = File::open("grows")?;
    same!(open.metadata()?.len(), 9);

    // In place, also seen by those who have it open.
    fs::write(lower.join("file"), "changed, and longer")?;
    is("file", "changed, and longer")?;
    fs::write(lower.join("file"), "short")?;
    is("file", "short")?;
    OpenOptions::new().append(true).open(lower.join("grows"))?.write_all(b" and more")?;
    becomes("size", 18, || open.metadata().map_or(0, |meta| meta.len()))?;
    same!(std::io::read_to_string(&open)?, "old grows and more");
    fs::set_permissions(lower.join("grows"), fs::Permissions::from_mode(0o600))?;
    becomes("mode of an open file", 0o600, || open.metadata().map_or(0, |meta| meta.mode() & 0o777))?;

    // Replaced, gone, new.
    fs::write(lower.join("temp"), "another file")?;
    fs::rename(lower.join("temp"), lower.join("file"))?;
    is("file", "another file")?;
    fs::remove_file(lower.join("link"))?;
    symlink("changed", lower.join("link"))?;
    becomes("link", Some("changed".into()), || fs::read_link("link").ok())?;
    fs::remove_file(lower.join("gone"))?;
    becomes("gone", false, || Path::new("gone").exists())?;
    fs::write(lower.join("new"), "new")?;
    is("new", "new")?;
    fs::remove_dir(lower.join("kind"))?;
    fs::write(lower.join("kind"), "a file now")?;
    is("kind", "a file now")?;

    // Directories: deep in one, instead of one, and below one of the upper.
    fs::write(lower.join("dir/sub/added"), "added")?;
    becomes("dir/sub", Some(vec!["added".to_owned(), "deep".to_owned()]), || names("dir/sub"))?;
    fs::set_permissions(lower.join("dir"), fs::Permissions::from_mode(0o711))?;
    becomes("mode", 0o711, || fs::metadata("dir").map_or(0, |meta| meta.mode() & 0o777))?;
    fs::remove_dir_all(lower.join("replaced"))?;
    fs::create_dir(lower.join("replaced"))?;
    fs::write(lower.join("replaced/new"), "new")?;
    becomes("replaced", Some(vec!["new".to_owned()]), || names("replaced"))?;
    is("replaced/new", "new")?;
    errno!(fs::read("replaced/old"), NOENT);
    fs::rename(lower.join("merged"), lower.join("merged.old"))?;
    fs::create_dir(lower.join("merged"))?;
    fs::rename(lower.join("merged.old/old"), lower.join("merged/old"))?;
    fs::write(lower.join("merged/new"), "new")?;
    becomes("merged", Some(vec!["new".into(), "old".into(), "ours".into()]), || names("merged"))?;
    is("merged/new", "new")?;
    fs::write("merged/old", "changed")?;
    same!((text("merged/old"), text("merged/ours")), (Some("changed".into()), Some("ours".into())));
    fs::create_dir(lower.join("later"))?;
    fs::write(lower.join("later/theirs"), "theirs")?;
    becomes("later", Some(vec!["ours".to_owned(), "theirs".to_owned()]), || names("later"))?;
    fs::remove_file(lower.join("emptied/x"))?;
    becomes("rmdir", true, || fs::remove_dir("emptied").is_ok())?;

    // What is ours stays ours.
    fs::write(lower.join("upper"), "theirs")?;
    is("new", "new")?;
    same!(text("upper"), Some("ours".to_owned()));
    holds!(names("merged").is_some_and(|names| names.contains(&"ours".to_owned())));
    Ok(())
}
