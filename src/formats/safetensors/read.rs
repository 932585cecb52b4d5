//! Reading: nothing is believed before it is checked, nothing is copied.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::path::Path;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::MAX_HEADER;
use crate::error::{Error, Reason, Result};
use crate::formats::{MAX_RANK, byte_len, check_file_name, check_name, malformed, mmap, quoted};
use crate::nn::dtype::Dtype;

/// A tensor of a file: little-endian elements in row order.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Bytes,
}

/// The checked content of a file.
#[derive(Debug, Clone, Default)]
pub struct File {
    pub tensors: BTreeMap<String, Tensor>,
    /// The header's `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// Maps and reads the file at `path`.
///
/// # Errors
/// `MALFORMED_FILE` for a file that breaks the format, `UNSUPPORTED_FORMAT` for element types that
/// are not read here.
pub fn open(path: &Path) -> Result<File> {
    File::parse(mmap::map(path)?).map_err(|e| e.within(&path.display().to_string()))
}

impl File {
    /// Reads a whole file's bytes. Every byte behind the header belongs to exactly one tensor.
    pub fn parse(file: Bytes) -> Result<Self> {
        let (length, rest) = file
            .split_first_chunk::<8>()
            .ok_or_else(|| malformed("the file is too short for a safetensors header"))?;
        let length = usize::try_from(u64::from_le_bytes(*length))
            .ok()
            .filter(|&n| n <= MAX_HEADER && n <= rest.len())
            .ok_or_else(|| {
                malformed("the safetensors header is longer than the file or the limit of 100 MB")
            })?;
        let header: Header<'_> = serde_json::from_slice(&rest[..length])
            .map_err(|e| malformed(format!("the safetensors header cannot be read: {e}")))?;
        let data = file.slice(8 + length..);

        let mut order: Vec<_> = header.tensors.iter().collect();
        order.sort_unstable_by_key(|(_, entry)| entry.data_offsets);
        let mut tensors = BTreeMap::new();
        let mut position = 0;
        for (name, entry) in order {
            let tensor = entry.read(name, &data, &mut position)?;
            tensors.insert(name.clone().into_owned(), tensor);
        }
        if position != data.len() {
            return Err(malformed(format!(
                "{} bytes follow the last tensor",
                data.len() - position
            )));
        }
        Ok(Self { tensors, metadata: header.metadata })
    }
}

/// The map of a sharded checkpoint's index: tensor name to file name. File names are plain.
pub fn read_index(json: &[u8]) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(json).map_err(|e| {
        malformed(format!("the index of the safetensors files cannot be read: {e}"))
    })?;
    for (name, file) in &index.weight_map {
        check_name(name)?;
        check_file_name(file)?;
    }
    Ok(index.weight_map)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl Entry<'_> {
    /// The tensor, which must start at `position`; moves that to its end.
    fn read(&self, name: &str, data: &Bytes, position: &mut usize) -> Result<Tensor> {
        check_name(name)?;
        let dtype = super::dtype(&self.dtype).ok_or_else(|| {
            Error::new(
                Reason::UnsupportedFormat,
                format!(
                    "tensor {} has the type {}, which is not read here; store it as F32, F16 or BF16",
                    quoted(name),
                    quoted(&self.dtype)
                ),
            )
        })?;
        let (start, end) = self.data_offsets;
        if self.shape.len() > MAX_RANK {
            return Err(malformed(format!("tensor {} has too many dimensions", quoted(name))));
        }
        if start != *position || end < start || end > data.len() {
            return Err(malformed(format!(
                "tensor {} lies at bytes {start}..{end}, which overlap another tensor, leave a gap or \
                 pass the end of the file",
                quoted(name)
            )));
        }
        if byte_len(&self.shape, dtype.size()) != Some(end - start) {
            return Err(malformed(format!(
                "tensor {} of type {dtype} and shape {:?} does not fill its {} bytes",
                quoted(name),
                self.shape,
                end - start
            )));
        }
        *position = end;
        Ok(Tensor { dtype, shape: self.shape.clone(), data: data.slice(start..end) })
    }
}

/// The header with every name once: a map type would let a second entry silently win.
struct Header<'a> {
    tensors: BTreeMap<Cow<'a, str>, Entry<'a>>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Header<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

/// A string that is borrowed from the header where it has no escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header<'de>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut tensors = BTreeMap::new();
        let mut metadata = None;
        while let Some(Name(name)) = map.next_key()? {
            if name == "__metadata__" {
                if metadata.replace(map.next_value()?).is_some() {
                    return Err(A::Error::custom("__metadata__ appears twice"));
                }
                continue;
            }
            match tensors.entry(name) {
                Slot::Vacant(slot) => {
                    slot.insert(map.next_value()?);
                }
                Slot::Occupied(slot) => {
                    let name = quoted(slot.key());
                    return Err(A::Error::custom(format_args!("tensor {name} appears twice")));
                }
            }
        }
        Ok(Header { tensors, metadata: metadata.unwrap_or_default() })
    }
}
