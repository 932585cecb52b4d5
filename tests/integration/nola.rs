//! The memory of training with NOLA: random matrices are made anew, never kept. Each run is a process of its
//! own, so that what others hold does not count.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use planish::methods::adapt::shapes::Shapes;
use planish::methods::adapt::{Adapt, Setup};
use planish::models::decoder;
use planish::nn::dtype::Dtype;
use planish::nn::weight::{Dense, Weight};
use planish::progress::Progress;
use planish::proto::v1;
use planish::seed::Stream;
use serde_json::json;

const COUNT: &str = "PLANISH_TEST_NOLA_COUNT";
const HIDDEN: usize = 256;
const WIDE: usize = 1024;
const RANK: u32 = 8;

/// Trains as many matrices as the parent says; prints the most that was resident, in kilobytes.
#[test]
#[ignore = "runs as the child of the test below"]
fn child() {
    let Ok(count) = std::env::var(COUNT) else { return };
    let count: u32 = count.parse().unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": WIDE,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    let config = decoder::Config::from_hugging_face(&config).unwrap();
    let shapes = Shapes::decoder(&config);
    let weights: BTreeMap<String, Arc<Weight>> = shapes
        .linears
        .iter()
        .map(|(name, [rows, cols])| {
            let values: Vec<f32> = (0..rows * cols).map(|i| (i % 17) as f32 * 0.01).collect();
            let dense = Dense::from_f32(vec![*rows, *cols], &values, Dtype::F32).unwrap();
            (name.clone(), Arc::new(Weight::Dense(dense)))
        })
        .collect();
    let options = v1::AdapterOptions {
        r: Some(RANK),
        targets: vec!["up_proj".into(), "down_proj".into()],
        ..Default::default()
    };
    let mut nola = v1::Nola {
        adapter: Some(options),
        basis_a: Some(count),
        basis_b: Some(count),
        ..Default::default()
    };
    nola.resolve();
    let progress = Progress::silent();
    let mut setup = Setup {
        weights: &weights,
        shapes: &shapes,
        random: Stream::root(1),
        progress: &progress,
        first_rate: 1e-2,
        gradients: None,
        moments: None,
    };
    let tuned = nola.start(&mut setup).unwrap();
    for (linear, adapter) in &tuned.modules {
        let x = Tensor::ones((4, adapter.shape[1]), candle_core::DType::F32, &Device::Cpu).unwrap();
        let before = tuned.values().unwrap();
        for _ in 0..3 {
            let y = adapter.forward(&x, &weights[linear], None).unwrap();
            let loss = y.sqr().unwrap().mean_all().unwrap();
            let gradients = loss.backward().unwrap();
            for (_, var) in adapter.trained() {
                let gradient = gradients.get(var).unwrap();
                var.set(&(var.as_tensor() - (gradient * 1e-3).unwrap()).unwrap()).unwrap();
            }
        }
        assert_ne!(before, tuned.values().unwrap(), "nothing was trained");
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    println!("peak {}", peak.trim().trim_end_matches(" kB"));
}

#[test]
#[cfg(target_os = "linux")]
fn more_random_matrices_take_no_more_memory() {
    let peak = |count: u32| -> u64 {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "nola::child", "--ignored", "--nocapture"])
            .env(COUNT, count.to_string())
            // A thread for each processor would have an arena of its own, of another size each time.
            .env("RAYON_NUM_THREADS", "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}");
        let line = text.lines().find_map(|l| l.split("peak ").nth(1)).unwrap();
        line.trim().parse::<u64>().unwrap() * 1024
    };
    let few = (0..2).map(|_| peak(64)).min().unwrap();
    let many = (0..2).map(|_| peak(4096)).min().unwrap();
    // A chunk: as many matrices of the larger factor as the few are.
    let matrix = 4 * RANK as u64 * WIDE as u64;
    let grown = many.saturating_sub(few);
    assert!(grown <= 64 * matrix, "{few} bytes for 64 matrices, {many} for 4096");
}
