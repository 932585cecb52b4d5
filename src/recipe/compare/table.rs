//! Reports as tables: for a terminal, in Markdown, as CSV.

use super::report::cell;
use crate::error::{Error, Result};
use crate::eval::format;
use crate::proto::v1;

/// A table for a terminal, columns aligned, the protocols below.
pub fn text(report: &v1::ComparisonReport) -> String {
    let table = Table::new(report);
    let widths: Vec<usize> = (0..table.header.len())
        .map(|c| table.rows().map(|row| row[c].chars().count()).max().unwrap_or_default())
        .collect();
    let line = |row: &Vec<String>| {
        let mut line = String::new();
        for (c, (text, width)) in row.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(width - text.chars().count());
            // Names to the left, numbers to the right.
            let (left, right) = if c == 0 { ("", pad.as_str()) } else { (pad.as_str(), "") };
            line += &format!("{left}{text}{right}  ");
        }
        line.trim_end().to_owned() + "\n"
    };
    let mut out = line(&table.header);
    let width = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
    out += &format!("{}\n", "─".repeat(width));
    for row in &table.body {
        out += &line(row);
    }
    for note in table.notes {
        out += &format!("{note}\n");
    }
    out
}

/// A table in Markdown, the protocols below.
pub fn markdown(report: &v1::ComparisonReport) -> String {
    let table = Table::new(report);
    let line = |row: &Vec<String>| {
        let cells: Vec<_> = row.iter().map(|text| text.replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let mut out = line(&table.header);
    out += &format!("|---{}|\n", "|---:".repeat(table.header.len() - 1));
    for row in &table.body {
        out += &line(row);
    }
    if !table.notes.is_empty() {
        out += "\n";
    }
    for note in table.notes {
        out += &format!("- {note}\n");
    }
    out
}

/// One line a run and measurement: arm, seed, digest, metric, value, unit, direction, protocol.
pub fn csv(report: &v1::ComparisonReport) -> Result<String> {
    let mut out = csv::Writer::from_writer(Vec::new());
    let header =
        ["arm", "seed", "digest", "metric", "value", "unit", "higher_is_better", "protocol"];
    out.write_record(header).map_err(unwritten)?;
    for arm in &report.arms {
        for run in &arm.runs {
            for m in &run.measurements {
                out.write_record([
                    arm.name.as_str(),
                    &run.seed.map(|seed| seed.to_string()).unwrap_or_default(),
                    &run.digest,
                    &m.metric,
                    &m.value.to_string(),
                    &m.unit,
                    &m.higher_is_better.to_string(),
                    &m.protocol,
                ])
                .map_err(unwritten)?;
            }
        }
    }
    let bytes = out.into_inner().map_err(|e| unwritten(e.into_error().into()))?;
    String::from_utf8(bytes).map_err(|e| Error::internal("the table is no text").with_source(e))
}

fn unwritten(error: csv::Error) -> Error {
    Error::internal(format!("the table was not written: {error}")).with_source(error)
}

struct Table {
    header: Vec<String>,
    body: Vec<Vec<String>>,
    /// How the columns were measured, and what the signs mean.
    notes: Vec<String>,
}

impl Table {
    fn new(report: &v1::ComparisonReport) -> Self {
        let asked = report.comparison.as_ref().map(|c| c.metrics.as_slice()).unwrap_or_default();
        let all = 0..report.columns.len();
        let shown: Vec<usize> = if asked.is_empty() {
            all.collect()
        } else {
            let of = |metric: &String| {
                let metric = metric.clone();
                all.clone().filter(move |c| report.columns[*c].metric == metric)
            };
            asked.iter().flat_map(of).collect()
        };
        // Columns with the same protocol share a number.
        let mut protocols: Vec<&str> = Vec::new();
        let mut header = vec!["arm".to_owned()];
        for c in &shown {
            let column = &report.columns[*c];
            let known = protocols.iter().position(|p| *p == column.protocol);
            let number = known.unwrap_or_else(|| {
                protocols.push(&column.protocol);
                protocols.len() - 1
            });
            header.push(format!("{} [{}]", column.metric.replace('_', " "), number + 1));
        }
        let body = report.arms.iter().map(|arm| row(report, arm, &shown)).collect();
        let mut notes: Vec<String> =
            protocols.iter().enumerate().map(|(i, p)| format!("[{}] {p}", i + 1)).collect();
        if report.arms.iter().any(|arm| arm.on_front) {
            notes.push("* no other arm is both better and smaller".to_owned());
        }
        if report.arms.iter().flat_map(|arm| &arm.cells).any(|cell| cell.deviation.is_some()) {
            notes.push("± standard deviation over seeds".to_owned());
        }
        if !report.complete {
            notes.push("unfinished: arms without numbers have not run".to_owned());
        }
        notes.extend(report.contrasts.iter().filter_map(contrast));
        Self { header, body, notes }
    }

    fn rows(&self) -> impl Iterator<Item = &Vec<String>> {
        std::iter::once(&self.header).chain(&self.body)
    }
}

fn row(report: &v1::ComparisonReport, arm: &v1::ArmReport, shown: &[usize]) -> Vec<String> {
    let front = if arm.on_front { " *" } else { "" };
    let mut row = vec![format!("{}{front}", arm.name)];
    row.extend(shown.iter().map(|c| {
        let column = &report.columns[*c];
        let value = |v: f64| format::value(&column.metric, &column.unit, v);
        match cell(arm, *c) {
            None => String::new(),
            Some(cell) => match cell.deviation {
                Some(deviation) if deviation > 0.0 => {
                    format!("{} ± {}", value(cell.mean), value(deviation))
                }
                _ => value(cell.mean),
            },
        }
    }));
    row
}

/// A difference in words: `perplexity of a / b: 1.30 (1.21 to 1.40), worse`.
fn contrast(found: &v1::ContrastReport) -> Option<String> {
    let (sign, estimated) = match (&found.ratio, &found.difference) {
        (Some(ratio), _) => ("/", ratio),
        (None, Some(difference)) => ("-", difference),
        (None, None) => return None,
    };
    let verdict = found.verdict().as_str_name().trim_start_matches("CONTRAST_VERDICT_");
    Some(format!(
        "{} of {} {sign} {}: {}, {}",
        found.metric.replace('_', " "),
        found.arm,
        found.against,
        interval(estimated),
        verdict.to_lowercase()
    ))
}

/// An estimate with its interval: `1.30 (1.21 to 1.40)`.
pub fn interval(estimated: &v1::Estimated) -> String {
    let value = format::significant(estimated.value);
    match (estimated.low, estimated.high) {
        (Some(low), Some(high)) if low < high => {
            format!("{value} ({} to {})", format::significant(low), format::significant(high))
        }
        (Some(_), Some(_)) => format!("{value} (exact)"),
        _ => format!("{value} (one run)"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::{Facts, report};
    use super::super::testing::{arm, comparison, round, run, wanda};
    use super::super::{BASE, resolve};
    use super::*;
    use crate::eval::metrics::{PERPLEXITY, WEIGHT_BYTES};

    fn example() -> v1::ComparisonReport {
        let mut comparison =
            comparison(vec![arm("wanda-50", vec![wanda(0.5)]), arm("round", vec![round(4)])]);
        comparison.seeds = vec![0, 1];
        comparison.contrasts = vec![v1::Contrast {
            metric: "weight_bytes".into(),
            arm: "round".into(),
            against: BASE.into(),
        }];
        let made = |arm: &str, seed, nats: &[f64], bytes: f64| {
            run(arm, seed, &[(&PERPLEXITY, nats), (&WEIGHT_BYTES, &[bytes])])
        };
        let runs = vec![
            made("wanda-50", Some(0), &[3.0, 3.2], 8e7),
            made("wanda-50", Some(1), &[3.1, 3.3], 8e7),
        ];
        let base = made(BASE, None, &[2.0, 2.2], 9.66e7);
        report(&resolve(&comparison), &Facts::default(), Some(base), runs)
    }

    #[test]
    fn a_terminal_sees_names_numbers_and_protocols() {
        let text = text(&example());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "arm         perplexity [1]  weight bytes [1]");
        assert_eq!(lines[2], "base *               8.166           96.6 MB");
        assert!(lines[3].starts_with("wanda-50 *  23.") && lines[3].contains(" ± 1."), "{text}");
        assert_eq!(lines[4], "round");
        assert_eq!(lines[5], "[1] p");
        assert!(text.contains("unfinished"), "{text}");
    }

    #[test]
    fn markdown_and_csv_hold_every_arm() {
        let report = example();
        let markdown = markdown(&report);
        assert!(
            markdown.starts_with("| arm | perplexity [1] | weight bytes [1] |\n|---|---:|---:|\n")
        );
        assert!(markdown.contains("| round |  |  |"), "{markdown}");
        let csv = csv(&report).expect("writes");
        assert_eq!(csv.lines().count(), 1 + 3 * 2);
        assert!(csv.contains("wanda-50,1,,weight_bytes,80000000,bytes,false,p"), "{csv}");
        assert!(csv.contains("base,,,"), "{csv}");
    }

    #[test]
    fn asked_metrics_are_shown_alone_and_in_order() {
        let mut report = example();
        report.comparison.as_mut().expect("given").metrics =
            vec!["weight_bytes".into(), "accuracy".into()];
        assert!(text(&report).starts_with("arm         weight bytes [1]\n"));
    }

    #[test]
    fn differences_are_words() {
        let of = |ratio: Option<f64>, low: Option<f64>, high: Option<f64>| {
            let estimated = ratio.map(|value| v1::Estimated { value, low, high });
            let mut found = v1::ContrastReport {
                metric: "kl_divergence".into(),
                arm: "a".into(),
                against: "b".into(),
                ratio: estimated,
                ..Default::default()
            };
            found.set_verdict(v1::ContrastVerdict::Better);
            contrast(&found)
        };
        let text = of(Some(0.5), Some(0.25), Some(0.75)).expect("measured");
        assert_eq!(text, "kl divergence of a / b: 0.500 (0.250 to 0.750), better");
        assert!(of(Some(0.5), None, None).expect("measured").contains("(one run)"));
        assert_eq!(of(None, None, None), None);
    }
}
