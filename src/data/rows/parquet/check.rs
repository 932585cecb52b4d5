//! What must hold before the crate reads a file: it recurses over schemas and makes room for pages as
//! their heads ask, so both are looked at first.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use parquet::file::reader::{FileReader, SerializedFileReader};

use super::super::MAX_ROWS;
use super::broken;
use super::thrift::{LIST, Reader, STRUCT};
use crate::error::{Error, Reason, Result};

const MAX_FOOTER: u64 = 4 << 20;
const MAX_NODES: usize = 10_000;
const MAX_DEPTH: usize = 32;
/// Unpacked bytes of a page; writers make them of a megabyte or so.
const MAX_PAGE: i64 = 128 << 20;
/// Bytes of a page's head: it may repeat the least and the greatest value.
const MAX_HEAD: u64 = 1 << 20;
/// Values of a column in a group of rows, where a row may have many.
const MAX_REPEATED: u64 = 16 << 20;
/// Ends a file, after the length of its footer.
const MAGIC: &[u8] = b"PAR1";

/// Checks the sizes and the schema of the footer.
pub fn footer(file: &mut File) -> Result<()> {
    let size = file.metadata()?.len();
    let mut end = [0; 8];
    if size < 12 {
        return Err(broken("it is too short"));
    }
    file.seek(SeekFrom::End(-8))?;
    file.read_exact(&mut end)?;
    let length = u64::from(u32::from_le_bytes([end[0], end[1], end[2], end[3]]));
    if &end[4..] != MAGIC {
        return Err(broken("it does not end in PAR1"));
    }
    if length > size - 12 {
        return Err(broken("its footer is longer than the file"));
    }
    if length > MAX_FOOTER {
        return Err(Error::new(
            Reason::TooLarge,
            format!("the footer has more than {MAX_FOOTER} bytes; write fewer, larger row groups"),
        ));
    }
    file.seek(SeekFrom::Start(size - 8 - length))?;
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes)?;
    schema(&bytes).ok_or_else(|| {
        broken(format!(
            "its schema contradicts itself, or has more than {MAX_NODES} columns or {MAX_DEPTH} levels"
        ))
    })
}

/// The nodes of the schema stand in one list, each with the number of its children.
fn schema(footer: &[u8]) -> Option<()> {
    let mut found = false;
    Reader::new(footer).structure(|reader, id, kind| {
        if (id, kind) != (2, LIST) {
            return Some(false);
        }
        let (kind, nodes) = reader.list()?;
        if kind != STRUCT || nodes == 0 || nodes > MAX_NODES || found {
            return None;
        }
        // Children that are still to come, for each open group.
        let mut open: Vec<i64> = Vec::new();
        for node in 0..nodes {
            let mut children = 0;
            reader.structure(|reader, id, _| {
                if id == 5 {
                    children = reader.integer()?;
                }
                Some(id == 5)
            })?;
            if children < 0 || children > nodes as i64 || (node > 0 && open.is_empty()) {
                return None;
            }
            if let Some(left) = open.last_mut() {
                *left -= 1;
            }
            if children > 0 {
                open.push(children);
            }
            if open.len() > MAX_DEPTH {
                return None;
            }
            while open.last() == Some(&0) {
                open.pop();
            }
        }
        found = open.is_empty();
        found.then_some(true)
    })?;
    found.then_some(())
}

/// Checks the heads of all pages: what they unpack to, and how many values they hold.
pub fn pages(file: &mut File, reader: &SerializedFileReader<File>, max_bytes: u64) -> Result<()> {
    let size = file.metadata()?.len();
    let mut unpacked = 0u64;
    let mut rows = 0u64;
    let too_large = |what: String| Error::new(Reason::TooLarge, format!("{what}; split the file"));
    for group in reader.metadata().row_groups() {
        let count = u64::try_from(group.num_rows()).map_err(|_| broken("rows below zero"))?;
        rows = rows.saturating_add(count);
        if rows > MAX_ROWS {
            return Err(too_large(format!("more than {MAX_ROWS} rows")));
        }
        for column in group.columns() {
            let (start, length) = column.byte_range();
            let end = start.checked_add(length).filter(|end| *end <= size);
            let end = end.ok_or_else(|| broken("a column reaches beyond the file"))?;
            let (mut at, mut values) = (start, 0u64);
            while at < end {
                file.seek(SeekFrom::Start(at))?;
                let mut bytes = Vec::new();
                file.take(MAX_HEAD.min(end - at)).read_to_end(&mut bytes)?;
                let head =
                    Head::read(&bytes).ok_or_else(|| broken("the head of a page is damaged"))?;
                if !(0..=MAX_PAGE).contains(&head.unpacked) {
                    return Err(too_large(format!("a page has more than {MAX_PAGE} bytes")));
                }
                unpacked += head.unpacked.unsigned_abs();
                if unpacked > max_bytes {
                    return Err(too_large(format!("more than {max_bytes} bytes")));
                }
                let packed = u64::try_from(head.packed).ok().filter(|packed| *packed <= end - at);
                at += head.length + packed.ok_or_else(|| broken("a page has no end"))?;
                values = values.saturating_add(head.values);
            }
            let repeated = column.column_descr().max_rep_level() > 0;
            let most = if repeated { MAX_REPEATED } else { MAX_ROWS };
            if values > most {
                return Err(too_large(format!(
                    "more than {most} values of column '{:.100}' in a group of rows",
                    column.column_path().string()
                )));
            }
        }
    }
    Ok(())
}

/// The head of a page.
struct Head {
    /// Bytes of the head itself.
    length: u64,
    unpacked: i64,
    packed: i64,
    /// Values of a page of data.
    values: u64,
}

impl Head {
    fn read(bytes: &[u8]) -> Option<Self> {
        let (mut unpacked, mut packed, mut values) = (None, None, 0);
        let mut reader = Reader::new(bytes);
        reader.structure(|reader, id, kind| {
            match (id, kind) {
                (2, _) => unpacked = Some(reader.integer()?),
                (3, _) => packed = Some(reader.integer()?),
                (5 | 8, STRUCT) => reader.structure(|reader, id, _| {
                    if id == 1 {
                        values = u64::try_from(reader.integer()?).ok()?;
                    }
                    Some(id == 1)
                })?,
                _ => return Some(false),
            }
            Some(true)
        })?;
        Some(Self { length: reader.at() as u64, unpacked: unpacked?, packed: packed?, values })
    }
}
