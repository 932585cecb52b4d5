//! Every method that compresses, cancelled in the middle of its work, through the queue.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::error::Reason;
use crate::jobs::testing::{HeldInStep, Service};
use crate::methods::{Card, docs, registry};
use crate::models::decoder::random;
use crate::models::{AnyModel, encoder};
use crate::proto::v1;
use crate::store::operations::State;

/// A step whose options suit tiny models.
fn step(card: &Card) -> v1::Step {
    let mut options = json!({});
    for option in docs::options(card.name) {
        let value = match option.name.as_str() {
            "calibration.sequences" | "text.sequences" | "n_data" => 6,
            "calibration.sequence_length" | "text.sequence_length" | "data_length" => 24,
            "grid.group_size" => 16,
            "round_to" => 8,
            "group" if card.name == "dgq" => 32,
            "drop" => 12,
            _ => continue,
        };
        let place = option.name.split('.').fold(&mut options, |place, key| {
            if place.is_null() {
                *place = json!({});
            }
            &mut place[key]
        });
        *place = json!(value);
    }
    serde_json::from_value(json!({ card.name: options })).unwrap()
}

fn model(family: &str) -> AnyModel {
    let wide = |mut config: Value| {
        config["intermediate_size"] = json!(96);
        config
    };
    match family {
        "decoder" => random::model(wide(random::tiny("llama")), 1).unwrap().into(),
        _ => encoder::random::model(wide(encoder::random::tiny()), 1).unwrap().into(),
    }
}

/// Files below a folder.
fn files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files(&path) } else { 1 }).sum()
}

#[tokio::test]
async fn every_method_that_is_cancelled_in_the_middle_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (at, seen) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (tell, mut held) = tokio::sync::mpsc::unbounded_channel();
    let work = HeldInStep { at: at.clone(), seen: seen.clone(), tell };
    let service = Service::start(folder.path(), work).await;
    let mut walked = 0;
    for card in registry::cards().into_iter().filter(|card| card.verb == "compress") {
        for family in card.families.iter().filter(|family| ["decoder", "encoder"].contains(family))
        {
            let what = format!("{} of a {family}", card.name);
            let base = service.keep(&format!("m{walked}"), model(family)).await;
            let recipe = v1::Recipe { seed: 3, steps: vec![step(card)], ..Default::default() };
            walked += 1;

            // Once to the end, to know what the middle is.
            at.store(usize::MAX, Ordering::Relaxed);
            let whole = service.run_recipe(&base, recipe.clone()).await;
            let whole = service.end(&whole).await;
            assert_eq!(whole.state, State::Succeeded, "{what}: {:?}", whole.error);
            let said = seen.load(Ordering::Relaxed);
            assert!(said >= 2, "{what} said {said} words");
            let kept = files(&folder.path().join("objects"));

            at.store(said.div_ceil(2), Ordering::Relaxed);
            let cut = service.run_recipe(&base, v1::Recipe { seed: 4, ..recipe }).await;
            let wait = tokio::time::timeout(Duration::from_secs(60), held.recv()).await;
            assert_eq!(wait, Ok(Some(())), "{what} was never in the middle");
            service.jobs.cancel(&cut.id).await.unwrap();
            let cut = service.end(&cut).await;
            assert_eq!(cut.state, State::Cancelled, "{what}");
            assert_eq!(cut.error.unwrap().reason(), Reason::Cancelled, "{what}");
            assert_eq!(cut.versions, [""; 0], "{what}");
            let next = format!("models/m{}/versions/3", walked - 1);
            let missing = service.store.version(&next).await.expect_err("no version");
            assert_eq!(missing.reason(), Reason::ResourceNotFound, "{what}");
            assert_eq!(files(&folder.path().join("scratch")), 0, "{what} left files");
            for place in ["jobs", "kept"] {
                let left = std::fs::read_dir(folder.path().join("scratch").join(place)).unwrap();
                assert_eq!(left.count(), 0, "{what} left a folder in {place}");
            }
            assert_eq!(files(&folder.path().join("objects")), kept, "{what} left objects");
        }
    }
    assert!(walked > 25, "{walked}");
}
