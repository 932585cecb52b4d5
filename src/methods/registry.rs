//! All methods, one row each.

use super::{Card, Method};
use crate::error::{Error, Reason, Result};
use crate::proto::v1::{self, step};

macro_rules! rows {
    ($($variant:ident: $message:ident),+ $(,)?) => {
        /// The method of a step; an empty step is an invalid recipe.
        pub fn method(step: &v1::Step) -> Result<&dyn Method> {
            match &step.method {
                $(Some(step::Method::$variant(method)) => Ok(method),)+
                None => Err(Error::new(
                    Reason::InvalidRecipe,
                    format!("the step names no method; choose one of {}", names()),
                )),
            }
        }

        /// The same step with every default written out, as the lineage keeps it.
        pub fn resolve(step: &v1::Step) -> v1::Step {
            let mut step = step.clone();
            match &mut step.method {
                $(Some(step::Method::$variant(method)) => method.resolve(),)+
                None => {}
            }
            step
        }

        /// The cards of all methods, by name.
        pub fn cards() -> Vec<&'static Card> {
            let mut cards = vec![$(v1::$message::default().card()),+];
            cards.sort_by_key(|card| card.name);
            cards
        }
    };
}

rows![
    Magnitude: Magnitude,
    Wanda: Wanda,
    Sparsegpt: SparseGpt,
    RoundToNearest: RoundToNearest,
    Gptq: Gptq,
    Dsnot: Dsnot,
    Ecoflap: Ecoflap,
    Cfsp: Cfsp,
    MagSp: MagSp,
    WandaSp: WandaSp,
    Flap: Flap,
    Lrec: Lrec,
    Awq: Awq,
    LowRank: LowRank,
    Dgq: Dgq,
    NormalFloat: NormalFloat,
    GroupSparse: GroupSparse,
    RandomPruning: RandomPruning,
    Initialise: Initialise,
    Train: Train,
    Gradual: Gradual,
];

/// The card called `name`.
pub fn card(name: &str) -> Result<&'static Card> {
    cards().into_iter().find(|card| card.name == name).ok_or_else(|| {
        Error::not_found(&format!("methods/{name}"), &format!("the methods are {}", names()))
    })
}

fn names() -> String {
    cards().iter().map(|card| card.name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::docs;

    #[test]
    fn every_step_of_the_api_has_a_card_and_every_followed_method_exists() {
        let mut fields = docs::methods();
        fields.sort();
        let cards = cards();
        assert_eq!(fields, cards.iter().map(|c| c.name.to_owned()).collect::<Vec<_>>());
        for card in &cards {
            for next in card.followed_by {
                assert!(fields.iter().any(|f| f == next), "{} is followed by {next}", card.name);
            }
        }
    }

    #[test]
    fn an_empty_step_is_refused_and_unknown_names_list_the_known() {
        let error = method(&v1::Step::default()).err().expect("no method");
        assert_eq!(error.reason(), Reason::InvalidRecipe);
        assert!(error.message().contains("wanda"));
        assert!(card("wando").unwrap_err().message().contains("sparsegpt"));
    }

    #[test]
    fn resolving_twice_changes_nothing() {
        for message in [
            step::Method::Magnitude(v1::Magnitude::default()),
            step::Method::Wanda(v1::Wanda::default()),
            step::Method::Sparsegpt(v1::SparseGpt::default()),
            step::Method::RoundToNearest(v1::RoundToNearest::default()),
            step::Method::Gptq(v1::Gptq::default()),
            step::Method::Dsnot(v1::Dsnot::default()),
            step::Method::Ecoflap(v1::Ecoflap::default()),
            step::Method::Cfsp(v1::Cfsp::default()),
            step::Method::MagSp(v1::MagSp::default()),
            step::Method::WandaSp(v1::WandaSp::default()),
            step::Method::Flap(v1::Flap::default()),
            step::Method::Lrec(v1::Lrec::default()),
            step::Method::Awq(v1::Awq::default()),
            step::Method::LowRank(v1::LowRank::default()),
            step::Method::Dgq(v1::Dgq::default()),
            step::Method::NormalFloat(v1::NormalFloat::default()),
            step::Method::GroupSparse(v1::GroupSparse::default()),
            step::Method::RandomPruning(v1::RandomPruning::default()),
            step::Method::Initialise(v1::Initialise::default()),
            step::Method::Train(v1::Train::default()),
            step::Method::Gradual(v1::Gradual::default()),
        ] {
            let step = v1::Step { method: Some(message) };
            let once = resolve(&step);
            assert_ne!(once, step);
            assert_eq!(resolve(&once), once);
        }
    }
}
