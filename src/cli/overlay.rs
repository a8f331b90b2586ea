//! `rootlet overlay`, and the same program by the name `fuse-overlayfs`.
//!
//! One process mounts and serves. By default it is a child in the background: the process that was
//! called waits until the mount can be used, or for the child's end, whose status it then has.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use fsoverlay::{IdMapping, LayerSpec, MountSpec, Overlay, OverlaySpec, OwnerForm, Records, UpperSpec};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitStatus, waitpid};

use super::args::{FuseOverlayfs, OverlayArgs};
use super::output::{self, Failure};
use crate::error::errno_of;
use crate::log;
use crate::spec::IdExtent;
use crate::spec::overlay::{OverlayMountSpec, Permissions, parse};
use crate::sys::process::{close_all_but, exit_now, fork, is_ignored};

/// The other name of this command.
pub(super) const FUSE_OVERLAYFS: &str = "fuse-overlayfs";

/// The program by that name.
pub(super) fn main_by_name(FuseOverlayfs { overlay: args }: FuseOverlayfs) -> Result<u8, Failure> {
    close_inherited();
    let level = is_debug(&args).then_some("debug");
    log::init(level, log_file(&args).as_deref()).map_err(|error| Failure::new(&error))?;
    overlay(&args, FUSE_OVERLAYFS)
}

/// Closes what the caller left open, which would stay open as long as the mount. Before anything is
/// opened here.
pub(super) fn close_inherited() {
    // Without the system call (before Linux 5.9) they stay open.
    close_all_but(&[]).ok();
}

/// Whether the options ask for a log.
pub(super) fn is_debug(args: &OverlayArgs) -> bool {
    args.debug || parse(&args.options).is_ok_and(|spec| spec.debug)
}

/// The file that the options want the log in.
pub(super) fn log_file(args: &OverlayArgs) -> Option<PathBuf> {
    parse(&args.options).ok().and_then(|spec| spec.log)
}

/// Mounts and serves; in the background, gives the status once the mount can be used.
pub(super) fn overlay(args: &OverlayArgs, program: &str) -> Result<u8, Failure> {
    let mut spec = parse(&args.options).map_err(|error| {
        Failure::new(&error)
            .hint(Some("`rootlet man overlay` and docs/overlay.md list the options"))
            .code(super::WRONG_USAGE)
    })?;
    if args.single {
        spec.threads = Some(1);
    }
    if args.export {
        return export(&spec, program);
    }
    let (source, mountpoint) = match args.mountpoint.as_slice() {
        // As mount.fuse3(8) calls it.
        [source, mountpoint] => (Some(source), mountpoint),
        [.., mountpoint] => (None, mountpoint),
        [] => return Err(Failure::text("a mount point is wanted").code(super::WRONG_USAGE)),
    };
    let mountpoint = directory("mount point", Path::new(mountpoint))?;
    let source = spec.source.clone().or(source.cloned()).unwrap_or_else(|| program.into());
    let subtype = spec.subtype.clone().unwrap_or_else(|| program.into());
    let mount = mount_spec(&spec, source, subtype);
    raise_descriptors();
    // Modes are set as asked for; the requester's umask has been applied to them.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    // One thread waits for them. What the caller has ignored (nohup(1), a script's `&`) stays ignored:
    // blocked, it would arrive all the same.
    let signals = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];
    let signals = signals.into_iter().filter(|&signal| !is_ignored(signal)).collect();
    let opened =
        Overlay::open(&overlay_spec(&spec, Some(&mountpoint), program)?).map_err(|error| failed(&error))?;
    if args.foreground || args.debug || spec.debug {
        return serve(opened, &mountpoint, &mount, signals, None);
    }
    let internal = |what: &'static str| {
        move |errno: nix::errno::Errno| Failure::text(what).cause(crate::error::errno_text(errno))
    };
    let (ready, tell) =
        std::io::pipe().map_err(|error| Failure::text("cannot make a pipe").cause(error.to_string()))?;
    match fork().map_err(internal("cannot go to the background"))? {
        None => {
            drop(ready);
            serve(opened, &mountpoint, &mount, signals, Some(tell))
        }
        Some(child) => {
            drop((opened, tell));
            let mut ready = ready;
            if ready.read_exact(&mut [0]).is_ok() {
                return Ok(0);
            }
            // It has said why.
            match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, code)) if code != 0 => Ok(u8::try_from(code).unwrap_or(1)),
                _ => Err(Failure::text("the process that was to serve the mount has ended")),
            }
        }
    }
}

/// `--export`: see [`fsoverlay::export`].
fn export(spec: &OverlayMountSpec, program: &str) -> Result<u8, Failure> {
    if spec.upper.is_none() || spec.read_only {
        return Err(Failure::text("--export changes an upper: give -o lowerdir=…,upperdir=…,workdir=…")
            .code(super::WRONG_USAGE));
    }
    // Copies have the modes of what they are copies of.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    let count = fsoverlay::export(&overlay_spec(spec, None, program)?).map_err(|error| failed(&error))?;
    output::print(&format!("directories that had been renamed and are copies now: {count}\n"));
    Ok(0)
}

/// The serving process, until the mount is gone.
fn serve(
    overlay: Overlay,
    mountpoint: &Path,
    mount: &MountSpec,
    signals: SigSet,
    tell: Option<std::io::PipeWriter>,
) -> Result<u8, Failure> {
    let cannot =
        |what: &'static str| move |error: std::io::Error| Failure::text(what).cause(error.to_string());
    if tell.is_some() {
        // Not for the terminal's signals, nor the caller's.
        nix::unistd::setsid().map_err(|errno| cannot("cannot leave the session")(errno.into()))?;
    }
    signals.thread_block().map_err(|errno| cannot("cannot block signals")(errno.into()))?;
    let (server, mounted) = overlay.mount(mountpoint, mount).map_err(|error| failed(&error))?;
    let detach = mounted.clone();
    let waiting = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if signals.wait().is_ok() {
            if let Err(error) = detach.detach() {
                tracing::error!(%error, "the mount is left");
            }
            // Who still has files of it open gets errors from now on.
            exit_now(0);
        }
    });
    let told = waiting.map(drop).and_then(|()| tell.map_or(Ok(()), go_to_background));
    if let Err(error) = told {
        mounted.detach().map_err(|error| failed(&error))?;
        return Err(cannot("cannot go to the background")(error));
    }
    server.join();
    Ok(0)
}

/// Lets go of the caller's terminal and directory, and says that the mount can be used.
fn go_to_background(mut tell: std::io::PipeWriter) -> std::io::Result<()> {
    std::env::set_current_dir("/")?;
    let null: OwnedFd = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?.into();
    rustix::stdio::dup2_stdin(null.as_fd())?;
    rustix::stdio::dup2_stdout(null.as_fd())?;
    rustix::stdio::dup2_stderr(null.as_fd())?;
    // If the caller is gone (interrupted, killed), nobody knows of the mount: it fails, and is undone.
    tell.write_all(b"r")
}

fn overlay_spec(
    spec: &OverlayMountSpec,
    mountpoint: Option<&Path>,
    program: &str,
) -> Result<OverlaySpec, Failure> {
    if spec.permissions == Permissions::Privileged
        && !(is_initial_namespace() && nix::unistd::geteuid().is_root())
    {
        return Err(Failure::text(
            "cannot use xattr_permissions=1: only root of the host can write security.* attributes",
        )
        .hint(Some("xattr_permissions=2 writes user.* attributes")));
    }
    let lowers = spec.lowers.iter().map(|dir| directory("layer", dir)).collect::<Result<Vec<_>, _>>()?;
    let upper = match (&spec.upper, &spec.work) {
        (Some(dir), Some(work)) => Some(UpperSpec {
            dir: directory("upper directory", dir)?,
            work: directory("work directory", work)?,
            volatile: spec.volatile,
        }),
        _ => None,
    };
    if let Some(UpperSpec { dir, work, .. }) = &upper {
        // Half-made objects would show, or what is in the work directory as part of the tree.
        apart(("work directory", work), ("upper directory", dir))?;
        for lower in &lowers {
            // A layer must not change, and what a killed server left in the work directory is removed.
            for (role, ours) in [("upper directory", dir), ("work directory", work)] {
                if lower.starts_with(ours) {
                    return Err(nested(("layer", lower), (role, ours)));
                }
            }
        }
    }
    let ours: Vec<&Path> =
        upper.iter().flat_map(|upper| [&*upper.dir, &*upper.work]).chain(mountpoint).collect();
    let oci_whiteouts = spec.oci_whiteouts.unwrap_or(program == FUSE_OVERLAYFS);
    if let Some(UpperSpec { dir, .. }) = upper.as_ref().filter(|_| oci_whiteouts && !spec.read_only) {
        fsoverlay::convert_upper(dir).map_err(|error| failed(&error))?;
    }
    let layer = |dir: &PathBuf| LayerSpec {
        dir: dir.clone(),
        records: Records::IfMarked,
        oci_whiteouts,
        // Looking into the mount from its own server would wait for itself.
        hidden: ours.iter().filter_map(|path| path.strip_prefix(dir).ok()).map(Path::to_owned).collect(),
        ..LayerSpec::default()
    };
    let extents = |map: &[IdExtent]| {
        map.iter()
            .map(|e| fsoverlay::IdExtent { inside: e.inside, outside: e.outside, count: e.count })
            .collect::<Vec<_>>()
    };
    Ok(OverlaySpec {
        // What is not to be changed is a layer like any other.
        layers: lowers
            .iter()
            .rev()
            .chain(upper.iter().filter(|_| spec.read_only).map(|upper| &upper.dir))
            .map(layer)
            .collect(),
        upper: upper.filter(|_| !spec.read_only),
        live: spec.live,
        passthrough: spec.passthrough,
        workers: spec.threads.unwrap_or_else(default_threads),
        owner_form: match spec.permissions {
            Permissions::Native => OwnerForm::Native,
            Permissions::Containers => OwnerForm::RecordedByDisk,
            Permissions::Privileged => OwnerForm::RecordedByRoot,
        },
        ids: IdMapping {
            uids: extents(&spec.uids),
            gids: extents(&spec.gids),
            uid: spec.squash_uid,
            gid: spec.squash_gid,
        },
        static_nlink: spec.static_nlink,
        no_redirects: !spec.redirects.unwrap_or(program != FUSE_OVERLAYFS),
        no_acl: spec.no_acl,
        ..OverlaySpec::default()
    })
}

/// A request that waits for the disk must not hold up the others; more than four serve no faster.
fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4))
}

fn mount_spec(spec: &OverlayMountSpec, source: OsString, subtype: String) -> MountSpec {
    let is_root = nix::unistd::geteuid().is_root();
    MountSpec {
        source,
        subtype: Some(subtype),
        read_only: spec.read_only || spec.upper.is_none(),
        // What root mounts is for programs of root's, set-user-ID ones too.
        suid: spec.suid.unwrap_or(is_root),
        dev: spec.dev,
        exec: !spec.no_exec,
        follow: !spec.no_follow,
        sync: spec.sync,
        allow_other: spec.allow_other || is_root,
        data: if takes_contexts() { spec.contexts.clone() } else { Vec::new() },
    }
}

/// Whether mount(2) takes an SELinux context: not without SELinux, where there is no label that it
/// could change, and not in a user namespace, where the policy labels FUSE mounts.
fn takes_contexts() -> bool {
    is_initial_namespace() && Path::new("/sys/fs/selinux/enforce").exists()
}

/// Whether this process is in the initial user namespace.
fn is_initial_namespace() -> bool {
    std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_ascii_whitespace().eq(["0", "0", "4294967295"]))
}

/// The descriptors that a cache may have are a share of the limit.
fn raise_descriptors() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // The limit that was is enough, too.
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).ok();
    }
}

/// A directory that an option names, without links.
fn directory(role: &str, path: &Path) -> Result<PathBuf, Failure> {
    let failure = || Failure::text(format!("cannot use the {role} {}", path.display()));
    let found = std::fs::canonicalize(path).and_then(|path| Ok((std::fs::metadata(&path)?, path)));
    match found {
        Ok((found, path)) if found.is_dir() => Ok(path),
        Ok(_) => Err(failure().cause("it is not a directory")),
        Err(error) => {
            let cause = errno_of(&error).map_or_else(|| error.to_string(), crate::error::errno_text);
            let hint = (errno_of(&error) == Some(nix::errno::Errno::ENOTCONN)).then_some(
                "what is mounted there is not served any more: `umount` it, or `fusermount3 -u` it",
            );
            Err(failure().cause(cause).hint(hint))
        }
    }
}

fn nested((inner_role, inner): (&str, &Path), (outer_role, outer): (&str, &Path)) -> Failure {
    let (inner, outer) = (inner.display(), outer.display());
    Failure::text(format!(
        "cannot use {inner} together with {outer}: the {inner_role} is inside the {outer_role}"
    ))
}

/// Fails if one of two directories contains the other.
fn apart(one: (&str, &Path), other: (&str, &Path)) -> Result<(), Failure> {
    if one.1.starts_with(other.1) {
        return Err(nested(one, other));
    }
    if other.1.starts_with(one.1) { Err(nested(other, one)) } else { Ok(()) }
}

fn failed(error: &fsoverlay::Error) -> Failure {
    let hint = match error {
        fsoverlay::Error::Helper { source } if source.kind() == std::io::ErrorKind::NotFound => Some(
            "an ordinary user can mount as root of a user namespace (`unshare -rm`, `podman unshare`), or with \
             fusermount3 (package fuse3)",
        ),
        fsoverlay::Error::Mount { .. } if errno_of(error) == Some(nix::errno::Errno::EPERM) => Some(
            "mounting needs a mount namespace of the caller's user namespace: `unshare -rm`, `podman unshare`",
        ),
        fsoverlay::Error::Open { path, .. } if path == Path::new("/dev/fuse") => {
            Some("`rootlet doctor` tells how to get it")
        }
        _ => None,
    };
    Failure::new(error).hint(hint)
}
