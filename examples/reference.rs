//! Prints the reference numbers: perplexity of a model before and after pruning, the seconds a step
//! took, and the peak memory of the process.
//!
//! `cargo run --release --example reference -- MODEL CALIBRATION EVALUATION [STEP...]`
//!
//! MODEL is a file or folder, the texts are `.txt` or `.txt.gz` files. A STEP is a step of a recipe in
//! JSON; without any, the steps of the README are run. Calibration takes the first 32 windows of 512
//! tokens, evaluation the first 20,000 tokens in windows of 512.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use planish::calibrate::Shared;
use planish::data::text;
use planish::error::{Error, Result};
use planish::eval::{self, Subject};
use planish::methods::NoDatasets;
use planish::models::{Model, import};
use planish::progress::Progress;
use planish::proto::v1;
use planish::recipe::run::{Environment, run_step};

const STEPS: [&str; 6] = [
    r#"{"wanda":{"sparsity":{"share":0.5}}}"#,
    r#"{"wanda":{"sparsity":{"share":0.6}}}"#,
    r#"{"wanda":{"sparsity":{"pattern":"2:4"}}}"#,
    r#"{"magnitude":{"sparsity":{"share":0.5}}}"#,
    r#"{"sparsegpt":{"sparsity":{"pattern":"2:4"}}}"#,
    r#"{"gptq":{"grid":{"bits":4,"group_size":64}}}"#,
];
const CALIBRATION: &str = "datasets/calibration";
const EVALUATION: &str = "datasets/evaluation";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, calibration, evaluation, steps @ ..] = arguments.as_slice() else {
        return Err(Error::field("arguments", "MODEL CALIBRATION EVALUATION [STEP...] are needed"));
    };
    let model = import::open(Path::new(model))?;
    let calibration = read(calibration)?;
    let evaluation = read(evaluation)?;
    let calibrations = Shared::default();
    println!("{:44} {:>10} {:>9} {:>12}", "step", "perplexity", "seconds", "weight bytes");
    let (perplexity, seconds) = measure(&model, &evaluation)?;
    println!("{:44} {perplexity:10.3} {seconds:8.1}e {:12}", "(none)", model.bytes());
    let steps: Vec<&str> =
        if steps.is_empty() { STEPS.to_vec() } else { steps.iter().map(String::as_str).collect() };
    for text in steps {
        let step = step(text)?;
        let scratch = tempfile::tempdir()?;
        let texts = |_: &str| Ok(calibration.clone());
        let progress = Progress::silent();
        let environment = Environment {
            progress: &progress,
            texts: &texts,
            calibrations: &calibrations,
            scratch: scratch.path(),
            datasets: &NoDatasets,
            kept: &scratch.path().join("kept"),
        };
        let start = Instant::now();
        let start_from = (model.clone().into(), "base");
        let outcome = run_step(&step, (0, 0), start_from, &environment)?.outcome.walked()?;
        let seconds = start.elapsed().as_secs_f64();
        let (perplexity, _) = measure(&outcome.model, &evaluation)?;
        println!("{text:44} {perplexity:10.3} {seconds:8.1}s {:12}", outcome.model.bytes());
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if let Some(peak) = status.lines().find(|l| l.starts_with("VmHWM")) {
        println!("peak memory: {}", peak.trim_start_matches("VmHWM:").trim());
    }
    Ok(())
}

fn read(path: &str) -> Result<Arc<String>> {
    let documents = text::read_documents(Path::new(path), path, 1 << 30)?;
    Ok(Arc::new(text::join(&documents)))
}

/// The step, calibrated as the reference was.
fn step(text: &str) -> Result<v1::Step> {
    use v1::step::Method;
    let mut step: v1::Step =
        serde_json::from_str(text).map_err(|e| Error::field("step", e.to_string()))?;
    let calibration = v1::Calibration {
        dataset: CALIBRATION.into(),
        sequences: Some(32),
        sequence_length: Some(512),
        sampling: v1::CalibrationSampling::First as i32,
    };
    match &mut step.method {
        Some(Method::Wanda(m)) => m.calibration.get_or_insert(calibration),
        Some(Method::Sparsegpt(m)) => m.calibration.get_or_insert(calibration),
        Some(Method::Gptq(m)) => m.calibration.get_or_insert(calibration),
        _ => return Ok(step),
    };
    Ok(step)
}

/// Perplexity, and the seconds it took.
fn measure(model: &Model, text: &str) -> Result<(f64, f64)> {
    let subject = Subject {
        model,
        states: None,
        base: None,
        text: Some(text),
        further: &[],
        choices: None,
        disk_bytes: 0,
        stored: None,
    };
    let options = v1::Evaluation {
        dataset: EVALUATION.into(),
        context: Some(512),
        max_tokens: Some(20_000),
        ..Default::default()
    };
    let start = Instant::now();
    let found = eval::evaluate(&subject, &options, &Progress::silent())?;
    let perplexity = found.iter().find(|m| m.metric == "perplexity").map(|m| m.value);
    let perplexity = perplexity.ok_or_else(|| Error::internal("no perplexity"))?;
    Ok((perplexity, start.elapsed().as_secs_f64()))
}
