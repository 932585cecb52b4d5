//! Writing: the header is planned from shapes alone, then the tensors stream through.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::formats::{byte_len, check_name, counting::Counting, replacement::Replacement};
use crate::nn::dtype::Dtype;

/// Where the first tensor starts, so that a mapped file's elements are aligned for any kernel.
const ALIGNMENT: usize = 64;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Plan {
    fn bytes(&self) -> Result<usize> {
        byte_len(&self.shape, self.dtype.size())
            .ok_or_else(|| Error::internal(format!("tensor '{}' has no size", self.name)))
    }
}

/// Writes the bytes of the tensor it is given.
pub type Sink<'a> = dyn FnMut(&Plan, &mut dyn Write) -> Result<()> + 'a;

/// Writes one file. Tensors lie in the order of falling element size, then of their names, so that
/// each is aligned to its elements; equal content gives equal bytes.
pub fn write(path: &Path, tensors: &[Plan], data: &mut Sink<'_>) -> Result<()> {
    let mut order: Vec<&Plan> = tensors.iter().collect();
    order.sort_unstable_by(|a, b| {
        b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(&b.name))
    });
    let mut header = Map::new();
    // Other programs take the presence of a format for granted.
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut end = 0;
    for plan in &order {
        check_name(&plan.name)?;
        let start = end;
        end += plan.bytes()?;
        let entry = json!({
            "dtype": plan.dtype.name(), "shape": plan.shape, "data_offsets": [start, end],
        });
        if header.insert(plan.name.clone(), entry).is_some() {
            return Err(Error::internal(format!("tensor '{}' is written twice", plan.name)));
        }
    }
    let mut header = Value::Object(header);
    header.sort_all_objects();
    let mut header = header.to_string().into_bytes();
    header.resize((8 + header.len()).next_multiple_of(ALIGNMENT) - 8, b' ');

    let mut file = Replacement::new(path)?;
    let mut out = Counting::new(BufWriter::with_capacity(1 << 20, file.as_file_mut()));
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for plan in order {
        let start = out.count();
        data(plan, &mut out)?;
        if out.count() - start != plan.bytes()? as u64 {
            return Err(Error::internal(format!(
                "tensor '{}' was written with {} bytes instead of {}",
                plan.name,
                out.count() - start,
                plan.bytes()?
            )));
        }
    }
    out.flush()?;
    drop(out);
    file.commit()
}

/// Writes `model.safetensors`, or shards of at most `limit` bytes (one tensor is never split) with
/// their index. Returns the file names. Of shards that a later one's failure makes useless none stays.
pub fn write_shards(
    folder: &Path,
    tensors: &[Plan],
    limit: u64,
    data: &mut Sink<'_>,
) -> Result<Vec<String>> {
    let mut shards: Vec<&[Plan]> = Vec::new();
    let (mut first, mut held, mut total) = (0, 0, 0);
    for (i, plan) in tensors.iter().enumerate() {
        let bytes = plan.bytes()? as u64;
        if i > first && held + bytes > limit {
            shards.push(&tensors[first..i]);
            (first, held) = (i, 0);
        }
        held += bytes;
        total += bytes;
    }
    shards.push(&tensors[first..]);
    if let [all] = shards[..] {
        let name = "model.safetensors";
        write(&folder.join(name), all, data)?;
        return Ok(vec![name.to_owned()]);
    }
    let mut names = Vec::new();
    let written = put_shards(folder, &shards, total, data, &mut names);
    if written.is_err() {
        for name in &names {
            // Already failing; what cannot be removed stays.
            let _ = fs::remove_file(folder.join(name));
        }
    }
    written.map(|()| names)
}

/// Writes shards and their index, and adds the name of each file that is there.
fn put_shards(
    folder: &Path,
    shards: &[&[Plan]],
    total: u64,
    data: &mut Sink<'_>,
    names: &mut Vec<String>,
) -> Result<()> {
    let mut map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write(&folder.join(&name), shard, data)?;
        map.extend(shard.iter().map(|plan| (plan.name.clone(), name.clone())));
        names.push(name);
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    let name = "model.safetensors.index.json";
    names.push(name.to_owned());
    fs::write(folder.join(name), format!("{index:#}\n"))?;
    Ok(())
}
