//! `planish bench`: what a model, the kernels and a server reach, beside what the machine can do.
//!
//! All but `serve` measure inside this process and need no running server. What each number means is said in
//! `docs/performance.md`.

mod attention;
mod serve;
mod sparse;
mod text;
mod wire;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use self::text::{
    batch_text, bytes, decode_text, embed_text, kernels_text, limits_text, percent, prefill_text,
    spread, train_text,
};
use super::Context;
use super::error::{CliError, Result};
use super::output::{self, Output};
use crate::bench::embed;
use crate::bench::kernels::{self, SHAPES, Settings, TOKENS};
use crate::bench::limits::Limits;
use crate::bench::model::{Run, Subject};
use crate::bench::row_groups;
use crate::bench::train;
use crate::bench::{Machine, set_threads};
use crate::models::decoder::plan::{Arithmetic, CacheFormat};
use crate::models::encoder::plan::Precision;
use crate::models::import::{self, Source};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// One sequence, token by token
    Decode(DecodeArgs),
    /// Many tokens of one sequence at once
    Prefill(PrefillArgs),
    /// Several sequences that decode in the same steps
    Batch(BatchArgs),
    /// Texts of one length through an encoder
    Embed(EmbedArgs),
    /// Steps of training adapters on a frozen model
    Train(TrainArgs),
    /// Images through a classifier, as it is stored and as dense weights
    Images(sparse::ImagesArgs),
    /// The products of every weight layout
    Kernels(KernelsArgs),
    /// Exact and factored gradients of attention as entries grow
    AttentionGradient(attention::GradientArgs),
    /// A small decoder trained with exact and with factored attention
    AttentionTraining(attention::TrainingArgs),
    /// Load on a running server
    Serve(serve::Args),
    /// What gRPC adds to a request of one token
    Wire(wire::Args),
}

/// How everything inside this process is measured.
#[derive(Debug, Args)]
struct Common {
    /// Threads that compute [default: one a core, or RAYON_NUM_THREADS]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Measured repetitions, after one that warms up
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repetitions: u16,
    /// Do not measure what the machine can do at most
    #[arg(long)]
    no_limits: bool,
    /// Keep activations f32, as evaluation does, where serving rounds them to 8 bits
    #[arg(long)]
    exact: bool,
}

impl Common {
    fn arithmetic(&self) -> Arithmetic {
        if self.exact { Arithmetic::Exact } else { Arithmetic::Integer }
    }
}

/// The model that is measured.
#[derive(Debug, Args)]
struct ModelArgs {
    /// File or folder of the model, pypi:package or hf:owner/name
    model: String,
    /// How keys and values are kept
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = CacheArg::F32)]
    cache: CacheArg,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CacheArg {
    F32,
    F16,
    Q8,
}

#[derive(Debug, Args)]
pub struct DecodeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens that are decoded
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Tokens before them
    #[arg(long, value_name = "N", default_value_t = 32)]
    prompt: usize,
}

#[derive(Debug, Args)]
pub struct PrefillArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens that are run at once
    #[arg(long, value_name = "N", default_value_t = 512)]
    tokens: usize,
    /// Tokens before them
    #[arg(long, value_name = "N", default_value_t = 0)]
    prompt: usize,
}

#[derive(Debug, Args)]
pub struct BatchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Numbers of sequences
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,2,4,8,16")]
    sequences: Vec<usize>,
    /// Tokens that each sequence decodes
    #[arg(long, value_name = "N", default_value_t = 64)]
    tokens: usize,
    /// Tokens before them
    #[arg(long, value_name = "N", default_value_t = 32)]
    prompt: usize,
}

#[derive(Debug, Args)]
pub struct EmbedArgs {
    /// File or folder of the model, pypi:package or hf:owner/name
    model: String,
    /// Texts that are embedded at once
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch: usize,
    /// Tokens of each text
    #[arg(long, value_name = "N", default_value_t = 32)]
    length: usize,
    /// Numbers in which the encoder computes
    #[arg(long, value_enum, value_name = "NUMBERS", default_value_t = PrecisionArg::F32)]
    precision: PrecisionArg,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PrecisionArg {
    F32,
    Bf16,
    Int8,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::F32 => Self::F32,
            PrecisionArg::Bf16 => Self::Bf16,
            PrecisionArg::Int8 => Self::Int8,
        }
    }
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    /// File or folder of the model, pypi:package or hf:owner/name
    model: String,
    /// Sequences of a step
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch: usize,
    /// Tokens of each sequence
    #[arg(long, value_name = "N", default_value_t = 256)]
    length: usize,
    /// Rank of the adapters
    #[arg(long, value_name = "N", default_value_t = 8)]
    rank: usize,
    /// Linear layers that get one, by parts of their names
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "q_proj,v_proj,query,value"
    )]
    targets: Vec<String>,
    /// Numbers in which products run
    #[arg(long, value_enum, value_name = "NUMBERS", default_value_t = TrainPrecision::F32)]
    precision: TrainPrecision,
    /// Keep the inputs of blocks only and compute each block again for its gradient
    #[arg(long)]
    checkpoint: bool,
    /// Take the loss without gradients
    #[arg(long)]
    forward_only: bool,
    /// What the frozen linear layers are: stored, dense, 2 to 8 (bits of groups of 64), or decoded-2 to
    /// decoded-8 (what the codes stand for, in f32)
    #[arg(long, value_name = "BASE", default_value = "stored", value_parser = train_base)]
    base: train::Base,
    /// Train all tensors of a decoder in the place of adapters
    #[arg(long)]
    full: bool,
    /// Step with AdamW in the place of plain descent
    #[arg(long)]
    adam: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TrainPrecision {
    F32,
    Bf16,
}

#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// Only layouts whose name contains this
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    layout: String,
    /// Shapes, outputs x inputs [default: the linear layers of SmolLM2-135M]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = shape)]
    shape: Vec<[usize; 2]>,
    /// Numbers of tokens [default: 1,8,64,512; of row groups 1,16,196]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Row groups against the same tiles with every column kept and against the tensor library, in f32, in the
    /// place of layouts [default shapes: of 1 x 1 convolutions]
    #[arg(long, conflicts_with_all = ["layout", "exact"])]
    row_groups: bool,
    /// Rows that share their columns, of row groups
    #[arg(long, value_name = "N", default_value_t = row_groups::GROUP, requires = "row_groups")]
    group: usize,
    /// Shares of columns that row groups keep
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_values_t = row_groups::DENSITIES,
        requires = "row_groups"
    )]
    density: Vec<f64>,
    #[command(flatten)]
    common: Common,
}

/// Reads `dense` or `decoded-4`.
fn train_base(text: &str) -> Result<train::Base, String> {
    let bits = |text: &str| text.parse().ok();
    match text {
        "stored" => Some(train::Base::Stored),
        "dense" => Some(train::Base::Dense),
        text => match text.strip_prefix("decoded-") {
            Some(text) => bits(text).map(train::Base::Decoded),
            None => bits(text).map(train::Base::Grouped),
        },
    }
    .ok_or_else(|| "write stored, dense, a number of bits, or decoded- and one".to_owned())
}

/// Reads `576x1536`.
fn shape(text: &str) -> Result<[usize; 2], String> {
    let parts = text.split_once('x').and_then(|(a, b)| Some([a.parse().ok()?, b.parse().ok()?]));
    parts.ok_or_else(|| "write outputs x inputs, for instance 576x1536".to_owned())
}

/// What is printed as JSON: what was measured, where, and against what.
#[derive(Serialize)]
struct Document<'a, T> {
    bench: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a str>,
    machine: Machine,
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<&'a Limits>,
    #[serde(flatten)]
    result: T,
}

#[derive(Serialize)]
struct Rows<T> {
    rows: Vec<T>,
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::Serve(args) => args.run(context).await,
            Self::Wire(args) => args.run(context).await,
            Self::Decode(DecodeArgs { model, tokens, prompt }) => {
                model.measure(context.output, move |bench| bench.decode(prompt, tokens)).await
            }
            Self::Prefill(PrefillArgs { model, tokens, prompt }) => {
                model.measure(context.output, move |bench| bench.prefill(prompt, tokens)).await
            }
            Self::Batch(BatchArgs { model, sequences, tokens, prompt }) => {
                let work = move |bench: &mut Bench| bench.batch(prompt, tokens, &sequences);
                model.measure(context.output, work).await
            }
            Self::Embed(args) => args.run(context.output).await,
            Self::Train(args) => args.run(context.output).await,
            Self::Images(args) => args.run(context.output).await,
            Self::Kernels(args) => {
                let form = context.output;
                blocking(move || args.run(form)).await
            }
            Self::AttentionGradient(args) => {
                let form = context.output;
                blocking(move || args.run(form)).await
            }
            Self::AttentionTraining(args) => {
                let form = context.output;
                blocking(move || args.run(form)).await
            }
        }
    }
}

/// Heavy work stays off the runtime's threads, so that Ctrl-C is heard.
async fn blocking(work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| CliError::failure(format!("the measurement broke off: {e}")))?
}

impl Common {
    fn apply(&self) -> Result<()> {
        match self.threads {
            Some(threads) if !set_threads(threads.into()) => Err(CliError::failure(
                "the process computes with another number of threads already; leave --threads out",
            )),
            _ => Ok(()),
        }
    }

    fn limits(&self, working_set: u64) -> Option<Limits> {
        (!self.no_limits).then(|| Limits::measure(working_set))
    }
}

/// A model being measured.
struct Bench {
    form: Output,
    name: String,
    subject: Subject,
    limits: Option<Limits>,
    repetitions: usize,
    cache: CacheFormat,
}

impl ModelArgs {
    async fn measure(
        self,
        form: Output,
        work: impl FnOnce(&mut Bench) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        // Belongs to this future: it is removed also when the user interrupts.
        let folder = tempfile::tempdir().map_err(|e| CliError::file("making a folder", &e))?;
        let place = folder.path().to_owned();
        blocking(move || {
            self.common.apply()?;
            let model = import::open(&fetch(&self.model, &place, form)?)?;
            let subject = Subject::new(&model, self.common.arithmetic())?;
            let mut bench = Bench {
                form,
                limits: self.common.limits(subject.costs().bytes()),
                subject,
                name: self.model,
                repetitions: self.common.repetitions.into(),
                cache: match self.cache {
                    CacheArg::F32 => CacheFormat::F32,
                    CacheArg::F16 => CacheFormat::F16,
                    CacheArg::Q8 => CacheFormat::Q8,
                },
            };
            work(&mut bench)
        })
        .await
    }
}

/// Files of the model, fetched into `place` if they are not here.
fn fetch(model: &str, place: &Path, form: Output) -> Result<PathBuf> {
    let source = Source::parse(model)?;
    if let Source::Path(path) = &source {
        // Before the limits are measured, and with the exit code of what is not there.
        std::fs::metadata(path)
            .map_err(|e| CliError::file(&format!("reading {}", path.display()), &e))?;
    }
    let say = |message: &str| {
        if !form.is_json() {
            eprintln!("{message}");
        }
    };
    Ok(source.fetch(place, &say, &|| false)?)
}

impl EmbedArgs {
    async fn run(self, form: Output) -> Result<()> {
        let folder = tempfile::tempdir().map_err(|e| CliError::file("making a folder", &e))?;
        let place = folder.path().to_owned();
        blocking(move || {
            self.common.apply()?;
            let model = import::open_any(&fetch(&self.model, &place, form)?)?.encoder()?;
            let run = embed::Run {
                batch: self.batch,
                length: self.length,
                repetitions: self.common.repetitions.into(),
            };
            let found = embed::measure(&model, self.precision.into(), run)?;
            let limits = self.common.limits(found.weight_bytes);
            print(form, "embed", Some(&self.model), limits.as_ref(), found, embed_text)
        })
        .await
    }
}

impl TrainArgs {
    async fn run(self, form: Output) -> Result<()> {
        let folder = tempfile::tempdir().map_err(|e| CliError::file("making a folder", &e))?;
        let place = folder.path().to_owned();
        blocking(move || {
            self.common.apply()?;
            let model = import::open_any(&fetch(&self.model, &place, form)?)?;
            let run = train::Run {
                base: self.base,
                full: self.full,
                adam: self.adam,
                batch: self.batch,
                length: self.length,
                rank: self.rank,
                targets: self.targets,
                bf16: self.precision == TrainPrecision::Bf16,
                checkpoint_activations: self.checkpoint,
                forward_only: self.forward_only,
                repetitions: self.common.repetitions.into(),
            };
            let weights = model.bytes();
            let found = train::measure(model, run)?;
            let limits = self.common.limits(weights);
            print(form, "train", Some(&self.model), limits.as_ref(), found, train_text)
        })
        .await
    }
}

impl Bench {
    fn settings(&self, prompt_tokens: usize, tokens: usize) -> Run {
        Run { prompt_tokens, tokens, repetitions: self.repetitions, cache: self.cache }
    }

    fn print<T: Serialize>(
        &self,
        bench: &'static str,
        result: T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<()> {
        let (model, limits) = (Some(self.name.as_str()), self.limits.as_ref());
        print(self.form, bench, model, limits, result, text)
    }

    fn decode(&mut self, prompt: usize, tokens: usize) -> Result<()> {
        let run = self.settings(prompt, tokens);
        let found = self.subject.decode(run, 1, self.limits.as_ref())?;
        self.print("decode", found, decode_text)
    }

    fn prefill(&mut self, prompt: usize, tokens: usize) -> Result<()> {
        let run = self.settings(prompt, tokens);
        let found = self.subject.prefill(run, self.limits.as_ref())?;
        self.print("prefill", found, prefill_text)
    }

    fn batch(&mut self, prompt: usize, tokens: usize, sequences: &[usize]) -> Result<()> {
        let run = self.settings(prompt, tokens);
        let rows = sequences
            .iter()
            .map(|count| self.subject.decode(run, *count, self.limits.as_ref()))
            .collect::<Result<Vec<_>, _>>()?;
        self.print("batch", Rows { rows }, |found| batch_text(&found.rows))
    }
}

impl KernelsArgs {
    fn run(self, form: Output) -> Result<()> {
        self.common.apply()?;
        let or = |given: Vec<usize>, default: &[usize]| match given.is_empty() {
            true => default.to_vec(),
            false => given,
        };
        let shapes = |default: &[[usize; 2]]| match self.shape.is_empty() {
            true => default.to_vec(),
            false => self.shape.clone(),
        };
        if self.row_groups {
            let settings = row_groups::Settings {
                shapes: shapes(&row_groups::SHAPES),
                tokens: or(self.tokens, &row_groups::TOKENS),
                densities: self.density,
                group: self.group,
                repetitions: self.common.repetitions.into(),
            };
            let limits = self.common.limits(kernels::WORKING_SET);
            let found = row_groups::measure(&settings)?;
            let text = sparse::row_groups_text;
            return print(form, "row-groups", None, limits.as_ref(), found, text);
        }
        let limits = self.common.limits(kernels::WORKING_SET);
        let settings = Settings {
            layout: self.layout,
            shapes: shapes(&SHAPES),
            tokens: or(self.tokens, &TOKENS),
            repetitions: self.common.repetitions.into(),
            arithmetic: self.common.arithmetic(),
        };
        let mut rows = Vec::new();
        kernels::measure(&settings, limits.as_ref(), |row| {
            rows.push(row);
            Ok::<_, CliError>(())
        })?;
        print(form, "kernels", None, limits.as_ref(), Rows { rows }, |found| {
            kernels_text(&found.rows)
        })
    }
}

fn print<T: Serialize>(
    form: Output,
    bench: &'static str,
    model: Option<&str>,
    limits: Option<&Limits>,
    result: T,
    text: impl FnOnce(&T) -> String,
) -> Result<()> {
    let machine = Machine::here();
    if form.is_json() {
        return output::json(&Document { bench, model, machine, limits, result });
    }
    let mut lines = vec![format!(
        "{}, {}, {} threads",
        machine.processor, machine.instructions, machine.threads
    )];
    lines.extend(limits.map(limits_text));
    lines.push(text(&result));
    output::line(lines.join("\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_outputs_by_inputs() {
        assert_eq!(shape("576x1536"), Ok([576, 1536]));
        for bad in ["", "576", "x", "1x2x3", "-1x2", "axb"] {
            assert!(shape(bad).is_err(), "{bad}");
        }
    }
}
