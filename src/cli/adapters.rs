//! `planish adapters`: small changes of a model, chosen by each request.

use std::path::{Path, PathBuf};

use clap::Subcommand;

use super::Context;
use super::client::Client;
use super::error::{CliError, Result};
use super::names::{ModelName, id_from, resource, short, short_model};
use super::output::{self, facts, size, table};
use super::report;
use super::run::JobArgs;
use super::transfer::{self, Destination, bytes_bar};
use crate::methods::adapt::stored::FILES;
use crate::proto::v1::import_adapter_request::Source;
use crate::proto::v1::{
    Adapter, AdapterForm, AdapterMethod, AdapterUse, DeleteAdapterRequest, ExportAdapterRequest,
    GetAdapterRequest, ImportAdapterRequest, ListAdaptersRequest, LoadAdapterRequest,
    MergeAdapterRequest, UnloadAdapterRequest, UploadedFiles,
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Import an adapter from a folder that PEFT or an export wrote
    Import(ImportArgs),
    /// List adapters
    List {
        /// Only those of this model
        #[arg(long, value_name = "MODEL")]
        base: Option<ModelName>,
    },
    /// Show an adapter
    Show { adapter: String },
    /// Write the files of an adapter as they were imported
    Export {
        adapter: String,
        /// Folder to write to, made when absent
        #[arg(long, value_name = "PATH")]
        to: PathBuf,
        /// Replace files that exist
        #[arg(long)]
        force: bool,
        /// Form of the files [default: as they are kept]
        #[arg(long, value_enum, value_name = "FORM")]
        form: Option<Form>,
    },
    /// Delete an adapter; running requests keep it
    Delete {
        adapter: String,
        /// Only if the adapter is still at this etag
        #[arg(long)]
        etag: Option<String>,
    },
    /// Load an adapter ahead of its first request
    Load { adapter: String },
    /// Drop an adapter from memory; running requests keep it
    Unload { adapter: String },
    /// Put an adapter into the weights of a version, as a new version
    Merge(MergeArgs),
}

/// Forms of the files of an adapter.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Form {
    /// PEFT's LORA
    PeftLora,
    /// PEFT's ADALORA
    PeftAdalora,
}

#[derive(Debug, clap::Args)]
pub struct MergeArgs {
    adapter: String,
    /// Version to merge into: `name` (its newest) or `name@3` [default: the one it was trained on]
    #[arg(long, value_name = "MODEL")]
    into: Option<ModelName>,
    /// Multiplies what the adapter changes
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    weight: Option<f32>,
    /// Round quantised weights anew; the report says what that loses
    #[arg(long)]
    allow_requantise: bool,
    #[command(flatten)]
    job: JobArgs,
}

impl MergeArgs {
    async fn run(self, context: &Context) -> Result<()> {
        let request = MergeAdapterRequest {
            name: resource("adapters", &self.adapter),
            model: self.into.map(|m| m.resource()).unwrap_or_default(),
            weight: self.weight,
            allow_requantise: self.allow_requantise,
            validate_only: self.job.validate_only,
            request_id: self.job.request_id.clone().unwrap_or_default(),
        };
        let client = context.connect().await?;
        let operation = client.adapters().merge_adapter(request).await?.into_inner();
        self.job.finish(context, &client, operation).await
    }
}

#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// Folder with adapter_config.json and adapter_model.safetensors, or what an export wrote
    folder: PathBuf,
    /// Model it was made for: `name` (checked against the newest version) or `name@3`
    #[arg(long, value_name = "MODEL")]
    base: ModelName,
    /// Name of the adapter; made from the folder's when absent
    #[arg(long)]
    id: Option<String>,
    /// A line for people
    #[arg(long, value_name = "TEXT")]
    display_name: Option<String>,
    /// FOLDER is a path on the server (which must allow it) instead of this machine
    #[arg(long)]
    on_server: bool,
    /// Check the adapter and describe it without keeping it
    #[arg(long)]
    validate_only: bool,
    /// The same id gives the same answer
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let client = context.connect().await?;
        match self {
            Self::Import(args) => args.run(context, &client).await,
            Self::List { base } => list(context, &client, base).await,
            Self::Show { adapter } => {
                let request = GetAdapterRequest { name: resource("adapters", &adapter) };
                show(context, &client.adapters().get_adapter(request).await?.into_inner())
            }
            Self::Export { adapter, to, force, form } => {
                let form = match form {
                    None => AdapterForm::Unspecified,
                    Some(Form::PeftLora) => AdapterForm::PeftLora,
                    Some(Form::PeftAdalora) => AdapterForm::PeftAdalora,
                };
                let name = resource("adapters", &adapter);
                let request = ExportAdapterRequest { name, form: form.into() };
                let to = Destination { path: to, single: false, force };
                let bar = bytes_bar(context.output, 0);
                let files = transfer::download_adapter(&client, request, &to, &bar).await?;
                report::written(context, &files)
            }
            Self::Delete { adapter, etag } => {
                let name = resource("adapters", &adapter);
                let etag = etag.unwrap_or_default();
                let request = DeleteAdapterRequest { name: name.clone(), etag };
                client.adapters().delete_adapter(request).await?;
                report::deleted(context, &name)
            }
            Self::Load { adapter } => {
                let request = LoadAdapterRequest { name: resource("adapters", &adapter) };
                let answer = client.adapters().load_adapter(request).await?.into_inner();
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
            Self::Unload { adapter } => {
                let name = resource("adapters", &adapter);
                let request = UnloadAdapterRequest { name: name.clone() };
                client.adapters().unload_adapter(request).await?;
                if context.output.is_json() {
                    return output::json(&serde_json::json!({ "name": name }));
                }
                output::line(format!("{name} unloaded"))
            }
            Self::Merge(args) => args.run(context).await,
        }
    }
}

impl ImportArgs {
    async fn run(self, context: &Context, client: &Client) -> Result<()> {
        let folder = self.folder.to_str().ok_or_else(|| {
            CliError::usage(format!("{} has no name that can be sent", self.folder.display()))
        })?;
        let adapter_id = match self.id {
            Some(id) => id,
            None => id_from(folder)?,
        };
        let source = if self.on_server {
            Source::Path(folder.to_owned())
        } else {
            Source::Uploaded(upload(context, client, &self.folder).await?)
        };
        let request = ImportAdapterRequest {
            adapter_id,
            base: self.base.resource(),
            source: Some(source),
            display_name: self.display_name.unwrap_or_default(),
            validate_only: self.validate_only,
            request_id: self.request_id.unwrap_or_default(),
        };
        let adapter = client.adapters().import_adapter(request).await?.into_inner();
        show(context, &adapter)
    }
}

async fn upload(context: &Context, client: &Client, folder: &Path) -> Result<UploadedFiles> {
    let mut paths: Vec<PathBuf> = FILES.iter().map(|name| folder.join(name)).collect();
    paths.retain(|path| path.is_file());
    if paths.is_empty() {
        // The name of a file that every adapter of PEFT has.
        paths.push(folder.join(FILES[0]));
    }
    let mut total = 0;
    for path in &paths {
        let file = path.metadata();
        total +=
            file.map_err(|e| CliError::file(&format!("reading {}", path.display()), &e))?.len();
    }
    let bar = bytes_bar(context.output, total);
    let mut files = Vec::new();
    for path in &paths {
        files.push(transfer::upload(client, path, &bar).await?);
    }
    bar.finish_and_clear();
    Ok(UploadedFiles { files })
}

async fn list(context: &Context, client: &Client, base: Option<ModelName>) -> Result<()> {
    let base_model = base.map(|m| m.resource()).unwrap_or_default();
    let mut adapters: Vec<Adapter> = Vec::new();
    let mut request = ListAdaptersRequest { page_size: 1000, base_model, ..Default::default() };
    loop {
        let page = client.adapters().list_adapters(request.clone()).await?.into_inner();
        adapters.extend(page.adapters);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    if context.output.is_json() {
        return output::json_list("adapters", &adapters);
    }
    if adapters.is_empty() {
        return output::line(
            "no adapters; `planish adapters import FOLDER --base MODEL` brings one in",
        );
    }
    let rows = adapters
        .into_iter()
        .map(|a| {
            vec![
                short(&a.name).to_owned(),
                short_model(&a.base_model),
                ranks(&a),
                size(a.resident_bytes),
                output::time(a.create_time.as_ref()),
                a.display_name,
            ]
        })
        .collect();
    output::line(table(
        &["adapter", "model", "rank", "in memory", "created (UTC)", "description"],
        &[2, 3],
        rows,
    ))
}

fn show(context: &Context, adapter: &Adapter) -> Result<()> {
    if context.output.is_json() {
        return output::json(adapter);
    }
    let scales = if adapter.min_scale == adapter.max_scale {
        adapter.max_scale.to_string()
    } else {
        format!("{} to {}", adapter.min_scale, adapter.max_scale)
    };
    output::line(facts(&[
        ("adapter", adapter.name.clone()),
        ("description", adapter.display_name.clone()),
        ("model", adapter.base_model.clone()),
        ("checked with", short_model(&adapter.base_version)),
        ("kind", kind(adapter.method()).to_owned()),
        ("rank", ranks(adapter)),
        ("scale", scales),
        (
            "changes",
            format!("{} linears: {}", adapter.linear_count, adapter.target_modules.join(", ")),
        ),
        ("parameters", output::count(adapter.parameter_count)),
        ("in memory", size(adapter.resident_bytes)),
        (
            "on disk",
            if adapter.total_bytes > 0 { size(adapter.total_bytes) } else { String::new() },
        ),
        ("digest", adapter.digest.clone()),
        ("source", adapter.source.clone()),
        ("created", output::time(adapter.create_time.as_ref())),
        ("etag", adapter.etag.clone()),
    ]))
}

fn kind(method: AdapterMethod) -> &'static str {
    match method {
        AdapterMethod::Unspecified => "",
        AdapterMethod::Lora => "low-rank products",
        AdapterMethod::Dora => "low-rank products and magnitudes of rows (DoRA)",
        AdapterMethod::Tensors => "whole tensors, or products on embeddings",
        AdapterMethod::Head => "a head",
    }
}

fn ranks(adapter: &Adapter) -> String {
    if adapter.min_rank == adapter.max_rank {
        adapter.max_rank.to_string()
    } else {
        format!("{} to {}", adapter.min_rank, adapter.max_rank)
    }
}

/// Reads `name` or `name=0.5`.
pub fn parse_use(text: &str) -> Result<AdapterUse, String> {
    let (name, weight) = match text.split_once('=') {
        None => (text, None),
        Some((name, weight)) => {
            let weight = weight.parse().map_err(|_| format!("'{weight}' is no number"))?;
            (name, Some(weight))
        }
    };
    if name.is_empty() {
        return Err("write an adapter as `name` or `name=0.5`".to_owned());
    }
    Ok(AdapterUse { name: resource("adapters", name), weight })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_have_weights() {
        let read = |text: &str| parse_use(text).map(|u| (u.name, u.weight));
        assert_eq!(read("a").unwrap(), ("adapters/a".to_owned(), None));
        assert_eq!(read("adapters/a=-0.5").unwrap(), ("adapters/a".to_owned(), Some(-0.5)));
        for bad in ["", "=1", "a=", "a=x"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
