//! What the directories and files that a spec names are: read before anything is made, so
//! that a wrong path is an error while there is nothing to undo.
//!
//! A layer may be hostile. It is only looked at (`lstat`, `readlink`, one bounded read of
//! account files), each path one component at a time with its links resolved inside the
//! merged tree, and nothing is ever opened for writing.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::HostFacts;
use crate::spec::{NetMode, RootSpec, ValidSpec};

/// What does not show of the host's own tree: the places of mounts, and /run with the sockets
/// of the host's services.
pub const HIDDEN_OF_HOST: [&str; 4] = ["proc", "sys", "dev", "run"];

/// A path that a spec names cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// It cannot be looked at.
    #[error("cannot use the {role} {path}")]
    Access {
        /// What the path was given as.
        role: &'static str,
        /// The path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// It is no directory.
    #[error("cannot use the {role} {path}: it is not a directory")]
    NotADirectory {
        /// What the path was given as.
        role: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A volume of a device.
    #[error("cannot use the volume's source {path}: it is a device, and volumes are mounted nodev")]
    Device {
        /// The path.
        path: PathBuf,
    },
    /// Nothing is in it.
    #[error("cannot use the layer {path}: it is empty, so there is no command to run in it")]
    Empty {
        /// The path.
        path: PathBuf,
    },
    /// One contains the other.
    #[error("cannot use {inner} together with {outer}: the {inner_role} is inside the {outer_role}")]
    Nested {
        /// What the inner path was given as.
        inner_role: &'static str,
        /// The inner path.
        inner: PathBuf,
        /// What the outer path was given as.
        outer_role: &'static str,
        /// The outer path.
        outer: PathBuf,
    },
    /// The upper directory is the root of a file system.
    #[error(
        "cannot use the upper directory {path}: it is a mount point, and its work directory must be beside it"
    )]
    UpperIsMountPoint {
        /// The path.
        path: PathBuf,
    },
}

impl LayerError {
    /// What can be done about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Access { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                Some("you may not read it; `ls -ld` on it and on its parents shows who may")
            }
            Self::Access { role: "volume's source", source, .. } if source.kind() == ErrorKind::NotFound => {
                Some("nothing is made on the host for a volume: make the directory or file first")
            }
            Self::Access { role: "layer", source, .. } if source.kind() == ErrorKind::NotFound => {
                Some("check the spelling; `mmdebstrap --variant=minbase stable DIR` makes a root file system")
            }
            Self::Access { role: "control socket", source, .. } if source.kind() == ErrorKind::NotFound => {
                Some("nothing is made on the host for it: make its directory first")
            }
            Self::Access { .. } => None,
            Self::NotADirectory { role: "layer", .. } => Some(
                "a layer is an unpacked directory tree; unpack an archive first, for example with `tar -xf`",
            ),
            Self::NotADirectory { .. } => Some("give a directory: changes are kept as a tree"),
            Self::Device { .. } => Some(
                "the sandbox has null, zero, full, random, urandom and tty of its own; no others are given to it",
            ),
            Self::Empty { .. } => {
                Some("make one first, for example with `mmdebstrap --variant=minbase stable DIR`")
            }
            Self::Nested { .. } => Some("choose a directory beside it"),
            Self::UpperIsMountPoint { .. } => Some("choose a directory below it"),
        }
    }
}

/// What kind of object a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A directory.
    Directory,
    /// Anything else.
    File,
    /// Nothing can be there: a part of the way is no directory, or the links go round.
    Blocked,
}

/// One layer as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerFacts {
    /// Without links.
    #[serde(with = "crate::spec::os")]
    pub host_path: PathBuf,
    /// Owner of the directory itself.
    pub uid: u32,
    /// Group of the directory itself.
    pub gid: u32,
}

/// A place of a mount inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaceFacts {
    /// As asked for, absolute.
    #[serde(with = "crate::spec::os")]
    pub root_path: PathBuf,
    /// Relative to the root, links resolved inside the merged tree.
    #[serde(with = "crate::spec::os")]
    pub resolved: PathBuf,
    /// What is there now.
    pub kind: Option<Kind>,
}

/// A volume's source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeFacts {
    /// Without links.
    #[serde(with = "crate::spec::os")]
    pub host_path: PathBuf,
    /// What it is.
    pub kind: Kind,
}

/// Accounts whose locked shadow entries are generated.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounts {
    /// User names.
    pub users: Vec<String>,
    /// Group names with their members as /etc/group writes them.
    pub groups: Vec<(String, String)>,
}

/// What the root of a sandbox is made of, as found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFacts {
    /// The layers, the lowest first.
    pub layers: Vec<LayerFacts>,
    /// Mount points and the working directory.
    pub places: Vec<PlaceFacts>,
    /// One for each volume of the spec, in its order.
    pub volumes: Vec<VolumeFacts>,
    /// /etc/apt/apt.conf.d is there.
    pub has_apt: bool,
    /// Accounts of the host whose shadow entries the caller may not read.
    pub accounts: Option<Accounts>,
    /// /etc/hosts of the host, where it is to be continued inside.
    pub hosts: Option<String>,
    /// /etc/resolv.conf of the host, where it is to be repeated inside.
    pub resolv_conf: Option<String>,
    /// Home directory of `--user`, by the /etc/passwd inside.
    #[serde(with = "crate::spec::os::option")]
    pub home: Option<PathBuf>,
}

/// Looks at everything `spec` names.
///
/// # Errors
/// When a path cannot be used as what it was given for.
pub fn inspect(spec: &ValidSpec, facts: &HostFacts) -> Result<RootFacts, LayerError> {
    let layers: Vec<LayerFacts> = match &spec.fs.root {
        RootSpec::Host => vec![LayerFacts { host_path: "/".into(), uid: 0, gid: 0 }],
        RootSpec::Layers(layers) => {
            layers.iter().map(|layer| inspect_layer(&layer.host_path)).collect::<Result<_, _>>()?
        }
    };
    let host_tree = spec.fs.root == RootSpec::Host;
    if !host_tree {
        check_not_empty(&layers)?;
    }
    if let Some(upper) = &spec.fs.upper {
        check_upper(upper, &layers, host_tree)?;
    }
    let volumes = spec
        .fs
        .volumes
        .iter()
        .map(|volume| inspect_volume(&volume.host_path))
        .collect::<Result<Vec<_>, _>>()?;

    if let Some(control) = &spec.net.control {
        let volumes = volumes.iter().map(|volume| ("volume's source", volume.host_path.clone()));
        // The upper need not be there yet.
        let upper = spec.fs.upper.as_ref().and_then(|upper| canonical_new(upper).ok());
        check_control(control, volumes.chain(upper.map(|upper| ("upper directory", upper))))?;
    }

    let mut view = MergedView::new(layers.iter().map(|layer| layer.host_path.as_path()));
    if host_tree {
        view.hidden = HIDDEN_OF_HOST.iter().map(Path::new).collect();
    }
    let own = ["/proc", "/sys", "/dev"].map(PathBuf::from);
    // Without a working directory given, the caller's own is taken where it can be entered, and
    // never made.
    let asked = own
        .iter()
        .chain(spec.fs.volumes.iter().map(|volume| &volume.root_path))
        .chain(spec.fs.tmpfs.iter().map(|tmpfs| &tmpfs.root_path))
        .chain(&spec.process.workdir);
    let places = asked
        .map(|path| {
            let (resolved, kind) = view.resolve(path);
            PlaceFacts { root_path: path.clone(), resolved, kind }
        })
        .collect();

    let host_text = |wanted: bool, path: &str| {
        wanted.then(|| std::fs::read(path).ok()).flatten().map(|b| String::from_utf8_lossy(&b).into_owned())
    };
    Ok(RootFacts {
        places,
        volumes,
        has_apt: view.resolve(Path::new("/etc/apt/apt.conf.d")).1 == Some(Kind::Directory),
        accounts: (host_tree && facts.uid != 0).then(read_accounts),
        hosts: host_text(host_tree, "/etc/hosts"),
        resolv_conf: host_text(!host_tree && spec.net.mode == NetMode::Host, "/etc/resolv.conf"),
        home: spec.process.user.as_ref().and_then(|user| view.home_of(&user.user)),
        layers,
    })
}

fn access(role: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> LayerError {
    move |source| LayerError::Access { role, path: path.to_owned(), source }
}

fn inspect_layer(path: &Path) -> Result<LayerFacts, LayerError> {
    let role = "layer";
    let host_path = std::fs::canonicalize(path).map_err(access(role, path))?;
    let meta = std::fs::metadata(&host_path).map_err(access(role, path))?;
    if !meta.is_dir() {
        return Err(LayerError::NotADirectory { role, path: path.to_owned() });
    }
    // Listing says whether it can be read, entering whether anything in it can be reached.
    std::fs::read_dir(&host_path).map_err(access(role, path))?;
    std::fs::metadata(host_path.join(".")).map_err(access(role, path))?;
    Ok(LayerFacts { host_path, uid: meta.uid(), gid: meta.gid() })
}

fn check_not_empty(layers: &[LayerFacts]) -> Result<(), LayerError> {
    let empty = |layer: &LayerFacts| {
        std::fs::read_dir(&layer.host_path).is_ok_and(|mut entries| entries.next().is_none())
    };
    match layers.iter().all(empty).then(|| layers.first()).flatten() {
        Some(layer) => Err(LayerError::Empty { path: layer.host_path.clone() }),
        None => Ok(()),
    }
}

/// The path without links, of which the last component need not exist yet.
///
/// # Errors
/// When the parent cannot be reached.
pub fn canonical_new(path: &Path) -> std::io::Result<PathBuf> {
    match (std::fs::canonicalize(path), path.parent(), path.file_name()) {
        (Err(error), Some(parent), Some(name)) if error.kind() == ErrorKind::NotFound => {
            // A link that leads nowhere is there, but not as a directory.
            if std::fs::symlink_metadata(path).is_ok() {
                return Err(error);
            }
            Ok(std::fs::canonicalize(parent)?.join(name))
        }
        (result, ..) => result,
    }
}

fn check_upper(upper: &Path, layers: &[LayerFacts], host_tree: bool) -> Result<(), LayerError> {
    let role = "upper directory";
    let path = canonical_new(upper).map_err(access(role, upper))?;
    if let Ok(meta) = std::fs::metadata(&path) {
        if !meta.is_dir() {
            return Err(LayerError::NotADirectory { role, path: upper.to_owned() });
        }
        let parent = path.parent().map(std::fs::metadata).transpose().map_err(access(role, upper))?;
        if parent.is_none_or(|parent| parent.dev() != meta.dev()) {
            return Err(LayerError::UpperIsMountPoint { path });
        }
    }
    for layer in layers {
        let outer = &layer.host_path;
        // Over the host's tree the upper is somewhere below `/` in any case, and hidden.
        if !host_tree && path.starts_with(outer) {
            return Err(LayerError::Nested {
                inner_role: role,
                inner: path,
                outer_role: "layer",
                outer: outer.clone(),
            });
        }
        if !host_tree && outer.starts_with(&path) {
            return Err(LayerError::Nested {
                inner_role: "layer",
                inner: outer.clone(),
                outer_role: role,
                outer: path,
            });
        }
    }
    Ok(())
}

fn inspect_volume(path: &Path) -> Result<VolumeFacts, LayerError> {
    let role = "volume's source";
    let host_path = std::fs::canonicalize(path).map_err(access(role, path))?;
    let meta = std::fs::symlink_metadata(&host_path).map_err(access(role, path))?;
    if meta.file_type().is_block_device() || meta.file_type().is_char_device() {
        return Err(LayerError::Device { path: path.to_owned() });
    }
    Ok(VolumeFacts { host_path, kind: if meta.is_dir() { Kind::Directory } else { Kind::File } })
}

/// The control socket must not be where the payload could reach it. (A socket in a layer is the overlay's own object inside,
/// at which nobody listens.) What one directory is by another name, as by a bind mount of the host, is found by its number.
fn check_control(
    control: &Path,
    given: impl Iterator<Item = (&'static str, PathBuf)>,
) -> Result<(), LayerError> {
    let role = "control socket";
    let dir = control.parent().unwrap_or(Path::new("/"));
    let dir = std::fs::canonicalize(dir).map_err(access(role, control))?;
    let id = |path: &Path| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let around: Vec<_> = dir.ancestors().filter_map(id).collect();
    let path = dir.join(control.file_name().unwrap_or_default());
    for (outer_role, outer) in given {
        if path.starts_with(&outer) || id(&outer).is_some_and(|id| around.contains(&id)) {
            return Err(LayerError::Nested { inner_role: role, inner: path, outer_role, outer });
        }
    }
    Ok(())
}

fn read_accounts() -> Accounts {
    let names = |path: &str| {
        let text = std::fs::read(path).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    };
    parse_accounts(&names("/etc/passwd"), &names("/etc/group"))
}

fn parse_accounts(passwd: &str, group: &str) -> Accounts {
    let entry = |line: &str| -> Option<(String, String)> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with(['+', '-', '#']))?;
        Some((name.to_owned(), fields.nth(2).unwrap_or_default().to_owned()))
    };
    Accounts {
        users: passwd.lines().filter_map(entry).map(|(name, _)| name).collect(),
        groups: group.lines().filter_map(entry).collect(),
    }
}

/// The layers as one tree, as far as looking up a path needs it: the topmost object counts,
/// whiteouts and opaque directories hide what is below.
struct MergedView<'a> {
    /// The topmost first.
    layers: Vec<&'a Path>,
    /// Shown as empty directories; relative.
    hidden: Vec<&'a Path>,
}

/// The kernel's limit on links in one path.
const LINKS_MAX: u32 = 40;

enum Found {
    Missing,
    /// A directory made of these layers.
    Directory(Vec<usize>),
    Link(PathBuf),
    Other,
}

impl<'a> MergedView<'a> {
    fn new(lowest_first: impl DoubleEndedIterator<Item = &'a Path>) -> Self {
        Self { layers: lowest_first.rev().collect(), hidden: Vec::new() }
    }

    /// Where `path` leads, relative to the root, and what is there.
    fn resolve(&self, path: &Path) -> (PathBuf, Option<Kind>) {
        let all: Vec<usize> = (0..self.layers.len()).collect();
        let mut walked: Vec<(OsString, Vec<usize>)> = Vec::new();
        let mut left: VecDeque<OsString> = names(path);
        let mut links = 0;
        while let Some(name) = left.pop_front() {
            if name == ".." {
                walked.pop();
                continue;
            }
            let visible = walked.last().map_or(&all, |(_, visible)| visible);
            let relative: PathBuf =
                walked.iter().map(|(name, _)| name.as_os_str()).chain([name.as_os_str()]).collect();
            match self.find(&relative, visible) {
                Found::Directory(layers) => walked.push((name, layers)),
                Found::Link(target) if links < LINKS_MAX => {
                    links += 1;
                    if target.is_absolute() {
                        walked.clear();
                    }
                    for name in names(&target).into_iter().rev() {
                        left.push_front(name);
                    }
                }
                Found::Other if left.is_empty() => return (relative, Some(Kind::File)),
                Found::Missing => {
                    return (left.iter().fold(relative, |path, name| path.join(name)), None);
                }
                Found::Link(_) | Found::Other => return (relative, Some(Kind::Blocked)),
            }
        }
        (walked.into_iter().map(|(name, _)| name).collect(), Some(Kind::Directory))
    }

    fn find(&self, relative: &Path, visible: &[usize]) -> Found {
        if self.hidden.contains(&relative) {
            // No layer has anything below it.
            return Found::Directory(Vec::new());
        }
        let mut directories = Vec::new();
        for &at in visible {
            let path = self.layers[at].join(relative);
            let Ok(meta) = std::fs::symlink_metadata(&path) else { continue };
            if meta.is_dir() {
                directories.push(at);
                if visible.len() > 1 && is_opaque(&path) {
                    break;
                }
            } else if !directories.is_empty() || is_whiteout(&meta) {
                break;
            } else if meta.is_symlink() {
                return std::fs::read_link(&path).map_or(Found::Other, Found::Link);
            } else {
                return Found::Other;
            }
        }
        if directories.is_empty() { Found::Missing } else { Found::Directory(directories) }
    }

    /// The home directory of a user, by name or number.
    fn home_of(&self, user: &str) -> Option<PathBuf> {
        const PASSWD_MAX: u64 = 1 << 20;
        let (relative, kind) = self.resolve(Path::new("/etc/passwd"));
        if kind != Some(Kind::File) {
            return None;
        }
        let path = self.layers.iter().map(|layer| layer.join(&relative)).find(|path| path.exists())?;
        // O_NONBLOCK and O_NOFOLLOW: a fifo must not hold us up, and a link must not lead out.
        let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOFOLLOW;
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
            .ok()?;
        let mut bytes = Vec::new();
        file.take(PASSWD_MAX).read_to_end(&mut bytes).ok()?;
        String::from_utf8_lossy(&bytes).lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let home = fields.get(5).filter(|home| home.starts_with('/'))?;
            (fields[0] == user || fields[2] == user).then(|| PathBuf::from(home))
        })
    }
}

fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsStr::new("..").to_owned()),
            _ => None,
        })
        .collect()
}

/// overlayfs: a character device 0/0, or an empty file with a `user.overlay.whiteout` xattr,
/// which only counts for mounting and is left to the overlay.
fn is_whiteout(meta: &Metadata) -> bool {
    meta.file_type().is_char_device() && meta.rdev() == 0
}

fn is_opaque(path: &Path) -> bool {
    let mut value = [0; 1];
    rustix::fs::lgetxattr(path, "user.overlay.opaque", &mut value).is_ok() && value == *b"y"
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A directory that goes away with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("rootlet-layers-{}-{name}", std::process::id()));
            std::fs::remove_dir_all(&path).ok();
            std::fs::create_dir_all(&path).unwrap();
            Self(std::fs::canonicalize(path).unwrap())
        }

        fn dir(&self, path: &str) -> PathBuf {
            let path = self.0.join(path);
            std::fs::create_dir_all(&path).unwrap();
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).ok();
        }
    }

    fn resolved(view: &MergedView<'_>, path: &str) -> (String, Option<Kind>) {
        let (path, kind) = view.resolve(Path::new(path));
        (path.display().to_string(), kind)
    }

    #[test]
    fn links_stay_inside_the_root() {
        let scratch = Scratch::new("links");
        let layer = scratch.dir("l");
        scratch.dir("l/run/x");
        scratch.dir("l/var");
        symlink("/run", layer.join("var/run")).unwrap();
        symlink("../../../../../../etc", layer.join("out")).unwrap();
        symlink("loop", layer.join("loop")).unwrap();
        std::fs::write(layer.join("file"), "").unwrap();
        let view = MergedView::new([layer.as_path()].into_iter());
        assert_eq!(resolved(&view, "/var/run/x"), ("run/x".into(), Some(Kind::Directory)));
        assert_eq!(resolved(&view, "/var/run/y/z"), ("run/y/z".into(), None));
        assert_eq!(resolved(&view, "/out/passwd"), ("etc/passwd".into(), None));
        assert_eq!(resolved(&view, "/file"), ("file".into(), Some(Kind::File)));
        assert_eq!(resolved(&view, "/file/below").1, Some(Kind::Blocked));
        assert_eq!(resolved(&view, "/loop").1, Some(Kind::Blocked));
        assert_eq!(resolved(&view, "/"), (String::new(), Some(Kind::Directory)));
    }

    #[test]
    fn nothing_is_found_in_hidden_directories() {
        let scratch = Scratch::new("hidden");
        let layer = scratch.dir("l");
        scratch.dir("l/run/x");
        scratch.dir("l/var");
        symlink("/run", layer.join("var/run")).unwrap();
        let mut view = MergedView::new([layer.as_path()].into_iter());
        view.hidden = vec![Path::new("run")];
        assert_eq!(resolved(&view, "/run"), ("run".into(), Some(Kind::Directory)));
        assert_eq!(resolved(&view, "/var/run/x/y"), ("run/x/y".into(), None));
    }

    #[test]
    fn the_topmost_layer_counts() {
        let scratch = Scratch::new("layers");
        let low = scratch.dir("low");
        let high = scratch.dir("high");
        scratch.dir("low/a/b");
        scratch.dir("high/a");
        scratch.dir("low/c");
        std::fs::write(high.join("c"), "").unwrap();
        let view = MergedView::new([low.as_path(), high.as_path()].into_iter());
        assert_eq!(resolved(&view, "/a/b").1, Some(Kind::Directory));
        assert_eq!(resolved(&view, "/c").1, Some(Kind::File));
        let mut opaque = true;
        if rustix::fs::setxattr(high.join("a"), "user.overlay.opaque", b"y", rustix::fs::XattrFlags::empty())
            .is_err()
        {
            opaque = false; // no user xattrs on this file system
        }
        assert_eq!(resolved(&view, "/a/b").1.is_none(), opaque);
    }

    #[test]
    fn homes_come_from_the_passwd_inside() {
        let scratch = Scratch::new("homes");
        let layer = scratch.dir("l");
        scratch.dir("l/etc");
        std::fs::write(
            layer.join("etc/passwd"),
            "root:x:0:0::/root:\nweb:x:33:33::/var/www:/bin/sh\nbad:x:1\n",
        )
        .unwrap();
        let view = MergedView::new([layer.as_path()].into_iter());
        assert_eq!(view.home_of("web"), Some("/var/www".into()));
        assert_eq!(view.home_of("33"), Some("/var/www".into()));
        assert_eq!(view.home_of("bad"), None);
        assert_eq!(view.home_of("nobody"), None);
    }

    #[test]
    fn layers_that_cannot_be_used() {
        let scratch = Scratch::new("bad");
        let file = scratch.0.join("file");
        std::fs::write(&file, "").unwrap();
        let empty = scratch.dir("empty");
        assert!(matches!(inspect_layer(&scratch.0.join("gone")), Err(LayerError::Access { .. })));
        assert!(matches!(inspect_layer(&file), Err(LayerError::NotADirectory { .. })));
        let facts = inspect_layer(&empty).unwrap();
        assert!(matches!(check_not_empty(std::slice::from_ref(&facts)), Err(LayerError::Empty { .. })));
        let full = inspect_layer(&scratch.0).unwrap();
        check_not_empty(&[facts, full]).unwrap();
    }

    #[test]
    fn a_device_is_no_volume() {
        assert!(matches!(inspect_volume(Path::new("/dev/null")), Err(LayerError::Device { .. })));
        assert_eq!(inspect_volume(Path::new("/dev/fd/")).unwrap().kind, Kind::Directory);
        assert_eq!(inspect_volume(Path::new("/etc/passwd")).unwrap().kind, Kind::File);
    }

    #[test]
    fn upper_and_layers_must_not_contain_each_other() {
        let scratch = Scratch::new("upper");
        let layer = inspect_layer(&scratch.dir("a/layer")).unwrap();
        let check = |path: PathBuf, host| check_upper(&path, std::slice::from_ref(&layer), host);
        assert!(matches!(check(layer.host_path.join("upper"), false), Err(LayerError::Nested { .. })));
        assert!(matches!(check(layer.host_path.clone(), false), Err(LayerError::Nested { .. })));
        assert!(matches!(check(scratch.0.join("a"), false), Err(LayerError::Nested { .. })));
        check(scratch.0.join("b"), false).unwrap();
        check(layer.host_path.join("upper"), true).unwrap();
        assert!(matches!(check(scratch.0.join("gone/upper"), false), Err(LayerError::Access { .. })));
    }

    #[test]
    fn accounts_of_the_host() {
        let accounts = parse_accounts("root:x:0:0\n+nis\n\nada:x:1:1\n", "root:x:0:\nadm:x:4:ada,bob\n");
        assert_eq!(accounts.users, ["root", "ada"]);
        assert_eq!(accounts.groups, [("root".into(), String::new()), ("adm".into(), "ada,bob".into())]);
    }
}
