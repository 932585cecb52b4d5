//! Which columns of a file mean what.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Kind;
use crate::data::captions;
use crate::data::rows::{Format, Row};
use crate::error::{Error, Reason, Result};

/// Bytes of a column's name.
const MAX_NAME: usize = 256;

/// Names of columns. Columns without a name are called by their place from "1".
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Columns {
    /// The text; in sentences the list of words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The class, the number, or the list of tags.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// What is asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// What the prompt is about; follows it after a blank line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// What is to be answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// What the system says before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// The messages of a conversation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<String>,
    /// The better answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<String>,
    /// The worse answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected: Option<String>,
    /// A second text that is read together with the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub second: Option<String>,
}

impl Columns {
    /// Every column with its name in the API.
    pub fn fields(&self) -> [(&'static str, &Option<String>); 10] {
        [
            ("text_column", &self.text),
            ("label_column", &self.label),
            ("prompt_column", &self.prompt),
            ("input_column", &self.input),
            ("answer_column", &self.answer),
            ("system_column", &self.system),
            ("messages_column", &self.messages),
            ("chosen_column", &self.chosen),
            ("rejected_column", &self.rejected),
            ("second_text_column", &self.second),
        ]
    }
}

/// How the records of a file are read: what was asked, or, after the file was looked at, what holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Layout {
    pub columns: Columns,
    /// Whether the first line of a table names its columns; found out where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub header: Option<bool>,
    /// Names of the classes or tags by their index; collected where there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// Captions of images, with a place for the name of the class.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub templates: Vec<String>,
    /// Whether records that are well formed but of no use are left out, not refused.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skip_unusable: bool,
    /// Records at the start of the file that are left out, by their places.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_records: Option<u64>,
    /// Records of the rest that are taken; all where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_records: Option<u64>,
}

impl Layout {
    /// Checks what a client asks for, before a file is read.
    ///
    /// # Errors
    /// `INVALID_FIELD` for columns and labels that records of the kind do not have, and for names that are
    /// too long.
    pub fn check(&self, kind: Kind) -> Result<()> {
        let used = kind.columns();
        for (field, name) in self.columns.fields() {
            let Some(name) = name else { continue };
            if !used.contains(&field) {
                let what = match used {
                    [] => format!("{} have no columns; leave it empty", kind.name()),
                    used => format!("{} are read from {} only", kind.name(), used.join(", ")),
                };
                return Err(Error::field(field, what));
            }
            if name.trim().is_empty() || name.len() > MAX_NAME {
                let what = format!("a column's name has 1 to {MAX_NAME} bytes and is not blank");
                return Err(Error::field(field, what));
            }
        }
        let labelled =
            matches!(kind, Kind::Classification | Kind::Tagging | Kind::MultiLabel | Kind::Images);
        if !labelled && !self.labels.is_empty() {
            return Err(Error::field("labels", format!("{} have no labels", kind.name())));
        }
        super::Labels::given(&self.labels)?;
        if kind != Kind::Images && !self.templates.is_empty() {
            return Err(Error::field("templates", format!("{} have no captions", kind.name())));
        }
        captions::check(&self.templates)?;
        if self.skip_unusable && used.is_empty() {
            let what = format!("{} have no columns that could be blank", kind.name());
            return Err(Error::field("skip_unusable", what));
        }
        for (field, given) in
            [("skip_records", self.skip_records), ("max_records", self.max_records)]
        {
            if given.is_some() && used.is_empty() {
                let what = format!("{} are taken from the whole file", kind.name());
                return Err(Error::field(field, what));
            }
        }
        if self.max_records == Some(0) {
            return Err(Error::field("max_records", "no record is no data set; take 1 or more"));
        }
        Ok(())
    }

    /// What holds for the file: `rows` are its first ones, read without a header.
    pub fn resolve(&self, kind: Kind, format: Format, rows: &[Row]) -> Result<Self> {
        let mut layout = self.clone();
        let first = rows.first().ok_or_else(|| {
            Error::new(Reason::DatasetUnsuitable, "there is no record in it; choose another file")
        })?;
        let names: Vec<String> = if format.may_have_header() {
            let cells: Vec<String> = first.fields.values().map(cell).collect();
            let header = match self.header {
                Some(header) => header,
                None => self.guess_header(kind, &cells, rows)?,
            };
            layout.header = Some(header);
            let places = first.fields.keys();
            // A column without a name is called by its place.
            let named = cells.into_iter().zip(places.clone());
            if header {
                named
                    .map(|(name, place)| if name.is_empty() { place.clone() } else { name })
                    .collect()
            } else {
                places.cloned().collect()
            }
        } else {
            if self.header.is_some() {
                let what = "only .csv and .tsv may have a line that names the columns";
                return Err(Error::field("header", what));
            }
            // A field may be missing in some rows.
            let mut names: Vec<String> = Vec::new();
            for name in rows.iter().flat_map(|row| row.fields.keys()) {
                if !names.contains(name) {
                    names.push(name.clone());
                }
            }
            names
        };
        let found = Present { names: &names, format, header: layout.header };
        layout.columns = found.columns(kind, &self.columns)?;
        Ok(layout)
    }

    /// Whether the first line names columns: it has a name that was asked for, or usual ones; or it
    /// cannot, as its label comes again.
    fn guess_header(&self, kind: Kind, cells: &[String], rows: &[Row]) -> Result<bool> {
        let present = Present { names: cells, format: Format::JsonLines, header: Some(true) };
        let asked: Vec<&String> =
            self.columns.fields().into_iter().filter_map(|(_, name)| name.as_ref()).collect();
        if !asked.is_empty() && asked.iter().all(|name| present.find(name).is_some()) {
            return Ok(true);
        }
        if present.columns(kind, &self.columns).is_ok() {
            return Ok(true);
        }
        let place = |name: &str| {
            name.parse::<usize>().is_ok_and(|place| (1..=cells.len()).contains(&place))
        };
        if !asked.is_empty() && asked.iter().all(|name| place(name)) {
            return Ok(false);
        }
        let again = |row: &Row| row.fields.values().next_back().map(cell).as_ref() == cells.last();
        let pairs = cells.len() == 2;
        match kind {
            Kind::Classification if pairs && rows.iter().skip(1).any(again) => Ok(false),
            Kind::Regression if pairs && cells[1].trim().parse::<f32>().is_ok() => Ok(false),
            _ => Err(Error::field(
                "header",
                format!(
                    "whether the first line ({}) names the columns is not clear; say so, and name the \
                     columns",
                    list(cells)
                ),
            )),
        }
    }
}

fn cell(value: &Value) -> String {
    value.as_str().unwrap_or_default().trim().trim_start_matches('\u{FEFF}').to_owned()
}

/// The columns that a file has.
struct Present<'a> {
    names: &'a [String],
    format: Format,
    header: Option<bool>,
}

impl Present<'_> {
    /// The columns of a kind: those asked for, else those with usual names.
    fn columns(&self, kind: Kind, asked: &Columns) -> Result<Columns> {
        let mut columns = Columns::default();
        match kind {
            Kind::Text => columns.text = Some(self.need("text_column", &asked.text, TEXT)?),
            Kind::Choices | Kind::Images => {}
            Kind::Classification | Kind::Regression | Kind::MultiLabel => {
                let labels = if kind == Kind::Regression { NUMBER } else { CLASS };
                // A table of two columns without names: a text and its label.
                let bare = self.header == Some(false) && self.names.len() == 2;
                let (text, label) = if bare { (&["1"][..], &["2"][..]) } else { (TEXT, labels) };
                columns.second = self.pick("second_text_column", &asked.second, &[])?;
                columns.text = self.pick("text_column", &asked.text, text)?;
                if columns.text.is_none() && columns.second.is_none() {
                    // Two texts with the usual names of two.
                    let find = |name: &str| self.pick("text_column", &None, &[name]);
                    for (first, second) in PAIRS {
                        let both = (find(first)?, find(second)?);
                        if both.0.is_some() && both.1.is_some() {
                            (columns.text, columns.second) = both;
                            break;
                        }
                    }
                }
                if columns.text.is_none() {
                    columns.text = Some(self.need("text_column", &asked.text, text)?);
                }
                columns.label = Some(self.need("label_column", &asked.label, label)?);
            }
            Kind::Tagging => {
                let last = self.names.len().to_string();
                let (words, tags): (&[&str], Vec<&str>) = match self.format {
                    Format::Columns => (&["1"], vec![last.as_str()]),
                    Format::Universal => (&["form"], vec!["upos"]),
                    _ => (WORDS, TAGS.to_vec()),
                };
                columns.text = Some(self.need("text_column", &asked.text, words)?);
                columns.label = Some(self.need("label_column", &asked.label, &tags)?);
            }
            Kind::Chat => {
                let pairs = asked.prompt.is_some() || asked.answer.is_some();
                let messages = if pairs { &[] } else { MESSAGES };
                columns.messages = self.pick("messages_column", &asked.messages, messages)?;
                if columns.messages.is_some() {
                    if let Some((field, _)) = [
                        ("prompt_column", &asked.prompt),
                        ("answer_column", &asked.answer),
                        ("input_column", &asked.input),
                        ("system_column", &asked.system),
                    ]
                    .into_iter()
                    .find(|(_, name)| name.is_some())
                    {
                        let what =
                            "the messages say it all; name either them or a prompt and an answer";
                        return Err(Error::field(field, what));
                    }
                    return Ok(columns);
                }
                columns.answer = Some(self.need("answer_column", &asked.answer, ANSWER)?);
                self.prompt(asked, &mut columns, true)?;
            }
            Kind::Preferences => {
                columns.chosen = Some(self.need("chosen_column", &asked.chosen, &["chosen"])?);
                columns.rejected =
                    Some(self.need("rejected_column", &asked.rejected, &["rejected"])?);
                self.prompt(asked, &mut columns, false)?;
            }
        }
        Ok(columns)
    }

    /// The columns of what is asked: prompt, input, system.
    fn prompt(&self, asked: &Columns, columns: &mut Columns, needed: bool) -> Result<()> {
        columns.prompt = if needed {
            Some(self.need("prompt_column", &asked.prompt, PROMPT)?)
        } else {
            let usual: Vec<&str> = PROMPT.iter().chain(MESSAGES).copied().collect();
            self.pick("prompt_column", &asked.prompt, &usual)?
        };
        // An input follows an instruction; beside another kind of prompt it could be anything.
        let instruction =
            columns.prompt.as_deref().is_some_and(|p| p.eq_ignore_ascii_case("instruction"));
        let usual: &[&str] = if instruction { &["input", "context"] } else { &[] };
        columns.input = self.pick("input_column", &asked.input, usual)?;
        let usual: &[&str] =
            if columns.prompt.is_some() { &["system", "system_prompt"] } else { &[] };
        columns.system = self.pick("system_column", &asked.system, usual)?;
        if columns.prompt.is_none() {
            for (field, name) in
                [("input_column", &columns.input), ("system_column", &columns.system)]
            {
                if name.is_some() {
                    return Err(Error::field(field, "it needs a prompt; name the prompt_column"));
                }
            }
        }
        Ok(())
    }

    fn need(&self, field: &str, asked: &Option<String>, usual: &[&str]) -> Result<String> {
        self.pick(field, asked, usual)?.ok_or_else(|| {
            Error::field(
                field,
                format!(
                    "none of the columns ({}) has a usual name ({}); name one",
                    list(self.names),
                    usual.join(", ")
                ),
            )
        })
    }

    fn pick(&self, field: &str, asked: &Option<String>, usual: &[&str]) -> Result<Option<String>> {
        let Some(asked) = asked else {
            return Ok(usual.iter().find_map(|usual| {
                let same = |name: &&String| name.eq_ignore_ascii_case(usual);
                self.names.iter().find(same).cloned()
            }));
        };
        match self.find(asked) {
            Some(name) => Ok(Some(name)),
            None => Err(Error::field(
                field,
                format!("there is no column '{asked:.60}'; there are {}", list(self.names)),
            )),
        }
    }

    /// A column by its name, else by its place.
    fn find(&self, asked: &str) -> Option<String> {
        let named = self.names.iter().find(|name| *name == asked);
        let placed = || {
            let place = asked.parse::<usize>().ok().filter(|_| self.format.has_places())?;
            self.names.get(place.checked_sub(1)?)
        };
        named.or_else(placed).cloned()
    }
}

const TEXT: &[&str] =
    &["text", "sentence", "content", "review", "comment", "utterance", "document", "question"];
const PAIRS: &[(&str, &str)] = &[
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
    ("question1", "question2"),
];
const CLASS: &[&str] = &["label", "labels", "class", "category", "intent", "sentiment", "target"];
const NUMBER: &[&str] = &["label", "score", "value", "rating", "target"];
const WORDS: &[&str] = &["tokens", "words", "form"];
const TAGS: &[&str] = &["tags", "ner_tags", "pos_tags", "upos", "labels"];
const MESSAGES: &[&str] = &["messages", "conversations", "conversation", "dialogue"];
const PROMPT: &[&str] = &["instruction", "prompt", "question", "query", "input"];
const ANSWER: &[&str] = &["output", "answer", "response", "completion"];

/// Names for people, as many as fit.
fn list(names: &[String]) -> String {
    const MOST: usize = 12;
    let mut text: Vec<String> = names.iter().take(MOST).map(|name| format!("{name:.40}")).collect();
    if names.len() > MOST {
        text.push("...".into());
    }
    text.join(", ")
}
