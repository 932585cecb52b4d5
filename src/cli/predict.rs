//! `planish predict`.

use std::path::PathBuf;

use clap::Args;

use super::Context;
use super::adapters::parse_use;
use super::embed::lines;
use super::error::Result;
use super::names::ModelName;
use super::output::{self, table};
use crate::proto::v1::prediction::Kind;
use crate::proto::v1::{AdapterUse, LabelScore, PredictRequest, Prediction};

/// Texts of one request.
const BATCH: usize = 256;

#[derive(Debug, Args)]
pub struct PredictArgs {
    /// Encoder that reads: `name` (its newest version) or `name@3`
    #[arg(long, short)]
    model: ModelName,
    /// Texts; the lines of standard input when absent
    #[arg(value_name = "TEXT")]
    texts: Vec<String>,
    /// A file with a text on each line instead; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "texts")]
    file: Option<PathBuf>,
    /// Adapter to apply, `name` or `name=0.5`; one of them has the head
    #[arg(long = "adapter", value_name = "NAME[=WEIGHT]", value_parser = parse_use, required = true)]
    adapters: Vec<AdapterUse>,
    /// Show the probabilities of all labels
    #[arg(long)]
    all_scores: bool,
    /// Refuse texts that are longer than the model takes instead of cutting them
    #[arg(long)]
    no_truncate: bool,
}

impl PredictArgs {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let texts = match (self.texts, self.file) {
            (texts, None) if !texts.is_empty() => texts,
            (_, file) => lines(file).await?,
        };
        let client = context.connect().await?;
        let mut rows = Vec::new();
        // Without texts the model and the adapters are still checked.
        let batches: Vec<&[String]> =
            if texts.is_empty() { vec![&[]] } else { texts.chunks(BATCH).collect() };
        for batch in batches {
            let request = PredictRequest {
                model: self.model.resource(),
                adapters: self.adapters.clone(),
                texts: batch.to_vec(),
                truncate: self.no_truncate.then_some(false),
                all_scores: self.all_scores,
                ..Default::default()
            };
            let answer = client.prediction().predict(request).await?.into_inner();
            for (text, prediction) in batch.iter().zip(&answer.predictions) {
                if context.output.is_json() {
                    output::json_line(prediction)?;
                } else {
                    rows.extend(shown(text, prediction));
                }
            }
        }
        if context.output.is_json() {
            return Ok(());
        }
        output::line(table(&["text", "prediction", "score", "all"], &[2], rows))
    }
}

/// Rows of a prediction: one, or one for each word.
fn shown(text: &str, prediction: &Prediction) -> Vec<Vec<String>> {
    let short = |text: &str| -> String {
        let mut short: String = text.chars().take(40).collect();
        if short.len() < text.len() {
            short.push('…');
        }
        short
    };
    let cut = if prediction.truncated { " (cut)" } else { "" };
    let row = |text: &str, label: String, score: String, all: &[LabelScore]| {
        let all: Vec<_> = all.iter().map(|s| format!("{} {:.3}", s.label, s.score)).collect();
        vec![format!("{}{cut}", short(text)), label, score, all.join(", ")]
    };
    match &prediction.kind {
        None => vec![row(text, String::new(), String::new(), &[])],
        Some(Kind::Value(value)) => vec![row(text, value.to_string(), String::new(), &[])],
        Some(Kind::Classification(class)) => {
            vec![row(text, class.label.clone(), format!("{:.3}", class.score), &class.scores)]
        }
        Some(Kind::Tagging(tags)) => {
            let word = |w: &crate::proto::v1::WordTag| {
                row(&w.word, w.tag.clone(), format!("{:.3}", w.score), &w.scores)
            };
            tags.words.iter().map(word).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1::{ClassPrediction, TagPrediction, WordTag};

    #[test]
    fn predictions_have_a_row_each_or_one_a_word() {
        let score = |label: &str, score| LabelScore { label: label.into(), score };
        let class = ClassPrediction {
            label: "up".into(),
            score: 0.75,
            scores: vec![score("up", 0.75), score("down", 0.25)],
        };
        let of = |kind, truncated| Prediction { kind: Some(kind), token_count: 3, truncated };
        let rows = shown("good news", &of(Kind::Classification(class), true));
        assert_eq!(rows, [["good news (cut)", "up", "0.750", "up 0.750, down 0.250"]]);
        assert_eq!(shown("x", &of(Kind::Value(-1.5), false)), [["x", "-1.5", "", ""]]);
        let word = |word: &str, tag: &str| WordTag {
            word: word.into(),
            tag: tag.into(),
            score: 1.0,
            ..Default::default()
        };
        let words = vec![word("Ann", "PER"), word("sings", "O")];
        let rows = shown("Ann sings", &of(Kind::Tagging(TagPrediction { words }), false));
        assert_eq!(rows, [["Ann", "PER", "1.000", ""], ["sings", "O", "1.000", ""]]);
        let long = shown(&"ä".repeat(41), &of(Kind::Value(0.0), false));
        assert_eq!(long[0][0], format!("{}…", "ä".repeat(40)));
    }
}
