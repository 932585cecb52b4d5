//! What the files of an adapter say, by modules.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::config::{Kind, Settings, Use};
use super::folder::Plain;
use super::{CONFIG, MAX_RANK, PREFIX, WEIGHTS, floats, malformed, quoted, safetensors};
use crate::error::{Error, Reason, Result};
use crate::nn::adapter::{Adapter, Factors};

/// The parts of one linear's adapter, f32 in row order: `scale * b core a`, with a core of nothing, an
/// `[r, r]` matrix or a diagonal.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// `[out, in]`
    pub shape: [usize; 2],
    pub rank: usize,
    /// `[rank, in]`
    pub a: Vec<f32>,
    /// `[out, rank]`
    pub b: Vec<f32>,
    /// AdaLoRA's `E` `[rank]`.
    pub diagonal: Option<Vec<f32>>,
    /// LoRA-XS's matrix `[rank, rank]`.
    pub matrix: Option<Vec<f32>>,
    /// DoRA's magnitudes `[out]`.
    pub magnitude: Option<Vec<f32>>,
    /// Bias of `b` `[out]`, added to the output times the scale.
    pub bias: Option<Vec<f32>>,
    pub scale: f64,
    pub rslora: bool,
}

impl Entry {
    /// `b core` `[out, rank]`.
    pub fn folded(&self) -> Vec<f32> {
        let rank = self.rank;
        let mut b = self.b.clone();
        if let Some(diagonal) = &self.diagonal {
            for row in b.chunks_mut(rank) {
                row.iter_mut().zip(diagonal).for_each(|(b, e)| *b *= e);
            }
        }
        if let Some(matrix) = &self.matrix {
            for row in b.chunks_mut(rank) {
                let mut sum = vec![0f64; rank];
                for (b, r) in row.iter().zip(matrix.chunks(rank)) {
                    sum.iter_mut().zip(r).for_each(|(s, r)| *s += f64::from(*b) * f64::from(*r));
                }
                row.iter_mut().zip(sum).for_each(|(b, s)| *b = s as f32);
            }
        }
        b
    }
}

/// An adapter as its files have it.
#[derive(Debug, Clone, PartialEq)]
pub struct Contents {
    pub kind: Kind,
    /// By the names of the modules: `model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, Entry>,
    /// Of embedding tables, by the names of their modules: `shape` is that of the table, `[vocabulary, width]`,
    /// and `b` `[vocabulary, rank]` has a row for each token.
    pub tables: BTreeMap<String, Entry>,
    /// Tensors that were trained whole, biases among them, by their names.
    pub whole: BTreeMap<String, Plain>,
}

/// What a tensor of a module is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    A,
    B,
    Diagonal,
    Matrix,
    Magnitude,
    Bias,
}

/// Ends of names; AdaLoRA's have no `.weight`, and either way is written by some version.
const ENDS: &[(&str, Part)] = &[
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_A", Part::A),
    (".lora_B", Part::B),
    (".lora_E", Part::Diagonal),
    (".lora_magnitude_vector", Part::Magnitude),
    (".lora_magnitude_vector.weight", Part::Magnitude),
    (".lora_B.bias", Part::Bias),
    (".lora_latent_mapping.weight", Part::Matrix),
    (".default_lora_latent_mapping.weight", Part::Matrix),
];

impl Contents {
    /// Puts settings and tensors together.
    ///
    /// # Errors
    /// MALFORMED_FILE for what breaks the form, UNSUPPORTED_FORMAT for what is not read for this use.
    pub fn parse(
        config: &[u8],
        tensors: &BTreeMap<String, safetensors::Tensor>,
        for_what: Use,
    ) -> Result<Self> {
        let settings = Settings::parse(config, for_what)?;
        let mut parts: BTreeMap<&str, BTreeMap<Part, &safetensors::Tensor>> = BTreeMap::new();
        let mut whole = BTreeMap::new();
        let mut embedded: BTreeMap<&str, [Option<&safetensors::Tensor>; 2]> = BTreeMap::new();
        for (name, tensor) in tensors {
            let inner = name.strip_prefix(PREFIX).ok_or_else(|| {
                unsupported(name, "does not have a name that starts with 'base_model.model.'")
            })?;
            let found = ENDS.iter().find_map(|(end, part)| Some((inner.strip_suffix(end)?, *part)));
            match found {
                Some((module, part)) if for_what == Use::Keep || served(part) => {
                    if parts.entry(module).or_default().insert(part, tensor).is_some() {
                        return Err(malformed(format!(
                            "module {} has two tensors for one part",
                            quoted(module)
                        )));
                    }
                }
                Some((_, part)) => {
                    return Err(unsupported(
                        name,
                        match part {
                            Part::Magnitude => "is a magnitude of DoRA, which is not served",
                            _ => "is a bias of an adapter",
                        },
                    ));
                }
                None if inner.contains("lora_embedding_") => {
                    let sides = [".lora_embedding_A", ".lora_embedding_B"];
                    let found = sides
                        .iter()
                        .enumerate()
                        .find_map(|(side, end)| Some((inner.strip_suffix(end)?, side)));
                    let (Some((module, side)), Use::Keep) = (found, for_what) else {
                        return Err(unsupported(name, "changes an embedding"));
                    };
                    embedded.entry(module).or_default()[side] = Some(tensor);
                }
                None if for_what == Use::Keep => {
                    whole.insert(inner.to_owned(), Plain::of(inner, tensor)?);
                }
                None => {
                    return Err(unsupported(
                        name,
                        "is no LoRA factor (modules_to_save, a bias or another method)",
                    ));
                }
            }
        }
        if parts.is_empty() && embedded.is_empty() {
            return Err(malformed(format!("{WEIGHTS} holds no factors")));
        }
        let tables = embedded
            .into_iter()
            .map(|(module, sides)| Ok((module.to_owned(), table(module, sides, &settings)?)))
            .collect::<Result<_>>()?;
        let modules = parts
            .into_iter()
            .map(|(module, parts)| Ok((module.to_owned(), entry(module, &parts, &settings)?)))
            .collect::<Result<_>>()?;
        Ok(Self { kind: settings.kind, modules, tables, whole })
    }

    /// As what serves: additions of low rank.
    ///
    /// # Errors
    /// UNSUPPORTED_FORMAT for what is more than that.
    pub fn adapter(&self) -> Result<Adapter> {
        if let Some(name) = self.whole.keys().next() {
            return Err(unsupported(name, "was trained whole, which is not served"));
        }
        if let Some(name) = self.tables.keys().next() {
            return Err(unsupported(name, "is an embedding"));
        }
        let linears = self.modules.iter().map(|(module, entry)| {
            if entry.magnitude.is_some() || entry.bias.is_some() {
                return Err(unsupported(module, "is more than an addition of low rank"));
            }
            let scale = entry.scale as f32;
            let factors =
                Factors::from_f32(entry.shape, entry.rank, &entry.a, &entry.folded(), scale)?;
            Ok((format!("{module}.weight"), Arc::new(factors)))
        });
        Ok(Adapter { linears: linears.collect::<Result<_>>()? })
    }
}

fn served(part: Part) -> bool {
    !matches!(part, Part::Magnitude | Part::Bias)
}

fn unsupported(name: &str, what: &str) -> Error {
    Error::new(
        Reason::UnsupportedFormat,
        format!("tensor {} {what}; only the factors of linear layers are read", quoted(name)),
    )
}

/// The factors of an embedding table: `A` `[rank, vocabulary]` and `B` `[width, rank]`, which give the row
/// `scale * B A[.., token]` of a token.
fn table(
    module: &str,
    sides: [Option<&safetensors::Tensor>; 2],
    settings: &Settings,
) -> Result<Entry> {
    let wrong = |what: String| malformed(format!("the embedding {} {what}", quoted(module)));
    let [Some(a), Some(b)] = sides else {
        return Err(wrong("has one of two factors".to_owned()));
    };
    if settings.kind != Kind::Lora || settings.dora {
        return Err(Error::new(
            Reason::UnsupportedFormat,
            format!("the embedding {} is changed by another method than LoRA", quoted(module)),
        ));
    }
    let (&[rank, vocabulary], &[width, rank_b]) = (&a.shape[..], &b.shape[..]) else {
        return Err(wrong(format!("has factors of the shapes {:?} and {:?}", a.shape, b.shape)));
    };
    let fits = rank == rank_b && rank > 0 && rank <= MAX_RANK && vocabulary > 0 && width > 0;
    if !fits || rank as u64 != settings.rank(module) {
        return Err(wrong(format!(
            "has factors of the shapes {:?} and {:?}, and {CONFIG} says rank {}",
            a.shape,
            b.shape,
            settings.rank(module)
        )));
    }
    let transposed = |values: Vec<f32>, rows: usize, cols: usize| -> Vec<f32> {
        (0..rows * cols).map(|i| values[i % rows * cols + i / rows]).collect()
    };
    Ok(Entry {
        shape: [vocabulary, width],
        rank,
        a: transposed(floats(module, b)?, width, rank),
        b: transposed(floats(module, a)?, rank, vocabulary),
        diagonal: None,
        matrix: None,
        magnitude: None,
        bias: None,
        scale: settings.scale(module, rank)?,
        rslora: settings.rslora,
    })
}

fn entry(
    module: &str,
    parts: &BTreeMap<Part, &safetensors::Tensor>,
    settings: &Settings,
) -> Result<Entry> {
    let wrong = |what: String| malformed(format!("module {} {what}", quoted(module)));
    let (Some(a), Some(b)) = (parts.get(&Part::A), parts.get(&Part::B)) else {
        let missing = if parts.contains_key(&Part::A) { "lora_B" } else { "lora_A" };
        return Err(wrong(format!("has no {missing}")));
    };
    let (&[rank, cols], &[rows, rank_b]) = (&a.shape[..], &b.shape[..]) else {
        return Err(malformed(format!(
            "the factors of module {} have the shapes {:?} and {:?} instead of two dimensions",
            quoted(module),
            a.shape,
            b.shape
        )));
    };
    if rank != rank_b || rank == 0 || rank > MAX_RANK || rows == 0 || cols == 0 {
        return Err(malformed(format!(
            "the factors of module {} have the shapes {:?} and {:?}, which are no product of a \
             rank from 1 to {MAX_RANK}",
            quoted(module),
            a.shape,
            b.shape
        )));
    }
    let wanted = settings.rank(module);
    if rank as u64 != wanted {
        return Err(malformed(format!(
            "the factors of module {} have rank {rank}, but {CONFIG} says {wanted}",
            quoted(module)
        )));
    }
    // A part of exactly so many elements, in whatever shape the versions of the library gave it.
    let part = |part: Part, elements: usize, what: &str| -> Result<Option<Vec<f32>>> {
        let Some(tensor) = parts.get(&part) else { return Ok(None) };
        let found = tensor.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        if found != Some(elements) {
            return Err(wrong(format!("has {what} of shape {:?}", tensor.shape)));
        }
        Ok(Some(floats(module, tensor)?))
    };
    let diagonal = part(Part::Diagonal, rank, "an E")?;
    let magnitude = part(Part::Magnitude, rows, "a magnitude")?;
    match settings.kind {
        Kind::AdaLora if diagonal.is_none() => return Err(wrong("has no lora_E".to_owned())),
        Kind::Lora if diagonal.is_some() => {
            return Err(wrong("has a lora_E, but is no AdaLoRA".to_owned()));
        }
        _ => {}
    }
    if settings.dora != magnitude.is_some() {
        return Err(wrong(format!("has a magnitude or not, but {CONFIG} says the other")));
    }
    Ok(Entry {
        shape: [rows, cols],
        rank,
        a: floats(module, a)?,
        b: floats(module, b)?,
        diagonal,
        matrix: part(Part::Matrix, rank * rank, "a latent mapping")?,
        magnitude,
        bias: part(Part::Bias, rows, "a bias")?,
        scale: settings.scale(module, rank)?,
        rslora: settings.rslora,
    })
}
