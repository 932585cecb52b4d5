//! `planish bench attention-gradient` and `planish bench attention-training`.

use serde::Serialize;

use super::super::error::{CliError, Result};
use super::super::output::{Output, facts, significant, table};
use super::{Common, print, spread};
use crate::bench::attention::{self, Crossing, Row, Settings, Trained, Training};

#[derive(Debug, clap::Args)]
pub struct GradientArgs {
    /// Numbers of tokens
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "512,2048,8192")]
    length: Vec<usize>,
    /// Largest entries of queries and keys
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0.5,1,1.5,2,2.5,3")]
    gamma: Vec<f64>,
    /// Channels of a head
    #[arg(long, value_name = "N", default_value_t = 4)]
    dim: usize,
    /// Heads, which threads share
    #[arg(long, value_name = "N", default_value_t = 4)]
    heads: usize,
    /// Positions see only what came before
    #[arg(long)]
    causal: bool,
    /// Largest relative error of a gradient
    #[arg(long, value_name = "SHARE", default_value_t = 1e-3)]
    eps: f64,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
pub struct TrainingArgs {
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 4096)]
    length: usize,
    /// Updates of a run
    #[arg(long, value_name = "N", default_value_t = 60)]
    steps: usize,
    /// Channels of a head
    #[arg(long, value_name = "N", default_value_t = 4)]
    dim: usize,
    /// Heads of a layer
    #[arg(long, value_name = "N", default_value_t = 8)]
    heads: usize,
    /// Layers
    #[arg(long, value_name = "N", default_value_t = 2)]
    layers: usize,
    /// Root mean square of queries and keys
    #[arg(long, value_name = "SIZE", default_value_t = 0.5)]
    size: f64,
    /// Rank of the adapters
    #[arg(long, value_name = "N", default_value_t = 8)]
    rank: usize,
    /// Learning rate
    #[arg(long, value_name = "RATE", default_value_t = 5e-3)]
    rate: f64,
    /// Largest error of a query's weights
    #[arg(long, value_name = "SHARE", default_value_t = 1e-3)]
    eps: f64,
    /// Seeds, one run of each arm for every seed
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,2,3")]
    seeds: Vec<u64>,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Found {
    settings: Settings,
    rows: Vec<Row>,
    crossings: Vec<Crossing>,
}

impl GradientArgs {
    pub(super) fn run(self, form: Output) -> Result<()> {
        self.common.apply()?;
        let settings = Settings {
            lengths: self.length,
            gammas: self.gamma,
            dim: self.dim,
            heads: self.heads,
            causal: self.causal,
            eps: self.eps,
            repetitions: self.common.repetitions.into(),
        };
        let rows = attention::measure(&settings, |_| Ok::<_, CliError>(()))?;
        let found = Found { crossings: attention::crossings(&rows), settings, rows };
        print(form, "attention-gradient", None, None, found, gradient_text)
    }
}

fn gradient_text(found: &Found) -> String {
    let rows = found.rows.iter().map(|row| {
        let mut cells = vec![
            row.length.to_string(),
            significant(row.gamma),
            significant(row.gamma / row.threshold),
            spread(&row.exact_milliseconds),
        ];
        cells.extend(match &row.factored {
            None => {
                let mut none = vec![String::new(); 5];
                "none near enough".clone_into(&mut none[0]);
                none
            }
            Some(factored) => vec![
                format!("{} ({})", factored.degree, factored.features),
                format!("{:.1e}", factored.error),
                spread(&factored.milliseconds),
                spread(&factored.speedup),
                spread(&factored.speedup_with_forward),
            ],
        });
        cells
    });
    let header = [
        "tokens",
        "entries up to",
        "of threshold",
        "exact ms",
        "degree (features)",
        "error",
        "factored ms",
        "speed-up",
        "with forward",
    ];
    let mut text = table(&header, &[0, 1, 2, 3, 4, 5, 6, 7, 8], rows.collect());
    for crossing in &found.crossings {
        let at = crossing.gamma.map_or_else(
            || "does not cross 1 within these sizes".to_owned(),
            |gamma| {
                let share = significant(gamma / crossing.threshold);
                format!("crosses 1 at entries of {}, {share} of the threshold", significant(gamma))
            },
        );
        text.push_str(&format!("\n{} tokens: the speed-up {at}", crossing.length));
    }
    text
}

impl TrainingArgs {
    pub(super) fn run(self, form: Output) -> Result<()> {
        self.common.apply()?;
        let found = attention::train(Training {
            length: self.length,
            steps: self.steps,
            dim: self.dim,
            heads: self.heads,
            layers: self.layers,
            size: self.size,
            rank: self.rank,
            rate: self.rate,
            eps: self.eps,
            seeds: self.seeds,
        })?;
        print(form, "attention-training", None, None, found, training_text)
    }
}

fn training_text(found: &Trained) -> String {
    let rows = found.pairs.iter().flat_map(|pair| {
        [("exact", &pair.exact), ("factored", &pair.factored)].map(|(name, arm)| {
            vec![
                pair.seed.to_string(),
                name.to_owned(),
                format!("{:.4}", arm.first_loss),
                format!("{:.4}", arm.last_loss),
                significant(arm.seconds_per_step * 1e3),
                significant(arm.attention_forward * 1e3),
                significant(arm.attention_backward * 1e3),
                format!("{}%", significant(arm.factored_share * 100.0)),
            ]
        })
    });
    let header = [
        "seed",
        "attention",
        "first loss",
        "last loss",
        "step ms",
        "forward ms",
        "backward ms",
        "heads factored",
    ];
    let facts = facts(&[
        ("backward of attention, times faster", spread(&found.backward_speedup)),
        ("step, times faster", spread(&found.step_speedup)),
        ("relative difference of the losses", spread(&found.loss_difference)),
    ]);
    format!("{}\n\n{facts}", table(&header, &[2, 3, 4, 5, 6, 7], rows.collect()))
}
