//! `planish bench serve`: requests to a running server, and how long their answers took.

use std::iter::Take;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::bench::load::{
    Answer, MOST_ANSWER_TOKENS, MOST_REQUESTS, Plan, Planned, Report, Shape, Tally,
};
use crate::bench::stats::Percentiles;
use crate::cli::Context;
use crate::cli::client::Client;
use crate::cli::error::{CliError, Result, code_name};
use crate::cli::names::ModelName;
use crate::cli::output::{self, facts, significant, table};
use crate::proto::v1::{
    FinishReason, GenerateRequest, GetModelVersionRequest, SamplingOptions, TokenIds,
    generate_request,
};

/// Most requests that wait for their answers when they come at a rate.
const MOST_UNDER_WAY: usize = 4096;
/// A client whose request failed waits this long before the next, as one that means well does.
const AFTER_FAILURE: Duration = Duration::from_millis(50);
/// Requests when neither their number nor a time is given.
const REQUESTS: usize = 64;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model that answers: `name` (its newest version) or `name@3`
    #[arg(long, short)]
    model: ModelName,
    /// Clients, each with a connection of its own
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    clients: u16,
    /// Requests a second, at random times; 0 lets each client ask again when it has its answer
    #[arg(long, value_name = "R", default_value_t = 0.0)]
    rate: f64,
    /// End after this many requests [default: 64]
    #[arg(long, value_name = "N", conflicts_with = "seconds")]
    requests: Option<usize>,
    /// Send requests for this long
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Tokens of a prompt: a number, or least:most
    #[arg(long, value_name = "RANGE", default_value = "64", value_parser = range)]
    prompt_tokens: RangeInclusive<u32>,
    /// Tokens of an answer: a number, or least:most
    #[arg(long, value_name = "RANGE", default_value = "32", value_parser = range)]
    answer_tokens: RangeInclusive<u32>,
    /// Tokens that all prompts begin with
    #[arg(long, value_name = "N", default_value_t = 0)]
    shared_prefix: u32,
    /// Same seed, same requests
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Reads `64` or `16:128`.
fn range(text: &str) -> Result<RangeInclusive<u32>, String> {
    let (least, most) = text.split_once(':').unwrap_or((text, text));
    match (least.parse(), most.parse()) {
        (Ok(least), Ok(most)) if 0 < least && least <= most => Ok(least..=most),
        _ => Err("write a number, or the least and the most as 16:128".to_owned()),
    }
}

#[derive(Serialize)]
struct Document<'a> {
    bench: &'static str,
    model: &'a str,
    clients: u16,
    load: &'a Shape,
    #[serde(flatten)]
    report: &'a Report,
}

/// What the tasks of a run share.
struct Run {
    model: String,
    start: Instant,
    /// No request is sent after this time.
    length: Option<Duration>,
    tally: Mutex<Tally>,
}

impl Args {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let load = Shape {
            prompt_tokens: self.prompt_tokens.clone(),
            answer_tokens: self.answer_tokens.clone(),
            shared_prefix: self.shared_prefix,
            rate: self.rate,
            seed: self.seed,
        };
        let (requests, length) = self.extent()?;
        load.check()?;
        let mut clients = Vec::with_capacity(self.clients.into());
        for _ in 0..self.clients {
            clients.push(context.connect().await?);
        }
        let model = self.model.resource();
        let vocab = vocabulary(&clients[0], &model).await?;
        let plan = Plan::new(load.clone(), vocab)?.take(requests);
        warm_up(&clients[0], &model).await?;
        let run = Arc::new(Run {
            model: model.clone(),
            start: Instant::now(),
            length,
            tally: Mutex::default(),
        });
        if self.rate > 0.0 {
            at_a_rate(&run, clients, plan).await;
        } else {
            in_turn(&run, clients, plan).await;
        }
        let elapsed = run.start.elapsed();
        let report = run.with_tally(std::mem::take).report(elapsed);
        if context.output.is_json() {
            output::json(&Document {
                bench: "serve",
                model: &model,
                clients: self.clients,
                load: &load,
                report: &report,
            })
        } else {
            output::line(text(&report))
        }
    }

    /// How many requests at most, and for how long.
    fn extent(&self) -> Result<(usize, Option<Duration>)> {
        let each = u64::from(*self.answer_tokens.end()).max(1);
        let kept = usize::try_from(MOST_ANSWER_TOKENS / each).unwrap_or(MOST_REQUESTS);
        let most = kept.clamp(1, MOST_REQUESTS);
        let Some(seconds) = self.seconds else {
            let requests = self.requests.unwrap_or(REQUESTS);
            if !(1..=most).contains(&requests) {
                return Err(CliError::usage(format!(
                    "--requests {requests}: between 1 and {most} with answers of this length"
                )));
            }
            return Ok((requests, None));
        };
        match Duration::try_from_secs_f64(seconds) {
            Ok(length) if !length.is_zero() && length < Duration::from_secs(86_400) => {
                Ok((most, Some(length)))
            }
            _ => Err(CliError::usage(format!("--seconds {seconds}: above 0 and below a day"))),
        }
    }
}

impl Run {
    fn with_tally<T>(&self, change: impl FnOnce(&mut Tally) -> T) -> T {
        change(&mut self.tally.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends a request that was due at `due` and notes what became of it; whether it was answered.
    async fn send(&self, client: &Client, planned: Planned, due: Instant) -> bool {
        let prompt_tokens = planned.prompt.len() as u64;
        let request = request(&self.model, planned.prompt, planned.answer_tokens);
        match receive(client, request, due).await {
            Ok((arrivals, total)) => {
                let answer = Answer { prompt_tokens, arrivals, total };
                self.with_tally(|tally| tally.answered(&answer));
                true
            }
            Err(status) => {
                self.with_tally(|tally| tally.failed(&code_name(status.code())));
                false
            }
        }
    }
}

/// Every client asks, waits for its answer, and asks again.
async fn in_turn(run: &Arc<Run>, clients: Vec<Client>, plan: Take<Plan>) {
    let plan = Arc::new(Mutex::new(plan));
    let mut tasks = JoinSet::new();
    for client in clients {
        let (run, plan) = (Arc::clone(run), Arc::clone(&plan));
        tasks.spawn(async move {
            while run.length.is_none_or(|length| run.start.elapsed() < length) {
                let next = plan.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some(planned) = next else { return };
                if !run.send(&client, planned, Instant::now()).await {
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
            }
        });
    }
    while tasks.join_next().await.is_some() {}
}

/// Requests are sent when they are due, whether or not others were answered.
async fn at_a_rate(run: &Arc<Run>, clients: Vec<Client>, plan: Take<Plan>) {
    let slots = Arc::new(Semaphore::new(MOST_UNDER_WAY));
    let mut tasks = JoinSet::new();
    for (planned, client) in plan.zip(clients.iter().cycle()) {
        let over = run.length.is_some_and(|length| planned.at >= length);
        let Some(due) = run.start.checked_add(planned.at).filter(|_| !over) else { break };
        tokio::time::sleep_until(due.into()).await;
        match Arc::clone(&slots).try_acquire_owned() {
            Ok(slot) => {
                let (run, client) = (Arc::clone(run), client.clone());
                tasks.spawn(async move {
                    run.send(&client, planned, due).await;
                    drop(slot);
                });
            }
            Err(_) => run.with_tally(Tally::unsent),
        }
        while tasks.try_join_next().is_some() {}
    }
    while tasks.join_next().await.is_some() {}
}

fn request(model: &str, prompt: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        model: model.to_owned(),
        prompt: Some(generate_request::Prompt::Tokens(TokenIds { ids: prompt })),
        max_tokens,
        sampling: Some(SamplingOptions { temperature: Some(0.0), ..Default::default() }),
        ignore_eos: true,
        ..Default::default()
    }
}

/// When each message of an answer came and how many tokens it had, and when the answer ended.
async fn receive(
    client: &Client,
    request: GenerateRequest,
    due: Instant,
) -> Result<(Vec<(Duration, usize)>, Duration), Status> {
    let mut parts = client.generation().generate(request).await?.into_inner();
    let (mut arrivals, mut ended) = (Vec::new(), false);
    while let Some(part) = parts.message().await? {
        arrivals.push((due.elapsed(), part.tokens.len()));
        ended = part.finish_reason() != FinishReason::Unspecified;
    }
    if ended {
        Ok((arrivals, due.elapsed()))
    } else {
        Err(Status::new(Code::Unavailable, "the server broke the answer off"))
    }
}

/// Brings the model into memory, unmeasured; a model that cannot answer fails here, with its reason.
async fn warm_up(client: &Client, model: &str) -> Result<()> {
    receive(client, request(model, vec![0], 1), Instant::now()).await?;
    Ok(())
}

/// Number of token ids of a model.
async fn vocabulary(client: &Client, model: &str) -> Result<u32> {
    let request = GetModelVersionRequest { name: model.to_owned() };
    let version = client.models().get_model_version(request).await?.into_inner();
    let config = serde_json::to_value(&version.config).unwrap_or_default();
    ["/vocab_size", "/text_config/vocab_size"]
        .iter()
        .find_map(|place| config.pointer(place)?.as_f64())
        .filter(|size| (1.0..=f64::from(u32::MAX)).contains(size))
        .map(|size| size as u32)
        .ok_or_else(|| {
            CliError::failure(format!(
                "the configuration of {model} does not say how large its vocabulary is"
            ))
        })
}

fn text(report: &Report) -> String {
    let errors: Vec<_> =
        report.errors.iter().map(|(code, count)| format!("{count} {code}")).collect();
    let unsent = if report.unsent == 0 {
        String::new()
    } else {
        format!("{}, more than {MOST_UNDER_WAY} were under way", report.unsent)
    };
    let facts = facts(&[
        ("seconds", significant(report.seconds)),
        ("requests", report.sent.to_string()),
        ("answered", report.answered.to_string()),
        ("failed", errors.join(", ")),
        ("not sent", unsent),
        ("requests/s", significant(report.requests_per_second)),
        ("tokens/s", significant(report.tokens_per_second)),
        ("prompt tokens/s", significant(report.prompt_tokens_per_second)),
    ]);
    let row = |name: &str, values: Option<Percentiles>| {
        let values = values?;
        let numbers = [values.mean, values.p50, values.p90, values.p95, values.p99, values.max];
        let cells = numbers.iter().map(|v| significant(*v));
        Some(std::iter::once(name.to_owned()).chain(cells).collect::<Vec<_>>())
    };
    let rows: Vec<_> = [
        row("first token", report.first_token_milliseconds),
        row("between tokens", report.between_tokens_milliseconds),
        row("whole answer", report.total_milliseconds),
    ]
    .into_iter()
    .flatten()
    .collect();
    if rows.is_empty() {
        return facts;
    }
    let header = ["milliseconds", "mean", "p50", "p90", "p95", "p99", "max"];
    format!("{facts}\n\n{}", table(&header, &[1, 2, 3, 4, 5, 6], rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_a_number_or_two() {
        assert_eq!(range("64"), Ok(64..=64));
        assert_eq!(range("16:128"), Ok(16..=128));
        for bad in ["", "0", "0:4", "5:4", "a", "1:2:3", "-1", ":3", "3:"] {
            assert!(range(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_text_shows_errors_and_leaves_out_what_is_not_there() {
        let mut tally = Tally::default();
        tally.failed("RESOURCE_EXHAUSTED");
        let shown = text(&tally.clone().report(Duration::from_secs(1)));
        assert!(shown.contains("1 RESOURCE_EXHAUSTED"), "{shown}");
        assert!(!shown.contains("p50") && !shown.contains("not sent"), "{shown}");
        let answer = Answer {
            prompt_tokens: 1,
            arrivals: vec![(Duration::from_millis(20), 1)],
            total: Duration::from_millis(25),
        };
        tally.answered(&answer);
        let shown = text(&tally.report(Duration::from_secs(1)));
        assert!(shown.contains("first token") && !shown.contains("between tokens"), "{shown}");
    }
}
