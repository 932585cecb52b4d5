//! Writing version 3: the header is planned from shapes alone, then the tensors stream through.

use std::io::{BufWriter, Write};
use std::path::Path;

use super::{ALIGNMENT, Array, MAGIC, Metadata, TensorType, Value, kind};
use crate::error::{Error, Result};
use crate::formats::{check_name, counting::Counting, replacement::Replacement};

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub name: String,
    pub kind: TensorType,
    /// In row order.
    pub shape: Vec<usize>,
}

impl Plan {
    fn bytes(&self) -> Result<u64> {
        self.kind.bytes(&self.shape).map(|n| n as u64).ok_or_else(|| {
            Error::internal(format!("tensor '{}' cannot be stored as {:?}", self.name, self.kind))
        })
    }
}

/// Writes the bytes of the tensor with this index in the plan.
pub type Sink<'a> = dyn FnMut(usize, &mut dyn Write) -> Result<()> + 'a;

/// Writes one file; tensors lie in the order of `tensors`. Equal content gives equal bytes.
pub fn write(
    path: &Path,
    metadata: &Metadata,
    tensors: &[Plan],
    data: &mut Sink<'_>,
) -> Result<()> {
    let header = header(metadata, tensors)?;
    let mut file = Replacement::new(path)?;
    let mut out = Counting::new(BufWriter::with_capacity(1 << 20, file.as_file_mut()));
    out.write_all(&header)?;
    for (index, plan) in tensors.iter().enumerate() {
        pad(&mut out)?;
        let start = out.count();
        data(index, &mut out)?;
        if out.count() - start != plan.bytes()? {
            return Err(Error::internal(format!(
                "tensor '{}' was written with {} bytes instead of {}",
                plan.name,
                out.count() - start,
                plan.bytes()?
            )));
        }
    }
    pad(&mut out)?;
    out.flush()?;
    drop(out);
    file.commit()
}

fn pad<W: Write>(out: &mut Counting<W>) -> Result<()> {
    let n = out.count().next_multiple_of(ALIGNMENT) - out.count();
    out.write_all(&[0; ALIGNMENT as usize][..n as usize])?;
    Ok(())
}

fn header(metadata: &Metadata, tensors: &[Plan]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    put(&mut out, 3_u32.to_le_bytes());
    put(&mut out, (tensors.len() as u64).to_le_bytes());
    put(&mut out, (metadata.len() as u64).to_le_bytes());
    // Readers that stream want to know the architecture before its keys.
    let general = |key: &str| key.starts_with("general.");
    for first in [true, false] {
        for (key, value) in metadata.iter().filter(|(key, _)| general(key) == first) {
            string(&mut out, key);
            put(&mut out, number(value).to_le_bytes());
            self::value(&mut out, value);
        }
    }
    let mut offset = 0_u64;
    for plan in tensors {
        check_name(&plan.name)?;
        string(&mut out, &plan.name);
        put(&mut out, (plan.shape.len() as u32).to_le_bytes());
        for &size in plan.shape.iter().rev() {
            put(&mut out, (size as u64).to_le_bytes());
        }
        put(&mut out, plan.kind.number().to_le_bytes());
        put(&mut out, offset.to_le_bytes());
        offset = (offset + plan.bytes()?).next_multiple_of(ALIGNMENT);
    }
    Ok(out)
}

fn put<const N: usize>(out: &mut Vec<u8>, bytes: [u8; N]) {
    out.extend(bytes);
}

fn string(out: &mut Vec<u8>, text: &str) {
    put(out, (text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn number(value: &Value) -> u32 {
    match value {
        Value::U8(_) => kind::U8,
        Value::I8(_) => kind::I8,
        Value::U16(_) => kind::U16,
        Value::I16(_) => kind::I16,
        Value::U32(_) => kind::U32,
        Value::I32(_) => kind::I32,
        Value::F32(_) => kind::F32,
        Value::Bool(_) => kind::BOOL,
        Value::String(_) => kind::STRING,
        Value::Array(_) => kind::ARRAY,
        Value::U64(_) => kind::U64,
        Value::I64(_) => kind::I64,
        Value::F64(_) => kind::F64,
    }
}

fn value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => put(out, v.to_le_bytes()),
        Value::I8(v) => put(out, v.to_le_bytes()),
        Value::U16(v) => put(out, v.to_le_bytes()),
        Value::I16(v) => put(out, v.to_le_bytes()),
        Value::U32(v) => put(out, v.to_le_bytes()),
        Value::I32(v) => put(out, v.to_le_bytes()),
        Value::F32(v) => put(out, v.to_le_bytes()),
        Value::Bool(v) => put(out, [u8::from(*v)]),
        Value::String(v) => string(out, v),
        Value::Array(v) => array(out, v),
        Value::U64(v) => put(out, v.to_le_bytes()),
        Value::I64(v) => put(out, v.to_le_bytes()),
        Value::F64(v) => put(out, v.to_le_bytes()),
    }
}

fn array(out: &mut Vec<u8>, array: &Array) {
    fn all<T>(out: &mut Vec<u8>, number: u32, items: &[T], one: impl Fn(&mut Vec<u8>, &T)) {
        put(out, number.to_le_bytes());
        put(out, (items.len() as u64).to_le_bytes());
        for item in items {
            one(out, item);
        }
    }
    match array {
        Array::U8(a) => all(out, kind::U8, a, |o, v| put(o, v.to_le_bytes())),
        Array::I8(a) => all(out, kind::I8, a, |o, v| put(o, v.to_le_bytes())),
        Array::U16(a) => all(out, kind::U16, a, |o, v| put(o, v.to_le_bytes())),
        Array::I16(a) => all(out, kind::I16, a, |o, v| put(o, v.to_le_bytes())),
        Array::U32(a) => all(out, kind::U32, a, |o, v| put(o, v.to_le_bytes())),
        Array::I32(a) => all(out, kind::I32, a, |o, v| put(o, v.to_le_bytes())),
        Array::F32(a) => all(out, kind::F32, a, |o, v| put(o, v.to_le_bytes())),
        Array::Bool(a) => all(out, kind::BOOL, a, |o, v| put(o, [u8::from(*v)])),
        Array::String(a) => all(out, kind::STRING, a, |o, v| string(o, v)),
        Array::Array(a) => all(out, kind::ARRAY, a, self::array),
        Array::U64(a) => all(out, kind::U64, a, |o, v| put(o, v.to_le_bytes())),
        Array::I64(a) => all(out, kind::I64, a, |o, v| put(o, v.to_le_bytes())),
        Array::F64(a) => all(out, kind::F64, a, |o, v| put(o, v.to_le_bytes())),
    }
}
