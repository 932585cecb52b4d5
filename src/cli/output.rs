//! What verbs print: tables for people, canonical proto JSON for programs.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use comfy_table::{
    Cell, CellAlignment, ContentArrangement, ContentLineStyle, LineStyle, Table, TableStyle,
};
use pbjson_types::Any;
use prost::Message;
use serde::Serialize;
use serde_json::{Value, json};

use super::error::{CliError, Result};
pub use crate::eval::format::{count, seconds, significant, size};
use crate::proto::google::longrunning::{Operation, operation};
use crate::proto::v1;

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Tables and lines for people
    Text,
    /// Canonical proto JSON, errors included
    Json,
}

impl Output {
    /// Whether programs read the output.
    pub fn is_json(self) -> bool {
        self == Self::Json
    }

    /// Whether a progress bar makes sense.
    pub fn shows_bar(self) -> bool {
        !self.is_json() && io::stderr().is_terminal() && io::stdout().is_terminal()
    }
}

/// Writes a line to standard output.
pub fn line(text: impl AsRef<str>) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_ref().as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()?;
    Ok(())
}

/// Writes text as it is to standard output, at once.
pub fn text(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes a message as one indented JSON document.
pub fn json(value: &impl Serialize) -> Result<()> {
    line(serde_json::to_string_pretty(value).map_err(unprintable)?)
}

/// Writes a message as one line of JSON.
pub fn json_line(value: &impl Serialize) -> Result<()> {
    line(serde_json::to_string(value).map_err(unprintable)?)
}

/// Writes a list as `{"<key>": [...]}`; unlike the canonical mapping it names an empty list, which
/// spares every reader a special case.
pub fn json_list(key: &str, items: &[impl Serialize]) -> Result<()> {
    json(&json!({ key: items }))
}

fn unprintable(error: serde_json::Error) -> CliError {
    CliError::failure(format!("the answer has no JSON form: {error}"))
}

/// An operation in JSON, with its payloads unpacked.
pub fn operation_json(operation: &Operation) -> Result<Value> {
    let mut value = json!({ "name": operation.name, "done": operation.done });
    if let Some(metadata) = &operation.metadata {
        value["metadata"] = any_json(metadata)?;
    }
    match &operation.result {
        Some(operation::Result::Response(response)) => value["response"] = any_json(response)?,
        Some(operation::Result::Error(error)) => {
            let details = error.details.iter().map(any_json).collect::<Result<Vec<_>>>()?;
            value["error"] =
                json!({ "code": error.code, "message": error.message, "details": details });
        }
        None => {}
    }
    Ok(value)
}

/// An `Any` in the canonical form: the fields of the message beside `@type`. A type that this program
/// does not know keeps its bytes.
fn any_json(any: &Any) -> Result<Value> {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    let mut value = match name {
        "planish.v1.OperationMetadata" => message::<v1::OperationMetadata>(any),
        "planish.v1.ModelVersion" => message::<v1::ModelVersion>(any),
        "planish.v1.RecipePlan" => message::<v1::RecipePlan>(any),
        "planish.v1.RecipeReport" => message::<v1::RecipeReport>(any),
        "planish.v1.EvaluationReport" => message::<v1::EvaluationReport>(any),
        "planish.v1.ComparisonPlan" => message::<v1::ComparisonPlan>(any),
        "planish.v1.ComparisonReport" => message::<v1::ComparisonReport>(any),
        "planish.v1.AdaptPlan" => message::<v1::AdaptPlan>(any),
        "planish.v1.AdaptReport" => message::<v1::AdaptReport>(any),
        "planish.v1.ClaimResult" => message::<v1::ClaimResult>(any),
        "google.protobuf.Empty" => Ok(json!({ "value": {} })),
        "google.rpc.ErrorInfo" => decode::<tonic_types::pb::ErrorInfo>(any).map(|info| {
            json!({ "reason": info.reason, "domain": info.domain, "metadata": info.metadata })
        }),
        "google.rpc.BadRequest" => decode::<tonic_types::pb::BadRequest>(any).map(|bad| {
            let violations: Vec<_> = bad
                .field_violations
                .iter()
                .map(|v| json!({ "field": v.field, "description": v.description }))
                .collect();
            json!({ "field_violations": violations })
        }),
        _ => {
            use std::fmt::Write as _;
            let hex = any.value.iter().fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            Ok(json!({ "hex": hex }))
        }
    }?;
    value["@type"] = json!(any.type_url);
    Ok(value)
}

fn message<M: Message + Default + Serialize>(any: &Any) -> Result<Value> {
    serde_json::to_value(decode::<M>(any)?).map_err(unprintable)
}

/// The message inside an `Any` whose type the call fixes.
pub fn decode<M: Message + Default>(any: &Any) -> Result<M> {
    M::decode(any.value.as_ref()).map_err(|e| {
        CliError::failure(format!("the server sent a {} that cannot be read: {e}", any.type_url))
    })
}

const STYLE: TableStyle = TableStyle::new()
    .header_lines(ContentLineStyle::none())
    .content_lines(ContentLineStyle::none())
    .header_separator(LineStyle::none().fill('─').junction('─'));

/// A table without frames: a header line, then rows. Columns named in `right` hold numbers.
pub fn table(header: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(STYLE).set_content_arrangement(if io::stdout().is_terminal() {
        ContentArrangement::Dynamic
    } else {
        ContentArrangement::Disabled
    });
    table.set_header(header.iter().map(Cell::new).collect::<Vec<_>>());
    for row in rows {
        table.add_row(row);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// Lines of `name  value`, aligned; empty values are left out.
pub fn facts(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut lines = Vec::new();
    for (name, value) in rows.iter().filter(|(_, value)| !value.is_empty()) {
        lines.push(format!("{name:width$}  {value}"));
    }
    lines.join("\n")
}

/// A time of the server as `2025-01-31 09:30:00` (UTC).
pub fn time(stamp: Option<&pbjson_types::Timestamp>) -> String {
    let Some(stamp) = stamp else { return String::new() };
    // The JSON form of a timestamp is RFC 3339; its date arithmetic need not be repeated here.
    match serde_json::to_value(stamp) {
        Ok(Value::String(text)) => text.chars().take(19).collect::<String>().replacen('T', " ", 1),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        let stamp = pbjson_types::Timestamp { seconds: 86_400, nanos: 5 };
        assert_eq!(time(Some(&stamp)), "1970-01-02 00:00:00");
        assert_eq!(time(None), "");
    }

    #[test]
    fn payloads_of_operations_are_unpacked() {
        let report =
            v1::EvaluationReport { version: "models/m/versions/1".into(), ..Default::default() };
        let operation = Operation {
            name: "operations/x".into(),
            metadata: None,
            done: true,
            result: Some(operation::Result::Response(Any {
                type_url: "type.googleapis.com/planish.v1.EvaluationReport".into(),
                value: report.encode_to_vec().into(),
            })),
        };
        let value = operation_json(&operation).unwrap();
        assert_eq!(value["response"]["version"], "models/m/versions/1");
        assert_eq!(value["response"]["@type"], "type.googleapis.com/planish.v1.EvaluationReport");
    }
}
