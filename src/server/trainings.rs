//! Trainings as tables and pictures.

use prost::Message as _;

use super::{State, blocking};
use crate::error::{Error, Reason, Result};
use crate::proto::v1::{self, TrainingView, render_training_request::Source};
use crate::recipe::curve;
use crate::store::names;
use crate::store::operations::{EventRow, Kind};

/// Largest report that is rendered for a client that sends one.
const MAX_REPORT: usize = 4 << 20;

/// Points and validations that are drawn of a report that a client sends, each.
const MAX_POINTS: usize = 10_000;

/// A training as a table or a picture.
pub async fn render(
    state: &State,
    request: v1::RenderTrainingRequest,
) -> Result<v1::RenderTrainingResponse> {
    let view = request.view();
    let report = match request.source {
        Some(Source::Name(name)) => report(state, &name).await?,
        Some(Source::Report(report)) => {
            let points = report.points.len().max(report.validations.len());
            if report.encoded_len() > MAX_REPORT || points > MAX_POINTS {
                let problem = "too large to be rendered; render it by its operation's name";
                return Err(Error::at(Reason::TooLarge, "report", problem));
            }
            report
        }
        None => return Err(Error::field("name", "missing; name an operation or send a report")),
    };
    blocking(move || {
        let text = |kind: &str, content: String| (kind.to_owned(), content.into_bytes());
        let (media_type, content) = match view {
            TrainingView::Unspecified | TrainingView::Text => {
                text("text/plain; charset=utf-8", curve::text(&report))
            }
            TrainingView::Csv => text("text/csv; charset=utf-8", curve::csv(&report)?),
            TrainingView::Svg => text("image/svg+xml", curve::svg(&report)?),
            TrainingView::Png => ("image/png".to_owned(), curve::png(&report)?),
        };
        Ok(v1::RenderTrainingResponse { media_type, content: content.into() })
    })
    .await
}

/// The last training of an operation: from its report, or from its events where there is none.
async fn report(state: &State, name: &str) -> Result<v1::TrainingReport> {
    let operation = state.store.operation(names::operation(name)?).await?;
    if operation.kind == Kind::Recipe
        && let Some(response) = &operation.response
    {
        let report = v1::RecipeReport::decode(response.as_slice())
            .map_err(|e| Error::internal("a stored report is damaged").with_source(e))?;
        if let Some(training) = report.steps.into_iter().rev().find_map(|step| step.training) {
            return Ok(training);
        }
    }
    if operation.kind == Kind::Adapt
        && let Some(response) = &operation.response
    {
        let report = v1::AdaptReport::decode(response.as_slice())
            .map_err(|e| Error::internal("a stored report is damaged").with_source(e))?;
        if let Some(training) = report.training {
            return Ok(training);
        }
    }
    let report = from_events(&state.store.events(&operation.id, 0).await?);
    if report.points.is_empty() && report.validations.is_empty() {
        let problem = format!("{name} has told of no training, or not yet");
        return Err(Error::field("name", problem));
    }
    Ok(report)
}

/// What the events of an operation tell of its last training.
fn from_events(events: &[EventRow]) -> v1::TrainingReport {
    let mut report = v1::TrainingReport::default();
    for event in events {
        let number = |name: &str| event.metrics.get(name).copied();
        let Some(step) = number("step") else { continue };
        // Another run began, or this one anew from an earlier checkpoint.
        report.points.retain(|point| (point.step as f64) < step);
        report.validations.retain(|point| point.step as f64 <= step);
        report.planned_steps = number("steps").unwrap_or_default() as i64;
        report.steps = step as i64;
        if let Some(loss) = number("loss") {
            report.points.push(v1::TrainingPoint {
                step: step as i64,
                loss,
                learning_rate: number("learning_rate").unwrap_or_default(),
                gradient_norm: number("gradient_norm").unwrap_or_default(),
                ..Default::default()
            });
        }
        let validated = number("validation_step").map(|step| step as i64);
        if let Some((step, loss)) = validated.zip(number("validation_loss"))
            && report.validations.last().is_none_or(|last| last.step < step)
        {
            let accuracy = number("validation_accuracy");
            report.validations.push(v1::ValidationPoint { step, loss, accuracy });
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(numbers: &[(&str, f64)]) -> EventRow {
        let metrics = numbers.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        EventRow { sequence: 1, time_ms: 0, progress: 0.0, message: String::new(), metrics }
    }

    #[test]
    fn events_tell_of_the_last_training() {
        let first = [
            event(&[]),
            event(&[("step", 0.0), ("steps", 9.0)]),
            event(&[("step", 2.0), ("steps", 9.0), ("loss", 3.0), ("learning_rate", 0.1)]),
            event(&[
                ("step", 5.0),
                ("steps", 9.0),
                ("loss", 2.0),
                ("validation_step", 4.0),
                ("validation_loss", 2.5),
            ]),
            event(&[
                ("step", 6.0),
                ("steps", 9.0),
                ("loss", 1.5),
                ("validation_step", 4.0),
                ("validation_loss", 2.5),
            ]),
        ];
        let report = from_events(&first);
        assert_eq!((report.steps, report.planned_steps), (6, 9));
        assert_eq!(report.points.iter().map(|p| p.step).collect::<Vec<_>>(), [2, 5, 6]);
        assert_eq!(report.validations.len(), 1);
        assert_eq!((report.validations[0].step, report.validations[0].loss), (4, 2.5));
        // Taken up from the checkpoint of update 4.
        let mut again = first.to_vec();
        again.push(event(&[("step", 5.0), ("steps", 9.0), ("loss", 2.0)]));
        let report = from_events(&again);
        assert_eq!(report.points.iter().map(|p| p.step).collect::<Vec<_>>(), [2, 5]);
        again.push(event(&[("step", 0.0), ("steps", 3.0)]));
        assert!(from_events(&again).points.is_empty());
        assert!(from_events(&again).validations.is_empty());
    }
}
