//! What the host's /etc/resolv.conf (resolv.conf(5)) says about names inside. Whom to ask is the
//! network stack's business, which follows the file.

use serde::{Deserialize, Serialize};

use crate::spec::parse::is_name;

/// Domains of a search list; a libc knows no limit, a file inside should have one.
const MAX_SEARCH: usize = 32;

/// As far as planning needs it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvFacts {
    /// It names a resolver.
    pub has_resolver: bool,
    /// Domains in which short names are looked for.
    pub search: Vec<String>,
    /// Dots with which a name is tried as it is first.
    pub ndots: Option<u8>,
}

/// Reads the file's text. It goes into a file inside, so what is no name does not count.
pub(super) fn parse(text: &str) -> ResolvFacts {
    let mut facts = ResolvFacts::default();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("nameserver") => {
                let address = words.next().and_then(|word| word.split('%').next()).unwrap_or_default();
                facts.has_resolver |= address.parse::<std::net::IpAddr>().is_ok();
            }
            // The last one counts.
            Some("search" | "domain") => {
                facts.search =
                    words.filter(|name| is_name(name)).take(MAX_SEARCH).map(str::to_owned).collect();
            }
            Some("options") => {
                for n in words.filter_map(|word| word.strip_prefix("ndots:")) {
                    facts.ndots = n.parse().ok().map(|n: u8| n.min(15)).or(facts.ndots);
                }
            }
            _ => {}
        }
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_matters_is_found_and_nothing_else() {
        let text = "# search no\nnameserver fe80::1%eth0\nsearch old.example\n\
                    search lan. corp.example  b\u{1b}ad\noptions edns0 ndots:2 ndots:x\n";
        let facts = parse(text);
        assert_eq!((facts.has_resolver, facts.ndots), (true, Some(2)));
        assert_eq!(facts.search, ["lan.", "corp.example"]);
        assert_eq!(parse("nameserver nonsense\ndomain lan\n").search, ["lan"]);
        assert!(!parse("nameserver nonsense\n").has_resolver);
        assert_eq!(parse("options ndots:200").ndots, Some(15));
        assert_eq!(parse(""), ResolvFacts::default());
    }
}
