//! The methods that tune, one row each.

use super::Adapt;
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::proto::v1::{self, adaptation};

macro_rules! rows {
    ($($variant:ident: $message:ident),+ $(,)?) => {
        /// The method of an adaptation; an empty one is an invalid recipe.
        pub fn method(adaptation: &v1::Adaptation) -> Result<&dyn Adapt> {
            match &adaptation.method {
                $(Some(adaptation::Method::$variant(method)) => Ok(method),)+
                None => Err(Error::new(
                    Reason::InvalidRecipe,
                    format!("the adaptation names no method; choose one of {}", names()),
                )),
            }
        }

        /// The same with every default written out that does not depend on the model.
        pub fn resolve(adaptation: &v1::Adaptation) -> v1::Adaptation {
            let mut adaptation = adaptation.clone();
            match &mut adaptation.method {
                $(Some(adaptation::Method::$variant(method)) => method.resolve(),)+
                None => {}
            }
            adaptation
        }

        /// The cards of all methods that tune, by name.
        pub fn cards() -> Vec<&'static Card> {
            let mut cards = vec![$(v1::$message::default().card()),+];
            cards.sort_by_key(|card| card.name);
            cards
        }
    };
}

rows![
    Lora: Lora,
    Qlora: Qlora,
    Adalora: Adalora,
    Dora: Dora,
    Pissa: Pissa,
    LoraXs: LoraXs,
    LoraSb: LoraSb,
    Loldu: Loldu,
    Nola: Nola,
    Sora: Sora,
    Corda: Corda,
    Full: FullTuning,
    HeadOnly: HeadOnly,
    Bitfit: BitFit,
];

fn names() -> String {
    cards().iter().map(|card| card.name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::docs;

    #[test]
    fn every_method_of_the_api_has_a_card() {
        let mut fields = docs::adaptations();
        fields.sort();
        assert_eq!(fields, cards().iter().map(|c| c.name.to_owned()).collect::<Vec<_>>());
        assert!(method(&v1::Adaptation::default()).err().unwrap().message().contains("lora_sb"));
    }

    #[test]
    fn resolving_twice_changes_nothing() {
        for name in docs::adaptations() {
            let json = serde_json::json!({ name.clone(): {} });
            let adaptation: v1::Adaptation = serde_json::from_value(json).unwrap();
            assert_eq!(method(&adaptation).unwrap().card().name, name);
            let once = resolve(&adaptation);
            assert_eq!(resolve(&once), once, "{name}");
        }
    }

    #[test]
    fn options_are_documented() {
        for name in docs::adaptations() {
            for option in docs::options(&name) {
                assert!(!option.description.is_empty(), "{name}: {}", option.name);
                assert!(!option.kind.contains("message"), "{name}: {option:?}");
            }
        }
    }
}
