//! GGUF files that llama.cpp and its relatives load.

use std::io::Write;
use std::path::Path;

use super::grid::Grid;
use super::hugging_face::{extra_biases, uneven};
use super::report::describe;
use super::{Drift, Report, TensorReport, blocks, each_rows, finite, put_dense};
use crate::error::Result;
use crate::formats::gguf::{Metadata, Plan, TensorType, Value, write};
use crate::formats::tokenizer::to_gguf;
use crate::models::Model;
use crate::models::decoder::Config;
use crate::models::gguf::{
    ROPE_FACTORS, from_config, rope_factors, row_order, shifted_norm, tensor_name,
};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Ggml, GgmlType, Weight};
use crate::progress::Progress;

/// Number format of the matrices of a GGUF export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufFormat {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
}

/// How a GGUF export writes matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gguf {
    /// What becomes of a matrix that is not carried over.
    pub format: GgufFormat,
    /// Matrices are not carried over: blocks and grids are written in `format` too.
    pub decode_grids: bool,
}

impl From<GgufFormat> for Gguf {
    fn from(format: GgufFormat) -> Self {
        Self { format, decode_grids: false }
    }
}

impl GgufFormat {
    fn tensor_type(self) -> TensorType {
        match self {
            Self::F32 => TensorType::F32,
            Self::F16 => TensorType::F16,
            Self::BF16 => TensorType::BF16,
            Self::Q8_0 => TensorType::Blocks(GgmlType::Q8_0),
            Self::Q4_0 => TensorType::Blocks(GgmlType::Q4_0),
            Self::Q4_1 => TensorType::Blocks(GgmlType::Q4_1),
        }
    }
}

/// `general.file_type` of a file most of whose elements are of a type.
fn file_type(kind: TensorType) -> u32 {
    match kind {
        TensorType::F32 => 0,
        TensorType::F16 => 1,
        TensorType::BF16 => 32,
        TensorType::Blocks(kind) => match kind {
            GgmlType::Q4_0 => 2,
            GgmlType::Q4_1 => 3,
            GgmlType::Q8_0 => 7,
            GgmlType::Q5_0 => 8,
            GgmlType::Q5_1 => 9,
            GgmlType::Q2K => 10,
            GgmlType::Q3K => 12,
            GgmlType::Q4K => 15,
            GgmlType::Q5K => 17,
            GgmlType::Q6K => 18,
        },
    }
}

/// How a tensor gets into the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Its blocks are copied.
    Copied,
    /// Its grid becomes blocks that hold the same values.
    Carried,
    /// Its values are written in a type that may round them.
    Written,
}

/// A tensor on its way.
struct Source<'a> {
    name: String,
    weight: &'a Weight,
    way: Way,
}

/// Writes one GGUF file. Matrices that are blocks already are copied, and grids that a block type holds
/// exactly become such blocks; all others get `options.format`, except that the embeddings and the head stay
/// at Q8_0 where it has 4 bits (they cost the most quality), and that rows that are not whole blocks stay at
/// F16. Vectors are F32.
///
/// # Errors
/// `UNSUPPORTED_MODEL` for settings that GGUF files cannot express, `MODEL_UNSUITABLE` for encoders and
/// tokenizers of other kinds, `NON_FINITE` for values that F16 cannot hold, `CANCELLED`.
pub fn gguf(
    model: &Model,
    file: &Path,
    options: impl Into<Gguf>,
    progress: &Progress,
) -> Result<Report> {
    let options = options.into();
    let config = model.decoder()?;
    let mut metadata = from_config(config)?;
    metadata.set("general.quantization_version", Value::U32(2));
    add_tokenizer(&mut metadata, model, config)?;

    let factors = rope_factors(&config.rope, config.head_dim);
    let mut plans = Vec::new();
    let mut sources = Vec::new();
    if let Some(factors) = &factors {
        let name = ROPE_FACTORS.to_owned();
        plans.push(Plan { name, kind: TensorType::F32, shape: vec![factors.len()] });
        sources.push(None);
    }
    for (name, shape) in config.tensors() {
        progress.check()?;
        let weight = model.weight(&name)?;
        let (kind, way) = kind_of(&name, weight, options, progress).map_err(|e| e.within(&name))?;
        plans.push(Plan { name: tensor_name(config, &name)?, kind, shape });
        sources.push(Some(Source { name, weight, way }));
    }
    let matrices = plans.iter().filter(|plan| plan.shape.len() == 2);
    metadata.set("general.file_type", Value::U32(most(matrices).map_or(1, file_type)));

    let mut tensors = Vec::new();
    write(file, &metadata, &plans, &mut |index, out| {
        let plan = &plans[index];
        let Some(source) = &sources[index] else {
            let factors = factors.as_deref().unwrap_or_default();
            return put_dense(factors, Dtype::F32, out, &mut Drift::default());
        };
        let drift =
            put(config, source, plan.kind, out, progress).map_err(|e| e.within(&source.name))?;
        let kind = match plan.kind {
            TensorType::Blocks(kind) => format!("{kind:?}"),
            dense => format!("{dense:?}"),
        };
        tensors.push(TensorReport {
            name: source.name.clone(),
            stored_as: describe(source.weight),
            written_as: kind,
            bytes: plan.kind.bytes(&plan.shape).unwrap_or(0) as u64,
            carried: source.way != Way::Written,
            drift,
        });
        Ok(())
    })?;
    // The file says all of this, and readers other than planish take neither.
    let odd = uneven(&model.config).into_iter().chain(extra_biases(&model.config));
    let warnings = odd.map(|odd| {
        format!("{odd}: planish reads this file, llama.cpp and its relatives do not load it")
    });
    Ok(Report { tensors, warnings: warnings.collect() })
}

/// The type of most elements.
fn most<'a>(plans: impl Iterator<Item = &'a Plan>) -> Option<TensorType> {
    let mut counts: Vec<(TensorType, usize)> = Vec::new();
    for plan in plans {
        let elements = plan.shape.iter().product::<usize>();
        match counts.iter_mut().find(|(kind, _)| *kind == plan.kind) {
            Some((_, count)) => *count += elements,
            None => counts.push((plan.kind, elements)),
        }
    }
    counts.into_iter().max_by_key(|(_, count)| *count).map(|(kind, _)| kind)
}

fn kind_of(
    name: &str,
    weight: &Weight,
    options: Gguf,
    progress: &Progress,
) -> Result<(TensorType, Way)> {
    let wanted = tensor_type(name, weight.shape(), options.format);
    if let Weight::Ggml(blocks) = weight {
        let own = TensorType::Blocks(blocks.kind());
        return Ok(match options.decode_grids && own != wanted {
            true => (wanted, Way::Written),
            false => (own, Way::Copied),
        });
    }
    if let Some(grid) = Grid::of(weight).filter(|_| !options.decode_grids)
        && let Some(kind) = blocks::carrier(&grid, progress)?
    {
        return Ok((TensorType::Blocks(kind), Way::Carried));
    }
    Ok((wanted, Way::Written))
}

fn add_tokenizer(metadata: &mut Metadata, model: &Model, config: &Config) -> Result<()> {
    match &model.tokenizer {
        Some(tokenizer) => {
            for (key, value) in to_gguf(tokenizer, config.vocab)? {
                metadata.set(key, value);
            }
        }
        // Readers want to be told that ids are all there is.
        None => metadata.set("tokenizer.ggml.model", Value::String("none".to_owned())),
    }
    Ok(())
}

fn tensor_type(name: &str, shape: &[usize], format: GgufFormat) -> TensorType {
    let &[_, cols] = shape else { return TensorType::F32 };
    let kind = match format {
        GgufFormat::Q4_0 | GgufFormat::Q4_1 if !name.starts_with("model.layers.") => {
            TensorType::Blocks(GgmlType::Q8_0)
        }
        _ => format.tensor_type(),
    };
    if cols.is_multiple_of(kind.block().0) { kind } else { TensorType::F16 }
}

fn put(
    config: &Config,
    Source { name, weight, way }: &Source<'_>,
    kind: TensorType,
    out: &mut dyn Write,
    progress: &Progress,
) -> Result<Drift> {
    let order = row_order(config, name);
    let order = order.as_deref();
    let mut drift = Drift::default();
    let dense = match (kind, way, weight) {
        (TensorType::Blocks(_), Way::Copied, Weight::Ggml(blocks)) => {
            match order {
                Some(order) => out.write_all(blocks.permute_rows(order).data())?,
                None => out.write_all(blocks.data())?,
            }
            return Ok(drift);
        }
        (TensorType::Blocks(kind), Way::Carried, weight) => {
            let Some(grid) = Grid::of(weight) else { return Ok(drift) };
            return blocks::put(&grid, kind, order, out, progress);
        }
        (TensorType::Blocks(kind), ..) => {
            let cols = weight.cols();
            let mut back = Vec::new();
            each_rows(weight, order, progress, |rows| {
                finite(rows)?;
                let blocks = Ggml::quantize([rows.len() / cols, cols], kind, rows)?;
                back.resize(rows.len(), 0.0);
                blocks.read_rows(0, &mut back);
                drift.add_all(rows, &back);
                out.write_all(blocks.data())?;
                Ok(())
            })?;
            return Ok(drift);
        }
        (TensorType::F32, ..) if shifted_norm(config, name) => {
            let values: Vec<f32> = weight.to_f32().iter().map(|v| v + 1.0).collect();
            put_dense(&values, Dtype::F32, out, &mut drift)?;
            return Ok(drift);
        }
        (TensorType::F16, ..) => Dtype::F16,
        (TensorType::BF16, ..) => Dtype::BF16,
        (TensorType::F32, ..) => Dtype::F32,
    };
    each_rows(weight, order, progress, |rows| put_dense(rows, dense, out, &mut drift))?;
    Ok(drift)
}
