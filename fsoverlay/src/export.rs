//! An upper for the kernel: redirects turned into copies.
//!
//! The kernel's overlayfs reads our uppers when it is mounted with `userxattr`, but for one thing: it
//! follows redirects with `trusted.*` marks only, and shows no directory that has another one.
//! [`export`] brings what they lead to into the upper, which then says the same without them. So it does
//! with names of a layer that lead to a copy ([`crate::links`]), for which everything below is looked at.
//!
//! Each directory gets its copies first, then its mark that nothing of a layer shows in it, and only then
//! loses its redirect; so it can be stopped at any moment and begun again.

use std::os::fd::AsFd;
use std::sync::Arc;

use crate::Error;
use crate::attr::Kind;
use crate::config::OverlaySpec;
use crate::engine::Engine;
use crate::errno::{Errno, Res};
use crate::inode::Node;
use crate::layer::open_for_reading;
use crate::readdir::for_each_entry;

/// Turns the upper into one that the kernel's overlayfs, mounted with `userxattr` over the same layers,
/// shows as it is shown here: directories that were renamed get copies of what the layers have in
/// them, and a changed file has all its names. What was recorded because an ordinary user may not do it
/// (owners, set*id bits, devices) the kernel does not know. Gives the number of such directories.
///
/// `spec` is the one that the overlay was opened with. Nobody may serve the upper meanwhile.
///
/// # Errors
/// If a layer cannot be read or the upper has no room. What was shown before is shown afterwards in
/// any case.
pub fn export(spec: &OverlaySpec) -> Result<usize, Error> {
    let Some(upper) = &spec.upper else { return Ok(0) };
    let failed = |err: Errno| Error::Open { path: upper.dir.clone(), source: err.into() };
    Engine::open(spec)?.export().map_err(failed)
}

impl Engine {
    fn export(&self) -> Res<usize> {
        if self.upper.as_ref().is_some_and(|upper| !upper.links.is_empty()) {
            self.find_all_names()?;
        }
        let mut work = vec![self.root().clone()];
        let mut count = 0;
        while let Some(dir) = work.pop() {
            if dir.dir()?.state.read().redirect.is_some() {
                self.replace_redirect(&dir)?;
                count += 1;
            }
            let mut names: Vec<Box<[u8]>> = Vec::new();
            for_each_entry(&open_for_reading(self.upper_fd(&dir)?.as_fd())?, |name, kind, _| {
                if matches!(kind, Some(Kind::Dir) | None) {
                    names.push(name.into());
                }
                true
            })?;
            for name in names {
                match self.lookup(&dir, &name) {
                    Ok(node) if node.kind == Kind::Dir => work.push(node),
                    Ok(_) | Err(Errno::NOENT) => {}
                    Err(err) => return Err(err),
                }
            }
        }
        Ok(count)
    }

    /// Names of a layer that lead to a copy come into the upper when they are looked up: all are.
    fn find_all_names(&self) -> Res<()> {
        let mut work = vec![self.root().clone()];
        while let Some(dir) = work.pop() {
            for name in self.entry_names(&dir)? {
                match self.lookup(&dir, &name) {
                    Ok(node) if node.kind == Kind::Dir => work.push(node),
                    Ok(_) | Err(Errno::NOENT) => {}
                    Err(err) => return Err(err),
                }
            }
        }
        Ok(())
    }

    fn replace_redirect(&self, top: &Arc<Node>) -> Res<()> {
        let dirs = self.copy_up_tree(top)?;
        for dir in &dirs {
            self.cut_off(dir, &mut dir.dir()?.state.write())?;
        }
        for dir in &dirs {
            self.sweep_whiteouts(dir.upper_dir()?);
        }
        Ok(())
    }
}
