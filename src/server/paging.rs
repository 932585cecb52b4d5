//! Page sizes and page tokens.
//!
//! A token holds the position after which the next page starts and a checksum over that position and
//! the parameters of the list, so that a mangled token or one of another list is refused. It guards
//! against mistakes, not against malice: a position gives away nothing a list would not.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use crate::error::{Error, Reason, Result};

const DEFAULT_SIZE: usize = 50;
const MAX_SIZE: usize = 1000;
const MAX_TOKEN: usize = 1024;
const CHECKSUM: usize = 8;

/// A page that was asked for.
#[derive(Debug, PartialEq)]
pub struct Page {
    /// Rows a page holds.
    pub size: usize,
    /// Where the page before ended; absent for the first.
    pub after: Option<String>,
}

impl Page {
    /// Checks `page_size` and `page_token`. `scope` is the list's name followed by every parameter that
    /// must stay the same from page to page.
    pub fn parse(page_size: i32, page_token: &str, scope: &[&str]) -> Result<Self> {
        let size = match usize::try_from(page_size) {
            Err(_) => {
                return Err(Error::field(
                    "page_size",
                    format!("{page_size} is negative; 0 means 50"),
                ));
            }
            Ok(0) => DEFAULT_SIZE,
            Ok(size) => size.min(MAX_SIZE),
        };
        let after = match page_token {
            "" => None,
            token => Some(position(token, scope).ok_or_else(|| {
                Error::at(
                    Reason::InvalidPageToken,
                    "page_token",
                    "not a token of this list; send next_page_token with the same parameters",
                )
            })?),
        };
        Ok(Self { size, after })
    }

    /// Cuts `rows`, of which one more than the page holds was read, to the page, and makes the token of
    /// the next page (empty on the last).
    pub fn cut<T>(
        &self,
        rows: &mut Vec<T>,
        scope: &[&str],
        position: impl Fn(&T) -> String,
    ) -> String {
        let more = rows.len() > self.size;
        rows.truncate(self.size);
        match rows.last() {
            Some(last) if more => token(&position(last), scope),
            _ => String::new(),
        }
    }
}

fn checksum(position: &str, scope: &[&str]) -> [u8; CHECKSUM] {
    let mut hash = Sha256::new();
    for part in scope.iter().copied().chain([position]) {
        // Lengths keep ("a", "bc") and ("ab", "c") apart.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    std::array::from_fn(|i| digest[i])
}

fn token(position: &str, scope: &[&str]) -> String {
    let mut bytes = checksum(position, scope).to_vec();
    bytes.extend_from_slice(position.as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

fn position(token: &str, scope: &[&str]) -> Option<String> {
    if token.len() > MAX_TOKEN {
        return None;
    }
    let mut bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
    if bytes.len() < CHECKSUM {
        return None;
    }
    let position = String::from_utf8(bytes.split_off(CHECKSUM)).ok()?;
    (bytes == checksum(&position, scope)).then_some(position)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let size = |n| Page::parse(n, "", &[]).map(|p| p.size);
        assert_eq!(size(0).unwrap(), 50);
        assert_eq!(size(7).unwrap(), 7);
        assert_eq!(size(i32::MAX).unwrap(), 1000);
        assert_eq!(size(-1).unwrap_err().reason(), Reason::InvalidField);
    }

    #[test]
    fn tokens_lead_on_and_are_checked() {
        let scope = ["models.versions", "models/a"];
        let page = Page::parse(2, "", &scope).unwrap();
        let mut rows = vec!["x", "y", "z"];
        let next = page.cut(&mut rows, &scope, |r| (*r).to_owned());
        assert_eq!(rows, ["x", "y"]);
        assert_eq!(Page::parse(5, &next, &scope).unwrap().after.as_deref(), Some("y"));

        let mut last = vec!["z"];
        assert_eq!(page.cut(&mut last, &scope, |r| (*r).to_owned()), "");

        let mangled = format!("{}A", &next[..next.len() - 1]);
        for (token, scope) in [
            (next.as_str(), ["models.versions", "models/b"]),
            (mangled.as_str(), scope),
            ("AAAA", scope),
            ("!", scope),
            (&"A".repeat(5000), scope),
        ] {
            let error = Page::parse(2, token, &scope).unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidPageToken, "{token}");
        }
    }
}
