//! Words in lines with columns, as shared tasks write them: a blank line after each sentence, tabs or
//! spaces between the columns.

use std::path::Path;

use serde_json::{Map, Value};

use super::lines::Lines;
use super::{MAX_FIELDS, MAX_ROW_BYTES, MAX_WORDS, Row, malformed};
use crate::error::{Error, Reason, Result};

/// Columns of Universal Dependencies.
const UNIVERSAL: [&str; 10] =
    ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"];
/// A line that stands between documents.
const DOCUMENT: &str = "-DOCSTART-";

/// Sentences: each field is a column, a list with a string for each word. Columns are called by their
/// places from "1", or, where `universal`, by the names of the format; its comments, words of several
/// tokens and empty nodes are left out.
pub fn sentences(
    path: &Path,
    packed: bool,
    universal: bool,
    max_bytes: u64,
) -> Result<impl Iterator<Item = Result<Row>> + Send + use<>> {
    let lines = Lines::open(path, packed, max_bytes)?;
    let mut reader = Reader { lines, universal, width: universal.then_some(UNIVERSAL.len()) };
    Ok(std::iter::from_fn(move || reader.next().transpose()))
}

struct Reader {
    lines: Lines,
    universal: bool,
    /// Columns of a line; the first line of a file sets it.
    width: Option<usize>,
}

impl Reader {
    fn next(&mut self) -> Result<Option<Row>> {
        let (mut first, mut bytes) = (0, 0);
        let mut columns: Vec<Vec<Value>> = Vec::new();
        while let Some((line, text)) = self.lines.next()? {
            if text.trim_ascii().is_empty() {
                if columns.is_empty() {
                    continue;
                }
                break;
            }
            if text.starts_with(DOCUMENT) || (self.universal && text.starts_with('#')) {
                continue;
            }
            let values: Vec<&str> = if self.universal || text.contains('\t') {
                text.split('\t').map(str::trim_ascii).collect()
            } else {
                text.split(' ').filter(|value| !value.is_empty()).collect()
            };
            let width = *self.width.get_or_insert(values.len());
            if values.len() != width || width > MAX_FIELDS {
                let what = format!(
                    "the number of columns is {}, but {} here; put a blank line between sentences and \
                     the same columns into each line",
                    values.len(),
                    width.min(MAX_FIELDS)
                );
                return Err(malformed("line", line, what));
            }
            if self.universal && values[0].contains(['-', '.']) {
                continue;
            }
            bytes += text.len();
            if bytes > MAX_ROW_BYTES || columns.first().is_some_and(|c| c.len() == MAX_WORDS) {
                return Err(Error::new(
                    Reason::TooLarge,
                    format!(
                        "line {line}: a sentence has more than {MAX_WORDS} words or {MAX_ROW_BYTES} \
                         bytes; put a blank line between sentences"
                    ),
                ));
            }
            if columns.is_empty() {
                first = line;
                columns.resize(width, Vec::new());
            }
            for (column, value) in columns.iter_mut().zip(values) {
                column.push(value.into());
            }
        }
        if columns.is_empty() {
            return Ok(None);
        }
        let named = columns.into_iter().enumerate().map(|(place, column)| {
            let name =
                if self.universal { UNIVERSAL[place].to_owned() } else { (place + 1).to_string() };
            (name, Value::Array(column))
        });
        Ok(Some(Row { line: first, fields: named.collect::<Map<_, _>>() }))
    }
}
