//! The data sets of a training as sequences.

use crate::data::images::Images;
use crate::data::records::{Kind, Records, Source};
use crate::data::sequence::{Sequence, Target};
use crate::data::split::{Choice, split};
use crate::data::tokenise::{Form, Options, Overlong, TagPieces, Tokeniser, tokenise};
use crate::error::{Error, Reason, Result};
use crate::methods::Datasets;
use crate::models::AnyModel;
use crate::models::two_tower::prompts::Prompts;
use crate::progress::Progress;
use crate::proto::v1;
use crate::seed::Stream;
use crate::train::settings::Settings;

/// Tokens of a data set, at most: they are held in memory.
const MAX_TOKENS: u64 = 1 << 27;

/// Tokens of a text before it is learnt in pieces.
const MAX_TEXT: usize = 1 << 20;

/// What is learnt from and what is measured on.
pub struct Data {
    pub training: Vec<Sequence>,
    /// Empty when nothing is measured.
    pub validation: Vec<Sequence>,
    pub images: Option<Images>,
    /// Images to measure on, whose numbers follow those of the others.
    pub validation_images: Option<Images>,
    /// Captions of the classes, where they are learnt.
    pub prompts: Option<Prompts>,
    pub padding: u32,
    pub warnings: Vec<String>,
}

impl Data {
    pub fn read(
        datasets: &dyn Datasets,
        model: &AnyModel,
        (training, settings): (&v1::Training, &Settings),
        random: &Stream,
        progress: &Progress,
    ) -> Result<Self> {
        progress.report(0.0, "reading the data")?;
        let other = training.validation.as_ref().map_or("", |v| v.dataset.as_str());
        let at = |field: &'static str| move |e: Error| Error::at(e.reason(), field, e.message());
        let mut data = match model {
            AnyModel::Vision(_) | AnyModel::TwoTower(_) => {
                let read = |name: &str| -> Result<Images> {
                    let images = datasets.images(name)?;
                    match model {
                        AnyModel::Vision(model) => {
                            let config = &model.family;
                            images.suits(config.sides, config.channels, config.classes)?;
                        }
                        AnyModel::TwoTower(model) => {
                            let (side, channels) = (model.family.side, model.family.channels);
                            images.suits([side; 2], channels, usize::MAX)?;
                        }
                        _ => {}
                    }
                    Ok(images)
                };
                let images = read(&training.dataset).map_err(at("training.dataset"))?;
                let validation = match other {
                    "" => None,
                    name => Some(read(name).map_err(at("training.validation.dataset"))?),
                };
                let prompts = match model {
                    AnyModel::TwoTower(model) => Some(Prompts::of(model, &images)),
                    _ => None,
                };
                let prompts = prompts.transpose().map_err(at("training.dataset"))?;
                if let (Some(prompts), Some(more)) = (&prompts, &validation)
                    && more.labels() > prompts.classes()
                {
                    return Err(Error::at(
                        Reason::DatasetUnsuitable,
                        "training.validation.dataset",
                        "has classes that the training data have no names for",
                    ));
                }
                Self {
                    training: sequences(&images, 0),
                    validation: validation
                        .as_ref()
                        .map_or_else(Vec::new, |more| sequences(more, images.len())),
                    images: Some(images),
                    validation_images: validation,
                    prompts,
                    padding: 0,
                    warnings: Vec::new(),
                }
            }
            _ => {
                let tokenizer = model.tokenizer().ok_or_else(no_tokenizer)?;
                let mut warnings = Vec::new();
                let mut read =
                    |name: &str| texts(datasets, model, name, settings, progress, &mut warnings);
                let training = read(&training.dataset).map_err(at("training.dataset"))?;
                let validation = match other {
                    "" => Vec::new(),
                    name => read(name).map_err(at("training.validation.dataset"))?,
                };
                Self {
                    training,
                    validation,
                    images: None,
                    validation_images: None,
                    prompts: None,
                    padding: tokenizer.pad.or(tokenizer.eos.first().copied()).unwrap_or(0),
                    warnings,
                }
            }
        };
        if other.is_empty() && settings.validation_share > 0.0 {
            let records = std::mem::take(&mut data.training);
            let random = random.child("validation");
            let parts = hold_out(records, settings.validation_share, &random);
            (data.training, data.validation) =
                parts.map_err(|e| e.within("training.validation"))?;
        }
        Ok(data)
    }
}

/// One token an image: its number.
fn sequences(images: &Images, first: usize) -> Vec<Sequence> {
    let classes = images.classes.iter().enumerate();
    let sequence = |(i, class): (usize, &u8)| Sequence {
        tokens: vec![(first + i) as u32],
        target: Target::Class((*class).into()),
        line: i as u64 + 1,
    };
    classes.map(sequence).collect()
}

fn texts(
    datasets: &dyn Datasets,
    model: &AnyModel,
    name: &str,
    settings: &Settings,
    progress: &Progress,
    warnings: &mut Vec<String>,
) -> Result<Vec<Sequence>> {
    let source: Source = datasets.source(name)?;
    if !matches!(source.kind, Kind::Text | Kind::Chat) {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            format!(
                "{name} holds {}, but a language model is trained on text or chat; name another data set",
                source.kind.name()
            ),
        ));
    }
    let tokenizer = model.tokenizer().ok_or_else(no_tokenizer)?;
    let options = Options {
        form: Form::Decoder,
        // The loop cuts texts itself, so that each of their tokens is predicted.
        max_length: if source.kind == Kind::Text { MAX_TEXT } else { settings.max_length },
        overlong: Overlong::Cut,
        lowercase: false,
        tag_pieces: TagPieces::First,
        max_tokens: MAX_TOKENS,
    };
    let tokeniser = Tokeniser::new(tokenizer, options).map_err(|e| e.within("training"))?;
    let (sequences, report) = tokenise(Records::open(&source)?, tokeniser, progress)?;
    if report.cut > 0 {
        warnings.push(format!(
            "{} of {} records of {name} are longer than max_length and lose their end",
            report.cut, report.records
        ));
    }
    Ok(sequences)
}

/// Takes a share of the records out, by chance; of classes each gives its share.
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

fn no_tokenizer() -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        "the model has no tokenizer, so it cannot read texts; create or import one with a tokenizer",
    )
}
