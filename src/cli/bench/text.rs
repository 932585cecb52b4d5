//! Measurements as people read them.

use super::super::output::{facts, significant, size, table};
use crate::bench::embed::Embed;
use crate::bench::kernels::{Bound, Row};
use crate::bench::limits::{Bandwidth, Limits, Rate};
use crate::bench::model::{Decode, Prefill, Run};
use crate::bench::stats::Spread;
use crate::bench::train::Train;

/// `115 (110 to 119)`
pub(super) fn spread(values: &Spread) -> String {
    format!(
        "{} ({} to {})",
        significant(values.median),
        significant(values.min),
        significant(values.max)
    )
}

pub(super) fn percent(share: f64) -> String {
    format!("{}%", significant(share * 100.0))
}

pub(super) fn bytes(count: u64) -> String {
    size(i64::try_from(count).unwrap_or(i64::MAX))
}

pub(super) fn limits_text(limits: &Limits) -> String {
    let read = |bandwidth: &Bandwidth| {
        let speed = spread(&bandwidth.gigabytes_per_second);
        format!("{speed} GB/s, {} at a time", bytes(bandwidth.buffer_bytes))
    };
    let peak = |rate: &Rate| {
        format!("{} GOP/s, {}", spread(&rate.gigaoperations_per_second), rate.instruction)
    };
    facts(&[
        ("last-level cache", limits.cache_bytes.map(bytes).unwrap_or_default()),
        ("reading memory", read(&limits.memory)),
        ("reading again", read(&limits.reread)),
        ("integer peak", peak(&limits.integer)),
        ("f32 peak", peak(&limits.single)),
        ("bf16 peak", limits.bf16.as_ref().map(peak).unwrap_or_default()),
        ("integer peak of tiles", limits.tiles.as_ref().map(peak).unwrap_or_default()),
    ])
}

pub(super) fn decode_text(found: &Decode) -> String {
    let share = found.share.map(|share| {
        let (memory, again) = (percent(share.of_memory), percent(share.of_reread));
        format!("{memory} of reading memory, {again} of reading again")
    });
    facts(&[
        ("decode", protocol(&found.run)),
        ("tokens/s", spread(&found.tokens_per_second)),
        ("ms a step", spread(&found.milliseconds_per_step)),
        ("weights a token", bytes(found.weight_bytes)),
        ("keys and values a token", bytes(found.cache_bytes)),
        ("GB/s of weights", spread(&found.gigabytes_per_second)),
        ("share", share.unwrap_or_default()),
    ])
}

pub(super) fn prefill_text(found: &Prefill) -> String {
    let share = found.share.map(|share| {
        let (integer, single) = (percent(share.of_integer), percent(share.of_single));
        format!("{integer} of the integer peak, {single} of the f32 peak")
    });
    let operations = |count: u64| format!("{} GOP", significant(count as f64 / 1e9));
    facts(&[
        ("prefill", protocol(&found.run)),
        ("tokens/s", spread(&found.tokens_per_second)),
        ("ms", spread(&found.milliseconds)),
        ("linear layers", operations(found.linear_operations)),
        ("attention", operations(found.attention_operations)),
        ("GOP/s of linear layers", spread(&found.gigaoperations_per_second)),
        ("share", share.unwrap_or_default()),
    ])
}

fn protocol(run: &Run) -> String {
    format!(
        "{} tokens after {}, median of {} (smallest to largest)",
        run.tokens, run.prompt_tokens, run.repetitions
    )
}

pub(super) fn batch_text(rows: &[Decode]) -> String {
    let header =
        ["sequences", "tokens/s", "ms a step", "GB/s of weights", "of memory", "of reread"];
    let cells = rows
        .iter()
        .map(|row| {
            vec![
                row.sequences.to_string(),
                spread(&row.tokens_per_second),
                spread(&row.milliseconds_per_step),
                significant(row.gigabytes_per_second.median),
                row.share.map(|s| percent(s.of_memory)).unwrap_or_default(),
                row.share.map(|s| percent(s.of_reread)).unwrap_or_default(),
            ]
        })
        .collect();
    let protocol = rows.first().map(|row| protocol(&row.run)).unwrap_or_default();
    format!("{protocol}\n{}", table(&header, &[0, 1, 2, 3, 4, 5], cells))
}

pub(super) fn kernels_text(rows: &[Row]) -> String {
    let header = ["layout", "shape", "tokens", "bytes", "us", "GB/s", "GOP/s", "of limit", "limit"];
    let cells = rows
        .iter()
        .map(|row| {
            vec![
                row.layout.clone(),
                format!("{}x{}", row.shape[0], row.shape[1]),
                row.tokens.to_string(),
                bytes(row.bytes),
                spread(&row.microseconds),
                significant(row.gigabytes_per_second.median),
                significant(row.gigaoperations_per_second.median),
                row.share.map(|s| percent(s.reached)).unwrap_or_default(),
                row.share
                    .map(|s| match s.limit {
                        Bound::Reading => "reading",
                        Bound::Computing => "computing",
                    })
                    .unwrap_or_default()
                    .to_owned(),
            ]
        })
        .collect();
    table(&header, &[2, 3, 4, 5, 6, 7], cells)
}

pub(super) fn embed_text(found: &Embed) -> String {
    facts(&[
        ("sentences/s", spread(&found.sentences_per_second)),
        ("milliseconds a batch", spread(&found.milliseconds)),
        ("weights", bytes(found.weight_bytes)),
        ("least cosine to f32", format!("{:.6}", found.least_cosine)),
    ])
}

pub(super) fn train_text(found: &Train) -> String {
    facts(&[
        ("seconds a step", spread(&found.seconds_per_step)),
        ("tokens/s", spread(&found.tokens_per_second)),
        ("trained elements", found.trained.to_string()),
        ("loss", format!("{:.4}, then {:.4}", found.first_loss, found.last_loss)),
        ("peak memory", bytes(found.peak_bytes)),
        ("activations", bytes(found.activation_bytes)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::plan::CacheFormat;

    #[test]
    fn texts_show_the_median_and_its_spread() {
        let values = Spread::of(vec![3.0, 1.0, 2.0]);
        assert_eq!(spread(&values), "2.00 (1.00 to 3.00)");
        assert_eq!(percent(0.4567), "45.7%");
        let run = Run { prompt_tokens: 32, tokens: 128, repetitions: 3, cache: CacheFormat::F32 };
        let found = Decode {
            run,
            sequences: 1,
            tokens_per_second: values.clone(),
            milliseconds_per_step: values.clone(),
            weight_bytes: 85_000_000,
            cache_bytes: 1000,
            gigabytes_per_second: values,
            share: None,
        };
        let text = decode_text(&found);
        assert!(text.contains("128 tokens after 32, median of 3"), "{text}");
        assert!(text.contains("85.0 MB") && !text.contains("share"), "{text}");
    }
}
