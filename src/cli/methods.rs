//! `planish methods`: the catalogue.

use clap::Subcommand;

use super::Context;
use super::error::Result;
use super::names::{resource, short};
use super::output::{self, facts, table};
use crate::proto::v1::{GetMethodRequest, ListMethodsRequest, Method, MethodNeed};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List methods
    List {
        /// Only this group: compress, adapt, merge, ...
        #[arg(long)]
        verb: Option<String>,
    },
    /// Show a method, its paper and its options
    Show { method: String },
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let mut methods = context.connect().await?.methods();
        match self {
            Self::List { verb } => {
                let mut request = ListMethodsRequest {
                    page_size: 1000,
                    verb: verb.unwrap_or_default(),
                    ..Default::default()
                };
                let mut all = Vec::new();
                loop {
                    let page = methods.list_methods(request.clone()).await?.into_inner();
                    all.extend(page.methods);
                    if page.next_page_token.is_empty() {
                        break;
                    }
                    request.page_token = page.next_page_token;
                }
                list(context, &all)
            }
            Self::Show { method } => {
                let request = GetMethodRequest { name: resource("methods", &method) };
                show(context, &methods.get_method(request).await?.into_inner())
            }
        }
    }
}

fn list(context: &Context, methods: &[Method]) -> Result<()> {
    if context.output.is_json() {
        return output::json_list("methods", methods);
    }
    let rows = methods
        .iter()
        .map(|m| vec![short(&m.name).to_owned(), m.verb.clone(), needs(m), m.description.clone()])
        .collect();
    output::line(table(&["method", "group", "needs", "what it does"], &[], rows))
}

fn show(context: &Context, method: &Method) -> Result<()> {
    if context.output.is_json() {
        return output::json(method);
    }
    output::line(facts(&[
        ("method", short(&method.name).to_owned()),
        ("title", method.display_name.clone()),
        ("group", method.verb.clone()),
        ("paper", method.paper.clone()),
        ("needs", needs(method)),
        ("families", method.families.join(", ")),
        ("then", method.followed_by.join(", ")),
    ]))?;
    output::line(format!("\n{}\n", method.description))?;
    let rows = method
        .options
        .iter()
        .map(|o| vec![o.name.clone(), o.r#type.clone(), o.description.clone()])
        .collect();
    output::line(table(&["option", "type", "meaning"], &[], rows))
}

fn needs(method: &Method) -> String {
    let names: Vec<_> = method
        .needs()
        .map(|need| match need {
            MethodNeed::Calibration => "calibration",
            MethodNeed::Unspecified => "unknown",
        })
        .collect();
    names.join(", ")
}
