//! What the arms of a comparison share, written into each of them.

use std::collections::BTreeSet;

use prost::Message as _;

use super::{bad, check_name};
use crate::error::{Error, Result};
use crate::proto::v1;

const MAX_TASKS: usize = 16;

/// The same comparison without tasks and without a training of its own: arms that tune are there once for
/// each task, and each has all of its training. Expanding that again changes nothing.
///
/// # Errors
/// INVALID_RECIPE and INVALID_FIELD for tasks without a proper name of their own, and for arms that name a
/// task that is none.
pub fn expand(comparison: &v1::Comparison) -> Result<v1::Comparison> {
    let mut out = comparison.clone();
    let (shared, tasks) = (out.training.take(), std::mem::take(&mut out.tasks));
    if tasks.len() > MAX_TASKS {
        return Err(bad("tasks", format!("{} tasks; at most {MAX_TASKS}", tasks.len())));
    }
    let mut names = BTreeSet::new();
    for (i, task) in tasks.iter().enumerate() {
        let place = format!("tasks[{i}]");
        check_name(&task.name).map_err(|e| e.within(&place))?;
        if !names.insert(task.name.as_str()) {
            let problem = format!("'{}' is taken; names of tasks are unique", task.name);
            return Err(bad(format!("{place}.name"), problem));
        }
    }
    let mut arms = Vec::with_capacity(out.arms.len());
    for (i, arm) in out.arms.into_iter().enumerate() {
        let Some(mut tuning) = arm.tuning.clone() else {
            arms.push(arm);
            continue;
        };
        let own = std::mem::take(&mut tuning.tasks);
        if let Some(name) = own.iter().find(|name| !names.contains(name.as_str())) {
            let problem = format!("'{}' is no task of the comparison", name.escape_debug());
            return Err(Error::field(format!("arms[{i}].tuning.tasks"), problem));
        }
        let particular = arm.evaluation.as_ref().is_some_and(|e| e.task.is_some());
        let mut chosen =
            tasks.iter().filter(|task| own.is_empty() || own.contains(&task.name)).peekable();
        if particular || chosen.peek().is_none() {
            tuning.training = layered([shared.as_ref(), tuning.training.as_ref()])?;
            arms.push(v1::Arm { tuning: Some(tuning), ..arm });
            continue;
        }
        for task in chosen {
            let layers = [shared.as_ref(), task.training.as_ref(), tuning.training.as_ref()];
            let evaluation = arm.evaluation.clone().or_else(|| out.evaluation.clone());
            arms.push(v1::Arm {
                name: format!("{}-{}", arm.name, task.name),
                display_name: match arm.display_name.as_str() {
                    "" => String::new(),
                    line => format!("{line}, {}", task.name),
                },
                evaluation: Some(v1::Evaluation {
                    task: task.evaluation.clone(),
                    ..evaluation.unwrap_or_default()
                }),
                tuning: Some(v1::Tuning { training: layered(layers)?, ..tuning.clone() }),
                ..arm.clone()
            });
        }
    }
    out.arms = arms;
    Ok(out)
}

/// Trainings one over the other: what a later one gives goes before.
fn layered<const N: usize>(layers: [Option<&v1::Training>; N]) -> Result<Option<v1::Training>> {
    let mut all: Option<v1::Training> = None;
    for layer in layers.into_iter().flatten() {
        let below = all.get_or_insert_default();
        // One of these stands for both.
        if layer.steps.is_some() {
            below.epochs = None;
        }
        if layer.epochs.is_some() {
            below.steps = None;
        }
        if layer.warmup_steps.is_some() {
            below.warmup_share = None;
        }
        if layer.warmup_share.is_some() {
            below.warmup_steps = None;
        }
        if let (Some(below), Some(over)) = (&mut below.validation, &layer.validation) {
            if !over.dataset.is_empty() {
                below.share = None;
            }
            if over.share.is_some() {
                below.dataset.clear();
            }
        }
        // Fields that are given take the place of others, as of one message that is sent in two parts.
        below
            .merge(layer.encode_to_vec().as_slice())
            .map_err(|e| Error::internal("a training cannot be read again").with_source(e))?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn example() -> v1::Comparison {
        serde_json::from_value(json!({
            "training": { "epochs": 3.0, "batch_size": 16, "validation": { "share": 0.1 } },
            "tasks": [
                { "name": "a", "training": { "dataset": "datasets/a" },
                  "evaluation": { "dataset": "datasets/a-test" } },
                { "name": "b", "training": { "dataset": "datasets/b", "learning_rate": 0.1 } },
            ],
            "evaluation": { "counts": true },
            "arms": [
                { "name": "lora", "display_name": "LoRA",
                  "tuning": { "adaptation": { "lora": {} }, "training": { "learning_rate": 0.2 } } },
                { "name": "short",
                  "tuning": { "adaptation": { "lora": {} }, "training": { "steps": 5 }, "tasks": ["b"] } },
                { "name": "own", "evaluation": { "task": { "dataset": "datasets/c-test" } },
                  "tuning": { "adaptation": { "lora": {} }, "training": { "dataset": "datasets/c" } } },
                { "name": "pruned", "steps": [{ "magnitude": {} }] },
            ],
        }))
        .expect("a comparison")
    }

    #[test]
    fn arms_stand_for_each_task_with_the_whole_training() {
        let out = expand(&example()).expect("expands");
        let names: Vec<_> = out.arms.iter().map(|arm| arm.name.as_str()).collect();
        assert_eq!(names, ["lora-a", "lora-b", "short-b", "own", "pruned"]);
        assert_eq!(out.arms[1].display_name, "LoRA, b");
        let training = |i: usize| {
            let tuning = out.arms[i].tuning.clone().expect("a tuning");
            tuning.training.expect("a training")
        };
        assert_eq!(training(0).dataset, "datasets/a");
        assert_eq!((training(0).epochs, training(0).batch_size), (Some(3.0), Some(16)));
        // The arm goes before the task, the task before the comparison.
        assert_eq!(training(1).learning_rate, Some(0.2));
        assert_eq!(training(2).learning_rate, Some(0.1));
        assert_eq!((training(2).epochs, training(2).steps), (None, Some(5)));
        assert_eq!(training(3).dataset, "datasets/c");
        assert_eq!(training(3).validation.expect("shared").share, Some(0.1));
        let evaluation = out.arms[0].evaluation.clone().expect("one");
        assert!(evaluation.counts, "the comparison's evaluation, with the task's records");
        assert_eq!(evaluation.task.expect("a task").dataset, "datasets/a-test");
        assert!(out.arms[4].evaluation.is_none());
        assert!(out.tasks.is_empty() && out.training.is_none());
        assert_eq!(expand(&out).expect("expands"), out);
    }

    #[test]
    fn wrong_tasks_are_named() {
        type Change = fn(&mut v1::Comparison);
        let cases: [(Change, &str); 3] = [
            (|c| c.tasks[1].name = "a".into(), "tasks[1].name"),
            (|c| c.tasks[0].name = "A".into(), "tasks[0].name"),
            (
                |c| c.arms[1].tuning.as_mut().expect("one").tasks.push("c".into()),
                "arms[1].tuning.tasks",
            ),
        ];
        for (change, field) in cases {
            let mut bad = example();
            change(&mut bad);
            assert_eq!(expand(&bad).unwrap_err().violations()[0].field, field);
        }
    }
}
