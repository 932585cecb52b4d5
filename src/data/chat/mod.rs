//! Chat templates through minijinja, set up as the `transformers` library sets up Jinja.
//!
//! A template comes with a model, so it is a stranger's program: its size, steps, recursion and
//! output are limited. What a message says is a stranger's text: see [`encode`].

mod answers;
mod clock;
mod json;

use std::io;

use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};

use super::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};

pub use answers::{Encoded, encode_answers};

const MAX_SOURCE: usize = 1 << 20;
const MAX_OUTPUT: usize = 32 << 20;
/// Instructions; a message takes some hundreds.
const FUEL: u64 = 10_000_000;
/// Calls of macros and nested blocks.
const MAX_DEPTH: usize = 200;
/// Who may speak. Templates put roles into the text, so nothing else may pass.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Name of the only template in an environment.
const NAME: &str = "chat";
const PLAIN: &str = "{% for message in messages %}\
    {{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}\
    {{ eos_token if message['role'] == 'assistant' and eos_token }}{{ '\n\n' }}\
    {% endfor %}\
    {% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// How conversations become text.
pub struct Template {
    env: Environment<'static>,
    special: [(&'static str, Value); 4],
}

impl Template {
    /// The template that the model came with.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` when there is none or it cannot be read.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let source = tokenizer.chat_template.as_deref().ok_or_else(|| {
            Error::new(
                Reason::ModelUnsuitable,
                "the model has no chat template; send a plain prompt, or use an instruction-tuned model",
            )
        })?;
        if source.len() > MAX_SOURCE {
            return Err(unusable(format!("it is larger than {MAX_SOURCE} bytes")));
        }
        Self::new(tokenizer, without_generation_tags(source))
    }

    /// The template for models that came without one: a heading with the speaker's role, the words on
    /// the next lines, the end token after an answer, a blank line.
    pub fn plain(tokenizer: &Tokenizer) -> Result<Self> {
        Self::new(tokenizer, PLAIN.to_owned())
    }

    fn new(tokenizer: &Tokenizer, source: String) -> Result<Self> {
        let mut env = environment();
        env.add_template_owned(NAME, source).map_err(failed)?;
        let special = ["bos_token", "eos_token", "pad_token", "unk_token"]
            .map(|role| (role, tokenizer.special_text(role).map_or(Value::UNDEFINED, Value::from)));
        Ok(Self { env, special })
    }

    /// Lays out a conversation, where asked with the prompt for the assistant's turn.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` when the template fails; `INVALID_FIELD` for unknown roles, an empty
    /// conversation, and one that the template refuses.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        check(messages)?;
        let template = self.env.get_template(NAME).map_err(failed)?;
        let [bos, eos, pad, unk] = &self.special;
        let mut out = Bounded(Vec::new());
        let done = template.render_captured_to(
            context! {
                messages,
                add_generation_prompt,
                tools => (),
                documents => (),
                bos_token => bos.1,
                eos_token => eos.1,
                pad_token => pad.1,
                unk_token => unk.1,
            },
            &mut out,
        );
        done.map_err(failed)?;
        String::from_utf8(out.0).map_err(|e| Error::internal(format!("templates write text: {e}")))
    }

    fn holds(&self, c: char) -> bool {
        self.env.get_template(NAME).is_ok_and(|template| template.source().contains(c))
    }
}

/// Lays out a conversation by the model's chat template, with the prompt for the assistant's turn.
///
/// # Errors
/// As [`Template::of`] and [`Template::render`].
pub fn render(
    tokenizer: &Tokenizer,
    messages: &[Message],
    add_generation_prompt: bool,
) -> Result<String> {
    check(messages)?;
    Template::of(tokenizer)?.render(messages, add_generation_prompt)
}

/// Ids of a conversation, laid out by [`render`]. Special tokens of the template are recognised;
/// special tokens that a message spells out are not, so nobody can end his turn or speak in another
/// role by writing `<|im_end|>`.
pub fn encode(
    tokenizer: &Tokenizer,
    messages: &[Message],
    add_generation_prompt: bool,
) -> Result<Vec<u32>> {
    check(messages)?;
    let template = Template::of(tokenizer)?;
    let mut marked = Vec::with_capacity(messages.len());
    let mut mark = None;
    for message in messages {
        let ids = tokenizer.encode(&message.content, false, true)?;
        if !ids.iter().any(|&id| tokenizer.is_special(id)) {
            marked.push(message.clone());
            continue;
        }
        let mark = match mark {
            Some(mark) => mark,
            None => *mark.insert(free_mark(&template, messages, 0)?),
        };
        let content = cut_special(tokenizer, &message.content, mark);
        marked.push(Message { role: message.role.clone(), content });
    }
    let text = template.render(&marked, add_generation_prompt)?;
    let Some(mark) = mark else { return tokenizer.encode(&text, false, true) };
    let mut ids = Vec::new();
    for part in text.split(mark) {
        ids.extend(tokenizer.encode(part, false, true)?);
    }
    Ok(ids)
}

/// A character that stands in no message: one of those that Unicode reserves for such use; the next
/// free one after `skip`.
fn free_mark(template: &Template, messages: &[Message], skip: usize) -> Result<char> {
    ('\u{FDD0}'..='\u{FDEF}')
        .filter(|&c| !template.holds(c) && !messages.iter().any(|m| m.content.contains(c)))
        .nth(skip)
        .ok_or_else(|| Error::field("messages", "the text holds characters that are no characters"))
}

/// Puts `mark` after the first character of every special token in `content`.
fn cut_special(tokenizer: &Tokenizer, content: &str, mark: char) -> String {
    let mut cuts: Vec<usize> = Vec::new();
    for special in tokenizer.special_texts() {
        let first = special.chars().next().map_or(0, char::len_utf8);
        // Occurrences may overlap, so each start is tried.
        let mut from = 0;
        while let Some(at) = content[from..].find(special).filter(|_| first > 0) {
            cuts.push(from + at + first);
            from += at + first;
        }
    }
    cuts.sort_unstable();
    cuts.dedup();
    let mut out = String::with_capacity(content.len() + cuts.len() * mark.len_utf8());
    let mut from = 0;
    for cut in cuts {
        out.push_str(&content[from..cut]);
        out.push(mark);
        from = cut;
    }
    out.push_str(&content[from..]);
    out
}

fn check(messages: &[Message]) -> Result<()> {
    if messages.is_empty() {
        return Err(Error::field("messages", "a conversation needs at least one message"));
    }
    for (i, message) in messages.iter().enumerate() {
        if !ROLES.contains(&message.role.as_str()) {
            return Err(Error::field(
                format!("messages[{i}].role"),
                format!("'{:.40}' is not a role; use one of {}", message.role, ROLES.join(", ")),
            ));
        }
    }
    Ok(())
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(MAX_DEPTH);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message)
            .with_source(io::Error::other(Refused)))
    });
    env.add_function("strftime_now", |format: &str| clock::now(format));
    env.add_filter("tojson", json::tojson);
    env
}

/// Marks an error that the template raised itself.
#[derive(Debug)]
struct Refused;

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("raised by the template")
    }
}

impl std::error::Error for Refused {}

fn failed(error: minijinja::Error) -> Error {
    use std::error::Error as _;
    let raised = error
        .source()
        .and_then(|e| e.downcast_ref::<io::Error>())
        .and_then(io::Error::get_ref)
        .is_some_and(|e| e.is::<Refused>());
    let detail = error.detail().unwrap_or_default().to_owned();
    if raised {
        let what = format!("the model's chat template refuses the conversation: {detail:.300}");
        return Error::field("messages", what).with_source(error);
    }
    let line = error.line().map(|line| format!(" in line {line}")).unwrap_or_default();
    unusable(format!("{}{line}: {detail:.300}", error.kind())).with_source(error)
}

fn unusable(what: impl std::fmt::Display) -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        format!(
            "the model's chat template cannot be used: {what}; send a plain prompt, or import the model \
             with a corrected template"
        ),
    )
}

/// A buffer that refuses to grow beyond the limit.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other("the text grows too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Turns the tags `generation` and `endgeneration`, by which training tools find the assistant's
/// words, into a condition that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let sign = |c: char| c == '-' || c == '+' || c.is_whitespace();
        let word = tag.trim_start_matches(sign);
        out.push_str(&tag[..tag.len() - word.len()]);
        let ends = |rest: &str| rest.trim_start_matches(sign).starts_with("%}");
        rest = word;
        for (name, instead) in [("generation", "if true"), ("endgeneration", "endif")] {
            if let Some(after) = word.strip_prefix(name).filter(|after| ends(after)) {
                out.push_str(instead);
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
