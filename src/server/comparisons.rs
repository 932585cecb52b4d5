//! Comparisons: what the services of jobs and claims share.

use std::collections::BTreeMap;

use prost::Message as _;

use super::jobs::{check_datasets, check_evaluation};
use super::{State, blocking, check, convert};
use crate::error::{Error, Reason, Result};
use crate::eval;
use crate::jobs;
use crate::methods::Estimate;
use crate::models::encoder;
use crate::proto::v1::{self, ComparisonView, render_comparison_request::Source};
use crate::recipe::adapt::{self, Learner};
use crate::recipe::compare::{self, picture, plan::Plan, table};
use crate::store::datasets::DatasetKind;
use crate::store::models::VersionRow;
use crate::store::names;

/// Arms, columns, contrasts, runs and measurements of a report at most, each.
const MAX_ROWS: usize = 256;

/// Largest report that is rendered for a client that sends one.
const MAX_REPORT: usize = 16 << 20;

/// Checks a comparison with all that it names, and gives it with exact versions and every default
/// written out, with the cost of each arm's steps. Errors point into the comparison.
pub async fn check(
    state: &State,
    given: v1::Comparison,
) -> Result<(v1::Comparison, Vec<Estimate>)> {
    check::display_name("display_name", &given.display_name)?;
    let row = state.store.version(&given.model).await.map_err(|e| at("model", e))?;
    let base = base(state, &row).await?;
    compare::check_counts(&given)?;
    let mut given = compare::expand(&given)?;
    if let Some(evaluation) = &given.evaluation {
        check_evaluation("evaluation", evaluation)?;
    }
    compare::check_counts(&given)?;
    for (i, arm) in given.arms.iter_mut().enumerate() {
        let place = format!("arms[{i}]");
        check::display_name(&format!("{place}.display_name"), &arm.display_name)?;
        if let Some(evaluation) = &arm.evaluation {
            check_evaluation(&format!("{place}.evaluation"), evaluation)?;
        }
        if !arm.version.is_empty() {
            let field = format!("{place}.version");
            let version = state.store.version(&arm.version).await.map_err(|e| at(&field, e))?;
            let info = state.store.version_info(&version).await?;
            let measured = arm.evaluation.as_ref().or(given.evaluation.as_ref());
            if let Some(evaluation) = measured {
                eval::check_any(evaluation, &info).map_err(|e| e.within(&field))?;
            }
            arm.version = version.name();
        }
    }
    given.model = row.name();
    let encoder = base.is_encoder();
    let (given, estimates) = blocking(move || {
        let estimates = compare::check(&given, &base)?;
        Ok((given, estimates))
    })
    .await?;
    check_datasets(state, &given).await?;
    check_tasks(state, &given, encoder).await?;
    Ok((compare::resolve(&given), estimates))
}

/// What is known of a version before its weights are read.
async fn base(state: &State, row: &VersionRow) -> Result<compare::Base> {
    let info = match row.family.as_str() {
        encoder::FAMILY => None,
        _ => Some(state.store.version_info(row).await?),
    };
    Ok(compare::Base {
        family: row.family.clone(),
        config: row.config.clone(),
        bytes: row.weight_bytes.unsigned_abs(),
        info,
    })
}

/// Checks the data that arms learn from, and that tasks are of what they learn.
async fn check_tasks(state: &State, given: &v1::Comparison, encoder: bool) -> Result<()> {
    if let Some(task) = given.evaluation.as_ref().and_then(|e| e.task.as_ref()) {
        labelled(state, Learner::of(encoder, false), "evaluation.task.dataset", &task.dataset)
            .await?;
    }
    for (i, arm) in given.arms.iter().enumerate() {
        let measured = compare::evaluation_of(given, arm).and_then(|e| e.task.as_ref());
        let mut kinds = Vec::new();
        let place = format!("arms[{i}].evaluation.task.dataset");
        if let Some(task) = measured {
            let learner = Learner::of(encoder, false);
            kinds.push((labelled(state, learner, &place, &task.dataset).await?, place));
        }
        let Some(training) = arm.tuning.as_ref().and_then(|t| t.training.as_ref()) else {
            continue;
        };
        let validation = training.validation.as_ref().map_or("", |v| v.dataset.as_str());
        let hides = training.objective() == v1::TrainingObjective::MaskedLm;
        let learner = Learner::of(encoder, hides);
        let place = format!("arms[{i}].tuning.training");
        let learnt = [("dataset", training.dataset.as_str()), ("validation.dataset", validation)];
        for (field, name) in learnt.into_iter().filter(|(_, name)| !name.is_empty()) {
            let place = format!("{place}.{field}");
            kinds.push((labelled(state, learner, &place, name).await?, place));
        }
        // A decoder can learn from texts and be measured on answers; heads are for one kind.
        if let Some((other, place)) = kinds.iter().find(|(kind, _)| encoder && *kind != kinds[0].0)
        {
            let problem =
                format!("it holds {}, others of the arm {}", other.name(), kinds[0].0.name());
            return Err(Error::at(Reason::DatasetUnsuitable, place.clone(), problem));
        }
    }
    Ok(())
}

/// The kind of a data set to learn from, or to be measured on as a task.
pub(super) async fn labelled(
    state: &State,
    learner: Learner,
    field: &str,
    name: &str,
) -> Result<DatasetKind> {
    let id = names::dataset(name).map_err(|e| at(field, e))?;
    let row = state.store.dataset(id).await.map_err(|e| at(field, e))?;
    adapt::suits(learner, field, row.kind)?;
    Ok(row.kind)
}

fn at(field: &str, error: Error) -> Error {
    Error::at(error.reason(), field, error.message())
}

/// What a checked comparison would do and cost. Fields of its warnings begin with `place`, that of the
/// comparison in the request, as in errors.
pub async fn plan(
    state: &State,
    place: &str,
    comparison: v1::Comparison,
    estimates: &[Estimate],
) -> Result<v1::ComparisonPlan> {
    let row = state.store.version(&comparison.model).await?;
    let base = base(state, &row).await?;
    let mut kinds = BTreeMap::new();
    for name in compare::datasets(&comparison) {
        if let Ok(id) = names::dataset(&name)
            && let Ok(row) = state.store.dataset(id).await
        {
            kinds.insert(name, row.kind);
        }
    }
    let (comparison, mut warnings) = blocking(move || {
        let warnings = compare::warnings(&comparison, &base, &kinds);
        Ok((comparison, warnings))
    })
    .await?;
    for warning in &mut warnings {
        warning.field = format!("{place}.{}", warning.field);
    }
    let plan = Plan::new(&comparison);
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    // An arm's steps cost the same with each seed; those it shares are counted with the first.
    let all: f64 = plan.runs.iter().map(|run| estimates[run.arm].seconds).sum();
    let steps: usize =
        plan.runs.iter().map(|run| comparison.arms[run.arm].steps.len()).sum::<usize>().max(1);
    Ok(v1::ComparisonPlan {
        warnings,
        runs: count(plan.runs.len()),
        steps: count(plan.nodes.len()),
        steps_shared: count(plan.shared),
        seconds: all * plan.nodes.len() as f64 / steps as f64,
        memory_bytes: estimates
            .iter()
            .map(|e| convert::signed(e.memory_bytes))
            .max()
            .unwrap_or_default(),
        comparison: Some(comparison),
    })
}

/// The report of an operation as far as it has come.
pub async fn report(state: &State, name: &str) -> Result<v1::ComparisonReport> {
    let operation = state.store.operation(names::operation(name)?).await?;
    jobs::compare::report(&state.store, &operation).await
}

/// A report as a table or a picture.
pub async fn render(
    state: &State,
    request: v1::RenderComparisonRequest,
) -> Result<v1::RenderComparisonResponse> {
    let view = request.view();
    let report = match request.source {
        Some(Source::Name(name)) => report(state, &name).await?,
        Some(Source::Report(report)) if report.encoded_len() > MAX_REPORT => {
            let problem =
                format!("more than {MAX_REPORT} bytes; render it by its operation's name");
            return Err(Error::at(Reason::TooLarge, "report", problem));
        }
        Some(Source::Report(report)) => report,
        None => return Err(Error::field("name", "missing; name an operation or send a report")),
    };
    blocking(move || {
        sound(&report).map_err(|e| e.within("report"))?;
        let text =
            |media_type: &str, content: String| (media_type.to_owned(), content.into_bytes());
        let png = |content: Vec<u8>| ("image/png".to_owned(), content);
        let (media_type, content) = match view {
            ComparisonView::Unspecified | ComparisonView::Text => {
                text("text/plain; charset=utf-8", table::text(&report))
            }
            ComparisonView::Markdown => {
                text("text/markdown; charset=utf-8", table::markdown(&report))
            }
            ComparisonView::Csv => text("text/csv; charset=utf-8", table::csv(&report)?),
            ComparisonView::BytesSvg => {
                text("image/svg+xml", picture::against_bytes(&report)?.svg()?)
            }
            ComparisonView::LatencySvg => {
                text("image/svg+xml", picture::against_latency(&report)?.svg()?)
            }
            ComparisonView::BytesPng => png(picture::against_bytes(&report)?.png()?),
            ComparisonView::LatencyPng => png(picture::against_latency(&report)?.png()?),
        };
        Ok(v1::RenderComparisonResponse { media_type, content: content.into() })
    })
    .await
}

/// Refuses reports that no server made: larger than any comparison gives, or with cells that point to no
/// column.
pub fn sound(report: &v1::ComparisonReport) -> Result<()> {
    if let Some(comparison) = &report.comparison {
        compare::check_counts(comparison).map_err(|e| e.within("comparison"))?;
    }
    let run = |run: &v1::ArmRun| run.measurements.len() <= MAX_ROWS;
    let arm = |arm: &v1::ArmReport| {
        arm.name.len() <= MAX_ROWS
            && arm.runs.len() <= MAX_ROWS
            && arm.cells.len() <= MAX_ROWS
            && arm.runs.iter().all(run)
    };
    let counts = [report.arms.len(), report.columns.len(), report.contrasts.len()];
    if counts.iter().any(|count| *count > MAX_ROWS) || !report.arms.iter().all(arm) {
        return Err(Error::field("arms", "are more, or hold more, than a comparison can give"));
    }
    let columns = report.columns.len();
    let inside = |cell: &v1::Cell| usize::try_from(cell.column).is_ok_and(|c| c < columns);
    if report.arms.iter().flat_map(|arm| &arm.cells).all(inside) {
        return Ok(());
    }
    Err(Error::field("arms.cells.column", "is no column of the report; send it as it was given"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_that_no_comparison_gives_are_refused_before_any_work() {
        sound(&v1::ComparisonReport::default()).unwrap();
        let many = 1000;
        let arm = v1::ArmReport {
            runs: vec![v1::ArmRun {
                measurements: vec![v1::Measurement::default(); many],
                ..Default::default()
            }],
            ..Default::default()
        };
        let contrasts = v1::Comparison {
            arms: vec![v1::Arm::default()],
            contrasts: vec![v1::Contrast::default(); many],
            ..Default::default()
        };
        let nowhere = v1::ArmReport {
            cells: vec![v1::Cell { column: -1, ..Default::default() }],
            ..Default::default()
        };
        let reports = [
            v1::ComparisonReport {
                arms: vec![v1::ArmReport::default(); many],
                ..Default::default()
            },
            v1::ComparisonReport {
                columns: vec![v1::Column::default(); many],
                ..Default::default()
            },
            v1::ComparisonReport { arms: vec![arm], ..Default::default() },
            v1::ComparisonReport { arms: vec![nowhere], ..Default::default() },
            v1::ComparisonReport { comparison: Some(contrasts), ..Default::default() },
        ];
        for report in reports {
            assert!(sound(&report).is_err());
        }
    }
}
