//! Long work: recipes, evaluations, and the watching of both.

use std::collections::BTreeSet;
use std::sync::Arc;

use prost::Message as _;
use serde_json::Value;
use tonic::{Request, Response, Status};

use super::State;
use super::download::Messages;
use super::{adaptations, check, comparisons, convert, operations, trainings};
use crate::error::{Error, Reason, Result};
use crate::models::{encoder, lstm, two_tower, vision};
use crate::proto::google::longrunning::Operation;
use crate::proto::v1;
use crate::proto::v1::job_service_server::JobService;
use crate::recipe;
use crate::recipe::adapt::Learner;
use crate::store::datasets::DatasetKind;
use crate::store::models::VersionRow;
use crate::store::names;
use crate::store::operations::{Kind, NewOperation};
use crate::{eval, jobs, methods};

/// Longest window of an evaluation; beyond it memory, not the model, is the limit.
const MAX_CONTEXT: u32 = 1 << 20;

pub struct Jobs(pub Arc<State>);

#[tonic::async_trait]
impl JobService for Jobs {
    async fn run_recipe(
        &self,
        request: Request<v1::RunRecipeRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let fingerprint = request.encode_to_vec();
        check::request_id(&request.request_id)?;
        if let Some(known) =
            self.0.repeated(Kind::Recipe, &request.request_id, &fingerprint).await?
        {
            return Ok(known);
        }
        let given = request.recipe.take().ok_or_else(|| Error::field("recipe", "missing"))?;
        check::display_name("recipe.display_name", &given.display_name)?;
        let row = self.0.store.version(&request.model).await?;
        let info = self.0.store.version_info(&row).await?;
        if let Some(evaluation) = &given.evaluation {
            check_evaluation("recipe.evaluation", evaluation)?;
        }
        let (given, plan) = super::blocking(move || {
            let plan = recipe::check(&given, &info).map_err(|e| e.within("recipe"))?;
            Ok((given, plan))
        })
        .await?;
        self.check_datasets(&given).await?;
        if request.validate_only {
            let warnings =
                jobs::warnings::of_recipe(&self.0.store, &given, plan.warnings, &row).await?;
            let plan = v1::RecipePlan {
                recipe: Some(given),
                warnings,
                steps: plan.steps.iter().map(estimate).collect(),
                total: Some(estimate(&plan.total)),
            };
            return Ok(Response::new(convert::validated("recipe", row.name(), &plan)));
        }
        // The newest version may be another one by the time the job runs.
        request.model = row.name();
        request.recipe = Some(given);
        self.submit(Kind::Recipe, row.name(), &request, &request.request_id, fingerprint).await
    }

    async fn adapt(
        &self,
        request: Request<v1::AdaptRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let fingerprint = request.encode_to_vec();
        check::request_id(&request.request_id)?;
        let known = self.0.repeated(Kind::Adapt, &request.request_id, &fingerprint).await?;
        if let Some(known) = known {
            return Ok(known);
        }
        let (base, plan) = adaptations::check(&self.0, &request).await?;
        if request.validate_only {
            return Ok(Response::new(convert::validated("adapt", base, &plan)));
        }
        // The newest version may be another one by the time the job runs.
        request.model.clone_from(&base);
        request.adaptation = plan.adaptation;
        request.training = plan.training;
        self.submit(Kind::Adapt, base, &request, &request.request_id, fingerprint).await
    }

    async fn evaluate(
        &self,
        request: Request<v1::EvaluateRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let fingerprint = request.encode_to_vec();
        check::request_id(&request.request_id)?;
        if let Some(known) =
            self.0.repeated(Kind::Evaluate, &request.request_id, &fingerprint).await?
        {
            return Ok(known);
        }
        let evaluation = request.evaluation.clone().unwrap_or_default();
        check_evaluation("evaluation", &evaluation)?;
        self.check_datasets(&evaluation).await.map_err(|e| e.within("evaluation"))?;
        let row = self.0.store.version(&request.model).await?;
        self.check_subject(&row, &evaluation, &request.adapter).await?;
        if let Some(norms) = &evaluation.norm_bounds
            && !norms.adapter.is_empty()
        {
            let at =
                |e: Error| Error::at(e.reason(), "evaluation.norm_bounds.adapter", e.message());
            self.0.store.adapter(names::adapter(&norms.adapter).map_err(at)?).await.map_err(at)?;
        }
        if evaluation.compare_with_base {
            if request.base.is_empty() {
                return Err(Error::field("base", "missing; compare_with_base needs it").into());
            }
            request.base = self.0.store.version(&request.base).await?.name();
        } else if !request.base.is_empty() {
            return Err(Error::field("base", "given without evaluation.compare_with_base").into());
        }
        request.model = row.name();
        request.evaluation = Some(evaluation);
        if request.validate_only {
            let report = v1::EvaluationReport {
                version: row.name(),
                digest: row.digest,
                adapter: request.adapter,
                ..Default::default()
            };
            let target = report.version.clone();
            return Ok(Response::new(convert::validated("evaluate", target, &report)));
        }
        self.submit(Kind::Evaluate, row.name(), &request, &request.request_id, fingerprint).await
    }

    async fn compare(
        &self,
        request: Request<v1::CompareRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let fingerprint = request.encode_to_vec();
        check::request_id(&request.request_id)?;
        let known = self.0.repeated(Kind::Compare, &request.request_id, &fingerprint).await?;
        if let Some(known) = known {
            return Ok(known);
        }
        let given = request.comparison.take();
        let given = given.ok_or_else(|| Error::field("comparison", "missing"))?;
        let (comparison, estimates) =
            comparisons::check(&self.0, given).await.map_err(|e| e.within("comparison"))?;
        let target = comparison.model.clone();
        if request.validate_only {
            let plan = comparisons::plan(&self.0, "comparison", comparison, &estimates).await?;
            return Ok(Response::new(convert::validated("compare", target, &plan)));
        }
        request.comparison = Some(comparison);
        self.submit(Kind::Compare, target, &request, &request.request_id, fingerprint).await
    }

    async fn get_comparison(
        &self,
        request: Request<v1::GetComparisonRequest>,
    ) -> Result<Response<v1::ComparisonReport>, Status> {
        Ok(Response::new(comparisons::report(&self.0, &request.into_inner().name).await?))
    }

    async fn render_comparison(
        &self,
        request: Request<v1::RenderComparisonRequest>,
    ) -> Result<Response<v1::RenderComparisonResponse>, Status> {
        Ok(Response::new(comparisons::render(&self.0, request.into_inner()).await?))
    }

    async fn render_training(
        &self,
        request: Request<v1::RenderTrainingRequest>,
    ) -> Result<Response<v1::RenderTrainingResponse>, Status> {
        Ok(Response::new(trainings::render(&self.0, request.into_inner()).await?))
    }

    type WatchOperationStream = Messages<v1::WatchOperationResponse>;

    async fn watch_operation(
        &self,
        request: Request<v1::WatchOperationRequest>,
    ) -> Result<Response<Self::WatchOperationStream>, Status> {
        Ok(Response::new(operations::watch(self.0.clone(), request.into_inner()).await?))
    }
}

impl Jobs {
    async fn submit(
        &self,
        kind: Kind,
        target: String,
        request: &impl prost::Message,
        request_id: &str,
        fingerprint: Vec<u8>,
    ) -> Result<Response<Operation>, Status> {
        Ok(submit(&self.0, kind, target, request, request_id, fingerprint).await?)
    }

    async fn check_datasets(&self, message: &impl serde::Serialize) -> Result<()> {
        check_datasets(&self.0, message).await
    }

    /// Checks what only the model and the adapter can tell of an evaluation.
    async fn check_subject(
        &self,
        row: &VersionRow,
        evaluation: &v1::Evaluation,
        adapter: &str,
    ) -> Result<()> {
        let is_encoder = row.family == encoder::FAMILY;
        if is_encoder {
            eval::check_encoder(evaluation).map_err(|e| e.within("evaluation"))?;
        } else if matches!(row.family.as_str(), vision::FAMILY | lstm::FAMILY | two_tower::FAMILY) {
            let info = self.0.store.version_info(row).await?;
            eval::check_any(evaluation, &info).map_err(|e| e.within("evaluation"))?;
        } else {
            eval::nets::no_images(evaluation).map_err(|e| e.within("evaluation"))?;
        }
        let mut head = false;
        if !adapter.is_empty() {
            let at = |e: Error| Error::at(e.reason(), "adapter", e.message());
            let id = names::adapter(adapter).map_err(at)?;
            let adapter = self.0.store.adapter(id).await.map_err(at)?;
            jobs::evaluate::fits(&adapter, row)?;
            head = adapter.method == v1::AdapterMethod::Head;
        }
        let Some(task) = &evaluation.task else { return Ok(()) };
        if is_encoder && !head {
            return Err(Error::at(
                Reason::ModelUnsuitable,
                "adapter",
                "an encoder has no head for a task; name an adapter that was trained with one",
            ));
        }
        let place = "evaluation.task.dataset";
        let learner = Learner::of(is_encoder, false);
        comparisons::labelled(&self.0, learner, place, &task.dataset).await.map(|_| ())
    }
}

/// Puts a checked request into the queue.
pub(super) async fn submit(
    state: &State,
    kind: Kind,
    target: String,
    request: &impl prost::Message,
    request_id: &str,
    fingerprint: Vec<u8>,
) -> Result<Response<Operation>> {
    let operation = NewOperation {
        kind,
        target,
        request: request.encode_to_vec(),
        request_id: request_id.to_owned(),
        fingerprint,
    };
    Ok(Response::new(convert::operation(state.jobs.submit(operation).await?)))
}

/// Checks that every data set that `message` names is there and of the kind that is needed: a job must
/// not find out at its end.
pub(super) async fn check_datasets(state: &State, message: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_value(message)
        .map_err(|e| Error::internal("a request has no json form").with_source(e))?;
    let mut found = BTreeSet::new();
    datasets("", &json, &mut found);
    for (field, name) in found {
        let at = |e: Error| Error::at(e.reason(), field.clone(), e.message());
        // What is learnt, and the tasks of what was, are of a kind that depends on the model.
        let ends = ["training.dataset", "validation.dataset", "task.dataset"];
        if ends.iter().any(|end| field.ends_with(end)) {
            state.store.dataset(names::dataset(&name).map_err(at)?).await.map_err(at)?;
            continue;
        }
        // What calibrates is text, or images where the model sees some; its step knows.
        if field.ends_with("calibration.dataset") {
            let row = state.store.dataset(names::dataset(&name).map_err(at)?).await.map_err(at)?;
            if row.kind == DatasetKind::Images {
                continue;
            }
        }
        // The one place in the API that wants questions is called `choice`.
        let kind = if field.ends_with("choice.dataset") {
            DatasetKind::Choices
        } else if field.ends_with("images.dataset") {
            DatasetKind::Images
        } else {
            DatasetKind::Text
        };
        state.store.of_kind(names::dataset(&name).map_err(at)?, kind).await.map_err(at)?;
    }
    Ok(())
}

/// Path and value of every field called `dataset`, whatever message it is in: a new method's options
/// are covered without a word here.
fn datasets(path: &str, value: &Value, found: &mut BTreeSet<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                match value {
                    Value::String(dataset) if name == "dataset" => {
                        found.insert((path, dataset.clone()));
                    }
                    _ => datasets(&path, value, found),
                }
            }
        }
        Value::Array(values) => {
            for (index, value) in values.iter().enumerate() {
                datasets(&format!("{path}[{index}]"), value, found);
            }
        }
        _ => {}
    }
}

pub(super) fn check_evaluation(field: &str, evaluation: &v1::Evaluation) -> Result<()> {
    let at = |name: &str, problem: String| Err(Error::field(format!("{field}.{name}"), problem));
    let context = evaluation.context.unwrap_or(512);
    if !(2..=MAX_CONTEXT).contains(&context) {
        return at("context", format!("{context} is outside 2 to {MAX_CONTEXT}"));
    }
    let stride = evaluation.stride.unwrap_or(context);
    if !(1..=context).contains(&stride) {
        return at("stride", format!("{stride} is outside 1 to the context, {context}"));
    }
    if let Some(tokens @ 1..) = evaluation.max_tokens
        && tokens < context
    {
        return at(
            "max_tokens",
            format!("{tokens} is less than a window of {context}; 0 takes all"),
        );
    }
    if evaluation.compare_with_base && evaluation.dataset.is_empty() {
        return at("dataset", "missing; compare_with_base needs a text".to_owned());
    }
    if let Some(norms) = &evaluation.norm_bounds {
        eval::norms::check(norms, usize::MAX)
            .map_err(|e| e.within(&format!("{field}.norm_bounds")))?;
    }
    Ok(())
}

fn estimate(estimate: &methods::Estimate) -> v1::Estimate {
    v1::Estimate {
        weight_bytes: convert::signed(estimate.weight_bytes),
        memory_bytes: convert::signed(estimate.memory_bytes),
        seconds: estimate.seconds,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datasets_are_found_wherever_they_are() {
        let recipe = v1::Recipe {
            steps: vec![
                v1::Step::default(),
                v1::Step {
                    method: Some(v1::step::Method::Wanda(v1::Wanda {
                        calibration: Some(v1::Calibration {
                            dataset: "datasets/a".into(),
                            ..Default::default()
                        }),
                        ..Default::default()
                    })),
                },
            ],
            evaluation: Some(v1::Evaluation { dataset: "datasets/b".into(), ..Default::default() }),
            ..Default::default()
        };
        let mut found = BTreeSet::new();
        datasets("", &serde_json::to_value(&recipe).unwrap(), &mut found);
        let found: Vec<_> = found.iter().map(|(f, d)| (f.as_str(), d.as_str())).collect();
        let expected = [
            ("evaluation.dataset", "datasets/b"),
            ("steps[1].wanda.calibration.dataset", "datasets/a"),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn evaluations_are_checked() {
        let good = v1::Evaluation { context: Some(64), stride: Some(32), ..Default::default() };
        check_evaluation("e", &good).unwrap();
        check_evaluation("e", &v1::Evaluation::default()).unwrap();
        for (field, bad) in [
            ("e.context", v1::Evaluation { context: Some(1), ..good.clone() }),
            ("e.stride", v1::Evaluation { stride: Some(65), ..good.clone() }),
            ("e.stride", v1::Evaluation { stride: Some(0), ..good.clone() }),
            ("e.max_tokens", v1::Evaluation { max_tokens: Some(63), ..good.clone() }),
            ("e.dataset", v1::Evaluation { compare_with_base: true, ..good.clone() }),
        ] {
            let error = check_evaluation("e", &bad).unwrap_err();
            assert_eq!(error.violations()[0].field, field);
        }
    }
}
