//! Interface name patterns: `*` for any run of characters, `?` for one.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer};

use crate::text::deserialize_text;

/// A pattern for interface names.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Glob(String);

/// Why a text is not a pattern for interface names.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum GlobError {
    #[error("an interface pattern is empty; write a name such as \"eth0\" or a pattern such as \"veth*\"")]
    Empty,
    #[error("`{0}` is longer than an interface name can be (15 characters)")]
    TooLong(String),
    #[error("`{character}` in `{pattern}` cannot be in an interface name; a pattern is a name with `*` and `?`")]
    Character { pattern: String, character: char },
}

impl Glob {
    /// Linux' IFNAMSIZ without the closing zero.
    const LONGEST_NAME: usize = 15;

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the pattern names one interface and not a kind of them.
    #[must_use]
    pub fn is_literal(&self) -> bool {
        !self.0.contains(['*', '?'])
    }

    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let (pattern, name) = (self.0.as_bytes(), name.as_bytes());
        let (mut p, mut n) = (0, 0);
        // Where the last `*` was, and the first character it has not swallowed yet.
        let mut star = None;
        while n < name.len() {
            match pattern.get(p) {
                Some(b'*') => {
                    star = Some((p, n));
                    p += 1;
                }
                Some(&c) if c == b'?' || c == name[n] => (p, n) = (p + 1, n + 1),
                _ => match star {
                    Some((at, swallowed)) => {
                        star = Some((at, swallowed + 1));
                        (p, n) = (at + 1, swallowed + 1);
                    }
                    None => return false,
                },
            }
        }
        pattern[p..].iter().all(|c| *c == b'*')
    }
}

impl FromStr for Glob {
    type Err = GlobError;

    fn from_str(pattern: &str) -> Result<Self, GlobError> {
        if pattern.is_empty() {
            return Err(GlobError::Empty);
        }
        // The kernel refuses `/`, `:` and white space in names (dev_valid_name); brackets and braces would be taken for glob syntax
        // that is not understood here.
        let wrong = |c: &char| !c.is_ascii_graphic() || matches!(c, '/' | ':' | '[' | ']' | '{' | '}' | '!' | '\\');
        if let Some(character) = pattern.chars().find(wrong) {
            return Err(GlobError::Character { pattern: pattern.to_owned(), character });
        }
        if pattern.chars().filter(|c| *c != '*').count() > Self::LONGEST_NAME {
            return Err(GlobError::TooLong(pattern.to_owned()));
        }
        Ok(Self(pattern.to_owned()))
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Glob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize_text(deserializer, "an interface pattern", str::parse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        let matches = |pattern: &str, name: &str| pattern.parse::<Glob>().unwrap().matches(name);
        assert!(matches("veth*", "veth12ab"));
        assert!(matches("veth*", "veth"));
        assert!(!matches("veth*", "myveth0"));
        assert!(matches("*", "lo"));
        assert!(matches("e?h0", "eth0"));
        assert!(!matches("e?h0", "eh0"));
        assert!(matches("a*b*c", "aXbXbc"));
        assert!(!matches("a*b*c", "aXbXb"));
        assert!(!matches("eth0", "eth01"));
        assert!(matches("eth0.100", "eth0.100"));
    }

    #[test]
    fn what_no_interface_can_be_called_is_refused() {
        for pattern in ["", "eth 0", "a/b", "veth[0-9]", "{a,b}", "!eth0", "abcdefghijklmnop"] {
            assert!(pattern.parse::<Glob>().is_err(), "{pattern}");
        }
        assert!("abcdefghijklmno*".parse::<Glob>().is_ok());
    }
}
