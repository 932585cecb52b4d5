//! Conversations as files write them: lists of messages, a prompt with an answer, dialogues in one
//! text; and pairs of answers of which one is better.

use serde_json::{Map, Value};

use super::layout::Columns;
use super::{Problem, optional, text};
use crate::data::chat::Message;

/// Messages of a conversation.
const MAX_MESSAGES: usize = 1000;

type Fields = Map<String, Value>;

/// A prompt with two answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Preference {
    /// What both have in common.
    pub prompt: Vec<Message>,
    /// The rest of the better conversation; ends in an answer.
    pub chosen: Vec<Message>,
    /// The rest of the worse one; ends in an answer.
    pub rejected: Vec<Message>,
}

/// A conversation that ends in an answer.
pub fn conversation(fields: &Fields, columns: &Columns) -> Result<Vec<Message>, Problem> {
    let mut messages = if let Some(column) = &columns.messages {
        let value = fields.get(column).ok_or_else(|| missing(column))?;
        listed(value).map_err(|problem| problem.within(column))?
    } else {
        let mut messages = prompt(fields, columns)?;
        messages.push(say("assistant", text(fields, columns.answer.as_ref())?.to_owned()));
        messages
    };
    // What follows the last answer teaches nothing.
    let end = messages.iter().rposition(|message| message.role == "assistant");
    let end = end.ok_or_else(|| Problem::Unusable("no message is an answer".into()))?;
    messages.truncate(end + 1);
    check(&messages)?;
    Ok(messages)
}

/// A prompt and two answers to it.
pub fn preference(fields: &Fields, columns: &Columns) -> Result<Preference, Problem> {
    let prompt = if columns.prompt.is_some() { prompt(fields, columns)? } else { Vec::new() };
    let whole = |column: &Option<String>| -> Result<Vec<Message>, Problem> {
        let name = column.as_deref().unwrap_or_default();
        let value = fields.get(name).ok_or_else(|| missing(name))?;
        let mut said = match value {
            Value::String(text) if prompt.is_empty() => {
                dialogue(text).map_err(|problem| problem.within(name))?
            }
            Value::String(text) if text.trim().is_empty() => {
                return Err(Problem::Unusable(format!("'{name}' is blank")));
            }
            Value::String(text) => vec![say("assistant", text.clone())],
            Value::Object(message) => {
                vec![one(message).map_err(|problem| problem.within(name))?]
            }
            value => listed(value).map_err(|problem| problem.within(name))?,
        };
        if !said.starts_with(&prompt) {
            said.splice(0..0, prompt.iter().cloned());
        }
        if said.last().is_none_or(|message| message.role != "assistant") {
            return Err(Problem::Unusable(format!("'{name}' does not end in an answer")));
        }
        check(&said)?;
        Ok(said)
    };
    let (mut chosen, mut rejected) = (whole(&columns.chosen)?, whole(&columns.rejected)?);
    let common = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
    if common == chosen.len() || common == rejected.len() {
        return Err(Problem::Unusable("the two answers are the same".into()));
    }
    let prompt: Vec<Message> = chosen.drain(..common).collect();
    rejected.drain(..common);
    if prompt.is_empty() {
        return Err(Problem::Unusable("the two conversations have no prompt in common".into()));
    }
    Ok(Preference { prompt, chosen, rejected })
}

/// System, prompt and input; or the messages that the column holds.
fn prompt(fields: &Fields, columns: &Columns) -> Result<Vec<Message>, Problem> {
    let mut messages = Vec::new();
    if let Some(system) = optional(fields, columns.system.as_ref())? {
        messages.push(say("system", system.to_owned()));
    }
    let column = columns.prompt.as_deref().unwrap_or_default();
    if let Some(list @ Value::Array(_)) = fields.get(column) {
        messages.extend(listed(list).map_err(|problem| problem.within(column))?);
        return Ok(messages);
    }
    let mut asked = text(fields, columns.prompt.as_ref())?.to_owned();
    if let Some(input) = optional(fields, columns.input.as_ref())? {
        asked.push_str("\n\n");
        asked.push_str(input);
    }
    messages.push(say("user", asked));
    Ok(messages)
}

/// A list of messages.
fn listed(value: &Value) -> Result<Vec<Message>, Problem> {
    let Value::Array(list) = value else {
        return Err(Problem::Wrong("it is not a list of messages".into()));
    };
    if list.len() > MAX_MESSAGES {
        let what = format!("{} messages are more than {MAX_MESSAGES}", list.len());
        return Err(Problem::Wrong(what));
    }
    let mut messages = Vec::with_capacity(list.len());
    for (i, message) in list.iter().enumerate() {
        let message = match message {
            Value::Object(message) => one(message),
            _ => Err(Problem::Wrong("it is not an object".into())),
        };
        messages.push(message.map_err(|problem| problem.within(&format!("message {i}")))?);
    }
    Ok(messages)
}

/// `{"role": .., "content": ..}` or `{"from": .., "value": ..}`.
fn one(message: &Map<String, Value>) -> Result<Message, Problem> {
    let (role, content) = match (message.get("role"), message.get("from")) {
        (Some(role), _) => (role, message.get("content")),
        (None, Some(from)) => (from, message.get("value")),
        (None, None) => {
            return Err(Problem::Wrong("it has neither 'role' nor 'from'".into()));
        }
    };
    let role = match role.as_str().unwrap_or_default() {
        "user" | "human" => "user",
        "assistant" | "gpt" | "model" | "bot" | "chatgpt" => "assistant",
        "system" => "system",
        "developer" => "developer",
        "tool" | "function" | "observation" => "tool",
        _ => {
            let role = role.to_string();
            return Err(Problem::Wrong(format!("{role:.60} is not a role that is known")));
        }
    };
    match content {
        Some(Value::String(content)) => Ok(say(role, content.clone())),
        Some(Value::Null) | None => Err(Problem::Unusable("it has no content".into())),
        Some(_) => Err(Problem::Wrong("its content is not a string".into())),
    }
}

/// A dialogue in one text, its turns begun by "Human:" and "Assistant:" after a blank line.
fn dialogue(text: &str) -> Result<Vec<Message>, Problem> {
    const TURNS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];
    let mut messages: Vec<Message> = Vec::new();
    let (mut rest, mut role) = (text, None);
    loop {
        let next = TURNS
            .iter()
            .filter_map(|(mark, role)| rest.find(mark).map(|at| (at, mark.len(), *role)))
            .min();
        let said = next.map_or(rest, |(at, _, _)| &rest[..at]);
        match role {
            Some(role) => messages.push(say(role, said.trim().to_owned())),
            None if said.trim().is_empty() => {}
            None => {
                return Err(Problem::Wrong(
                    "it does not begin with '\\n\\nHuman:'; give conversations, or a prompt column"
                        .into(),
                ));
            }
        }
        if messages.len() > MAX_MESSAGES {
            return Err(Problem::Wrong(format!("more than {MAX_MESSAGES} turns")));
        }
        let Some((at, length, next)) = next else { break };
        rest = &rest[at + length..];
        role = Some(next);
    }
    Ok(messages)
}

fn check(messages: &[Message]) -> Result<(), Problem> {
    if messages.len() > MAX_MESSAGES {
        let what = format!("{} messages are more than {MAX_MESSAGES}", messages.len());
        return Err(Problem::Wrong(what));
    }
    match messages.iter().position(|m| m.role == "assistant" && m.content.trim().is_empty()) {
        Some(i) => Err(Problem::Unusable(format!("message {i}, an answer, is blank"))),
        None if messages.first().is_some_and(|message| message.role == "assistant") => {
            Err(Problem::Unusable("nothing stands before the first answer".into()))
        }
        None => Ok(()),
    }
}

fn say(role: &str, content: String) -> Message {
    Message { role: role.to_owned(), content }
}

fn missing(column: &str) -> Problem {
    Problem::Wrong(format!("there is no '{column:.60}'"))
}
