//! How a training went: a picture of its loss, and tables.

use super::compare::text::{FONT_FAMILY, escape, rasterise, width};
use super::compare::{GREY, SMALL, label, line, scale::Scale, scale::drawable};
use crate::error::{Error, Result};
use crate::proto::v1;

/// Size of the picture and the edges of the plot, in pixels.
const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 560.0;
const TOP: f64 = 72.0;
const BOTTOM: f64 = 498.0;
const RIGHT: f64 = 772.0;

const TRAINING: &str = "#0072b2";
const VALIDATION: &str = "#d55e00";
const INK: &str = "#222222";
const GRID: &str = "#e4e4e4";

/// Losses span decades when the largest is this many times the smallest.
const DECADES: f64 = 8.0;

/// Rows of a table for a terminal, about.
const ROWS: usize = 24;

/// The loss against the updates as SVG, 800 by 560 pixels: the same bytes for the same report. A field error
/// when there is nothing to draw yet.
pub fn svg(report: &v1::TrainingReport) -> Result<String> {
    let training: Vec<(f64, f64)> =
        report.points.iter().map(|point| (point.step as f64, point.loss)).collect();
    let validation: Vec<(f64, f64)> =
        report.validations.iter().map(|point| (point.step as f64, point.loss)).collect();
    let all = || training.iter().chain(&validation).filter(|(_, loss)| drawable(*loss, false));
    let (low, high) = all()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), p| (low.min(p.1), high.max(p.1)));
    if low > high {
        return Err(Error::field("name", "no loss was measured so far; look again later"));
    }
    let log = low > 0.0 && high / low >= DECADES;
    let y = Scale::new(all().map(|point| point.1), log, BOTTOM, TOP);
    let y_ticks = y.ticks(|_| if log { 16.0 } else { 30.0 });
    let left = 48.0 + y_ticks.iter().map(|t| width(&t.label, SMALL)).fold(0.0, f64::max);
    let x = Scale::new(all().map(|point| point.0), false, left, RIGHT);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" font-family=\"{FONT_FAMILY}\">\n\
         <title>loss</title>\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n"
    );
    svg += &label((left, 30.0), 17.0, "start", INK, "loss");
    for tick in &y_ticks {
        svg += &line(((left, tick.at), (RIGHT, tick.at)), GRID, 1.0);
        svg += &label((left - 7.0, tick.at + 4.0), SMALL, "end", INK, &tick.label);
    }
    for tick in x.ticks(|text| width(text, SMALL) + 14.0) {
        svg += &line(((tick.at, TOP), (tick.at, BOTTOM)), GRID, 1.0);
        svg += &label((tick.at, BOTTOM + 17.0), SMALL, "middle", INK, &tick.label);
    }
    svg += &line(((left, TOP), (left, BOTTOM)), GREY, 1.0);
    svg += &line(((left, BOTTOM), (RIGHT, BOTTOM)), GREY, 1.0);
    svg += &label(((left + RIGHT) / 2.0, BOTTOM + 39.0), 12.0, "middle", INK, "updates");

    let mut legend = left + 12.0;
    for (name, points, colour) in
        [("training", &training, TRAINING), ("validation", &validation, VALIDATION)]
    {
        let places: Vec<(f64, f64)> = points
            .iter()
            .filter(|point| drawable(point.1, log))
            .map(|point| (x.at(point.0), y.at(point.1)))
            .collect();
        if places.is_empty() {
            continue;
        }
        let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.2},{y:.2}")).collect();
        svg += &format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.4\" \
             stroke-linejoin=\"round\"/>\n",
            path.join(" ")
        );
        // A line of one point is not seen, and validations are few.
        if colour == VALIDATION || places.len() == 1 {
            for (x, y) in &places {
                svg +=
                    &format!("<circle cx=\"{x:.2}\" cy=\"{y:.2}\" r=\"3\" fill=\"{colour}\"/>\n");
            }
        }
        svg += &line(((legend - 12.0, 53.0), (legend + 12.0, 53.0)), colour, 1.4);
        svg += &label((legend + 20.0, 57.0), SMALL, "start", INK, &escape(name));
        legend += 52.0 + width(name, SMALL);
    }
    svg += "</svg>\n";
    Ok(svg)
}

/// The picture of [`svg`] as PNG.
pub fn png(report: &v1::TrainingReport) -> Result<Vec<u8>> {
    rasterise(&svg(report)?)
}

/// One line a point or validation, in the order of the updates.
pub fn csv(report: &v1::TrainingReport) -> Result<String> {
    let mut out = csv::Writer::from_writer(Vec::new());
    let failed = |e: csv::Error| Error::internal(format!("a table was not written: {e}"));
    let names: std::collections::BTreeSet<&String> =
        report.points.iter().flat_map(|point| point.metrics.keys()).collect();
    let mut header: Vec<&str> =
        vec!["kind", "step", "loss", "learning_rate", "gradient_norm", "accuracy"];
    header.extend(names.iter().map(|name| name.as_str()));
    out.write_record(&header).map_err(failed)?;
    for row in rows(report) {
        let mut record = vec![row.kind.to_owned(), row.step.to_string(), row.loss.to_string()];
        match row.point {
            Some(point) => {
                let numbers = [point.learning_rate, point.gradient_norm].map(|v| v.to_string());
                record.extend(numbers);
                record.push(String::new());
            }
            None => {
                record.extend([String::new(), String::new()]);
                record.push(row.accuracy.map(|share| share.to_string()).unwrap_or_default());
            }
        }
        record.extend(names.iter().map(|name| {
            let value = row.point.and_then(|point| point.metrics.get(*name));
            value.map(ToString::to_string).unwrap_or_default()
        }));
        out.write_record(&record).map_err(failed)?;
    }
    let bytes = out
        .into_inner()
        .map_err(|e| Error::internal(format!("a table was not written: {}", e.error())))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A table for a terminal: validations where there are any, else every so many points.
pub fn text(report: &v1::TrainingReport) -> String {
    let validated = !report.validations.is_empty();
    let kind = if validated { "validation" } else { "training" };
    let rows: Vec<Row<'_>> = rows(report).into_iter().filter(|row| row.kind == kind).collect();
    let every = rows.len().div_ceil(ROWS).max(1);
    let mut out = format!("{:>8}  {:>10}", "update", format!("{kind} loss"));
    let classified = report.validations.iter().any(|point| point.accuracy.is_some());
    if classified {
        out += "  accuracy";
    }
    out.push('\n');
    let last = rows.len().saturating_sub(1);
    for (index, row) in rows.iter().enumerate() {
        let kept = row.step == report.kept_step && validated;
        if !(index % every == 0 || index == last || kept) {
            continue;
        }
        out += &format!("{:>8}  {:>width$.4}", row.step, row.loss, width = kind.len() + 5);
        if classified {
            out += &format!("  {:>7.2}%", row.accuracy.unwrap_or_default() * 100.0);
        }
        out += if kept { "  kept\n" } else { "\n" };
    }
    out
}

struct Row<'a> {
    kind: &'static str,
    step: i64,
    loss: f64,
    point: Option<&'a v1::TrainingPoint>,
    accuracy: Option<f64>,
}

fn rows(report: &v1::TrainingReport) -> Vec<Row<'_>> {
    let points = report.points.iter().map(|point| Row {
        kind: "training",
        step: point.step,
        loss: point.loss,
        point: Some(point),
        accuracy: None,
    });
    let validations = report.validations.iter().map(|point| Row {
        kind: "validation",
        step: point.step,
        loss: point.loss,
        point: None,
        accuracy: point.accuracy,
    });
    let mut rows: Vec<Row<'_>> = points.chain(validations).collect();
    rows.sort_by_key(|row| row.step);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> v1::TrainingReport {
        let point = |step: i64| v1::TrainingPoint {
            step,
            loss: 4.0 / step as f64,
            learning_rate: 0.5,
            gradient_norm: 2.0,
            metrics: [("rank".to_owned(), 8.0)].into(),
        };
        let validation =
            |step: i64, loss: f64| v1::ValidationPoint { step, loss, accuracy: Some(0.25) };
        v1::TrainingReport {
            points: (1..=100).map(point).collect(),
            validations: vec![validation(0, 5.0), validation(50, 1.5), validation(100, 2.0)],
            kept_step: 50,
            ..Default::default()
        }
    }

    #[test]
    fn the_picture_has_both_losses_and_is_the_same_each_time() {
        let picture = svg(&report()).unwrap();
        assert_eq!(picture.matches("<polyline").count(), 2);
        assert_eq!(picture.matches("<circle").count(), 3);
        for text in [">training</text>", ">validation</text>", ">updates</text>", ">loss</text>"] {
            assert!(picture.contains(text), "{text}");
        }
        assert_eq!(picture, svg(&report()).unwrap());
        let image = png(&report()).unwrap();
        assert!(image.starts_with(b"\x89PNG") && image.len() > 5000, "{}", image.len());
    }

    #[test]
    fn nothing_is_drawn_of_nothing_and_strange_numbers_do_no_harm() {
        assert!(svg(&v1::TrainingReport::default()).is_err());
        let mut strange = report();
        strange.points[3].loss = f64::NAN;
        strange.points[4].loss = f64::INFINITY;
        strange.points[5].loss = 0.0;
        strange.points[6].loss = -1.0;
        strange.points[7].step = i64::MIN;
        assert!(png(&strange).is_ok());
        let one =
            v1::TrainingReport { points: report().points[..1].to_vec(), ..Default::default() };
        assert!(svg(&one).unwrap().contains("<circle"));
    }

    #[test]
    fn tables_hold_the_numbers() {
        let table = csv(&report()).unwrap();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "kind,step,loss,learning_rate,gradient_norm,accuracy,rank");
        assert_eq!(lines[1], "validation,0,5,,,0.25,");
        assert_eq!(lines[2], "training,1,4,0.5,2,,8");
        assert_eq!(lines.len(), 104);
        let table = text(&report());
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[2].contains("50") && lines[2].ends_with("kept"), "{table}");
        let without = v1::TrainingReport { validations: Vec::new(), ..report() };
        let table = text(&without);
        assert!(table.lines().count() <= 2 + ROWS && table.contains("training loss"), "{table}");
    }
}
