//! Sizes of queries and keys as people read them.

use super::output::{significant, table};
use crate::proto::v1::{HeadNorms, NormReport, NormVerdict};

/// A table of the heads and what follows from them.
pub fn text(report: &NormReport) -> String {
    let rows = report
        .heads
        .iter()
        .map(|head| {
            let base =
                report.base_heads.iter().find(|b| (b.layer, b.head) == (head.layer, head.head));
            row(head, base)
        })
        .collect();
    let mut header = vec![
        "layer",
        "head",
        "gamma",
        "of threshold",
        "largest score",
        "99.9%",
        "effective rank",
        "features",
        "verdict",
    ];
    if !report.base_heads.is_empty() {
        header.push("gamma without adapter");
    }
    let right: Vec<usize> = (0..header.len()).filter(|i| *i != 8).collect();
    let mut text = table(&header, &right, rows);
    text.push_str(&format!(
        "\n\n{} sequences of {} tokens of {}: threshold {}, {}% of the heads below it\n{}",
        report.sequences,
        report.tokens,
        report.dataset,
        significant(report.threshold),
        significant(report.share_below_threshold * 100.0),
        report.hint
    ));
    for warning in &report.warnings {
        text.push_str(&format!("\nwarning: {warning}"));
    }
    text
}

fn row(head: &HeadNorms, base: Option<&HeadNorms>) -> Vec<String> {
    let gamma = |head: &HeadNorms| significant(head.partial_gamma);
    let mut row = vec![
        head.layer.to_string(),
        head.head.to_string(),
        gamma(head),
        significant(head.margin),
        significant(head.largest_score),
        significant(head.usual_score),
        significant(head.effective_rank),
        head.features.map(|features| features.to_string()).unwrap_or_default(),
        match head.verdict() {
            NormVerdict::Fast => "fast",
            NormVerdict::Border => "border",
            NormVerdict::Quadratic => "quadratic",
            NormVerdict::NotApplicable => "not applicable",
            NormVerdict::Unspecified => "",
        }
        .to_owned(),
    ];
    row.extend(base.map(gamma));
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_stand_in_rows_with_what_an_adapter_changed() {
        let head = HeadNorms {
            layer: 2,
            head: 1,
            partial_gamma: 1.25,
            margin: 0.5,
            features: Some(35),
            verdict: NormVerdict::Border.into(),
            ..Default::default()
        };
        let mut report = NormReport {
            dataset: "datasets/d".into(),
            heads: vec![head.clone()],
            hint: "take exact gradients".into(),
            warnings: vec!["careful".into()],
            ..Default::default()
        };
        let plain = text(&report);
        assert!(plain.contains("border") && plain.contains("35") && plain.contains("1.25"));
        assert!(plain.contains("warning: careful") && !plain.contains("without adapter"));
        report.base_heads = vec![HeadNorms { partial_gamma: 0.75, ..head }];
        let both = text(&report);
        assert!(both.contains("without adapter") && both.contains("0.75"), "{both}");
    }
}
