//! `planish generate`, `planish score`, `planish tokenize`.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::Args;

use super::Context;
use super::adapters::parse_use;
use super::client::Client;
use super::error::{CliError, Result};
use super::names::ModelName;
use super::output::{self, significant, table};
use crate::proto::v1::generate_request::Constraint;
use crate::proto::v1::{
    AdapterUse, Chat, ChatMessage, FinishReason, GenerateRequest, GenerateResponse,
    SamplingOptions, ScoreRequest, Token, TokenIds, TokenizeRequest, generate_request,
    score_request, tokenize_request,
};

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Model that answers: `name` (its newest version) or `name@3`
    #[arg(long, short)]
    model: ModelName,
    /// What to continue; standard input when absent or `-`
    prompt: Option<String>,
    /// Treat the prompt as a message of a conversation
    #[arg(long)]
    chat: bool,
    /// System message of the conversation (means --chat)
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Token ids to continue instead of a prompt: 1,2,3
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["prompt", "chat", "system"])]
    tokens: Option<Vec<u32>>,
    /// Most tokens to generate [default: 128]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    max_tokens: u32,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// End before this string; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Show the log-probability of each token
    #[arg(long)]
    logprobs: bool,
    /// Show this many likeliest alternatives of each token
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    top_logprobs: u32,
    /// Do not stop at the model's end tokens
    #[arg(long, conflicts_with = "Form")]
    ignore_eos: bool,
    /// Adapter to apply, with a weight where it is not 1 (`name=0.5`); may be repeated
    #[arg(long = "adapter", value_name = "NAME", value_parser = parse_use)]
    adapters: Vec<AdapterUse>,
    #[command(flatten)]
    form: FormArgs,
}

/// What the answer must look like.
#[derive(Debug, Args)]
#[command(next_help_heading = "Form of the answer")]
#[group(id = "Form", multiple = false)]
struct FormArgs {
    /// Answer with JSON that satisfies this schema: a file, or the schema itself
    #[arg(long, value_name = "FILE|JSON")]
    json_schema: Option<String>,
    /// Answer with a text that this regular expression matches as a whole
    #[arg(long, value_name = "PATTERN")]
    regex: Option<String>,
    /// Answer with a text that the grammar in this file derives
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
}

impl FormArgs {
    fn constraint(self) -> Result<Option<Constraint>> {
        let read = |path: &Path| {
            std::fs::read_to_string(path)
                .map_err(|e| CliError::file(&format!("reading {}", path.display()), &e))
        };
        Ok(match (self.json_schema, self.regex, self.grammar) {
            (Some(schema), ..) if schema.trim_start().starts_with('{') => {
                Some(Constraint::JsonSchema(schema))
            }
            (Some(file), ..) => Some(Constraint::JsonSchema(read(file.as_ref())?)),
            (_, Some(pattern), _) => Some(Constraint::Regex(pattern)),
            (.., Some(file)) => Some(Constraint::Grammar(read(&file)?)),
            (None, None, None) => None,
        })
    }
}

/// How tokens are chosen.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// 0 always takes the likeliest token [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep the k likeliest tokens [default: all]
    #[arg(long, value_name = "K", default_value_t = 0, hide_default_value = true)]
    top_k: u32,
    /// Keep the likeliest tokens that hold this share of probability [default: 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Keep tokens with this share of the likeliest one's probability [default: 0]
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    min_p: f32,
    /// Makes tokens seen before less likely [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Taken from the logits of tokens generated before [default: 0]
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    presence_penalty: f32,
    /// The same, for each time they were generated [default: 0]
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    frequency_penalty: f32,
    /// Same seed, same text [default: drawn by the server]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

#[derive(Debug, Args)]
pub struct ScoreArgs {
    /// Model that scores: `name` (its newest version) or `name@3`
    #[arg(long, short)]
    model: ModelName,
    /// Text to score; standard input when absent or `-`
    text: Option<String>,
    /// Token ids to score instead: 1,2,3
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with = "text")]
    tokens: Option<Vec<u32>>,
    /// Adapter to apply, with a weight where it is not 1 (`name=0.5`); may be repeated
    #[arg(long = "adapter", value_name = "NAME", value_parser = parse_use)]
    adapters: Vec<AdapterUse>,
}

#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// Model whose tokenizer is used: `name` (its newest version) or `name@3`
    #[arg(long, short)]
    model: ModelName,
    /// Text to turn into tokens; standard input when absent or `-`
    text: Option<String>,
    /// Token ids to turn into text instead: 1,2,3
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with = "text")]
    tokens: Option<Vec<u32>>,
    /// Lay the text out as a message of a conversation
    #[arg(long, conflicts_with = "tokens")]
    chat: bool,
    /// System message of the conversation (means --chat)
    #[arg(long, value_name = "TEXT", conflicts_with = "tokens")]
    system: Option<String>,
    /// Add the model's start token where it asks for one
    #[arg(long)]
    add_special_tokens: bool,
}

impl GenerateArgs {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let constraint = self.form.constraint()?;
        let prompt = match self.tokens {
            Some(ids) => generate_request::Prompt::Tokens(TokenIds { ids }),
            None => {
                let text = given_or_read(self.prompt).await?;
                if self.chat || self.system.is_some() {
                    generate_request::Prompt::Chat(conversation(self.system, text))
                } else {
                    generate_request::Prompt::Text(text)
                }
            }
        };
        let s = self.sampling;
        let request = GenerateRequest {
            model: self.model.resource(),
            prompt: Some(prompt),
            max_tokens: self.max_tokens,
            sampling: Some(SamplingOptions {
                temperature: s.temperature,
                top_k: s.top_k,
                top_p: s.top_p,
                min_p: s.min_p,
                repetition_penalty: s.repetition_penalty,
                presence_penalty: s.presence_penalty,
                frequency_penalty: s.frequency_penalty,
                seed: s.seed,
            }),
            stop: self.stop,
            logprobs: self.logprobs || self.top_logprobs > 0,
            top_logprobs: self.top_logprobs,
            ignore_eos: self.ignore_eos,
            constraint,
            adapters: self.adapters,
        };
        let client = context.connect().await?;
        if context.output.is_json() {
            let mut parts = client.generation().generate(request).await?.into_inner();
            while let Some(part) = parts.message().await? {
                output::json_line(&part)?;
            }
            return Ok(());
        }
        let show_tokens = request.logprobs;
        let answer = receive(&client, request, true).await?;
        if show_tokens {
            output::line(token_table(&answer.tokens))?;
        }
        if std::io::stderr().is_terminal() {
            eprintln!("{}", summary(&answer.last));
        }
        Ok(())
    }
}

/// A whole answer.
pub struct Answer {
    pub text: String,
    pub tokens: Vec<Token>,
    /// The last part, with the reason, the usage and the timings.
    pub last: GenerateResponse,
}

/// Receives an answer; with `show` prints it as it comes and ends the line.
pub async fn receive(client: &Client, request: GenerateRequest, show: bool) -> Result<Answer> {
    let mut parts = client.generation().generate(request).await?.into_inner();
    let (mut text, mut tokens) = (String::new(), Vec::new());
    let mut last = GenerateResponse::default();
    while let Some(mut part) = parts.message().await? {
        if show {
            output::text(&printable(&part.text))?;
        }
        text.push_str(&part.text);
        tokens.append(&mut part.tokens);
        last = part;
    }
    if show && !text.ends_with('\n') {
        output::text("\n")?;
    }
    if last.finish_reason() == FinishReason::Unspecified {
        return Err(CliError::unavailable("the server broke the answer off"));
    }
    Ok(Answer { text, tokens, last })
}

/// Text of a model without control characters, which could drive the terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c })
        .collect()
}

/// `42 tokens, 31.5 tokens/s; the prompt's 12 tokens took 0.1 s; ended by end token; seed 7`
fn summary(last: &GenerateResponse) -> String {
    let usage = last.usage.unwrap_or_default();
    let timings = last.timings.unwrap_or_default();
    let reason = match last.finish_reason() {
        FinishReason::Unspecified => "nothing",
        FinishReason::Eos => "the end token",
        FinishReason::Stop => "a stop string",
        FinishReason::Length => "the length limit",
    };
    let speed = f64::from(usage.generated_tokens) / timings.decode_seconds;
    let speed = if speed.is_finite() { speed } else { 0.0 };
    let known = match usage.cached_prompt_tokens {
        0 => String::new(),
        known => format!(" ({known} known)"),
    };
    format!(
        "[{} tokens, {} tokens/s; {} tokens of prompt{known} in {}; ended by {reason}; seed {}]",
        usage.generated_tokens,
        significant(speed),
        usage.prompt_tokens,
        output::seconds(timings.prefill_seconds),
        last.seed
    )
}

impl ScoreArgs {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let input = match self.tokens {
            Some(ids) => score_request::Input::Tokens(TokenIds { ids }),
            None => score_request::Input::Text(given_or_read(self.text).await?),
        };
        let request = ScoreRequest {
            model: self.model.resource(),
            input: Some(input),
            adapters: self.adapters,
        };
        let client = context.connect().await?;
        let answer = client.generation().score(request).await?.into_inner();
        if context.output.is_json() {
            return output::json(&answer);
        }
        output::line(token_table(&answer.tokens))?;
        output::line(format!(
            "\ntotal {:.4}, perplexity {:.3}",
            answer.total_logprob, answer.perplexity
        ))
    }
}

impl TokenizeArgs {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let decode = self.tokens.is_some();
        let input = match self.tokens {
            Some(ids) => tokenize_request::Input::Tokens(TokenIds { ids }),
            None => {
                let text = given_or_read(self.text).await?;
                if self.chat || self.system.is_some() {
                    tokenize_request::Input::Chat(conversation(self.system, text))
                } else {
                    tokenize_request::Input::Text(text)
                }
            }
        };
        let request = TokenizeRequest {
            model: self.model.resource(),
            input: Some(input),
            add_special_tokens: self.add_special_tokens,
        };
        let client = context.connect().await?;
        let answer = client.generation().tokenize(request).await?.into_inner();
        if context.output.is_json() {
            output::json(&answer)
        } else if decode {
            output::line(printable(&answer.text))
        } else {
            output::line(token_table(&answer.tokens))
        }
    }
}

/// Tokens below each other, with what is known of them.
fn token_table(tokens: &[Token]) -> String {
    let scored = tokens.iter().any(|t| t.logprob.is_some());
    let rivals = tokens.iter().any(|t| !t.alternatives.is_empty());
    let mut header = vec!["id", "token"];
    header.extend(scored.then_some("log-probability"));
    header.extend(rivals.then_some("likeliest"));
    let rows = tokens
        .iter()
        .map(|t| {
            let mut row = vec![t.id.to_string(), format!("{:?}", t.text)];
            if scored {
                row.push(t.logprob.map(|l| format!("{l:.4}")).unwrap_or_default());
            }
            if rivals {
                let all: Vec<_> = t
                    .alternatives
                    .iter()
                    .map(|a| format!("{:?} {:.3}", a.text, a.logprob))
                    .collect();
                row.push(all.join("  "));
            }
            row
        })
        .collect();
    table(&header, if scored { &[0, 2] } else { &[0] }, rows)
}

fn conversation(system: Option<String>, content: String) -> Chat {
    let message = |role: &str, content| ChatMessage { role: role.to_owned(), content };
    let mut messages: Vec<_> = system.into_iter().map(|s| message("system", s)).collect();
    messages.push(message("user", content));
    Chat { messages }
}

/// The argument, or standard input to its end.
async fn given_or_read(argument: Option<String>) -> Result<String> {
    match argument {
        Some(text) if text != "-" => Ok(text),
        // On a thread of its own, so that Ctrl-C is heard meanwhile.
        _ => tokio::task::spawn_blocking(read_input)
            .await
            .map_err(|e| CliError::failure(format!("reading the text failed: {e}")))?,
    }
}

fn read_input() -> Result<String> {
    let mut text = String::new();
    let mut input = std::io::stdin().lock();
    if input.is_terminal() {
        eprintln!("reading the text from the terminal; end it with Ctrl-D");
    }
    input.read_to_string(&mut text).map_err(|e| CliError::file("reading the text", &e))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_model_cannot_drive_the_terminal() {
        assert_eq!(printable("a\n\tb\u{1b}[2Jc"), "a\n\tb\u{fffd}[2Jc");
    }

    #[test]
    fn a_form_is_a_schema_a_file_a_pattern_or_a_grammar() {
        let none = || FormArgs { json_schema: None, regex: None, grammar: None };
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("form");
        std::fs::write(&file, "start: \"x\"").unwrap();
        let text = || "start: \"x\"".to_owned();
        let name = file.to_str().unwrap().to_owned();
        for (args, form) in [
            (none(), None),
            (
                FormArgs { json_schema: Some(" {}".into()), ..none() },
                Some(Constraint::JsonSchema(" {}".into())),
            ),
            (FormArgs { json_schema: Some(name), ..none() }, Some(Constraint::JsonSchema(text()))),
            (FormArgs { regex: Some("a".into()), ..none() }, Some(Constraint::Regex("a".into()))),
            (FormArgs { grammar: Some(file.clone()), ..none() }, Some(Constraint::Grammar(text()))),
        ] {
            assert_eq!(args.constraint().unwrap(), form);
        }
        let absent = FormArgs { grammar: Some(folder.path().join("absent")), ..none() };
        assert!(absent.constraint().is_err());
    }

    #[test]
    fn a_table_shows_what_is_known() {
        let token = Token { id: 7, text: " a".into(), ..Default::default() };
        assert!(!token_table(std::slice::from_ref(&token)).contains("log-probability"));
        let scored = Token { logprob: Some(-0.5), ..token };
        let text = token_table(&[scored]);
        assert!(text.contains("-0.5000") && text.contains("\" a\""), "{text}");
    }
}
