//! Reading: every count is held against the bytes that are left before memory is taken for it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;

use bytes::Bytes;

use super::{
    ALIGNMENT, ALIGNMENT_KEY, Array, MAGIC, Metadata, TensorType, Value, foreign_type, kind,
};
use crate::error::{Error, Reason, Result};
use crate::formats::{check_name, malformed, mmap, quoted};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Ggml, Weight};

/// Most levels of arrays within arrays.
const MAX_NESTING: usize = 4;

/// Largest alignment that is believed; files use 32.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// A tensor of a file.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub kind: TensorType,
    /// In row order, so `[out, in]` for matrices: the reverse of the order in the file.
    pub shape: Vec<usize>,
    pub data: Bytes,
}

impl Tensor {
    /// The tensor as a weight, without a copy.
    ///
    /// # Errors
    /// `UNSUPPORTED_FORMAT` for block types in a tensor that is no matrix.
    pub fn weight(&self) -> Result<Weight> {
        let dense = |dtype| Dense::new(self.shape.clone(), dtype, self.data.clone());
        Ok(match (self.kind, &self.shape[..]) {
            (TensorType::F32, _) => Weight::Dense(dense(Dtype::F32)?),
            (TensorType::F16, _) => Weight::Dense(dense(Dtype::F16)?),
            (TensorType::BF16, _) => Weight::Dense(dense(Dtype::BF16)?),
            (TensorType::Blocks(kind), &[rows, cols]) => {
                Weight::Ggml(Ggml::new([rows, cols], kind, self.data.clone())?)
            }
            (TensorType::Blocks(kind), shape) => {
                return Err(Error::new(
                    Reason::UnsupportedFormat,
                    format!(
                        "{kind:?} blocks in a tensor of shape {shape:?}; only matrices may have them"
                    ),
                ));
            }
        })
    }
}

/// The checked content of a file.
#[derive(Debug, Clone)]
pub struct File {
    pub version: u32,
    pub metadata: Metadata,
    pub tensors: BTreeMap<String, Tensor>,
}

/// Whether the file begins like a GGUF file.
pub fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    fs::File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && magic == MAGIC
}

/// Maps and reads the file at `path`.
///
/// # Errors
/// `MALFORMED_FILE` for a file that breaks the format, `UNSUPPORTED_FORMAT` for other versions, big-endian
/// files and tensor types that are not read here.
pub fn open(path: &Path) -> Result<File> {
    File::parse(mmap::map(path)?).map_err(|e| e.within(&path.display().to_string()))
}

impl File {
    /// Reads a whole file's bytes; tensors are slices of them.
    pub fn parse(file: Bytes) -> Result<Self> {
        let mut cursor = Cursor { rest: &file };
        if cursor.take(4)? != MAGIC {
            return Err(Error::new(
                Reason::UnsupportedFormat,
                "the file does not begin with 'GGUF'; name a GGUF file",
            ));
        }
        let version = cursor.u32()?;
        match version {
            2 | 3 => {}
            v if matches!(v.swap_bytes(), 1..=3) => {
                return Err(Error::new(
                    Reason::UnsupportedFormat,
                    "the GGUF file is big-endian; convert the model on a little-endian machine",
                ));
            }
            v => {
                return Err(Error::new(
                    Reason::UnsupportedFormat,
                    format!(
                        "GGUF version {v} is not read here, only 2 and 3; convert the model again"
                    ),
                ));
            }
        }
        // An entry has at least a name's length, dimensions' number, one dimension, type and offset.
        let tensors = cursor.u64()?;
        let pairs = cursor.u64()?;
        let tensors = cursor.fits(tensors, 32, "tensors")?;
        let pairs = cursor.fits(pairs, 13, "metadata pairs")?;

        let mut metadata = Metadata::default();
        for _ in 0..pairs {
            let key = cursor.string()?;
            let number = cursor.u32()?;
            let value = cursor
                .value(number)
                .map_err(|e| e.within(&format!("metadata key {}", quoted(&key))))?;
            if !metadata.insert_new(key.clone(), value) {
                return Err(malformed(format!("metadata key {} appears twice", quoted(&key))));
            }
        }
        let alignment = metadata.unsigned(ALIGNMENT_KEY)?.unwrap_or(ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return Err(malformed(format!(
                "{ALIGNMENT_KEY} is {alignment}, not a small power of two"
            )));
        }

        let mut infos = BTreeMap::new();
        for _ in 0..tensors {
            let (name, info) = cursor.info(alignment)?;
            let shown = quoted(&name);
            if infos.insert(name, info).is_some() {
                return Err(malformed(format!("tensor {shown} appears twice")));
            }
        }
        let header = (file.len() - cursor.rest.len()).next_multiple_of(alignment as usize);
        let data = file.slice(header.min(file.len())..);
        check_ranges(&infos, data.len() as u64)?;
        let tensors = infos
            .into_iter()
            .map(|(name, info)| {
                let start = info.offset as usize;
                let data = data.slice(start..start + info.bytes as usize);
                (name, Tensor { kind: info.kind, shape: info.shape, data })
            })
            .collect();
        Ok(Self { version, metadata, tensors })
    }
}

/// What a file says of a tensor.
struct Info {
    kind: TensorType,
    shape: Vec<usize>,
    offset: u64,
    bytes: u64,
}

/// Every tensor lies within the data and on bytes of its own.
fn check_ranges(infos: &BTreeMap<String, Info>, len: u64) -> Result<()> {
    let mut order: Vec<_> = infos.iter().collect();
    order.sort_unstable_by_key(|(_, info)| info.offset);
    let mut free = 0;
    for (name, info) in order {
        let end = info.offset.checked_add(info.bytes).filter(|&end| end <= len);
        let Some(end) = end.filter(|_| info.offset >= free) else {
            return Err(malformed(format!(
                "tensor {} ({} bytes at {} of {len}) overlaps another or passes the end of the file",
                quoted(name),
                info.bytes,
                info.offset,
            )));
        };
        free = end;
    }
    Ok(())
}

/// The bytes of the header that have not been read.
struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (taken, rest) =
            self.rest.split_at_checked(n).ok_or_else(|| malformed("the GGUF header is cut off"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or_else(|| malformed("the GGUF header is cut off"))?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// `count` as a size, if that many things of at least `each` bytes can still follow.
    fn fits(&self, count: u64, each: usize, what: &str) -> Result<usize> {
        match usize::try_from(count) {
            Ok(n) if n <= self.rest.len() / each => Ok(n),
            _ => Err(malformed(format!(
                "the header promises {count} {what}, more than the file holds"
            ))),
        }
    }

    fn string(&mut self) -> Result<String> {
        let count = self.u64()?;
        let length = self.fits(count, 1, "bytes of text")?;
        let text = std::str::from_utf8(self.take(length)?)
            .map_err(|_| malformed("a text of the GGUF header is not UTF-8"))?;
        Ok(text.to_owned())
    }

    fn bool(&mut self) -> Result<bool> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [n] => Err(malformed(format!("{n} stands for a truth value"))),
        }
    }

    fn value(&mut self, number: u32) -> Result<Value> {
        Ok(match number {
            kind::U8 => Value::U8(u8::from_le_bytes(self.array()?)),
            kind::I8 => Value::I8(i8::from_le_bytes(self.array()?)),
            kind::U16 => Value::U16(u16::from_le_bytes(self.array()?)),
            kind::I16 => Value::I16(i16::from_le_bytes(self.array()?)),
            kind::U32 => Value::U32(self.u32()?),
            kind::I32 => Value::I32(i32::from_le_bytes(self.array()?)),
            kind::F32 => Value::F32(f32::from_le_bytes(self.array()?)),
            kind::BOOL => Value::Bool(self.bool()?),
            kind::STRING => Value::String(self.string()?),
            kind::ARRAY => Value::Array(self.values(MAX_NESTING)?),
            kind::U64 => Value::U64(self.u64()?),
            kind::I64 => Value::I64(i64::from_le_bytes(self.array()?)),
            kind::F64 => Value::F64(f64::from_le_bytes(self.array()?)),
            n => return Err(malformed(format!("{n} is not the number of a value type"))),
        })
    }

    fn values(&mut self, nesting: usize) -> Result<Array> {
        let number = self.u32()?;
        let count = self.u64()?;
        Ok(match number {
            kind::U8 => Array::U8(self.numbers(count, u8::from_le_bytes)?),
            kind::I8 => Array::I8(self.numbers(count, i8::from_le_bytes)?),
            kind::U16 => Array::U16(self.numbers(count, u16::from_le_bytes)?),
            kind::I16 => Array::I16(self.numbers(count, i16::from_le_bytes)?),
            kind::U32 => Array::U32(self.numbers(count, u32::from_le_bytes)?),
            kind::I32 => Array::I32(self.numbers(count, i32::from_le_bytes)?),
            kind::F32 => Array::F32(self.numbers(count, f32::from_le_bytes)?),
            kind::BOOL => Array::Bool(self.repeat(count, 1, Self::bool)?),
            kind::STRING => Array::String(self.repeat(count, 8, Self::string)?),
            kind::ARRAY if nesting > 1 => {
                Array::Array(self.repeat(count, 12, |c| c.values(nesting - 1))?)
            }
            kind::ARRAY => {
                return Err(malformed(format!("arrays lie more than {MAX_NESTING} levels deep")));
            }
            kind::U64 => Array::U64(self.numbers(count, u64::from_le_bytes)?),
            kind::I64 => Array::I64(self.numbers(count, i64::from_le_bytes)?),
            kind::F64 => Array::F64(self.numbers(count, f64::from_le_bytes)?),
            n => return Err(malformed(format!("{n} is not the number of a value type"))),
        })
    }

    fn numbers<const N: usize, T>(&mut self, count: u64, read: fn([u8; N]) -> T) -> Result<Vec<T>> {
        self.repeat(count, N, |c| c.array().map(read))
    }

    /// `count` things, each of which takes at least `least` bytes.
    fn repeat<T>(
        &mut self,
        count: u64,
        least: usize,
        mut read: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let count = self.fits(count, least, "array elements")?;
        // A lie about the last elements is found when they are missing; until then memory grows only as
        // fast as elements are read.
        let mut out = Vec::with_capacity(count.min(4096));
        for _ in 0..count {
            out.push(read(self)?);
        }
        Ok(out)
    }

    fn info(&mut self, alignment: u64) -> Result<(String, Info)> {
        let name = self.string()?;
        check_name(&name)?;
        let wrong = |what: String| malformed(format!("tensor {} {what}", quoted(&name)));
        let rank = self.u32()?;
        if !matches!(rank, 1..=4) {
            return Err(wrong(format!("has {rank} dimensions, not 1 to 4")));
        }
        let mut shape = Vec::with_capacity(4);
        for _ in 0..rank {
            let size = self.u64()?;
            match usize::try_from(size) {
                Ok(n) if n > 0 => shape.insert(0, n),
                _ => return Err(wrong(format!("has a dimension of {size}"))),
            }
        }
        let number = self.u32()?;
        let kind = TensorType::from_number(number).ok_or_else(|| {
            Error::new(
                Reason::UnsupportedFormat,
                format!(
                    "tensor {} has the type {}, which is not read here; take a file of F32, F16, BF16, \
                     Q4_0 to Q8_0 or Q2_K to Q6_K",
                    quoted(&name),
                    foreign_type(number)
                ),
            )
        })?;
        let bytes = kind
            .bytes(&shape)
            .ok_or_else(|| wrong(format!("of type {kind:?} cannot have the shape {shape:?}")))?;
        let offset = self.u64()?;
        if !offset.is_multiple_of(alignment) {
            return Err(wrong(format!("begins at {offset}, which is not aligned to {alignment}")));
        }
        Ok((name, Info { kind, shape, offset, bytes: bytes as u64 }))
    }
}
