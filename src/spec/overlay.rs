//! What `rootlet overlay` is to mount, from the option text that fuse-overlayfs and mount(8) take.
//!
//! Every option is obeyed, or refused with a reason, or has no effect because there is nothing that
//! it could change here; docs/overlay.md says which and why. None is passed over in silence.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::IdExtent;
use super::validate::wrong_extent;

/// An overlay to be mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct OverlayMountSpec {
    /// Layers, the topmost first (as in `lowerdir`).
    pub lowers: Vec<PathBuf>,
    /// Where changes go.
    pub upper: Option<PathBuf>,
    /// The work directory.
    pub work: Option<PathBuf>,
    /// `ro`: refuse changes although there is an upper.
    pub read_only: bool,
    /// `suid` or `nosuid`.
    pub suid: Option<bool>,
    /// `dev`.
    pub dev: bool,
    /// `noexec`.
    pub no_exec: bool,
    /// `nosymfollow`: symbolic links are shown, and lead nowhere.
    pub no_follow: bool,
    /// `sync`.
    pub sync: bool,
    /// `allow_other`.
    pub allow_other: bool,
    /// `volatile`: sync nothing.
    pub volatile: bool,
    /// `passthrough`: the kernel reads and writes files of the upper itself.
    pub passthrough: bool,
    /// `timeout`: others change the layers, and that shows after this time.
    pub live: Option<Duration>,
    /// Threads that serve; `None`: as many as are useful.
    pub threads: Option<usize>,
    /// The source that the table of mounts shows.
    pub source: Option<OsString>,
    /// The type that it shows after `fuse.`.
    pub subtype: Option<String>,
    /// `xattr_permissions`.
    pub permissions: Permissions,
    /// `squash_to_uid`, or `squash_to_root`.
    pub squash_uid: Option<u32>,
    /// `squash_to_gid`, or `squash_to_root`.
    pub squash_gid: Option<u32>,
    /// `uidmapping`: `outside` are ids of the disk, `inside` those of the mount.
    pub uids: Vec<IdExtent>,
    /// `gidmapping`.
    pub gids: Vec<IdExtent>,
    /// `static_nlink`.
    pub static_nlink: bool,
    /// `noacl`.
    pub no_acl: bool,
    /// `redirect_dir=on` or `off`.
    pub redirects: Option<bool>,
    /// `oci_whiteouts`: `.wh.NAME` in layers says that NAME is gone below.
    pub oci_whiteouts: Option<bool>,
    /// SELinux contexts, as mount(2) takes them.
    pub contexts: Vec<String>,
    /// `log`: where the process in the background writes what it has to say.
    pub log: Option<PathBuf>,
    /// `debug`: log, and stay in the foreground.
    pub debug: bool,
}

/// Where owners and modes are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Permissions {
    /// On the files themselves.
    #[default]
    Native,
    /// In the attribute `user.containers.override_stat`.
    Containers,
    /// In the attribute `security.fuseoverlayfs.override_stat`, which only root of the host can write.
    Privileged,
}

/// Why options cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OverlayOptionError {
    /// Nobody knows it.
    #[error("unknown option {name}")]
    Unknown {
        /// The option.
        name: String,
    },
    /// What it says would not hold.
    #[error("the option {option} is not supported: {reason}")]
    Refused {
        /// The option with its value.
        option: String,
        /// Why.
        reason: &'static str,
    },
    /// Its value makes no sense, or it should have none or one.
    #[error("wrong value {value:?} of the option {name}: {reason}")]
    Value {
        /// The option.
        name: String,
        /// Its value.
        value: String,
        /// What is wanted.
        reason: &'static str,
    },
    /// Options that do not go together.
    #[error("{0}")]
    Together(&'static str),
}

/// Options that can have no effect here; docs/overlay.md has the reasons.
#[rustfmt::skip]
const WITHOUT_EFFECT: &[&str] = &[
    // mount(8) and fstab(5).
    "defaults", "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime",
    "nostrictatime", "lazytime", "nolazytime", "auto", "noauto", "_netdev", "nofail", "nonempty", "silent", "loud",
    // Who may mount: mount(8) has looked, and says `nosuid`, `nodev` and `noexec` itself.
    "user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup",
    // What the kernel always does for this file system.
    "default_permissions", "kernel_cache", "big_writes", "async_read", "clone_fd",
    // How bytes travel between the kernel and the server.
    "splice_write", "no_splice_write", "splice_read", "no_splice_read", "splice_move", "no_splice_move",
    // Of the kernel's overlayfs.
    "userxattr",
];

/// The same, for options whose value is a number.
#[rustfmt::skip]
const NUMBERS_WITHOUT_EFFECT: &[&str] = &[
    "max_write", "max_read", "max_readahead", "max_background", "congestion_threshold", "max_idle_threads",
    // Of fuse-overlayfs.
    "fast_ino", "fast_ino_check",
];

/// The same, for options of the kernel's overlayfs that are `on` or `off`.
const SWITCHES_WITHOUT_EFFECT: &[&str] = &["index", "metacopy"];

/// Reads the arguments of `-o`, in order; later ones win.
///
/// # Errors
/// At the first option that is unknown, refused or has a wrong value.
pub fn parse(arguments: &[OsString]) -> Result<OverlayMountSpec, OverlayOptionError> {
    let mut spec = OverlayMountSpec::default();
    let mut to_root = false;
    for argument in arguments {
        for option in split(argument.as_bytes(), b',', true).into_iter().filter(|option| !option.is_empty()) {
            to_root |= option == b"squash_to_root";
            one(&mut spec, &option)?;
        }
    }
    if to_root {
        // The ids that are named win, wherever they stand.
        spec.squash_uid.get_or_insert(0);
        spec.squash_gid.get_or_insert(0);
    }
    if spec.lowers.is_empty() && spec.upper.is_none() {
        return Err(OverlayOptionError::Together("an overlay needs -o lowerdir=DIR[:DIR...]"));
    }
    if spec.upper.is_some() && spec.work.is_none() {
        return Err(OverlayOptionError::Together(
            "upperdir needs workdir, an empty directory on the same file system",
        ));
    }
    Ok(spec)
}

fn one(spec: &mut OverlayMountSpec, option: &[u8]) -> Result<(), OverlayOptionError> {
    let (name, value) = match option.iter().position(|&b| b == b'=') {
        Some(at) => (&option[..at], Some(&option[at + 1..])),
        None => (option, None),
    };
    let name = String::from_utf8_lossy(name).into_owned();
    let text = || String::from_utf8_lossy(value.unwrap_or_default()).into_owned();
    let wrong = |reason| OverlayOptionError::Value { name: name.clone(), value: text(), reason };
    let path_of = |wanted| -> Result<PathBuf, OverlayOptionError> {
        let path = value.map(|value| unescaped(unquoted(value))).filter(|path| !path.is_empty());
        path.map(|path| OsString::from_vec(path).into()).ok_or_else(|| wrong(wanted))
    };
    let path = || path_of("a directory is wanted");
    let number = || text().parse::<u32>().map_err(|_| wrong("a number is wanted"));
    // The largest number says "no id" to the kernel.
    let id = || text().parse().ok().filter(|&id| id < u32::MAX).ok_or_else(|| wrong("an id is wanted"));
    let refused = |reason| {
        let option = String::from_utf8_lossy(option).into_owned();
        Err(OverlayOptionError::Refused { option, reason })
    };
    match name.as_str() {
        "lowerdir" => {
            let value = value.map(unquoted).unwrap_or_default();
            if value.is_empty() {
                return Err(wrong("directories are wanted, the topmost first, with : between them"));
            }
            let dirs = split(value, b':', false);
            if dirs.iter().any(Vec::is_empty) {
                // The kernel's overlayfs has layers with data alone after `::`.
                return Err(wrong("there is nothing before, after or between colons"));
            }
            spec.lowers = dirs.iter().map(|dir| OsString::from_vec(unescaped(dir)).into()).collect();
        }
        "upperdir" => spec.upper = Some(path()?),
        "workdir" => spec.work = Some(path()?),
        "log" => spec.log = Some(path_of("a file is wanted")?),
        "fsname" => match value {
            Some(name) if !name.is_empty() => spec.source = Some(OsString::from_vec(unescaped(name))),
            _ => return Err(wrong("a name is wanted")),
        },
        "subtype" => match text() {
            name if name.is_empty() => return Err(wrong("a name is wanted")),
            name => spec.subtype = Some(name),
        },
        "context" | "fscontext" | "defcontext" | "rootcontext" => {
            if value.is_none_or(<[u8]>::is_empty) {
                return Err(wrong("an SELinux context is wanted"));
            }
            spec.contexts.push(String::from_utf8_lossy(option).into_owned());
        }
        "timeout" => {
            let time = text().parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
            let time = time.ok_or_else(|| wrong("a number of seconds is wanted"))?;
            spec.live = Some(time).filter(|time| *time < NEVER);
        }
        "threaded" => match number()? {
            0 => spec.threads = Some(1),
            _ => spec.threads = spec.threads.filter(|&threads| threads > 1),
        },
        "max_threads" => match number()? {
            0 => return Err(wrong("at least one thread is needed")),
            // More would only wait: requests that take long have threads of their own.
            threads => {
                spec.threads = Some(usize::try_from(threads).map_or(MAX_THREADS, |n| n.min(MAX_THREADS)))
            }
        },
        "redirect_dir" => match text().as_str() {
            "on" => spec.redirects = Some(true),
            "off" | "follow" => spec.redirects = Some(false),
            "nofollow" => return refused("redirects that are there are followed"),
            _ => return Err(wrong("on, off or follow is wanted")),
        },
        "xattr_permissions" => {
            spec.permissions = match text().as_str() {
                "0" => Permissions::Native,
                "1" => Permissions::Privileged,
                "2" => Permissions::Containers,
                _ => return Err(wrong("0 (none), 1 (security.*) or 2 (user.*) is wanted")),
            };
        }
        "squash_to_uid" => spec.squash_uid = Some(id()?),
        "squash_to_gid" => spec.squash_gid = Some(id()?),
        "uidmapping" | "gidmapping" => {
            let extents = mapping(&text()).ok_or_else(|| wrong("ID:MAPPED-ID:COUNT is wanted, repeated"))?;
            if let Some((_, reason)) = wrong_extent(&extents) {
                return Err(wrong(reason));
            }
            *(if name == "uidmapping" { &mut spec.uids } else { &mut spec.gids }) = extents;
        }
        // fuse-overlayfs takes it for `fsync`; for mount(8) it is something else, and has no value.
        "sync" if value.is_some() => spec.volatile = number()? == 0,
        "xino" => match text().as_str() {
            "off" | "auto" | "on" => {}
            _ => return Err(wrong("off, auto or on is wanted")),
        },
        "nfs_export" | "verity" | "uuid" => match text().as_str() {
            "off" | "null" => {}
            _ => return refused("only off is possible"),
        },
        "noxattrs" => match number()? {
            0 => {}
            _ => return refused("extended attributes cannot be turned off"),
        },
        "fsync" => match number()? {
            0 => spec.volatile = true,
            1 => spec.volatile = false,
            _ => return Err(wrong("0 or 1 is wanted")),
        },
        "oci_whiteouts" => {
            spec.oci_whiteouts = match value {
                None => Some(true),
                Some(_) => Some(number()? != 0),
            };
        }
        "writeback" => {
            if number()? == 0 {
                return refused("the kernel always gathers writes");
            }
        }
        "plugins" => return refused("layers are directories"),
        "ino32_t" => return refused("inode numbers have 64 bits"),
        "allow_root" => return refused("use allow_other, or nothing for the caller alone"),
        "auto_unmount" => return refused("the mount ends when it is unmounted or the server gets SIGTERM"),
        _ if NUMBERS_WITHOUT_EFFECT.contains(&&*name) => {
            number()?;
        }
        _ if SWITCHES_WITHOUT_EFFECT.contains(&&*name) => match text().as_str() {
            "on" | "off" => {}
            _ => return Err(wrong("on or off is wanted")),
        },
        // With a value: who mounts, and what somebody noted in fstab.
        "user" | "comment" if value.is_some() => {}
        _ if name.starts_with("x-") => {}
        _ if value.is_some() => {
            return if is_known(&name) { Err(wrong("it takes no value")) } else { Err(unknown(name)) };
        }
        "debug" => spec.debug = true,
        "squash_to_root" => {}
        "static_nlink" => spec.static_nlink = true,
        "noacl" => spec.no_acl = true,
        "volatile" => spec.volatile = true,
        "passthrough" => spec.passthrough = true,
        "allow_other" => spec.allow_other = true,
        "ro" => spec.read_only = true,
        "rw" => spec.read_only = false,
        "suid" => spec.suid = Some(true),
        "nosuid" => spec.suid = Some(false),
        "dev" => spec.dev = true,
        "nodev" => spec.dev = false,
        "exec" => spec.no_exec = false,
        "noexec" => spec.no_exec = true,
        "symfollow" => spec.no_follow = false,
        "nosymfollow" => spec.no_follow = true,
        "sync" | "dirsync" => spec.sync = true,
        "async" => spec.sync = false,
        _ if WITHOUT_EFFECT.contains(&&*name) => {}
        _ => return Err(unknown(name)),
    }
    Ok(())
}

/// A `timeout` as long as this says that layers do not change; fuse-overlayfs's default is 30 years.
const NEVER: Duration = Duration::from_secs(24 * 3600);
/// `ID:MAPPED-ID:COUNT:…`; empty parts do not count.
fn mapping(text: &str) -> Option<Vec<IdExtent>> {
    let numbers: Vec<u32> =
        text.split(':').filter(|part| !part.is_empty()).map(str::parse).collect::<Result<_, _>>().ok()?;
    let (extents, rest) = numbers.as_chunks();
    let extents = extents.iter().map(|&[outside, inside, count]| IdExtent { inside, outside, count });
    (rest.is_empty() && !numbers.is_empty()).then(|| extents.collect())
}

/// More threads than this are not useful.
const MAX_THREADS: usize = 64;

fn unknown(name: String) -> OverlayOptionError {
    OverlayOptionError::Unknown { name }
}

#[rustfmt::skip]
fn is_known(name: &str) -> bool {
    const SWITCHES: &[&str] = &[
        "debug", "squash_to_root", "static_nlink", "noacl", "volatile", "passthrough", "allow_other", "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "symfollow", "nosymfollow",
        "sync", "dirsync", "async",
    ];
    SWITCHES.contains(&name) || WITHOUT_EFFECT.contains(&name)
}

/// Parts between separators. A backslash takes the meaning from the byte after
/// it, and stays for [`unescaped`]; with `quotes`, so do quotation marks.
fn split(text: &[u8], separator: u8, quotes: bool) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let (mut escaped, mut quoted) = (false, false);
    for &byte in text {
        if byte == separator && !escaped && !quoted {
            parts.push(Vec::new());
            continue;
        }
        quoted ^= quotes && byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        parts.last_mut().expect("one at least").push(byte);
    }
    parts
}

/// A value without the quotation marks around it.
fn unquoted(value: &[u8]) -> &[u8] {
    value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value)
}

/// Takes backslashes away.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'\\' => out.push(*bytes.next().unwrap_or(&byte)),
            _ => out.push(byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    fn read(text: &str) -> Result<OverlayMountSpec, OverlayOptionError> {
        parse(&[text.into()])
    }

    fn refusal(text: &str) -> String {
        read(&format!("lowerdir=/l,{text}")).expect_err(text).to_string()
    }

    fn lowers(text: &[u8]) -> Vec<PathBuf> {
        parse(&[OsStr::from_bytes(text).to_owned()]).expect("read").lowers
    }

    #[test]
    fn the_usual_words() {
        let spec = read("lowerdir=/a:b/c:/d,upperdir=/u,workdir=w,fancy,nodev").map(|spec| spec.upper);
        assert_eq!(spec, Err(unknown("fancy".to_owned())));
        let volatile = |text: &str| read(&format!("lowerdir=/l,{text}")).map(|spec| spec.volatile);
        assert_eq!(
            (volatile("volatile"), volatile("fsync=0"), volatile("fsync=0,fsync=1")),
            (Ok(true), Ok(true), Ok(false))
        );
        assert!(volatile("fsync").is_err() && volatile("volatile=1").is_err());
        let spec = read("lowerdir=/a:b/c:/d,upperdir=/u,workdir=w,nosuid,dev").expect("read");
        assert_eq!(spec.lowers, [PathBuf::from("/a"), "b/c".into(), "/d".into()]);
        assert_eq!((spec.upper, spec.work), (Some("/u".into()), Some("w".into())));
        assert_eq!((spec.suid, spec.dev), (Some(false), true));
    }

    #[test]
    fn colons_commas_and_backslashes_in_names() {
        assert_eq!(
            lowers(br"lowerdir=/a\:b:/c\,d:/e\\:/f"),
            [r"/a:b", "/c,d", r"/e\", "/f"].map(PathBuf::from)
        );
        assert_eq!(lowers(b"lowerdir=\"/a,b:/c\""), ["/a,b", "/c"].map(PathBuf::from));
        assert_eq!(lowers(b"lowerdir=/\xff")[0].as_os_str().as_bytes(), b"/\xff");
        for text in ["lowerdir=:/a", "lowerdir=/a::/b", "lowerdir=/a:", "lowerdir=:"] {
            let refused = read(text).expect_err(text).to_string();
            assert!(refused.ends_with("there is nothing before, after or between colons"), "{refused}");
        }
        assert_eq!(read(r"upperdir=/a\,\:b,workdir=/w").expect("read").upper, Some("/a,:b".into()));
    }

    #[test]
    fn a_context_keeps_its_commas() {
        let spec = read(r#"lowerdir=/l,context="system_u:object_r:t:s0:c1,c2",ro"#).expect("read");
        assert_eq!(spec.contexts, [r#"context="system_u:object_r:t:s0:c1,c2""#]);
        assert!(spec.read_only);
    }

    #[test]
    fn later_options_win() {
        let spec = parse(&["ro,lowerdir=/a".into(), "rw,lowerdir=/b,dev,nodev".into()]).expect("read");
        assert_eq!((spec.read_only, spec.dev, spec.lowers), (false, false, vec!["/b".into()]));
    }

    #[test]
    fn timeouts() {
        let live = |text: &str| read(&format!("lowerdir=/l,{text}")).map(|spec| spec.live);
        assert_eq!(live("timeout=1"), Ok(Some(Duration::from_secs(1))));
        assert_eq!(live("timeout=0.25"), Ok(Some(Duration::from_millis(250))));
        assert_eq!(live("timeout=0"), Ok(Some(Duration::ZERO)));
        assert_eq!(live("timeout=1000000000"), Ok(None));
        for wrong in ["timeout", "timeout=", "timeout=-1", "timeout=nan", "timeout=1s"] {
            assert!(live(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn owners() {
        let spec = read("lowerdir=/l,squash_to_uid=7,squash_to_root,uidmapping=0:1000:1:1:110000:65536");
        let spec = spec.expect("read");
        assert_eq!((spec.squash_uid, spec.squash_gid), (Some(7), Some(0)));
        let extent = |outside, inside, count| IdExtent { inside, outside, count };
        assert_eq!(spec.uids, [extent(0, 1000, 1), extent(1, 110_000, 65536)]);
        assert_eq!((spec.gids, spec.permissions), (vec![], Permissions::Native));
        let permissions =
            |n: u8| read(&format!("lowerdir=/l,xattr_permissions={n}")).map(|spec| spec.permissions);
        assert_eq!(permissions(1), Ok(Permissions::Privileged));
        assert_eq!(permissions(2), Ok(Permissions::Containers));
        assert!(permissions(3).is_err());
        assert_eq!(
            read("lowerdir=/l,gidmapping=:0:100:10").map(|spec| spec.gids),
            Ok(vec![extent(0, 100, 10)])
        );
        for text in [
            "uidmapping=0:1",
            "uidmapping=",
            "uidmapping",
            "gidmapping=a:b:c",
            "squash_to_uid=-1",
            "squash_to_gid=4294967295",
            "uidmapping=0:0:0",
            "uidmapping=0:0:5:2:7:5",
            "gidmapping=4294967290:0:10",
            "subtype=",
        ] {
            assert!(refusal(text).starts_with("wrong value"), "{text}");
        }
    }

    #[test]
    fn what_is_kept_how() {
        let spec =
            read("lowerdir=/l,volatile,static_nlink,noacl,passthrough,redirect_dir=off").expect("read");
        assert!(spec.volatile && spec.static_nlink && spec.no_acl && spec.passthrough);
        assert!(read("lowerdir=/l,passthrough=1").is_err());
        let oci = |text: &str| read(&format!("lowerdir=/l,{text}")).map(|spec| spec.oci_whiteouts);
        assert_eq!(
            (oci("ro"), oci("oci_whiteouts"), oci("oci_whiteouts=0")),
            (Ok(None), Ok(Some(true)), Ok(Some(false)))
        );
        assert_eq!(spec.redirects, Some(false));
        assert_eq!(read("lowerdir=/l,fsync=0").map(|spec| (spec.volatile, spec.sync)), Ok((true, false)));
        assert_eq!(read("lowerdir=/l,sync=0").map(|spec| (spec.volatile, spec.sync)), Ok((true, false)));
        assert_eq!(read("lowerdir=/l,sync").map(|spec| (spec.volatile, spec.sync)), Ok((false, true)));
        assert_eq!(read("lowerdir=/l,volatile,fsync=1").map(|spec| spec.volatile), Ok(false));
    }

    #[test]
    fn threads() {
        let threads = |text: &str| read(&format!("lowerdir=/l,{text}")).map(|spec| spec.threads);
        assert_eq!(threads("threaded=0"), Ok(Some(1)));
        assert_eq!(threads("threaded=1"), Ok(None));
        assert_eq!(threads("threaded=0,threaded=1"), Ok(None));
        assert_eq!(threads("max_threads=3"), Ok(Some(3)));
        assert_eq!(threads("max_threads=1000000"), Ok(Some(MAX_THREADS)));
        assert!(threads("max_threads=0").is_err() && threads("threaded=yes").is_err());
    }

    #[test]
    fn what_cannot_hold_is_refused() {
        assert_eq!(refusal("frobnicate=1"), "unknown option frobnicate");
        assert_eq!(refusal("frobnicate"), "unknown option frobnicate");
        assert_eq!(refusal("ro=1"), "wrong value \"1\" of the option ro: it takes no value");
        for text in ["plugins=/x", "noxattrs=1", "writeback=0", "nfs_export=on", "ino32_t", "allow_root"] {
            assert!(refusal(text).starts_with(&format!("the option {text} is not supported: ")), "{text}");
        }
        assert!(read("upperdir=/u").is_err() && read("").is_err() && read("lowerdir=").is_err());
        assert_eq!(refusal("=x"), "unknown option ");
    }

    #[test]
    fn what_changes_nothing_is_taken() {
        let plain = read("lowerdir=/l");
        for option in WITHOUT_EFFECT {
            assert_eq!(read(&format!("lowerdir=/l,{option}")), plain, "{option}");
        }
        for option in NUMBERS_WITHOUT_EFFECT {
            assert_eq!(read(&format!("lowerdir=/l,{option}=7")), plain, "{option}");
            for wrong in ["", "=", "=hello", "=-1", "=1k", "=4294967296"] {
                assert!(
                    refusal(&format!("{option}{wrong}")).ends_with("a number is wanted"),
                    "{option}{wrong}"
                );
            }
        }
        for option in SWITCHES_WITHOUT_EFFECT {
            assert_eq!(read(&format!("lowerdir=/l,{option}=off,{option}=on")), plain, "{option}");
            for wrong in ["", "=", "=yes"] {
                assert!(
                    refusal(&format!("{option}{wrong}")).ends_with("on or off is wanted"),
                    "{option}{wrong}"
                );
            }
        }
        assert_eq!(read("lowerdir=/l,,x-systemd.automount,xino=off,noxattrs=0"), plain);
        // As libmount hands it over.
        let fstab = "rw,nosuid,nodev,user,user=me,nofail,_netdev,exec,comment=two words,noauto,x-a=b";
        let spec = read(&format!("lowerdir=/l,{fstab}"));
        assert_eq!(spec, plain.map(|plain| OverlayMountSpec { suid: Some(false), ..plain }));
        assert!(
            refusal("users=me").ends_with("it takes no value") && refusal("nouser=1").contains("no value")
        );
        let follow = |text: &str| read(&format!("lowerdir=/l,{text}")).map(|spec| spec.no_follow);
        assert_eq!((follow("nosymfollow"), follow("nosymfollow,symfollow")), (Ok(true), Ok(false)));
        assert_eq!(read("lowerdir=/l,log=a/b").map(|spec| spec.log), Ok(Some("a/b".into())));
        assert!(
            refusal("log").contains("a file is wanted") && refusal("fsname=").contains("a name is wanted")
        );
    }
}
