//! Where things are kept (XDG Base Directory Specification).

use std::ffi::OsString;
use std::path::PathBuf;

/// No place for state is known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no place to keep boxes: neither XDG_STATE_HOME nor HOME is set to an absolute path")]
pub struct NoStateHome;

/// The directory of all state: `$XDG_STATE_HOME/rootlet`, by default
/// `~/.local/state/rootlet`. A relative path in either variable does not count, as the
/// specification says.
///
/// # Errors
/// When neither variable helps.
pub fn state_root(env: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf, NoStateHome> {
    let absolute = |name: &str| env(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .map(|state| state.join("rootlet"))
        .ok_or(NoStateHome)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(pairs: &[(&str, &str)]) -> Result<PathBuf, NoStateHome> {
        state_root(|name| pairs.iter().find(|(k, _)| *k == name).map(|(_, v)| v.into()))
    }

    #[test]
    fn xdg_wins_over_home() {
        assert_eq!(root(&[("XDG_STATE_HOME", "/s"), ("HOME", "/h")]).unwrap(), PathBuf::from("/s/rootlet"));
        assert_eq!(root(&[("HOME", "/h")]).unwrap(), PathBuf::from("/h/.local/state/rootlet"));
    }

    #[test]
    fn relative_and_missing_do_not_count() {
        assert_eq!(
            root(&[("XDG_STATE_HOME", "s"), ("HOME", "/h")]).unwrap(),
            PathBuf::from("/h/.local/state/rootlet")
        );
        assert_eq!(root(&[("XDG_STATE_HOME", ""), ("HOME", "h")]), Err(NoStateHome));
        assert_eq!(root(&[]), Err(NoStateHome));
    }
}
