//! `planish compare`: recipes side by side.

use std::path::{Path, PathBuf};

use clap::ValueEnum;

use super::client::Client;
use super::error::{CliError, Result};
use super::names::ModelName;
use super::run::JobArgs;
use super::{Context, output, watch};
use crate::proto::v1::{
    CompareRequest, Comparison, ComparisonReport, ComparisonView, RenderComparisonRequest,
    render_comparison_request::Source,
};
use crate::recipe;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Comparison file, .toml or .json
    file: PathBuf,
    /// Base, instead of the one that the file names: `name` (its newest version) or `name@3`
    #[arg(long, short)]
    model: Option<ModelName>,
    /// Form of the table
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Form::Text)]
    format: Form,
    /// Folder for report.json, table.md, table.csv and the pictures (.svg and .png)
    #[arg(long, value_name = "FOLDER")]
    to: Option<PathBuf>,
    #[command(flatten)]
    job: JobArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    /// For a terminal
    Text,
    /// Markdown
    Markdown,
    /// One line a run and metric
    Csv,
}

/// Everything that is written with `--to`, besides the report itself.
const FILES: [(&str, ComparisonView); 6] = [
    ("table.md", ComparisonView::Markdown),
    ("table.csv", ComparisonView::Csv),
    ("bytes.svg", ComparisonView::BytesSvg),
    ("bytes.png", ComparisonView::BytesPng),
    ("latency.svg", ComparisonView::LatencySvg),
    ("latency.png", ComparisonView::LatencyPng),
];

impl Args {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        std::fs::metadata(&self.file)
            .map_err(|e| CliError::file(&format!("reading {}", self.file.display()), &e))?;
        let mut comparison: Comparison = recipe::file::read(&self.file)?;
        if let Some(model) = &self.model {
            comparison.model = model.resource();
        }
        if comparison.model.is_empty() {
            return Err(CliError::usage("the file names no base; give one with --model"));
        }
        let client = context.connect().await?;
        let request = CompareRequest {
            comparison: Some(comparison),
            validate_only: self.job.validate_only,
            request_id: self.job.request_id.clone().unwrap_or_default(),
        };
        let operation = client.jobs().compare(request).await?.into_inner();
        let at_once = self.job.at_once();
        let operation = watch::settle(context, &client, operation, at_once).await?;
        if !at_once {
            let report: ComparisonReport = watch::response(&operation)?;
            if let Some(folder) = &self.to {
                write(&client, &report, folder).await?;
            }
            if !context.output.is_json() && self.format != Form::Text {
                let view = match self.format {
                    Form::Csv => ComparisonView::Csv,
                    _ => ComparisonView::Markdown,
                };
                let content = render(&client, &report, view).await?;
                return output::text(&String::from_utf8_lossy(&content));
            }
        }
        self.job.print(context, &operation)
    }
}

/// A report in another form, made by the server.
pub(super) async fn render(
    client: &Client,
    report: &ComparisonReport,
    view: ComparisonView,
) -> Result<Vec<u8>> {
    let source = Some(Source::Report(report.clone()));
    let request = RenderComparisonRequest { source, view: view.into() };
    Ok(client.jobs().render_comparison(request).await?.into_inner().content.to_vec())
}

async fn write(client: &Client, report: &ComparisonReport, folder: &Path) -> Result<()> {
    let failed = |path: &Path, e| CliError::file(&format!("writing {}", path.display()), &e);
    std::fs::create_dir_all(folder).map_err(|e| failed(folder, e))?;
    let json = serde_json::to_string_pretty(report)
        .map_err(|e| CliError::failure(format!("the report has no JSON form: {e}")))?;
    let path = folder.join("report.json");
    std::fs::write(&path, json + "\n").map_err(|e| failed(&path, e))?;
    for (name, view) in FILES {
        let path = folder.join(name);
        match render(client, report, view).await {
            Ok(content) => std::fs::write(&path, content).map_err(|e| failed(&path, e))?,
            // A comparison without speed has no picture of it.
            Err(error) if error.code() == tonic::Code::InvalidArgument => {
                eprintln!("{name} is left out: {error}");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
