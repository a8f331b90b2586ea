//! What this host allows, and how to mend what is missing: each thing by trying it.

use std::fmt::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use serde::{Deserialize, Serialize};

use super::HostFacts;
use super::hints::{Hint, Sysctls, Trouble, diagnose, mend_subids};
use super::probe::{self, HelperFailure};
use crate::error::errno_text;

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// `run` works, but something is weaker or missing.
    Warn,
    /// `run` does not work.
    Fail,
}

/// One thing that was tried or looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Stable name.
    pub id: String,
    /// How good it is.
    pub status: Status,
    /// What it is.
    pub what: String,
    /// What was found.
    pub detail: String,
    /// What mends it.
    pub mend: Option<String>,
}

/// Everything found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoctorReport {
    /// `rootlet run` can work here.
    pub can_run: bool,
    /// What was read before anything was tried.
    pub facts: HostFacts,
    /// In the order in which a launch needs them.
    pub findings: Vec<Finding>,
}

impl DoctorReport {
    /// For people.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = String::new();
        for finding in &self.findings {
            let mark = match finding.status {
                Status::Ok => "ok  ",
                Status::Warn => "warn",
                Status::Fail => "FAIL",
            };
            // Writing to a String does not fail.
            writeln!(out, "{mark}  {}: {}", finding.what, finding.detail).ok();
            if let Some(mend) = &finding.mend {
                writeln!(out, "      mend: {mend}").ok();
            }
        }
        let count = |status| self.findings.iter().filter(|finding| finding.status == status).count();
        let (failed, warned) = (count(Status::Fail), count(Status::Warn));
        let verdict = match (self.can_run, warned) {
            (false, _) => format!("rootlet run cannot work here: {failed} to mend"),
            (true, 0) => "rootlet run works here".into(),
            (true, warned) => format!("rootlet run works here; {warned} could be better"),
        };
        writeln!(out, "\n{verdict}").ok();
        out
    }
}

struct Doctor {
    facts: HostFacts,
    sysctls: Sysctls,
    findings: Vec<Finding>,
}

/// Tries everything. `state` is the state directory, or why there is none and what to do.
#[must_use]
pub fn examine(state: Result<&Path, (String, Option<String>)>) -> DoctorReport {
    let mut doctor = Doctor { facts: HostFacts::gather(), sysctls: Sysctls::read(), findings: Vec::new() };
    if doctor.attempt("userns", "user namespace", "userns", None, Status::Fail) {
        doctor.namespaces();
        doctor.file_systems();
        doctor.devices();
        doctor.ids();
    }
    doctor.settings();
    doctor.confinement();
    doctor.network();
    match state {
        Ok(path) => doctor.state(path),
        Err((detail, mend)) => doctor.add("state", Status::Fail, "state directory", detail, mend),
    }
    doctor.limits();
    doctor.cgroup();
    DoctorReport {
        can_run: doctor.findings.iter().all(|finding| finding.status != Status::Fail),
        facts: doctor.facts,
        findings: doctor.findings,
    }
}

impl Doctor {
    fn add(&mut self, id: &str, status: Status, what: &str, detail: impl Into<String>, mend: Option<String>) {
        self.findings.push(Finding {
            id: id.into(),
            status,
            what: what.into(),
            detail: detail.into(),
            mend: mend.filter(|_| status != Status::Ok),
        });
    }

    fn trouble(&mut self, id: &str, status: Status, what: &str, errno: Errno, trouble: Option<Trouble>) {
        match trouble.map(|trouble| trouble.hint(&self.facts)) {
            Some(Hint { text, mend }) => {
                self.add(id, status, what, format!("{}: {text}", errno_text(errno)), Some(mend));
            }
            None => self.add(id, status, what, errno_text(errno), None),
        }
    }

    /// Runs a probe; `bad` is how bad a failure is.
    fn attempt(&mut self, id: &str, what: &str, probe: &str, argument: Option<&str>, bad: Status) -> bool {
        match probe::attempt(probe, argument) {
            Ok(()) => self.add(id, Status::Ok, what, "works", None),
            Err((step, errno)) => {
                let trouble = diagnose(&step, errno, &self.sysctls);
                self.trouble(id, bad, what, errno, trouble);
            }
        }
        self.findings.last().is_some_and(|finding| finding.status == Status::Ok)
    }

    fn namespaces(&mut self) {
        for name in ["pid", "mnt", "uts", "ipc", "net", "cgroup"] {
            self.attempt(
                &format!("ns-{name}"),
                &format!("{name} namespace"),
                "namespace",
                Some(name),
                Status::Fail,
            );
        }
        // Only --monotonic and --boottime need it.
        self.attempt("ns-time", "time namespace", "namespace", Some("time"), Status::Warn);
    }

    fn file_systems(&mut self) {
        self.attempt("mount", "mounting in a user namespace", "mount", None, Status::Fail);
        self.attempt("proc", "a new /proc", "procfs", None, Status::Fail);
        self.attempt("devpts", "terminals of its own (devpts)", "devpts", None, Status::Fail);
    }

    fn devices(&mut self) {
        self.attempt("fuse", "FUSE in a user namespace", "fuse", None, Status::Fail);
        self.attempt("tap", "a TAP device in a network namespace", "tap", None, Status::Fail);
    }

    fn ids(&mut self) {
        let what = "a range of ids (newuidmap)";
        let facts = self.facts.clone();
        if facts.may_set_ids {
            return self.add(
                "ids",
                Status::Ok,
                what,
                "not needed: the caller may map any id of its own",
                None,
            );
        }
        let single = "; runs get a single id, which is enough for most";
        let (Some(subuids), Some(subgids)) = (facts.subuids, facts.subgids) else {
            let detail = format!("no range in /etc/subuid and /etc/subgid{single}");
            return self.add("ids", Status::Warn, what, detail, Some(mend_subids(&facts)));
        };
        if facts.no_new_privs || !facts.initial_userns {
            let detail = format!("not available inside a sandbox{single}");
            return self.add("ids", Status::Ok, what, detail, None);
        }
        let (Some(newuidmap), Some(newgidmap)) = (&facts.newuidmap, &facts.newgidmap) else {
            let hint = Trouble::Helpers.hint(&facts);
            return self.add("ids", Status::Warn, what, format!("{}{single}", hint.text), Some(hint.mend));
        };
        let helpers = [(newuidmap.as_path(), facts.uid, subuids), (newgidmap.as_path(), facts.gid, subgids)];
        // A launch takes the range once it is there, so a helper that refuses is in its way.
        match probe::attempt_helpers(helpers) {
            Ok(()) => {
                let detail = format!("{} user ids, {} group ids", subuids.1, subgids.1);
                self.add("ids", Status::Ok, what, detail, None);
            }
            Err(HelperFailure::Hangs) => {
                self.trouble("ids", Status::Fail, what, Errno::ETIMEDOUT, Some(Trouble::HelperHangs));
            }
            Err(HelperFailure::Start(errno)) => {
                let trouble = diagnose("map_helper", errno, &self.sysctls);
                self.trouble("ids", Status::Fail, what, errno, trouble);
            }
            Err(HelperFailure::Said(said)) => {
                self.add("ids", Status::Fail, what, said, Some(Trouble::HelperRefuses.hint(&facts).mend));
            }
        }
    }

    /// The settings that decide about user namespaces, for who reads a report.
    fn settings(&mut self) {
        let settings = [
            ("user.max_user_namespaces", self.sysctls.max_user_namespaces),
            ("kernel.unprivileged_userns_clone", self.sysctls.unprivileged_userns_clone),
            ("kernel.apparmor_restrict_unprivileged_userns", self.sysctls.apparmor_restrict),
        ];
        let detail: Vec<String> =
            settings.iter().filter_map(|(name, value)| Some(format!("{name} = {}", (*value)?))).collect();
        self.add("settings", Status::Ok, "settings of the kernel", detail.join(", "), None);
    }

    fn confinement(&mut self) {
        if self.attempt("seccomp", "system call filter", "seccomp", None, Status::Fail) {
            // `run` stops without it, except with --nested.
            self.attempt("seccomp-notify", "answering filtered calls", "notify", None, Status::Fail);
        }
        let what = "hiding the host's abstract sockets (Landlock, for --network host)";
        match probe::attempt("landlock", None) {
            Ok(()) => self.add("landlock", Status::Ok, what, "works", None),
            Err((_, errno)) => {
                let mend = Some("use Linux 6.12 or later with Landlock, or not --network host".into());
                self.add("landlock", Status::Warn, what, errno_text(errno), mend);
            }
        }
    }

    fn network(&mut self) {
        let ping =
            socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp);
        let what = "ping through the stack";
        match ping {
            Ok(_) => self.add("ping", Status::Ok, what, "works", None),
            Err(errno) => self.trouble("ping", Status::Warn, what, errno, Some(Trouble::PingGroup)),
        }
        let start = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
        let start = start.ok().and_then(|text| text.trim().parse::<u16>().ok());
        let detail = match start {
            Some(0 | 1) => "every port".into(),
            Some(start) => format!("ports from {start} on (-p with a lower one needs privilege)"),
            None => "the kernel does not say which".into(),
        };
        self.add("ports", Status::Ok, "publishing", detail, None);
    }

    fn state(&mut self, path: &Path) {
        let what = "state directory";
        let shown = crate::log::escape_os(path.as_os_str());
        match try_write(path) {
            Ok(Written { unnamed, attributes }) => {
                self.add("state", Status::Ok, what, format!("{shown} can be written"), None);
                if !unnamed {
                    let detail = "not on this file system; files get temporary names first".to_owned();
                    self.add("tmpfile", Status::Warn, "files without a name (O_TMPFILE)", detail, None);
                }
                let what = "attributes of files (user.*)";
                if attributes {
                    self.add("xattr", Status::Ok, what, "works", None);
                } else {
                    let detail = "not on this file system: owners and deletions cannot be stored".to_owned();
                    self.add("xattr", Status::Fail, what, detail, Some(super::hints::MEND_XATTRS.into()));
                }
            }
            Err(errno) => {
                let trouble = diagnose("state", errno, &self.sysctls);
                self.trouble("state", Status::Fail, &format!("{what} {shown}"), errno, trouble);
            }
        }
        let Ok(space) = rustix::fs::statvfs(path) else { return };
        let bytes = space.f_bavail.saturating_mul(space.f_frsize);
        let status = match bytes {
            0..16_777_216 => Status::Fail,
            16_777_216..1_073_741_824 => Status::Warn,
            _ if space.f_files > 0 && space.f_favail == 0 => Status::Fail,
            _ => Status::Ok,
        };
        let detail = format!("{} MiB free", bytes >> 20);
        self.add("space", status, "room for changes", detail, Some(Trouble::DiskFull.hint(&self.facts).mend));
    }

    fn limits(&mut self) {
        let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
        let status = if hard < 4096 { Status::Warn } else { Status::Ok };
        let mend = Trouble::DescriptorLimit.hint(&self.facts).mend;
        self.add("nofile", status, "open files", format!("up to {hard}"), Some(mend));
    }

    /// Only told of: nothing needs it yet.
    fn cgroup(&mut self) {
        let detail = match own_cgroup() {
            Some(path) => {
                let ours =
                    rustix::fs::access(path.join("cgroup.procs"), rustix::fs::Access::WRITE_OK).is_ok();
                let controllers =
                    std::fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
                let delegated = if ours { "delegated" } else { "not delegated" };
                format!("{delegated}; controllers: {}", controllers.trim())
            }
            None => "no cgroup v2".into(),
        };
        self.add("cgroup", Status::Ok, "control group", detail, None);
    }
}

fn own_cgroup() -> Option<PathBuf> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let below = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let root = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, place, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(place))
    })?;
    Some(root.join(below))
}

struct Written {
    unnamed: bool,
    attributes: bool,
}

/// Tries what the overlay does in an upper directory.
fn try_write(path: &Path) -> Result<Written, Errno> {
    let errno = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
    let mut options = std::fs::File::options();
    options.write(true).mode(0o600);
    let unnamed = options.clone().custom_flags(libc::O_TMPFILE).open(path).map_err(errno);
    let set = |file: &std::fs::File| {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::fsetxattr(file, "user.rootlet.probe", b"1", flags).is_ok()
    };
    match unnamed {
        Ok(file) => Ok(Written { unnamed: true, attributes: set(&file) }),
        Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL) => {
            let named = path.join(format!(".probe-{}", std::process::id()));
            let file = options.create_new(true).open(&named).map_err(errno)?;
            let attributes = set(&file);
            std::fs::remove_file(&named).map_err(errno)?;
            Ok(Written { unnamed: false, attributes })
        }
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(status: Status) -> DoctorReport {
        DoctorReport {
            can_run: status != Status::Fail,
            facts: HostFacts::gather(),
            findings: vec![Finding {
                id: "fuse".into(),
                status,
                what: "FUSE".into(),
                detail: "ENOENT".into(),
                mend: Some("sudo modprobe fuse".into()),
            }],
        }
    }

    #[test]
    fn findings_come_with_what_mends_them() {
        assert_eq!(
            report(Status::Fail).render(),
            "FAIL  FUSE: ENOENT\n      mend: sudo modprobe fuse\n\nrootlet run cannot work here: 1 to mend\n"
        );
        assert!(report(Status::Warn).render().ends_with("\nrootlet run works here; 1 could be better\n"));
    }

    #[test]
    fn the_temporary_directory_can_be_written() {
        try_write(&std::env::temp_dir()).unwrap();
    }
}
