//! Records as sequences of tokens, for models that continue text and for models that read it.

mod words;

use super::chat::{self, Template};
use super::records::{Preference, Record};
use super::sequence::{Sequence, Target};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};
use crate::progress::Progress;

pub use words::TagPieces;
use words::Words;

/// Records between two looks at whether the work was cancelled.
const CHECK: u64 = 64;
/// Shortest and longest sequences.
const LENGTHS: std::ops::RangeInclusive<usize> = 2..=1 << 20;

/// What kind of model the tokens are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A model that continues text: the start token in front where the model asks for one.
    Decoder,
    /// A model that reads text: between the special tokens of its tokenizer.
    Encoder,
}

/// What becomes of a record that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlong {
    /// Its first tokens are kept. A conversation that has no token of an answer among them is dropped.
    Cut,
    /// It is dropped.
    Drop,
}

/// How records become sequences.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub form: Form,
    /// Tokens of a sequence, special ones included; 2 at least.
    pub max_length: usize,
    pub overlong: Overlong,
    /// Whether texts are put in lower case first, as some encoders ask for.
    pub lowercase: bool,
    pub tag_pieces: TagPieces,
    /// Tokens of all sequences: more are refused.
    pub max_tokens: u64,
}

/// What became of the records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub records: u64,
    /// Sequences made; a long text gives several, a record that was dropped none.
    pub sequences: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Tokens on which the loss is taken: for texts with a class or a number 1 each.
    pub targets: u64,
    /// Records that were cut, and the line of the first.
    pub cut: u64,
    pub first_cut: Option<u64>,
    /// Records that were dropped, and the line of the first.
    pub dropped: u64,
    pub first_dropped: Option<u64>,
}

/// A prompt with its better and its worse answer. The targets are the tokens of the answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    pub chosen: Sequence,
    pub rejected: Sequence,
}

/// Turns records into sequences.
pub struct Tokeniser<'t> {
    tokenizer: &'t Tokenizer,
    options: Options,
    /// Made when the first conversation comes; whether it is the plain one.
    template: Option<(Template, bool)>,
    before: Vec<u32>,
    after: Vec<u32>,
    /// What stands between two texts, once that was asked for.
    between: Option<Vec<u32>>,
    words: Words,
    report: Report,
}

impl<'t> Tokeniser<'t> {
    /// # Errors
    /// `INVALID_FIELD` (of `max_length`) for lengths that leave no room for text, `MALFORMED_FILE` for
    /// tokenizers that do not tell their special tokens.
    pub fn new(tokenizer: &'t Tokenizer, options: Options) -> Result<Self> {
        let (before, after) = match options.form {
            Form::Encoder => tokenizer.around()?,
            Form::Decoder => {
                (tokenizer.bos.filter(|_| tokenizer.add_bos).into_iter().collect(), vec![])
            }
        };
        let around = before.len() + after.len();
        if !LENGTHS.contains(&options.max_length) || options.max_length <= around {
            return Err(Error::field(
                "max_length",
                format!(
                    "{} is not between {} and {}",
                    options.max_length,
                    LENGTHS.start().max(&(around + 1)),
                    LENGTHS.end()
                ),
            ));
        }
        Ok(Self {
            tokenizer,
            options,
            template: None,
            before,
            after,
            between: None,
            words: Words::default(),
            report: Report::default(),
        })
    }

    /// What became of the records so far.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The sequences of a record.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` for tokenizers and chat templates that cannot be used for it,
    /// `INVALID_FIELD` for conversations that the template refuses, `TOO_LARGE` beyond the limit of
    /// tokens, `DATASET_UNSUITABLE` for pairs, which [`Tokeniser::pair`] takes.
    pub fn record(&mut self, line: u64, record: &Record) -> Result<Vec<Sequence>> {
        self.report.records += 1;
        let within = |error: Error| error.within(&format!("line {line}"));
        let sequences = match record {
            Record::Text(text) => self.text(text),
            Record::Class(text, class) => self.labelled(line, text, None, Target::Class(*class)),
            Record::Value(text, value) => self.labelled(line, text, None, Target::Value(*value)),
            Record::Labels(text, classes) => {
                self.labelled(line, text, None, Target::Labels(classes.clone()))
            }
            Record::Two(first, second) => match &**first {
                Record::Class(text, class) => {
                    self.labelled(line, text, Some(second), Target::Class(*class))
                }
                Record::Value(text, value) => {
                    self.labelled(line, text, Some(second), Target::Value(*value))
                }
                Record::Labels(text, classes) => {
                    self.labelled(line, text, Some(second), Target::Labels(classes.clone()))
                }
                _ => Err(Error::internal("a second text beside a record that has no label")),
            },
            Record::Tagged(words, tags) => self.tagged(line, words, tags),
            Record::Chat(messages) => self
                .conversation(messages, 0)
                .map(|encoded| self.fit(line, encoded).into_iter().collect()),
            Record::Preference(_) => Err(Error::new(
                Reason::DatasetUnsuitable,
                "pairs of answers are for learning preferences; choose a data set of another kind",
            )),
        };
        let mut sequences = sequences.map_err(within)?;
        for sequence in &mut sequences {
            sequence.line = line;
            self.count(sequence).map_err(within)?;
        }
        Ok(sequences)
    }

    /// The two sequences of a pair; none where one was dropped.
    ///
    /// # Errors
    /// As [`Tokeniser::record`].
    pub fn pair(&mut self, line: u64, preference: &Preference) -> Result<Option<Pair>> {
        self.report.records += 1;
        let within = |error: Error| error.within(&format!("line {line}"));
        let mut side = |rest: &[chat::Message]| -> Result<(Vec<u32>, Vec<bool>)> {
            let messages = [preference.prompt.as_slice(), rest].concat();
            self.conversation(&messages, preference.prompt.len()).map_err(within)
        };
        let (chosen, rejected) = (side(&preference.chosen)?, side(&preference.rejected)?);
        let Report { dropped, cut, .. } = self.report;
        let (chosen, rejected) = (self.fit(line, chosen), self.fit(line, rejected));
        // What happened to both happened to one record.
        self.report.dropped = self.report.dropped.min(dropped + 1);
        self.report.cut = self.report.cut.min(cut + 1);
        let (Some(mut chosen), Some(mut rejected)) = (chosen, rejected) else { return Ok(None) };
        for sequence in [&mut chosen, &mut rejected] {
            sequence.line = line;
            self.count(sequence).map_err(within)?;
        }
        Ok(Some(Pair { chosen, rejected }))
    }

    /// A text, as many sequences as it takes; a decoder's ends in the end token, which it must learn to
    /// say.
    fn text(&mut self, text: &str) -> Result<Vec<Sequence>> {
        let mut tokens = self.encode(text)?;
        if self.options.form == Form::Decoder {
            tokens.splice(0..0, self.before.iter().copied());
            tokens.extend(self.tokenizer.eos.first());
            let chunks = tokens.chunks(self.options.max_length).filter(|chunk| chunk.len() > 1);
            return Ok(chunks
                .map(|chunk| {
                    let mut wanted = vec![true; chunk.len()];
                    wanted[0] = false;
                    sequence(chunk.to_vec(), Target::Next(wanted))
                })
                .collect());
        }
        let room = self.options.max_length - self.before.len() - self.after.len();
        Ok(tokens
            .chunks(room)
            .map(|chunk| {
                let tokens = [&self.before, chunk, &self.after].concat();
                let special = |id: &u32| self.tokenizer.is_special(*id);
                let wanted = tokens.iter().map(|id| !special(id)).collect();
                sequence(tokens, Target::Next(wanted))
            })
            .collect())
    }

    fn labelled(
        &mut self,
        line: u64,
        text: &str,
        second: Option<&String>,
        target: Target,
    ) -> Result<Vec<Sequence>> {
        let mut tokens = self.encode(text)?;
        let mut other = second.map(|second| self.encode(second)).transpose()?;
        let between = match &other {
            Some(_) => self.between()?,
            None => Vec::new(),
        };
        let around = self.before.len() + self.after.len() + between.len();
        let room = self.options.max_length.checked_sub(around);
        let Some(room) = room.filter(|room| *room > usize::from(second.is_some())) else {
            return Err(Error::field("max_length", "leaves no room for two texts"));
        };
        let second = other.as_ref().map_or(0, Vec::len);
        if tokens.len() + second > room {
            if !self.overlong(line) {
                return Ok(Vec::new());
            }
            let (first, second) = shares(tokens.len(), second, room);
            tokens.truncate(first);
            if let Some(other) = &mut other {
                other.truncate(second);
            }
        }
        let other = other.unwrap_or_default();
        let tokens =
            [&self.before, tokens.as_slice(), &between, other.as_slice(), &self.after].concat();
        if tokens.is_empty() {
            // A text of characters that the tokenizer takes away.
            self.dropped(line);
            return Ok(Vec::new());
        }
        Ok(vec![sequence(tokens, target)])
    }

    /// What stands between two texts.
    fn between(&mut self) -> Result<Vec<u32>> {
        if self.options.form == Form::Decoder {
            return Err(Error::new(
                Reason::ModelUnsuitable,
                "two texts are joined by the separator of an encoder; choose an encoder",
            ));
        }
        if self.between.is_none() {
            self.between = Some(self.tokenizer.between()?.0);
        }
        Ok(self.between.clone().unwrap_or_default())
    }

    fn tagged(&mut self, line: u64, words: &[String], tags: &[u32]) -> Result<Vec<Sequence>> {
        let room = self.options.max_length - self.before.len() - self.after.len();
        let (mut tokens, mut wanted) = (self.before.clone(), vec![None; self.before.len()]);
        let mut whole = true;
        for (i, (word, tag)) in words.iter().zip(tags).enumerate() {
            let lower = self.options.lowercase.then(|| word.to_lowercase());
            let word = lower.as_deref().unwrap_or(word);
            let pieces = self.words.pieces(self.tokenizer, word, i == 0)?;
            if tokens.len() - self.before.len() + pieces.len() > room {
                whole = false;
                break;
            }
            tokens.extend_from_slice(pieces);
            let later = match self.options.tag_pieces {
                TagPieces::First => None,
                TagPieces::All => Some(*tag),
            };
            wanted
                .extend((0..pieces.len()).map(|piece| if piece == 0 { Some(*tag) } else { later }));
        }
        if !whole && !self.overlong(line) {
            return Ok(Vec::new());
        }
        if wanted.iter().all(Option::is_none) {
            self.dropped(line);
            return Ok(Vec::new());
        }
        tokens.extend_from_slice(&self.after);
        wanted.resize(tokens.len(), None);
        Ok(vec![sequence(tokens, Target::Tags(wanted))])
    }

    fn conversation(
        &mut self,
        messages: &[chat::Message],
        from: usize,
    ) -> Result<(Vec<u32>, Vec<bool>)> {
        if self.options.form == Form::Encoder {
            return Err(Error::new(
                Reason::ModelUnsuitable,
                "a model that reads text cannot answer; choose a model that continues text",
            ));
        }
        let (template, plain) = match &mut self.template {
            Some(template) => template,
            none => none.insert(match self.tokenizer.chat_template {
                Some(_) => (Template::of(self.tokenizer)?, false),
                None => (Template::plain(self.tokenizer)?, true),
            }),
        };
        let encoded = chat::encode_answers(self.tokenizer, template, messages, from, *plain)?;
        Ok((encoded.tokens, encoded.answer))
    }

    /// Cuts a conversation, or drops it when nothing is left to learn.
    fn fit(
        &mut self,
        line: u64,
        (mut tokens, mut wanted): (Vec<u32>, Vec<bool>),
    ) -> Option<Sequence> {
        // Nothing stands before the first token to predict it from.
        if let Some(first) = wanted.first_mut() {
            *first = false;
        }
        // What follows the last answer teaches nothing.
        let end = wanted.iter().rposition(|wanted| *wanted).map_or(0, |last| last + 1);
        tokens.truncate(end);
        wanted.truncate(end);
        if tokens.len() > self.options.max_length {
            if !self.overlong(line) {
                return None;
            }
            tokens.truncate(self.options.max_length);
            wanted.truncate(self.options.max_length);
        }
        if !wanted.contains(&true) {
            self.dropped(line);
            return None;
        }
        Some(sequence(tokens, Target::Next(wanted)))
    }

    /// Notes a record that is too long; whether to cut it.
    fn overlong(&mut self, line: u64) -> bool {
        if self.options.overlong == Overlong::Drop {
            self.dropped(line);
            return false;
        }
        self.report.first_cut.get_or_insert(line);
        self.report.cut += 1;
        true
    }

    fn dropped(&mut self, line: u64) {
        self.report.dropped += 1;
        self.report.first_dropped.get_or_insert(line);
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let lower = self.options.lowercase.then(|| text.to_lowercase());
        self.tokenizer.encode(lower.as_deref().unwrap_or(text), false, false)
    }

    fn count(&mut self, sequence: &Sequence) -> Result<()> {
        let report = &mut self.report;
        report.sequences += 1;
        report.tokens += sequence.tokens.len() as u64;
        report.targets += match &sequence.target {
            Target::Next(wanted) => wanted.iter().filter(|wanted| **wanted).count() as u64,
            Target::Tags(tags) => tags.iter().flatten().count() as u64,
            Target::Hidden(tokens) => tokens.iter().flatten().count() as u64,
            Target::Class(_) | Target::Value(_) | Target::Labels(_) | Target::Pair { .. } => 1,
        };
        if report.tokens > self.options.max_tokens {
            return Err(Error::new(
                Reason::TooLarge,
                format!(
                    "more than {} tokens in all; take a smaller data set or shorter sequences",
                    self.options.max_tokens
                ),
            ));
        }
        Ok(())
    }
}

/// Turns all records into sequences, in their order.
///
/// # Errors
/// As the records and [`Tokeniser::record`]; `CANCELLED`; `DATASET_UNSUITABLE` when nothing is left.
pub fn tokenise(
    records: impl IntoIterator<Item = Result<(u64, Record)>>,
    mut tokeniser: Tokeniser<'_>,
    progress: &Progress,
) -> Result<(Vec<Sequence>, Report)> {
    let mut sequences = Vec::new();
    for record in records {
        let (line, record) = record?;
        if tokeniser.report.records.is_multiple_of(CHECK) {
            progress.check()?;
        }
        sequences.append(&mut tokeniser.record(line, &record)?);
    }
    some(sequences.is_empty(), tokeniser.report).map(|report| (sequences, report))
}

/// Turns all pairs into pairs of sequences, in their order.
///
/// # Errors
/// As [`tokenise`]; `DATASET_UNSUITABLE` for records that are no pairs.
pub fn tokenise_pairs(
    records: impl IntoIterator<Item = Result<(u64, Record)>>,
    mut tokeniser: Tokeniser<'_>,
    progress: &Progress,
) -> Result<(Vec<Pair>, Report)> {
    let mut pairs = Vec::new();
    for record in records {
        let (line, record) = record?;
        if tokeniser.report.records.is_multiple_of(CHECK) {
            progress.check()?;
        }
        let Record::Preference(preference) = &record else {
            return Err(Error::new(
                Reason::DatasetUnsuitable,
                format!("line {line}: it is no pair of answers; choose a data set of preferences"),
            ));
        };
        pairs.extend(tokeniser.pair(line, preference)?);
    }
    some(pairs.is_empty(), tokeniser.report).map(|report| (pairs, report))
}

fn some(empty: bool, report: Report) -> Result<Report> {
    if empty {
        let what = format!(
            "none of {} records is left ({} dropped); allow longer sequences, or choose another data set",
            report.records, report.dropped
        );
        return Err(Error::new(Reason::DatasetUnsuitable, what));
    }
    Ok(report)
}

/// Tokens of two texts that fit into `room`: the longer one is cut first.
fn shares(first: usize, second: usize, room: usize) -> (usize, usize) {
    let half = room / 2;
    match (first > half, second > half) {
        (true, true) => (room - half, half),
        (true, false) => (room - second, second),
        (false, _) => (first, room - first),
    }
}

/// The line is set by the caller.
fn sequence(tokens: Vec<u32>, target: Target) -> Sequence {
    Sequence { tokens, target, line: 0 }
}

#[cfg(test)]
mod tests;
