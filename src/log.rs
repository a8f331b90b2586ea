//! Logging to stderr or a file, and the escaping of names that come from outside.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Why logging cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The text of `--log-level` or `RUST_LOG` is no filter.
    #[error(
        "log-level: {text:?} is not valid: use error, warn, info, debug, trace or off, or a filter like rootlet=debug,fsoverlay=trace"
    )]
    Filter {
        /// The text.
        text: String,
    },
    /// The log file cannot be opened.
    #[error("cannot open the log file {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

/// Starts logging. `level` wins over `RUST_LOG`; with neither, warnings and errors show.
///
/// # Errors
/// When the filter does not parse or the file does not open.
pub fn init(level: Option<&str>, file: Option<&Path>) -> Result<(), LogError> {
    let from_env = std::env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
    let text = level.or(from_env.as_deref());
    let file = file
        .map(|path| {
            crate::report::open_unlinked(OpenOptions::new().create(true).append(true), 0, path)
                .map_err(|source| LogError::Open { path: path.to_owned(), source })
        })
        .transpose()?;
    let builder = tracing_subscriber::fmt().with_ansi(false).with_target(true).without_time();
    // A plain level needs no filter machinery, which costs start-up time.
    let plain = match text {
        None => Some(LevelFilter::WARN),
        Some(text) => text.parse::<LevelFilter>().ok(),
    };
    // A second initialisation (the library used twice in one process) keeps the first.
    match (plain, file) {
        (Some(level), None) => builder.with_max_level(level).with_writer(std::io::stderr).try_init().ok(),
        (Some(level), Some(file)) => {
            builder.with_max_level(level).with_writer(Mutex::new(file)).try_init().ok()
        }
        (None, file) => {
            let text = text.unwrap_or_default();
            let filter = EnvFilter::try_new(text).map_err(|_| LogError::Filter { text: text.to_owned() })?;
            match file {
                None => builder.with_env_filter(filter).with_writer(std::io::stderr).try_init().ok(),
                Some(file) => builder.with_env_filter(filter).with_writer(Mutex::new(file)).try_init().ok(),
            }
        }
    };
    Ok(())
}

/// Makes text from outside (a file name, a host name, an argument) safe to show on a
/// terminal: control, bidirectional and other invisible format characters are written as
/// `\u{…}`, a backslash as `\\` so that the result is unambiguous.
#[must_use]
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.chars().any(|c| c == '\\' || is_unsafe(c)) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        push_escaped(&mut escaped, c, true);
    }
    Cow::Owned(escaped)
}

/// As [`escape`], for a whole message of ours that names from outside may be part of: line
/// ends and backslashes stay.
#[must_use]
pub fn escape_message(text: &str) -> Cow<'_, str> {
    if !text.chars().any(|c| c != '\n' && is_unsafe(c)) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if c == '\n' { escaped.push(c) } else { push_escaped(&mut escaped, c, false) }
    }
    Cow::Owned(escaped)
}

/// As [`escape`], for bytes that need not be UTF-8: others are written as `\xNN`.
#[must_use]
pub fn escape_os(text: &std::ffi::OsStr) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let mut escaped = String::with_capacity(text.len());
    for chunk in text.as_bytes().utf8_chunks() {
        escaped.push_str(&escape(chunk.valid()));
        for byte in chunk.invalid() {
            write!(escaped, "\\x{byte:02x}").expect("writing to a String does not fail");
        }
    }
    escaped
}

/// The same JSON with every character that [`escape`] would write as `\u{…}` in JSON's own form:
/// a program reads the same value, a terminal shows it safely. Outside of strings, JSON has none of
/// them but line ends.
#[must_use]
pub fn escape_json(json: &str) -> Cow<'_, str> {
    if !json.chars().any(|c| c != '\n' && is_unsafe(c)) {
        return Cow::Borrowed(json);
    }
    let mut escaped = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if c != '\n' && is_unsafe(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(escaped, "\\u{unit:04x}").expect("writing to a String does not fail");
            }
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

fn push_escaped(out: &mut String, c: char, backslash: bool) {
    match c {
        '\\' if backslash => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\t' => out.push_str("\\t"),
        '\r' => out.push_str("\\r"),
        c if is_unsafe(c) => {
            write!(out, "\\u{{{:x}}}", u32::from(c)).expect("writing to a String does not fail");
        }
        c => out.push(c),
    }
}

/// Control characters (C0, DEL, C1), line and paragraph separators, and the format
/// characters (Unicode category Cf) that reorder, join or hide text.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(u32::from(c),
            0x00ad | 0x0600..=0x0605 | 0x061c | 0x06dd | 0x070f | 0x0890..=0x0891 | 0x08e2 | 0x115f..=0x1160
            | 0x17b4..=0x17b5 | 0x180b..=0x180f | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0x3164
            | 0xfe00..=0xfe0f | 0xfeff | 0xffa0 | 0xfff0..=0xfffb | 0x110bd | 0x110cd | 0x13430..=0x1343f
            | 0x1bca0..=0x1bca3 | 0x1d173..=0x1d17a | 0xe0000..=0xe0fff)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    #[test]
    fn ordinary_names_stay() {
        for name in ["/usr/bin/env", "größe", "日本語", "a b", "🦦"] {
            assert!(matches!(escape(name), Cow::Borrowed(_)), "{name}");
        }
    }

    #[test]
    fn terminal_and_bidi_characters_are_escaped() {
        assert_eq!(escape("\u{1b}[31mred"), "\\u{1b}[31mred");
        assert_eq!(escape("a\nb\tc\rd"), "a\\nb\\tc\\rd");
        assert_eq!(escape("\u{9b}2J"), "\\u{9b}2J");
        assert_eq!(escape("evil\u{202e}txt.exe"), "evil\\u{202e}txt.exe");
        assert_eq!(escape("zero\u{200b}width\u{2066}x"), "zero\\u{200b}width\\u{2066}x");
        assert_eq!(escape("\u{7f}\u{feff}\u{2028}\u{e0041}"), "\\u{7f}\\u{feff}\\u{2028}\\u{e0041}");
    }

    #[test]
    fn the_escape_itself_is_unambiguous() {
        assert_eq!(escape("\\u{1b}"), "\\\\u{1b}");
    }

    #[test]
    fn bytes_that_are_not_text() {
        assert_eq!(escape_os(OsStr::from_bytes(b"a\xff\x1bb")), "a\\xff\\u{1b}b");
    }

    #[test]
    fn json_keeps_its_value_and_loses_its_teeth() {
        let value = "a\u{9b}31m\u{202e}\u{e0001}\n";
        let json = serde_json::to_string(value).unwrap();
        let escaped = escape_json(&json);
        assert_eq!(escaped, r#""a\u009b31m\u202e\udb40\udc01\n""#);
        assert_eq!(serde_json::from_str::<String>(&escaped).unwrap(), value);
    }

    #[test]
    fn messages_keep_their_lines() {
        assert_eq!(escape_message("a\nb\u{1b}\\"), "a\nb\\u{1b}\\");
    }
}
