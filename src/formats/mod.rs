//! File formats, read as hostile and written for other programs: safetensors, GGUF, tokenizers; adapters
//! in.

mod counting;
pub mod gguf;
#[cfg(test)]
pub(crate) mod hostile;
pub mod mmap;
pub mod peft;
pub mod replacement;
pub mod safetensors;
pub mod tokenizer;

use crate::error::{Error, Reason, Result};

/// Longest tensor name that is read; names become keys, messages and paths of other tools.
const MAX_NAME: usize = 512;

/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// The error for a file that breaks its format's rules.
pub(crate) fn malformed(message: impl std::fmt::Display) -> Error {
    Error::new(
        Reason::MalformedFile,
        format!("{message}; the file is damaged or was not written to its end: get it again"),
    )
}

/// Refuses tensor names that are empty, very long, or hold control characters.
fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        return Err(malformed(format!("a tensor is called {}", quoted(name))));
    }
    Ok(())
}

/// A name from a file for a message: escaped, and cut where it is long.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// Refuses file names that would lead out of the folder of the file that mentions them.
pub(crate) fn check_file_name(name: &str) -> Result<()> {
    let plain = !name.is_empty()
        && name.len() <= 255
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+=@ ".contains(c));
    if plain {
        return Ok(());
    }
    Err(Error::new(
        Reason::MalformedFile,
        format!("{} is not a plain file name; shards must lie beside their index", quoted(name)),
    ))
}

/// Bytes of a tensor of `shape`, if that is a number.
fn byte_len(shape: &[usize], element: usize) -> Option<usize> {
    shape.iter().try_fold(element, |n, &d| n.checked_mul(d))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_file_names_pass() {
        for good in ["model.safetensors", "model-00001-of-00002.safetensors"] {
            check_file_name(good).unwrap();
        }
        for bad in ["", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", "C:x", "a\0b", ".hidden"] {
            assert!(check_file_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sizes_that_overflow_are_no_sizes() {
        assert_eq!(byte_len(&[3, 5], 2), Some(30));
        assert_eq!(byte_len(&[usize::MAX, 2], 1), None);
        assert_eq!(byte_len(&[0, usize::MAX], 4), Some(0));
    }

    #[test]
    fn messages_stay_short() {
        assert!(quoted(&"x".repeat(10_000)).len() < 100);
        assert_eq!(quoted("a\0b"), r#""a\0b""#);
    }
}
