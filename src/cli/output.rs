//! The only printer. Everything it prints is escaped for terminals, and a reader that went
//! away is no error of ours.

use std::error::Error;
use std::fmt::Display;
use std::io::Write as _;

use serde::Serialize;

use crate::error::{errno_text, own_errno};
use crate::log::escape_message;

/// What is printed when a command fails, and its exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What was attempted, on what.
    pub text: String,
    /// Why it failed, outermost first.
    pub causes: Vec<String>,
    /// What the user can do.
    pub hint: Option<String>,
    /// Exit status.
    pub code: u8,
}

impl Failure {
    /// From an error and the errors below it; exit status 1.
    #[must_use]
    pub fn new(error: &dyn Error) -> Self {
        let mut causes = Vec::new();
        let mut below = error.source();
        while let Some(cause) = below {
            causes.push(cause_text(cause));
            below = cause.source();
        }
        // A variant that only passes another error on adds nothing.
        causes.dedup();
        Self { text: error.to_string(), causes, hint: None, code: 1 }
    }

    /// From a sentence; exit status 1.
    #[must_use]
    pub fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), causes: Vec::new(), hint: None, code: 1 }
    }

    /// With this cause below the others.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    /// With who has the port that could not be bound, where that is the cause and can be known.
    #[must_use]
    pub fn cause_of_port(self, error: &netstack::Error) -> Self {
        match error {
            netstack::Error::Listen { addr, protocol, source }
                if source.kind() == std::io::ErrorKind::AddrInUse =>
            {
                match crate::host::ports::holder(*addr, *protocol == netstack::Protocol::Udp) {
                    Some(holder) => self.cause(holder.to_string()),
                    None => self,
                }
            }
            _ => self,
        }
    }

    /// With this hint, if it has none yet.
    #[must_use]
    pub fn hint(mut self, hint: Option<impl Display>) -> Self {
        self.hint = self.hint.or_else(|| hint.map(|hint| hint.to_string()));
        self
    }

    /// With this exit status.
    #[must_use]
    pub fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// As it is printed.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = format!("error: {}\n", self.text);
        for cause in &self.causes {
            out.push_str("  cause: ");
            out.push_str(cause);
            out.push('\n');
        }
        if let Some(hint) = &self.hint {
            out.push_str("  hint:  ");
            out.push_str(hint);
            out.push('\n');
        }
        out
    }
}

fn cause_text(error: &(dyn Error + 'static)) -> String {
    own_errno(error).map_or_else(|| error.to_string(), errno_text)
}

/// Writes text to standard output.
pub fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    // A closed pipe (`rootlet ls | head -1`) or a full disk: there is nobody to tell.
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).ok();
}

/// Writes text that names from outside are part of to standard output.
pub fn print_escaped(text: &str) {
    print(&escape_message(text));
}

/// Writes JSON to standard output, for people to read too.
pub fn print_json(value: &impl Serialize) {
    // What is printed as JSON here has text for keys.
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    print(&crate::log::escape_json(&text));
}

/// One line about what we did, on standard error.
pub fn note(text: &str) {
    let mut err = std::io::stderr().lock();
    writeln!(err, "rootlet: {}", escape_message(text)).ok();
}

/// A failure, on standard error.
pub fn fail(failure: &Failure) {
    std::io::stderr().lock().write_all(escape_message(&failure.render()).as_bytes()).ok();
}

/// Text that is already complete, on standard error.
pub fn print_error(text: &str) {
    std::io::stderr().lock().write_all(text.as_bytes()).ok();
}

/// Rows as columns that line up; the last column is as wide as it is.
#[must_use]
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in rows {
        for (at, (cell, width)) in row.iter().zip(widths).enumerate() {
            out.push_str(cell);
            if at + 1 < N {
                out.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
            }
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::errno_of;
    use nix::errno::Errno;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the log file /x")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_failure_says_what_why_and_what_to_do() {
        let error = Outer(std::io::Error::from_raw_os_error(libc::ENOENT));
        let failure = Failure::new(&error).hint(Some("make it first"));
        assert_eq!(
            failure.render(),
            "error: cannot open the log file /x\n  cause: ENOENT (no such file or directory)\n  hint:  make it first\n"
        );
        assert_eq!(errno_of(&error), Some(Errno::ENOENT));
    }

    #[test]
    fn columns_line_up() {
        let row = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
        assert_eq!(table(&[row("NAME", "X"), row("a", "y z")]), "NAME  X\na     y z\n");
    }
}
