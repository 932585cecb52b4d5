//! Waiting for long work: follows an operation and shows how far it is.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tonic::Code;

use super::Context;
use super::client::Client;
use super::error::{CliError, Result};
use super::names::short;
use super::output::{self, Output, decode};
use crate::proto::google::longrunning::{Operation, operation};
use crate::proto::v1::{OperationMetadata, WatchOperationRequest, WatchOperationResponse};

/// How long a lost connection is tried again before the watch gives up; the work goes on regardless.
const PATIENCE: Duration = Duration::from_secs(30);

/// Time between lines of progress in a log.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// How progress is shown.
pub enum Display {
    /// A bar on a terminal.
    Bar(ProgressBar),
    /// A line on standard error now and then (logs, pipes).
    Lines { last: Option<Instant> },
    /// Every look at the operation as a line of JSON on standard output.
    Stream,
    /// Nothing; the caller prints the result.
    Silent,
}

impl Display {
    /// What suits the output: a bar on terminals, lines elsewhere, nothing beside JSON.
    pub fn for_output(output: Output) -> Self {
        match output {
            Output::Json => Self::Silent,
            Output::Text if output.shows_bar() => Self::Bar(bar()),
            Output::Text => Self::Lines { last: None },
        }
    }

    fn show(&mut self, look: &WatchOperationResponse) -> Result<()> {
        if let Self::Stream = self {
            return stream(look);
        }
        let metadata = look.operation.as_ref().map(metadata).transpose()?.unwrap_or_default();
        let (progress, message, measured) = match &look.event {
            Some(event) => (event.progress, event.message.clone(), &event.metrics),
            None => (metadata.progress, metadata.message, &metadata.metrics),
        };
        let numbers = numbers(measured);
        let message = if numbers.is_empty() { message } else { format!("{message}: {numbers}") };
        match self {
            Self::Bar(bar) => {
                bar.set_position(per_mille(progress));
                bar.set_message(message);
            }
            Self::Lines { last }
                if !message.is_empty() && last.is_none_or(|t| t.elapsed() > BETWEEN_LINES) =>
            {
                eprintln!("{:3.0}% {message}", progress * 100.0);
                *last = Some(Instant::now());
            }
            _ => {}
        }
        Ok(())
    }

    fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }

    fn note(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.println(text),
            _ => eprintln!("{text}"),
        }
    }
}

/// What training measures, as one line; what its method adds comes last.
pub fn numbers(metrics: &BTreeMap<String, f64>) -> String {
    let known: [(&str, &dyn Fn(f64) -> String); 6] = [
        ("loss", &|v| format!("loss {v:.4}")),
        ("validation_loss", &|v| format!("validation {v:.4}")),
        ("validation_accuracy", &|v| format!("accuracy {:.1}%", v * 100.0)),
        ("learning_rate", &|v| format!("rate {v:.2e}")),
        ("tokens_per_second", &|v| format!("{v:.0} tokens/s")),
        ("resident_bytes", &|v| output::size(v as i64)),
    ];
    // These are in the message, or of interest in the report only.
    let said = ["step", "steps", "epoch", "gradient_norm", "validation_step"];
    let shown = known.iter().filter_map(|(name, show)| metrics.get(*name).map(|v| show(*v)));
    let others = metrics.iter().filter(|(name, _)| {
        !said.contains(&name.as_str()) && known.iter().all(|(known, _)| known != name)
    });
    let others =
        others.map(|(name, v)| format!("{} {}", name.replace('_', " "), output::significant(*v)));
    shown.chain(others).collect::<Vec<_>>().join(", ")
}

fn stream(look: &WatchOperationResponse) -> Result<()> {
    let mut value = serde_json::Map::new();
    if let Some(operation) = &look.operation {
        value.insert("operation".into(), output::operation_json(operation)?);
    }
    if let Some(event) = &look.event {
        value.insert("event".into(), serde_json::to_value(event).unwrap_or_default());
    }
    output::json_line(&value)
}

/// A bar of a thousand steps on standard error.
fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(1000), ProgressDrawTarget::stderr());
    let template = "{elapsed_precise} {bar:32} {percent:>3}% {wide_msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn per_mille(share: f64) -> u64 {
    (share.clamp(0.0, 1.0) * 1000.0) as u64
}

/// The metadata of an operation; empty when the server sent none.
pub fn metadata(operation: &Operation) -> Result<OperationMetadata> {
    operation.metadata.as_ref().map_or_else(|| Ok(OperationMetadata::default()), decode)
}

/// The response of a finished operation, or the error it ended with.
pub fn response<M: prost::Message + Default>(operation: &Operation) -> Result<M> {
    match &operation.result {
        Some(operation::Result::Response(any)) => decode(any),
        Some(operation::Result::Error(status)) => Err(CliError::from_operation(status)),
        None => Err(CliError::failure(format!("{} ended without a result", operation.name))),
    }
}

/// Fails with the error that the operation ended with, if it did.
pub fn check(operation: &Operation) -> Result<()> {
    match &operation.result {
        Some(operation::Result::Error(status)) => Err(CliError::from_operation(status)),
        _ => Ok(()),
    }
}

/// Follows `operation` to its end and gives it done; a failed operation is not an error here.
/// Survives a restart of the server.
pub async fn follow(
    context: &Context,
    client: &Client,
    operation: Operation,
    mut display: Display,
) -> Result<Operation> {
    if operation.done {
        let look = WatchOperationResponse { operation: Some(operation.clone()), event: None };
        if let Display::Stream = display {
            display.show(&look)?;
        }
        return Ok(operation);
    }
    let id = short(&operation.name);
    context.on_interrupt(format!(
        "interrupted; the job goes on: `planish jobs watch {id}` returns to it, \
         `planish jobs cancel {id}` stops it"
    ));
    let mut request = WatchOperationRequest { name: operation.name.clone(), after_sequence: 0 };
    let mut lost = None;
    let result = loop {
        match look(client, &mut request, &mut display, &mut lost).await {
            Ok(operation) => break Ok(operation),
            Err(error) if error.code() == Code::Unavailable => {
                let since = *lost.get_or_insert_with(|| {
                    display.note("the connection was lost; trying again");
                    Instant::now()
                });
                if since.elapsed() > PATIENCE {
                    break Err(error);
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            Err(error) => break Err(error),
        }
    };
    display.finish();
    result
}

/// One stream of looks: to the end of the operation or of the connection.
async fn look(
    client: &Client,
    request: &mut WatchOperationRequest,
    display: &mut Display,
    lost: &mut Option<Instant>,
) -> Result<Operation> {
    let mut looks = client.jobs().watch_operation(request.clone()).await?.into_inner();
    while let Some(look) = looks.message().await? {
        *lost = None;
        if let Some(event) = &look.event {
            request.after_sequence = request.after_sequence.max(event.sequence);
        }
        display.show(&look)?;
        if let Some(operation) = look.operation
            && operation.done
        {
            return Ok(operation);
        }
    }
    // A server that stops ends its streams without an error.
    Err(CliError::unavailable("the server ended the watch; the job goes on when it is back"))
}

/// Follows an operation as verbs do unless `--detach` was given: progress on standard error, then the
/// operation, done and successful. With `detach` gives it back as it is.
pub async fn settle(
    context: &Context,
    client: &Client,
    operation: Operation,
    detach: bool,
) -> Result<Operation> {
    if detach {
        return Ok(operation);
    }
    let display = Display::for_output(context.output);
    let operation = follow(context, client, operation, display).await?;
    if context.output.is_json() && check(&operation).is_err() {
        output::json(&output::operation_json(&operation)?)?;
    }
    check(&operation)?;
    Ok(operation)
}

/// Says how to come back to a job that was left running.
pub fn detached(operation: &Operation) -> Result<()> {
    let id = short(&operation.name);
    output::line(format!("{}\nwatch it with `planish jobs watch {id}`", operation.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_training_measures_is_one_line() {
        let metrics = [
            ("step", 12.0),
            ("loss", 2.345_67),
            ("validation_loss", 2.5),
            ("validation_accuracy", 0.875),
            ("learning_rate", 0.00025),
            ("tokens_per_second", 530.4),
            ("resident_bytes", 1.5e9),
            ("kept_ranks", 96.0),
        ];
        let metrics = metrics.map(|(name, value)| (name.to_owned(), value)).into();
        assert_eq!(
            numbers(&metrics),
            format!(
                "loss 2.3457, validation 2.5000, accuracy 87.5%, rate 2.50e-4, 530 tokens/s, {}, kept \
                 ranks 96.0",
                output::size(1_500_000_000)
            )
        );
        assert_eq!(numbers(&BTreeMap::new()), "");
    }
}
