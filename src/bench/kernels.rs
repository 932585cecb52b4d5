//! Products alone: every layout at the shapes of a model, for few and for many tokens.

use std::time::Instant;

use rand::Rng;
use serde::Serialize;

use super::layouts::Layout;
use super::limits::Limits;
use super::stats::Spread;
use crate::error::{Error, Result};
use crate::eval::counts::stored;
use crate::kernels::packed::{self, Job, Packed};
use crate::kernels::quantize::Activations;
use crate::models::decoder::plan::Arithmetic;
use crate::nn::weight::{Part, Weight};
use crate::seed::Stream;

/// The linear layers of SmolLM2-135M, `[out, in]`: query and output, key and value, gate and up, down, head.
pub const SHAPES: [[usize; 2]; 5] =
    [[576, 576], [192, 576], [1536, 576], [576, 1536], [49152, 576]];
pub const TOKENS: [usize; 4] = [1, 8, 64, 512];

/// Bytes of copies of a weight that are multiplied in turn: a model's weights do not stay in the caches
/// next to a core from one step to the next, so those of the measurement must not either.
pub const WORKING_SET: u64 = 64 << 20;
/// Seconds of a repetition at least.
const LEAST_SECONDS: f64 = 0.02;
/// Most weights of a product, most tokens, and most inputs or outputs.
const MOST_ELEMENTS: usize = 1 << 30;
const MOST_TOKENS: usize = 1 << 14;
const MOST_ACTIVATIONS: usize = 1 << 28;

/// What is timed.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Layouts whose name contains this; empty for all.
    pub layout: String,
    pub shapes: Vec<[usize; 2]>,
    pub tokens: Vec<usize>,
    pub repetitions: usize,
    pub arithmetic: Arithmetic,
}

/// One layout, shape and number of tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub layout: String,
    /// Outputs and inputs; inputs are rounded up to whole blocks.
    pub shape: [usize; 2],
    pub tokens: usize,
    /// Bytes of the weight.
    pub bytes: u64,
    pub microseconds: Spread,
    /// Of the weight's bytes.
    pub gigabytes_per_second: Spread,
    /// A product and a sum are two; zeros that the layout leaves out do not count.
    pub gigaoperations_per_second: Spread,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<Share>,
}

/// How near the limit that binds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Share {
    pub limit: Bound,
    /// The time that the limit allows over the median time.
    pub reached: f64,
}

/// What takes the most time at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Reading the weight.
    Reading,
    /// The peak of integer products.
    Computing,
}

impl Settings {
    fn check(&self) -> Result<()> {
        let elements = |[rows, cols]: [usize; 2]| rows.saturating_mul(cols);
        if let Some(shape) =
            self.shapes.iter().find(|s| !(1..=MOST_ELEMENTS).contains(&elements(**s)))
        {
            let message = format!("{shape:?} has no elements or more than {MOST_ELEMENTS}");
            return Err(Error::field("shape", message));
        }
        if let Some(tokens) = self.tokens.iter().find(|t| !(1..=MOST_TOKENS).contains(*t)) {
            let message = format!("{tokens} is not between 1 and {MOST_TOKENS}");
            return Err(Error::field("tokens", message));
        }
        let widest = self.shapes.iter().flatten().max().copied().unwrap_or(0);
        let most = self.tokens.iter().max().copied().unwrap_or(0);
        if widest.saturating_mul(most) > MOST_ACTIVATIONS {
            let message = format!("{most} tokens of {widest} channels are too many; take fewer");
            return Err(Error::field("tokens", message));
        }
        if self.repetitions == 0 {
            return Err(Error::field("repetitions", "at least one is needed"));
        }
        Ok(())
    }
}

/// Measures every combination and gives each to `report` as it comes.
///
/// # Errors
/// `INVALID_FIELD` for settings that measure nothing; what `report` fails with.
pub fn measure<E: From<Error>>(
    settings: &Settings,
    limits: Option<&Limits>,
    mut report: impl FnMut(Row) -> Result<(), E>,
) -> Result<(), E> {
    settings.check()?;
    let layouts: Vec<_> = Layout::all()
        .into_iter()
        .filter(|(name, _)| name.contains(settings.layout.as_str()))
        .collect();
    if layouts.is_empty() {
        let names: Vec<_> = Layout::all().into_iter().map(|(name, _)| name).collect();
        let message =
            format!("no layout is called {}; these are: {}", settings.layout, names.join(", "));
        return Err(Error::field("layout", message).into());
    }
    let widest = settings.shapes.iter().map(|s| s[1]).max().unwrap_or(0).next_multiple_of(256);
    let tallest = settings.shapes.iter().map(|s| s[0]).max().unwrap_or(0);
    let most = settings.tokens.iter().max().copied().unwrap_or(0);
    let stream = Stream::root(0);
    let mut rng = stream.child("inputs").rng();
    let inputs: Vec<f32> = (0..most * widest).map(|_| rng.random::<f32>() - 0.5).collect();
    let mut outputs = vec![0.0; most * tallest];
    for shape in &settings.shapes {
        for (name, layout) in &layouts {
            let weight = layout.build(*shape, &stream.child(name))?;
            let copies = copies(&weight)?;
            let operands: Vec<_> =
                copies.iter().map(|w| Operand::new(w, settings.arithmetic)).collect();
            for &tokens in &settings.tokens {
                let x = &inputs[..tokens * weight.cols()];
                let y = &mut outputs[..tokens * weight.rows()];
                let seconds = time(&operands, x, y, settings.repetitions);
                report(row(name, &weight, tokens, seconds, limits))?;
            }
        }
    }
    Ok(())
}

/// A weight as the timed product takes it.
enum Operand<'a> {
    Plain(&'a Weight),
    Faster(Weight),
    Packed(Packed),
}

impl<'a> Operand<'a> {
    fn new(weight: &'a Weight, arithmetic: Arithmetic) -> Self {
        if arithmetic == Arithmetic::Exact {
            return Self::Plain(weight);
        }
        match weight.packed() {
            Some(packed) => Self::Packed(packed),
            None => weight.faster().map_or(Self::Plain(weight), Self::Faster),
        }
    }

    /// The product that is timed, rounding of the activations included.
    fn multiply(&self, x: &[f32], rounded: &mut Activations, y: &mut [f32]) {
        match self {
            Self::Plain(weight) => weight.multiply(x, y),
            Self::Faster(weight) => weight.multiply(x, y),
            Self::Packed(weight) => {
                rounded.set(x, weight.cols(), weight.grain());
                packed::multiply(rounded, &mut [Some(Job { weight, y })]);
            }
        }
    }
}

/// As many weights of the same content as fill the working set, each with memory of its own.
fn copies(weight: &Weight) -> Result<Vec<Weight>> {
    let count = WORKING_SET.div_ceil(weight.bytes().max(1)).max(1);
    let record = weight.record();
    (0..count)
        .map(|_| {
            let parts = weight.parts().into_iter().map(|part| {
                let data = part.data.to_vec().into();
                (part.suffix.to_owned(), Part { data, ..part })
            });
            Weight::from_parts(&record, parts.collect())
        })
        .collect()
}

/// Seconds of a product, one value a repetition.
fn time(copies: &[Operand<'_>], x: &[f32], y: &mut [f32], repetitions: usize) -> Spread {
    let mut turn = copies.iter().cycle();
    let mut rounded = Activations::default();
    let mut run = |count: usize| {
        let start = Instant::now();
        for weight in turn.by_ref().take(count) {
            weight.multiply(x, &mut rounded, y);
        }
        start.elapsed().as_secs_f64().max(1e-9)
    };
    let mut count = 1;
    while run(count) < LEAST_SECONDS {
        count *= 2;
    }
    Spread::of((0..repetitions).map(|_| run(count) / count as f64).collect())
}

fn row(
    layout: &str,
    weight: &Weight,
    tokens: usize,
    seconds: Spread,
    limits: Option<&Limits>,
) -> Row {
    let bytes = weight.bytes();
    let operations = 2 * stored(weight) * tokens as u64;
    let share = limits.map(|limits| {
        let (reading, computing) = (limits.reading(bytes), limits.computing(operations));
        let limit = if reading > computing { Bound::Reading } else { Bound::Computing };
        Share { limit, reached: reading.max(computing) / seconds.median }
    });
    Row {
        layout: layout.to_owned(),
        shape: [weight.rows(), weight.cols()],
        tokens,
        bytes,
        gigabytes_per_second: seconds.rate(bytes as f64 / 1e9),
        gigaoperations_per_second: seconds.rate(operations as f64 / 1e9),
        microseconds: seconds.times(1e6),
        share,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(layout: &str) -> Settings {
        Settings {
            layout: layout.to_owned(),
            shapes: vec![[4096, 4096]],
            tokens: vec![1, 2],
            repetitions: 3,
            arithmetic: Arithmetic::Integer,
        }
    }

    #[test]
    fn rows_count_bytes_and_operations_by_hand() {
        let mut rows = Vec::new();
        measure(&settings("dense-f32"), None, |row| {
            rows.push(row);
            Ok::<_, Error>(())
        })
        .expect("rows");
        assert_eq!(rows.iter().map(|r| r.tokens).collect::<Vec<_>>(), [1, 2]);
        for row in &rows {
            assert_eq!((row.shape, row.bytes), ([4096, 4096], 4 * 4096 * 4096));
            let seconds = row.microseconds.median / 1e6;
            let operations = 2.0 * 4096.0 * 4096.0 * row.tokens as f64;
            let rate = operations / seconds / 1e9;
            assert!((row.gigaoperations_per_second.median / rate - 1.0).abs() < 1e-9);
            assert_eq!(row.microseconds.values.len(), 3);
        }
        // Half of the products of a 2:4 weight are not there.
        let sparse = Layout::NOfM { keep: 2, of: 4, values: crate::nn::weight::ValueFormat::F16 };
        let weight = sparse.build([8, 64], &Stream::root(0)).expect("a weight");
        let found = row("x", &weight, 3, Spread::of(vec![1.0]), None);
        assert_eq!(found.gigaoperations_per_second.median, 2.0 * 256.0 * 3.0 / 1e9);
    }

    #[test]
    fn copies_fill_the_working_set_with_the_same_content() {
        let weight = Layout::Dense(crate::nn::dtype::Dtype::F32)
            .build([1024, 4096], &Stream::root(0))
            .expect("a weight");
        let copies = copies(&weight).expect("copies");
        assert_eq!(copies.len(), 4);
        assert_eq!(copies[3].to_f32(), weight.to_f32());
        let place = |w: &Weight| w.parts()[0].data.as_ptr();
        assert_ne!(place(&copies[0]), place(&copies[1]));
    }

    #[test]
    fn settings_that_measure_nothing_are_refused() {
        let refused = |change: fn(&mut Settings)| {
            let mut settings = settings("");
            change(&mut settings);
            measure(&settings, None, |_| Ok::<_, Error>(())).is_err()
        };
        assert!(refused(|s| s.shapes = vec![[0, 4]]));
        assert!(refused(|s| s.shapes = vec![[usize::MAX, 2]]));
        assert!(refused(|s| s.tokens = vec![0]));
        assert!(refused(|s| s.tokens = vec![1 << 20]));
        assert!(refused(|s| s.repetitions = 0));
        assert!(refused(|s| s.layout = "no such".to_owned()));
    }
}
