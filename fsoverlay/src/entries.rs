//! READDIR and READDIRPLUS: what [`crate::readdir`] lists and [`crate::lookup`] finds, as requests and replies.

use std::ffi::OsStr;
use std::sync::Arc;

use fuser::{FileAttr, FileType, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use crate::ahead::Begun;
use crate::attr::Attr;
use crate::errno::Res;
use crate::fs::{FuseFs, GENERATION, TTL, errno, file_attr, file_type, no_entry};
use crate::hooks::Opcode;
use crate::inode::Node;
use crate::listing::Entry;

impl FuseFs {
    /// Answers a READDIR.
    pub(crate) fn serve_listing(&self, ino: INodeNo, offset: u64, reply: ReplyDirectory) {
        self.run_listing(Opcode::ReadDir, ino, reply, move |fs, mut reply| {
            if fs.is_far(ino) {
                let list = move |fs: &Self| fs.engine().read_dir(&fs.engine().node(ino.0)?, offset, 256);
                let send = |batch: Res<Vec<_>>, mut reply: ReplyDirectory| match batch {
                    Ok(batch) => {
                        for (next, entry) in batch {
                            let entry: Entry = entry;
                            let name: &OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&entry.name);
                            if reply.add(INodeNo(entry.ino), next, file_type(entry.kind), name) {
                                break;
                            }
                        }
                        reply.ok();
                    }
                    Err(err) => reply.error(errno(err)),
                };
                return fs.afar(Opcode::ReadDir, ino, Some(fs.engine().patience), reply, send, list);
            }
            let mut at = offset;
            loop {
                let batch = match fs.engine().node(ino.0).and_then(|n| fs.engine().read_dir(&n, at, 256)) {
                    Ok(batch) => batch,
                    Err(err) => return reply.error(errno(err)),
                };
                if batch.is_empty() {
                    return reply.ok();
                }
                for (next, entry) in batch {
                    let name = std::os::unix::ffi::OsStrExt::from_bytes(&entry.name);
                    let name: &OsStr = name;
                    if reply.add(INodeNo(entry.ino), next, file_type(entry.kind), name) {
                        return reply.ok();
                    }
                    at = next;
                }
            }
        });
    }

    /// Answers a READDIRPLUS.
    pub(crate) fn serve_listing_plus(&self, ino: INodeNo, offset: u64, reply: ReplyDirectoryPlus) {
        self.run_listing(Opcode::ReadDirPlus, ino, reply, move |fs, mut reply| {
            if fs.is_far(ino) {
                let send = |batch: Res<Batch>, mut reply: ReplyDirectoryPlus| match batch {
                    Ok(batch) => {
                        batch.add_to(&mut reply);
                        reply.ok();
                    }
                    Err(err) => reply.error(errno(err)),
                };
                let list = move |fs: &Self| fs.list_plus(ino, offset);
                return fs.afar(Opcode::ReadDirPlus, ino, Some(fs.engine().patience), reply, send, list);
            }
            let dir = match fs.engine().node(ino.0) {
                Ok(dir) => dir,
                Err(err) => return reply.error(errno(err)),
            };
            let mut begun = fs.engine().begin_listing(&dir);
            if let Err(err) = fs.fill_plus(&dir, offset, &mut begun, &mut reply) {
                return reply.error(errno(err));
            }
            fs.engine().pause_listing(&dir, &mut begun);
            reply.ok();
            if offset == 0 {
                fs.engine().look_ahead(&dir, &begun);
            }
        });
    }

    /// Answers with a piece of a directory, which may first have to be read as a whole, and which looks ahead.
    pub(crate) fn run_listing<R: Send + 'static>(
        &self,
        what: Opcode,
        ino: INodeNo,
        reply: R,
        list: impl FnOnce(&Self, R) + Send + 'static,
    ) {
        self.run(what, ino, || {
            if self.leaves(what, 0) && !self.is_far(ino) {
                return self.aside(what, ino, move |fs| list(fs, reply));
            }
            list(self, reply);
        });
    }

    /// A few entries with their attributes.
    fn list_plus(&self, ino: INodeNo, offset: u64) -> Res<Batch> {
        let dir = self.engine().node(ino.0)?;
        let entries = self.engine().read_dir(&dir, offset, 32)?.into_iter().map(|(next, entry)| {
            let found = (next > 2).then(|| self.engine().lookup_attr(&dir, &entry.name));
            (next, entry, found)
        });
        Ok(Batch { fs: self.clone(), entries: entries.collect() })
    }

    /// Adds entries with their attributes, as many as there is room for.
    fn fill_plus(
        &self,
        dir: &Arc<Node>,
        mut offset: u64,
        begun: &mut Begun,
        reply: &mut ReplyDirectoryPlus,
    ) -> Res<()> {
        loop {
            let batch = self.engine().read_dir(dir, offset, 32)?;
            if batch.is_empty() {
                return Ok(());
            }
            for (next, entry) in batch {
                if self.add_plus(dir, next, &entry, begun, reply) {
                    begun.full = true;
                    return Ok(());
                }
                begun.told += usize::from(next > 2);
                offset = next;
            }
        }
    }

    /// Adds one entry with its attributes; true if there was no room for it.
    fn add_plus(
        &self,
        dir: &Arc<Node>,
        next: u64,
        entry: &Entry,
        begun: &mut Begun,
        reply: &mut ReplyDirectoryPlus,
    ) -> bool {
        if next <= 2 {
            return self.add_found(next, entry, None, reply);
        }
        let found = match self.engine().lookup_ready(dir, next, begun) {
            Some(attr) => Ok((None, attr)),
            None => self.engine().lookup_known(dir, &entry.name),
        };
        self.add_known(next, entry, found, reply)
    }

    fn add_known(
        &self,
        next: u64,
        entry: &Entry,
        found: Res<(Option<Arc<Node>>, Attr)>,
        reply: &mut ReplyDirectoryPlus,
    ) -> bool {
        let name: &OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&entry.name);
        match found {
            Ok((node, attr)) => {
                let (ttl, attr_ttl) = node.map_or((TTL, TTL), |node| (self.ttl(&node), self.attr_ttl(&node)));
                // An entry has one time for its name and its attributes.
                let ttl = ttl.min(attr_ttl);
                let full = reply.add(INodeNo(attr.ino), next, name, &ttl, &file_attr(&attr), GENERATION);
                if full {
                    self.engine().table.forget(attr.ino, 1);
                }
                full
            }
            // Removed since, or unreachable: asking for it by name will say why.
            Err(err) => {
                tracing::debug!(?err, "an entry was left out of a listing");
                false
            }
        }
    }

    fn add_found(&self, next: u64, entry: &Entry, found: Looked, reply: &mut ReplyDirectoryPlus) -> bool {
        let name: &OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&entry.name);
        let Some(found) = found else {
            // The kernel does not count these two as lookups.
            let attr = FileAttr { ino: INodeNo(entry.ino), kind: FileType::Directory, ..no_entry() };
            return reply.add(INodeNo(entry.ino), next, name, &TTL, &attr, GENERATION);
        };
        let found = found.map(|(node, attr)| {
            self.engine().table.remember(&node);
            (Some(node), attr)
        });
        self.add_known(next, entry, found, reply)
    }
}

/// What a lookup gave; `None` where none is needed.
type Looked = Option<Res<(Arc<Node>, Attr)>>;

/// Entries of a directory, looked up.
struct Batch {
    fs: FuseFs,
    entries: Vec<(u64, Entry, Looked)>,
}

impl Batch {
    fn add_to(self, reply: &mut ReplyDirectoryPlus) {
        for (next, entry, found) in self.entries {
            if self.fs.add_found(next, &entry, found, reply) {
                return;
            }
        }
    }
}
