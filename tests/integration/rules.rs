//! Recipes that make no sense, as a client meets them: refused with the place, or warned of in the plan and in
//! the report.

use planish::proto::v1;
use serde_json::{Value, json};
use tonic::Code;

use crate::harness::{Service, assert_error, response};
use crate::support;

fn request(recipe: Value, validate_only: bool) -> v1::RunRecipeRequest {
    v1::RunRecipeRequest {
        model: "models/tiny/versions/1".into(),
        recipe: Some(serde_json::from_value(recipe).unwrap()),
        validate_only,
        ..Default::default()
    }
}

fn found(warnings: &[v1::RecipeWarning]) -> Vec<(&str, &str)> {
    let lasting = warnings.iter().filter(|w| w.rule != "no_latency");
    lasting.map(|w| (w.rule.as_str(), w.field.as_str())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn senseless_recipes_are_refused_or_warned_of() {
    let service = Service::start().await;
    let files = tempfile::tempdir().unwrap();
    service.import("tiny", &support::tiny_model(files.path(), 2, 64)).await;
    service.dataset("text", &"All that is gold does not glitter. ".repeat(60)).await.unwrap();

    // Rounded weights stay as they are, also in normal floats.
    let order = json!({ "steps": [{ "normal_float": {} }, { "magnitude": {} }] });
    for validate_only in [true, false] {
        let refused = service.jobs().run_recipe(request(order.clone(), validate_only)).await;
        let place = "recipe.steps[1].magnitude";
        assert_error(refused, Code::InvalidArgument, "INVALID_RECIPE", place);
    }
    let comparison = v1::CompareRequest {
        comparison: Some(
            serde_json::from_value(json!({
                "model": "models/tiny",
                "arms": [{ "name": "a", "steps": order["steps"] }],
            }))
            .unwrap(),
        ),
        validate_only: true,
        ..Default::default()
    };
    let refused = service.jobs().compare(comparison.clone()).await;
    let place = "comparison.arms[0].steps[1].magnitude";
    assert_error(refused, Code::InvalidArgument, "INVALID_RECIPE", place);

    // A pruning that finds nothing, on the text that is measured: said before and after.
    let share = |share: f64| json!({ "magnitude": { "sparsity": { "share": share } } });
    let calibration = json!({ "dataset": "datasets/text", "sequences": 2, "sequence_length": 16 });
    let wanda = json!({ "wanda": { "sparsity": { "share": 0.5 }, "calibration": calibration } });
    let doubtful = json!({
        "steps": [share(0.6), wanda],
        "evaluation": { "dataset": "datasets/text", "context": 16, "max_tokens": 64 },
    });
    let expected = [("undone", "recipe.steps[1].wanda"), ("measured_on", "recipe.steps[1].wanda")];
    let checked = service.jobs().run_recipe(request(doubtful.clone(), true)).await.unwrap();
    let plan: v1::RecipePlan = response(checked.into_inner());
    assert_eq!(found(&plan.warnings), expected);
    assert!(plan.warnings.iter().all(|warning| warning.message.contains("; ")));
    let started = service.jobs().run_recipe(request(doubtful, false)).await.unwrap().into_inner();
    let report: v1::RecipeReport = response(service.finished(&started.name).await);
    assert_eq!(report.warnings, plan.warnings);

    // The other way round there is nothing to say.
    let sound = json!({ "steps": [share(0.5), share(0.6)] });
    let checked = service.jobs().run_recipe(request(sound.clone(), true)).await.unwrap();
    let plan: v1::RecipePlan = response(checked.into_inner());
    assert!(found(&plan.warnings).is_empty(), "{:?}", plan.warnings);
    let arms = json!({
        "model": "models/tiny/versions/1",
        "arms": [
            { "name": "sound", "steps": sound["steps"] },
            { "name": "idle", "steps": [share(0.6), share(0.5)] },
        ],
    });
    let comparison = v1::CompareRequest {
        comparison: Some(serde_json::from_value(arms).unwrap()),
        ..comparison
    };
    let checked = service.jobs().compare(comparison).await.unwrap().into_inner();
    let plan: v1::ComparisonPlan = response(checked);
    assert_eq!(found(&plan.warnings), [("undone", "comparison.arms[1].steps[1].magnitude")]);
    service.running.stop().await.unwrap();
}
