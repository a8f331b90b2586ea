//! OPEN, CREATE and RELEASE, which come only where files are passed through: what [`crate::passthrough`] decides,
//! as requests and replies.

use std::ffi::OsStr;
use std::sync::Arc;

use fuser::{FileHandle, INodeNo, ReplyCreate, ReplyEmpty, ReplyOpen, Request};

use crate::create::NewObject;
use crate::errno::{Errno, Res};
use crate::fs::{FuseFs, GENERATION, Told, errno};
use crate::hooks::Opcode;
use crate::inode::Node;
use crate::passthrough::{Opened, Wanted};

/// What a request to open a file wants.
pub(crate) fn wanted(req: &Request, flags: i32) -> Wanted {
    Wanted { write: flags & libc::O_ACCMODE != libc::O_RDONLY, uid: req.uid() }
}

/// See [`FuseFs::send_opened`].
fn send_opened(wanted: Wanted) -> impl Fn(Res<Arc<Node>>, (FuseFs, ReplyOpen)) + Copy + Send + Sync {
    move |node, (fs, reply)| fs.send_opened(node, wanted, reply)
}

impl FuseFs {
    /// Answers an OPEN. Where nothing is passed through it never comes again.
    pub(crate) fn serve_open(&self, ino: INodeNo, wanted: Wanted, reply: ReplyOpen) {
        if self.engine().passthrough.is_none() {
            return reply.error(fuser::Errno::ENOSYS);
        }
        self.get_ready(ino, wanted, (self.clone(), reply), send_opened(wanted));
    }

    /// Answers a CREATE.
    pub(crate) fn serve_create(
        &self,
        parent: INodeNo,
        name: &OsStr,
        new: NewObject<'static>,
        wanted: Wanted,
        reply: ReplyCreate,
    ) {
        if self.engine().passthrough.is_none() {
            // The kernel goes on with MKNOD, which needs no RELEASE afterwards.
            return reply.error(fuser::Errno::ENOSYS);
        }
        let make = move |fs: &Self, name: &OsStr| fs.make(parent, name, &new);
        let send =
            move |made: Res<Told>, (fs, reply): (Self, ReplyCreate)| fs.send_created(made, wanted, reply);
        self.serve_named(Opcode::Create, parent, name, (self.clone(), reply), send, make);
    }

    /// Answers a RELEASE.
    pub(crate) fn serve_release(&self, ino: INodeNo, fh: FileHandle, reply: ReplyEmpty) {
        self.run(Opcode::Release, ino, || {
            let stale = self.engine().passthrough.as_ref().is_some_and(|files| files.release(ino.0, fh));
            reply.ok();
            if stale {
                self.forget_attributes(ino);
            }
        });
    }

    /// What is to be done before a file is opened ([`crate::passthrough`]).
    fn prepare(&self, node: &Arc<Node>, wanted: Wanted) -> Res<Arc<Node>> {
        let files = self.engine().passthrough.as_ref().ok_or(Errno::NOSYS)?;
        files.prepare(self.engine(), node, wanted)?;
        Ok(node.clone())
    }

    /// Does that on whichever thread it may be done on. Only what is to be written may have to be copied, which
    /// may take its time.
    pub(crate) fn get_ready<R: Send + 'static>(
        &self,
        ino: INodeNo,
        wanted: Wanted,
        reply: R,
        send: impl Fn(Res<Arc<Node>>, R) + Copy + Send + Sync + 'static,
    ) {
        let ready = move |fs: &Self| fs.on(ino, |node| fs.prepare(node, wanted));
        if wanted.write {
            self.answer(Opcode::Open, ino, reply, send, ready);
        } else {
            self.serve(Opcode::Open, ino, reply, send, ready, || ready);
        }
    }

    /// Opens a file that is ready and says so.
    fn send_opened(&self, node: Res<Arc<Node>>, wanted: Wanted, reply: ReplyOpen) {
        let node = match node {
            Ok(node) => node,
            Err(err) => return reply.error(errno(err)),
        };
        let Some(files) = &self.engine().passthrough else { return reply.error(fuser::Errno::ENOSYS) };
        let opened = match files.open(self.engine(), &node, wanted, |fd| reply.open_backing(fd)) {
            Ok(opened) => opened,
            Err(err) => return reply.error(errno(err)),
        };
        if let Some(backing) = opened.through {
            if wanted.write {
                self.forget_attributes(INodeNo(node.ino));
            }
            reply.opened_passthrough(opened.handle, opened.flags, &backing);
        } else {
            reply.opened(opened.handle, opened.flags);
        }
    }

    /// The same for one that was just made.
    fn send_created(&self, made: Res<Told>, wanted: Wanted, reply: ReplyCreate) {
        let told = match made {
            Ok(told) => told,
            Err(err) => return reply.error(errno(err)),
        };
        let (Some(files), Some(node)) = (&self.engine().passthrough, &told.uncounted) else {
            return reply.error(fuser::Errno::EIO);
        };
        let opened = files.open(self.engine(), node, wanted, |fd| reply.open_backing(fd));
        let Opened { handle, flags, through } = match opened {
            Ok(opened) => opened,
            Err(err) => {
                // Somebody else was faster. The kernel still believes that there is no such name.
                self.shared.forget_names(node);
                return reply.error(errno(err));
            }
        };
        node.remember();
        // This reply has one time for the name and the attributes. These end with the file's first bytes, or with
        // the change of its size without which there is nothing to map.
        match through {
            Some(backing) => {
                reply.created_passthrough(&told.ttl, &told.attr, GENERATION, handle, flags, &backing);
            }
            None => reply.created(&told.ttl, &told.attr, GENERATION, handle, flags),
        }
    }
}
