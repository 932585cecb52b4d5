//! Head-only tuning: nothing of the base is trained; a task's head, which the training adds, is all.

use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup};
use crate::error::Result;
use crate::methods::Card;
use crate::proto::v1;
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "head_only",
    title: "Head only",
    verb: "adapt",
    summary: "Trains a new head on the states of the base, which stays.",
    paper: "none: the usual way, to compare with",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

impl Adapt for v1::HeadOnly {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {}

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn check(&self, _: &Shapes) -> Result<Cost> {
        Ok(Cost::default())
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        Ok(Tuned::new(0.0, setup.random.path()))
    }

    fn hooks(&self, _: &Tuned, _: u64) -> Result<Option<Box<dyn Hooks>>> {
        Ok(None)
    }

    fn finish(&self, tuned: Tuned) -> Result<Tuned> {
        Ok(tuned)
    }
}
