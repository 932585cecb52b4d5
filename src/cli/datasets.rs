//! `planish datasets`: text for calibration and evaluation.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};

use super::Context;
use super::error::{CliError, Result};
use super::names::{id_from, resource, short};
use super::output::{self, facts, size, table};
use super::report;
use super::transfer::{self, bytes_bar};
use crate::proto::v1::{
    Dataset, DatasetHeader, DatasetKind, DeleteDatasetRequest, GetDatasetRequest,
    ListDatasetsRequest,
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Import a text (.txt or .jsonl) or, with --kind choices, questions (.jsonl); .gz or not
    Import {
        file: PathBuf,
        /// What the file holds
        #[arg(long, value_enum, default_value_t = Kind::Text)]
        kind: Kind,
        /// Name of the data set; made from the file name when absent
        #[arg(long)]
        id: Option<String>,
        /// A line for people
        #[arg(long, value_name = "TEXT")]
        display_name: Option<String>,
        /// The same id gives the same answer
        #[arg(long, value_name = "ID")]
        request_id: Option<String>,
    },
    /// List data sets
    List,
    /// Show a data set
    Show { dataset: String },
    /// Delete a data set
    Delete {
        dataset: String,
        /// Only if the data set is still at this etag
        #[arg(long)]
        etag: Option<String>,
    },
}

/// What the records of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Running text
    Text,
    /// Questions with choices
    Choices,
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let client = context.connect().await?;
        match self {
            Self::Import { file, kind, id, display_name, request_id } => {
                let dataset_id = match id {
                    Some(id) => id,
                    None => id_from(&transfer::file_name(&file)?)?,
                };
                let header = DatasetHeader {
                    dataset_id,
                    display_name: display_name.unwrap_or_default(),
                    kind: match kind {
                        Kind::Text => DatasetKind::Text,
                        Kind::Choices => DatasetKind::Choices,
                    }
                    .into(),
                    request_id: request_id.unwrap_or_default(),
                    ..Default::default()
                };
                let bytes = std::fs::metadata(&file)
                    .map_err(|e| CliError::file(&format!("reading {}", file.display()), &e))?
                    .len();
                let bar = bytes_bar(context.output, bytes);
                let dataset = transfer::upload_dataset(&client, &file, header, &bar).await?;
                bar.finish_and_clear();
                show(context, &dataset)
            }
            Self::List => {
                let mut datasets = Vec::new();
                let mut request = ListDatasetsRequest { page_size: 1000, ..Default::default() };
                loop {
                    let page = client.datasets().list_datasets(request.clone()).await?.into_inner();
                    datasets.extend(page.datasets);
                    if page.next_page_token.is_empty() {
                        break;
                    }
                    request.page_token = page.next_page_token;
                }
                list(context, datasets)
            }
            Self::Show { dataset } => {
                let request = GetDatasetRequest { name: resource("datasets", &dataset) };
                show(context, &client.datasets().get_dataset(request).await?.into_inner())
            }
            Self::Delete { dataset, etag } => {
                let name = resource("datasets", &dataset);
                let etag = etag.unwrap_or_default();
                let request = DeleteDatasetRequest { name: name.clone(), etag };
                client.datasets().delete_dataset(request).await?;
                report::deleted(context, &name)
            }
        }
    }
}

fn list(context: &Context, datasets: Vec<Dataset>) -> Result<()> {
    if context.output.is_json() {
        return output::json_list("datasets", &datasets);
    }
    if datasets.is_empty() {
        return output::line("no data sets; `planish datasets import FILE` brings one in");
    }
    let rows = datasets
        .into_iter()
        .map(|d| {
            vec![
                short(&d.name).to_owned(),
                d.record_count.to_string(),
                size(d.size_bytes),
                output::time(d.create_time.as_ref()),
                d.display_name,
            ]
        })
        .collect();
    output::line(table(
        &["data set", "documents", "size", "created (UTC)", "description"],
        &[1, 2],
        rows,
    ))
}

fn show(context: &Context, dataset: &Dataset) -> Result<()> {
    if context.output.is_json() {
        return output::json(dataset);
    }
    output::line(facts(&[
        ("data set", dataset.name.clone()),
        ("description", dataset.display_name.clone()),
        ("documents", dataset.record_count.to_string()),
        ("size", size(dataset.size_bytes)),
        ("digest", dataset.digest.clone()),
        ("source", dataset.source.clone()),
        ("created", output::time(dataset.create_time.as_ref())),
        ("etag", dataset.etag.clone()),
    ]))
}
