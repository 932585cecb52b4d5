//! A second, deliberately naive forward for tests: f64, one token and one loop at a time, written from
//! the paper's definitions and sharing no code with the real one.

use super::Model;

/// States `[tokens][hidden]` of one text.
pub fn states(model: &Model, tokens: &[u32]) -> Vec<Vec<f64>> {
    let n = |key: &str| model.config[key].as_u64().unwrap() as usize;
    let (hidden, heads) = (n("hidden_size"), n("num_attention_heads"));
    let head = hidden / heads;
    let tensor = |name: &str| -> Vec<f64> {
        model.weights[name].to_f32().iter().map(|v| f64::from(*v)).collect()
    };
    let eps = model.config["layer_norm_eps"].as_f64().unwrap();
    let norm = |x: &[f64], place: &str| -> Vec<f64> {
        let weight = tensor(&format!("{place}.LayerNorm.weight"));
        let bias = tensor(&format!("{place}.LayerNorm.bias"));
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / x.len() as f64;
        (0..x.len())
            .map(|i| (x[i] - mean) / (variance + eps).sqrt() * weight[i] + bias[i])
            .collect()
    };
    let linear = |x: &[f64], place: &str| -> Vec<f64> {
        let (weight, bias) = (tensor(&format!("{place}.weight")), tensor(&format!("{place}.bias")));
        let rows = weight.chunks(x.len()).zip(bias);
        rows.map(|(row, b)| row.iter().zip(x).map(|(w, v)| w * v).sum::<f64>() + b).collect()
    };
    let act = |x: f64| match model.config["hidden_act"].as_str().unwrap() {
        "relu" => x.max(0.0),
        "gelu" => 0.5 * x * (1.0 + erf(x / 2.0_f64.sqrt())),
        _ => {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + z.tanh())
        }
    };

    let words = tensor("embeddings.word_embeddings.weight");
    let positions = tensor("embeddings.position_embeddings.weight");
    let types = tensor("embeddings.token_type_embeddings.weight");
    let mut h: Vec<Vec<f64>> = tokens
        .iter()
        .enumerate()
        .map(|(p, t)| {
            let x: Vec<f64> = (0..hidden)
                .map(|c| words[*t as usize * hidden + c] + positions[p * hidden + c] + types[c])
                .collect();
            norm(&x, "embeddings")
        })
        .collect();
    for layer in 0..n("num_hidden_layers") {
        let place = |name: &str| format!("encoder.layer.{layer}.{name}");
        let project = |name: &str| -> Vec<Vec<f64>> {
            h.iter().map(|x| linear(x, &place(&format!("attention.self.{name}")))).collect()
        };
        let (q, k, v) = (project("query"), project("key"), project("value"));
        let mut next = Vec::new();
        for i in 0..tokens.len() {
            let mut mixed = vec![0.0; hidden];
            for first in (0..hidden).step_by(head) {
                let scores: Vec<f64> = (0..tokens.len())
                    .map(|j| {
                        let dot: f64 = (first..first + head).map(|c| q[i][c] * k[j][c]).sum();
                        (dot / (head as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = scores.iter().sum();
                for (c, out) in mixed.iter_mut().enumerate().skip(first).take(head) {
                    *out = scores.iter().zip(&v).map(|(s, v)| s / total * v[c]).sum();
                }
            }
            let out = linear(&mixed, &place("attention.output.dense"));
            let x: Vec<f64> = (0..hidden).map(|c| h[i][c] + out[c]).collect();
            let x = norm(&x, &place("attention.output"));
            let wide: Vec<f64> =
                linear(&x, &place("intermediate.dense")).into_iter().map(act).collect();
            let out = linear(&wide, &place("output.dense"));
            let x: Vec<f64> = (0..hidden).map(|c| x[c] + out[c]).collect();
            next.push(norm(&x, &place("output")));
        }
        h = next;
    }
    h
}

/// The error function by its series; exact enough where |x| stays below 5.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..300 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    2.0 / std::f64::consts::PI.sqrt() * sum
}
