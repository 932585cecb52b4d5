//! Conversations as tokens with a mark on those that an assistant is to learn: its words, and the
//! token that ends its turn.
//!
//! The words are found in the rendered text by two characters that Unicode reserves for such use, put
//! round each answer before the template sees it; a rendering without them checks that they changed
//! nothing else. Some templates trim what is said: there the marks stand inside the spaces.

use std::ops::Range;

use super::{Message, Template, cut_special, free_mark};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};

/// A conversation as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    pub tokens: Vec<u32>,
    /// Which tokens belong to an answer or end one; as many as tokens.
    pub answer: Vec<bool>,
}

/// Tokens of a conversation without a prompt for another turn; the answers among `messages[from..]` are
/// marked. Special tokens that a message spells out are not recognised as such. `add_bos` puts the start
/// token in front where the model asks for one and the template has none.
///
/// # Errors
/// `MODEL_UNSUITABLE` for templates that change what was said, or repeat it, and for tokenizers that join
/// words of an answer to others; what [`Template::render`] refuses.
pub fn encode_answers(
    tokenizer: &Tokenizer,
    template: &Template,
    messages: &[Message],
    from: usize,
    add_bos: bool,
) -> Result<Encoded> {
    let plain = template.render(messages, false)?;
    let mut marks = ['\0'; 3];
    for (i, mark) in marks.iter_mut().enumerate() {
        *mark = free_mark(template, messages, i)?;
    }
    let laid_out = [false, true].into_iter().find_map(|inside| {
        let marked: Vec<Message> = messages
            .iter()
            .enumerate()
            .map(|(i, message)| mark(tokenizer, message, i >= from, inside, marks))
            .collect();
        // A template that refuses marks has had its say about the conversation itself.
        let text = template.render(&marked, false).ok()?;
        (text.replace(marks, "") == plain).then_some(text)
    });
    let text = laid_out.ok_or_else(|| unsuitable("the chat template changes what was said"))?;
    let wanted = messages[from.min(messages.len())..].iter().filter(|m| is_answer(m)).count();
    let parts = parts(tokenizer, &text, marks, wanted)?;
    let mut encoded = if joins(tokenizer)? {
        by_parts(tokenizer, &parts)?
    } else {
        // Only parts keep apart what a message spells out.
        let whole =
            if text.contains(marks[0]) { None } else { by_offsets(tokenizer, &plain, &parts)? };
        whole.ok_or_else(|| {
            unsuitable("the tokenizer joins words to what stands before them, or a message spells out special tokens")
        })?
    };
    match tokenizer.bos {
        Some(bos) if add_bos && tokenizer.add_bos && encoded.tokens.first() != Some(&bos) => {
            encoded.tokens.insert(0, bos);
            encoded.answer.insert(0, false);
        }
        _ => {}
    }
    Ok(encoded)
}

fn is_answer(message: &Message) -> bool {
    message.role == "assistant"
}

/// A message whose special tokens are cut, with marks round an answer.
fn mark(
    tokenizer: &Tokenizer,
    message: &Message,
    counts: bool,
    inside: bool,
    [cut, begin, end]: [char; 3],
) -> Message {
    let cut = |text: &str| cut_special(tokenizer, text, cut);
    let content = &message.content;
    let content = if counts && is_answer(message) {
        if inside {
            let words = content.trim();
            let at = content.len() - content.trim_start().len();
            let (before, after) = (&content[..at], &content[at + words.len()..]);
            format!("{before}{begin}{}{end}{after}", cut(words))
        } else {
            format!("{begin}{}{end}", cut(content))
        }
    } else {
        cut(content)
    };
    Message { role: message.role.clone(), content }
}

/// A part of the text that is tokenised by itself.
struct Part<'t> {
    text: &'t str,
    answer: bool,
}

/// Splits the marked text at the marks, and after the token that ends an answer.
fn parts<'t>(
    tokenizer: &Tokenizer,
    text: &'t str,
    [cut, begin, end]: [char; 3],
    wanted: usize,
) -> Result<Vec<Part<'t>>> {
    let mut parts = Vec::new();
    let mut push = |text: &'t str, answer: bool| {
        // A mark between two parts: tokens must not reach over it.
        parts.extend(text.split(cut).map(|text| Part { text, answer }));
    };
    let mut rest = text;
    let mut found = 0;
    while let Some((before, after)) = rest.split_once(begin) {
        let (words, after) = after
            .split_once(end)
            .filter(|(words, _)| !before.contains(end) && !words.contains(begin))
            .ok_or_else(|| unsuitable("the chat template takes answers apart"))?;
        push(before, false);
        push(words, true);
        let turn = turn_end(tokenizer, after);
        push(&after[..turn], true);
        rest = &after[turn..];
        found += 1;
    }
    if rest.contains(end) || found != wanted {
        return Err(unsuitable("the chat template leaves out or repeats what was said"));
    }
    push(rest, false);
    parts.retain(|part| !part.text.is_empty());
    Ok(parts)
}

/// Bytes up to the end of a special token that nothing but spaces come before; 0 without one.
fn turn_end(tokenizer: &Tokenizer, text: &str) -> usize {
    let words = text.trim_start();
    let special = tokenizer.special_texts().filter(|special| words.starts_with(special));
    let length = special.map(str::len).max().unwrap_or_default();
    if length == 0 { 0 } else { text.len() - words.len() + length }
}

/// Whether the tokens of two texts, put together, are the two texts put together. Some tokenizers put a
/// space in front of whatever they get.
fn joins(tokenizer: &Tokenizer) -> Result<bool> {
    let mut tokens = tokenizer.encode("a", false, false)?;
    tokens.extend_from_within(..);
    Ok(tokenizer.decode(&tokens, false)? == "aa")
}

/// Tokenises each part by itself, as a prompt and its answer are when a model generates.
fn by_parts(tokenizer: &Tokenizer, parts: &[Part<'_>]) -> Result<Encoded> {
    let mut encoded = Encoded { tokens: Vec::new(), answer: Vec::new() };
    for part in parts {
        encoded.tokens.extend(tokenizer.encode(part.text, false, true)?);
        encoded.answer.resize(encoded.tokens.len(), part.answer);
    }
    Ok(encoded)
}

/// Tokenises the text as a whole and finds the answers by the places that tokens come from. `None` when a
/// token joins an answer to more than spaces.
fn by_offsets(tokenizer: &Tokenizer, plain: &str, parts: &[Part<'_>]) -> Result<Option<Encoded>> {
    let mut answers: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    for part in parts {
        let range = at..at + part.text.len();
        at = range.end;
        match answers.last_mut() {
            Some(last) if part.answer && last.end == range.start => last.end = range.end,
            _ if part.answer => answers.push(range),
            _ => {}
        }
    }
    let (tokens, spans) = tokenizer.encode_with_places(plain)?;
    let mut answers = answers.into_iter().peekable();
    let mut answer = Vec::with_capacity(tokens.len());
    for span in spans {
        while answers.next_if(|range| range.end <= span.start).is_some() {}
        let Some(range) = answers.peek().filter(|range| range.start < span.end.max(span.start + 1))
        else {
            answer.push(false);
            continue;
        };
        // A space before a word is often part of its token.
        let spaces =
            |range: Range<usize>| plain.get(range).is_some_and(|text| text.trim().is_empty());
        if !spaces(span.start.min(range.start)..range.start)
            || !spaces(range.end..span.end.max(range.end))
        {
            return Ok(None);
        }
        answer.push(true);
    }
    Ok(Some(Encoded { tokens, answer }))
}

fn unsuitable(what: &str) -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        format!(
            "which tokens are answers cannot be told: {what}; import the model with another chat \
             template, or without one"
        ),
    )
}

#[cfg(test)]
mod tests;
