//! The captions of a data set as the text tower sees them.

use std::ops::Range;
use std::sync::Arc;

use super::{Config, Model};
use crate::data::images::Images;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};

/// Captions in tokens, class by class, each class by all templates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompts {
    tokens: Vec<Vec<u32>>,
    /// Captions of a class.
    pub each: usize,
}

/// Texts one after another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Texts {
    pub tokens: Vec<u32>,
    pub ranges: Arc<[Range<usize>]>,
}

impl Texts {
    /// Of some texts, none of which is empty.
    pub fn of<'a>(texts: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let (mut tokens, mut ranges) = (Vec::new(), Vec::new());
        for text in texts {
            ranges.push(tokens.len()..tokens.len() + text.len());
            tokens.extend_from_slice(text);
        }
        Self { tokens, ranges: ranges.into() }
    }
}

impl Prompts {
    /// The captions of a data set by a model's tokenizer.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` without a tokenizer; `DATASET_UNSUITABLE` for images of other sizes, classes without
    /// names, and captions that are empty, too long or have tokens that the model does not know.
    pub fn of(model: &Model, images: &Images) -> Result<Self> {
        let tokenizer = model.tokenizer.as_ref().ok_or_else(|| {
            Error::new(
                Reason::ModelUnsuitable,
                "the model has no tokenizer, so it cannot read captions; create it anew",
            )
        })?;
        Self::with(&model.family, tokenizer, images)
    }

    /// [`Prompts::of`] of the parts of a model.
    ///
    /// # Errors
    /// As [`Prompts::of`].
    pub fn with(config: &Config, tokenizer: &Tokenizer, images: &Images) -> Result<Self> {
        let unsuitable = |problem: String| Error::new(Reason::DatasetUnsuitable, problem);
        let captions = &images.captions;
        images.suits([config.side; 2], config.channels, usize::MAX)?;
        if captions.names.len() < images.labels() {
            return Err(unsuitable(format!(
                "{} of the {} classes have a name; import the images with `labels` (and `templates`), which \
                 captions are made of",
                captions.names.len(),
                images.labels()
            )));
        }
        let each = captions.each();
        let mut tokens = Vec::with_capacity(each * captions.names.len());
        for class in 0..captions.names.len() {
            for template in 0..each {
                let text = captions.text(class, template);
                let ids = tokenizer.encode(&text, true, false)?;
                if ids.is_empty() || ids.len() > config.text.positions {
                    return Err(unsuitable(format!(
                        "the caption '{text:.100}' has {} tokens, the model takes 1 to {}; make it shorter, or \
                         a model with more max_position_embeddings",
                        ids.len(),
                        config.text.positions
                    )));
                }
                if let Some(id) = ids.iter().find(|id| **id as usize >= config.vocab) {
                    return Err(unsuitable(format!(
                        "the caption '{text:.100}' has token {id}, but the model knows {}",
                        config.vocab
                    )));
                }
                tokens.push(ids);
            }
        }
        Ok(Self { tokens, each })
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.tokens.len() / self.each
    }

    /// All captions: that of class `c` by template `t` is number `c * each + t`.
    pub fn all(&self) -> &[Vec<u32>] {
        &self.tokens
    }

    /// The captions of these numbers, each once, and where each of the numbers went.
    ///
    /// # Errors
    /// INTERNAL for a number that there is not.
    pub fn pick(&self, numbers: &[usize]) -> Result<(Texts, Arc<[u32]>)> {
        let mut places = vec![None; self.tokens.len()];
        let (mut found, mut at) = (Vec::new(), Vec::with_capacity(numbers.len()));
        for number in numbers {
            let place = places
                .get_mut(*number)
                .ok_or_else(|| Error::internal(format!("there is no caption {number}")))?;
            let place = *place.get_or_insert_with(|| {
                found.push(&self.tokens[*number][..]);
                found.len() as u32 - 1
            });
            at.push(place);
        }
        Ok((Texts::of(found), at.into()))
    }
}
