//! `planish bench wire`: one-token requests over gRPC, and straight to the engine behind it.

use std::time::Instant;

use tonic::Code;

use super::{print, set_threads, spread};
use crate::bench::wire::{Run, Wire, summary};
use crate::cli::client::Client;
use crate::cli::error::{CliError, Result};
use crate::cli::output::facts;
use crate::cli::own::Own;
use crate::cli::{Context, models};
use crate::models::decoder::plan::adapters::Mix;
use crate::proto::v1::{
    FinishReason, GenerateRequest, SamplingOptions, TokenIds, generate_request,
};
use crate::serve::engine::{Engine, Event, Request};
use crate::serve::sample::Sampling;

/// Id of the model in the service of the measurement.
const MODEL: &str = "measured";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// File or folder of the model, pypi:package or hf:owner/name
    model: String,
    /// Requests of a repetition, each way
    #[arg(long, value_name = "N", default_value_t = 100)]
    requests: usize,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 1)]
    prompt_tokens: usize,
    /// Measured repetitions, after one that warms up
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repetitions: u16,
    /// Threads that compute [default: one a core, or RAYON_NUM_THREADS]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl Args {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let run = Run {
            requests: self.requests,
            prompt_tokens: self.prompt_tokens,
            repetitions: self.repetitions.into(),
        };
        run.check()?;
        if self.threads.is_some_and(|threads| !set_threads(threads.into())) {
            return Err(CliError::failure(
                "the process computes with another number of threads already; leave --threads out",
            ));
        }
        let folder = tempfile::tempdir().map_err(|e| CliError::file("making a folder", &e))?;
        let mut own = Own::start(folder.path(), context).await?;
        let inner = own.context.clone();
        let prepared = own.during(async {
            let client = inner.connect().await?;
            let version = models::import(&inner, &client, MODEL, &self.model).await?;
            Ok((client, version.name))
        });
        let measured = match prepared.await {
            Ok((client, name)) => {
                let engine = own.engine(&name).await?;
                // In a task, as services make their calls: the thread that waits for a whole program would have to
                // be woken for every message.
                let task = tokio::spawn(measure(run, client, engine, name));
                let failed = |e| CliError::failure(format!("the measurement broke off: {e}"));
                own.during(async { task.await.map_err(failed)? }).await
            }
            Err(error) => Err(error),
        };
        own.stop().await?;
        print(context.output, "wire", Some(&self.model), None, measured?, text)
    }
}

/// The two ways in turn, each first in every other pair.
async fn measure(run: Run, client: Client, engine: Engine, name: String) -> Result<Wire> {
    let (client, engine, name) = (&client, &engine, &*name);
    let vocab = engine.model().decoder()?.vocab;
    let mut repetitions = Vec::with_capacity(run.repetitions);
    for repetition in 0..=run.repetitions {
        let mut pairs = Vec::with_capacity(run.requests);
        for pair in 0..run.requests {
            let prompt: Vec<u32> = (0..run.prompt_tokens)
                .map(|i| ((pair * 7919 + i * 104_729 + 13) % vocab) as u32)
                .collect();
            let (own, wire) = if pair % 2 == 0 {
                let own = in_process(engine, &prompt).await?;
                (own, over_grpc(client, name, &prompt).await?)
            } else {
                let wire = over_grpc(client, name, &prompt).await?;
                (in_process(engine, &prompt).await?, wire)
            };
            if own.1 != wire.1 {
                return Err(CliError::failure(format!(
                    "token {} came from the engine, but {} over gRPC",
                    own.1, wire.1
                )));
            }
            pairs.push([own.0, wire.0]);
        }
        // The first warms up.
        if repetition > 0 {
            repetitions.push(pairs);
        }
    }
    Ok(summary(run, &repetitions))
}

/// Seconds until the end of the answer, and its token.
async fn in_process(engine: &Engine, prompt: &[u32]) -> Result<(f64, u32)> {
    let start = Instant::now();
    let mut events = engine.generate(Request {
        prompt: prompt.to_vec(),
        max_tokens: 1,
        sampling: Sampling::GREEDY,
        end: Vec::new(),
        stop: Vec::new(),
        logprobs: false,
        top_logprobs: 0,
        constraint: None,
        client: 0,
        adapters: Mix::default(),
        deadline: None,
    })?;
    let mut token = None;
    while let Some(event) = events.recv().await {
        match event? {
            Event::Tokens { tokens, .. } => token = tokens.first().map(|token| token.id),
            Event::Done { .. } => return ended(start, token),
        }
    }
    ended(start, None)
}

/// The same of a client and a server.
async fn over_grpc(client: &Client, name: &str, prompt: &[u32]) -> Result<(f64, u32)> {
    let start = Instant::now();
    let request = GenerateRequest {
        model: name.to_owned(),
        prompt: Some(generate_request::Prompt::Tokens(TokenIds { ids: prompt.to_vec() })),
        max_tokens: 1,
        sampling: Some(SamplingOptions { temperature: Some(0.0), ..Default::default() }),
        ignore_eos: true,
        ..Default::default()
    };
    let mut parts = client.generation().generate(request).await?.into_inner();
    let mut token = None;
    let mut done = false;
    while let Some(part) = parts.message().await? {
        token = part.tokens.first().map(|token| token.id).or(token);
        done |= part.finish_reason() != FinishReason::Unspecified;
    }
    ended(start, token.filter(|_| done))
}

fn ended(start: Instant, token: Option<u32>) -> Result<(f64, u32)> {
    let seconds = start.elapsed().as_secs_f64();
    let broken = || tonic::Status::new(Code::Unavailable, "an answer was broken off");
    Ok((seconds, token.ok_or_else(broken)?))
}

fn text(found: &Wire) -> String {
    facts(&[
        ("wire", protocol(&found.run)),
        ("ms in process", spread(&found.in_process_milliseconds)),
        ("ms over gRPC", spread(&found.grpc_milliseconds)),
        ("ms that gRPC adds", spread(&found.added_milliseconds)),
    ])
}

fn protocol(run: &Run) -> String {
    format!(
        "one token after {}, medians of {} requests each way, median of {} (smallest to largest)",
        run.prompt_tokens, run.requests, run.repetitions
    )
}
