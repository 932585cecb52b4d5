//! JSON objects, one a line or in one array.

use std::path::Path;

use serde_json::{Deserializer, Map, Value};

use super::lines::Lines;
use super::{MAX_ROW_BYTES, MAX_WHAT, Row, malformed};
use crate::data::text::{read_bytes, utf8};
use crate::error::{Error, Reason, Result};

/// An object a line; blank lines are left out.
pub fn lines(
    path: &Path,
    packed: bool,
    max_bytes: u64,
) -> Result<impl Iterator<Item = Result<Row>> + Send + use<>> {
    let mut lines = Lines::open(path, packed, max_bytes)?;
    let mut next = move || -> Result<Option<Row>> {
        while let Some((line, text)) = lines.next()? {
            if text.trim().is_empty() {
                continue;
            }
            let fields = serde_json::from_str(text)
                .map_err(|error| refused(line, &error, "each line must be a json object"))?;
            return Ok(Some(Row { line, fields }));
        }
        Ok(None)
    };
    Ok(std::iter::from_fn(move || next().transpose()))
}

/// The objects of an array, one after the other: the text is held as a whole, its values are not.
pub fn array(
    path: &Path,
    packed: bool,
    max_bytes: u64,
) -> Result<impl Iterator<Item = Result<Row>> + Send + use<>> {
    let text = utf8(read_bytes(path, packed, max_bytes)?)?;
    let mut array = Array { text, at: 0, line: 1, begun: false };
    Ok(std::iter::from_fn(move || array.next().transpose()))
}

struct Array {
    text: String,
    at: usize,
    /// Line of `at`.
    line: u64,
    begun: bool,
}

impl Array {
    fn next(&mut self) -> Result<Option<Row>> {
        let wanted = "the file must be an array of objects, or rename it to .jsonl";
        if !self.begun {
            if self.peek() != Some(b'[') {
                return Err(malformed("line", self.line, format!("there is no '['; {wanted}")));
            }
            self.step(1);
            self.begun = true;
            if self.peek() == Some(b']') {
                return self.end();
            }
        } else {
            match self.peek() {
                Some(b',') => self.step(1),
                Some(b']') => return self.end(),
                _ => {
                    let what = format!("neither ',' nor ']' follows an object; {wanted}");
                    return Err(malformed("line", self.line, what));
                }
            }
        }
        self.peek();
        let line = self.line;
        let mut most = self.text.len().min(self.at + MAX_ROW_BYTES);
        while !self.text.is_char_boundary(most) {
            most -= 1;
        }
        let part = &self.text[self.at..most];
        let mut values = Deserializer::from_str(part).into_iter::<Map<String, Value>>();
        let value = values.next();
        let length = values.byte_offset();
        match value {
            Some(Ok(fields)) => {
                self.step(length);
                Ok(Some(Row { line, fields }))
            }
            Some(Err(error)) if error.is_eof() && most < self.text.len() => {
                Err(super::long_row("line", line))
            }
            Some(Err(error)) => {
                let line = line + error.line().saturating_sub(1) as u64;
                Err(refused(line, &error, wanted))
            }
            None => Err(malformed("line", line, format!("the array has no end; {wanted}"))),
        }
    }

    /// The next byte that is no space, which is stepped over.
    fn peek(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        let spaces = rest.iter().take_while(|b| b.is_ascii_whitespace()).count();
        self.step(spaces);
        self.text.as_bytes().get(self.at).copied()
    }

    fn step(&mut self, bytes: usize) {
        let passed = &self.text.as_bytes()[self.at..self.at + bytes];
        self.line += passed.iter().filter(|b| **b == b'\n').count() as u64;
        self.at += bytes;
    }

    fn end(&mut self) -> Result<Option<Row>> {
        self.step(1);
        match self.peek() {
            None => Ok(None),
            Some(_) => Err(malformed("line", self.line, "something follows the array; remove it")),
        }
    }
}

/// The parser's words without its count of lines, which is not ours.
fn refused(line: u64, error: &serde_json::Error, wanted: &str) -> Error {
    let what = error.to_string();
    let what = what.split(" at line ").next().unwrap_or_default();
    let what: String = what.chars().take(MAX_WHAT).collect();
    let column = error.column();
    Error::new(Reason::MalformedFile, format!("line {line}, column {column}: {what}; {wanted}"))
}
