//! Answers held to a form: a JSON schema, a regular expression or a grammar.
//!
//! A form is compiled (by `llguidance`) into a parser over bytes. Before each token the parser walks the
//! tokens' bytes, laid out as a trie, and gives the set of tokens that some complete answer continues
//! with; the sampler chooses among these. Tokens are bytes here, so a character may be spread over
//! several of them. The trie is made once for a loaded model; a compiled form belongs to one request.
//!
//! Texts of strangers are compiled and run here, so everything has a limit: the size of the text, the
//! work of compiling it, the work for one token, and the states that it may keep.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::{StopReason, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::{ParserFactory, TokenParser};
use serde_json::{Value, json};

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};

/// Bytes of a form. Patterns (regular expressions, also those inside a schema) are held shorter: the
/// work of compiling one grows with the square of its length.
const MAX_SCHEMA: usize = 64 << 10;
const MAX_GRAMMAR: usize = 16 << 10;
const MAX_PATTERN: usize = 4 << 10;

/// Work of compiling, in nodes of expressions and symbols of rules.
const COMPILE_FUEL: u64 = 200_000;
const COMPILE_SYMBOLS: usize = 100_000;
/// Work for one token: about ten times what common forms take.
const TOKEN_FUEL: u64 = 60_000;
const TOKEN_ITEMS: usize = 10_000;
/// States that a request's lexer may keep; they take one to two kilobytes each.
const LEXER_STATES: usize = 30_000;

/// Rules that call each other in a chain are compiled by recursion, some kilobytes of stack a rule.
const COMPILE_STACK: usize = 64 << 20;

/// Longest token of the trie; a longer one is never allowed.
const MAX_TOKEN: usize = 512;
/// No byte of a text is this one; in the trie it begins the names of special tokens.
const SPECIAL: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// White space between the parts of JSON. It is bounded so that a bounded schema has bounded answers:
/// models that do not know how to go on like to indent for ever.
const WHITE_SPACE: &str = r"[ \t\r\n]{1,64}";

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// A JSON value that satisfies the schema, which is JSON text.
    JsonSchema(String),
    /// A text that the regular expression matches as a whole.
    Regex(String),
    /// A text that the grammar derives, in llguidance's dialect of Lark.
    Grammar(String),
}

impl Form {
    /// The name of the field of a request that holds it.
    pub fn field(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "json_schema",
            Self::Regex(_) => "regex",
            Self::Grammar(_) => "grammar",
        }
    }

    fn grammar(&self) -> Result<TopLevelGrammar> {
        let (text, most) = match self {
            Self::JsonSchema(text) => (text, MAX_SCHEMA),
            Self::Regex(text) => (text, MAX_PATTERN),
            Self::Grammar(text) => (text, MAX_GRAMMAR),
        };
        if text.len() > most {
            return Err(self.wrong(format!("{} bytes, at most {most} are taken", text.len())));
        }
        if text.trim().is_empty() {
            return Err(self.wrong("empty; leave the field out for an answer of any form"));
        }
        Ok(match self {
            Self::JsonSchema(text) => TopLevelGrammar::from_json_schema(self.schema(text)?),
            Self::Regex(text) => TopLevelGrammar::from_regex(text),
            Self::Grammar(text) => TopLevelGrammar::from_lark(text.clone()),
        })
    }

    /// The schema with the options of its compilation.
    fn schema(&self, text: &str) -> Result<Value> {
        let mut schema = match serde_json::from_str(text) {
            Ok(Value::Bool(true)) => json!({}),
            Ok(schema @ Value::Object(_)) => schema,
            Ok(_) => return Err(self.wrong("a schema is a JSON object")),
            Err(error) => return Err(self.wrong(format!("not JSON: {error}"))),
        };
        let patterns = pattern_bytes(&schema);
        if patterns > MAX_PATTERN {
            return Err(self.wrong(format!(
                "its patterns have {patterns} bytes together, at most {MAX_PATTERN} are taken"
            )));
        }
        schema["x-guidance"] = json!({ "whitespace_pattern": WHITE_SPACE });
        Ok(schema)
    }

    fn wrong(&self, problem: impl Into<String>) -> Error {
        Error::field(self.field(), problem)
    }
}

/// Bytes of all regular expressions of a schema.
fn pattern_bytes(schema: &Value) -> usize {
    match schema {
        Value::Array(items) => items.iter().map(pattern_bytes).sum(),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| match (key.as_str(), value) {
                ("pattern", Value::String(pattern)) => pattern.len(),
                ("patternProperties", Value::Object(patterns)) => {
                    patterns.keys().map(String::len).sum::<usize>() + pattern_bytes(value)
                }
                _ => pattern_bytes(value),
            })
            .sum(),
        _ => 0,
    }
}

/// The tokens of a model, ready for compiling forms.
pub struct Vocabulary {
    factory: ParserFactory,
    /// One compilation at a time: costly forms shall not take all cores.
    turn: Mutex<()>,
}

impl Vocabulary {
    /// The tokens of `tokenizer` below `ids`, the number of the model's logits. Takes a second for the
    /// largest vocabularies.
    ///
    /// # Errors
    /// MODEL_UNSUITABLE for vocabularies that make no trie.
    pub fn new(tokenizer: &Tokenizer, ids: usize) -> Result<Self> {
        contained(|| Self::build(tokenizer, ids)).map_err(|error| {
            Error::new(
                Reason::ModelUnsuitable,
                "the model's vocabulary cannot be used with json_schema, regex or grammar; leave \
                 them out",
            )
            .with_source(error)
        })
    }

    fn build(tokenizer: &Tokenizer, ids: usize) -> anyhow::Result<Self> {
        let count = u32::try_from(ids)?;
        let end: Vec<u32> = tokenizer.eos.iter().copied().filter(|id| *id < count).collect();
        let words: Vec<Vec<u8>> = (0..count).map(|id| word(tokenizer, id)).collect();
        let first = end.first().copied().unwrap_or(INVALID_TOKEN);
        let mut trie = TokTrie::from(&TokRxInfo::new(count, first), &words);
        if end.len() > 1 {
            trie = trie.with_eos_tokens(&end);
        }
        // Forced text is not split as the tokenizer would split it: that would take a tokenizer whose
        // tokens do not depend on what stands before them.
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices)?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.initial_lexer_fuel = COMPILE_FUEL;
        limits.max_grammar_size = COMPILE_SYMBOLS;
        limits.step_lexer_fuel = TOKEN_FUEL;
        limits.step_max_items = TOKEN_ITEMS;
        limits.max_lexer_states = LEXER_STATES;
        limits.verbose_errors = false;
        Ok(Self { factory, turn: Mutex::new(()) })
    }

    /// Compiles a form and finds the first tokens that it allows. Takes a millisecond for common forms,
    /// and up to seconds for forms at the limits: this is for a thread that may wait.
    ///
    /// # Errors
    /// INVALID_FIELD, naming [`Form::field`], for a form that is malformed, has no answer that the
    /// model's tokens can spell, or needs more work than is spent on one.
    pub fn compile(&self, form: &Form) -> Result<Constraint> {
        let grammar = form.grammar()?;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let compile = || {
            contained(|| {
                let mut parser = self.factory.create_parser(grammar)?;
                parser.start_without_prompt();
                match mask(&mut parser) {
                    Ok(allowed) => {
                        Ok(Constraint { parser: Box::new(parser), allowed, known: true })
                    }
                    Err(_) if parser.stop_reason() == StopReason::NoExtensionBias => {
                        anyhow::bail!("no answer of this model can have this form")
                    }
                    Err(error) => Err(error),
                }
            })
        };
        let compiled = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(COMPILE_STACK);
            Ok(thread.name("compile".to_owned()).spawn_scoped(scope, compile)?.join())
        });
        match compiled {
            Ok(Ok(Ok(constraint))) => Ok(constraint),
            Ok(Ok(Err(error))) => Err(form.wrong(explained(&error))),
            Ok(Err(_)) => Err(Error::internal("compiling a constraint failed")),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary").finish_non_exhaustive()
    }
}

/// What a token is in the trie: its bytes, its name if it is special, nothing if it has no text.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if tokenizer.is_special(id) || tokenizer.eos.contains(&id) {
        let name = if bytes.is_empty() { format!("<[{id}]>").into_bytes() } else { bytes.to_vec() };
        return [[SPECIAL].as_slice(), &name].concat();
    }
    if bytes.first() == Some(&SPECIAL) || bytes.len() > MAX_TOKEN {
        return Vec::new();
    }
    bytes.to_vec()
}

/// The tokens that may come next.
fn mask(parser: &mut TokenParser) -> anyhow::Result<SimpleVob> {
    let mut allowed = parser.compute_mask()?;
    let trie = parser.token_env.tok_trie();
    let mut ends =
        trie.eos_tokens().iter().copied().filter(|id| (*id as usize) < trie.vocab_size());
    let end = ends.find(|id| allowed.is_allowed(*id));
    if let Some(end) = end.filter(|_| !parser.is_accepting()) {
        // A grammar can ask for an end inside (`stop=""`); it ends the answer only if nothing must follow.
        let mut ended = parser.clone();
        if ended.consume_token(end).is_err() || !ended.is_accepting() {
            allowed.disallow_token(end);
        }
    }
    Ok(allowed)
}

/// The form of one answer, and how far the answer has come.
pub struct Constraint {
    parser: Box<TokenParser>,
    allowed: SimpleVob,
    /// Whether `allowed` is that of the next token.
    known: bool,
}

impl Constraint {
    /// The tokens that may come next; end tokens are among them exactly when the answer so far is
    /// complete.
    ///
    /// # Errors
    /// TOO_LARGE when finding them takes more work than is spent on one token, MODEL_UNSUITABLE when
    /// there are none.
    pub fn allowed(&mut self) -> Result<&SimpleVob> {
        if !self.known {
            let parser = &mut self.parser;
            let allowed = contained(|| mask(parser));
            self.allowed = allowed.map_err(|e| self.failure(&e))?;
            self.known = true;
        }
        Ok(&self.allowed)
    }

    /// Takes the next token, one of those that are allowed. True when the answer is complete and nothing
    /// can follow.
    ///
    /// # Errors
    /// As [`Constraint::allowed`].
    pub fn advance(&mut self, id: u32) -> Result<bool> {
        self.known = false;
        let parser = &mut self.parser;
        contained(|| {
            parser.consume_token(id)?;
            parser.check_stop()
        })
        .map_err(|e| self.failure(&e))
    }

    fn failure(&self, error: &anyhow::Error) -> Error {
        match self.parser.stop_reason() {
            StopReason::NoExtensionBias => Error::new(
                Reason::ModelUnsuitable,
                "no token of the model can continue the answer in the form that was asked for; \
                 change the json_schema, regex or grammar",
            ),
            StopReason::LexerTooComplex | StopReason::ParserTooComplex => Error::new(
                Reason::TooLarge,
                format!(
                    "the json_schema, regex or grammar became too complex in the middle of the \
                     answer ({}); make it simpler",
                    explained(error)
                ),
            ),
            _ => Error::internal("following the form of an answer failed")
                .with_source(explained(error)),
        }
    }
}

impl Clone for Constraint {
    fn clone(&self) -> Self {
        Self {
            parser: Box::new(self.parser.deep_clone()),
            allowed: self.allowed.clone(),
            known: self.known,
        }
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

/// Runs code of the `llguidance` crate on what strangers wrote. It asserts and unwraps where a form
/// breaks its expectations; such a panic ends the request and nothing else.
fn contained<T>(run: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|_| Err(anyhow::anyhow!("its parts contradict each other")))
}

/// What the crate says of a form, without the state that it adds for its developers.
fn explained(error: &anyhow::Error) -> String {
    const MOST: usize = 300;
    let text = error.to_string();
    if text.starts_with("panic:") {
        return "its parts contradict each other".to_owned();
    }
    // The parser of regular expressions quotes them before it says what is wrong.
    if let Some(problem) = text.lines().find_map(|line| line.trim().strip_prefix("error: ")) {
        return format!("a regular expression is malformed: {problem}");
    }
    // Numbered lines quote the form and mark a place in it; the first line names the place.
    let lines = text.lines().take_while(|l| !l.starts_with('<') && !l.contains(" | "));
    let mut text = lines.map(str::trim).collect::<Vec<_>>().join("; ");
    if let Some((end, _)) = text.char_indices().nth(MOST) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}

#[cfg(test)]
mod tests;
