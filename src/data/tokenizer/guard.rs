//! What is refused before the `tokenizers` crate sees a file.

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::error::{Error, Reason, Result};

/// Larger than any tokenizer.json published so far (the largest are near 35 MB).
const MAX_BYTES: usize = 256 << 20;
/// Nesting of the known parts stays under ten.
const MAX_DEPTH: usize = 32;

/// The little that is read ahead of the crate.
#[derive(Debug, Deserialize)]
pub struct Header {
    model: ModelHeader,
}

#[derive(Debug, Deserialize)]
struct ModelHeader {
    #[serde(default)]
    merges: Option<IgnoredAny>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    unk_id: Option<u32>,
}

impl Header {
    /// Reads and checks the head of `json`.
    pub fn read(json: &str) -> Result<Self> {
        if json.len() > MAX_BYTES {
            return Err(Error::new(
                Reason::TooLarge,
                format!(
                    "tokenizer.json has {} bytes, more than the {MAX_BYTES} that are read; check that \
                     it is the right file",
                    json.len()
                ),
            ));
        }
        if depth(json) > MAX_DEPTH {
            return Err(super::malformed(format!("it nests deeper than {MAX_DEPTH} levels")));
        }
        let header: Self = serde_json::from_str(json).map_err(super::malformed)?;
        // The crate cuts the second half of a merge at the prefix's length without looking, so a
        // prefix is only safe where the merges are the crate's own work.
        let prefix = header.model.continuing_subword_prefix.as_deref().unwrap_or_default();
        if header.model.merges.is_some() && !prefix.is_empty() {
            return Err(Error::new(
                Reason::UnsupportedFormat,
                "tokenizer.json is a bpe with a continuing_subword_prefix, which is not read; convert \
                 it to byte-level bpe or sentencepiece",
            ));
        }
        Ok(header)
    }

    /// The unknown token of a unigram model.
    pub fn unknown(&self) -> Option<u32> {
        self.model.unk_id
    }
}

/// Deepest nesting of brackets outside strings.
fn depth(json: &str) -> usize {
    let (mut now, mut most) = (0usize, 0usize);
    let (mut quoted, mut escaped) = (false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'{' | b'[' if !quoted => {
                now += 1;
                most = most.max(now);
            }
            b'}' | b']' if !quoted => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_brackets_outside_strings() {
        assert_eq!(depth("1"), 0);
        assert_eq!(depth(r#"{"a":[{"b":"[[[\"[[["}],"c":[]}"#), 3);
    }

    #[test]
    fn deep_and_prefixed_files_are_refused() {
        let deep = format!("{{\"model\":{}{}}}", "[".repeat(100), "]".repeat(100));
        assert_eq!(Header::read(&deep).unwrap_err().reason(), Reason::MalformedFile);
        let prefixed = r#"{"model":{"merges":[],"continuing_subword_prefix":"é"}}"#;
        assert_eq!(Header::read(prefixed).unwrap_err().reason(), Reason::UnsupportedFormat);
        let wordpiece = r###"{"model":{"continuing_subword_prefix":"##"}}"###;
        assert!(Header::read(wordpiece).is_ok());
    }
}
