//! The data sets of a training as sequences of tokens.

use crate::data::records::{Kind, Records};
use crate::data::sequence::{Sequence, Target};
use crate::data::split::{Choice, split};
use crate::data::tokenise::{
    Form, Options, Overlong, Pair, TagPieces, Tokeniser, tokenise, tokenise_pairs,
};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};
use crate::jobs::recipe::signed;
use crate::jobs::work::Job;
use crate::models::AnyModel;
use crate::progress::Progress;
use crate::proto::v1;
use crate::recipe::adapt::{self, Learner, Plan};
use crate::seed::Stream;
use crate::store::names;
use crate::train::batch::Masking;

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
    /// How tokens are hidden, where that is learnt.
    pub masking: Option<Masking>,
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
    pub fn read(
        job: &Job<'_>,
        model: &AnyModel,
        plan: &Plan,
        random: &Stream,
        progress: &Progress,
    ) -> Result<Self> {
        let mut warnings = Vec::new();
        let reading = Reading {
            job,
            model,
            max_length: plan.settings.max_length,
            // The loop cuts texts of decoders itself, so that each of their tokens is predicted.
            text_length: if plan.is_encoder() { plan.settings.max_length } else { MAX_TEXT },
            hides: plan.hides(),
            progress,
        };
        let named = &plan.training.dataset;
        let part = reading.read(("training.dataset", named), None, None, &mut warnings)?;
        let Part { mut sequences, labels, kind, facts } = part;
        let (mut validation, mut validation_facts) = (Vec::new(), None);
        let other = plan.training.validation.as_ref().map_or("", |v| v.dataset.as_str());
        let mut training_facts = facts;
        if !other.is_empty() {
            let field = ("training.validation.dataset", other);
            let same = Some((labels.as_slice(), kind));
            let part = reading.read(field, same, None, &mut warnings)?;
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
        let masking = match plan.hides() {
            true => Some(masking(tokenizer, plan.settings.mask_share)?),
            false => None,
        };
        Ok(Self {
            masking,
            training: sequences,
            validation,
            padding: tokenizer.pad.or(tokenizer.eos.first().copied()).unwrap_or(0),
            outputs: match kind {
                Kind::Classification | Kind::Tagging | Kind::MultiLabel => Some(labels.len()),
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

/// Records of a task, for a model that was tuned with these classes; those of the data set where there are
/// none. Rows have `max_length` tokens at most.
pub fn task(
    job: &Job<'_>,
    model: &AnyModel,
    asked: &v1::TaskEvaluation,
    (labels, max_length): (&[String], usize),
    progress: &Progress,
) -> Result<Vec<Sequence>> {
    let reading =
        Reading { job, model, max_length, text_length: max_length, hides: false, progress };
    let field = ("evaluation.task.dataset", asked.dataset.as_str());
    let most = asked.max_records.map(u64::from);
    // Cut records are as they were in training.
    let part = match labels {
        [] => reading.read(field, None, most, &mut Vec::new())?,
        labels => reading.read_as(field, Some(labels), most, &mut Vec::new())?,
    };
    Ok(part.sequences)
}

/// How records are read for a model.
struct Reading<'a> {
    job: &'a Job<'a>,
    model: &'a AnyModel,
    /// Tokens of a record.
    max_length: usize,
    /// Tokens of a text before it is learnt in pieces.
    text_length: usize,
    /// Whether hidden tokens are learnt.
    hides: bool,
    progress: &'a Progress,
}

impl Reading<'_> {
    /// Reads a data set; with the classes and the kind of another one, where they must be the same.
    fn read(
        &self,
        field: (&str, &str),
        same: Option<(&[String], Kind)>,
        most: Option<u64>,
        warnings: &mut Vec<String>,
    ) -> Result<Part> {
        let part = self.read_as(field, same.map(|(labels, _)| labels), most, warnings)?;
        match same {
            Some((_, kind)) if kind != part.kind => Err(Error::at(
                Reason::DatasetUnsuitable,
                field.0,
                format!("it holds {}, the training data {}", part.kind.name(), kind.name()),
            )),
            _ => Ok(part),
        }
    }

    /// Reads at most so many records of a data set, whose classes are these.
    fn read_as(
        &self,
        (field, name): (&str, &str),
        labels: Option<&[String]>,
        most: Option<u64>,
        warnings: &mut Vec<String>,
    ) -> Result<Part> {
        let Self { job, model, max_length: length, text_length, hides, progress } = self;
        let at = |e: Error| Error::at(e.reason(), field, e.message());
        let (row, mut source) =
            job.wait(job.store.dataset_source(names::dataset(name).map_err(at)?)).map_err(at)?;
        let encoder = matches!(model, AnyModel::Encoder(_));
        adapt::suits(Learner::of(encoder, *hides), field, row.kind)?;
        if let Some(most) = most {
            let before = source.layout.max_records.unwrap_or(u64::MAX);
            source.layout.max_records = Some(before.min(most));
        }
        if let Some(labels) = labels
            && matches!(row.kind, Kind::Classification | Kind::Tagging | Kind::MultiLabel)
        {
            source.layout.labels = labels.to_vec();
        }
        let labels = source.layout.labels.clone();
        let tokenizer = model.tokenizer().ok_or_else(no_tokenizer)?;
        let options = Options {
            form: if encoder { Form::Encoder } else { Form::Decoder },
            max_length: if row.kind == Kind::Text { *text_length } else { *length },
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
        let (sequences, report) = match row.kind {
            Kind::Preferences => {
                let (pairs, report) =
                    tokenise_pairs(records, tokeniser, progress).map_err(|e| e.within(name))?;
                (pairs.into_iter().map(joined).collect::<Result<Vec<_>>>()?, report)
            }
            _ => tokenise(records, tokeniser, progress).map_err(|e| e.within(name))?,
        };
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
}

/// A pair as one sequence.
fn joined(pair: Pair) -> Result<Sequence> {
    let Pair { chosen, rejected } = pair;
    let (Target::Next(mut counts), Target::Next(more)) = (chosen.target, rejected.target) else {
        return Err(Error::internal("sides of a pair without answers"));
    };
    let length = chosen.tokens.len();
    counts.extend(more);
    let tokens = [chosen.tokens, rejected.tokens].concat();
    Ok(Sequence { tokens, target: Target::Pair { chosen: length, counts }, line: chosen.line })
}

/// How tokens of this tokenizer are hidden.
fn masking(tokenizer: &Tokenizer, share: f64) -> Result<Masking> {
    let token = tokenizer.mask().ok_or_else(|| {
        Error::new(
            Reason::ModelUnsuitable,
            "the model's tokenizer has no token that stands for a hidden one; choose another objective",
        )
    })?;
    let vocabulary = u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
    let special = (0..vocabulary).filter(|id| tokenizer.is_special(*id)).collect();
    Ok(Masking { share, token, vocabulary, special })
}

fn no_tokenizer() -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        "the model has no tokenizer, so it cannot read the data; import it again with tokenizer.json",
    )
}
