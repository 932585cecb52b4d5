//! A second, deliberately naive forward for tests: f64, one token and one loop at a time, written from
//! the architectures' definitions and sharing no code with the real ones.

use serde_json::Value;

use crate::models::Model;

/// Reads settings straight from `config.json`, so that mistakes in its interpretation show as well.
struct Naive<'a> {
    model: &'a Model,
    json: &'a Value,
    gemma: bool,
}

/// Logits `[tokens][vocab]` of one sequence.
pub fn logits(model: &Model, tokens: &[u32]) -> Vec<Vec<f64>> {
    let json = &model.config;
    Naive { model, json, gemma: json["model_type"] == "gemma3_text" }.run(tokens)
}

impl Naive<'_> {
    fn n(&self, key: &str) -> usize {
        self.json[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize
    }

    fn tensor(&self, name: &str) -> Vec<f64> {
        self.model.weights[name].to_f32().iter().map(|v| f64::from(*v)).collect()
    }

    fn norm(&self, x: &[f64], name: &str) -> Vec<f64> {
        let eps = self.json["rms_norm_eps"].as_f64().unwrap();
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        let offset = if self.gemma { 1.0 } else { 0.0 };
        let weight = self.tensor(name);
        x.iter().zip(weight).map(|(v, w)| v / (mean + eps).sqrt() * (offset + w)).collect()
    }

    fn linear(&self, x: &[f64], name: &str) -> Vec<f64> {
        let weight = self.tensor(&format!("{name}.weight"));
        let mut y: Vec<f64> =
            weight.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, v)| w * v).sum()).collect();
        let bias = format!("{name}.bias");
        if self.model.weights.contains_key(&bias) {
            for (y, b) in y.iter_mut().zip(self.tensor(&bias)) {
                *y += b;
            }
        }
        y
    }

    /// Whether a layer sees only its window.
    fn local(&self, layer: usize) -> bool {
        match self.json["model_type"].as_str().unwrap() {
            "mistral" => true,
            "qwen2" => layer >= self.n("max_window_layers"),
            "gemma3_text" => !(layer + 1).is_multiple_of(self.n("sliding_window_pattern")),
            _ => false,
        }
    }

    fn turn(&self, x: &mut [f64], position: usize, layer: usize) {
        let theta = match (self.gemma, self.local(layer)) {
            (true, false) => self.json["rope_theta"].as_f64().unwrap_or(1e6),
            (true, true) => 1e4,
            _ => self.json["rope_theta"].as_f64().unwrap_or(1e4),
        };
        let d = x.len();
        for i in 0..d / 2 {
            let angle = position as f64 / theta.powf(2.0 * i as f64 / d as f64);
            let (a, b) = (x[i], x[i + d / 2]);
            x[i] = a * angle.cos() - b * angle.sin();
            x[i + d / 2] = b * angle.cos() + a * angle.sin();
        }
    }

    fn run(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let hidden = self.n("hidden_size");
        let embedding = self.tensor("model.embed_tokens.weight");
        let scale = if self.gemma { (hidden as f64).sqrt() } else { 1.0 };
        let mut h: Vec<Vec<f64>> = tokens
            .iter()
            .map(|t| {
                embedding[*t as usize * hidden..][..hidden].iter().map(|v| v * scale).collect()
            })
            .collect();
        for layer in 0..self.n("num_hidden_layers") {
            self.block(&mut h, layer);
        }
        let head =
            if self.json["tie_word_embeddings"] == true { "model.embed_tokens" } else { "lm_head" };
        h.iter()
            .map(|h| {
                let mut logits = self.linear(&self.norm(h, "model.norm.weight"), head);
                if let Some(cap) = self.json["final_logit_softcapping"].as_f64() {
                    logits.iter_mut().for_each(|l| *l = cap * (*l / cap).tanh());
                }
                logits
            })
            .collect()
    }

    fn block(&self, h: &mut [Vec<f64>], layer: usize) {
        let name = |n: &str| format!("model.layers.{layer}.{n}");
        let attended = self.attention(h, layer);
        for (h, attended) in h.iter_mut().zip(attended) {
            let mut delta = self.linear(&attended, &name("self_attn.o_proj"));
            let mut second = name("post_attention_layernorm.weight");
            if self.gemma {
                delta = self.norm(&delta, &second);
                second = name("pre_feedforward_layernorm.weight");
            }
            h.iter_mut().zip(delta).for_each(|(h, d)| *h += d);

            let x = self.norm(h, &second);
            let up = self.linear(&x, &name("mlp.up_proj"));
            let gated: Vec<f64> = self
                .linear(&x, &name("mlp.gate_proj"))
                .iter()
                .zip(up)
                .map(|(g, u)| u * if self.gemma { gelu(*g) } else { g / (1.0 + (-g).exp()) })
                .collect();
            let mut delta = self.linear(&gated, &name("mlp.down_proj"));
            if self.gemma {
                delta = self.norm(&delta, &name("post_feedforward_layernorm.weight"));
            }
            h.iter_mut().zip(delta).for_each(|(h, d)| *h += d);
        }
    }

    fn attention(&self, h: &[Vec<f64>], layer: usize) -> Vec<Vec<f64>> {
        let name = |n: &str| format!("model.layers.{layer}.self_attn.{n}");
        let (heads, key_heads) = (self.n("num_attention_heads"), self.n("num_key_value_heads"));
        let d = self.n("head_dim");
        let norms = self.gemma || self.json["model_type"] == "qwen3";
        let (mut qs, mut ks, mut vs) = (vec![], vec![], vec![]);
        for (position, h) in h.iter().enumerate() {
            let x = self.norm(h, &format!("model.layers.{layer}.input_layernorm.weight"));
            let project = |which: &str| {
                let mut y = self.linear(&x, &name(&format!("{which}_proj")));
                for head in y.chunks_mut(d) {
                    if norms {
                        let normed = self.norm(head, &name(&format!("{which}_norm.weight")));
                        head.copy_from_slice(&normed);
                    }
                    self.turn(head, position, layer);
                }
                y
            };
            qs.push(project("q"));
            ks.push(project("k"));
            vs.push(self.linear(&x, &name("v_proj")));
        }
        let divisor = match self.gemma {
            true => self.json["query_pre_attn_scalar"].as_f64().unwrap().sqrt(),
            false => (d as f64).sqrt(),
        };
        let cap = self.json["attn_logit_softcapping"].as_f64();
        (0..h.len())
            .map(|t| {
                let mut out = vec![0.0; heads * d];
                for head in 0..heads {
                    let key_head = head / (heads / key_heads);
                    let seen = |s: &usize| !self.local(layer) || t - s < self.n("sliding_window");
                    let positions: Vec<usize> = (0..=t).filter(seen).collect();
                    let scores: Vec<f64> = positions
                        .iter()
                        .map(|s| {
                            let dot: f64 = (0..d)
                                .map(|i| qs[t][head * d + i] * ks[*s][key_head * d + i])
                                .sum();
                            let score = dot / divisor;
                            cap.map_or(score, |cap| cap * (score / cap).tanh()).exp()
                        })
                        .collect();
                    let total: f64 = scores.iter().sum();
                    for (s, score) in positions.iter().zip(&scores) {
                        for i in 0..d {
                            out[head * d + i] += score / total * vs[*s][key_head * d + i];
                        }
                    }
                }
                out
            })
            .collect()
    }
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}
