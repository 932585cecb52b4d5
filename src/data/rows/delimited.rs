//! Values with a sign between them. Values between commas may be quoted; between tabs a quote is a
//! character like any other, as most files with tabs have it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};
use serde_json::{Map, Value};

use super::lines::{self, Bytes};
use super::{MAX_FIELDS, MAX_ROW_BYTES, Row, long_row, malformed};
use crate::error::Result;

/// Rows of a table; `header` says that the first names the columns.
pub fn rows(
    path: &Path,
    packed: bool,
    sign: u8,
    header: bool,
    max_bytes: u64,
) -> Result<impl Iterator<Item = Result<Row>> + Send + use<>> {
    let bytes = Bytes::open(path, packed, max_bytes)?;
    let row = bytes.row();
    let reader = ReaderBuilder::new()
        .delimiter(sign)
        .quoting(sign != b'\t')
        .has_headers(false)
        .from_reader(bytes);
    let mut table = Table { reader, row, names: Vec::new(), record: StringRecord::new() };
    if header && table.read()?.is_some() {
        table.names = names(&table.record)?;
    }
    Ok(std::iter::from_fn(move || table.next().transpose()))
}

struct Table {
    reader: Reader<Bytes>,
    row: Arc<AtomicUsize>,
    names: Vec<String>,
    record: StringRecord,
}

impl Table {
    fn next(&mut self) -> Result<Option<Row>> {
        let Some(line) = self.read()? else { return Ok(None) };
        if self.names.is_empty() {
            self.names = (1..=self.record.len()).map(|place| place.to_string()).collect();
        }
        let values = self.record.iter().map(|value| Value::from(value));
        let fields: Map<_, _> = self.names.iter().cloned().zip(values).collect();
        Ok(Some(Row { line, fields }))
    }

    /// Reads a record; its line.
    fn read(&mut self) -> Result<Option<u64>> {
        self.row.store(0, Ordering::Relaxed);
        let read = self.reader.read_record(&mut self.record).map_err(|error| {
            let line = error.position().map_or(0, csv::Position::line);
            match error.into_kind() {
                ErrorKind::Io(error) => lines::failed(error),
                ErrorKind::UnequalLengths { expected_len, len, .. } => malformed(
                    "line",
                    line,
                    format!(
                        "the number of values is {len}, but {expected_len} in the lines before; quote \
                         values that hold the separator"
                    ),
                ),
                ErrorKind::Utf8 { .. } => {
                    malformed("line", line, "it is not utf-8; convert the file to utf-8")
                }
                _ => malformed("line", line, "it cannot be read; write the file again"),
            }
        })?;
        let line = self.record.position().map_or(0, csv::Position::line);
        if self.record.as_slice().len() > MAX_ROW_BYTES {
            return Err(long_row("line", line));
        }
        if self.record.len() > MAX_FIELDS {
            let what = format!("more than {MAX_FIELDS} values; leave out those not needed");
            return Err(malformed("line", line, what));
        }
        Ok(read.then_some(line))
    }
}

/// Names of the columns: their places where they are blank.
fn names(record: &StringRecord) -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::with_capacity(record.len());
    for (place, name) in (1..).zip(record) {
        let name = name.trim().trim_start_matches('\u{FEFF}');
        let name = if name.is_empty() { place.to_string() } else { name.to_owned() };
        if names.contains(&name) {
            let what = format!("two columns are called '{name:.60}'; rename one");
            return Err(malformed("line", 1, what));
        }
        names.push(name);
    }
    Ok(names)
}
