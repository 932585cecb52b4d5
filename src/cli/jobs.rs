//! `planish jobs`: long work.

use clap::Subcommand;

use super::Context;
use super::error::Result;
use super::names::{resource, short, short_model};
use super::output::{self, facts, table};
use super::watch::{self, Display, metadata};
use super::{client::Client, report};
use crate::proto::google::longrunning::{
    CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
    Operation, operation,
};
use crate::proto::v1::{ComparisonReport, GetComparisonRequest, OperationState};

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
            Self::Delete { job } => {
                let name = resource("operations", &job);
                let request = DeleteOperationRequest { name: name.clone() };
                client.operations().delete_operation(request).await?;
                report::deleted(context, &name)
            }
        }
    }
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
