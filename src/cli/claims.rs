//! `planish claims`: what papers say, measured here.
//!
//! A claim is a folder with `claim.toml`; its full form writes `result.json` and pictures beside it.
//! Without `--endpoint` these verbs start a service of their own, whose data stays in the cache folder:
//! a run that was killed goes on after its last finished arm, and models are fetched once.

use std::path::{Path, PathBuf};
use std::process::Command as Process;

use serde_json::json;
use sha2::{Digest, Sha256};
use tonic::Code;

use super::client::Client;
use super::error::{CliError, Result};
use super::own::{Own, cache_folder};
use super::{Context, compare, output, quickstart, report, transfer, watch};
use crate::code;
use crate::data::images;
use crate::proto::google::longrunning::{Operation, operation};
use crate::proto::v1::{
    CheckClaimRequest, Checkout, Claim, ClaimData, ClaimResult, ComparisonView, DatasetHeader,
    DatasetKind, GetDatasetRequest, MeasuredClaim, RenderClaimsRequest, RunClaimRequest,
};
use crate::recipe::{self, claim, claim::judge};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Run claims and write what comes out beside them
    Run {
        /// Names of claims
        #[arg(required_unless_present = "all")]
        names: Vec<String>,
        /// All claims
        #[arg(long, conflicts_with = "names")]
        all: bool,
        /// The short form: minutes instead of hours; shows that a claim runs, writes no result
        #[arg(long)]
        short: bool,
        /// Run again what was run with this code before
        #[arg(long)]
        again: bool,
        /// Folder with the data sets that claims name
        #[arg(long, env = "PLANISH_DATA", value_name = "FOLDER")]
        data: Option<PathBuf>,
        #[command(flatten)]
        at: At,
    },
    /// Hold results against their claims and this program; fails if one was edited or is stale
    Check {
        /// Names of claims [default: all]
        names: Vec<String>,
        /// Where only expectations changed, write the verdict that they give
        #[arg(long)]
        rejudge: bool,
        #[command(flatten)]
        at: At,
    },
    /// Where code changed since results were written, run a part again: the same numbers renew a result
    Confirm {
        /// Names of claims
        #[arg(required_unless_present = "all")]
        names: Vec<String>,
        /// All claims
        #[arg(long, conflicts_with = "names")]
        all: bool,
        /// Folder with the data sets that claims name
        #[arg(long, env = "PLANISH_DATA", value_name = "FOLDER")]
        data: Option<PathBuf>,
        #[command(flatten)]
        at: At,
    },
    /// Write the page of all claims and print its table
    Table {
        /// File to write [default: docs/claims.md beside the claims' folder]
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
        #[command(flatten)]
        at: At,
    },
}

/// Where claims lie and where they are run.
#[derive(Debug, Clone, clap::Args)]
pub struct At {
    /// Folder of the claims
    #[arg(long, value_name = "FOLDER", default_value = "claims")]
    claims: PathBuf,
    /// Folder for the data of the service that runs claims when no --endpoint is given [default:
    /// planish/claims in the user's cache folder]
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

impl At {
    /// The folder for the data of a service that remembers.
    fn kept(&self) -> Result<PathBuf> {
        self.folder.clone().map_or_else(|| cache_folder("claims"), Ok)
    }
}

/// Between the files that make a data set together.
const JOINED: &str = " + ";

/// Names of the files of a claim.
const CLAIM: &str = "claim.toml";
const RESULT: &str = "result.json";

/// What the results of a claim depend on, for the dirty flag.
const SOURCES: [&str; 7] =
    ["src", "proto", "migrations", "build.rs", "Cargo.toml", "Cargo.lock", "claims"];
/// What claims write themselves.
const WRITTEN: [&str; 2] = [":(exclude)claims/*/result.json", ":(exclude)claims/*/*.svg"];

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::Run { names, short, again, data, at, .. } => {
                let folder = at.kept()?;
                let run = Run { short, again, data, at };
                with_service(&folder, context, async |context| run.all(context, &names).await).await
            }
            Self::Confirm { names, data, at, .. } => {
                let folder = at.kept()?;
                let run = Run { short: false, again: false, data, at };
                with_service(&folder, context, async |context| run.confirm(context, &names).await)
                    .await
            }
            Self::Check { names, rejudge, at } => {
                let folder = passing()?;
                with_service(folder.path(), context, async |context| {
                    check(context, &at, &names, rejudge).await
                })
                .await
            }
            Self::Table { to, at } => {
                let folder = passing()?;
                with_service(folder.path(), context, async |context| {
                    table(context, &at, to.as_deref()).await
                })
                .await
            }
        }
    }
}

/// A folder for a service that has nothing to remember.
fn passing() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(|e| CliError::file("making a temporary folder", &e))
}

/// Works with the service that `--endpoint` names, or with one of its own over `folder`.
async fn with_service(
    folder: &Path,
    context: &Context,
    work: impl AsyncFnOnce(&Context) -> Result<()>,
) -> Result<()> {
    if context.connection.endpoint.is_some() {
        return work(context).await;
    }
    let mut own = Own::start(folder, context).await?;
    let inner = own.context.clone();
    let result = own.during(work(&inner)).await;
    own.stop().await?;
    result
}

/// Names of the folders that hold a claim, sorted.
fn all_names(at: &At) -> Result<Vec<String>> {
    let reading = |e| CliError::file(&format!("reading {}", at.claims.display()), &e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&at.claims).map_err(reading)? {
        let path = entry.map_err(reading)?.path();
        if path.join(CLAIM).is_file()
            && let Some(name) = path.file_name().and_then(|name| name.to_str())
        {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn chosen(at: &At, names: &[String]) -> Result<Vec<String>> {
    if names.is_empty() { all_names(at) } else { Ok(names.to_vec()) }
}

fn read_claim(at: &At, name: &str) -> Result<Claim> {
    let path = at.claims.join(name).join(CLAIM);
    std::fs::metadata(&path)
        .map_err(|e| CliError::file(&format!("reading {}", path.display()), &e))?;
    let claim: Claim = recipe::file::read(&path)?;
    claim::check_text(&claim).map_err(|e| e.within(&path.display().to_string()))?;
    if claim.name != name {
        return Err(CliError::usage(format!(
            "{} is called '{}'; give claim and folder one name",
            path.display(),
            claim.name
        )));
    }
    Ok(claim)
}

/// The result that was written for a claim, if there is one.
fn read_result(at: &At, name: &str) -> Result<Option<ClaimResult>> {
    let path = at.claims.join(name).join(RESULT);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CliError::file(&format!("reading {}", path.display()), &error)),
    };
    let result = serde_json::from_str(&text).map_err(|e| {
        CliError::usage(format!("{} is no result of a claim: {e}; restore it", path.display()))
    })?;
    Ok(Some(result))
}

fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    use std::io::Write as _;
    let mut file = crate::formats::replacement::Replacement::new(path)?;
    file.as_file_mut()
        .write_all(content)
        .map_err(|e| CliError::file(&format!("writing {}", path.display()), &e))?;
    Ok(file.commit()?)
}

fn write_result(at: &At, name: &str, result: &ClaimResult) -> Result<()> {
    let json = serde_json::to_string_pretty(result)
        .map_err(|e| CliError::failure(format!("the result has no JSON form: {e}")))?;
    write_file(&at.claims.join(name).join(RESULT), (json + "\n").as_bytes())
}

/// How claims are run.
struct Run {
    short: bool,
    again: bool,
    data: Option<PathBuf>,
    at: At,
}

impl Run {
    async fn all(&self, context: &Context, names: &[String]) -> Result<()> {
        let names = chosen(&self.at, names)?;
        let client = context.connect().await?;
        let mut results = Vec::new();
        for name in &names {
            let claim = read_claim(&self.at, name)?;
            if !context.output.is_json() {
                eprintln!("{name}: {}", claim.system);
            }
            let result = self.one(context, &client, &claim, None).await?;
            if !self.short {
                write_result(&self.at, name, &result)?;
                self.write_pictures(&client, name, &result).await?;
            }
            if !context.output.is_json() {
                report::claim(&result)?;
                output::line("")?;
            }
            results.push(result);
        }
        if context.output.is_json() {
            return output::json_list("results", &results);
        }
        output::line(overview(&results))
    }

    /// Renews the results of those whose code changed, if a part of them gives the same numbers.
    async fn confirm(&self, context: &Context, names: &[String]) -> Result<()> {
        let client = context.connect().await?;
        let (mut rows, mut failed) = (Vec::new(), 0);
        for name in chosen(&self.at, names)? {
            let claim = read_claim(&self.at, &name)?;
            let Some(result) = read_result(&self.at, &name)? else {
                let problem = format!("'{name}' has no result; run it: planish claims run {name}");
                return Err(CliError::usage(problem));
            };
            let state = if claim::confirm::changed(&result).is_empty() {
                "stands".to_owned()
            } else {
                match self.one(context, &client, &claim, Some(result)).await {
                    Ok(renewed) => {
                        write_result(&self.at, &name, &renewed)?;
                        let arms = renewed.renewals.last().map(|r| r.arms.join(", "));
                        format!("renewed by {}", arms.unwrap_or_default())
                    }
                    Err(error) if error.code() == Code::FailedPrecondition => {
                        failed += 1;
                        error.to_string()
                    }
                    Err(error) => return Err(error),
                }
            };
            rows.push((name, state));
        }
        if context.output.is_json() {
            let list: Vec<_> =
                rows.iter().map(|(n, s)| json!({ "claim": n, "state": s })).collect();
            output::json_list("claims", &list)?;
        } else {
            let rows = rows.into_iter().map(|(name, state)| vec![name, state]).collect();
            output::line(output::table(&["claim", "result"], &[], rows))?;
        }
        match failed {
            0 => Ok(()),
            count => {
                Err(CliError::failure(format!("{count} claims gave other numbers; see above")))
            }
        }
    }

    async fn one(
        &self,
        context: &Context,
        client: &Client,
        claim: &Claim,
        confirm: Option<ClaimResult>,
    ) -> Result<ClaimResult> {
        for data in &claim.data {
            self.bring(context, client, claim, data).await?;
        }
        let model = quickstart::base(context, client, &claim.model_source).await?;
        let mut request = RunClaimRequest {
            claim: Some(claim.clone()),
            model: model.name,
            short: self.short,
            checkout: checkout(&self.at.claims),
            confirm,
            ..Default::default()
        };
        let operation = self.submit(client, &mut request).await?;
        let operation = watch::settle(context, client, operation, false).await?;
        watch::response(&operation)
    }

    /// Asks for the run under an id that stands for claim, form and code: a run that was begun is found
    /// again, and one that ended well is not repeated.
    async fn submit(&self, client: &Client, request: &mut RunClaimRequest) -> Result<Operation> {
        let mut hash = Sha256::new();
        hash.update(prost::Message::encode_to_vec(request));
        for method in
            claim::methods(&claim::form(&request.claim.clone().unwrap_or_default(), self.short)?)
        {
            hash.update(code::of_method(method).unwrap_or_default());
        }
        // Where files differ from the commit, only the program itself says what it is.
        if request.checkout.as_ref().is_none_or(|checkout| checkout.dirty) {
            let program = std::env::current_exe().and_then(std::fs::read);
            hash.update(program.map_err(|e| CliError::file("reading the program", &e))?);
        }
        let hex: String = hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect();
        for attempt in 0.. {
            request.request_id = match (self.again, attempt) {
                (true, _) => uuid::Uuid::new_v4().to_string(),
                (false, 0) => hex.clone(),
                (false, attempt) => format!("{hex}-{attempt}"),
            };
            let operation = client.claims().run_claim(request.clone()).await?.into_inner();
            if !matches!(operation.result, Some(operation::Result::Error(_))) {
                return Ok(operation);
            }
        }
        Err(CliError::failure("every id was used"))
    }

    /// Brings a data set in, unless it is there.
    async fn bring(
        &self,
        context: &Context,
        client: &Client,
        claim: &Claim,
        data: &ClaimData,
    ) -> Result<()> {
        let request = GetDatasetRequest { name: data.dataset.clone() };
        match client.datasets().get_dataset(request).await {
            Ok(found) if found.get_ref().digest == data.digest => return Ok(()),
            Ok(found) => {
                return Err(CliError::usage(format!(
                    "the service has another '{}' ({}) than the claim is about ({}); delete it there",
                    data.dataset,
                    found.get_ref().digest,
                    data.digest
                )));
            }
            Err(status) if status.code() == Code::NotFound => {}
            Err(status) => return Err(status.into()),
        }
        let Some(folder) = &self.data else {
            return Err(CliError::usage(format!(
                "the claim reads '{}'; name the folder of the data sets with --data or PLANISH_DATA",
                data.file
            )));
        };
        let mut bytes = Vec::new();
        let mut paths = data.file.split(JOINED).map(|file| folder.join(file));
        let first = paths.next().unwrap_or_default();
        for path in std::iter::once(first.clone()).chain(paths) {
            let part = std::fs::read(&path)
                .map_err(|e| CliError::file(&format!("reading {}", path.display()), &e))?;
            bytes.extend(part);
        }
        let digest = format!("sha256:{:x}", Sha256::digest(&bytes));
        if digest != data.digest {
            return Err(CliError::usage(format!(
                "{} has the digest {digest}, the claim is about {}; get the file that it names",
                data.file, data.digest
            )));
        }
        let header = DatasetHeader {
            dataset_id: super::names::short(&data.dataset).to_owned(),
            display_name: data.file.clone(),
            kind: kind(claim, data).into(),
            layout: data.layout.clone(),
            ..Default::default()
        };
        let bar = transfer::bytes_bar(context.output, bytes.len() as u64);
        if data.file.contains(JOINED) {
            let failed = |e| CliError::file(&format!("joining {}", data.file), &e);
            let joined = tempfile::tempdir().map_err(failed)?;
            let path = joined.path().join(transfer::file_name(&first)?);
            std::fs::write(&path, &bytes).map_err(failed)?;
            transfer::upload_dataset(client, &path, header, &bar).await?;
        } else {
            transfer::upload_dataset(client, &first, header, &bar).await?;
        }
        bar.finish_and_clear();
        Ok(())
    }

    async fn write_pictures(
        &self,
        client: &Client,
        name: &str,
        result: &ClaimResult,
    ) -> Result<()> {
        let report = result.report.clone().unwrap_or_default();
        let folder = self.at.claims.join(name);
        let pictures =
            [("bytes.svg", ComparisonView::BytesSvg), ("latency.svg", ComparisonView::LatencySvg)];
        for (name, view) in pictures {
            match compare::render(client, &report, view).await {
                Ok(content) => write_file(&folder.join(name), &content)?,
                // A claim that measures no speed has no picture of it, nor an old one.
                Err(error) if error.code() == Code::InvalidArgument => {
                    let _ = std::fs::remove_file(folder.join(name));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What the records of a data set must be: what the claim says, else what its files are or what the comparison
/// uses it for.
fn kind(claim: &Claim, data: &ClaimData) -> DatasetKind {
    if data.kind() != DatasetKind::Unspecified {
        return data.kind();
    }
    let first = data.file.split(JOINED).next().unwrap_or_default();
    if images::is_images(first) {
        return DatasetKind::Images;
    }
    let comparison = claim.comparison.clone().unwrap_or_default();
    let arms = comparison.arms.iter().flat_map(|arm| &arm.evaluation);
    let asked = comparison.evaluation.iter().chain(arms).flat_map(|e| &e.choice);
    match asked.into_iter().any(|choice| choice.dataset == data.dataset) {
        true => DatasetKind::Choices,
        false => DatasetKind::Text,
    }
}

/// The commit of the checkout in which `folder` lies, and whether anything that results depend on
/// differs from it; nothing outside a checkout.
fn checkout(folder: &Path) -> Option<Checkout> {
    let git = |arguments: &[&str]| {
        let out = Process::new("git").arg("-C").arg(folder).args(arguments).output().ok()?;
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "HEAD"])?;
    let top = git(&["rev-parse", "--show-toplevel"])?;
    let mut status = vec!["-C", &top, "status", "--porcelain", "--"];
    status.extend(SOURCES);
    status.extend(WRITTEN);
    let changed = git(&status)?;
    Some(Checkout { commit, dirty: !changed.is_empty() })
}

/// One line a claim.
fn overview(results: &[ClaimResult]) -> String {
    let rows = results
        .iter()
        .map(|result| {
            let verdict = match result.short {
                true => "ran (short form)".to_owned(),
                false => judge::word(result.verdict()).to_owned(),
            };
            let holds = result
                .findings
                .iter()
                .filter(|f| f.verdict() == crate::proto::v1::FindingVerdict::Holds);
            vec![
                result.claim.clone(),
                verdict,
                format!("{} of {}", holds.count(), result.findings.len()),
                format!("{:.1}", result.minutes),
            ]
        })
        .collect();
    output::table(&["claim", "verdict", "effects that hold", "minutes"], &[2, 3], rows)
}

async fn check(context: &Context, at: &At, names: &[String], rejudge: bool) -> Result<()> {
    let client = context.connect().await?;
    let mut rows = Vec::new();
    let mut problems = Vec::new();
    for name in chosen(at, names)? {
        let claim = read_claim(at, &name)?;
        let result = read_result(at, &name)?;
        let request = CheckClaimRequest { claim: Some(claim), result };
        let found = client.claims().check_claim(request).await?.into_inner();
        if rejudge && let Some(rejudged) = &found.rejudged {
            write_result(at, &name, rejudged)?;
            rows.push(vec![
                name,
                judge::word(found.verdict()).to_owned(),
                "judged anew".to_owned(),
            ]);
            continue;
        }
        for problem in &found.problems {
            let kind = problem.kind().as_str_name().trim_start_matches("CLAIM_PROBLEM_KIND_");
            problems.push(json!({
                "claim": name, "kind": kind.to_lowercase(), "description": problem.description,
            }));
        }
        let state = match found.problems.as_slice() {
            [] => "stands".to_owned(),
            [problem, ..] => problem.description.clone(),
        };
        rows.push(vec![name, judge::word(found.verdict()).to_owned(), state]);
    }
    // The page is of all claims, so it is looked at with all of them.
    if names.is_empty() && !rejudge {
        let page = page_path(at);
        let current = std::fs::read_to_string(&page).unwrap_or_default();
        if current != render(&client, at).await? {
            let description = "the page is not that of the results; write it: planish claims table";
            problems.push(json!({
                "claim": page.display().to_string(), "kind": "page", "description": description,
            }));
            rows.push(vec![page.display().to_string(), String::new(), description.to_owned()]);
        }
    }
    if context.output.is_json() {
        output::json_list("problems", &problems)?;
    } else {
        output::line(output::table(&["claim", "verdict", "result"], &[], rows))?;
    }
    match problems.len() {
        0 => Ok(()),
        count => Err(CliError::failure(format!("{count} problems with claims; see above"))),
    }
}

/// `docs/claims.md` beside the folder of the claims.
fn page_path(at: &At) -> PathBuf {
    at.claims.parent().unwrap_or(Path::new("")).join("docs").join("claims.md")
}

async fn render(client: &Client, at: &At) -> Result<String> {
    let mut claims = Vec::new();
    for name in all_names(at)? {
        let (claim, result) = (read_claim(at, &name)?, read_result(at, &name)?);
        claims.push(MeasuredClaim { claim: Some(claim), result });
    }
    let request = RenderClaimsRequest { claims };
    Ok(client.claims().render_claims(request).await?.into_inner().markdown)
}

async fn table(context: &Context, at: &At, to: Option<&Path>) -> Result<()> {
    let client = context.connect().await?;
    let page = render(&client, at).await?;
    let path = to.map_or_else(|| page_path(at), Path::to_owned);
    write_file(&path, page.as_bytes())?;
    let results = all_names(at)?
        .iter()
        .filter_map(|name| read_result(at, name).transpose())
        .collect::<Result<Vec<_>>>()?;
    if context.output.is_json() {
        return output::json(&json!({ "file": path, "claims": results.len() }));
    }
    output::line(overview(&results))?;
    output::line(format!("\n{} written", path.display()))
}
