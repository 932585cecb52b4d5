//! Rows of Parquet files, through the crate's row by row reader.

mod check;
mod thrift;

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::file::reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as Record};
use serde_json::{Map, Value};

use super::Row;
use crate::error::{Error, Reason, Result};

/// Rows that the crate decodes at once.
const BATCH: usize = 128;

/// The rows of a file, numbered from 1. Bytes that are no text, dates and times are left out.
pub fn rows(
    path: &Path,
    max_bytes: u64,
) -> Result<impl Iterator<Item = Result<Row>> + Send + use<>> {
    let mut file = File::open(path)?;
    check::footer(&mut file)?;
    let reader = contained(|| SerializedFileReader::new(file.try_clone()?))?;
    contained(|| Ok(check::pages(&mut file, &reader, max_bytes)))??;
    let mut rows =
        contained(|| Ok(RowIter::from_file_into(Box::new(reader)).with_batch_size(BATCH)))?;
    let (mut line, mut left) = (0, max_bytes);
    let mut next = move || -> Result<Option<Row>> {
        line += 1;
        let within = |error: Error| error.within(&format!("row {line}"));
        let Some(record) = contained(|| rows.next().transpose()).map_err(within)? else {
            return Ok(None);
        };
        let fields = object(record, &mut left).ok_or_else(|| {
            Error::new(
                Reason::TooLarge,
                format!("row {line}: more than {max_bytes} bytes of text so far; split the file"),
            )
        })?;
        Ok(Some(Row { line, fields }))
    };
    Ok(std::iter::from_fn(move || next().transpose()))
}

/// Runs code of the crate on data of strangers: a panic is the file's fault and must not take the
/// thread down.
fn contained<T>(run: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| {
            let text = error.to_string();
            if text.contains("compression codec") || text.contains("feature") {
                return Error::new(
                    Reason::UnsupportedFormat,
                    format!("{text:.200}; write the file with snappy, gzip or no compression"),
                );
            }
            broken(text.strip_prefix("Parquet error: ").unwrap_or(&text))
        }),
        Err(_) => Err(broken("its parts contradict each other")),
    }
}

fn broken(what: impl std::fmt::Display) -> Error {
    Error::new(
        Reason::MalformedFile,
        format!("the parquet data cannot be read: {what:.200}; write the file again"),
    )
}

/// The fields of a group; `None` when there is more text than is `left`.
fn object(record: Record, left: &mut u64) -> Option<Map<String, Value>> {
    let mut fields = Map::new();
    for (name, field) in record.into_columns() {
        if let Some(value) = value(field, left)? {
            fields.insert(name, value);
        }
    }
    Some(fields)
}

fn value(field: Field, left: &mut u64) -> Option<Option<Value>> {
    *left = left.checked_sub(1)?;
    Some(Some(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float16(value) => value.to_f64().into(),
        Field::Float(value) => value.into(),
        Field::Double(value) => value.into(),
        Field::Str(text) => {
            *left = left.checked_sub(text.len() as u64)?;
            text.into()
        }
        // Some writers do not say that their strings are text.
        Field::Bytes(bytes) => match bytes.as_utf8() {
            Ok(text) => {
                *left = left.checked_sub(text.len() as u64)?;
                text.into()
            }
            Err(_) => return Some(None),
        },
        Field::Group(record) => Value::Object(object(record, left)?),
        Field::ListInternal(list) => {
            let mut values = Vec::new();
            for field in list.elements() {
                values.push(value(field.clone(), left)?.unwrap_or_default());
            }
            Value::Array(values)
        }
        Field::MapInternal(_)
        | Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => return Some(None),
    }))
}
