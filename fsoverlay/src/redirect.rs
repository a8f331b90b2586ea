//! Directories that have what is below them under another name.
//!
//! A renamed directory of a layer is not copied: its place in the upper gets a directory with the
//! kernel's mark `user.overlay.redirect`, which says where the layers have it:
//!
//! - a name: in the directories that its parent is merged from (it was renamed where it was);
//! - an absolute path: from the roots of the layers below.
//!
//! The mark is a fact about the layers, true wherever the directory stands: it is written before the
//! rename, never changed by a later one but from a name to the path that means the same, and a crash
//! at any moment leaves it true. What the kernel reads, we read by the kernel's rules:
//!
//! - the path is looked for in each layer by itself, from the top; what is missing in one is looked for
//!   in the next, a whiteout or anything that is not a directory on the way ends the search, and an opaque
//!   directory on the way ends it with its layer;
//! - a layer's own redirect, met on the way, changes the path for the layers below that one. So each
//!   step leads downwards, and no redirect can loop.
//!
//! A redirect is data of somebody else's as soon as an upper is handed on: each component must be a name
//! ([`check_name`]) and is opened as one, so none leaves its layer. One that is malformed, or longer than
//! [`MAX_LENGTH`], means "nothing below", as does one that names something missing. A lookup that would take more
//! than [`MAX_PROBES`] names ends with `ELOOP`: what is below would be there, and must not seem to be missing.

use std::borrow::Cow;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::XattrFlags;

use crate::attr::Kind;
use crate::create::check_name;
use crate::engine::Engine;
use crate::errno::{Errno, Res, missing_ok};
use crate::generated::{GENERATED_ROOT, GenBody, GenTree};
use crate::inode::{DirState, Node, ROOT};
use crate::layer::RealDir;
use crate::lookup::Probe;
use crate::sys::{self, At};
use crate::xattr::REDIRECT;

/// The longest path that is written, and the longest that one becomes on its way down: PATH_MAX.
const MAX_LENGTH: usize = 4096;

/// How many names are looked for along the paths of one lookup. Each layer has a path of its own, of up to half as many
/// names as [`MAX_LENGTH`]: a path that is as long as real ones are takes a few thousand in a hundred layers.
const MAX_PROBES: usize = 1 << 14;

/// The components of an absolute redirect.
type Path = Vec<Box<[u8]>>;

/// A redirect as it is on disk, checked.
#[derive(Debug, PartialEq, Eq)]
enum Redirect {
    Name(Box<[u8]>),
    Path(Path),
}

impl Redirect {
    fn parse(text: &[u8]) -> Option<Self> {
        if text.len() > MAX_LENGTH {
            return None;
        }
        let Some(path) = text.strip_prefix(b"/") else {
            return check_name(text).is_ok().then(|| Self::Name(text.into()));
        };
        let parts = path.split(|&b| b == b'/');
        parts.map(|part| check_name(part).is_ok().then(|| part.into())).collect::<Option<_>>().map(Self::Path)
    }
}

/// What the generated layer has at the end of a redirect.
pub(crate) enum InMemory {
    Nothing,
    Object(u32),
}

/// The way from layer to layer of one lookup.
#[derive(Debug)]
pub(crate) struct Descent<'a> {
    /// The directories that the parent is merged from.
    beside: &'a [Arc<RealDir>],
    next: usize,
    name: Cow<'a, [u8]>,
    /// After an absolute redirect: the path, and how many layers are still below.
    path: Option<(Path, usize)>,
    /// What is left of [`MAX_PROBES`].
    probes: usize,
    ended: bool,
}

/// A directory in which the name is to be looked for.
#[derive(Debug)]
pub(crate) enum Step {
    /// One that the parent is merged from.
    Beside(usize),
    /// One at the end of a path.
    Along(Arc<RealDir>),
}

impl<'a> Descent<'a> {
    pub(crate) fn new(beside: &'a [Arc<RealDir>], name: &'a [u8]) -> Self {
        Self { beside, next: 0, name: Cow::Borrowed(name), path: None, probes: MAX_PROBES, ended: false }
    }

    /// The name to look for in the directory of this step.
    pub(crate) fn name(&self) -> &[u8] {
        match &self.path {
            Some((path, _)) => path.last().map_or(&[], |name| name),
            None => &self.name,
        }
    }

    /// Whether there may be further steps.
    pub(crate) fn goes_on(&self) -> bool {
        !self.ended && self.path.as_ref().map_or(self.next < self.beside.len(), |(_, left)| *left > 0)
    }

    /// Nothing below counts.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }

    /// A directory was found that has this redirect; `below` layers are below its own.
    pub(crate) fn turn(&mut self, redirect: &[u8], below: usize) {
        match (Redirect::parse(redirect), &mut self.path) {
            (None, _) => self.ended = true,
            (Some(Redirect::Path(path)), _) => self.path = Some((path, below)),
            (Some(Redirect::Name(name)), Some((path, _))) => {
                path.pop();
                path.push(name);
            }
            (Some(Redirect::Name(name)), None) => self.name = Cow::Owned(name.into()),
        }
    }

    /// What the generated layer has, `dir` being its directory that the parent is merged from.
    pub(crate) fn in_memory(&mut self, tree: &GenTree, dir: Option<u32>) -> InMemory {
        let Some((path, _)) = &self.path else {
            return dir
                .and_then(|dir| tree.child(dir, &self.name))
                .map_or(InMemory::Nothing, InMemory::Object);
        };
        let mut at = GENERATED_ROOT;
        for (i, name) in path.iter().enumerate() {
            match tree.child(at, name) {
                None => return InMemory::Nothing,
                Some(child) if i + 1 == path.len() => return InMemory::Object(child),
                Some(child) if matches!(tree.node(child).body, GenBody::Dir(_)) => at = child,
                Some(_) => {
                    self.ended = true;
                    return InMemory::Nothing;
                }
            }
        }
        InMemory::Nothing
    }

    /// The next directory to ask.
    pub(crate) fn step(&mut self, engine: &Engine) -> Res<Option<Step>> {
        while self.goes_on() {
            let Some((path, left)) = &mut self.path else {
                self.next += 1;
                return Ok(Some(Step::Beside(self.next - 1)));
            };
            *left -= 1;
            let Some(layer) = engine.layers.get(*left) else { continue };
            let (found, last) = engine.walk(&layer.root, path, &mut self.probes)?;
            self.ended = last;
            if let Some(dir) = found {
                return Ok(Some(Step::Along(dir)));
            }
        }
        Ok(None)
    }
}

impl Engine {
    /// Goes along all but the last component of a path in one layer: the directory there, if there is
    /// one, and whether the layers below do not count. Redirects on the way change the path for them.
    fn walk(
        &self,
        root: &Arc<RealDir>,
        path: &mut Path,
        probes: &mut usize,
    ) -> Res<(Option<Arc<RealDir>>, bool)> {
        let (mut dir, mut last) = (root.clone(), false);
        // Counted from the end: what comes before may change its length.
        for left in (1..path.len()).rev() {
            let at = path.len() - 1 - left;
            let name = &path[at];
            if dir.hides(name) {
                return Ok((None, last));
            }
            *probes = probes.checked_sub(1).ok_or(Errno::LOOP)?;
            let seen = match self.probe(&dir, name, true)? {
                Probe::Missing => return Ok((None, last)),
                Probe::Found(seen) if seen.stat.kind() == Some(Kind::Dir) => seen,
                Probe::Whiteout | Probe::Found(_) => return Ok((None, true)),
            };
            dir = RealDir::child(&dir, name, seen.stat.key);
            seen.marks.note(&dir);
            last |= seen.marks.opaque;
            if last {
                continue;
            }
            match seen.marks.redirect.as_deref().map(Redirect::parse) {
                None => {}
                Some(None) => last = true,
                Some(Some(Redirect::Name(name))) => path[at] = name,
                Some(Some(Redirect::Path(start))) => drop(path.splice(..=at, start)),
            }
            last |= path.iter().map(|name| name.len() + 1).sum::<usize>() > MAX_LENGTH;
        }
        Ok((Some(dir), last))
    }

    /// The directory that a redirect leads to, in an overlay of everything below it; `parent` is what its
    /// directory merges with.
    pub(crate) fn redirected(&self, parent: Option<&Arc<Node>>, redirect: &[u8]) -> Res<Option<Arc<Node>>> {
        let (mut at, path) = match (Redirect::parse(redirect), parent) {
            (Some(Redirect::Name(name)), Some(parent)) => (parent.clone(), vec![name]),
            (Some(Redirect::Path(path)), _) => (self.root().clone(), path),
            _ => return Ok(None),
        };
        for name in path {
            match missing_ok(self.lookup(&at, &name))? {
                Some(found) if found.kind == Kind::Dir => at = found,
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// Sees to it that a directory of the upper, about to be renamed, finds what it has in the layers
    /// from wherever it is; `same_parent` if it stays in its directory. False if that cannot be written
    /// down: the path is too long, for us or for the file system.
    pub(crate) fn set_redirect(
        &self,
        node: &Node,
        parent: &Arc<Node>,
        name: &[u8],
        same_parent: bool,
    ) -> Res<bool> {
        let known = node.dir()?.state.read().redirect.clone();
        let wanted: Arc<[u8]> = match known {
            Some(known) if same_parent || known.starts_with(b"/") => return Ok(true),
            None if same_parent => name.into(),
            known => match self.path_below(parent, &known.unwrap_or_else(|| name.into()))? {
                Some(path) => path.into(),
                None => return Ok(false),
            },
        };
        // While the lock is held the directory keeps its name.
        let mut state = node.dir()?.state.write();
        if state.removed || !node.has_link(parent, name) {
            return Err(Errno::NOENT);
        }
        let fd = self.upper_fd(node)?;
        match sys::set_xattr(At::Name(fd.as_fd(), b"."), REDIRECT, &wanted, XattrFlags::empty()) {
            Err(Errno::NOSPC | Errno::RANGE | Errno::TOOBIG) => return Ok(false),
            other => other?,
        }
        state.redirect = Some(wanted);
        Ok(true)
    }

    /// Removes a redirect that does not count any more. (The kernel does not follow one with `userxattr`,
    /// and shows no directory that has one.)
    pub(crate) fn drop_redirect(&self, dir: &Arc<RealDir>) {
        let removed = self.fd(dir).and_then(|fd| sys::remove_xattr(At::Name(fd.as_fd(), b"."), REDIRECT));
        if let Err(err) = removed {
            tracing::debug!(?err, "a redirect was left on a directory that needs none");
        }
    }

    /// Where the layers have `name` of a directory, as an absolute path; `None` if that is too long.
    fn path_below(&self, parent: &Arc<Node>, name: &[u8]) -> Res<Option<Vec<u8>>> {
        let mut parts: Path = vec![name.into()];
        let mut length = name.len() + 1;
        let mut dir = parent.clone();
        while dir.ino != ROOT {
            let (part, above) = name_below(&dir)?;
            length += part.len() + 1;
            if length > MAX_LENGTH {
                return Ok(None);
            }
            let ended = part.starts_with(b"/");
            parts.push(part);
            if ended {
                break;
            }
            dir = above;
        }
        let mut path = Vec::with_capacity(length);
        for part in parts.iter().rev() {
            if !part.starts_with(b"/") {
                path.push(b'/');
            }
            path.extend_from_slice(part);
        }
        Ok(Some(path))
    }
}

/// What the layers call a directory, in what its parent is merged from; or its whole path. That
/// never changes while it has anything below, but both places it is read from do: a redirect comes before
/// the new name.
fn name_below(dir: &Node) -> Res<(Box<[u8]>, Arc<Node>)> {
    let redirect = |state: &DirState| state.redirect.clone();
    loop {
        let before = redirect(&dir.dir()?.state.read());
        let link = dir.first_link().ok_or(Errno::NOENT)?;
        if redirect(&dir.dir()?.state.read()) == before {
            return Ok((before.map_or(link.name, |text| text[..].into()), link.parent));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::Scratch;

    #[test]
    fn a_lookup_takes_so_many_names_and_no_more() {
        let scratch = Scratch::new("long-ways");
        let deep = "d/".repeat(500);
        std::fs::create_dir_all(scratch.dir.join("lower").join(&deep).join("end/file")).expect("made");
        let (dir, target) = (scratch.dir.join("upper/dir"), format!("/{deep}end"));
        std::fs::create_dir(&dir).expect("made");
        let fd = crate::layer::open_root(&dir).expect("opened");
        let at = At::Name(fd.as_fd(), b".");
        sys::set_xattr(at, REDIRECT, target.as_bytes(), XattrFlags::empty()).expect("set");
        let mut spec = scratch.spec();
        let layer = spec.layers[0].clone();
        for (layers, found) in [(MAX_PROBES / 500, true), (MAX_PROBES / 500 + 1, false)] {
            spec.layers = vec![layer.clone(); layers];
            let engine = Engine::open(&spec).expect("an overlay");
            let looked = engine.lookup(engine.root(), b"dir");
            assert_eq!(looked.as_ref().map(drop).err().copied(), (!found).then_some(Errno::LOOP), "{layers}");
            if let Ok(dir) = looked {
                assert!(engine.lookup(&dir, b"file").is_ok());
            }
        }
    }

    #[test]
    fn only_names_and_paths_of_names_are_redirects() {
        assert_eq!(Redirect::parse(b"name"), Some(Redirect::Name(b"name"[..].into())));
        let path = vec![b"a"[..].into(), b"b"[..].into()];
        assert_eq!(Redirect::parse(b"/a/b"), Some(Redirect::Path(path)));
        let long = [b'x'; MAX_LENGTH + 1];
        let hostile: [&[u8]; 12] =
            [b"", b"/", b"//", b"/a/", b"/a//b", b"a/b", b".", b"..", b"/..", b"/a/../b", b"/a\0b", &long];
        for text in hostile {
            assert_eq!(Redirect::parse(text), None, "{}", String::from_utf8_lossy(text));
        }
    }
}
