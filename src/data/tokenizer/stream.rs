//! Ids to text, piece by piece.

use super::Tokenizer;
use super::pieces::Strip;
use crate::error::Result;

/// Turns a stream of ids into text piece by piece without ever cutting a character. The pieces and
/// the end, put together, are what [`Tokenizer::decode`] gives for all the ids; each costs no more
/// than its own bytes. Special tokens are left out unless asked for.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The beginning of a character, at most three bytes.
    open: Vec<u8>,
    started: bool,
    strip: Strip,
    special: bool,
}

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            open: Vec::new(),
            started: false,
            strip: tokenizer.pieces.strip(),
            special: false,
        }
    }

    /// Takes the first id as one inside a text: its bytes are [`Tokenizer::token_bytes`], and nothing is
    /// taken from their front.
    #[must_use]
    pub fn continuing(mut self) -> Self {
        self.started = true;
        self.strip = Strip::default();
        self
    }

    /// Writes special tokens too.
    #[must_use]
    pub fn with_special(mut self) -> Self {
        self.special = true;
        self
    }

    /// The text that `id` completes; empty while a character is open.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let mut text = String::new();
        self.push_into(id, &mut text);
        Ok(text)
    }

    /// What is left at the end (incomplete characters become U+FFFD).
    pub fn finish(&mut self) -> Result<String> {
        let mut text = String::new();
        self.finish_into(&mut text);
        Ok(text)
    }

    pub(super) fn push_into(&mut self, id: u32, text: &mut String) {
        let pieces = &self.tokenizer.pieces;
        if id as usize >= pieces.len() || (pieces.is_special(id) && !self.special) {
            return;
        }
        let mut bytes = if self.started { pieces.bytes(id) } else { pieces.first_bytes(id) };
        self.started = true;
        while self.strip.count > 0 {
            match bytes.split_first() {
                None => return,
                Some((&b, rest)) if b == self.strip.byte => {
                    bytes = rest;
                    self.strip.count -= 1;
                }
                Some(_) => self.strip.count = 0,
            }
        }
        if self.open.is_empty() {
            self.open.extend_from_slice(complete(bytes, text));
        } else {
            self.open.extend_from_slice(bytes);
            let joined = std::mem::take(&mut self.open);
            self.open.extend_from_slice(complete(&joined, text));
        }
    }

    pub(super) fn finish_into(&mut self, text: &mut String) {
        if !self.open.is_empty() {
            text.push_str(&String::from_utf8_lossy(&self.open));
            self.open.clear();
        }
    }
}

/// Appends all of `bytes` that cannot change any more, bad bytes as U+FFFD, and gives the rest: the
/// beginning of a character.
fn complete<'b>(bytes: &'b [u8], text: &mut String) -> &'b [u8] {
    let mut rest = bytes;
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                return &[];
            }
            Err(error) => {
                let (valid, bad) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                let Some(length) = error.error_len() else { return bad };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &bad[length..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_keeps_only_the_beginning_of_a_character() {
        let mut text = String::new();
        assert_eq!(complete(b"a\xE2\x98", &mut text), b"\xE2\x98");
        assert_eq!(complete(b"\xFF\xE2\x98\x83b", &mut text), b"");
        assert_eq!(text, "a\u{FFFD}\u{2603}b");
    }

    #[test]
    fn any_cut_of_any_bytes_gives_the_lossy_whole() {
        let bytes = b"x\xF0\x9F\x98\x80\xC3(\xF0\x28\xE2\x82\xACy\xED\xA0\x80\xE2\x82";
        let whole = String::from_utf8_lossy(bytes);
        for step in 1..6 {
            let (mut text, mut open) = (String::new(), Vec::new());
            for part in bytes.chunks(step) {
                open.extend_from_slice(part);
                let rest = complete(&open, &mut text).to_vec();
                assert!(rest.len() < 4);
                open = rest;
            }
            text.push_str(&String::from_utf8_lossy(&open));
            assert_eq!(text, whole, "cut every {step} bytes");
        }
    }
}
