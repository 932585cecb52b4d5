//! Adapters in our own files: what was trained, and what the rest can be made from. Factors that a seed or
//! the base gives are not stored: an adapter of NOLA is its coefficients, one of LoLDU its diagonals.
//!
//! Two files: `adapter.json` says the method, the base and the form of each module; `adapter.safetensors`
//! holds the tensors, named as they are in training.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::basis::{Basis, Combined, Rounded};
use super::find;
use super::loldu;
use super::module::{Core, Factor, Magnitude, Module, Part, Start, row_squares};
use super::shapes::{Shapes, module};
use super::tuned::Tuned;
use crate::error::{Error, Reason, Result};
use crate::formats::peft::{Folder, Plain};
use crate::formats::{malformed, quoted, safetensors};
use crate::kernels::philox;
use crate::nn::dtype::Dtype;
use crate::nn::linalg;
use crate::nn::weight::Weight;
use crate::proto::v1;

/// Names of the two files.
pub const HEADER: &str = "adapter.json";
pub const TENSORS: &str = "adapter.safetensors";

/// Largest header.
const MAX_HEADER: u64 = 16 << 20;
/// Largest rank and number of random matrices that are believed.
const MAX_RANK: usize = 1 << 14;
const MAX_COUNT: usize = 1 << 20;
/// Random numbers of a factor, at most: a few seconds of work.
const MAX_DRAWN: usize = 1 << 34;
const VERSION: u32 = 1;

/// `adapter.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    /// The method with all its options.
    adaptation: v1::Adaptation,
    /// Digest of the base's weights.
    base: String,
    dropout: f32,
    /// By the names of the weights.
    modules: BTreeMap<String, Form>,
    /// Tensors that were trained whole.
    whole: Vec<String>,
}

/// The form of a module.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    shape: [usize; 2],
    rank: usize,
    scale: f64,
    rslora: bool,
    a: Source,
    b: Source,
    core: CoreForm,
    /// The product at the start is stored and subtracted.
    start: bool,
    magnitude: bool,
}

/// Where a factor comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Source {
    Trained,
    Frozen,
    /// The triangles of the weight's decomposition, these components.
    Ldu(Vec<usize>),
    /// Random matrices; the coefficients are stored, as codes where `rounded` is given.
    Basis {
        generator: String,
        key: [u32; 2],
        count: usize,
        rounded: Option<Rounding>,
    },
}

/// How coefficients are given back from their codes: `low + step * code`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rounding {
    bits: u32,
    low: f32,
    step: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CoreForm {
    None,
    Matrix,
    Diagonal,
}

/// Names of trained cores that files may have.
const CORES: [&str; 4] = ["lora_R", "lora_E", "lora_g", "lora_z"];

/// Writes an adapter. `base` is the digest of its base's weights.
///
/// # Errors
/// INTERNAL for an adapter whose parts make no sense; IO.
pub fn write(tuned: &Tuned, adaptation: &v1::Adaptation, base: &str, folder: &Path) -> Result<()> {
    let mut tensors: BTreeMap<String, safetensors::Tensor> = BTreeMap::new();
    let mut modules = BTreeMap::new();
    for (linear, adapter) in &tuned.modules {
        modules.insert(linear.clone(), take_apart(adapter, &mut tensors)?);
    }
    for (name, var) in &tuned.whole {
        let values = var.flatten_all()?.to_vec1::<f32>()?;
        tensors.insert(name.clone(), Plain::new(var.dims(), values).into_tensor());
    }
    let header = Header {
        version: VERSION,
        adaptation: adaptation.clone(),
        base: base.to_owned(),
        dropout: tuned.dropout,
        modules,
        whole: tuned.whole.keys().cloned().collect(),
    };
    let json = serde_json::to_value(&header).map_err(|e| {
        Error::internal("the header of an adapter cannot be written").with_source(e)
    })?;
    let serde_json::Value::Object(json) = json else {
        return Err(Error::internal("the header of an adapter is no object"));
    };
    let mut files = Folder::new(json, BTreeMap::new())?;
    files.tensors = tensors;
    files.write_as(folder, HEADER, TENSORS)
}

/// Puts the tensors of a module into `tensors`; what is not stored is named in the form.
fn take_apart(
    adapter: &Module,
    tensors: &mut BTreeMap<String, safetensors::Tensor>,
) -> Result<Form> {
    let path = module(&adapter.linear);
    let ([rows, cols], rank) = (adapter.shape, adapter.rank);
    let mut put = |kind: &str, shape: &[usize], values: Vec<f32>| {
        tensors.insert(format!("{path}.{kind}"), Plain::new(shape, values).into_tensor());
    };
    let core = match &adapter.core {
        Core::Identity => CoreForm::None,
        Core::Matrix(core) => {
            put(adapter.core_name, &[rank, rank], core.values()?);
            CoreForm::Matrix
        }
        Core::Diagonal(core) => {
            let mut values = core.values()?;
            // The function depends on the difference alone.
            if let Some(Start::Diagonal(start)) = &adapter.start {
                values.iter_mut().zip(start.to_vec1::<f32>()?).for_each(|(z, s)| *z -= s);
            }
            put(adapter.core_name, &[rank], values);
            CoreForm::Diagonal
        }
    };
    if let Some(Start::Factors { a, b }) = &adapter.start {
        put("start_A", &[rank, cols], a.flatten_all()?.to_vec1()?);
        put("start_B", &[rows, rank], b.flatten_all()?.to_vec1()?);
    }
    if let Some(magnitude) = &adapter.magnitude {
        put("lora_magnitude_vector", &[rows], magnitude.values.values()?);
    }
    let mut source = |factor: &Factor, kinds: [&str; 2], shape: [usize; 2]| -> Result<Source> {
        Ok(match (factor, &adapter.ldu) {
            (Factor::Plain(Part::Fixed(_)), Some(components)) => Source::Ldu(components.clone()),
            (Factor::Plain(part), _) => {
                let name = format!("{path}.{}", kinds[0]);
                tensors.insert(name, Plain::new(&shape, part.values()?).into_tensor());
                match part {
                    Part::Trained(_) => Source::Trained,
                    Part::Fixed(_) => Source::Frozen,
                }
            }
            (Factor::Combined(combined), _) => {
                let name = format!("{path}.{}", kinds[1]);
                let Basis { key, count, .. } = combined.basis;
                let rounded = combined.rounded()?;
                let (tensor, rounded) = match rounded {
                    None => {
                        let values = combined.coefficients.to_vec1::<f32>()?;
                        (Plain::new(&[count], values).into_tensor(), None)
                    }
                    Some(Rounded { bits, low, step, codes }) => {
                        let data = if bits == 4 { pack(&codes) } else { codes };
                        let shape = vec![data.len()];
                        let tensor =
                            safetensors::Tensor { dtype: Dtype::U8, shape, data: data.into() };
                        (tensor, Some(Rounding { bits, low, step }))
                    }
                };
                tensors.insert(name, tensor);
                let generator = philox::NAME.to_owned();
                Source::Basis { generator, key, count, rounded }
            }
        })
    };
    Ok(Form {
        shape: adapter.shape,
        rank,
        scale: adapter.scale,
        rslora: adapter.rslora,
        a: source(&adapter.a, ["lora_A", "nola_A"], [rank, cols])?,
        b: source(&adapter.b, ["lora_B", "nola_B"], [rows, rank])?,
        core,
        start: matches!(adapter.start, Some(Start::Factors { .. })),
        magnitude: adapter.magnitude.is_some(),
    })
}

/// Two 4-bit codes a byte, the first in the low bits.
fn pack(codes: &[u8]) -> Vec<u8> {
    codes.chunks(2).map(|pair| pair[0] | pair.get(1).map_or(0, |code| code << 4)).collect()
}

fn unpack(bytes: &[u8], count: usize) -> Vec<u8> {
    bytes.iter().flat_map(|byte| [byte & 15, byte >> 4]).take(count).collect()
}

/// What was read.
#[derive(Debug)]
pub struct Read {
    pub tuned: Tuned,
    pub adaptation: v1::Adaptation,
    pub base: String,
}

/// Reads an adapter of a base from its folder. `digest` is that of the base's weights.
///
/// # Errors
/// As [`open`].
pub fn read(
    folder: &Path,
    digest: &str,
    shapes: &Shapes,
    weights: &BTreeMap<String, Arc<Weight>>,
) -> Result<Read> {
    open([&folder.join(HEADER), &folder.join(TENSORS)], Some(digest), shapes, weights)
}

/// Reads an adapter from its two files, wherever they lie. `digest` is that of the base's weights; without
/// one the adapter may be of another version of its model, where none of its parts is made from the base's
/// weights.
///
/// # Errors
/// SOURCE_UNAVAILABLE for missing files, MALFORMED_FILE for what breaks the form, UNSUPPORTED_FORMAT for
/// another version or generator, MODEL_UNSUITABLE for another base.
pub fn open(
    [header, tensors]: [&Path; 2],
    digest: Option<&str>,
    shapes: &Shapes,
    weights: &BTreeMap<String, Arc<Weight>>,
) -> Result<Read> {
    for (name, path) in [(HEADER, header), (TENSORS, tensors)] {
        if !path.is_file() {
            return Err(Error::new(
                Reason::SourceUnavailable,
                format!(
                    "the adapter lacks {name}; name the folder that an adapter was exported to"
                ),
            ));
        }
    }
    if std::fs::metadata(header)?.len() > MAX_HEADER {
        return Err(malformed(format!("{HEADER} has more than {MAX_HEADER} bytes")));
    }
    let header: Header = serde_json::from_slice(&std::fs::read(header)?)
        .map_err(|e| malformed(format!("{HEADER} cannot be read: {e}")))?;
    if header.version != VERSION {
        return Err(Error::new(
            Reason::UnsupportedFormat,
            format!("{HEADER} has version {}, but {VERSION} is read", header.version),
        ));
    }
    let of_base = |form: &Form| {
        form.magnitude || [&form.a, &form.b].iter().any(|s| matches!(s, Source::Ldu(_)))
    };
    let other = match digest {
        Some(digest) => header.base != digest,
        None => false,
    };
    if other {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            format!(
                "the adapter was made for the base {}, not for {}; name the version that it was \
                 trained on",
                quoted(&header.base),
                digest.unwrap_or_default()
            ),
        ));
    }
    if let (None, Some((linear, _))) = (digest, header.modules.iter().find(|(_, f)| of_base(f))) {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            format!(
                "the adapter of {} is made from the weights that it was trained on; name that version",
                quoted(linear)
            ),
        ));
    }
    if !(0.0..1.0).contains(&header.dropout) {
        return Err(malformed(format!("the dropout of {HEADER} is absurd")));
    }
    let mut file = Tensors(safetensors::open(tensors)?.tensors);
    let mut tuned = Tuned::new(header.dropout, "");
    // Decompositions take their time, so they are shared out.
    let mut forms = Vec::with_capacity(header.modules.len());
    for (linear, form) in &header.modules {
        check(linear, form, shapes)?;
        forms.push((linear, form, Parts::take(linear, form, &mut file)?));
    }
    let made: Vec<Module> = forms
        .into_par_iter()
        .map(|(linear, form, parts)| parts.put_together(linear, form, weights))
        .collect::<Result<_>>()?;
    tuned.modules = made.into_iter().map(|m| (m.linear.clone(), m)).collect();
    for name in &header.whole {
        let shape = shapes.tensors.get(name).ok_or_else(|| stranger(name))?;
        let values = file.floats(name, shape)?;
        tuned.whole.insert(name.clone(), Var::from_vec(values, shape.as_slice(), &Device::Cpu)?);
    }
    if let Some(name) = file.0.keys().next() {
        return Err(malformed(format!("{TENSORS} holds {}, which no module has", quoted(name))));
    }
    Ok(Read { tuned, adaptation: header.adaptation, base: header.base })
}

fn stranger(name: &str) -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        format!("the adapter has {}, which the model has not in this shape", quoted(name)),
    )
}

/// Refuses forms that fit no weight or are absurd, before anything is allocated for them.
fn check(linear: &str, form: &Form, shapes: &Shapes) -> Result<()> {
    let known = shapes.linears.iter().any(|(name, shape)| name == linear && *shape == form.shape);
    if !known {
        return Err(stranger(linear));
    }
    let absurd = |what: &str| malformed(format!("{what} of {} is absurd", quoted(linear)));
    if form.rank == 0 || form.rank > MAX_RANK {
        return Err(absurd("the rank"));
    }
    if !form.scale.is_finite() || !(form.scale as f32).is_finite() {
        return Err(absurd("the scale"));
    }
    let smaller = form.shape[0].min(form.shape[1]);
    for source in [&form.a, &form.b] {
        match source {
            Source::Ldu(components) => {
                let ordered = components.is_sorted_by(|a, b| a < b);
                let last = components.last().is_some_and(|c| *c < smaller);
                if !ordered || !last || components.len() != form.rank {
                    return Err(absurd("the list of components"));
                }
            }
            Source::Basis { generator, count, rounded, .. } => {
                if generator != philox::NAME {
                    return Err(Error::new(
                        Reason::UnsupportedFormat,
                        format!(
                            "the random numbers of {} come from {}, but {} is known",
                            quoted(linear),
                            quoted(generator),
                            philox::NAME
                        ),
                    ));
                }
                let longer = form.shape[0].max(form.shape[1]);
                let drawn = count.saturating_mul(form.rank).saturating_mul(longer);
                if *count == 0 || *count > MAX_COUNT || drawn > MAX_DRAWN {
                    return Err(absurd("the number of random matrices"));
                }
                if let Some(Rounding { bits, low, step }) = rounded {
                    let finite = low.is_finite() && step.is_finite();
                    if !matches!(bits, 4 | 8) || !finite {
                        return Err(absurd("the rounding"));
                    }
                }
            }
            Source::Trained | Source::Frozen => {}
        }
    }
    if form.start && (form.core != CoreForm::None || form.a != Source::Trained) {
        return Err(absurd("the start"));
    }
    Ok(())
}

/// Tensors that no one has taken yet.
struct Tensors(BTreeMap<String, safetensors::Tensor>);

impl Tensors {
    fn take(&mut self, name: &str) -> Result<safetensors::Tensor> {
        let missing = || malformed(format!("{TENSORS} lacks {}", quoted(name)));
        self.0.remove(name).ok_or_else(missing)
    }

    fn floats(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.take(name)?;
        if tensor.dtype != Dtype::F32 || tensor.shape != shape {
            return Err(malformed(format!(
                "{} is {} {:?} instead of F32 {shape:?}",
                quoted(name),
                tensor.dtype,
                tensor.shape
            )));
        }
        Plain::of(name, &tensor).map(|plain| plain.values)
    }
}

/// The stored tensors of a module.
struct Parts {
    a: Option<Vec<f32>>,
    b: Option<Vec<f32>>,
    core: Option<(&'static str, Vec<f32>)>,
    start: Option<[Vec<f32>; 2]>,
    magnitude: Option<Vec<f32>>,
}

impl Parts {
    fn take(linear: &str, form: &Form, file: &mut Tensors) -> Result<Self> {
        let path = module(linear);
        let ([rows, cols], rank) = (form.shape, form.rank);
        let mut factor = |source: &Source, kinds: [&str; 2], shape: [usize; 2]| match source {
            Source::Trained | Source::Frozen => {
                file.floats(&format!("{path}.{}", kinds[0]), &shape).map(Some)
            }
            Source::Ldu(_) => Ok(None),
            Source::Basis { count, rounded: None, .. } => {
                file.floats(&format!("{path}.{}", kinds[1]), &[*count]).map(Some)
            }
            Source::Basis { count, rounded: Some(rounding), .. } => {
                let name = format!("{path}.{}", kinds[1]);
                let tensor = file.take(&name)?;
                let bytes = if rounding.bits == 4 { count.div_ceil(2) } else { *count };
                if tensor.dtype != Dtype::U8 || tensor.shape != [bytes] {
                    return Err(malformed(format!("{} is not {bytes} codes", quoted(&name))));
                }
                let codes = match rounding.bits {
                    4 => unpack(&tensor.data, *count),
                    _ => tensor.data.to_vec(),
                };
                let value = |c: &u8| rounding.low + rounding.step * f32::from(*c);
                Ok(Some(codes.iter().map(value).collect()))
            }
        };
        let a = factor(&form.a, ["lora_A", "nola_A"], [rank, cols])?;
        let b = factor(&form.b, ["lora_B", "nola_B"], [rows, rank])?;
        let core = match form.core {
            CoreForm::None => None,
            of => {
                let held = |kind: &&&str| file.0.contains_key(&format!("{path}.{kind}"));
                let kind = CORES.iter().find(held).copied().unwrap_or(CORES[0]);
                let shape: &[usize] = if of == CoreForm::Matrix { &[rank, rank] } else { &[rank] };
                Some((kind, file.floats(&format!("{path}.{kind}"), shape)?))
            }
        };
        let start = match form.start {
            false => None,
            true => Some([
                file.floats(&format!("{path}.start_A"), &[rank, cols])?,
                file.floats(&format!("{path}.start_B"), &[rows, rank])?,
            ]),
        };
        let magnitude = match form.magnitude {
            false => None,
            true => Some(file.floats(&format!("{path}.lora_magnitude_vector"), &[rows])?),
        };
        Ok(Self { a, b, core, start, magnitude })
    }

    fn put_together(
        self,
        linear: &str,
        form: &Form,
        weights: &BTreeMap<String, Arc<Weight>>,
    ) -> Result<Module> {
        let ([rows, cols], rank) = (form.shape, form.rank);
        let stored = find(weights, linear)?;
        let components = match (&form.a, &form.b) {
            (Source::Ldu(a), Source::Ldu(b)) if a == b => Some(a.clone()),
            (Source::Ldu(_), _) | (_, Source::Ldu(_)) => {
                return Err(malformed(format!("{} has half a decomposition", quoted(linear))));
            }
            _ => None,
        };
        let triangles = components.as_ref().map(|components| {
            let w = linalg::from_rows(&stored.to_f32(), rows, cols);
            loldu::frozen(&linalg::ldu(w.as_ref()), components)
        });
        let (lower, upper) = triangles.map(|f| (f.b, f.a)).unzip();
        let factor = |source: &Source, values: Option<Vec<f32>>, made, shape: [usize; 2], basis| {
            let values = values.or(made).unwrap_or_default();
            Ok::<_, Error>(match source {
                Source::Trained => Factor::Plain(Part::trained(values, &shape)?),
                Source::Frozen | Source::Ldu(_) => Factor::Plain(Part::fixed(values, &shape)?),
                Source::Basis { key, count, rounded, .. } => {
                    let coefficients = Var::from_vec(values, *count, &Device::Cpu)?;
                    let basis: Basis = match basis {
                        'a' => Basis::a(*key, rank, cols, *count),
                        _ => Basis::b(*key, rows, rank, *count),
                    };
                    let combined = Combined::new(basis, coefficients);
                    if let Some(Rounding { bits, low, step }) = rounded {
                        combined.note_grid(*bits, *low, *step);
                    }
                    Factor::Combined(Arc::new(combined))
                }
            })
        };
        let a = factor(&form.a, self.a, upper, [rank, cols], 'a')?;
        let b = factor(&form.b, self.b, lower, [rows, rank], 'b')?;
        let (core, core_name) = match (form.core, self.core) {
            (CoreForm::Matrix, Some((kind, values))) => {
                (Core::Matrix(Part::trained(values, &[rank, rank])?), kind)
            }
            (CoreForm::Diagonal, Some((kind, values))) => {
                (Core::Diagonal(Part::trained(values, &[rank])?), kind)
            }
            _ => (Core::Identity, ""),
        };
        let tensor = |values, shape: [usize; 2]| {
            candle_core::Tensor::from_vec(values, (shape[0], shape[1]), &Device::Cpu)
        };
        let start = match self.start {
            None => None,
            Some([a, b]) => {
                Some(Start::Factors { a: tensor(a, [rank, cols])?, b: tensor(b, [rows, rank])? })
            }
        };
        let magnitude = match self.magnitude {
            None => None,
            Some(values) => Some(Magnitude::new(values, stored, row_squares(stored))?),
        };
        Ok(Module {
            linear: linear.to_owned(),
            shape: form.shape,
            rank,
            scale: form.scale,
            rslora: form.rslora,
            a,
            b,
            core,
            core_name,
            start,
            magnitude,
            ldu: components,
        })
    }
}

#[cfg(test)]
mod tests;
