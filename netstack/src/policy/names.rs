//! Names in rules: what a rule may be about, and whether a name is.

use std::fmt;
use std::str::FromStr;

use super::RuleError;

/// A name of DNS, or with `*.` in front every name below one, at any depth, but not that one itself.
///
/// Names are compared as DNS does, without regard to case. Those with other letters than ASCII's are written as on the
/// wire (`xn--…`).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NamePattern {
    name: String,
    below: bool,
}

impl NamePattern {
    /// Whether `name`, in lower case and without a dot at its end, is meant.
    pub(crate) fn matches(&self, name: &str) -> bool {
        if !self.below {
            return name == self.name;
        }
        name.strip_suffix(self.name.as_str()).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
    }
}

impl FromStr for NamePattern {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (name, below) = text.strip_prefix("*.").map_or((text, false), |name| (name, true));
        let name = normal(name).ok_or_else(|| RuleError::new(format!("{text:?} is no name of DNS")))?;
        Ok(Self { name, below })
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.name)
    }
}

/// A name as it is compared: lower case, no dot at its end. `None` if no host has such a name.
pub(crate) fn normal(name: &str) -> Option<String> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let good = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    (name.len() <= 253 && name.split('.').all(good)).then(|| name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_a_name_or_what_is_below_it() {
        for (pattern, name, matches) in [
            ("example.com", "example.com", true),
            ("EXAMPLE.com.", "example.com", true),
            ("example.com", "www.example.com", false),
            ("example.com", "badexample.com", false),
            ("*.example.com", "www.example.com", true),
            ("*.example.com", "a.b.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", ".example.com", false),
            ("*.example.com", "badexample.com", false),
            ("*.com", "example.com", true),
        ] {
            let parsed: NamePattern = pattern.parse().expect(pattern);
            assert_eq!(parsed.matches(name), matches, "{pattern} {name}");
            assert_eq!(parsed.to_string().parse(), Ok(parsed), "{pattern}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = format!("{}.example", "a".repeat(64));
        for text in
            ["", ".", "*", "*.", "a..b", "*.*.example.com", "www.*.com", "a b", "é.example", "a/b", &long]
        {
            assert!(text.parse::<NamePattern>().is_err(), "{text}");
        }
    }
}
