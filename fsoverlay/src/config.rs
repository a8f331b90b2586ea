//! What an overlay is made of: plain data, checked by [`crate::Overlay::open`].

use std::path::PathBuf;
use std::time::Duration;

/// Everything [`crate::Overlay::open`] needs to know. What is not said is off: fill in the rest with
/// `..OverlaySpec::default()`.
#[derive(Debug, Clone, Default)]
pub struct OverlaySpec {
    /// Read-only layers, the lowest first.
    pub layers: Vec<LayerSpec>,
    /// Files, directories and symbolic links that exist only in memory, between
    /// the layers and the upper.
    pub generated: Vec<Generated>,
    /// Where changes go. `None` makes every change fail with `EROFS`.
    pub upper: Option<UpperSpec>,
    /// Report every owner as this one (uid, gid): the mount's user namespace
    /// maps no other id. Owners asked for are still recorded.
    pub squash: Option<(u32, u32)>,
    /// Others change the layers while they are mounted, and are to be seen doing so after this time.
    /// It costs the kernel's gathering of writes, and a request for each listing and each name that is
    /// used again later. `None`: layers do not change, and the kernel keeps what it knows for ever.
    pub live: Option<Duration>,
    /// The kernel reads and writes files of the upper itself (FUSE passthrough), for which it must allow this
    /// process to register files (`CAP_SYS_ADMIN` in the initial user namespace); if it does not, nothing is
    /// served. Each open and each close is a request then, and the kernel does not gather writes. Not with
    /// `live`, nor with [`crate::Hooks`] that limit bytes, which are not seen. With an upper only.
    pub passthrough: bool,
    /// How owners and modes are kept in the upper.
    pub owner_form: OwnerForm,
    /// How ids of the disk, in layers, upper and records, are those of the mount.
    pub ids: IdMapping,
    /// Report one link for every directory, so that none is counted.
    pub static_nlink: bool,
    /// Copy a renamed directory of a layer instead of writing a redirect, which the kernel's overlayfs
    /// does not follow with `userxattr`.
    pub no_redirects: bool,
    /// Without POSIX ACLs.
    pub no_acl: bool,
    /// How long a file system mounted below a layer that is reached over a network, or served by a program,
    /// may take for an answer; then it is `EIO`. `None`: 10 seconds.
    pub patience: Option<Duration>,
    /// Threads that serve requests; 0 is 1.
    pub workers: usize,
}

/// How owners and modes of the upper's objects are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OwnerForm {
    /// By records. What has none belongs to `squash`, else to 0:0, whoever it belongs to on disk: the server
    /// is not in the mount's user namespace.
    #[default]
    Recorded,
    /// By records; what has none belongs to whom the disk says. The server is in the mount's user
    /// namespace.
    RecordedByDisk,
    /// The same, with records that only root of the host can write (`security.*` attributes).
    RecordedByRoot,
    /// As on the disk: the server may chown and mknod, as far as its user namespace goes.
    Native,
}

/// A translation of ids, and ids to be shown whatever the translation says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMapping {
    /// uids: `outside` are the disk's. Empty: as they are. An id outside of it is shown as 65534, and cannot
    /// be stored.
    pub uids: Vec<IdExtent>,
    /// gids.
    pub gids: Vec<IdExtent>,
    /// Every uid is shown as this one.
    pub uid: Option<u32>,
    /// Every gid is shown as this one.
    pub gid: Option<u32>,
}

/// One read-only layer.
#[derive(Debug, Clone, Default)]
pub struct LayerSpec {
    /// The directory on the host.
    pub dir: PathBuf,
    /// What its marks are worth.
    pub branch: Branch,
    /// How the owners found on disk are reported.
    pub owners: Owners,
    /// Where records are looked for.
    pub records: Records,
    /// Files called `.wh.NAME` and `.wh..wh..opq` are whiteouts, as in archives of layers, unless the layer is
    /// marked as an upper of this crate. Otherwise they are files like any other.
    pub oci_whiteouts: bool,
    /// Paths below `dir`, relative to it, shown as empty directories whatever
    /// they hold (`proc`, `sys`, `dev`, `run`, the upper's own place).
    pub hidden: Vec<PathBuf>,
}

/// Where a layer's records of owners are looked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Records {
    /// Everywhere, but not in `/` with owners as on disk, which has none.
    #[default]
    Everywhere,
    /// Only if the layer's own directory has one, or is marked as an upper with records. It saves a system
    /// call for each lookup elsewhere.
    IfMarked,
}

/// What a layer may say about those below it; what AUFS calls the mode of a branch. Its third, `rw`, is the
/// upper here: changes go to one place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Branch {
    /// `ro`: nothing. No marks are looked for, which saves system calls. A device 0:0, the kernel's whiteout,
    /// is nothing that could be seen; it hides nothing either.
    ReadOnly,
    /// `ro+wh`: whiteouts hide what is below, opaque directories do, and redirects are followed.
    #[default]
    Whiteouts,
}

/// How the numeric owner of a file of a layer is reported.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Owners {
    /// As it is on disk: the host's own tree.
    #[default]
    Numeric,
    /// Through the inverse of the mount's id maps: a tree that the caller
    /// unpacked for himself. An id outside the maps is reported as it is.
    Translated {
        /// uid extents.
        uids: Vec<IdExtent>,
        /// gid extents.
        gids: Vec<IdExtent>,
    },
}

/// One line of `/proc/PID/uid_map` (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdExtent {
    /// First id inside.
    pub inside: u32,
    /// First id outside.
    pub outside: u32,
    /// Number of ids.
    pub count: u32,
}

/// The writable layer.
#[derive(Debug, Clone, Default)]
pub struct UpperSpec {
    /// The upper directory, owned by the caller.
    pub dir: PathBuf,
    /// An empty or left-over work directory on the same file system.
    pub work: PathBuf,
    /// Sync nothing: fsync(2) and its relatives succeed at once. A mark in the work directory, the
    /// kernel's own, says so until the upper is opened without this; where it is found after a restart of
    /// the machine, the upper is not opened.
    pub volatile: bool,
}

/// An object of the generated layer. Missing parents are directories of mode 0755.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// Path in the merged tree, relative to its root.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// What it is.
    pub node: GeneratedNode,
}

/// What a [`Generated`] object holds. A directory merges with the layers below it;
/// anything else hides what is below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GeneratedNode {
    /// A directory.
    Dir,
    /// A regular file with these bytes.
    File(Vec<u8>),
    /// A symbolic link to this target.
    Symlink(PathBuf),
}
