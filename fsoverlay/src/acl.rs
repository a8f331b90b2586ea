//! POSIX access control lists, as the kernel passes them in `system.posix_acl_*`.
//!
//! The kernel enforces them; kept here is what the file system owes it (acl(5)): the mode
//! and the access ACL say the same, and new objects inherit the default ACL of their
//! directory instead of being cut by the umask.

/// ACL_EA_VERSION.
const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    tag: u16,
    perm: u16,
    id: u32,
}

/// A list of entries that holds the three that every list must have (or none).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Acl(Vec<Entry>);

impl Acl {
    /// Reads the kernel's form; `None` if it is not one.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first_chunk::<4>()?;
        if u32::from_le_bytes(*version) != VERSION || rest.len() % 8 != 0 {
            return None;
        }
        let entries: Vec<Entry> = rest
            .chunks_exact(8)
            .map(|e| Entry {
                tag: u16::from_le_bytes([e[0], e[1]]),
                perm: u16::from_le_bytes([e[2], e[3]]),
                id: u32::from_le_bytes([e[4], e[5], e[6], e[7]]),
            })
            .collect();
        let known = [USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER];
        if entries.iter().any(|e| e.perm > 7 || !known.contains(&e.tag)) {
            return None;
        }
        let count = |tag| entries.iter().filter(|e| e.tag == tag).count();
        let complete = count(USER_OBJ) == 1 && count(GROUP_OBJ) == 1 && count(OTHER) == 1 && count(MASK) <= 1;
        let named = count(USER) + count(GROUP) > 0;
        if !entries.is_empty() && (!complete || named && count(MASK) == 0) {
            return None;
        }
        Some(Self(entries))
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for e in &self.0 {
            bytes.extend_from_slice(&e.tag.to_le_bytes());
            bytes.extend_from_slice(&e.perm.to_le_bytes());
            bytes.extend_from_slice(&e.id.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a mode says all of it.
    pub(crate) fn is_minimal(&self) -> bool {
        self.0.iter().all(|e| matches!(e.tag, USER_OBJ | GROUP_OBJ | OTHER))
    }

    fn perm(&self, tag: u16) -> Option<u32> {
        self.0.iter().find(|e| e.tag == tag).map(|e| u32::from(e.perm))
    }

    fn set_perm(&mut self, tag: u16, perm: u32) {
        if let Some(e) = self.0.iter_mut().find(|e| e.tag == tag) {
            e.perm = u16::try_from(perm & 7).unwrap_or(7);
        }
    }

    /// The nine permission bits that go with it: the mask stands for the group.
    pub(crate) fn mode(&self) -> u32 {
        let group = self.perm(MASK).or_else(|| self.perm(GROUP_OBJ)).unwrap_or(0);
        self.perm(USER_OBJ).unwrap_or(0) << 6 | group << 3 | self.perm(OTHER).unwrap_or(0)
    }

    /// Makes it agree with a mode.
    pub(crate) fn set_mode(&mut self, mode: u32) {
        self.set_perm(USER_OBJ, mode >> 6);
        self.set_perm(if self.perm(MASK).is_some() { MASK } else { GROUP_OBJ }, mode >> 3);
        self.set_perm(OTHER, mode);
    }

    /// The access ACL and the mode of a new object in a directory with this default
    /// ACL, created with `mode`: each class gets what both allow.
    pub(crate) fn inherit(&self, mode: u32) -> (Self, u32) {
        let mut acl = self.clone();
        acl.set_mode(self.mode() & mode);
        let mode = mode & !0o777 | acl.mode();
        (acl, mode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        Acl(entries.iter().map(|&(tag, perm, id)| Entry { tag, perm, id }).collect()).to_bytes()
    }

    #[test]
    fn incomplete_lists_are_refused() {
        let none = u32::MAX;
        assert!(Acl::parse(&acl(&[(USER_OBJ, 6, none), (GROUP_OBJ, 4, none), (OTHER, 0, none)])).is_some());
        assert!(Acl::parse(&acl(&[(USER_OBJ, 6, none), (GROUP_OBJ, 4, none)])).is_none());
        let no_mask = [(USER_OBJ, 6, none), (USER, 7, 5), (GROUP_OBJ, 4, none), (OTHER, 0, none)];
        assert!(Acl::parse(&acl(&no_mask)).is_none());
        assert!(Acl::parse(b"\x01\0\0\0").is_none());
        assert!(Acl::parse(b"\x02\0\0\0x").is_none());
        assert!(Acl::parse(b"\x02\0\0\0").is_some_and(|a| a.is_empty()));
    }

    #[test]
    fn the_mask_is_the_group_of_the_mode() {
        let none = u32::MAX;
        let list =
            [(USER_OBJ, 7, none), (USER, 7, 5), (GROUP_OBJ, 5, none), (MASK, 6, none), (OTHER, 1, none)];
        let mut acl = Acl::parse(&acl(&list)).expect("complete");
        assert_eq!(acl.mode(), 0o761);
        acl.set_mode(0o640);
        assert_eq!((acl.mode(), acl.perm(GROUP_OBJ)), (0o640, Some(5)));
        let (inherited, mode) = acl.inherit(0o666);
        assert_eq!((mode, inherited.mode()), (0o640, 0o640));
    }
}
