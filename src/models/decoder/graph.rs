//! The differentiable forward: the same mathematics as [`plan`](super::plan), without a cache, with
//! gradients through every layout, and with whatever is tuned in place of what is stored.

use std::sync::Arc;

use super::config::{EMBEDDING, FINAL_NORM};
use super::rotary::{Rotary, Table};
use super::{Activation, Config, LayerKind, plan};
use crate::error::Result;
use crate::models::Model;
use crate::nn::ops::attend::{Attend, Attended};
use crate::nn::ops::{
    Angles, Attention, Function, Head, Linear, Loss, Matrix, Network, Precision, Run, Stored, Value,
};

/// A decoder whose forward can be taken back.
pub struct Graph<'a> {
    model: &'a Model,
    config: &'a Config,
    rope: Rotary,
    local_rope: Option<Rotary>,
    stored: Stored,
    attend: Option<Box<dyn Attend>>,
}

impl Angles for Table {
    fn at(&self, position: usize) -> (&[f32], &[f32]) {
        self.at(position)
    }
}

impl<'a> Graph<'a> {
    /// A forward that multiplies as `precision` says. Checks that every tensor is there and has its shape.
    pub fn new(model: &'a Model, precision: Precision) -> Result<Self> {
        let config = model.decoder()?;
        let rotary = |rope| Rotary::new(rope, config.head_dim);
        let tensors = config.tensors();
        let tensors = tensors
            .iter()
            .map(|(name, shape)| Ok((&name[..], plan::tensor(&model.weights, name, shape)?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            model,
            config,
            rope: rotary(&config.rope),
            local_rope: config.local_rope.as_ref().map(rotary),
            stored: Stored::new(tensors, precision, |name| norm_offset(config, name)),
            attend: None,
        })
    }

    /// The same with attention that is computed by `attend`.
    #[must_use]
    pub fn with_attention(self, attend: Box<dyn Attend>) -> Self {
        Self { attend: Some(attend), ..self }
    }

    pub fn config(&self) -> &'a Config {
        self.config
    }

    /// The states that the head makes logits of.
    pub fn normed(&self, run: &Run<'_>, hidden: &Value) -> Result<Value> {
        self.norm(run, hidden, FINAL_NORM)
    }

    /// The matrix that makes logits of normed states.
    pub fn head(&self) -> Result<&Arc<Linear>> {
        self.stored.matrix(self.config.head_name())
    }

    /// Logits `[rows, vocab]` of normed states, all of them in memory.
    pub fn logits(&self, run: &Run<'_>, normed: &Value) -> Result<Value> {
        let name = self.config.head_name();
        let logits = self.stored.linear(run, normed, name.trim_end_matches(".weight"), false)?;
        Ok(match self.config.final_softcap {
            Some(cap) => run.tape.softcap(logits, cap),
            None => logits,
        })
    }

    /// The cross-entropies of the logits of normed states, one target a row, summed.
    pub fn loss(&self, run: &Run<'_>, normed: &Value, targets: &[u32]) -> Result<Loss> {
        let (name, cap) = (self.config.head_name(), self.config.final_softcap);
        if let Some(trained) = self.stored.trained(run, name)? {
            return run.tape.cross_entropy(normed, &Matrix::Trained(&trained), targets, cap);
        }
        if run.tuning.low_rank(name)?.is_some() || run.tuning.computes(name) {
            let logits =
                self.stored.linear(run, normed, name.trim_end_matches(".weight"), false)?;
            return run.tape.cross_entropy_of(logits, targets, cap);
        }
        let head = self.stored.matrix(name)?;
        run.tape.cross_entropy(normed, &Matrix::Frozen(head), targets, cap)
    }

    /// The cross-entropies of the logits of normed states, one target a row, each for itself: `[rows, 1]`.
    pub fn row_losses(&self, run: &Run<'_>, normed: &Value, targets: &Arc<[u32]>) -> Result<Value> {
        let (name, cap) = (self.config.head_name(), self.config.final_softcap);
        if let Some(trained) = self.stored.trained(run, name)? {
            return run.tape.row_losses(normed, &Head::Trained(trained), targets, cap);
        }
        if run.tuning.low_rank(name)?.is_some() || run.tuning.computes(name) {
            let logits =
                self.stored.linear(run, normed, name.trim_end_matches(".weight"), false)?;
            return run.tape.row_losses_of(&logits, targets, cap);
        }
        let head = Head::Frozen(Arc::clone(self.stored.matrix(name)?));
        run.tape.row_losses(normed, &head, targets, cap)
    }

    /// Attention of normed states, before the output projection.
    fn attention(&self, run: &Run<'_>, x: &Value, layer: usize) -> Result<Value> {
        let config = self.config;
        let name = |n: &str| format!("model.layers.{layer}.self_attn.{n}");
        let project = |which: &str| {
            self.stored.linear(run, x, &name(&format!("{which}_proj")), config.qkv_bias)
        };
        let rotary = match (config.layers[layer], &self.local_rope) {
            (LayerKind::Local, Some(local)) => local,
            _ => &self.rope,
        };
        let angles: Arc<dyn Angles> = rotary.upto(run.sequences.longest());
        let normed = |which: &str| -> Result<Value> {
            let y = project(which)?;
            if !config.qk_norm {
                return Ok(y);
            }
            let width = y.width();
            let heads = y.in_rows_of(config.head_dim);
            let y = self.norm(run, &heads, &name(&format!("{which}_norm.weight")))?;
            Ok(y.in_rows_of(width))
        };
        let turn = |y: Value| run.tape.rotate(y, &angles, run.sequences.positions());
        // Turning is in place where nothing else holds what is turned.
        let (mut unturned, mut turned) = (Vec::new(), Vec::new());
        for which in ["q", "k"] {
            let y = normed(which)?;
            if self.attend.is_some() {
                unturned.push(y.clone());
            }
            turned.push(turn(y)?);
        }
        let (q, k, v) = (&turned[0], &turned[1], project("v")?);
        let shape = Attention {
            heads: config.heads,
            kv_heads: config.kv_heads,
            dim: config.head_dim,
            scale: config.attention_scale,
            softcap: config.attention_softcap,
            causal: true,
            window: config.layer_window(layer),
        };
        match (&self.attend, &unturned[..]) {
            (Some(attend), [a, b]) => {
                let (shape, unturned) = (&shape, [a, b]);
                attend.attend(run, &Attended { layer, shape, input: x, unturned, q, k, v: &v })
            }
            _ => run.tape.attention(&shape, run.sequences.ranges(), q, k, &v),
        }
    }

    /// RMS norm of rows.
    fn norm(&self, run: &Run<'_>, x: &Value, name: &str) -> Result<Value> {
        let weight = self.stored.vector(run, name, norm_offset(self.config, name))?;
        run.tape.rms_norm(x, &weight, self.config.norm_eps)
    }
}

/// What is added to a stored vector: norms are offsets from 1 in some architectures.
fn norm_offset(config: &Config, name: &str) -> f32 {
    if config.norm_offset && name.ends_with("norm.weight") { 1.0 } else { 0.0 }
}

impl Network for Graph<'_> {
    fn blocks(&self) -> usize {
        self.config.layers.len()
    }

    fn start(&self, run: &Run<'_>, tokens: &[u32]) -> Result<Value> {
        plan::check_tokens(self.config, tokens)?;
        if let Some(table) = self.stored.trained(run, EMBEDDING)? {
            let rows = run.tape.rows(&table, &tokens.into())?;
            return Ok(run.tape.scale(rows, self.config.embedding_scale));
        }
        let mut rows = run.tape.pool().take(tokens.len() * self.config.hidden);
        plan::embed(self.config, self.model.weight(EMBEDDING)?, tokens, &mut rows);
        Ok(Value::constant(rows, self.config.hidden))
    }

    fn block(&self, run: &Run<'_>, hidden: &Value, index: usize) -> Result<Value> {
        let (config, tape) = (self.config, run.tape);
        let name = |n: &str| format!("model.layers.{index}.{n}");
        let linear = |x: &Value, n: &str, biased| self.stored.linear(run, x, &name(n), biased);
        let norm = |x: &Value, n: &str| self.norm(run, x, &name(n));

        let x = norm(hidden, "input_layernorm.weight")?;
        let attended = self.attention(run, &x, index)?;
        drop(x);
        let mut delta = linear(&attended, "self_attn.o_proj", config.output_bias)?;
        drop(attended);
        let mut before = "post_attention_layernorm.weight";
        if config.post_norms {
            delta = norm(&delta, before)?;
            before = "pre_feedforward_layernorm.weight";
        }
        let hidden = tape.add(hidden, &delta)?;
        let x = norm(&hidden, before)?;
        let gate = linear(&x, "mlp.gate_proj", config.mlp_bias)?;
        let up = linear(&x, "mlp.up_proj", config.mlp_bias)?;
        drop(x);
        let function = match config.activation {
            Activation::Silu => Function::Silu,
            Activation::GeluTanh => Function::GeluTanh,
        };
        let wide = tape.gated(function, &gate, &up, self.stored.precision())?;
        drop((gate, up));
        let (last, read) = (name("mlp.down_proj"), run.read || config.post_norms);
        let mut delta = self.stored.last_linear(run, &wide, &last, config.mlp_bias, read)?;
        drop(wide);
        if config.post_norms {
            delta = norm(&delta, "post_feedforward_layernorm.weight")?;
        }
        match run.read {
            true => tape.add(&hidden, &delta),
            false => tape.unread_sum(&hidden, &delta),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::plan::{Cache, Chunk, Decoder};
    use super::super::random;
    use super::*;
    use crate::nn::ops::{Pool, Sequences, Tape};
    use crate::nn::tuning::Frozen;

    /// Logits of sequences of these lengths.
    fn logits(model: &Model, ids: &[u32], lengths: &[usize], precision: Precision) -> Vec<f32> {
        let tape = Tape::forgetful(&Pool::default());
        let sequences = Sequences::of(lengths.iter().copied());
        let run = Run {
            tape: &tape,
            tuning: &Frozen,
            sequences: &sequences,
            training: false,
            read: true,
        };
        let graph = Graph::new(model, precision).unwrap();
        let hidden = graph.through(&run, graph.start(&run, ids).unwrap()).unwrap();
        assert!(!hidden.tracked());
        let normed = graph.normed(&run, &hidden).unwrap();
        graph.logits(&run, &normed).unwrap().read().to_vec()
    }

    #[test]
    fn equals_the_plan() {
        for architecture in ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"] {
            for tied in [true, false] {
                let mut config = random::tiny(architecture);
                config["tie_word_embeddings"] = json!(tied);
                if !tied {
                    let layers = config["num_hidden_layers"].as_u64().unwrap();
                    let widths: Vec<u64> = (0..layers).map(|layer| 80 - 16 * layer).collect();
                    config["intermediate_size"] = json!(widths);
                }
                config["rope_scaling"] =
                    json!({ "rope_type": "yarn", "factor": 2.0, "beta_fast": 4.0 });
                let model = random::model(config, 11).unwrap();
                let ids: Vec<u32> = (0..40).map(|i| (i * 29 + 7) % 96).collect();
                let got = logits(&model, &ids, &[23, 17], Precision::F32);
                assert_eq!(got.len(), 40 * 96);

                let mut decoder = Decoder::new(&model).unwrap();
                let mut caches = [23, 17].map(|n| Cache::new(decoder.config(), n));
                let [a, b] = &mut caches;
                let mut chunks = [
                    Chunk { tokens: &ids[..23], cache: a, logits: 0..23 },
                    Chunk { tokens: &ids[23..], cache: b, logits: 0..17 },
                ];
                let want = decoder.forward(&mut chunks).unwrap();
                for (got, want) in got.iter().zip(want) {
                    assert!((got - want).abs() < 1e-4, "{architecture}: {got} is not {want}");
                }
                // bf16 keeps 8 bits; logits reach about 3.
                let rounded = logits(&model, &ids, &[23, 17], Precision::Bf16);
                for (got, want) in rounded.iter().zip(want) {
                    assert!((got - want).abs() < 0.15, "{architecture}: {got} is not {want}");
                }
                assert_ne!(rounded, got);
            }
        }
    }

    #[test]
    fn ids_outside_the_vocabulary_and_missing_tensors_are_refused() {
        let mut model = random::model(random::tiny("llama"), 2).unwrap();
        {
            let graph = Graph::new(&model, Precision::F32).unwrap();
            let tape = Tape::forgetful(&Pool::default());
            let sequences = Sequences::of([1]);
            let run = Run {
                tape: &tape,
                tuning: &Frozen,
                sequences: &sequences,
                training: false,
                read: true,
            };
            assert!(graph.start(&run, &[96]).is_err());
        }
        model.weights.remove("model.layers.1.mlp.up_proj.weight").unwrap();
        assert!(Graph::new(&model, Precision::F32).is_err());
    }
}
