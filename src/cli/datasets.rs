//! `planish datasets`: what models are calibrated, tuned and evaluated on.

use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};

use super::Context;
use super::error::{CliError, Result};
use super::names::{id_from, resource, short};
use super::output::{self, facts, size, table};
use super::report;
use super::transfer::{self, bytes_bar};
use crate::proto::v1::{
    Dataset, DatasetHeader, DatasetKind, DatasetLayout, DeleteDatasetRequest, GetDatasetRequest,
    ListDatasetsRequest,
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Import a file: .jsonl, .json, .csv, .tsv, .txt, .conll, .conllu (packed as .gz or not), .parquet
    Import {
        file: PathBuf,
        /// What the file holds
        #[arg(long, value_enum, default_value_t = Kind::Text)]
        kind: Kind,
        /// The labels of an IDX file of images, a file of their own
        #[arg(long, value_name = "FILE")]
        image_labels: Option<PathBuf>,
        #[command(flatten)]
        layout: Box<LayoutArgs>,
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
    /// Conversations, or prompts with answers
    Chat,
    /// Texts with a class each
    Classification,
    /// Texts with a number each
    Regression,
    /// Sentences with a tag for each word
    Tagging,
    /// Prompts with a better and a worse answer
    Preferences,
    /// Texts with any number of classes each
    MultiLabel,
    /// Images with a class each: -ubyte or .idx files with --image-labels, or .bin of CIFAR-10
    Image,
}

impl From<Kind> for DatasetKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Text => Self::Text,
            Kind::Choices => Self::Choices,
            Kind::Chat => Self::Chat,
            Kind::Classification => Self::Classification,
            Kind::Regression => Self::Regression,
            Kind::Tagging => Self::Tagging,
            Kind::Preferences => Self::Preferences,
            Kind::MultiLabel => Self::MultiLabel,
            Kind::Image => Self::Images,
        }
    }
}

/// How the records of a file are read. Columns that are not named are found by usual names.
#[derive(Debug, clap::Args)]
pub struct LayoutArgs {
    /// The text; of tagged sentences the words
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    text_column: Option<String>,
    /// A second text that is read together with the first
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    second_text_column: Option<String>,
    /// The class, the number, or the tags or classes
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    label_column: Option<String>,
    /// What is asked
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    prompt_column: Option<String>,
    /// What the prompt is about
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    input_column: Option<String>,
    /// What is to be answered
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    answer_column: Option<String>,
    /// What the system says before the prompt
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    system_column: Option<String>,
    /// The messages of a conversation
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    messages_column: Option<String>,
    /// The better answer
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    chosen_column: Option<String>,
    /// The worse answer
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    rejected_column: Option<String>,
    /// Whether the first line of a .csv or .tsv names the columns; found out when absent
    #[arg(long, value_name = "BOOL", help_heading = "Columns")]
    header: Option<bool>,
    /// Names of the classes or tags in their order, with commas between them
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    labels: Vec<String>,
    /// A file with the name of a class or tag on each line
    #[arg(long, value_name = "FILE", conflicts_with = "labels")]
    labels_file: Option<PathBuf>,
    /// A caption of images, with {} in the place of the class; may be given several times
    #[arg(long = "template", value_name = "TEXT")]
    templates: Vec<String>,
    /// Leave out records that are of no use, such as blank answers
    #[arg(long)]
    skip_unusable: bool,
    /// Leave out this many records from the start of the file
    #[arg(long, value_name = "COUNT")]
    skip_records: Option<u64>,
    /// Take this many records of the rest [default: all]
    #[arg(long, value_name = "COUNT")]
    max_records: Option<u64>,
}

impl LayoutArgs {
    fn message(self) -> Result<DatasetLayout> {
        let labels = match &self.labels_file {
            None => self.labels,
            Some(path) => std::fs::read_to_string(path)
                .map_err(|e| CliError::file(&format!("reading {}", path.display()), &e))?
                .lines()
                .map(|line| line.trim().to_owned())
                .filter(|line| !line.is_empty())
                .collect(),
        };
        Ok(DatasetLayout {
            text_column: self.text_column.unwrap_or_default(),
            second_text_column: self.second_text_column.unwrap_or_default(),
            label_column: self.label_column.unwrap_or_default(),
            prompt_column: self.prompt_column.unwrap_or_default(),
            input_column: self.input_column.unwrap_or_default(),
            answer_column: self.answer_column.unwrap_or_default(),
            system_column: self.system_column.unwrap_or_default(),
            messages_column: self.messages_column.unwrap_or_default(),
            chosen_column: self.chosen_column.unwrap_or_default(),
            rejected_column: self.rejected_column.unwrap_or_default(),
            has_header: self.header,
            labels,
            templates: self.templates,
            skip_unusable: self.skip_unusable,
            skip_records: self.skip_records,
            max_records: self.max_records,
        })
    }
}

/// Images and their labels in one file, as the server reads them.
fn join(images: &Path, labels: &Path) -> Result<(tempfile::TempDir, PathBuf)> {
    let name = transfer::file_name(images)?;
    let packed = |path: &Path| path.extension().is_some_and(|end| end == "gz");
    if packed(images) != packed(labels) {
        return Err(CliError::usage(
            "images and labels must both be packed (.gz) or both not".to_owned(),
        ));
    }
    let failed = |path: &Path| {
        let shown = path.display().to_string();
        move |e: std::io::Error| CliError::file(&format!("reading {shown}"), &e)
    };
    let folder = tempfile::tempdir().map_err(failed(images))?;
    let joined = folder.path().join(name);
    std::fs::copy(images, &joined).map_err(failed(images))?;
    let mut to = std::fs::File::options().append(true).open(&joined).map_err(failed(&joined))?;
    let mut from = std::fs::File::open(labels).map_err(failed(labels))?;
    std::io::copy(&mut from, &mut to).map_err(failed(labels))?;
    Ok((folder, joined))
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let client = context.connect().await?;
        match self {
            Self::Import { file, kind, image_labels, layout, id, display_name, request_id } => {
                let dataset_id = match id {
                    Some(id) => id,
                    None => id_from(&transfer::file_name(&file)?)?,
                };
                let header = DatasetHeader {
                    dataset_id,
                    display_name: display_name.unwrap_or_default(),
                    kind: DatasetKind::from(kind).into(),
                    layout: Some(layout.message()?),
                    request_id: request_id.unwrap_or_default(),
                    ..Default::default()
                };
                // Kept until the joined file is sent.
                let (_folder, file) = match image_labels {
                    None => (None, file),
                    Some(labels) => {
                        let (folder, file) = join(&file, &labels)?;
                        (Some(folder), file)
                    }
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
                kind(&d).to_owned(),
                d.record_count.to_string(),
                size(d.size_bytes),
                output::time(d.create_time.as_ref()),
                d.display_name,
            ]
        })
        .collect();
    output::line(table(
        &["data set", "kind", "records", "size", "created (UTC)", "description"],
        &[2, 3],
        rows,
    ))
}

fn show(context: &Context, dataset: &Dataset) -> Result<()> {
    if context.output.is_json() {
        return output::json(dataset);
    }
    let layout = dataset.layout.clone().unwrap_or_default();
    let mut rows = vec![
        ("data set", dataset.name.clone()),
        ("description", dataset.display_name.clone()),
        ("kind", kind(dataset).to_owned()),
        ("records", dataset.record_count.to_string()),
    ];
    if dataset.skipped_count > 0 {
        rows.push(("left out", dataset.skipped_count.to_string()));
    }
    let columns: Vec<String> = [
        ("text", &layout.text_column),
        ("second text", &layout.second_text_column),
        ("label", &layout.label_column),
        ("prompt", &layout.prompt_column),
        ("input", &layout.input_column),
        ("answer", &layout.answer_column),
        ("system", &layout.system_column),
        ("messages", &layout.messages_column),
        ("chosen", &layout.chosen_column),
        ("rejected", &layout.rejected_column),
    ]
    .into_iter()
    .filter(|(_, name)| !name.is_empty())
    .map(|(role, name)| format!("{role} = {name}"))
    .collect();
    if !columns.is_empty() {
        rows.push(("columns", columns.join(", ")));
    }
    if let Some(header) = layout.has_header {
        rows.push(("first line", if header { "names of columns" } else { "a record" }.to_owned()));
    }
    if dataset.label_count > 0 {
        let mut names = layout.labels.iter().take(LABELS).cloned().collect::<Vec<_>>().join(", ");
        if layout.labels.len() > LABELS {
            names.push_str(", ...");
        }
        rows.push(("labels", format!("{}: {names}", dataset.label_count)));
    }
    rows.extend([
        ("size", size(dataset.size_bytes)),
        ("digest", dataset.digest.clone()),
        ("source", dataset.source.clone()),
        ("created", output::time(dataset.create_time.as_ref())),
        ("etag", dataset.etag.clone()),
    ]);
    output::line(facts(&rows))
}

/// Labels that are shown.
const LABELS: usize = 20;

fn kind(dataset: &Dataset) -> &'static str {
    match dataset.kind() {
        DatasetKind::Unspecified | DatasetKind::Text => "text",
        DatasetKind::Choices => "choices",
        DatasetKind::Chat => "chat",
        DatasetKind::Classification => "classification",
        DatasetKind::Regression => "regression",
        DatasetKind::Tagging => "tagging",
        DatasetKind::Preferences => "preferences",
        DatasetKind::MultiLabel => "multi_label",
        DatasetKind::Images => "images",
    }
}
