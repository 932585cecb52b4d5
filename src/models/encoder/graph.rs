//! The differentiable forward: the same mathematics as [`plan`](super::plan), with gradients through every
//! layout, and with whatever is tuned in place of what is stored.

use std::ops::Range;
use std::sync::Arc;

use super::{Activation, Config, Model, Pooling, plan};
use crate::error::{Error, Result};
use crate::nn::ops::attend::{Attend, Attended};
use crate::nn::ops::{Attention, Function, Loss, Matrix, Network, Precision, Run, Stored, Value};

/// An encoder whose forward can be taken back.
pub struct Graph<'a> {
    model: &'a Model,
    config: &'a Config,
    stored: Stored,
    attend: Option<Box<dyn Attend>>,
}

impl<'a> Graph<'a> {
    /// A forward that multiplies as `precision` says. Checks that every tensor is there and has its shape.
    pub fn new(model: &'a Model, precision: Precision) -> Result<Self> {
        let config = &model.family;
        let tensors = config.tensors();
        let tensors = tensors
            .iter()
            .map(|(name, shape)| Ok((&name[..], plan::tensor(model, name, shape)?)))
            .collect::<Result<Vec<_>>>()?;
        let stored = Stored::new(tensors, precision, |_| 0.0);
        Ok(Self { model, config, stored, attend: None })
    }

    /// The same with attention that is computed by `attend`.
    #[must_use]
    pub fn with_attention(self, attend: Box<dyn Attend>) -> Self {
        Self { attend: Some(attend), ..self }
    }

    pub fn config(&self) -> &'a Config {
        self.config
    }

    /// One state for each sequence.
    pub fn pool(&self, run: &Run<'_>, hidden: &Value, pooling: Pooling) -> Result<Value> {
        let ranges = run.sequences.ranges();
        match pooling {
            Pooling::Mean => run.tape.mean_rows(hidden, ranges),
            Pooling::Max => run.tape.max_rows(hidden, ranges),
            Pooling::Cls => {
                let firsts: Arc<[u32]> = ranges.iter().map(|range| range.start as u32).collect();
                run.tape.rows(hidden, &firsts)
            }
        }
    }

    /// The cross-entropies of what a head says of hidden tokens, summed: a linear layer, the model's
    /// activation and a norm, trained, and the table of embeddings as outputs. `parts` are the layer's weight
    /// and bias and the norm's weight and bias.
    pub fn hidden_loss(
        &self,
        run: &Run<'_>,
        rows: &Value,
        parts: [&Value; 4],
        targets: &[u32],
    ) -> Result<Loss> {
        let (tape, [weight, bias, scale, shift]) = (run.tape, parts);
        let x = tape.add_bias(tape.dense(rows, weight)?, bias)?;
        let x = tape.activation(function(self.config.activation), &x);
        let x = tape.layer_norm(&x, scale, shift, self.config.norm_eps)?;
        let table = "embeddings.word_embeddings.weight";
        match self.stored.trained(run, table)? {
            Some(table) => tape.cross_entropy(&x, &Matrix::Trained(&table), targets, None),
            None => {
                let table = self.stored.matrix(table)?;
                tape.cross_entropy(&x, &Matrix::Frozen(table), targets, None)
            }
        }
    }

    /// `norm(x + delta)`, the end of a block's half.
    fn close(&self, run: &Run<'_>, x: &Value, delta: &Value, place: &str) -> Result<Value> {
        self.norm(run, &run.tape.add(x, delta)?, place)
    }

    fn norm(&self, run: &Run<'_>, x: &Value, place: &str) -> Result<Value> {
        let vector = |which| self.stored.vector(run, &format!("{place}.LayerNorm.{which}"), 0.0);
        run.tape.layer_norm(x, &vector("weight")?, &vector("bias")?, self.config.norm_eps)
    }

    /// Rows of a table of embeddings.
    fn table(&self, run: &Run<'_>, name: &str, rows: &Arc<[u32]>) -> Result<Value> {
        let name = format!("embeddings.{name}.weight");
        if let Some(table) = self.stored.trained(run, &name)? {
            return run.tape.rows(&table, rows);
        }
        let (table, width) = (self.model.weight(&name)?, self.config.hidden);
        let mut out = run.tape.pool().take(rows.len() * width);
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
            table.read_rows(*row as usize, out);
        }
        Ok(Value::constant(out, width))
    }
}

fn function(activation: Activation) -> Function {
    match activation {
        Activation::Gelu => Function::Gelu,
        Activation::GeluTanh => Function::GeluTanh,
        Activation::Relu => Function::Relu,
    }
}

impl Network for Graph<'_> {
    fn blocks(&self) -> usize {
        self.config.layers
    }

    fn start(&self, run: &Run<'_>, tokens: &[u32]) -> Result<Value> {
        for (i, Range { start, end }) in run.sequences.ranges().iter().enumerate() {
            plan::check_tokens(self.config, &tokens[*start..*end])
                .map_err(|error| error.within(&format!("sequences[{i}]")))?;
        }
        let types = run.sequences.types();
        if types.len() != tokens.len() || types.iter().any(|t| *t as usize >= self.config.types) {
            return Err(Error::internal("types of tokens do not fit the model"));
        }
        let words = self.table(run, "word_embeddings", &tokens.into())?;
        let positions = self.table(run, "position_embeddings", run.sequences.positions())?;
        let sum = run.tape.add(&words, &positions)?;
        let types = self.table(run, "token_type_embeddings", &types)?;
        self.close(run, &sum, &types, "embeddings")
    }

    fn block(&self, run: &Run<'_>, hidden: &Value, index: usize) -> Result<Value> {
        let (config, tape) = (self.config, run.tape);
        let name = |n: &str| format!("encoder.layer.{index}.{n}");
        let linear = |x: &Value, n: &str| self.stored.linear(run, x, &name(n), true);
        let (q, k, v) = (
            linear(hidden, "attention.self.query")?,
            linear(hidden, "attention.self.key")?,
            linear(hidden, "attention.self.value")?,
        );
        let shape = Attention {
            heads: config.heads,
            kv_heads: config.heads,
            dim: config.head_dim(),
            scale: 1.0 / (config.head_dim() as f32).sqrt(),
            softcap: None,
            causal: false,
            window: None,
        };
        let attended = match &self.attend {
            None => tape.attention(&shape, run.sequences.ranges(), &q, &k, &v)?,
            Some(attend) => {
                let (shape, input, unturned) = (&shape, hidden, [&q, &k]);
                let (layer, q, k, v) = (index, &q, &k, &v);
                attend.attend(run, &Attended { layer, shape, input, unturned, q, k, v })?
            }
        };
        drop((q, k, v));
        let delta = linear(&attended, "attention.output.dense")?;
        drop(attended);
        let hidden = self.close(run, hidden, &delta, &name("attention.output"))?;
        let wide =
            tape.activation(function(config.activation), &linear(&hidden, "intermediate.dense")?);
        let delta = linear(&wide, "output.dense")?;
        drop(wide);
        self.close(run, &hidden, &delta, &name("output"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::plan::{Encoder, Input};
    use super::super::random;
    use super::*;
    use crate::nn::ops::{Pool, Sequences, Tape};
    use crate::nn::tuning::Frozen;

    #[test]
    fn equals_the_plan() {
        for (key, value) in [
            ("hidden_act", json!("gelu")),
            ("hidden_act", json!("gelu_new")),
            ("hidden_act", json!("relu")),
            ("intermediate_size", json!(41)),
        ] {
            let mut config = random::tiny();
            config[key] = value;
            let model = random::model(config, 3).unwrap();
            let ids: Vec<u32> = (0..40).map(|i| (i * 29 + 7) % 96).collect();
            let lengths = [23, 1, 16];
            let sequences = Sequences::of(lengths);
            let tape = Tape::forgetful(&Pool::default());
            let run = Run {
                tape: &tape,
                tuning: &Frozen,
                sequences: &sequences,
                training: false,
                read: true,
            };
            let graph = Graph::new(&model, Precision::F32).unwrap();
            let hidden = graph.through(&run, graph.start(&run, &ids).unwrap()).unwrap();
            let mut encoder = Encoder::new(&model).unwrap();
            for pooling in [Pooling::Mean, Pooling::Cls, Pooling::Max] {
                let got = graph.pool(&run, &hidden, pooling).unwrap();
                let inputs: Vec<_> = sequences
                    .ranges()
                    .iter()
                    .map(|r| Input { tokens: &ids[r.clone()], pooling })
                    .collect();
                let mut want = vec![0.0; 3 * 32];
                encoder.embed(&inputs, &mut want).unwrap();
                for (got, want) in got.read().iter().zip(&want) {
                    assert!((got - want).abs() < 1e-4, "{pooling:?}: {got} is not {want}");
                }
            }
        }
    }

    #[test]
    fn texts_that_have_no_rows_are_refused_by_place() {
        let model = random::model(random::tiny(), 3).unwrap();
        let graph = Graph::new(&model, Precision::F32).unwrap();
        let tape = Tape::forgetful(&Pool::default());
        let refuse = |tokens: &[u32], lengths: &[usize]| {
            let sequences = Sequences::of(lengths.iter().copied());
            let run = Run {
                tape: &tape,
                tuning: &Frozen,
                sequences: &sequences,
                training: false,
                read: true,
            };
            graph.start(&run, tokens).err().unwrap().violations()[0].field.clone()
        };
        assert_eq!(refuse(&[1, 96], &[1, 1]), "sequences[1].ids");
        assert_eq!(refuse(&[1; 65], &[65]), "sequences[0].ids");
        assert_eq!(refuse(&[1], &[0, 1]), "sequences[0].ids");
    }
}
