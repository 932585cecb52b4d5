//! `planish adapt`.

use std::path::{Path, PathBuf};

use super::Context;
use super::error::{CliError, Result};
use super::names::{ModelName, resource};
use super::run::JobArgs;
use super::{output, report, watch};
use crate::proto::v1::{
    AdaptReport, AdaptRequest, RenderTrainingRequest, TrainingView, render_training_request,
};
use crate::recipe;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// File with the method and the training, .toml or .json
    file: PathBuf,
    /// Model to adapt: `name` (its newest version) or `name@3`
    #[arg(long, short)]
    model: ModelName,
    /// Name of the adapter to make
    #[arg(long, short, value_name = "NAME")]
    adapter: String,
    /// Data to learn from, instead of what the file names
    #[arg(long, value_name = "NAME")]
    dataset: Option<String>,
    /// Seed, instead of the file's
    #[arg(long)]
    seed: Option<u64>,
    /// Write the loss curve here: .svg, .png, .csv or .txt
    #[arg(long, value_name = "FILE", conflicts_with_all = ["detach", "validate_only"])]
    curve: Option<PathBuf>,
    #[command(flatten)]
    job: JobArgs,
}

impl Args {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        // Read before connecting: a bad file is known without a server.
        std::fs::metadata(&self.file)
            .map_err(|e| CliError::file(&format!("reading {}", self.file.display()), &e))?;
        let view = self.curve.as_deref().map(view).transpose()?;
        let mut request: AdaptRequest = recipe::file::read(&self.file)?;
        let adapter = self.adapter.strip_prefix("adapters/").unwrap_or(&self.adapter);
        request.model = self.model.resource();
        adapter.clone_into(&mut request.adapter_id);
        request.validate_only = self.job.validate_only;
        request.request_id = self.job.request_id.clone().unwrap_or_default();
        if let Some(name) = &self.dataset {
            request.training.get_or_insert_default().dataset = resource("datasets", name);
        }
        if let Some(seed) = self.seed {
            request.seed = seed;
        }
        let client = context.connect().await?;
        let operation = client.jobs().adapt(request).await?.into_inner();
        let detach = self.job.detach || self.job.validate_only;
        let operation = watch::settle(context, &client, operation, detach).await?;
        let training = match self.job.validate_only || self.job.detach {
            true => None,
            false => watch::response::<AdaptReport>(&operation)?.training,
        };
        if let (Some(path), Some(view), Some(training)) = (&self.curve, view, &training) {
            let source = render_training_request::Source::Name(operation.name.clone());
            let request = RenderTrainingRequest { source: Some(source), view: view.into() };
            let content = client.jobs().render_training(request).await?.into_inner().content;
            std::fs::write(path, &content)
                .map_err(|e| CliError::file(&format!("writing {}", path.display()), &e))?;
            tracing::debug!(points = training.points.len(), "the loss curve was written");
        }
        if context.output.is_json() {
            return output::json(&output::operation_json(&operation)?);
        }
        if self.job.validate_only {
            watch::check(&operation)?;
        } else if self.job.detach {
            return watch::detached(&operation);
        }
        if let Some(training) = &training {
            output::line(format!("{}\n", recipe::curve::text(training).trim_end()))?;
        }
        report::operation(&operation)
    }
}

fn view(path: &Path) -> Result<TrainingView> {
    match path.extension().and_then(|end| end.to_str()) {
        Some("svg") => Ok(TrainingView::Svg),
        Some("png") => Ok(TrainingView::Png),
        Some("csv") => Ok(TrainingView::Csv),
        Some("txt") => Ok(TrainingView::Text),
        _ => Err(CliError::usage(format!(
            "'{}' does not say its form; end its name in .svg, .png, .csv or .txt",
            path.display()
        ))),
    }
}
