//! `planish adapt`.

use std::path::PathBuf;

use super::Context;
use super::error::{CliError, Result};
use super::names::{ModelName, resource};
use super::run::JobArgs;
use super::{output, watch};
use crate::proto::v1::{AdaptReport, AdaptRequest};
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
    #[command(flatten)]
    job: JobArgs,
}

impl Args {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        // Read before connecting: a bad file is known without a server.
        std::fs::metadata(&self.file)
            .map_err(|e| CliError::file(&format!("reading {}", self.file.display()), &e))?;
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
        let at_once = self.job.at_once();
        let operation = watch::settle(context, &client, operation, at_once).await?;
        let shown = !at_once && !context.output.is_json();
        if shown && let Some(training) = watch::response::<AdaptReport>(&operation)?.training {
            output::line(format!("{}\n", recipe::curve::text(&training).trim_end()))?;
        }
        self.job.print(context, &operation)
    }
}
