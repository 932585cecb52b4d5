//! Scales of channels that are taken into what stands before: the columns of the linears that read an input
//! are multiplied, what makes the input is divided, and the block computes what it did.
//!
//! The input of q, k, v and of gate, up comes from a norm. The input of the output projection is a weighted
//! mean of values, so channels of heads that share their values must share their scales; that of the down
//! projection is a product with the outputs of up, whose rows can be divided.
//!
//! In an encoder the norms come after the sums: what they give is read by the linears and added to what those
//! make, so it cannot be divided; and before the last linear stands a function that scales do not pass. Its
//! values alone take scales.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::blockwise::Block;
use crate::error::{Error, Result};
use crate::models::{Family, decoder, encoder};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};

/// What makes the input of some linears.
#[derive(Debug, Clone, PartialEq)]
pub enum Before {
    /// A norm, whose stored numbers have this added before they multiply.
    Norm { name: String, offset: f32 },
    /// Rows of a linear: channel `c` of the input is made of row `rows[c]`.
    Linear { name: String, rows: Vec<usize> },
}

/// Which of the groups of a block reads what the values of the attention make.
pub const VALUES: usize = 1;

/// What stands before each group of linears of block `layer`, in their order; `None` where that takes no
/// scales.
pub fn before(family: &Family, layer: usize) -> [Option<Before>; 4] {
    match family {
        Family::Decoder(config) => of_decoder(config, layer).map(Some),
        Family::Encoder(config) => of_encoder(config, layer),
    }
}

fn of_encoder(config: &encoder::Config, layer: usize) -> [Option<Before>; 4] {
    let name = format!("encoder.layer.{layer}.attention.self.value.weight");
    [None, Some(Before::Linear { name, rows: (0..config.hidden).collect() }), None, None]
}

fn of_decoder(config: &decoder::Config, layer: usize) -> [Before; 4] {
    let name = |n: &str| format!("model.layers.{layer}.{n}.weight");
    let offset = if config.norm_offset { 1.0 } else { 0.0 };
    let middle =
        if config.post_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
    let shared = config.heads / config.kv_heads.max(1);
    let values = (0..config.query_channels()).map(|channel| {
        let (head, within) = (channel / config.head_dim, channel % config.head_dim);
        head / shared.max(1) * config.head_dim + within
    });
    [
        Before::Norm { name: name("input_layernorm"), offset },
        Before::Linear { name: name("self_attn.v_proj"), rows: values.collect() },
        Before::Norm { name: name(middle), offset },
        Before::Linear { name: name("mlp.up_proj"), rows: (0..config.intermediate).collect() },
    ]
}

impl Before {
    /// Numbers of channels with those that must be alike made so: their mean.
    pub fn tied(&self, mut of_channels: Vec<f64>) -> Vec<f64> {
        let Self::Linear { rows, .. } = self else { return of_channels };
        let most = rows.iter().max().map_or(0, |row| row + 1);
        let (mut sums, mut counts) = (vec![0.0; most], vec![0_u32; most]);
        for (value, row) in of_channels.iter().zip(rows) {
            sums[*row] += value;
            counts[*row] += 1;
        }
        for (value, row) in of_channels.iter_mut().zip(rows) {
            *value = sums[*row] / f64::from(counts[*row]);
        }
        of_channels
    }
}

/// The linears of a block as f32, while scales are moved between them.
pub struct Working {
    /// Values `[rows, cols]` by name.
    pub values: BTreeMap<String, Vec<f32>>,
    /// Norms and biases that were divided.
    vectors: BTreeMap<String, Vec<f32>>,
    /// What the columns and rows of a linear were multiplied by, where they were.
    cols: BTreeMap<String, Vec<f32>>,
    rows: BTreeMap<String, Vec<f32>>,
}

impl Working {
    /// The linears called `names`.
    pub fn new<'a>(block: &Block<'_>, names: impl Iterator<Item = &'a String>) -> Result<Self> {
        let mut values = BTreeMap::new();
        for name in names {
            let weight = find(block, name)?;
            values.insert(name.clone(), weight.to_f32());
        }
        let (cols, rows, vectors) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Ok(Self { values, vectors, cols, rows })
    }

    /// Whether what stands before can be divided: a norm, or a linear that is changed anyway.
    pub fn takes(&self, before: &Before) -> bool {
        match before {
            Before::Norm { .. } => true,
            Before::Linear { name, .. } => self.values.contains_key(name),
        }
    }

    /// Multiplies the columns of `readers` by `scales`, positive numbers, and divides what stands before.
    pub fn scale(
        &mut self,
        block: &Block<'_>,
        readers: &[String],
        before: &Before,
        scales: &[f32],
    ) -> Result<()> {
        for name in readers {
            let values = self
                .values
                .get_mut(name)
                .ok_or_else(|| Error::internal(format!("'{name}' is not worked on")))?;
            for row in values.chunks_exact_mut(scales.len()) {
                row.iter_mut().zip(scales).for_each(|(v, s)| *v *= s);
            }
            self.cols.insert(name.clone(), scales.to_vec());
        }
        match before {
            Before::Norm { name, offset } => {
                let values = self.vector(block, name)?;
                for (v, s) in values.iter_mut().zip(scales) {
                    *v = (*v + offset) / s - offset;
                }
            }
            Before::Linear { name, rows } => {
                let bias = name.replace(".weight", ".bias");
                let biased = block.weights.contains_key(&bias);
                let values = self
                    .values
                    .get_mut(name)
                    .ok_or_else(|| Error::internal(format!("'{name}' is not worked on")))?;
                let cols = find(block, name)?.cols();
                let mut by = vec![1.0; values.len() / cols];
                rows.iter().zip(scales).for_each(|(row, s)| by[*row] = 1.0 / s);
                for (row, by) in values.chunks_exact_mut(cols).zip(&by) {
                    row.iter_mut().for_each(|v| *v *= by);
                }
                if biased {
                    let bias = self.vector(block, &bias)?;
                    bias.iter_mut().zip(&by).for_each(|(v, by)| *v *= by);
                }
                self.rows.insert(name.clone(), by);
            }
        }
        Ok(())
    }

    fn vector(&mut self, block: &Block<'_>, name: &str) -> Result<&mut Vec<f32>> {
        if !self.vectors.contains_key(name) {
            self.vectors.insert(name.to_owned(), find(block, name)?.to_f32());
        }
        self.vectors.get_mut(name).ok_or_else(|| Error::internal("a vector that was just put"))
    }

    /// Values of a scaled linear as they would be without scales.
    pub fn unscaled(&self, name: &str, mut values: Vec<f32>, cols: usize) -> Vec<f32> {
        if let Some(by) = self.cols.get(name) {
            for row in values.chunks_exact_mut(cols) {
                row.iter_mut().zip(by).for_each(|(v, by)| *v /= by);
            }
        }
        if let Some(by) = self.rows.get(name) {
            for (row, by) in values.chunks_exact_mut(cols).zip(by) {
                row.iter_mut().for_each(|v| *v /= by);
            }
        }
        values
    }

    /// What the columns of a linear were multiplied by; ones where they were not.
    pub fn columns(&self, name: &str, cols: usize) -> Vec<f32> {
        self.cols.get(name).cloned().unwrap_or_else(|| vec![1.0; cols])
    }

    /// Puts divided norms and biases into their places, as f32: a scale is not to be rounded away.
    pub fn store_vectors(&self, block: &mut Block<'_>) -> Result<()> {
        for (name, values) in &self.vectors {
            let dense = Dense::from_f32(vec![values.len()], values, Dtype::F32)?;
            block.weights.insert(name.clone(), Arc::new(Weight::Dense(dense)));
        }
        Ok(())
    }
}

fn find<'a>(block: &'a Block<'_>, name: &str) -> Result<&'a Arc<Weight>> {
    block.weights.get(name).ok_or_else(|| {
        Error::new(
            crate::error::Reason::TensorNotFound,
            format!("tensor '{name}' is missing from the model"),
        )
    })
}

#[cfg(test)]
pub mod testing {
    use serde_json::json;

    use crate::models::decoder::plan::{Cache, Chunk, Decoder};
    use crate::models::decoder::random;
    use crate::models::{AnyModel, Family, Model, encoder};

    /// A tiny random model whose linears read whole blocks of 32.
    pub fn tiny(architecture: &str) -> Model {
        if architecture == "bert" {
            let mut config = encoder::random::tiny();
            config["intermediate_size"] = json!(96);
            let model = encoder::random::model(config, 5).unwrap();
            return AnyModel::from(model).walked().unwrap();
        }
        let mut config = random::tiny(architecture);
        config["intermediate_size"] = json!(96);
        random::model(config, 5).unwrap()
    }

    /// Logits of a short text; of an encoder its final states.
    pub fn logits(model: &Model) -> Vec<f32> {
        let ids: Vec<u32> = (0..24).map(|i| (i * 29 + 7) % 96).collect();
        if let Family::Encoder(_) = model.family {
            return states(model, &ids);
        }
        let mut decoder = Decoder::new(model).unwrap();
        let mut cache = Cache::new(decoder.config(), ids.len());
        let mut chunks = [Chunk { tokens: &ids, cache: &mut cache, logits: 0..ids.len() }];
        decoder.forward(&mut chunks).unwrap().to_vec()
    }

    fn states(model: &Model, ids: &[u32]) -> Vec<f32> {
        let walk = crate::calibrate::walk::of(&model.family);
        let mut hidden = vec![0.0; ids.len() * walk.width()];
        walk.embed(&model.weights, ids, &mut hidden).unwrap();
        for block in 0..walk.blocks() {
            walk.block(&model.weights, block).unwrap().forward(&mut hidden, ids.len(), None);
        }
        hidden
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{logits, tiny};
    use super::*;
    use crate::calibrate::walk;

    #[test]
    fn scales_do_not_change_what_a_model_computes() {
        for architecture in ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "bert"] {
            let mut model = tiny(architecture);
            let want = logits(&model);
            let family = model.family.clone();
            let mut scaled = 0;
            for layer in 0..walk::of(&family).blocks() {
                let groups = walk::of(&family).linears(layer);
                let mut block = Block { weights: &mut model.weights, sites: Vec::new() };
                let mut working = Working::new(&block, groups.iter().flatten()).unwrap();
                for (group, before) in groups.iter().zip(before(&family, layer)) {
                    let Some(before) = before else { continue };
                    scaled += 1;
                    let cols = block.weights[&group[0]].cols();
                    let scales: Vec<f64> =
                        (0..cols).map(|c| 0.5 + (c * 7 % 13) as f64 / 4.0).collect();
                    let scales: Vec<f32> =
                        before.tied(scales).into_iter().map(|s| s as f32).collect();
                    assert!(working.takes(&before));
                    working.scale(&block, group, &before, &scales).unwrap();
                }
                for name in groups.iter().flatten() {
                    let stored = block.weights[name].clone();
                    let back = working.unscaled(name, working.values[name].clone(), stored.cols());
                    for (a, b) in back.iter().zip(stored.to_f32()) {
                        assert!((a - b).abs() < 1e-5, "{name}");
                    }
                    let values = &working.values[name];
                    let dense = Dense::from_f32(stored.shape().to_vec(), values, Dtype::F32);
                    block.weights.insert(name.clone(), Arc::new(Weight::Dense(dense.unwrap())));
                }
                working.store_vectors(&mut block).unwrap();
            }
            for (got, want) in logits(&model).iter().zip(&want) {
                assert!((got - want).abs() < 1e-4, "{architecture}: {got} is not {want}");
            }
            let each = if architecture == "bert" { 1 } else { 4 };
            assert_eq!(scaled, each * walk::of(&family).blocks(), "{architecture}");
        }
    }

    #[test]
    fn heads_that_share_values_share_scales() {
        // Four heads of 16 over two heads of values.
        let [_, values, _, up] = of_decoder(tiny("llama").decoder().unwrap(), 0);
        let tied = values.tied((0..64).map(f64::from).collect());
        assert_eq!((tied[0], tied[16], tied[32], tied[48]), (8.0, 8.0, 40.0, 40.0));
        assert_eq!(up.tied(vec![1.0, 2.0]), [1.0, 2.0]);
    }
}
