//! The catalogue of methods.

use tonic::{Request, Response, Status};

use super::convert;
use super::paging::Page;
use crate::error::{Error, Reason, Result};
use crate::methods::catalogue::{self, DataNeed, Entry, Family, Gain, NOTHING, Tuning};
use crate::methods::{Card, docs};
use crate::proto::v1;
use crate::proto::v1::method_service_server::MethodService;

/// Needs no state: the catalogue is part of the program.
pub struct Methods;

#[tonic::async_trait]
impl MethodService for Methods {
    async fn get_method(
        &self,
        request: Request<v1::GetMethodRequest>,
    ) -> Result<Response<v1::Method>, Status> {
        Ok(Response::new(get(&request.into_inner().name)?))
    }

    async fn list_methods(
        &self,
        request: Request<v1::ListMethodsRequest>,
    ) -> Result<Response<v1::ListMethodsResponse>, Status> {
        Ok(Response::new(list(&request.into_inner())?))
    }
}

fn get(name: &str) -> Result<v1::Method> {
    let id = name.strip_prefix("methods/").ok_or_else(|| {
        Error::at(Reason::InvalidName, "name", "not of the form methods/{method}; check the name")
    })?;
    let found = catalogue::all().into_iter().find(|(card, _)| card.name == id);
    found.map(|(card, entry)| method(card, entry)).ok_or_else(|| {
        Error::new(Reason::ResourceNotFound, "no such method; ListMethods lists all")
    })
}

fn list(request: &v1::ListMethodsRequest) -> Result<v1::ListMethodsResponse> {
    let verbs = catalogue::verbs();
    let gains: Vec<&str> = Gain::WORDS.iter().copied().chain([NOTHING]).collect();
    let filters: [(&str, &str, &[&str]); 5] = [
        ("verb", &request.verb, &verbs),
        ("family", &request.family, Family::WORDS),
        ("tuning", &request.tuning, Tuning::WORDS),
        ("data_need", &request.data_need, DataNeed::WORDS),
        ("speeds_up", &request.speeds_up, &gains),
    ];
    for (field, value, known) in filters {
        if !value.is_empty() && !known.contains(&value) {
            let shown: String = value.chars().take(40).collect();
            let problem = format!("'{}' is none of {}", shown.escape_debug(), known.join(", "));
            return Err(Error::field(field, problem));
        }
    }
    let scope: Vec<&str> =
        std::iter::once("methods").chain(filters.map(|(_, value, _)| value)).collect();
    let page = Page::parse(request.page_size, &request.page_token, &scope)?;
    let accepts = |entry: &Entry| {
        let gains = entry.gains();
        filters.iter().all(|(field, wanted, _)| {
            wanted.is_empty()
                || match *field {
                    "verb" => entry.verb == *wanted,
                    "family" => entry.family.word() == *wanted,
                    "tuning" => entry.tuning.word() == *wanted,
                    "data_need" => entry.data.word() == *wanted,
                    _ => gains.contains(wanted),
                }
        })
    };
    let mut found = catalogue::all();
    found.retain(|(card, entry)| {
        accepts(entry) && page.after.as_deref().is_none_or(|after| card.name > after)
    });
    let next_page_token = page.cut(&mut found, &scope, |(card, _)| card.name.to_owned());
    Ok(v1::ListMethodsResponse {
        methods: found.into_iter().map(|(card, entry)| method(card, entry)).collect(),
        next_page_token,
    })
}

fn method(card: &'static Card, entry: &'static Entry) -> v1::Method {
    let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    let mut needs = Vec::new();
    if card.needs_calibration {
        needs.push(v1::MethodNeed::Calibration.into());
    }
    let (after, before) = catalogue::neighbours(card, entry);
    let cost = entry.cost;
    v1::Method {
        name: format!("methods/{}", card.name),
        display_name: card.title.to_owned(),
        description: card.summary.to_owned(),
        verb: card.verb.to_owned(),
        paper: card.paper.to_owned(),
        needs,
        families: owned(card.families),
        followed_by: owned(card.followed_by),
        options: docs::options(card.name)
            .into_iter()
            .map(|o| v1::MethodOption { name: o.name, r#type: o.kind, description: o.description })
            .collect(),
        family: entry.family.word().to_owned(),
        sub_family: entry.sub.to_owned(),
        data_need: entry.data.word().to_owned(),
        data_tokens: convert::signed(entry.data.tokens()),
        tuning: entry.tuning.word().to_owned(),
        changes: entry.changes.iter().map(|change| change.word().to_owned()).collect(),
        speeds_up: owned(&entry.gains()),
        kernel: entry.kernel.to_owned(),
        composes_after: owned(&after),
        composes_before: owned(&before),
        conflicts: entry
            .conflicts
            .iter()
            .map(|c| v1::MethodConflict { after: c.after.to_owned(), why: c.why.to_owned() })
            .collect(),
        scale_class: entry.scale.word().to_owned(),
        seed_paper: entry.seed_paper.to_owned(),
        cost: Some(v1::MethodCost {
            seconds_per_parameter: cost.parameter,
            seconds_per_parameter_and_token: cost.parameter_token,
            bytes_per_parameter: cost.parameter_bytes,
            bytes_per_token: cost.token_bytes,
            basis: cost.basis.word().to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(request: &v1::ListMethodsRequest) -> Vec<String> {
        list(request).unwrap().methods.into_iter().map(|m| m.name).collect()
    }

    #[test]
    fn filters_narrow_and_pages_stay_right_under_them() {
        let all = names(&v1::ListMethodsRequest::default());
        assert_eq!(all.len(), catalogue::entries().count());
        let filter = v1::ListMethodsRequest {
            family: "pruning".into(),
            data_need: "calibration".into(),
            speeds_up: "decode".into(),
            tuning: "free".into(),
            verb: "compress".into(),
            ..Default::default()
        };
        let whole = names(&filter);
        assert!(whole.contains(&"methods/wanda".into()) && !whole.contains(&"methods/gptq".into()));
        let (mut paged, mut request) = (Vec::new(), filter.clone());
        request.page_size = 2;
        loop {
            let page = list(&request).unwrap();
            assert!(page.methods.len() <= 2);
            paged.extend(page.methods.into_iter().map(|m| m.name));
            if page.next_page_token.is_empty() {
                break;
            }
            // A token belongs to its filters.
            let other = v1::ListMethodsRequest {
                page_token: page.next_page_token.clone(),
                tuning: "full".into(),
                ..request.clone()
            };
            assert_eq!(list(&other).unwrap_err().reason(), Reason::InvalidPageToken);
            request.page_token = page.next_page_token;
        }
        assert_eq!(paged, whole);
        let nothing = v1::ListMethodsRequest { speeds_up: NOTHING.into(), ..Default::default() };
        assert!(names(&nothing).contains(&"methods/lora".into()));
    }

    #[test]
    fn unknown_values_are_refused_with_what_there_is() {
        type Set = fn(&mut v1::ListMethodsRequest);
        let cases: [(&str, Set, &str); 5] = [
            ("verb", |r| r.verb = "dance".into(), "adapt, compress, train"),
            ("family", |r| r.family = "magic".into(), "quantisation, pruning"),
            ("tuning", |r| r.tuning = "heavy".into(), "free, light, full"),
            ("data_need", |r| r.data_need = "all".into(), "none, calibration, train, labels"),
            ("speeds_up", |r| r.speeds_up = "me\n".into(), "memory, prefill, decode, nothing"),
        ];
        for (field, set, known) in cases {
            let mut request = v1::ListMethodsRequest::default();
            set(&mut request);
            let error = list(&request).unwrap_err();
            assert_eq!(error.violations()[0].field, field);
            assert!(error.message().contains(known), "{error}");
        }
    }

    #[test]
    fn methods_that_tune_are_there_with_their_facts() {
        let lora = get("methods/lora").unwrap();
        assert_eq!((lora.verb.as_str(), lora.family.as_str()), ("adapt", "adaptation"));
        assert!(lora.composes_after.contains(&"gptq".into()) && lora.composes_before.is_empty());
        let gptq = get("methods/gptq").unwrap();
        assert_eq!((gptq.data_need.as_str(), gptq.data_tokens), ("calibration", 8192));
        assert!(gptq.conflicts.iter().any(|c| c.after == "quantisation" && !c.why.is_empty()));
        let cost = gptq.cost.unwrap();
        assert_eq!(cost.basis, "measured");
        assert!(cost.seconds_per_parameter > 0.0);
    }
}
