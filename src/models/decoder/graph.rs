//! The differentiable forward on candle tensors: the same mathematics as [`plan`](super::plan), without
//! a cache, with gradients through every layout.

use std::sync::Arc;

use candle_core::{D, Device, Tensor};

use super::config::{EMBEDDING, FINAL_NORM};
use super::rotary::Rotary;
use super::{Activation, Config, LayerKind, plan};
use crate::error::{Error, Result};
use crate::models::Model;
use crate::nn::adapter::{Adapter, Factors};
use crate::nn::weight::product;

/// Logits `[batch, tokens, vocab]` (f32) of token ids `[batch, tokens]` (u32). Every sequence starts at
/// position 0.
pub fn forward(model: &Model, tokens: &Tensor) -> Result<Tensor> {
    let graph = Graph::new(model)?;
    let hidden = graph.embed(tokens)?;
    graph.logits(&graph.blocks(&hidden)?)
}

/// The parts of the forward, for callers that start or end within it.
pub struct Graph<'a> {
    model: &'a Model,
    config: &'a Config,
    rope: Rotary,
    local_rope: Option<Rotary>,
    adapters: Vec<(Arc<Adapter>, f32)>,
}

impl<'a> Graph<'a> {
    pub fn new(model: &'a Model) -> Result<Self> {
        let config = model.decoder()?;
        let rotary = |rope| Rotary::new(rope, config.head_dim);
        Ok(Self {
            model,
            config,
            rope: rotary(&config.rope),
            local_rope: config.local_rope.as_ref().map(rotary),
            adapters: Vec::new(),
        })
    }

    /// The same with adapters, each with its weight, on all sequences. Their shapes must fit.
    pub fn with_adapters(model: &'a Model, adapters: Vec<(Arc<Adapter>, f32)>) -> Result<Self> {
        Ok(Self { adapters, ..Self::new(model)? })
    }

    /// Hidden states `[batch, tokens, hidden]` of token ids `[batch, tokens]` (u32, checked).
    pub fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, length) = tokens.dims2()?;
        let ids = tokens.flatten_all()?.to_vec1::<u32>()?;
        plan::check_tokens(self.config, &ids)?;
        let mut rows = vec![0.0; ids.len() * self.config.hidden];
        plan::embed(self.config, self.model.weight(EMBEDDING)?, &ids, &mut rows);
        Ok(Tensor::from_vec(rows, (batch, length, self.config.hidden), &Device::Cpu)?)
    }

    /// All blocks: hidden states in, hidden states out.
    pub fn blocks(&self, hidden: &Tensor) -> Result<Tensor> {
        (0..self.config.layers.len())
            .try_fold(hidden.clone(), |hidden, layer| self.block(&hidden, layer))
    }

    /// Block `layer`.
    pub fn block(&self, hidden: &Tensor, layer: usize) -> Result<Tensor> {
        let config = self.config;
        let name = |n: &str| format!("model.layers.{layer}.{n}");
        let x = self.norm(hidden, &name("input_layernorm.weight"))?;
        let delta = self.linear(
            &self.attention(&x, layer)?,
            &name("self_attn.o_proj"),
            config.output_bias,
        )?;
        let second = name("post_attention_layernorm.weight");
        let (hidden, x) = if config.post_norms {
            let hidden = (hidden + self.norm(&delta, &second)?)?;
            let x = self.norm(&hidden, &name("pre_feedforward_layernorm.weight"))?;
            (hidden, x)
        } else {
            let hidden = (hidden + delta)?;
            let x = self.norm(&hidden, &second)?;
            (hidden, x)
        };
        let gate = self.linear(&x, &name("mlp.gate_proj"), config.mlp_bias)?;
        let gate = match config.activation {
            Activation::Silu => gate.silu()?,
            Activation::GeluTanh => gate.gelu()?,
        };
        let up = self.linear(&x, &name("mlp.up_proj"), config.mlp_bias)?;
        let mut delta = self.linear(&(gate * up)?, &name("mlp.down_proj"), config.mlp_bias)?;
        if config.post_norms {
            delta = self.norm(&delta, &name("post_feedforward_layernorm.weight"))?;
        }
        Ok((hidden + delta)?)
    }

    /// Logits of final hidden states.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let normed = self.norm(hidden, FINAL_NORM)?;
        let logits = product(&normed, self.model.weight(self.config.head_name())?)?;
        softcap(logits, self.config.final_softcap)
    }

    fn attention(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        let config = self.config;
        let (batch, length, _) = x.dims3()?;
        let name = |n: &str| format!("model.layers.{layer}.self_attn.{n}");
        // `[batch, heads, tokens, dim]`
        let heads = |which: &str, count: usize| -> Result<Tensor> {
            let y = self.linear(x, &name(&format!("{which}_proj")), config.qkv_bias)?;
            Ok(y.reshape((batch, length, count, config.head_dim))?.transpose(1, 2)?.contiguous()?)
        };
        let normed = |x: Tensor, which: &str| match config.qk_norm {
            true => self.norm(&x, &name(&format!("{which}_norm.weight"))),
            false => Ok(x),
        };
        let q = self.rotate(&normed(heads("q", config.heads)?, "q")?, layer)?;
        let k = self.rotate(&normed(heads("k", config.kv_heads)?, "k")?, layer)?;
        let v = heads("v", config.kv_heads)?;

        // The queries that share a key head, one after another, are the rows of one product.
        let group = config.heads / config.kv_heads;
        let q = q.reshape((batch, config.kv_heads, group * length, config.head_dim))?;
        let scores =
            (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * f64::from(config.attention_scale))?;
        let scores = softcap(scores, config.attention_softcap)?
            .reshape((batch, config.heads, length, length))?
            .broadcast_add(&mask(length, config.layer_window(layer))?)?;
        let weights = softmax(&scores)?;
        let out = weights
            .reshape((batch, config.kv_heads, group * length, length))?
            .matmul(&v)?
            .reshape((batch, config.heads, length, config.head_dim))?;
        Ok(out.transpose(1, 2)?.reshape((batch, length, config.query_channels()))?)
    }

    /// Turns `[batch, heads, tokens, dim]` to its positions.
    fn rotate(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        let rotary = match (self.config.layers[layer], &self.local_rope) {
            (LayerKind::Local, Some(local)) => local,
            _ => &self.rope,
        };
        let (_, _, length, dim) = x.dims4()?;
        let table = rotary.upto(length);
        let (cos, sin) = table.first(length);
        let tensor = |v: &[f32]| Tensor::from_slice(v, (length, dim / 2), &Device::Cpu);
        let (cos, sin) = (tensor(cos)?, tensor(sin)?);
        let low = x.narrow(D::Minus1, 0, dim / 2)?;
        let high = x.narrow(D::Minus1, dim / 2, dim / 2)?;
        let turned_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let turned_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[turned_low, turned_high], D::Minus1)?)
    }

    /// RMS norm over the last dimension.
    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let weight = (self.vector(name)? + if self.config.norm_offset { 1.0 } else { 0.0 })?;
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let rms = (mean + f64::from(self.config.norm_eps))?.sqrt()?;
        Ok(x.broadcast_div(&rms)?.broadcast_mul(&weight)?)
    }

    fn linear(&self, x: &Tensor, name: &str, biased: bool) -> Result<Tensor> {
        let weight = format!("{name}.weight");
        let mut y = product(x, self.model.weight(&weight)?)?;
        for (adapter, by) in &self.adapters {
            if let Some(factors) = adapter.linears.get(&weight) {
                y = (y + low_rank(x, factors, *by)?)?;
            }
        }
        match biased {
            true => Ok(y.broadcast_add(&self.vector(&format!("{name}.bias"))?)?),
            false => Ok(y),
        }
    }

    fn vector(&self, name: &str) -> Result<Tensor> {
        let weight = self.model.weight(name)?;
        if weight.shape().len() != 1 {
            return Err(Error::internal(format!("tensor '{name}' is not a vector")));
        }
        Ok(Tensor::from_vec(weight.to_f32(), weight.cols(), &Device::Cpu)?)
    }
}

/// `by * scale * B A x` for `x` `[batch, tokens, in]`.
fn low_rank(x: &Tensor, factors: &Factors, by: f32) -> Result<Tensor> {
    let ([rows, cols], rank) = (factors.shape(), factors.rank());
    let tensor = |values: &[half::bf16], width: usize| {
        let values: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
        Tensor::from_vec(values, (rank, width), &Device::Cpu)
    };
    let (a, b) = (tensor(factors.a(), cols)?, tensor(factors.b(), rows)?);
    let (batch, length, _) = x.dims3()?;
    let h = x.reshape((batch * length, cols))?.matmul(&a.t()?)?;
    let y = (h.matmul(&b)? * f64::from(by * factors.scale()))?;
    Ok(y.reshape((batch, length, rows))?)
}

/// `cap * tanh(x / cap)`.
fn softcap(x: Tensor, cap: Option<f32>) -> Result<Tensor> {
    match cap.map(f64::from) {
        Some(cap) => Ok(((x / cap)?.tanh()? * cap)?),
        None => Ok(x),
    }
}

/// 0 where a query (row) sees a key (column), minus infinity elsewhere.
fn mask(length: usize, window: Option<usize>) -> Result<Tensor> {
    let window = window.unwrap_or(length);
    let values: Vec<f32> = (0..length * length)
        .map(|i| {
            let (query, key) = (i / length, i % length);
            if key <= query && query - key < window { 0.0 } else { f32::NEG_INFINITY }
        })
        .collect();
    Ok(Tensor::from_vec(values, (length, length), &Device::Cpu)?)
}

/// Softmax over the last dimension. The shift by the largest element has no gradient: it cancels.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let shift = x.max_keepdim(D::Minus1)?.detach();
    let exp = x.broadcast_sub(&shift)?.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use serde_json::json;

    use super::super::plan::{Cache, Chunk, Decoder};
    use super::super::random;
    use super::*;

    #[test]
    fn equals_the_plan() {
        for architecture in ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"] {
            for tied in [true, false] {
                let mut config = random::tiny(architecture);
                config["tie_word_embeddings"] = json!(tied);
                config["rope_scaling"] =
                    json!({ "rope_type": "yarn", "factor": 2.0, "beta_fast": 4.0 });
                let model = random::model(config, 11).unwrap();
                let ids: Vec<u32> = (0..40).map(|i| (i * 29 + 7) % 96).collect();
                let tokens = Tensor::from_slice(&ids, (2, 20), &Device::Cpu).unwrap();
                let got = forward(&model, &tokens).unwrap();
                assert_eq!(got.dims(), [2, 20, 96]);
                let got = got.flatten_all().unwrap().to_vec1::<f32>().unwrap();

                let mut decoder = Decoder::new(&model).unwrap();
                let mut caches = [(); 2].map(|()| Cache::new(decoder.config(), 20));
                let [a, b] = &mut caches;
                let mut chunks = [
                    Chunk { tokens: &ids[..20], cache: a, logits: 0..20 },
                    Chunk { tokens: &ids[20..], cache: b, logits: 0..20 },
                ];
                let want = decoder.forward(&mut chunks).unwrap();
                for (got, want) in got.iter().zip(want) {
                    assert!((got - want).abs() < 1e-4, "{architecture}: {got} is not {want}");
                }
            }
        }
    }

    #[test]
    fn gradients_match_differences() {
        let mut config = random::tiny("gemma3_text");
        config["num_hidden_layers"] = json!(2);
        let model = random::model(config, 2).unwrap();
        let graph = Graph::new(&model).unwrap();
        let tokens = Tensor::new(&[[3_u32, 1, 4, 1, 5, 9, 2, 6]], &Device::Cpu).unwrap();
        let start = graph.embed(&tokens).unwrap();
        let loss = |hidden: &Tensor| -> Tensor {
            let logits = graph.logits(&graph.blocks(hidden).unwrap()).unwrap();
            logits.narrow(2, 17, 1).unwrap().sum_all().unwrap()
        };
        let var = Var::from_tensor(&start).unwrap();
        let gradients = loss(var.as_tensor()).backward().unwrap();
        let gradient = gradients.get(&var).unwrap().flatten_all().unwrap();
        let gradient = gradient.to_vec1::<f32>().unwrap();
        let values = start.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for at in [0, 40, 100, 255] {
            let moved = |by: f32| {
                let mut values = values.clone();
                values[at] += by;
                let hidden = Tensor::from_vec(values, start.shape(), &Device::Cpu).unwrap();
                loss(&hidden).to_scalar::<f32>().unwrap()
            };
            let want = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            let got = gradient[at];
            assert!((got - want).abs() < 2e-3 + 0.02 * want.abs(), "{got} is not {want} at {at}");
        }
    }

    #[test]
    fn ids_outside_the_vocabulary_are_refused() {
        let model = random::model(random::tiny("llama"), 2).unwrap();
        let tokens = Tensor::new(&[[96_u32]], &Device::Cpu).unwrap();
        assert!(forward(&model, &tokens).is_err());
    }
}
