//! Making a model with random weights: a tokenizer where it reads texts, weights, a version.

use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use serde_json::{Value, json};

use super::work::Job;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};
use crate::models::{lstm, random, two_tower};
use crate::proto::v1;
use crate::seed::Stream;

/// Tokens of a vocabulary where the request does not say.
const VOCABULARY: u32 = 1024;

/// The configuration that a request describes, and what will be made of it: everything that is checked before
/// the job runs.
///
/// # Errors
/// `INVALID_FIELD` with the field.
pub fn config(request: &v1::CreateModelRequest) -> Result<Value> {
    let given = request.config.clone().ok_or_else(|| {
        Error::field("config", "is missing; {\"model_type\": \"conv_net\"} is the least")
    })?;
    let given = serde_json::to_value(given)
        .map_err(|e| Error::internal(format!("a configuration has no JSON form: {e}")))?;
    let mut config = random::whole(given);
    match (&request.tokenizer, reads(&config)) {
        (Some(_), false) => {
            return Err(Error::field("tokenizer", "is for models that read texts; leave it out"));
        }
        (tokenizer, true) => {
            let size = match tokenizer {
                None => 256,
                Some(new) if new.vocab_size == 0 => VOCABULARY,
                Some(new) => new.vocab_size,
            };
            if !(256..=1 << 17).contains(&size) {
                let problem = format!("{size} is outside 256 to 131072");
                return Err(Error::field("tokenizer.vocab_size", problem));
            }
            if config.get("vocab_size").is_some_and(|given| *given != json!(size)) {
                let problem = "vocab_size follows from the tokenizer; leave it out";
                return Err(Error::field("config", problem));
            }
            if let Some(map) = config.as_object_mut() {
                map.insert("vocab_size".to_owned(), json!(size));
            }
        }
        (None, false) => {}
    }
    match random::info(config.clone()) {
        Ok(_) => Ok(config),
        Err(e) if matches!(e.reason(), Reason::UnsupportedModel | Reason::TooLarge) => {
            Err(Error::field("config", e.message()))
        }
        Err(e) => Err(e),
    }
}

/// Whether models of this configuration read texts.
fn reads(config: &Value) -> bool {
    lstm::is_lstm(config) || two_tower::is_two_tower(config)
}

/// Gives an encoded `ModelVersion`.
pub fn run(job: &Job<'_>) -> Result<Vec<u8>> {
    let start = Instant::now();
    let operation = job.operation.name();
    if let Some(row) = job.wait(job.store.step_version(&operation, 0))? {
        return Ok(row.message()?.encode_to_vec());
    }
    let request: v1::CreateModelRequest = job.request()?;
    let mut config = config(&request)?;
    let tokenizer = if reads(&config) {
        job.progress.report(0.1, "making the tokenizer")?;
        Some(match &request.tokenizer {
            None => Tokenizer::bytes()?,
            Some(new) => {
                let size = if new.vocab_size == 0 { VOCABULARY } else { new.vocab_size };
                Tokenizer::train(&job.text(&new.dataset)?, size as usize)?
            }
        })
    } else {
        None
    };
    if let (Some(tokenizer), Some(map)) = (&tokenizer, config.as_object_mut()) {
        // A short text may not have as many pairs.
        map.insert("vocab_size".to_owned(), json!(tokenizer.vocab_size()));
    }
    job.progress.report(0.6, "drawing weights")?;
    let mut model = random::model(config, &Stream::root(request.seed).child("create"))?;
    if let Some(tokenizer) = tokenizer {
        model.set_tokenizer(Some(Arc::new(tokenizer)));
    }
    job.progress.report(0.8, "writing the version")?;
    let data: Vec<String> = request.tokenizer.iter().map(|new| new.dataset.clone()).collect();
    let lineage = v1::Lineage {
        source: "random".to_owned(),
        seed: request.seed,
        data_digests: job.data_digests(&data)?,
        code_version: env!("CARGO_PKG_VERSION").to_owned(),
        seconds: start.elapsed().as_secs_f64(),
        operation,
        ..Default::default()
    };
    let written = job.store.write_version(
        &request.model_id,
        &request.display_name,
        model,
        (&lineage, 0),
        job.scratch,
    );
    Ok(job.wait(written)?.message()?.encode_to_vec())
}
