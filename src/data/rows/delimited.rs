//! Values with a sign between them. Values between commas may be quoted; between tabs a quote is a
//! character like any other, as most files with tabs have it.

use std::io::{Chain, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use csv::{ByteRecord, ErrorKind, Reader, ReaderBuilder, Terminator};
use serde_json::Map;

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
        .flexible(true)
        // The crate would count the two bytes that end a line elsewhere in two lines.
        .terminator(Terminator::Any(b'\n'))
        .from_reader(bytes.chain(END));
    let mut table =
        Table { reader, row, width: None, names: Vec::new(), record: ByteRecord::new() };
    if header && let Some((line, cells)) = table.read()? {
        table.names = names(line, &cells)?;
    }
    Ok(std::iter::from_fn(move || table.next().transpose()))
}

/// Ends the last line of files that do not.
const END: &[u8] = b"\n";

struct Table {
    reader: Reader<Chain<Bytes, &'static [u8]>>,
    row: Arc<AtomicUsize>,
    width: Option<usize>,
    names: Vec<String>,
    record: ByteRecord,
}

impl Table {
    fn next(&mut self) -> Result<Option<Row>> {
        let Some((line, cells)) = self.read()? else { return Ok(None) };
        if self.names.is_empty() {
            self.names = (1..=cells.len()).map(|place| place.to_string()).collect();
        }
        let values = cells.into_iter().map(Into::into);
        let fields: Map<_, _> = self.names.iter().cloned().zip(values).collect();
        Ok(Some(Row { line, fields }))
    }

    /// The line at which a record begins, and its cells; blank lines are left out.
    fn read(&mut self) -> Result<Option<(u64, Vec<String>)>> {
        loop {
            self.row.store(0, Ordering::Relaxed);
            let read = self.reader.read_byte_record(&mut self.record);
            let within =
                self.record.as_slice().iter().filter(|byte| **byte == b'\n').count() as u64;
            let line = self.reader.position().line().saturating_sub(within + 1);
            let read = read.map_err(|error| match error.into_kind() {
                ErrorKind::Io(error) => lines::failed(error),
                _ => malformed("line", line, "it cannot be read; write the file again"),
            })?;
            if !read {
                return Ok(None);
            }
            if self.record.as_slice().len() > MAX_ROW_BYTES {
                return Err(long_row("line", line));
            }
            if self.record.len() > MAX_FIELDS {
                let what = format!("more than {MAX_FIELDS} values; leave out those not needed");
                return Err(malformed("line", line, what));
            }
            let mut cells = Vec::with_capacity(self.record.len());
            for cell in &self.record {
                let cell = std::str::from_utf8(cell).map_err(|_| {
                    malformed("line", line, "it is not utf-8; convert the file to utf-8")
                })?;
                cells.push(cell.to_owned());
            }
            if let Some(last) = cells.last_mut()
                && last.ends_with('\r')
            {
                last.pop();
            }
            if cells.len() == 1 && cells[0].is_empty() {
                continue;
            }
            if self.width.is_none()
                && let Some(first) = cells.first_mut()
                && first.starts_with('\u{FEFF}')
            {
                first.remove(0);
            }
            let width = *self.width.get_or_insert(cells.len());
            if cells.len() != width {
                let what = format!(
                    "the number of values is {}, but {width} in the lines before; quote values that \
                     hold the separator",
                    cells.len()
                );
                return Err(malformed("line", line, what));
            }
            return Ok(Some((line, cells)));
        }
    }
}

/// Names of the columns: their places where they are blank.
fn names(line: u64, cells: &[String]) -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::with_capacity(cells.len());
    for (place, name) in (1..).zip(cells) {
        let name = name.trim();
        let name = if name.is_empty() { place.to_string() } else { name.to_owned() };
        if names.contains(&name) {
            let what = format!("two columns are called '{name:.60}'; rename one");
            return Err(malformed("line", line, what));
        }
        names.push(name);
    }
    Ok(names)
}
