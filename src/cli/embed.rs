//! `planish embed`.

use std::io::Read as _;
use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

use super::Context;
use super::adapters::parse_use;
use super::error::{CliError, Result};
use super::names::ModelName;
use super::output::{self, table};
use crate::proto::v1::{AdapterUse, EmbedOptions, EmbedStreamRequest, Embedding, Pooling};

/// Texts of one message: enough for full steps of the model, few enough for steady answers.
const BATCH: usize = 64;
/// Values of a vector that a table shows.
const SHOWN: usize = 4;

#[derive(Debug, Args)]
pub struct EmbedArgs {
    /// Encoder that embeds: `name` (its newest version) or `name@3`
    #[arg(long, short)]
    model: ModelName,
    /// Texts, one vector each; the lines of standard input when absent
    #[arg(value_name = "TEXT")]
    texts: Vec<String>,
    /// A file with a text on each line instead; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "texts")]
    file: Option<PathBuf>,
    /// How the vectors of the tokens become one [default: as the model says]
    #[arg(long, value_enum, value_name = "KIND")]
    pooling: Option<Kind>,
    /// Scale vectors to length 1 [default: as the model says]
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    normalize: Option<bool>,
    /// Keep this many leading values of each vector [default: all]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    dimensions: u32,
    /// Refuse texts that are longer than the model takes instead of cutting them
    #[arg(long)]
    no_truncate: bool,
    /// Adapter to apply, `name` or `name=0.5`; may be given several times
    #[arg(long = "adapter", value_name = "NAME[=WEIGHT]", value_parser = parse_use)]
    adapters: Vec<AdapterUse>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    Mean,
    Cls,
    Max,
}

impl EmbedArgs {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let texts = match (self.texts, self.file) {
            (texts, None) if !texts.is_empty() => texts,
            (_, file) => lines(file).await?,
        };
        let pooling = match self.pooling {
            None => Pooling::Unspecified,
            Some(Kind::Mean) => Pooling::Mean,
            Some(Kind::Cls) => Pooling::Cls,
            Some(Kind::Max) => Pooling::Max,
        };
        let options = EmbedOptions {
            pooling: pooling.into(),
            normalize: self.normalize,
            dimensions: self.dimensions,
            truncate: self.no_truncate.then_some(false),
        };
        let client = context.connect().await?;
        let mut requests = messages(texts, self.model.resource(), options);
        requests[0].adapters = self.adapters;
        let stream = futures::stream::iter(requests);
        let mut answers = client.retrieval().embed_stream(stream).await?.into_inner();
        let mut rows = Vec::new();
        while let Some(answer) = answers.message().await? {
            for embedding in answer.embeddings {
                if context.output.is_json() {
                    output::json_line(&embedding)?;
                } else {
                    rows.push(row(rows.len() + 1, &embedding));
                }
            }
        }
        if context.output.is_json() {
            return Ok(());
        }
        output::line(table(&["text", "tokens", "values", "vector"], &[0, 1, 2], rows))
    }
}

/// A message for each batch; the first names the model.
fn messages(texts: Vec<String>, model: String, options: EmbedOptions) -> Vec<EmbedStreamRequest> {
    let mut messages: Vec<EmbedStreamRequest> = texts
        .chunks(BATCH)
        .map(|texts| EmbedStreamRequest { texts: texts.to_vec(), ..Default::default() })
        .collect();
    if messages.is_empty() {
        messages.push(EmbedStreamRequest::default());
    }
    messages[0].model = model;
    messages[0].options = Some(options);
    messages
}

fn row(number: usize, embedding: &Embedding) -> Vec<String> {
    let cut = if embedding.truncated { " (cut)" } else { "" };
    let mut shown: Vec<_> =
        embedding.values.iter().take(SHOWN).map(|v| format!("{v:+.4}")).collect();
    shown.extend((embedding.values.len() > SHOWN).then(|| "...".to_owned()));
    vec![
        number.to_string(),
        format!("{}{cut}", embedding.token_count),
        embedding.values.len().to_string(),
        shown.join(" "),
    ]
}

/// The lines of a file, or of standard input.
pub(super) async fn lines(file: Option<PathBuf>) -> Result<Vec<String>> {
    let file = file.filter(|path| path.as_os_str() != "-");
    // On a thread of its own, so that Ctrl-C is heard meanwhile.
    let text = tokio::task::spawn_blocking(move || match file {
        Some(path) => std::fs::read_to_string(&path)
            .map_err(|e| CliError::file(&format!("reading {}", path.display()), &e)),
        None => {
            let mut text = String::new();
            let read = std::io::stdin().lock().read_to_string(&mut text);
            read.map_err(|e| CliError::file("reading the texts", &e))?;
            Ok(text)
        }
    });
    let text =
        text.await.map_err(|e| CliError::failure(format!("reading the texts failed: {e}")))??;
    Ok(text.lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_the_order_and_only_the_first_names_the_model() {
        let texts: Vec<String> = (0..2 * BATCH + 1).map(|i| i.to_string()).collect();
        let all = messages(texts.clone(), "models/m".into(), EmbedOptions::default());
        assert_eq!(all.iter().map(|m| m.texts.len()).collect::<Vec<_>>(), [BATCH, BATCH, 1]);
        assert_eq!(all.iter().flat_map(|m| m.texts.clone()).collect::<Vec<_>>(), texts);
        assert!(all[0].model == "models/m" && all[0].options.is_some());
        assert!(all[1..].iter().all(|m| m.model.is_empty() && m.options.is_none()));
        // Without texts the model is still checked.
        assert_eq!(messages(Vec::new(), "models/m".into(), EmbedOptions::default()).len(), 1);
    }

    #[test]
    fn rows_show_the_start_of_a_vector() {
        let embedding = Embedding { values: vec![0.5; 5], token_count: 3, truncated: true };
        let shown = row(2, &embedding);
        assert_eq!(shown, ["2", "3 (cut)", "5", "+0.5000 +0.5000 +0.5000 +0.5000 ..."]);
    }
}
