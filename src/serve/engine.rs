//! One engine thread per loaded model: takes requests, batches their steps, streams tokens.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::sample::Sampling;
use crate::error::Result;
use crate::models::Model;

/// Limits of an engine.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests that run at once.
    pub slots: usize,
    /// Requests that wait; more are refused with LIMIT_REACHED.
    pub queue: usize,
    /// Positions (prompt and answer) a request may use at most; the model's own limit if smaller.
    pub context: usize,
}

/// A generation request in tokens.
#[derive(Debug, Clone)]
pub struct Request {
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub sampling: Sampling,
    /// Tokens that end generation.
    pub end: Vec<u32>,
    pub stop: Vec<String>,
    pub logprobs: bool,
    pub top_logprobs: usize,
}

/// What the engine says of a request.
#[derive(Debug, Clone)]
pub enum Event {
    /// New tokens and the text they complete.
    Tokens { tokens: Vec<Token>, text: String },
    /// The end.
    Done {
        finish: Finish,
        prompt_tokens: usize,
        generated_tokens: usize,
        queue_seconds: f64,
        prefill_seconds: f64,
        decode_seconds: f64,
        text: String,
    },
}

#[derive(Debug, Clone)]
pub struct Token {
    pub id: u32,
    pub text: String,
    pub logprob: Option<f32>,
    pub alternatives: Vec<(u32, String, f32)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    Eos,
    Stop,
    Length,
}

/// A loaded model. Dropping the last handle ends the thread after its running requests.
#[derive(Clone)]
pub struct Engine {}

impl Engine {
    /// Loads the model on a thread of its own.
    pub fn start(_model: Model, _limits: Limits) -> Result<Self> {
        todo!()
    }
    /// Queues a request. The receiver gets events or one error; dropping it frees the slot at the next
    /// step. Refuses a full queue, empty prompts, ids outside the vocabulary, prompts that leave no room.
    pub fn generate(&self, _request: Request) -> Result<mpsc::Receiver<Result<Event>>> {
        todo!()
    }
    /// Log-probabilities of `tokens[1..]` given what stands before each.
    pub async fn score(&self, _tokens: Vec<u32>) -> Result<Vec<f32>> {
        todo!()
    }
    pub fn model(&self) -> &Arc<Model> {
        todo!()
    }
    /// Requests running and waiting now.
    pub fn load(&self) -> (usize, usize) {
        todo!()
    }
    /// False once the thread has failed.
    pub fn healthy(&self) -> bool {
        todo!()
    }
    /// Bytes the weights take in memory.
    pub fn resident_bytes(&self) -> u64 {
        todo!()
    }
}
