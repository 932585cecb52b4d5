//! Classes, numbers and tags of texts.

mod words;

use std::sync::Arc;

use tonic::{Request, Response, Status};

use self::words::Word;
use super::State;
use super::adapters::loaded;
use crate::data::records::Record;
use crate::data::sequence::Target;
use crate::data::tokenise::{Form, Options, Overlong, TagPieces, Tokeniser};
use crate::error::{Error, Reason, Result};
use crate::models::encoder::plan::check_tokens;
use crate::proto::v1;
use crate::proto::v1::prediction::Kind;
use crate::proto::v1::prediction_service_server::PredictionService;
use crate::serve::embed::{self, Embedder};
use crate::serve::head::{Head, Task, probabilities};

const MAX_TEXTS: usize = 2048;
const MAX_TEXT_BYTES: usize = 1 << 20;
const MAX_WORDS: usize = 8192;

/// Bytes of an answer beside its scores, a label or a word in it.
const SLACK: u64 = 64;

pub struct Prediction(pub Arc<State>);

#[tonic::async_trait]
impl PredictionService for Prediction {
    async fn predict(
        &self,
        request: Request<v1::PredictRequest>,
    ) -> Result<Response<v1::PredictResponse>, Status> {
        let request = request.into_inner();
        check(&request)?;
        let row = self.0.store.version(&request.model).await?;
        let embedder = self.0.embedder(&row).await?;
        let (adapters, heads) = loaded::resolve_encoder(&self.0, &row, &request.adapters).await?;
        let head = match heads.as_slice() {
            [(_, head)] => Arc::clone(head),
            [] => {
                return Err(Error::field(
                    "adapters",
                    "none has a head; name one that was trained on classes, numbers or tags",
                )
                .into());
            }
            [_, (index, _), ..] => {
                return Err(Error::field(
                    format!("adapters[{index}].name"),
                    "has a head, and so has one before; name one adapter with a head",
                )
                .into());
            }
        };
        let all_scores = request.all_scores;
        let (reader, form) = (embedder.clone(), Arc::clone(&head));
        let texts = super::blocking(move || read(&reader, &form, request)).await?;
        let most = self.0.config.limits.message_bytes;
        size(&head, &texts, all_scores, most)?;
        let tokens: usize = texts.iter().map(|text| text.ids.len()).sum();
        metrics::counter!("planish_predicted_tokens_total").increment(tokens as u64);
        // A text without words to tag is not shown to the model.
        let seen = texts.iter().filter(|text| !text.ids.is_empty());
        let scores = embedder.embed(embed::Request {
            inputs: seen.map(|text| text.ids.clone()).collect(),
            pooling: None,
            normalize: None,
            dimensions: 0,
            adapters,
            head: Some(Arc::clone(&head)),
        });
        let mut scores = scores.await?.into_iter();
        let predictions = texts.into_iter().map(|text| {
            let own = if text.ids.is_empty() { None } else { scores.next() };
            predicted(&head, text, &own.unwrap_or_default(), all_scores)
        });
        let predictions = predictions.collect();
        Ok(Response::new(v1::PredictResponse { predictions, model: row.name() }))
    }
}

/// Refuses what is too much, and more than one form of text.
fn check(request: &v1::PredictRequest) -> Result<()> {
    let forms = [
        ("texts", request.texts.len()),
        ("tokens", request.tokens.len()),
        ("words", request.words.len()),
    ];
    let mut given = forms.iter().filter(|(_, count)| *count > 0);
    if let (Some((one, _)), Some((other, _))) = (given.next(), given.next()) {
        return Err(Error::field(*other, format!("sent beside {one}; send one or the other")));
    }
    for (field, count) in forms {
        if count > MAX_TEXTS {
            let problem = format!("{count} are more than the {MAX_TEXTS} of one request");
            return Err(Error::at(Reason::TooLarge, field, problem));
        }
    }
    let long = |text: &String| text.len() > MAX_TEXT_BYTES;
    if let Some(index) = request.texts.iter().position(long) {
        let problem = format!("more than {MAX_TEXT_BYTES} bytes; the model reads its start only");
        return Err(Error::at(Reason::TooLarge, format!("texts[{index}]"), problem));
    }
    for (index, words) in request.words.iter().enumerate() {
        let field = format!("words[{index}]");
        if words.words.len() > MAX_WORDS {
            let problem = format!("more than {MAX_WORDS} words; the model reads the first only");
            return Err(Error::at(Reason::TooLarge, field, problem));
        }
        if let Some(word) = words.words.iter().position(|word| word.trim().is_empty()) {
            return Err(Error::field(format!("{field}.words[{word}]"), "is empty"));
        }
        if words.words.iter().map(String::len).sum::<usize>() > MAX_TEXT_BYTES {
            let problem = format!("more than {MAX_TEXT_BYTES} bytes");
            return Err(Error::at(Reason::TooLarge, field, problem));
        }
    }
    Ok(())
}

/// A text as the model reads it.
struct Text {
    ids: Vec<u32>,
    truncated: bool,
    /// Those that are to be tagged, and the places of their first tokens.
    words: Vec<(Word, usize)>,
}

/// The tokens of all texts, made as they were in training.
fn read(embedder: &Embedder, head: &Head, request: v1::PredictRequest) -> Result<Vec<Text>> {
    let config = &embedder.model().family;
    let truncate = request.truncate.unwrap_or(true);
    let most = config.max_tokens;
    let too_long = |field: &str| {
        Error::field(
            field,
            format!(
                "longer than the {most} tokens that the model takes; shorten it or let it be truncated"
            ),
        )
    };
    if head.of_tokens() && !request.tokens.is_empty() {
        return Err(Error::field("tokens", "have no words to tag; send texts or words"));
    }
    if !head.of_tokens() && !request.words.is_empty() {
        return Err(Error::field("words", "are for tags; send texts"));
    }
    let mut texts = Vec::new();
    for (i, tokens) in request.tokens.into_iter().enumerate() {
        let (field, mut ids) = (format!("tokens[{i}]"), tokens.ids);
        let truncated = ids.len() > most;
        if truncated && !truncate {
            return Err(too_long(&field));
        }
        ids.truncate(most);
        check_tokens(config, &ids).map_err(|e| e.within(&field))?;
        texts.push(Text { ids, truncated, words: Vec::new() });
    }
    if request.texts.is_empty() && request.words.is_empty() {
        return Ok(texts);
    }
    let tokenizer = embedder.model().tokenizer.as_deref().ok_or_else(|| {
        Error::new(
            Reason::ModelUnsuitable,
            "the model has no tokenizer; send token ids, or import it with one",
        )
    })?;
    let options = Options {
        form: Form::Encoder,
        max_length: most,
        overlong: Overlong::Cut,
        lowercase: config.lowercase,
        tag_pieces: TagPieces::First,
        max_tokens: u64::MAX,
    };
    let mut tokeniser = Tokeniser::new(tokenizer, options)?;
    let given = request.words.into_iter().enumerate().map(|(i, words)| {
        let words = words.words.into_iter().map(|text| Word { text, start: 0, end: 0 });
        (format!("words[{i}]"), String::new(), words.collect())
    });
    let read = request.texts.into_iter().enumerate().map(|(i, text)| {
        let words = if head.of_tokens() { words::split(&text) } else { Vec::new() };
        (format!("texts[{i}]"), text, words)
    });
    for (field, text, words) in read.chain(given) {
        let cut = tokeniser.report().cut;
        let record = match head.task {
            // A word's tag is its number, so that its first token is found again.
            Task::Tagging => Record::Tagged(
                words.iter().map(|word| word.text.clone()).collect(),
                (0..u32::try_from(words.len()).unwrap_or(u32::MAX)).collect(),
            ),
            Task::Classification | Task::Regression => Record::Class(text, 0),
        };
        let at = |e: Error| Error::at(e.reason(), field.as_str(), e.message());
        let sequence = tokeniser.record(0, &record).map_err(at)?.pop();
        let truncated = tokeniser.report().cut > cut;
        if truncated && !truncate {
            return Err(too_long(&field));
        }
        let Some(sequence) = sequence else {
            if head.of_tokens() && words.is_empty() {
                texts.push(Text { ids: Vec::new(), truncated: false, words: Vec::new() });
                continue;
            }
            return Err(Error::field(field, "nothing that the tokenizer knows is left of it"));
        };
        check_tokens(config, &sequence.tokens).map_err(at)?;
        let mut words: Vec<Option<Word>> = words.into_iter().map(Some).collect();
        let mut placed = Vec::new();
        if let Target::Tags(tags) = &sequence.target {
            for (place, tag) in tags.iter().enumerate() {
                let word = tag.and_then(|number| words.get_mut(number as usize)?.take());
                placed.extend(word.map(|word| (word, place)));
            }
        }
        texts.push(Text { ids: sequence.tokens, truncated, words: placed });
    }
    Ok(texts)
}

/// Refuses answers that do not fit into a message.
fn size(head: &Head, texts: &[Text], all_scores: bool, most: u64) -> Result<()> {
    let labels: u64 = head.labels.iter().map(|label| label.len() as u64 + SLACK).sum();
    let longest = head.labels.iter().map(|label| label.len() as u64).max().unwrap_or(0);
    let each = SLACK + longest + if all_scores { labels } else { 0 };
    let total = texts.iter().fold(0u64, |sum, text| {
        let places = if head.of_tokens() { text.words.len() as u64 } else { 1 };
        let words: u64 = text.words.iter().map(|(word, _)| word.text.len() as u64).sum();
        sum.saturating_add(places.saturating_mul(each)).saturating_add(words + SLACK)
    });
    if total <= most {
        return Ok(());
    }
    Err(Error::new(
        Reason::TooLarge,
        format!(
            "the answer would have about {total} bytes, more than limits.message_bytes ({most}); send \
             fewer texts at once, or do without all_scores"
        ),
    ))
}

fn predicted(head: &Head, text: Text, scores: &[f32], all: bool) -> v1::Prediction {
    let Text { ids, truncated, words } = text;
    let kind = match head.task {
        Task::Regression => Kind::Value(scores.first().copied().unwrap_or_default()),
        Task::Classification => {
            let (label, score, scores) = likeliest(head, scores, all);
            Kind::Classification(v1::ClassPrediction { label, score, scores })
        }
        Task::Tagging => {
            let outputs = head.outputs();
            let words = words.into_iter().map(|(word, place)| {
                let of = scores.get(place * outputs..(place + 1) * outputs).unwrap_or_default();
                let (tag, score, scores) = likeliest(head, of, all);
                let Word { text: word, start, end } = word;
                v1::WordTag { word, start, end, tag, score, scores }
            });
            Kind::Tagging(v1::TagPrediction { words: words.collect() })
        }
    };
    v1::Prediction {
        kind: Some(kind),
        token_count: u32::try_from(ids.len()).unwrap_or(u32::MAX),
        truncated,
    }
}

/// The likeliest label, its probability, and those of all where they are wanted.
fn likeliest(head: &Head, scores: &[f32], all: bool) -> (String, f32, Vec<v1::LabelScore>) {
    let shares = probabilities(scores);
    let named = || head.labels.iter().zip(&shares);
    // Of equal ones the first.
    let best = named().reduce(|best, one| if one.1 > best.1 { one } else { best });
    let (label, score) = best.map_or((String::new(), 0.0), |(l, s)| (l.clone(), *s));
    let scores = match all {
        false => Vec::new(),
        true => named()
            .map(|(label, score)| v1::LabelScore { label: label.clone(), score: *score })
            .collect(),
    };
    (label, score, scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_bounded_and_of_one_form() {
        let field = |request: &v1::PredictRequest| {
            check(request).unwrap_err().violations()[0].field.clone()
        };
        let words =
            |words: &[&str]| v1::Words { words: words.iter().map(|w| (*w).into()).collect() };
        let texts = vec!["a".to_owned()];
        let both = v1::PredictRequest { texts, words: vec![words(&["a"])], ..Default::default() };
        assert_eq!(field(&both), "words");
        let many = v1::PredictRequest { texts: vec![String::new(); 2049], ..Default::default() };
        assert_eq!(field(&many), "texts");
        let empty = v1::PredictRequest { words: vec![words(&["a", " "])], ..Default::default() };
        assert_eq!(field(&empty), "words[0].words[1]");
        let long = v1::PredictRequest {
            words: vec![words(&["a"]), words(&["a"; 8193])],
            ..Default::default()
        };
        assert_eq!(field(&long), "words[1]");
    }

    #[test]
    fn the_first_of_equal_labels_is_given() {
        let labels = ["x", "y", "z"].map(str::to_owned).to_vec();
        let weight = (&[3, 1][..], vec![0.0; 3]);
        let head = Head::new(Task::Classification, labels, weight, vec![0.0; 3], 1).unwrap();
        let (label, score, scores) = likeliest(&head, &[1.0, 2.0, 2.0], true);
        assert_eq!((label.as_str(), scores.len()), ("y", 3));
        assert!((scores.iter().map(|s| s.score).sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(score, scores[1].score);
        assert!(likeliest(&head, &[0.0; 3], false).2.is_empty());
    }
}
