//! The metrics: what each is called, which direction is better, how parts make its value.
//!
//! Every measurement of the program is made from a row here, so that a name always means the same
//! unit and direction. How a value was obtained is its protocol, which the evaluator writes; only values
//! of one metric and one protocol may be compared.

use crate::error::{Error, Result};
use crate::proto::v1;

/// How the samples of a measurement make its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistic {
    /// Their mean.
    Mean,
    /// The exponential of their mean.
    ExpMean,
    /// Their median.
    Median,
}

impl Statistic {
    /// The value of some samples; NaN for none.
    pub fn of(self, samples: &[f64]) -> f64 {
        let mean = || samples.iter().sum::<f64>() / samples.len() as f64;
        match self {
            Self::Mean => mean(),
            Self::ExpMean => mean().exp(),
            Self::Median => median(samples),
        }
    }
}

/// The middle value (the mean of the two middle ones); NaN for none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Mean F1 of the classes that `wanted` or `predicted` name, of so many; none where they name none.
pub fn macro_f1(predicted: &[usize], wanted: &[usize], classes: usize) -> Option<f64> {
    let (mut hits, mut members) = (vec![0u64; classes], vec![0u64; classes]);
    for (p, w) in predicted.iter().zip(wanted) {
        for class in [*p, *w] {
            // 2 TP + FP + FN: the predicted and the true members.
            if let Some(count) = members.get_mut(class) {
                *count += 1;
            }
        }
        if p == w
            && let Some(count) = hits.get_mut(*p)
        {
            *count += 1;
        }
    }
    let named = hits.iter().zip(&members).filter(|(_, members)| **members > 0);
    let scores: Vec<f64> = named.map(|(h, m)| 2.0 * *h as f64 / *m as f64).collect();
    (!scores.is_empty()).then(|| scores.iter().sum::<f64>() / scores.len() as f64)
}

/// Facts about a metric.
#[derive(Debug, PartialEq)]
pub struct Metric {
    pub name: &'static str,
    /// Unit of the value; empty for pure numbers.
    pub unit: &'static str,
    pub higher_is_better: bool,
    pub statistic: Statistic,
    /// What a sample is; empty for metrics without samples.
    pub sample_of: &'static str,
    /// Whether sample `i` of one model and sample `i` of another are of the same thing (a window, a
    /// question), so that differences are taken one by one.
    pub paired: bool,
    /// Whether it says how good the model is; the others say what that takes.
    pub quality: bool,
    /// Whether chance has no part in it: no clock, no text or set of questions drawn from many.
    pub exact: bool,
    pub about: &'static str,
}

macro_rules! metrics {
    ($($ident:ident $name:literal $unit:literal $better:ident $statistic:ident $sample:literal
       $pairing:ident $noise:ident $sort:ident $about:literal;)+) => {
        $(#[doc = $about] pub static $ident: Metric = Metric {
            name: $name,
            unit: $unit,
            higher_is_better: metrics!(@$better),
            statistic: Statistic::$statistic,
            sample_of: $sample,
            paired: metrics!(@$pairing),
            exact: metrics!(@$noise),
            quality: metrics!(@$sort),
            about: $about,
        };)+
        /// Every metric.
        pub static ALL: &[&Metric] = &[$(&$ident),+];
    };
    (@higher) => { true };
    (@lower) => { false };
    (@paired) => { true };
    (@apart) => { false };
    (@exact) => { true };
    (@noisy) => { false };
    (@quality) => { true };
    (@cost) => { false };
}

metrics! {
    PERPLEXITY "perplexity" "" lower ExpMean "nats of a window" paired noisy quality
        "exponential of the mean over windows of the mean negative log-likelihood";
    FORGETTING "forgetting" "nats" lower Mean "nats of a window" paired noisy quality
        "rise of a text's mean negative log-likelihood over the base's, by tuning";
    KL_DIVERGENCE "kl_divergence" "nats" lower Mean "nats of a window" paired noisy quality
        "mean divergence of the next-token distribution from the base's";
    TOP1_AGREEMENT "top1_agreement" "" higher Mean "share of a window" paired noisy quality
        "share of predictions whose likeliest token is the base's";
    ACCURACY "accuracy" "" higher Mean "1 for a right answer" paired noisy quality
        "share of questions answered right";
    MACRO_F1 "macro_f1" "" higher Mean "" paired noisy quality
        "mean over classes of the harmonic mean of precision and recall";
    TASK_ACCURACY "task_accuracy" "" higher Mean "1 for a right record" paired noisy quality
        "share of the records (or tags) of a task that are classified right";
    TASK_MACRO_F1 "task_macro_f1" "" higher Mean "" paired noisy quality
        "mean over the classes of a task of the harmonic mean of precision and recall";
    TASK_LOSS "task_loss" "" lower Mean "loss of a record" paired noisy quality
        "mean over the records of a task of their loss: nats, of texts and answers a token, or squared errors";
    ZERO_SHOT_ACCURACY "zero_shot_accuracy" "" higher Mean "1 for a right image" paired noisy quality
        "share of images that are nearest to the mean of the captions of their class";
    IMAGE_TO_TEXT_RECALL "image_to_text_recall" "" higher Mean "1 for a right image" paired noisy quality
        "share of images whose nearest caption is of their class";
    TEXT_TO_IMAGE_RECALL "text_to_image_recall" "" higher Mean "1 for a right caption" paired noisy quality
        "share of captions, each among a hundred images, whose nearest image is of their class";
    DISK_BYTES "disk_bytes" "bytes" lower Mean "" paired exact cost "size of all files";
    WEIGHT_BYTES "weight_bytes" "bytes" lower Mean "" paired exact cost "size of all weights as stored";
    RESIDENT_BYTES "resident_bytes" "bytes" lower Mean "" paired exact cost
        "weights, and keys and values of one sequence";
    PARAMETERS "parameters" "" lower Mean "" paired exact cost "number of elements of all weights";
    NONZERO_PARAMETERS "nonzero_parameters" "" lower Mean "" paired exact cost
        "number of elements of all weights that are not zero";
    BITMAP_BYTES "bitmap_bytes" "bytes" lower Mean "" paired exact cost
        "elements that are not zero, and one bit an element of the matrices that have zeros";
    CSR_BYTES "csr_bytes" "bytes" lower Mean "" paired exact cost
        "elements that are not zero with an index each, for matrices that have zeros";
    ZERO_SHARE "zero_share" "" higher Mean "" paired exact cost "share of zeros among the pruned weights";
    MULTIPLY_ACCUMULATES "multiply_accumulates" "" lower Mean "" paired exact cost
        "products of the weights that a layout stores, for one token";
    BYTES_PER_TOKEN "bytes_per_token" "bytes" lower Mean "" paired exact cost
        "weights read for one token";
    PREFILL_RATE "prefill_tokens_per_second" "tokens/s" higher Median "tokens/s of a repetition" apart noisy cost
        "speed of reading a prompt";
    DECODE_RATE "decode_tokens_per_second" "tokens/s" higher Median "tokens/s of a repetition" apart noisy cost
        "speed of writing token after token";
    IMAGE_RATE "images_per_second" "images/s" higher Median "images/s of a repetition" apart noisy cost
        "speed of classifying images";
    PRODUCT_1 "products_1_token_ms" "ms" lower Median "ms of a repetition" apart noisy cost
        "time of the products of all linear weights inside the blocks with one token";
    PRODUCT_512 "products_512_tokens_ms" "ms" lower Median "ms of a repetition" apart noisy cost
        "time of the products of all linear weights inside the blocks with 512 tokens";
    TRAINABLE_PARAMETERS "trainable_parameters" "" lower Mean "" paired exact cost
        "numbers that a tuning trains, without those of a new head";
    KEPT_PARAMETERS "kept_parameters" "" lower Mean "" paired noisy cost
        "trained numbers that an adapter has after its empty ranks are cut, without those of a new head";
    ADAPTER_BYTES "adapter_bytes" "bytes" lower Mean "" paired noisy cost
        "size of the files that an adapter needs beside its base";
    KEPT_RANKS "kept_ranks" "" lower Mean "" paired noisy cost
        "mean rank of an adapter's linears after empty ranks are cut";
    KEPT_RANKS_DEVIATION "kept_ranks_deviation" "" higher Mean "" paired noisy cost
        "standard deviation over an adapter's linears of the ranks that are kept";
    TRAIN_LOSS "train_loss" "" lower Mean "" paired noisy cost
        "mean loss over the last tenth of the updates of a training";
    TRAIN_SECONDS "train_seconds" "s" lower Mean "" apart noisy cost
        "time of a training, the start of its method included";
    STEP_MILLISECONDS "step_milliseconds" "ms" lower Mean "" apart noisy cost
        "median time of an update of a training";
    TRAIN_PEAK_MEMORY_BYTES "train_peak_memory_bytes" "bytes" lower Mean "" apart noisy cost
        "largest resident memory of the process during a training";
    MAKE_SECONDS "make_seconds" "s" lower Mean "" apart noisy cost "time that the steps took";
    PEAK_MEMORY_BYTES "peak_memory_bytes" "bytes" lower Mean "" apart noisy cost
        "largest resident memory of the process during the steps";
    EXPECTED_ERROR_LEFT "expected_error_left" "" lower Mean "" apart noisy cost
        "expected output errors of the rows after an exchange of weights over those before";
    REFINING_SHARE "refining_share_of_pass" "" lower Mean "" apart noisy cost
        "time of an exchange of weights over that of one pass of the calibration text";
    SCORING_MEMORY_BYTES "scoring_memory_bytes" "bytes" lower Mean "" apart noisy cost
        "largest memory held beside what was there before, while blocks were scored";
    SCORING_MEMORY_SHARE "scoring_memory_share" "" lower Mean "" apart noisy cost
        "memory that scoring by differences of the loss held over what scoring by gradients held";
    KEPT_WEIGHT_SHARE "kept_weight_share" "" higher Mean "" apart noisy cost
        "share of the sum of the absolute weights of pruned matrices that stays";
    SCORE_RANK_CORRELATION "score_rank_correlation" "" higher Mean "" apart noisy cost
        "Spearman's correlation of the zeroth-order scores of the groups with the first-order ones";
}

/// The metric called `name`; the error lists those that exist.
pub fn metric(name: &str) -> Result<&'static Metric> {
    ALL.iter().copied().find(|m| m.name == name).ok_or_else(|| {
        let names: Vec<_> = ALL.iter().map(|m| m.name).collect();
        Error::field(
            "metric",
            format!("'{}' is no metric; the metrics are {}", name.escape_debug(), names.join(", ")),
        )
    })
}

impl Metric {
    /// A measurement without samples.
    pub fn measured(&self, value: f64, protocol: impl Into<String>) -> v1::Measurement {
        v1::Measurement {
            metric: self.name.into(),
            value,
            unit: self.unit.into(),
            higher_is_better: self.higher_is_better,
            protocol: protocol.into(),
            samples: Vec::new(),
            sample_of: String::new(),
        }
    }

    /// A measurement whose value its samples make.
    pub fn sampled(&self, samples: Vec<f64>, protocol: impl Into<String>) -> v1::Measurement {
        v1::Measurement {
            sample_of: self.sample_of.into(),
            ..v1::Measurement {
                samples: samples.clone(),
                ..self.measured(self.statistic.of(&samples), protocol)
            }
        }
    }

    /// Whether values are shares of a whole, which people read in percent.
    pub fn is_share(&self) -> bool {
        self.unit.is_empty()
            && (self.name.ends_with("_share")
                || self.name.ends_with("_agreement")
                || self.name.ends_with("accuracy")
                || self.name.ends_with("_recall")
                || self.name.ends_with("macro_f1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        let mut names: Vec<_> = ALL.iter().map(|m| m.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        assert_eq!(metric("perplexity").expect("known"), &PERPLEXITY);
        let error = metric("perplexty").unwrap_err();
        assert!(error.message().contains("decode_tokens_per_second"), "{error}");
    }

    #[test]
    fn samples_make_values() {
        assert_eq!(Statistic::Mean.of(&[1.0, 2.0, 6.0]), 3.0);
        assert_eq!(Statistic::ExpMean.of(&[0.0, 2.0]), 1f64.exp());
        assert_eq!(Statistic::Median.of(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(Statistic::Median.of(&[9.0, 1.0, 2.0, 4.0]), 3.0);
        assert!(Statistic::Median.of(&[]).is_nan());
        let found = PERPLEXITY.sampled(vec![1.0, 3.0], "p");
        assert_eq!((found.value, found.samples.len()), (2f64.exp(), 2));
        assert_eq!(found.sample_of, "nats of a window");
    }
}
