//! What an object is: its type, owner, mode and the rest of stat(2).
//!
//! Two things together make the attributes of an object: [`Stat`], read from the disk
//! each time, and [`Meta`], decided once at lookup and changed only by us. `Meta`
//! holds what the disk may not hold: owner, the true mode, a device number. On disk it
//! is the *record*, the xattr `user.containers.override_stat` of containers/storage,
//! `UID:GID:MODE[:TYPE]` with a decimal owner and an octal mode.
//!
//! A record is written only where it says more than the disk: an owner other than the
//! default one, a mode that is not on disk ([`Meta::disk_perm`]), a type that is not a
//! file, a directory or a symbolic link.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Statx, StatxTimestamp};

/// Type of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Dir,
    Symlink,
    Fifo,
    Socket,
    Char,
    Block,
}

const S_IFMT: u32 = 0o170_000;

impl Kind {
    /// From the type bits of `st_mode`.
    pub(crate) fn from_mode(mode: u32) -> Option<Self> {
        Some(match mode & S_IFMT {
            0o100_000 => Self::File,
            0o040_000 => Self::Dir,
            0o120_000 => Self::Symlink,
            0o010_000 => Self::Fifo,
            0o140_000 => Self::Socket,
            0o020_000 => Self::Char,
            0o060_000 => Self::Block,
            _ => return None,
        })
    }

    /// From `d_type`; `None` if the file system does not say.
    pub(crate) fn from_dirent(kind: rustix::fs::FileType) -> Option<Self> {
        use rustix::fs::FileType as T;
        Some(match kind {
            T::RegularFile => Self::File,
            T::Directory => Self::Dir,
            T::Symlink => Self::Symlink,
            T::Fifo => Self::Fifo,
            T::Socket => Self::Socket,
            T::CharacterDevice => Self::Char,
            T::BlockDevice => Self::Block,
            T::Unknown => return None,
        })
    }

    /// Fifos, sockets and devices: kept in the upper as an empty file with a record.
    pub(crate) fn is_special(self) -> bool {
        matches!(self, Self::Fifo | Self::Socket | Self::Char | Self::Block)
    }
}

/// A point in time as stat(2) gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Time {
    pub(crate) sec: i64,
    pub(crate) nsec: u32,
}

impl Time {
    pub(crate) fn from_system(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(d) => Self { sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX), nsec: d.subsec_nanos() },
            Err(err) => {
                let d = err.duration();
                let sec = -i64::try_from(d.as_secs()).unwrap_or(i64::MAX);
                if d.subsec_nanos() == 0 {
                    Self { sec, nsec: 0 }
                } else {
                    Self { sec: sec - 1, nsec: 1_000_000_000 - d.subsec_nanos() }
                }
            }
        }
    }

    pub(crate) fn to_system(self) -> SystemTime {
        let whole = Duration::from_secs(self.sec.unsigned_abs());
        let nanos = Duration::from_nanos(u64::from(self.nsec));
        let base = if self.sec >= 0 { UNIX_EPOCH.checked_add(whole) } else { UNIX_EPOCH.checked_sub(whole) };
        base.and_then(|t| t.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
    }
}

impl From<StatxTimestamp> for Time {
    fn from(t: StatxTimestamp) -> Self {
        Self { sec: t.tv_sec, nsec: t.tv_nsec }
    }
}

/// Device and inode number of a real object: what it *is*, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub(crate) struct Key {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
}

/// The part of statx(2) that is used.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stat {
    pub(crate) key: Key,
    pub(crate) mode: u32,
    pub(crate) nlink: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) rdev: (u32, u32),
    pub(crate) size: u64,
    pub(crate) blocks: u64,
    pub(crate) blksize: u32,
    pub(crate) atime: Time,
    pub(crate) mtime: Time,
    pub(crate) ctime: Time,
    pub(crate) btime: Time,
}

impl From<Statx> for Stat {
    fn from(st: Statx) -> Self {
        Self {
            key: Key {
                dev: u64::from(st.stx_dev_major) << 32 | u64::from(st.stx_dev_minor),
                ino: st.stx_ino,
            },
            mode: u32::from(st.stx_mode),
            nlink: st.stx_nlink,
            uid: st.stx_uid,
            gid: st.stx_gid,
            rdev: (st.stx_rdev_major, st.stx_rdev_minor),
            size: st.stx_size,
            blocks: st.stx_blocks,
            blksize: st.stx_blksize,
            atime: st.stx_atime.into(),
            mtime: st.stx_mtime.into(),
            ctime: st.stx_ctime.into(),
            btime: st.stx_btime.into(),
        }
    }
}

impl Stat {
    pub(crate) fn kind(&self) -> Option<Kind> {
        Kind::from_mode(self.mode)
    }

    /// The kernel's form of a whiteout.
    pub(crate) fn is_whiteout(&self) -> bool {
        self.kind() == Some(Kind::Char) && self.rdev == (0, 0)
    }
}

/// What is recorded about an object rather than read from the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) kind: Kind,
    /// The low twelve bits of the mode.
    pub(crate) perm: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Major and minor of a device.
    pub(crate) rdev: (u32, u32),
}

impl Meta {
    /// The permission bits to put on disk: never set*id or sticky, always enough for
    /// the owner (who is the caller) for the server to go on working.
    pub(crate) fn disk_perm(&self) -> u32 {
        match self.kind {
            Kind::Dir => self.perm & 0o777 | 0o700,
            Kind::File => self.perm & 0o777 | 0o600,
            _ => 0o600,
        }
    }

    /// Whether the disk alone cannot say all this. Symbolic links have no mode.
    pub(crate) fn needs_record(&self, default_owner: (u32, u32)) -> bool {
        if (self.uid, self.gid) != default_owner {
            return true;
        }
        match self.kind {
            Kind::Symlink => false,
            Kind::File | Kind::Dir => self.perm != self.disk_perm(),
            _ => true,
        }
    }

    /// The record's text.
    pub(crate) fn to_record(self) -> String {
        let kind = match self.kind {
            Kind::File => "file".to_owned(),
            Kind::Dir => "dir".to_owned(),
            Kind::Symlink => "symlink".to_owned(),
            Kind::Fifo => "pipe".to_owned(),
            Kind::Socket => "socket".to_owned(),
            Kind::Char => format!("char-{}-{}", self.rdev.0, self.rdev.1),
            Kind::Block => format!("block-{}-{}", self.rdev.0, self.rdev.1),
        };
        format!("{}:{}:0{:o}:{kind}", self.uid, self.gid, self.perm)
    }

    /// Reads a record. `real` is the type found on disk: only an (empty) regular file
    /// may stand for something else, so that a record cannot turn a directory into a
    /// file or a file into a directory. `None` if the text is not a record.
    pub(crate) fn from_record(text: &[u8], real: Kind) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?.trim_end_matches('\0');
        let mut fields = text.splitn(4, ':');
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let mode = u32::from_str_radix(fields.next()?, 8).ok()?;
        let mut meta = Self { kind: real, perm: mode & 0o7777, uid, gid, rdev: (0, 0) };
        let Some(kind) = fields.next() else { return Some(meta) };
        let device = |rest: &str| -> Option<(u32, u32)> {
            let (major, minor) = rest.split_once('-')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        };
        if real == Kind::File {
            match kind {
                "pipe" => meta.kind = Kind::Fifo,
                "socket" => meta.kind = Kind::Socket,
                _ => {
                    if let Some(rest) = kind.strip_prefix("char-") {
                        (meta.kind, meta.rdev) = (Kind::Char, device(rest)?);
                    } else if let Some(rest) = kind.strip_prefix("block-") {
                        (meta.kind, meta.rdev) = (Kind::Block, device(rest)?);
                    }
                }
            }
        }
        Some(meta)
    }

    /// chown(2) and writes by the unprivileged take the set*id bits away.
    pub(crate) fn without_set_ids(mut self) -> Self {
        if self.kind == Kind::File {
            self.perm &= !0o4000;
            if self.perm & 0o010 != 0 {
                self.perm &= !0o2000;
            }
        }
        self
    }
}

/// Everything a reply says about an object: owner, mode and type are of `meta`, the rest of `stat`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attr {
    pub(crate) ino: u64,
    pub(crate) meta: Meta,
    pub(crate) stat: Stat,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(kind: Kind, perm: u32, uid: u32, gid: u32) -> Meta {
        Meta { kind, perm, uid, gid, rdev: (0, 0) }
    }

    #[test]
    fn records_round_trip() {
        for (m, real) in [
            (meta(Kind::File, 0o4755, 0, 0), Kind::File),
            (meta(Kind::Dir, 0o1777, 33, 44), Kind::Dir),
            (meta(Kind::Fifo, 0o600, 0, 0), Kind::File),
            (Meta { rdev: (8, 300), ..meta(Kind::Block, 0o660, 0, 6) }, Kind::File),
        ] {
            assert_eq!(Meta::from_record(m.to_record().as_bytes(), real), Some(m));
        }
    }

    #[test]
    fn record_without_type_is_read() {
        assert_eq!(Meta::from_record(b"1:2:755", Kind::Dir), Some(meta(Kind::Dir, 0o755, 1, 2)));
    }

    #[test]
    fn record_cannot_change_a_directory_into_something_else() {
        let m = Meta::from_record(b"0:0:0644:char-1-3", Kind::Dir).expect("a record");
        assert_eq!(m.kind, Kind::Dir);
    }

    #[test]
    fn nonsense_is_no_record() {
        for text in [&b""[..], b"x", b"1:2", b"1:2:9", b"-1:0:0644", b"0:0:0644:char-x-1", b"\xff"] {
            assert_eq!(Meta::from_record(text, Kind::File), None);
        }
    }

    #[test]
    fn plain_root_file_needs_no_record() {
        assert!(!meta(Kind::File, 0o644, 0, 0).needs_record((0, 0)));
        assert!(meta(Kind::File, 0o444, 0, 0).needs_record((0, 0)));
        assert!(meta(Kind::File, 0o4755, 0, 0).needs_record((0, 0)));
        assert!(meta(Kind::File, 0o644, 0, 1).needs_record((0, 0)));
        assert!(!meta(Kind::Symlink, 0o777, 0, 0).needs_record((0, 0)));
    }

    #[test]
    fn setgid_without_group_execute_is_mandatory_locking_and_stays() {
        assert_eq!(meta(Kind::File, 0o6755, 0, 0).without_set_ids().perm, 0o755);
        assert_eq!(meta(Kind::File, 0o2744, 0, 0).without_set_ids().perm, 0o2744);
        assert_eq!(meta(Kind::Dir, 0o2755, 0, 0).without_set_ids().perm, 0o2755);
    }

    #[test]
    fn times_before_the_epoch_survive() {
        for t in [Time { sec: -1, nsec: 5 }, Time { sec: -7, nsec: 0 }, Time { sec: 9, nsec: 999_999_999 }] {
            assert_eq!(Time::from_system(t.to_system()), t);
        }
    }
}
