//! Bytes: read, write, allocate, seek, copy, sync.
//!
//! There is no open: every request names the object, and its descriptor comes from the
//! cache ([`crate::handle`]). The first write copies up.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use rustix::fs::FallocateFlags;

use crate::attr::{Kind, Stat};
use crate::copyup::write_all;
use crate::engine::Engine;
use crate::errno::{Errno, LONG, Res, is_hurried, is_much};
use crate::handle::Fd;
use crate::hooks::{Space, Usage, add, most_of_write};
use crate::inode::{Node, Place};
use crate::layer::stat_fd;
use crate::object::{Content, changed_below};

impl Engine {
    /// Reads up to `buf.len()` bytes; less only at the end of the file.
    pub(crate) fn read(&self, node: &Arc<Node>, offset: u64, buf: &mut [u8]) -> Res<usize> {
        let fd = match self.open_file(node, false)? {
            Content::File(fd) => fd,
            Content::Memory(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                let n = (bytes.len() - start).min(buf.len());
                buf[..n].copy_from_slice(&bytes[start..start + n]);
                return Ok(n);
            }
        };
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pread(&fd, &mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(err) if done == 0 => return Err(err),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// The descriptor to write to, in the upper.
    fn writable(&self, node: &Arc<Node>) -> Res<Fd> {
        self.copy_up(node)?;
        self.touch()?;
        self.note_object(node)?;
        match self.open_file(node, true)? {
            Content::File(fd) => Ok(fd),
            Content::Memory(_) => Err(Errno::IO),
        }
    }

    /// Writes all of `bytes`. `kill` asks to drop set*id bits.
    pub(crate) fn write(&self, node: &Arc<Node>, offset: u64, bytes: &[u8], kill: bool) -> Res<usize> {
        let fd = self.writable(node)?;
        let length = bytes.len() as u64;
        let change = || self.changing_content(node, kill, || write_all(fd.as_fd(), bytes, offset));
        self.grow(node, &fd, |stat| most_of_write(stat, offset, length), change)?;
        add(&self.counts.written_bytes, length);
        Ok(bytes.len())
    }

    pub(crate) fn fallocate(
        &self,
        node: &Arc<Node>,
        mode: u32,
        offset: u64,
        length: u64,
        kill: bool,
    ) -> Res<()> {
        let fd = self.writable(node)?;
        let mode = FallocateFlags::from_bits_retain(mode);
        let takes_none = FallocateFlags::PUNCH_HOLE | FallocateFlags::COLLAPSE_RANGE;
        let most =
            |stat: &Stat| if mode.intersects(takes_none) { 0 } else { most_of_write(stat, offset, length) };
        self.grow(node, &fd, most, || {
            self.changing_content(node, kill, || rustix::fs::fallocate(&fd, mode, offset, length))
        })
    }

    /// `SEEK_DATA` and `SEEK_HOLE`.
    pub(crate) fn seek(&self, node: &Arc<Node>, offset: u64, hole: bool) -> Res<u64> {
        match self.open_file(node, false)? {
            Content::File(fd) => {
                let from = if hole {
                    rustix::fs::SeekFrom::Hole(offset)
                } else {
                    rustix::fs::SeekFrom::Data(offset)
                };
                rustix::fs::seek(&fd, from)
            }
            Content::Memory(bytes) => {
                let size = bytes.len() as u64;
                if offset >= size {
                    return Err(Errno::NXIO);
                }
                Ok(if hole { size } else { offset })
            }
        }
    }

    /// copy_file_range(2) between two files of the mount.
    pub(crate) fn copy_range(
        &self,
        from: (&Arc<Node>, u64),
        to: (&Arc<Node>, u64),
        length: u64,
        kill: bool,
    ) -> Res<usize> {
        // Many ask for as much as there is.
        if is_hurried() && is_much(length) && is_much(self.stat(from.0)?.size.saturating_sub(from.1)) {
            return Err(LONG);
        }
        let target = self.writable(to.0)?;
        // The answer to the kernel is a 32-bit number.
        let wanted = usize::try_from(length.min(1 << 30)).unwrap_or(1 << 30);
        let (source, from_size) = match self.open_file(from.0, false)? {
            Content::File(fd) => {
                let size = if self.quota().is_some() { stat_fd(fd.as_fd())?.size } else { u64::MAX };
                (Content::File(fd), size)
            }
            Content::Memory(bytes) => {
                let size = bytes.len() as u64;
                (Content::Memory(bytes), size)
            }
        };
        let most = from_size.saturating_sub(from.1).min(wanted as u64);
        let move_bytes = || match &source {
            Content::File(source) => {
                let (mut read_at, mut write_at) = (from.1, to.1);
                rustix::fs::copy_file_range(source, Some(&mut read_at), &target, Some(&mut write_at), wanted)
            }
            Content::Memory(bytes) => {
                let start = usize::try_from(from.1).unwrap_or(usize::MAX).min(bytes.len());
                let end = start.saturating_add(wanted).min(bytes.len());
                write_all(target.as_fd(), &bytes[start..end], to.1)?;
                Ok(end - start)
            }
        };
        let copy = || self.changing_content(to.0, kill, move_bytes);
        let copied = self.grow(to.0, &target, |stat| most_of_write(stat, to.1, most), copy)?;
        add(&self.counts.written_bytes, copied as u64);
        Ok(copied)
    }

    /// fsync(2) and fdatasync(2). What is not in the upper has nothing to sync.
    pub(crate) fn sync(&self, node: &Arc<Node>, data_only: bool) -> Res<()> {
        if self.upper.is_none() || !node.is_upper() {
            return Ok(());
        }
        // One of them may take a worker: most are over soon, but several could take all.
        let turn = self.syncing.try_lock();
        if turn.is_none() && is_hurried() {
            return Err(LONG);
        }
        add(&self.counts.syncs, 1);
        if node.kind == Kind::Dir {
            let fd = crate::layer::open_for_reading(self.upper_fd(node)?.as_fd())?;
            // Links in it may have owners there.
            self.upper()?.sidecar.sync()?;
            return rustix::fs::fsync(&fd);
        }
        if node.kind != Kind::File {
            return Ok(());
        }
        match self.open_file(node, false)? {
            Content::File(fd) if data_only => rustix::fs::fdatasync(&fd),
            Content::File(fd) => rustix::fs::fsync(&fd),
            Content::Memory(_) => Ok(()),
        }
    }

    /// Whether syncs are for nothing.
    pub(crate) fn is_volatile(&self) -> bool {
        self.upper.as_ref().is_some_and(|upper| upper.volatile)
    }

    /// The target of a symbolic link.
    pub(crate) fn read_link(&self, node: &Arc<Node>) -> Res<Vec<u8>> {
        if node.kind != Kind::Symlink {
            return Err(Errno::INVAL);
        }
        loop {
            let place = node.inner.lock().place.clone();
            let target = match place {
                Place::Upper => {
                    let look = |dir: BorrowedFd<'_>, name: &[u8]| match rustix::fs::readlinkat(
                        dir,
                        name,
                        Vec::new(),
                    ) {
                        Err(Errno::INVAL) => Ok(None),
                        read => read.map(Some),
                    };
                    self.by_locked_name(node, look)?
                }
                Place::Lower { dir, name } => {
                    Some(changed_below(rustix::fs::readlinkat(&*self.fd(&dir)?, &*name, Vec::new()))?)
                }
                Place::Parked(parked) => {
                    Some(rustix::fs::readlinkat(&*parked.work, &*parked.name, Vec::new())?)
                }
                Place::Generated(index) => return Ok(self.generated.node(index).bytes().to_vec()),
                _ => return Err(Errno::STALE),
            };
            if let Some(target) = target {
                return Ok(target.into_bytes());
            }
        }
    }

    /// statfs(2) of where new data goes, as a quota wants it shown.
    pub(crate) fn stat_fs(&self) -> Res<rustix::fs::StatVfs> {
        let root = match &self.upper {
            Some(upper) => &upper.root,
            None => &self.layers.last().ok_or(Errno::NOSYS)?.root,
        };
        let mut disk = rustix::fs::fstatvfs(&*self.fd(root)?)?;
        if let (Some(quota), true) = (self.quota(), self.upper.is_some()) {
            let unit = disk.f_frsize.max(1);
            let usage = |blocks: u64, objects| Usage { bytes: blocks.saturating_mul(unit), objects };
            let space = quota.space(Space {
                total: usage(disk.f_blocks, disk.f_files),
                free: usage(disk.f_bavail, disk.f_favail),
            });
            (disk.f_blocks, disk.f_files) = (space.total.bytes / unit, space.total.objects);
            (disk.f_bavail, disk.f_favail) = (space.free.bytes / unit, space.free.objects);
            (disk.f_bfree, disk.f_ffree) = (disk.f_bavail, disk.f_favail);
        }
        Ok(disk)
    }
}

/// The bytes of an OS string; FUSE names are bytes.
pub(crate) fn bytes_of(name: &std::ffi::OsStr) -> &[u8] {
    name.as_bytes()
}
