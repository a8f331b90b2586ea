//! `--user` looked up in the sandbox's own /etc/passwd and /etc/group.
//!
//! The files belong to the rootfs: hostile input. Lines that do not parse are passed over.

use std::io::{BufRead as _, BufReader};

use crate::launch::handshake::{SetupFailure, Step};
use crate::spec::UserSpec;

/// Who the payload runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
}

/// The longest account file that is read: a rootfs may hold anything.
const FILE_MAX: u64 = 16 << 20;

/// Looks `user` up inside (after pivot_root).
///
/// # Errors
/// The name that neither is a number nor stands in the files.
pub(super) fn resolve(user: &UserSpec) -> Result<Identity, SetupFailure> {
    resolve_in(user, &lines_of("/etc/passwd"), &lines_of("/etc/group"))
}

fn lines_of(path: &str) -> Vec<String> {
    use std::io::Read as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    // O_NONBLOCK: a fifo in its place must not hold us up.
    let file =
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    file.map(|file| BufReader::new(file.take(FILE_MAX)).lines().map_while(Result::ok).collect())
        .unwrap_or_default()
}

fn resolve_in(user: &UserSpec, passwd: &[String], group: &[String]) -> Result<Identity, SetupFailure> {
    let unknown = |name: &str| SetupFailure::new(Step::User, name, nix::errno::Errno::from_raw(0));
    let number = |text: &str| text.parse::<u32>().ok();
    // name:password:uid:gid:…
    let accounts = passwd.iter().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        Some((name, number(uid)?, number(gid)?))
    });
    let wanted = number(&user.user);
    let account = accounts.into_iter().find(|(name, uid, _)| *name == user.user || Some(*uid) == wanted);
    let uid = account.map(|(_, uid, _)| uid).or(wanted).ok_or_else(|| unknown(&user.user))?;
    // name:password:gid:member,…
    let groups = || {
        group.iter().filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
            Some((name, number(gid)?, fields.next().unwrap_or_default()))
        })
    };
    let gid = match &user.group {
        Some(wanted) => groups()
            .find(|(name, ..)| name == wanted)
            .map(|(_, gid, _)| gid)
            .or_else(|| number(wanted))
            .ok_or_else(|| unknown(wanted))?,
        None => account.map_or(0, |(_, _, gid)| gid),
    };
    let name = account.map(|(name, ..)| name);
    // As docker: naming a group takes the user's other groups away.
    let member = |members: &str| name.is_some_and(|name| members.split(',').any(|m| m == name));
    let groups = match user.group {
        Some(_) => vec![gid],
        None => std::iter::once(gid)
            .chain(groups().filter(|(_, id, members)| *id != gid && member(members)).map(|(_, id, _)| id))
            .collect(),
    };
    Ok(Identity { uid, gid, groups })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_up(user: &str, group: Option<&str>) -> Result<Identity, SetupFailure> {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let passwd = lines("root:x:0:0:root:/root:/bin/sh\nbroken\nwww-data:x:33:33::/var/www:/bin/false");
        let groups = lines("root:x:0:\nwww-data:x:33:\nssl-cert:x:110:www-data,other\nbad:x:y:");
        resolve_in(&UserSpec { user: user.into(), group: group.map(Into::into) }, &passwd, &groups)
    }

    #[test]
    fn a_name_brings_its_groups() {
        let identity = look_up("www-data", None).expect("known");
        assert_eq!(identity, Identity { uid: 33, gid: 33, groups: vec![33, 110] });
    }

    #[test]
    fn a_number_needs_no_account() {
        assert_eq!(look_up("4242", None).expect("number"), Identity { uid: 4242, gid: 0, groups: vec![0] });
    }

    #[test]
    fn a_named_group_replaces_the_users_own() {
        let identity = look_up("33", Some("ssl-cert")).expect("known");
        assert_eq!(identity, Identity { uid: 33, gid: 110, groups: vec![110] });
    }

    #[test]
    fn unknown_names_are_refused_by_name() {
        assert_eq!(look_up("nobody-here", None).expect_err("unknown").object, "nobody-here");
        assert_eq!(look_up("root", Some("nogroup-here")).expect_err("unknown").object, "nogroup-here");
    }
}
