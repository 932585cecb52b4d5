//! Results of jobs as people read them.

use std::path::PathBuf;

use serde_json::json;

use super::Context;
use super::error::Result;
use super::names::short_model;
use super::norms;
use super::output::{self, decode, size, table};
use crate::eval::{format, metrics};
use crate::proto::google::longrunning::{Operation, operation};
use crate::proto::v1::{
    AdaptData, AdaptPlan, AdaptReport, ClaimResult, ComparisonPlan, ComparisonReport,
    EvaluationReport, ExportReport, Measurement, MergeReport, ModelVersion, PruningReport,
    RecipePlan, RecipeReport, RecipeWarning, StepReport, TrainingEnd, TrainingReport,
};
use crate::recipe::claim::judge;
use crate::recipe::compare::table;

/// Prints the result of a finished operation, whatever its type.
pub fn operation(operation: &Operation) -> Result<()> {
    let Some(operation::Result::Response(any)) = &operation.result else { return Ok(()) };
    match any.type_url.rsplit('/').next().unwrap_or_default() {
        "planish.v1.RecipeReport" => recipe(&decode::<RecipeReport>(any)?),
        "planish.v1.EvaluationReport" => evaluation(&decode::<EvaluationReport>(any)?),
        "planish.v1.ModelVersion" => imported(&decode::<ModelVersion>(any)?),
        "planish.v1.RecipePlan" => plan(&decode::<RecipePlan>(any)?),
        "planish.v1.ComparisonPlan" => comparison_plan(&decode::<ComparisonPlan>(any)?),
        "planish.v1.ComparisonReport" => comparison(&decode::<ComparisonReport>(any)?),
        "planish.v1.AdaptPlan" => adapt_plan(&decode::<AdaptPlan>(any)?),
        "planish.v1.AdaptReport" => adapted(&decode::<AdaptReport>(any)?),
        "planish.v1.MergeReport" => merged(&decode::<MergeReport>(any)?),
        "planish.v1.ClaimResult" => claim(&decode::<ClaimResult>(any)?),
        _ => output::line(format!("{} is done", operation.name)),
    }
}

fn imported(version: &ModelVersion) -> Result<()> {
    let random = version.lineage.as_ref().is_some_and(|lineage| lineage.source == "random");
    output::line(format!(
        "{} {}: {} {}, weights {}",
        short_model(&version.name),
        if random { "made" } else { "imported" },
        version.family,
        version.architecture,
        size(version.weight_bytes)
    ))
}

/// What gradual pruning did, in a line.
fn pruning(report: &PruningReport) -> String {
    let share = 1.0 - report.kept as f64 / report.elements.max(1) as f64;
    format!(
        "{:.1} % of {} weights are zero after {} masks; {} with a bitmap, {} as compressed rows, {} dense",
        100.0 * share,
        report.elements,
        report.updates.len(),
        size(report.bitmap_bytes),
        size(report.csr_bytes),
        size(report.dense_bytes)
    )
}

/// What a recipe made and what that cost.
pub fn recipe(report: &RecipeReport) -> Result<()> {
    if !report.steps.is_empty() {
        output::line(steps(&report.steps))?;
    }
    recipe_warnings(&report.warnings)?;
    for step in &report.steps {
        if let Some(report) = &step.training {
            output::line(format!("{}: {}", step.method, training(report)))?;
        }
        if let Some(report) = &step.pruning {
            output::line(format!("{}: {}", step.method, pruning(report)))?;
        }
    }
    let (before, after) = (report.before.as_ref(), report.after.as_ref());
    let result = report.versions.last().map_or(report.base.as_str(), String::as_str);
    let heads = (short_model(&report.base), short_model(result));
    output::line(format!("\n{}", side_by_side(&heads, before, after)))?;
    for protocol in protocols(after.or(before)) {
        output::line(protocol)?;
    }
    let memory = if report.peak_memory_bytes > 0 {
        format!(", peak memory {}", size(report.peak_memory_bytes))
    } else {
        String::new()
    };
    output::line(format!(
        "\n{} made in {}{memory}",
        short_model(result),
        output::seconds(report.seconds)
    ))
}

fn steps(steps: &[StepReport]) -> String {
    let rows = steps
        .iter()
        .map(|s| {
            let tokens = match s.calibration_tokens {
                0 => String::new(),
                tokens => tokens.to_string(),
            };
            vec![
                s.method.clone(),
                short_model(&s.version),
                output::seconds(s.seconds),
                format!("{} → {}", size(s.bytes_before), size(s.bytes_after)),
                format!("{:.1}%", s.zero_share * 100.0),
                tokens,
            ]
        })
        .collect();
    let header = ["step", "version", "took", "weights", "zeros", "calibration tokens"];
    let mut text = table(&header, &[2, 4, 5], rows);
    for step in steps {
        for warning in &step.warnings {
            text.push_str(&format!("\nwarning: {}: {warning}", step.method));
        }
    }
    text
}

/// What a merge made.
fn merged(report: &MergeReport) -> Result<()> {
    let by = if report.weight == 1.0 { String::new() } else { format!(" times {}", report.weight) };
    if report.version.is_empty() {
        return output::line(format!(
            "{}{by} can be merged into {}",
            report.adapter,
            short_model(&report.base)
        ));
    }
    output::line(format!(
        "{} is {} with {}{by}: {} tensors changed, weights {} → {}",
        short_model(&report.version),
        short_model(&report.base),
        report.adapter,
        report.tensor_count,
        size(report.bytes_before),
        size(report.bytes_after)
    ))?;
    if !report.drifts.is_empty() {
        let worst = report.drifts.iter().max_by(|a, b| a.of_change.total_cmp(&b.of_change));
        output::line(format!(
            "rounding moved {} tensors by {:.2}% of their norm on average and {:.2}% at most; of what the \
             adapter changed it lost {:.1}% at most ({})",
            report.drifts.len(),
            100.0 * report.mean_drift,
            100.0 * report.max_drift,
            100.0 * worst.map_or(0.0, |d| d.of_change),
            worst.map_or("", |d| d.tensor.as_str())
        ))?;
    }
    for warning in &report.warnings {
        output::line(format!("warning: {warning}"))?;
    }
    output::line(format!("took {}", output::seconds(report.seconds)))
}

/// What an adaptation made.
fn adapted(report: &AdaptReport) -> Result<()> {
    let data = |what: &str, data: &AdaptData| {
        output::line(format!(
            "{what} {}: {} sequences of {} records, {} tokens",
            data.dataset, data.sequences, data.records, data.tokens
        ))
    };
    if let Some(learnt) = &report.data {
        data("learnt from", learnt)?;
    }
    if let Some(measured) = &report.validation {
        data("measured on", measured)?;
    }
    if let Some(report) = &report.training {
        output::line(training(report))?;
    }
    for warning in &report.warnings {
        output::line(format!("warning: {warning}"))?;
    }
    let memory = match report.peak_memory_bytes {
        1.. => format!(", peak memory {}", size(report.peak_memory_bytes)),
        _ => String::new(),
    };
    output::line(format!(
        "\n{} made for {} in {}: {} on disk{memory}",
        report.adapter,
        short_model(&report.base_version),
        output::seconds(report.seconds),
        size(report.total_bytes)
    ))
}

/// What an adaptation would cost.
fn adapt_plan(plan: &AdaptPlan) -> Result<()> {
    output::line(output::facts(&[
        ("trained", format!("{} numbers", plan.trained_parameters)),
        ("frozen beside the base", format!("{} numbers", plan.frozen_parameters)),
        ("memory", format!("at most about {}", size(plan.memory_bytes))),
    ]))?;
    for warning in &plan.warnings {
        output::line(format!("warning: {warning}"))?;
    }
    Ok(())
}

/// How a training went, in a line.
pub fn training(report: &TrainingReport) -> String {
    let early = match report.end() {
        TrainingEnd::StoppedEarly => format!(" of {} (stopped early)", report.planned_steps),
        _ => String::new(),
    };
    let mut line = format!(
        "trained {} numbers in {} updates{early}, {:.2} epochs, {:.0} tokens/s",
        report.trained_parameters, report.steps, report.epochs, report.tokens_per_second
    );
    let kept = report.validations.iter().rev().find(|point| point.step == report.kept_step);
    if let Some((first, kept)) = report.validations.first().zip(kept) {
        line += &format!(
            "; validation loss {:.4} → {:.4} (update {})",
            first.loss, kept.loss, kept.step
        );
    } else if let Some((first, last)) = report.points.first().zip(report.points.last()) {
        line += &format!("; loss {:.4} → {:.4}", first.loss, last.loss);
    }
    for warning in &report.warnings {
        line += &format!("\nwarning: {warning}");
    }
    line
}

/// Base and result, metric by metric.
fn side_by_side(
    heads: &(String, String),
    before: Option<&EvaluationReport>,
    after: Option<&EvaluationReport>,
) -> String {
    let list = |report: Option<&EvaluationReport>| {
        report.map(|r| r.measurements.clone()).unwrap_or_default()
    };
    let (before, after) = (list(before), list(after));
    let mut metrics: Vec<&str> = after.iter().map(|m| m.metric.as_str()).collect();
    metrics.extend(before.iter().map(|m| m.metric.as_str()));
    let mut seen = std::collections::HashSet::new();
    metrics.retain(|metric| seen.insert(*metric));
    let find =
        |list: &[Measurement], metric: &str| list.iter().find(|m| m.metric == metric).cloned();
    let rows = metrics
        .into_iter()
        .map(|metric| {
            let (old, new) = (find(&before, metric), find(&after, metric));
            let change = match (&old, &new) {
                (Some(old), Some(new)) => change(old, new),
                _ => String::new(),
            };
            let text =
                |m: Option<Measurement>| m.as_ref().map(format::measurement).unwrap_or_default();
            vec![metric.replace('_', " "), text(old), text(new), change]
        })
        .collect();
    table(&["", heads.0.as_str(), heads.1.as_str(), "change"], &[1, 2, 3], rows)
}

/// Whether a metric is a share of a whole: such have no ratio that helps.
fn is_share(metric: &str) -> bool {
    metrics::metric(metric).is_ok_and(metrics::Metric::is_share)
}

/// How a value moved: `+4.2%` up to a factor of two, `x 3.10` beyond. Values measured in different
/// ways have no ratio; shares have none that helps.
fn change(old: &Measurement, new: &Measurement) -> String {
    let ratio = new.value / old.value;
    if old.protocol != new.protocol {
        "measured differently".to_owned()
    } else if !ratio.is_finite() || ratio <= 0.0 || old.value == new.value || is_share(&new.metric)
    {
        String::new()
    } else if (0.5..2.0).contains(&ratio) {
        format!("{:+.1}%", (ratio - 1.0) * 100.0)
    } else {
        format!("x {ratio:.2}")
    }
}

/// How the values were measured: one line for the metrics that share a protocol.
fn protocols(report: Option<&EvaluationReport>) -> Vec<String> {
    let mut groups: Vec<(&str, Vec<String>)> = Vec::new();
    for m in report.map(|r| r.measurements.as_slice()).unwrap_or_default() {
        let metric = m.metric.replace('_', " ");
        match groups.iter_mut().find(|(protocol, _)| *protocol == m.protocol) {
            _ if m.protocol.is_empty() => {}
            Some((_, metrics)) => metrics.push(metric),
            None => groups.push((&m.protocol, vec![metric])),
        }
    }
    let line =
        |(protocol, metrics): (&str, Vec<String>)| format!("  {}: {protocol}", metrics.join(", "));
    groups.into_iter().map(line).collect()
}

/// The measurements of one version.
pub fn evaluation(report: &EvaluationReport) -> Result<()> {
    let rows = report
        .measurements
        .iter()
        .map(|m| vec![m.metric.replace('_', " "), format::measurement(m), m.protocol.clone()])
        .collect();
    output::line(table(&["metric", "value", "measured with"], &[1], rows))?;
    if let Some(norms) = &report.norms {
        output::line(format!("\n{}", norms::text(norms)))?;
    }
    output::line(format!(
        "\n{} measured in {}",
        short_model(&report.version),
        output::seconds(report.seconds)
    ))
}

/// What a recipe would do and cost.
pub fn plan(plan: &RecipePlan) -> Result<()> {
    let steps = plan.recipe.as_ref().map(|r| r.steps.as_slice()).unwrap_or_default();
    let total = plan.total.iter().map(|total| ("all".to_owned(), total));
    let rows = steps
        .iter()
        .map(|step| serde_json::to_string(step).unwrap_or_default())
        .zip(&plan.steps)
        .chain(total)
        .map(|(step, cost)| {
            vec![
                step,
                size(cost.weight_bytes),
                size(cost.memory_bytes),
                output::seconds(cost.seconds),
            ]
        })
        .collect();
    output::line(table(&["step", "weights after", "memory", "about"], &[1, 2, 3], rows))?;
    recipe_warnings(&plan.warnings)
}

fn recipe_warnings(warnings: &[RecipeWarning]) -> Result<()> {
    warnings.iter().try_for_each(|w| output::line(format!("warning: {}: {}", w.field, w.message)))
}

/// What a comparison found.
pub fn comparison(report: &ComparisonReport) -> Result<()> {
    output::text(&table::text(report))?;
    let shared = report.shared.unwrap_or_default();
    let memory = match report.peak_memory_bytes {
        0 => String::new(),
        bytes => format!(", peak memory {}", size(bytes)),
    };
    output::line(format!(
        "\n{} steps taken, {} shared; calibration texts: {} made, {} shared; passes of the base: {}, {} \
         shared; {}{memory}",
        shared.steps_taken,
        shared.steps_shared,
        shared.calibrations_made,
        shared.calibrations_shared,
        shared.base_passes,
        shared.base_passes_shared,
        output::seconds(report.seconds)
    ))
}

/// What a comparison would do and cost.
fn comparison_plan(plan: &ComparisonPlan) -> Result<()> {
    output::line(format!(
        "{} runs; {} steps to take, {} shared; about {} for the steps, measuring not counted; memory up \
         to {}",
        plan.runs,
        plan.steps,
        plan.steps_shared,
        output::seconds(plan.seconds),
        size(plan.memory_bytes)
    ))?;
    recipe_warnings(&plan.warnings)
}

/// What became of a claim.
pub fn claim(result: &ClaimResult) -> Result<()> {
    if let Some(report) = &result.report {
        comparison(report)?;
    }
    let rows = result
        .findings
        .iter()
        .map(|f| {
            let verdict = f.verdict().as_str_name().trim_start_matches("FINDING_VERDICT_");
            let measured = f.measured.as_ref().map(table::interval).unwrap_or_default();
            let effect =
                if f.headline { format!("{} (headline)", f.effect) } else { f.effect.clone() };
            vec![effect, measured, output::significant(f.bound), verdict.to_lowercase()]
        })
        .collect();
    output::line(format!(
        "\n{}",
        output::table(&["expected effect", "measured", "bound", ""], &[1, 2], rows)
    ))?;
    let form = if result.short { "short form, which decides nothing" } else { "full form" };
    output::line(format!(
        "\n{}: {} ({form}, {:.1} minutes)",
        result.claim,
        judge::word(result.verdict()),
        result.minutes
    ))
}

/// Says that a resource is gone.
pub(super) fn deleted(context: &Context, name: &str) -> Result<()> {
    if context.output.is_json() {
        return output::json(&json!({ "name": name, "deleted": true }));
    }
    output::line(format!("{name} deleted"))
}

/// Files that an export wrote, with their sizes.
pub(super) fn written(context: &Context, files: &[(PathBuf, i64)]) -> Result<()> {
    if context.output.is_json() {
        let files: Vec<_> = files
            .iter()
            .map(|(path, bytes)| json!({ "path": path, "size_bytes": bytes }))
            .collect();
        return output::json_list("files", &files);
    }
    for (path, bytes) in files {
        output::line(format!("{}  {}", path.display(), size(*bytes)))?;
    }
    Ok(())
}

/// Files of a model, and what became of its tensors.
pub(super) fn exported(
    context: &Context,
    files: &[(PathBuf, i64)],
    report: Option<&ExportReport>,
) -> Result<()> {
    if context.output.is_json() {
        let files: Vec<_> = files
            .iter()
            .map(|(path, bytes)| json!({ "path": path, "size_bytes": bytes }))
            .collect();
        return output::json(&json!({ "files": files, "report": report }));
    }
    written(context, files)?;
    let Some(report) = report else { return Ok(()) };
    let carried = report.tensors.iter().filter(|t| t.carried).count();
    if carried > 0 {
        output::line(format!(
            "{carried} of {} tensors carried over as they are",
            report.tensors.len()
        ))?;
    }
    let moved = report.tensors.iter().filter(|t| t.max_difference > 0.0);
    if let Some(worst) =
        moved.clone().max_by(|a, b| a.relative_difference.total_cmp(&b.relative_difference))
    {
        output::line(format!(
            "rounding moved {} tensors, by {:.2e} of their norm at most ({} as {})",
            moved.count(),
            worst.relative_difference,
            worst.name,
            worst.written_as
        ))?;
    }
    for warning in &report.warnings {
        output::line(format!("warning: {warning}"))?;
    }
    Ok(())
}

/// Files that an import would send.
pub(super) fn would_upload(context: &Context, files: &[PathBuf]) -> Result<()> {
    if context.output.is_json() {
        return output::json_list("files", files);
    }
    for file in files {
        output::line(format!("would send {}", file.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(metric: &str, value: f64, unit: &str, protocol: &str) -> Measurement {
        Measurement {
            metric: metric.into(),
            value,
            unit: unit.into(),
            protocol: protocol.into(),
            ..Default::default()
        }
    }

    #[test]
    fn changes_are_percentages_or_factors() {
        let of = |a, b| change(&measured("m", a, "", "p"), &measured("m", b, "", "p"));
        assert_eq!(of(20.0, 21.0), "+5.0%");
        assert_eq!(of(100.0, 30.0), "x 0.30");
        assert_eq!(of(0.0, 1.0), "");
        assert_eq!(of(3.0, 3.0), "");
        let other = change(&measured("m", 1.0, "", "p"), &measured("m", 1.0, "", "q"));
        assert_eq!(other, "measured differently");
    }

    #[test]
    fn metrics_of_both_sides_are_shown_once() {
        let before = EvaluationReport {
            measurements: vec![measured("perplexity", 20.0, "", "p")],
            ..Default::default()
        };
        let after = EvaluationReport {
            measurements: vec![
                measured("perplexity", 30.0, "", "p"),
                measured("kl_divergence", 0.25, "nats", "p"),
            ],
            ..Default::default()
        };
        let heads = ("m@1".to_owned(), "m@2".to_owned());
        let text = side_by_side(&heads, Some(&before), Some(&after));
        assert_eq!(text.matches("perplexity").count(), 1);
        assert!(text.contains("+50.0%") && text.contains("0.250 nats"), "{text}");
        assert_eq!(protocols(Some(&after)), ["  perplexity, kl divergence: p"]);
    }
}
