//! Records of data sets: what training and evaluation learn from a row. A file is checked once, when it
//! is imported, which settles its [`Layout`]; after that [`Records`] reads it in one pass.

mod conversation;
mod labels;
mod layout;

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::chat::Message;
use super::rows::{self, Format, MAX_WORDS, Rows};
use super::text;
use crate::error::{Error, Reason, Result};

pub use conversation::Preference;
use labels::Labels;
pub use layout::{Columns, Layout};

/// Rows that are looked at to find the columns.
const SAMPLE: usize = 200;

/// What the records of a data set are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Running text.
    Text,
    /// Questions with a few choices; read by [`super::choices`].
    Choices,
    /// Conversations that end in an answer.
    Chat,
    /// Texts with a class each.
    Classification,
    /// Texts with a number each.
    Regression,
    /// Sentences with a tag for each word.
    Tagging,
    /// Prompts with a better and a worse answer.
    Preferences,
    /// Texts with any number of classes each.
    MultiLabel,
    /// Images with a class each; read by [`super::images`].
    Images,
}

impl Kind {
    pub const ALL: [Self; 9] = [
        Self::Text,
        Self::Choices,
        Self::Chat,
        Self::Classification,
        Self::Regression,
        Self::Tagging,
        Self::Preferences,
        Self::MultiLabel,
        Self::Images,
    ];

    /// Name in the database and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Choices => "choices",
            Self::Chat => "chat",
            Self::Classification => "classification",
            Self::Regression => "regression",
            Self::Tagging => "tagging",
            Self::Preferences => "preferences",
            Self::MultiLabel => "multi_label",
            Self::Images => "images",
        }
    }

    /// The fields of the API that name its columns.
    pub fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Text => &["text_column"],
            Self::Choices | Self::Images => &[],
            Self::Chat => &[
                "messages_column",
                "prompt_column",
                "input_column",
                "answer_column",
                "system_column",
            ],
            Self::Classification | Self::Regression | Self::MultiLabel => {
                &["text_column", "second_text_column", "label_column"]
            }
            Self::Tagging => &["text_column", "label_column"],
            Self::Preferences => &[
                "prompt_column",
                "input_column",
                "system_column",
                "chosen_column",
                "rejected_column",
            ],
        }
    }
}

/// A record.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    Text(String),
    /// Ends in an answer.
    Chat(Vec<Message>),
    /// A text and the index of its class.
    Class(String, u32),
    /// A text and a finite number.
    Value(String, f32),
    /// Words, and the index of a tag for each.
    Tagged(Vec<String>, Vec<u32>),
    Preference(Preference),
    /// A text and the indices of its classes, rising.
    Labels(String, Vec<u32>),
    /// A record of a text with a label, and a second text.
    Two(Box<Record>, String),
}

impl Record {
    /// The class, where there is one.
    pub fn class(&self) -> Option<u32> {
        match self {
            Self::Class(_, class) => Some(*class),
            Self::Two(first, _) => first.class(),
            _ => None,
        }
    }
}

/// Where records are and how they are read.
#[derive(Debug, Clone)]
pub struct Source {
    pub path: PathBuf,
    /// The name the file came with, which tells its format.
    pub file_name: String,
    pub kind: Kind,
    pub layout: Layout,
    /// Bound of the unpacked size.
    pub max_bytes: u64,
}

/// What a check of a file found.
#[derive(Debug, Clone, PartialEq)]
pub struct Checked {
    /// Complete: columns, header and labels are those of the file.
    pub layout: Layout,
    pub records: u64,
    /// Records that were left out as unusable.
    pub skipped: u64,
}

/// Reads a whole file, whose layout may say as much or as little as is known of it.
///
/// # Errors
/// `INVALID_FIELD` for a layout that does not fit the kind or the file, `UNSUPPORTED_FORMAT` for names
/// with other endings, `TOO_LARGE` beyond the limits, `MALFORMED_FILE` with the line of the first record
/// that cannot be read, `DATASET_UNSUITABLE` for files without records and for records that are of no
/// use (a blank answer, several classes), unless they are to be skipped.
pub fn check(source: &Source) -> Result<Checked> {
    source.layout.check(source.kind)?;
    let within = |error: Error| match error.violations() {
        [] => error.within(&source.file_name),
        _ => error,
    };
    let layout = resolve(source).map_err(within)?;
    let source = Source { layout, ..source.clone() };
    let mut records = Records::open(&source)?;
    let mut count = 0;
    for record in &mut records {
        record?;
        count += 1;
    }
    let Records { labels, skipped, .. } = records;
    let mut layout = source.layout;
    if count == 0 {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            format!("{}: there is no record in it; choose another file", source.file_name),
        ));
    }
    if matches!(source.kind, Kind::Classification | Kind::Tagging | Kind::MultiLabel) {
        if labels.len() < 2 {
            let names = labels.into_names();
            return Err(Error::new(
                Reason::DatasetUnsuitable,
                format!(
                    "{}: all records have the label '{}'; name another column, or give the labels",
                    source.file_name,
                    names.first().map(String::as_str).unwrap_or_default()
                ),
            ));
        }
        layout.labels = labels.into_names();
    }
    Ok(Checked { layout, records: count, skipped })
}

/// Whether the documents of a text come from rows with columns.
pub fn has_columns(file_name: &str) -> Result<bool> {
    Ok(Format::of(file_name, false)?.0 != Format::Text)
}

fn resolve(source: &Source) -> Result<Layout> {
    let (format, packed) = Format::of(&source.file_name, source.kind == Kind::Tagging)?;
    if format == Format::Text && source.kind == Kind::Text {
        if source.layout.columns.text.is_some() || source.layout.header.is_some() {
            return Err(Error::field("text_column", "a .txt file is one text without columns"));
        }
        if source.layout.skip_records.is_some() || source.layout.max_records.is_some() {
            return Err(Error::field("max_records", "a .txt file is one record; take it whole"));
        }
        return Ok(source.layout.clone());
    }
    let rows = rows::open(&source.path, (format, packed), false, source.max_bytes)?;
    let rows = rows.take(SAMPLE).collect::<Result<Vec<_>>>()?;
    source.layout.resolve(source.kind, format, &rows)
}

/// The records of a file, each with its line (from 1; the row where the format has no lines). Nothing
/// follows an error.
pub struct Records {
    rows: Option<Rows>,
    /// A file that is one text.
    text: Option<String>,
    kind: Kind,
    layout: Layout,
    labels: Labels,
    file_name: String,
    unit: &'static str,
    skipped: u64,
    /// Rows that went by, used or not.
    place: u64,
}

impl Records {
    /// Opens a file whose layout is known: as [`check`] gave it, or with labels of another data set,
    /// whose classes are meant then.
    ///
    /// # Errors
    /// As [`check`], here and from each record.
    pub fn open(source: &Source) -> Result<Self> {
        let Source { path, file_name, kind, layout, max_bytes } = source;
        let other = match kind {
            Kind::Choices => Some("choices are for evaluation"),
            Kind::Images => Some("images are for models that see"),
            _ => None,
        };
        if let Some(why) = other {
            return Err(Error::new(
                Reason::DatasetUnsuitable,
                format!("{file_name}: {why}; choose a data set of another kind"),
            ));
        }
        let within = |error: Error| error.within(file_name);
        let labels = match layout.labels.as_slice() {
            [] => Labels::growing(),
            names => Labels::given(names)?,
        };
        let (format, packed) = Format::of(file_name, *kind == Kind::Tagging)?;
        let (mut rows, mut whole) = (None, None);
        if format == Format::Text && *kind == Kind::Text {
            let bytes = text::read_bytes(path, packed, *max_bytes).map_err(within)?;
            let text = text::utf8(bytes).map_err(within)?;
            whole = Some(text).filter(|text| !text.trim().is_empty());
        } else {
            let header = layout.header.unwrap_or(false);
            rows = Some(rows::open(path, (format, packed), header, *max_bytes).map_err(within)?);
        }
        let mut layout = layout.clone();
        if *kind == Kind::Text {
            layout.columns.text.get_or_insert_with(|| "text".into());
        }
        Ok(Self {
            rows,
            text: whole,
            kind: *kind,
            layout,
            labels,
            file_name: file_name.clone(),
            unit: format.unit(),
            skipped: 0,
            place: 0,
        })
    }

    /// Records left out so far as unusable.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    fn read(&mut self) -> Result<Option<(u64, Record)>> {
        if let Some(text) = self.text.take() {
            return Ok(Some((1, Record::Text(text))));
        }
        while let Some(row) = self.rows.as_mut().and_then(Iterator::next) {
            let row = row.map_err(|error| error.within(&self.file_name))?;
            self.place += 1;
            let before = self.layout.skip_records.unwrap_or(0);
            if self.place <= before {
                continue;
            }
            if self.layout.max_records.is_some_and(|most| self.place - before > most) {
                self.rows = None;
                return Ok(None);
            }
            let at = |reason, what, remedy: &str| {
                let (file, unit, line) = (&self.file_name, self.unit, row.line);
                Error::new(reason, format!("{file}: {unit} {line}: {what}{remedy}"))
            };
            match record(self.kind, &row.fields, &self.layout.columns, &mut self.labels) {
                Ok(record) => return Ok(Some((row.line, record))),
                // A document without text is no mistake.
                Err(Problem::Unusable(_))
                    if self.layout.skip_unusable || self.kind == Kind::Text =>
                {
                    self.skipped += 1;
                }
                Err(Problem::Unusable(what)) => {
                    let remedy =
                        "; correct it, or import with skip_unusable to leave such records out";
                    return Err(at(Reason::DatasetUnsuitable, what, remedy));
                }
                Err(Problem::Wrong(what)) => {
                    return Err(at(Reason::MalformedFile, what, ""));
                }
            }
        }
        Ok(None)
    }
}

impl Iterator for Records {
    type Item = Result<(u64, Record)>;

    fn next(&mut self) -> Option<Self::Item> {
        let read = self.read();
        if read.is_err() {
            self.rows = None;
        }
        read.transpose()
    }
}

/// What is wrong with a row.
#[derive(Debug)]
pub(super) enum Problem {
    /// It is well formed, but nothing can be learned from it.
    Unusable(String),
    /// It is not what it should be.
    Wrong(String),
}

impl Problem {
    fn within(self, place: &str) -> Self {
        match self {
            Self::Unusable(what) => Self::Unusable(format!("'{place:.60}': {what}")),
            Self::Wrong(what) => Self::Wrong(format!("'{place:.60}': {what}")),
        }
    }
}

fn record(
    kind: Kind,
    fields: &Map<String, Value>,
    columns: &Columns,
    labels: &mut Labels,
) -> Result<Record, Problem> {
    let value = |column: &Option<String>| {
        let name = column.as_deref().unwrap_or_default();
        fields.get(name).ok_or_else(|| Problem::Wrong(format!("there is no '{name:.60}'")))
    };
    let found = match kind {
        Kind::Text | Kind::Choices | Kind::Images => {
            Record::Text(text(fields, columns.text.as_ref())?.to_owned())
        }
        Kind::Chat => Record::Chat(conversation::conversation(fields, columns)?),
        Kind::Preferences => Record::Preference(conversation::preference(fields, columns)?),
        Kind::Classification => {
            let text = text(fields, columns.text.as_ref())?;
            Record::Class(text.to_owned(), labels.class(value(&columns.label)?)?)
        }
        Kind::Regression => {
            let text = text(fields, columns.text.as_ref())?;
            Record::Value(text.to_owned(), number(value(&columns.label)?)?)
        }
        Kind::Tagging => {
            let words = list(value(&columns.text)?, columns.text.as_ref())?;
            let tags = list(value(&columns.label)?, columns.label.as_ref())?;
            if words.len() != tags.len() {
                return Err(Problem::Wrong(format!(
                    "{} words have {} tags; give one tag a word",
                    words.len(),
                    tags.len()
                )));
            }
            let words: Option<Vec<String>> =
                words.iter().map(|word| word.as_str().map(str::to_owned)).collect();
            let words = words.ok_or_else(|| Problem::Wrong("a word is not a string".into()))?;
            let tags: Result<Vec<u32>, Problem> =
                tags.iter().map(|tag| labels.class(tag)).collect();
            Record::Tagged(words, tags?)
        }
        Kind::MultiLabel => {
            let text = text(fields, columns.text.as_ref())?;
            Record::Labels(text.to_owned(), classes(value(&columns.label)?, labels)?)
        }
    };
    Ok(match &columns.second {
        None => found,
        second => Record::Two(Box::new(found), text(fields, second.as_ref())?.to_owned()),
    })
}

/// Classes of a record: a list, or in tables one text with `|` between them; none where it is blank.
fn classes(value: &Value, labels: &mut Labels) -> Result<Vec<u32>, Problem> {
    let mut found = match value {
        Value::Null => Vec::new(),
        Value::Array(list) if list.len() <= MAX_WORDS => {
            list.iter().map(|label| labels.class(label)).collect::<Result<Vec<_>, _>>()?
        }
        Value::Array(list) => {
            return Err(Problem::Wrong(format!(
                "a record has {} labels, more than {MAX_WORDS}",
                list.len()
            )));
        }
        Value::String(text) => text
            .split('|')
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map(|name| labels.class(&Value::from(name)))
            .collect::<Result<_, _>>()?,
        one => vec![labels.class(one)?],
    };
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// A text that must be there.
fn text<'f>(fields: &'f Map<String, Value>, column: Option<&String>) -> Result<&'f str, Problem> {
    let name = column.map(String::as_str).unwrap_or_default();
    if !fields.contains_key(name) {
        return Err(Problem::Wrong(format!("there is no '{name:.60}'")));
    }
    optional(fields, column)?.ok_or_else(|| Problem::Unusable(format!("'{name:.60}' is blank")))
}

/// A text that may be absent, null or blank.
fn optional<'f>(
    fields: &'f Map<String, Value>,
    column: Option<&String>,
) -> Result<Option<&'f str>, Problem> {
    let Some(name) = column else { return Ok(None) };
    match fields.get(name) {
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.trim().is_empty())),
        Some(Value::Null) | None => Ok(None),
        Some(_) => Err(Problem::Wrong(format!("'{name:.60}' is not a string"))),
    }
}

fn number(value: &Value) -> Result<f32, Problem> {
    let number = match value {
        Value::Null => return Err(Problem::Unusable("the number is null".into())),
        Value::String(text) if text.trim().is_empty() => {
            return Err(Problem::Unusable("the number is blank".into()));
        }
        Value::String(text) => text.trim().parse().ok(),
        value => value.as_f64(),
    };
    // Infinite also where an f32 cannot hold it.
    let number = number.map(|number: f64| number as f32).filter(|number| number.is_finite());
    number.ok_or_else(|| {
        let value = value.to_string();
        Problem::Wrong(format!("{value:.60} is not a finite number"))
    })
}

fn list<'v>(value: &'v Value, column: Option<&String>) -> Result<&'v [Value], Problem> {
    let name = column.map(String::as_str).unwrap_or_default();
    match value {
        Value::Array(list) if list.is_empty() => {
            Err(Problem::Unusable(format!("'{name:.60}' is an empty list")))
        }
        Value::Array(list) if list.len() <= MAX_WORDS => Ok(list),
        Value::Array(list) => Err(Problem::Wrong(format!(
            "'{name:.60}' has {} words, more than {MAX_WORDS}; split the sentence",
            list.len()
        ))),
        _ => Err(Problem::Wrong(format!("'{name:.60}' is not a list"))),
    }
}

#[cfg(test)]
mod tests;
