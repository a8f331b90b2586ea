//! What every integration test uses: the real binary in a home of its own, with a deadline on
//! everything that is started and a check afterwards that nothing is left.
//!
//! Nothing here sleeps. What takes time is waited for on a descriptor or a condition, and the
//! deadline on it is there to name what hangs, not to measure.
#![allow(dead_code, unused_imports, unused_macros, reason = "each test executable uses a part of it")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failure here is a failed test, and says so")]

mod home;
mod lab;
mod process;

pub(crate) use home::{Home, rootlet_binary};
pub(crate) use lab::{Lab, lab};
pub(crate) use process::{Cmd, Out, Running};

use std::io::Write as _;

/// Leaves a test that this host cannot carry out, with the reason. Under `ROOTLET_NO_SKIP` that
/// is a failure, unless `tests/allowed-skips` names test and reason.
macro_rules! skip {
    ($($reason:tt)*) => {{
        $crate::common::skipped(&format!($($reason)*));
        return;
    }};
}
pub(crate) use skip;

/// Records a skip, or fails the test. Used through [`skip!`].
pub(crate) fn skipped(reason: &str) {
    let name = test_name();
    eprintln!("skipped: {reason}");
    let user = user_kind();
    let allowed = include_str!("../allowed-skips")
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .any(|line| {
            line.trim() == format!("{user} {name}: {reason}") || line.trim() == format!("* {name}: {reason}")
        });
    let strict = std::env::var_os("ROOTLET_NO_SKIP").is_some_and(|value| value == "1");
    assert!(allowed || !strict, "skipped where no skip is allowed: {user} {name}: {reason}");
    if let Some(list) = std::env::var_os("ROOTLET_TEST_SKIPS") {
        let mut list = std::fs::OpenOptions::new().append(true).create(true).open(list).unwrap();
        writeln!(list, "{name}: {reason}").unwrap();
    }
}

/// The running test's name: libtest names its thread so.
pub(crate) fn test_name() -> String {
    std::thread::current().name().unwrap_or("main").to_owned()
}

/// Whether this process is root of the machine, an ordinary user with subordinate ids, or one
/// without.
pub(crate) fn user_kind() -> &'static str {
    if is_root() {
        "root"
    } else if has_subids() {
        "subid"
    } else {
        "single"
    }
}

pub(crate) fn is_root() -> bool {
    uid() == 0
}

pub(crate) fn uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

pub(crate) fn gid() -> u32 {
    rustix::process::getegid().as_raw()
}

/// Whether /etc/subuid and /etc/subgid give this user a range and the helpers are there to use it.
pub(crate) fn has_subids() -> bool {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let me = uid().to_string();
    let name = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2) == Some(&me.as_str())).then(|| fields[0].to_owned())
    });
    let given = |path: &str| {
        std::fs::read_to_string(path).unwrap_or_default().lines().any(|line| {
            let owner = line.split(':').next().unwrap_or_default();
            Some(owner) == name.as_deref() || owner == me
        })
    };
    !is_root() && given("/etc/subuid") && given("/etc/subgid") && has_program("newuidmap")
}

/// Whether the sandbox of this user has a range of ids rather than one.
pub(crate) fn has_id_range() -> bool {
    is_root() || has_subids()
}

/// Whether a program is in the PATH that tests use.
pub(crate) fn has_program(name: &str) -> bool {
    home::PATH.split(':').any(|dir| std::path::Path::new(dir).join(name).is_file())
}

/// Leaves the test unless the programs are installed. `./test` installs all of them.
macro_rules! need {
    ($($program:literal),+) => {
        $(if !$crate::common::has_program($program) {
            $crate::common::skip!("{} is not installed", $program);
        })+
    };
}
pub(crate) use need;

/// A port of the host that nobody has, and gets from the kernel without asking for it by its number: such ports begin at
/// 32,768 (ip(7), ip_local_port_range). One that was asked of the kernel and given back may be another test's at once.
pub(crate) fn free_port() -> u16 {
    free_ports(1)
}

/// The first of so many in a row, none of which any other test of this program gets.
pub(crate) fn free_ports(count: u16) -> u16 {
    use std::net::{Ipv6Addr, TcpListener, UdpSocket};
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test programs that run at the same time begin at different ones.
    let begin = 20_000 + u16::try_from(std::process::id() % 100).unwrap_or_default() * 100;
    loop {
        let first = begin + NEXT.fetch_add(count, Ordering::Relaxed);
        assert!(first + count <= 32_768, "no port is free");
        let is_free = |port: u16| {
            let any = (Ipv6Addr::UNSPECIFIED, port);
            TcpListener::bind(any).is_ok() && UdpSocket::bind(any).is_ok()
        };
        if (first..first + count).all(is_free) {
            return first;
        }
    }
}
