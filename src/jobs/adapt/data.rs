//! The data sets of a training as sequences of tokens.

use crate::data::records::{Kind, Records};
use crate::data::sequence::{Sequence, Target};
use crate::data::split::{Choice, split};
use crate::data::tokenise::{Form, Options, Overlong, TagPieces, Tokeniser, tokenise};
use crate::error::{Error, Reason, Result};
use crate::jobs::recipe::signed;
use crate::jobs::work::Job;
use crate::models::AnyModel;
use crate::proto::v1;
use crate::recipe::adapt::Plan;
use crate::seed::Stream;
use crate::store::names;

/// Tokens of a data set, at most: they are held in memory.
const MAX_TOKENS: u64 = 1 << 27;

/// Tokens of a text before it is learnt in pieces.
const MAX_TEXT: usize = 1 << 20;

/// What is learnt from and what is measured on.
pub struct Data {
    pub training: Vec<Sequence>,
    /// Empty when nothing is measured.
    pub validation: Vec<Sequence>,
    /// A token that fills rows up; it is never looked at.
    pub padding: u32,
    /// Outputs of the head: classes, tags, or 1 for a number. None for a decoder, which has its own.
    pub outputs: Option<usize>,
    /// Names of the classes or tags.
    pub labels: Vec<String>,
    pub kind: Kind,
    pub training_facts: v1::AdaptData,
    pub validation_facts: Option<v1::AdaptData>,
    pub warnings: Vec<String>,
}

/// A data set that was read.
struct Part {
    sequences: Vec<Sequence>,
    labels: Vec<String>,
    kind: Kind,
    facts: v1::AdaptData,
}

impl Data {
    pub fn read(job: &Job<'_>, model: &AnyModel, plan: &Plan, random: &Stream) -> Result<Self> {
        let mut warnings = Vec::new();
        let named = &plan.training.dataset;
        let part = read(job, model, plan, ("training.dataset", named), None, &mut warnings)?;
        let Part { mut sequences, labels, kind, facts } = part;
        let (mut validation, mut validation_facts) = (Vec::new(), None);
        let other = plan.training.validation.as_ref().map_or("", |v| v.dataset.as_str());
        let mut training_facts = facts;
        if !other.is_empty() {
            let field = ("training.validation.dataset", other);
            let part = read(job, model, plan, field, Some((&labels, kind)), &mut warnings)?;
            validation = part.sequences;
            validation_facts = Some(part.facts);
        } else if plan.settings.validation_share > 0.0 {
            let share = plan.settings.validation_share;
            (sequences, validation) = hold_out(sequences, share, &random.child("validation"))
                .map_err(|e| e.within("training.validation"))?;
            let count = |facts: &v1::AdaptData, part: &[Sequence]| v1::AdaptData {
                sequences: signed(part.len() as u64),
                tokens: signed(part.iter().map(|s| s.tokens.len() as u64).sum()),
                ..facts.clone()
            };
            validation_facts = Some(count(&training_facts, &validation));
            training_facts = count(&training_facts, &sequences);
        }
        let tokenizer = model.tokenizer().ok_or_else(no_tokenizer)?;
        Ok(Self {
            training: sequences,
            validation,
            padding: tokenizer.pad.or(tokenizer.eos.first().copied()).unwrap_or(0),
            outputs: match kind {
                Kind::Classification | Kind::Tagging => Some(labels.len()),
                Kind::Regression => Some(1),
                _ => None,
            },
            labels,
            kind,
            training_facts,
            validation_facts,
            warnings,
        })
    }
}

/// Takes a share of the sequences out, by chance; of classes each gives its share.
fn hold_out(
    sequences: Vec<Sequence>,
    share: f64,
    random: &Stream,
) -> Result<(Vec<Sequence>, Vec<Sequence>)> {
    let class = |s: &Sequence| match s.target {
        Target::Class(class) => Some(class),
        _ => None,
    };
    let classes: Option<Vec<u32>> = sequences.iter().map(class).collect();
    let choice = match &classes {
        Some(classes) => Choice::Stratified(random, classes),
        None => Choice::Random(random),
    };
    let parts = split(sequences.len(), share, &choice)?;
    let mut out = vec![false; sequences.len()];
    parts.held_out.into_iter().for_each(|i| out[i] = true);
    let (held, kept): (Vec<_>, Vec<_>) = sequences.into_iter().zip(out).partition(|(_, out)| *out);
    let plain = |part: Vec<(Sequence, bool)>| part.into_iter().map(|(s, _)| s).collect();
    Ok((plain(kept), plain(held)))
}

/// Reads a data set; with the classes and the kind of another one, where they must be the same.
fn read(
    job: &Job<'_>,
    model: &AnyModel,
    plan: &Plan,
    (field, name): (&str, &str),
    same: Option<(&[String], Kind)>,
    warnings: &mut Vec<String>,
) -> Result<Part> {
    let at = |e: Error| Error::at(e.reason(), field, e.message());
    let (row, mut source) =
        job.wait(job.store.dataset_source(names::dataset(name).map_err(at)?)).map_err(at)?;
    plan.suits(field, row.kind)?;
    if let Some((labels, kind)) = same {
        if kind != row.kind {
            return Err(Error::at(
                Reason::DatasetUnsuitable,
                field,
                format!("it holds {}, the training data {}", row.kind.name(), kind.name()),
            ));
        }
        source.layout.labels = labels.to_vec();
    }
    let labels = source.layout.labels.clone();
    let tokenizer = model.tokenizer().ok_or_else(no_tokenizer)?;
    let length = plan.settings.max_length;
    let options = Options {
        form: if plan.is_encoder() { Form::Encoder } else { Form::Decoder },
        // The loop cuts texts itself, so that each of their tokens is predicted.
        max_length: if row.kind == Kind::Text { MAX_TEXT } else { length },
        overlong: Overlong::Cut,
        lowercase: match model {
            AnyModel::Encoder(model) => model.family.lowercase,
            _ => false,
        },
        tag_pieces: TagPieces::First,
        max_tokens: MAX_TOKENS,
    };
    let tokeniser = Tokeniser::new(tokenizer, options).map_err(|e| e.within("training"))?;
    let records = Records::open(&source)?;
    let (sequences, report) =
        tokenise(records, tokeniser, &job.progress).map_err(|e| e.within(name))?;
    let line =
        |line: Option<u64>| line.map_or(String::new(), |l| format!(", the first in line {l}"));
    if report.cut > 0 {
        warnings.push(format!(
            "{} of {} records of {name} are longer than max_length, {length}, and lose their end{}",
            report.cut,
            report.records,
            line(report.first_cut)
        ));
    }
    if report.dropped > 0 {
        warnings.push(format!(
            "{} of {} records of {name} have nothing left to learn and are passed over{}",
            report.dropped,
            report.records,
            line(report.first_dropped)
        ));
    }
    let facts = v1::AdaptData {
        dataset: name.to_owned(),
        records: signed(report.records),
        sequences: signed(report.sequences),
        tokens: signed(report.tokens),
        cut_records: signed(report.cut),
        dropped_records: signed(report.dropped),
    };
    Ok(Part { sequences, labels, kind: row.kind, facts })
}

fn no_tokenizer() -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        "the model has no tokenizer, so it cannot read the data; import it again with tokenizer.json",
    )
}
