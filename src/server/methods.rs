//! The catalogue of methods.

use tonic::{Request, Response, Status};

use super::paging::Page;
use crate::error::{Error, Reason, Result};
use crate::methods::{Card, docs, registry};
use crate::proto::v1;
use crate::proto::v1::method_service_server::MethodService;

const VERBS: &[&str] = &["compress", "adapt", "merge", "experts", "distil", "subnet"];

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
    registry::cards().into_iter().find(|card| card.name == id).map(method).ok_or_else(|| {
        Error::new(Reason::ResourceNotFound, "no such method; ListMethods lists all")
    })
}

fn list(request: &v1::ListMethodsRequest) -> Result<v1::ListMethodsResponse> {
    let verb = request.verb.as_str();
    if !verb.is_empty() && !VERBS.contains(&verb) {
        return Err(Error::field("verb", format!("'{verb}' is none of {}", VERBS.join(", "))));
    }
    let scope = ["methods", verb];
    let page = Page::parse(request.page_size, &request.page_token, &scope)?;
    let mut cards = registry::cards();
    cards.sort_unstable_by_key(|card| card.name);
    let mut cards: Vec<_> = cards
        .into_iter()
        .filter(|card| verb.is_empty() || card.verb == verb)
        .filter(|card| page.after.as_deref().is_none_or(|after| card.name > after))
        .collect();
    let next_page_token = page.cut(&mut cards, &scope, |card| card.name.to_owned());
    Ok(v1::ListMethodsResponse {
        methods: cards.into_iter().map(method).collect(),
        next_page_token,
    })
}

fn method(card: &'static Card) -> v1::Method {
    let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    let mut needs = Vec::new();
    if card.needs_calibration {
        needs.push(v1::MethodNeed::Calibration.into());
    }
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
    }
}
