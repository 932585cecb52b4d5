//! `planish run` and `planish evaluate`.

use std::path::PathBuf;

use clap::Args;

use super::Context;
use super::error::{CliError, Result};
use super::names::{ModelName, resource};
use super::{output, report, watch};
use crate::proto::google::longrunning::Operation;
use crate::proto::v1::{
    ChoiceEvaluation, EvaluateRequest, Evaluation, FactoredAttention, ImageEvaluation, NormBounds,
    RunRecipeRequest, TaskEvaluation, TextEvaluation,
};
use crate::recipe;

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Recipe file, .toml or .json
    recipe: PathBuf,
    /// Model to start from: `name` (its newest version) or `name@3`
    #[arg(long, short)]
    model: ModelName,
    #[command(flatten)]
    job: JobArgs,
}

#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// Model to measure: `name` (its newest version) or `name@3`
    #[arg(long, short)]
    model: ModelName,
    /// Text to measure on; bytes only when absent
    #[arg(long, value_name = "NAME")]
    dataset: Option<String>,
    /// Further texts to measure on, each with a perplexity of its own
    #[arg(long, value_name = "NAME", requires = "dataset")]
    also: Vec<String>,
    /// Version to compare with: adds divergence and agreement
    #[arg(long, value_name = "MODEL")]
    base: Option<ModelName>,
    /// Tokens of a window [default: 512]
    #[arg(long)]
    context: Option<u32>,
    /// Tokens between the starts of windows [default: the context]
    #[arg(long)]
    stride: Option<u32>,
    /// Tokens taken from the start of the text, 0 for all [default: 20000]
    #[arg(long)]
    max_tokens: Option<u32>,
    /// Measure the speed of prefill and decode
    #[arg(long)]
    speed: bool,
    /// Questions with choices to answer: adds accuracy
    #[arg(long, value_name = "NAME")]
    choices: Option<String>,
    /// Images to classify: adds the loss and the share of right answers
    #[arg(long, value_name = "NAME", conflicts_with = "choices")]
    images: Option<String>,
    /// Questions or images taken from the start [default: all]
    #[arg(long)]
    max_items: Option<u32>,
    /// Count the multiplications of a token and the bytes it reads
    #[arg(long)]
    counts: bool,
    /// Time the matrix products alone
    #[arg(long)]
    kernels: bool,
    /// Adapter of the model to measure it with
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// Records of a task: adds its loss and, of classes and tags, accuracy and macro F1
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
    /// Records taken from the start of the task [default: all]
    #[arg(long, requires = "task")]
    max_records: Option<u32>,
    /// Measure sizes of queries and keys on this text, and what they say of fast gradients
    #[arg(long, value_name = "NAME")]
    norms: Option<String>,
    /// Sequences to measure sizes on [default: 16]
    #[arg(long, value_name = "N", requires = "norms")]
    norm_sequences: Option<u32>,
    /// Tokens of each [default: 512]
    #[arg(long, value_name = "N", requires = "norms")]
    norm_tokens: Option<u32>,
    /// Measure sizes with this adapter and without
    #[arg(long, value_name = "NAME", requires = "norms")]
    norm_adapter: Option<String>,
    /// Directions that queries and keys would be projected on before gradients are factored
    #[arg(long, value_name = "N", requires = "norms")]
    norm_project: Option<u32>,
    #[command(flatten)]
    job: JobArgs,
}

#[derive(Debug, Args)]
pub(super) struct JobArgs {
    /// Check and estimate only
    #[arg(long)]
    pub(super) validate_only: bool,
    /// Return at once; the job goes on
    #[arg(long)]
    pub(super) detach: bool,
    /// The same id gives the same answer
    #[arg(long, value_name = "ID")]
    pub(super) request_id: Option<String>,
}

impl RunArgs {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        // Read before connecting: a bad file is known without a server.
        std::fs::metadata(&self.recipe)
            .map_err(|e| CliError::file(&format!("reading {}", self.recipe.display()), &e))?;
        let recipe = recipe::file::read(&self.recipe)?;
        let client = context.connect().await?;
        let request = RunRecipeRequest {
            model: self.model.resource(),
            recipe: Some(recipe),
            validate_only: self.job.validate_only,
            request_id: self.job.request_id.clone().unwrap_or_default(),
        };
        let operation = client.jobs().run_recipe(request).await?.into_inner();
        self.job.finish(context, &client, operation).await
    }
}

impl EvaluateArgs {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let client = context.connect().await?;
        let request = EvaluateRequest {
            model: self.model.resource(),
            evaluation: Some(Evaluation {
                dataset: self.dataset.map(|d| resource("datasets", &d)).unwrap_or_default(),
                context: self.context,
                stride: self.stride,
                max_tokens: self.max_tokens,
                compare_with_base: self.base.is_some(),
                speed: self.speed,
                choice: self.choices.map(|name| ChoiceEvaluation {
                    dataset: resource("datasets", &name),
                    max_items: self.max_items,
                }),
                counts: self.counts,
                kernels: self.kernels,
                task: self.task.map(|name| TaskEvaluation {
                    dataset: resource("datasets", &name),
                    max_records: self.max_records,
                    max_length: None,
                }),
                norm_bounds: self.norms.map(|name| NormBounds {
                    dataset: resource("datasets", &name),
                    sequences: self.norm_sequences,
                    tokens: self.norm_tokens,
                    adapter: self
                        .norm_adapter
                        .map(|name| resource("adapters", &name))
                        .unwrap_or_default(),
                    factored: self.norm_project.map(|project| FactoredAttention {
                        project_d: Some(project),
                        ..Default::default()
                    }),
                }),
                texts: self
                    .also
                    .iter()
                    .map(|name| TextEvaluation {
                        dataset: resource("datasets", name),
                        max_tokens: None,
                    })
                    .collect(),
                images: self.images.map(|name| ImageEvaluation {
                    dataset: resource("datasets", &name),
                    max_items: self.max_items,
                }),
                ..Default::default()
            }),
            adapter: self.adapter.map(|name| resource("adapters", &name)).unwrap_or_default(),
            base: self.base.map(|base| base.resource()).unwrap_or_default(),
            validate_only: self.job.validate_only,
            request_id: self.job.request_id.clone().unwrap_or_default(),
        };
        let operation = client.jobs().evaluate(request).await?.into_inner();
        self.job.finish(context, &client, operation).await
    }
}

impl JobArgs {
    /// Whether the answer comes before the work is done.
    pub(super) fn at_once(&self) -> bool {
        self.detach || self.validate_only
    }

    /// Waits for the operation, unless it was only checked or goes on alone, and prints what came of it.
    pub(super) async fn finish(
        self,
        context: &Context,
        client: &super::client::Client,
        operation: Operation,
    ) -> Result<()> {
        let operation = watch::settle(context, client, operation, self.at_once()).await?;
        self.print(context, &operation)
    }

    /// Prints what came of an operation that was waited for as far as these ask for.
    pub(super) fn print(&self, context: &Context, operation: &Operation) -> Result<()> {
        if context.output.is_json() {
            return output::json(&output::operation_json(operation)?);
        }
        if self.validate_only {
            watch::check(operation)?;
        } else if self.detach {
            return watch::detached(operation);
        }
        report::operation(operation)
    }
}
