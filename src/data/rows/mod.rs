//! Files of records as rows of named fields, whatever their format: JSON lines, a JSON array, separated
//! values, columns of words (CoNLL), Parquet. What is read comes from strangers: the bytes after
//! unpacking, the rows, the fields of a row and the bytes of a row are limited.

mod columns;
mod delimited;
mod json;
mod lines;
mod parquet;

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Reason, Result};

/// Bytes of a row as it stands in the file, before the parser makes many more of them.
pub const MAX_ROW_BYTES: usize = 8 << 20;
/// Rows of a file.
pub const MAX_ROWS: u64 = 20_000_000;
/// Fields of a row.
pub const MAX_FIELDS: usize = 1000;
/// Words of a sentence.
pub const MAX_WORDS: usize = 100_000;
/// Characters of a parser's words that an error repeats.
const MAX_WHAT: usize = 200;

/// One row of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Where it begins: the line from 1, or the row from 1 where a format has no lines.
    pub line: u64,
    /// In the order of the file. A sentence in columns has a list of strings in each field.
    pub fields: Map<String, Value>,
}

/// Rows in the order of the file; nothing follows an error.
pub type Rows = Box<dyn Iterator<Item = Result<Row>> + Send>;

/// How a file is written, which its name tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One text.
    Text,
    /// A JSON object a line.
    JsonLines,
    /// A JSON array of objects.
    Json,
    /// Separated values, quoted as RFC 4180 says.
    Comma,
    /// Values with tabs between them, never quoted.
    Tab,
    /// A word a line with its columns, a blank line after each sentence.
    Columns,
    /// The same with the ten columns of Universal Dependencies.
    Universal,
    /// Apache Parquet.
    Parquet,
}

impl Format {
    /// The format of a file and whether it is packed by gzip. Where `sentences` are wanted, text and tabs
    /// are columns of words.
    ///
    /// # Errors
    /// `UNSUPPORTED_FORMAT` for endings that are not known.
    pub fn of(file_name: &str, sentences: bool) -> Result<(Self, bool)> {
        let name = file_name.to_ascii_lowercase();
        let (stem, packed) = match name.strip_suffix(".gz") {
            Some(stem) => (stem, true),
            None => (name.as_str(), false),
        };
        let format = match stem.rsplit_once('.').map(|(_, ending)| ending) {
            Some("jsonl" | "ndjson") => Self::JsonLines,
            Some("json") => Self::Json,
            Some("csv") => Self::Comma,
            Some("txt" | "tsv") if sentences => Self::Columns,
            Some("conll" | "bio" | "iob" | "iob2") => Self::Columns,
            Some("conllu") => Self::Universal,
            Some("tsv") => Self::Tab,
            Some("txt") => Self::Text,
            Some("parquet") if !packed => Self::Parquet,
            _ => {
                return Err(Error::new(
                    Reason::UnsupportedFormat,
                    format!(
                        "{file_name:.100}: the name ends in none of .jsonl, .json, .csv, .tsv, .txt, \
                         .conll, .conllu (each also with .gz) and .parquet; rename or convert the file"
                    ),
                ));
            }
        };
        Ok((format, packed))
    }

    /// Whether columns have places, so that a number can name one.
    pub fn has_places(self) -> bool {
        matches!(self, Self::Comma | Self::Tab | Self::Columns | Self::Universal)
    }

    /// Whether the first line may name the columns.
    pub fn may_have_header(self) -> bool {
        matches!(self, Self::Comma | Self::Tab)
    }

    /// What [`Row::line`] counts.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Parquet => "row",
            _ => "line",
        }
    }
}

/// Opens a file. `header` says whether the first line names the columns, where it may; without names,
/// columns are called by their places, from "1". `max_bytes` bounds the unpacked size.
///
/// # Errors
/// `UNSUPPORTED_FORMAT` for text, which has no rows; here and from the rows `TOO_LARGE` beyond the
/// limits and `MALFORMED_FILE` with the line for what cannot be read.
pub fn open(
    path: &Path,
    (format, packed): (Format, bool),
    header: bool,
    max_bytes: u64,
) -> Result<Rows> {
    let rows: Rows = match format {
        Format::JsonLines => Box::new(json::lines(path, packed, max_bytes)?),
        Format::Json => Box::new(json::array(path, packed, max_bytes)?),
        Format::Comma => Box::new(delimited::rows(path, packed, b',', header, max_bytes)?),
        Format::Tab => Box::new(delimited::rows(path, packed, b'\t', header, max_bytes)?),
        Format::Columns => Box::new(columns::sentences(path, packed, false, max_bytes)?),
        Format::Universal => Box::new(columns::sentences(path, packed, true, max_bytes)?),
        Format::Parquet => Box::new(parquet::rows(path, max_bytes)?),
        Format::Text => {
            return Err(Error::new(
                Reason::UnsupportedFormat,
                "a text has no rows; import it as running text, or convert it to .jsonl",
            ));
        }
    };
    let mut ended = false;
    let (mut rows, mut count) = (rows, 0);
    Ok(Box::new(std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let row = rows.next().map(|row| {
            let row = row?;
            count += 1;
            if count > MAX_ROWS {
                return Err(Error::new(
                    Reason::TooLarge,
                    format!("more than {MAX_ROWS} rows; split the file"),
                ));
            }
            if row.fields.len() > MAX_FIELDS {
                let fields = row.fields.len();
                return Err(malformed(
                    format.unit(),
                    row.line,
                    format!(
                        "{fields} fields are more than {MAX_FIELDS}; leave out those not needed"
                    ),
                ));
            }
            Ok(row)
        });
        ended = !matches!(row, Some(Ok(_)));
        row
    })))
}

/// `MALFORMED_FILE` with its place.
fn malformed(unit: &str, line: u64, what: impl std::fmt::Display) -> Error {
    Error::new(Reason::MalformedFile, format!("{unit} {line}: {what}"))
}

/// A row that is too long.
fn long_row(unit: &str, line: u64) -> Error {
    Error::new(
        Reason::TooLarge,
        format!("{unit} {line}: more than {MAX_ROW_BYTES} bytes; split the record"),
    )
}

#[cfg(test)]
mod tests;
