//! `planish jobs`: long work.

use std::path::{Path, PathBuf};

use clap::Subcommand;

use super::Context;
use super::error::{CliError, Result};
use super::names::{resource, short, short_model};
use super::output::{self, facts, table};
use super::watch::{self, Display, metadata};
use super::{client::Client, report};
use crate::proto::google::longrunning::{
    CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
    Operation, operation,
};
use crate::proto::v1::{
    ComparisonReport, GetComparisonRequest, OperationState, RenderTrainingRequest, TrainingView,
    render_training_request::Source,
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List jobs, newest first
    List {
        /// Only those that have ended (`true`) or not (`false`)
        #[arg(long, value_name = "BOOL")]
        done: Option<bool>,
        /// At most this many
        #[arg(long, default_value_t = 50)]
        limit: usize,
    },
    /// Follow a job to its end (with --output json: one line for each change)
    Watch { job: String },
    /// Ask a job to stop
    Cancel { job: String },
    /// Look at a job once
    Show { job: String },
    /// Show the loss of a job that trains or has trained
    Loss {
        job: String,
        /// File for the curve (.svg, .png) or all points (.csv), instead of a table
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
    },
    /// Forget a job that has ended; what it made stays
    Delete { job: String },
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let client = context.connect().await?;
        match self {
            Self::List { done, limit } => list(context, &client, done, limit).await,
            Self::Watch { job } => {
                let operation = get(&client, &job).await?;
                let display = if context.output.is_json() {
                    Display::Stream
                } else {
                    Display::for_output(context.output)
                };
                let operation = watch::follow(context, &client, operation, display).await?;
                watch::check(&operation)?;
                if context.output.is_json() { Ok(()) } else { report::operation(&operation) }
            }
            Self::Cancel { job } => {
                let name = resource("operations", &job);
                client.operations().cancel_operation(CancelOperationRequest { name }).await?;
                let operation = get(&client, &job).await?;
                if context.output.is_json() {
                    return output::json(&output::operation_json(&operation)?);
                }
                let state = state_name(metadata(&operation)?.state());
                output::line(format!("asked {} to stop; it is {state}", operation.name))
            }
            Self::Show { job } => {
                let operation = get(&client, &job).await?;
                // What a comparison has so far, also when it will not get further.
                let kind = metadata(&operation)?.kind;
                let unfinished = !matches!(operation.result, Some(operation::Result::Response(_)));
                let so_far = if unfinished && matches!(kind.as_str(), "compare" | "claim") {
                    let request = GetComparisonRequest { name: operation.name.clone() };
                    Some(client.jobs().get_comparison(request).await?.into_inner())
                } else {
                    None
                };
                show(context, &operation, so_far.as_ref())
            }
            Self::Loss { job, to } => loss(context, &client, &job, to.as_deref()).await,
            Self::Delete { job } => {
                let name = resource("operations", &job);
                let request = DeleteOperationRequest { name: name.clone() };
                client.operations().delete_operation(request).await?;
                report::deleted(context, &name)
            }
        }
    }
}

/// The loss of a job: a table, or a file in the form that its name ends with.
async fn loss(context: &Context, client: &Client, job: &str, to: Option<&Path>) -> Result<()> {
    let name = resource("operations", job);
    let extension = to.and_then(Path::extension).and_then(|e| e.to_str());
    let view = match (to, extension) {
        // Lines for a program, a table for people.
        (None, _) if context.output.is_json() => TrainingView::Csv,
        (None, _) => TrainingView::Text,
        (_, Some("svg")) => TrainingView::Svg,
        (_, Some("png")) => TrainingView::Png,
        (_, Some("csv")) => TrainingView::Csv,
        _ => return Err(CliError::usage("the file's name must end with .svg, .png or .csv")),
    };
    let source = Some(Source::Name(name.clone()));
    let request = RenderTrainingRequest { source, view: view.into() };
    let content = client.jobs().render_training(request).await?.into_inner().content;
    if let Some(path) = to {
        std::fs::write(path, &content)
            .map_err(|e| CliError::file(&format!("writing {}", path.display()), &e))?;
        let bytes = i64::try_from(content.len()).unwrap_or(i64::MAX);
        return report::written(context, &[(path.to_owned(), bytes)]);
    }
    let text = String::from_utf8_lossy(&content);
    if context.output.is_json() {
        return output::json(&serde_json::json!({ "name": name, "csv": text }));
    }
    output::text(&text)
}

async fn get(client: &Client, job: &str) -> Result<Operation> {
    let name = resource("operations", job);
    Ok(client.operations().get_operation(GetOperationRequest { name }).await?.into_inner())
}

async fn list(context: &Context, client: &Client, done: Option<bool>, limit: usize) -> Result<()> {
    let filter = done.map(|done| format!("done={done}")).unwrap_or_default();
    let mut operations = Vec::new();
    let mut page_token = String::new();
    while operations.len() < limit {
        let page_size = i32::try_from(limit - operations.len()).unwrap_or(1000).min(1000);
        let request = ListOperationsRequest {
            filter: filter.clone(),
            page_size,
            page_token,
            ..Default::default()
        };
        let page = client.operations().list_operations(request).await?.into_inner();
        operations.extend(page.operations);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    operations.truncate(limit);
    if context.output.is_json() {
        let values = operations.iter().map(output::operation_json).collect::<Result<Vec<_>>>()?;
        return output::json_list("operations", &values);
    }
    if operations.is_empty() {
        return output::line("no jobs");
    }
    let mut rows = Vec::new();
    for operation in &operations {
        let m = metadata(operation)?;
        rows.push(vec![
            short(&operation.name).to_owned(),
            m.kind.clone(),
            state_name(m.state()).to_owned(),
            format!("{:.0}%", m.progress * 100.0),
            short_model(&m.target),
            output::time(m.create_time.as_ref()),
        ]);
    }
    output::line(table(&["job", "kind", "state", "done", "target", "created (UTC)"], &[3], rows))
}

fn show(context: &Context, operation: &Operation, so_far: Option<&ComparisonReport>) -> Result<()> {
    if context.output.is_json() {
        let mut json = output::operation_json(operation)?;
        if let Some(report) = so_far {
            json["comparison"] = serde_json::json!(report);
        }
        return output::json(&json);
    }
    let m = metadata(operation)?;
    let mut rows = vec![
        ("name", operation.name.clone()),
        ("kind", m.kind.clone()),
        ("state", state_name(m.state()).to_owned()),
        ("target", m.target.clone()),
        ("progress", format!("{:.0}%", m.progress * 100.0)),
        ("now", m.message.clone()),
        ("measured", watch::numbers(&m.metrics)),
        ("versions", m.versions.iter().map(|v| short_model(v)).collect::<Vec<_>>().join(", ")),
        ("created", output::time(m.create_time.as_ref())),
        ("started", output::time(m.start_time.as_ref())),
        ("ended", output::time(m.end_time.as_ref())),
    ];
    if m.attempt > 1 {
        rows.push(("attempt", m.attempt.to_string()));
    }
    // Looking at a failed job succeeds; its error is part of what is shown.
    if let Err(error) = watch::check(operation) {
        rows.push(("result", error.to_string()));
    }
    output::line(facts(&rows))?;
    if let Some(report) = so_far {
        output::line("")?;
        return report::comparison(report);
    }
    if matches!(operation.result, Some(operation::Result::Error(_))) {
        return Ok(());
    }
    if operation.done { report::operation(operation) } else { Ok(()) }
}

fn state_name(state: OperationState) -> &'static str {
    match state {
        OperationState::Unspecified => "unknown",
        OperationState::Queued => "queued",
        OperationState::Running => "running",
        OperationState::Succeeded => "succeeded",
        OperationState::Failed => "failed",
        OperationState::Cancelled => "cancelled",
    }
}
