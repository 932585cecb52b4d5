//! Bearer tokens.

use std::fs;

use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::config::{self, check_token};
use crate::error::{Error, Reason, Result};

/// The tokens that open the door, as digests: the words themselves are not kept.
pub struct Tokens(Vec<[u8; 32]>);

impl Tokens {
    /// Reads the tokens the configuration names; none means that everyone may enter.
    pub fn load(server: &config::Server) -> Result<Self> {
        let mut digests = Vec::new();
        if let Some(token) = &server.token {
            digests.push(digest(token.reveal()));
        }
        if let Some(path) = &server.tokens_file {
            let bad = |problem: String| {
                Error::at(
                    Reason::InvalidConfig,
                    "server.tokens_file",
                    format!("{}: {problem}", path.display()),
                )
            };
            let text = fs::read_to_string(path)
                .map_err(|e| bad(format!("cannot be read: {e}; check the path and its rights")))?;
            let mut empty = true;
            for (number, line) in (1..).zip(text.lines()) {
                let token = line.trim();
                if token.is_empty() || token.starts_with('#') {
                    continue;
                }
                check_token(token).map_err(|problem| bad(format!("line {number}: {problem}")))?;
                digests.push(digest(token));
                empty = false;
            }
            if empty {
                // Else an emptied file would open the door to everyone.
                return Err(bad("no token in it; write one a line".to_owned()));
            }
        }
        Ok(Self(digests))
    }

    /// Checks the value of an `authorization` header.
    pub fn check(&self, authorization: Option<&[u8]>) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let refused = |message| Err(Error::new(Reason::Unauthenticated, message));
        let Some(value) = authorization else {
            return refused("no credentials; send `authorization: Bearer <token>`");
        };
        let token = value
            .split_at_checked(7)
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "))
            .map(|(_, token)| token.trim_ascii());
        let Some(token) = token else {
            return refused("unknown kind of credentials; send `authorization: Bearer <token>`");
        };
        let given: [u8; 32] = Sha256::digest(token).into();
        // Every digest is compared in full, so the time tells nothing of which one was near.
        let known = self.0.iter().fold(Choice::from(0), |found, d| found | d.ct_eq(&given));
        if bool::from(known) { Ok(()) } else { refused("the token is not known here") }
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Secret, Server};

    #[test]
    fn tokens_open_and_others_do_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "# people\n\nfedcba9876543210\n").unwrap();
        let server = Server {
            token: Some(Secret::new("0123456789abcdef")),
            tokens_file: Some(file.path().into()),
            ..Server::default()
        };
        let tokens = Tokens::load(&server).unwrap();
        tokens.check(Some(b"Bearer 0123456789abcdef")).unwrap();
        tokens.check(Some(b"bearer fedcba9876543210")).unwrap();
        for bad in [
            None,
            Some(&b"Bearer 0123456789abcdeF"[..]),
            Some(b"Bearer "),
            Some(b""),
            Some(b"Basic x"),
        ] {
            assert_eq!(tokens.check(bad).unwrap_err().reason(), Reason::Unauthenticated);
        }
    }

    #[test]
    fn an_empty_file_does_not_open_the_door() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let server = Server { tokens_file: Some(file.path().into()), ..Server::default() };
        assert!(Tokens::load(&server).is_err());
        fs::write(file.path(), "short\n").unwrap();
        let error = Tokens::load(&server).err().unwrap();
        assert!(
            error.message().contains("line 1") && !error.message().contains("short"),
            "{error}"
        );
        assert!(Tokens::load(&Server::default()).unwrap().check(None).is_ok());
    }
}
