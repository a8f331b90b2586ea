//! The generated layer: files, directories and links that exist only in memory,
//! between the layers and the upper (`/etc/resolv.conf`, `/etc/hosts`, …).

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Component;
use std::sync::Arc;

use crate::attr::Kind;
use crate::config::{Generated, GeneratedNode};

/// The index of the root directory, which always exists.
pub(crate) const GENERATED_ROOT: u32 = 0;

/// One object of the layer.
#[derive(Debug)]
pub(crate) struct GenNode {
    pub(crate) perm: u32,
    pub(crate) body: GenBody,
    /// Asked for itself, not made as the parent of something: its mode counts even
    /// where a layer below has a directory of that name.
    pub(crate) explicit: bool,
    /// Its inode number, which depends on its path only.
    pub(crate) number: u64,
}

/// What a generated object holds.
#[derive(Debug)]
pub(crate) enum GenBody {
    Dir(BTreeMap<Box<[u8]>, u32>),
    File(Arc<[u8]>),
    Symlink(Arc<[u8]>),
}

impl GenNode {
    pub(crate) fn kind(&self) -> Kind {
        match self.body {
            GenBody::Dir(_) => Kind::Dir,
            GenBody::File(_) => Kind::File,
            GenBody::Symlink(_) => Kind::Symlink,
        }
    }

    /// The bytes of a file or the target of a link.
    pub(crate) fn bytes(&self) -> Arc<[u8]> {
        match &self.body {
            GenBody::Dir(_) => Arc::new([]),
            GenBody::File(bytes) | GenBody::Symlink(bytes) => bytes.clone(),
        }
    }
}

/// All generated objects.
#[derive(Debug)]
pub(crate) struct GenTree {
    nodes: Vec<GenNode>,
}

impl GenTree {
    /// Builds the tree. Of two objects with one path the later counts; a path below
    /// something that is not a directory turns that into a directory.
    pub(crate) fn new(objects: &[Generated]) -> Self {
        let dir =
            |explicit, number| GenNode { perm: 0o755, body: GenBody::Dir(BTreeMap::new()), explicit, number };
        let mut tree = Self { nodes: vec![dir(false, crate::inode::ROOT)] };
        for object in objects {
            let mut at = GENERATED_ROOT;
            for component in object.path.components() {
                let Component::Normal(name) = component else { continue };
                let number = tree.node(at).number;
                if !matches!(tree.node(at).body, GenBody::Dir(_)) {
                    tree.nodes[at as usize] = dir(false, number);
                }
                let number = crate::numbers::generated(number, name.as_bytes());
                at = tree.child_or_insert(at, name.as_bytes(), dir(false, number));
            }
            let body = match &object.node {
                GeneratedNode::Dir => {
                    let node = &mut tree.nodes[at as usize];
                    if matches!(node.body, GenBody::Dir(_)) {
                        node.perm = object.mode & 0o7777;
                        node.explicit = true;
                        continue;
                    }
                    GenBody::Dir(BTreeMap::new())
                }
                GeneratedNode::File(bytes) => GenBody::File(bytes.as_slice().into()),
                GeneratedNode::Symlink(target) => GenBody::Symlink(target.as_os_str().as_bytes().into()),
            };
            // The root of the mount can only be a directory.
            if at != GENERATED_ROOT {
                let node = &mut tree.nodes[at as usize];
                *node = GenNode { perm: object.mode & 0o7777, body, explicit: true, number: node.number };
            }
        }
        tree
    }

    fn child_or_insert(&mut self, parent: u32, name: &[u8], new: GenNode) -> u32 {
        let next = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        let GenBody::Dir(children) = &mut self.nodes[parent as usize].body else { return parent };
        if let Some(&child) = children.get(name) {
            return child;
        }
        children.insert(name.into(), next);
        self.nodes.push(new);
        next
    }

    /// Whether there is anything at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.nodes.len() == 1 && !self.nodes[0].explicit
    }

    pub(crate) fn node(&self, index: u32) -> &GenNode {
        &self.nodes[index as usize]
    }

    /// The object `name` in a directory of the layer.
    pub(crate) fn child(&self, dir: u32, name: &[u8]) -> Option<u32> {
        match &self.node(dir).body {
            GenBody::Dir(children) => children.get(name).copied(),
            _ => None,
        }
    }

    /// The names in a directory of the layer.
    pub(crate) fn children(&self, dir: u32) -> impl Iterator<Item = (&[u8], u32)> {
        let children = match &self.node(dir).body {
            GenBody::Dir(children) => Some(children),
            _ => None,
        };
        children.into_iter().flatten().map(|(name, &index)| (&**name, index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_made_and_the_later_object_counts() {
        let file = |path: &str, text: &str| Generated {
            path: path.into(),
            mode: 0o644,
            node: GeneratedNode::File(text.into()),
        };
        let tree = GenTree::new(&[
            file("etc/hosts", "old"),
            file("/etc/hosts", "new"),
            Generated { path: "etc".into(), mode: 0o700, node: GeneratedNode::Dir },
        ]);
        let etc = tree.child(GENERATED_ROOT, b"etc").expect("made");
        assert_eq!((tree.node(etc).perm, tree.node(etc).explicit), (0o700, true));
        let hosts = tree.child(etc, b"hosts").expect("made");
        assert_eq!(&*tree.node(hosts).bytes(), b"new");
        assert!(GenTree::new(&[]).is_empty() && !tree.is_empty());
    }
}
