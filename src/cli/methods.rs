//! `planish methods`: the catalogue.

use clap::Subcommand;

use super::Context;
use super::error::Result;
use super::names::{resource, short};
use super::output::{self, facts, table};
use crate::proto::v1::{GetMethodRequest, ListMethodsRequest, Method};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List methods
    List {
        /// Only this group: compress, adapt or train
        #[arg(long)]
        verb: Option<String>,
        /// Only this kind: quantisation, pruning, compact_architecture, low_rank or adaptation
        #[arg(long)]
        family: Option<String>,
        /// Only what trains so much: free, light or full
        #[arg(long)]
        tuning: Option<String>,
        /// Only what takes such data: none, calibration, train or labels
        #[arg(long, value_name = "DATA")]
        data_need: Option<String>,
        /// Only what makes this less: memory, prefill, decode or nothing
        #[arg(long, value_name = "COST")]
        speeds_up: Option<String>,
    },
    /// Show a method: its paper, what it costs, what it goes with, its options
    Show { method: String },
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let mut methods = context.connect().await?.methods();
        match self {
            Self::List { verb, family, tuning, data_need, speeds_up } => {
                let mut request = ListMethodsRequest {
                    page_size: 1000,
                    page_token: String::new(),
                    verb: verb.unwrap_or_default(),
                    family: family.unwrap_or_default(),
                    tuning: tuning.unwrap_or_default(),
                    data_need: data_need.unwrap_or_default(),
                    speeds_up: speeds_up.unwrap_or_default(),
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
        .map(|m| {
            vec![
                short(&m.name).to_owned(),
                m.verb.clone(),
                m.family.clone(),
                m.data_need.clone(),
                m.tuning.clone(),
                m.speeds_up.join(", "),
                m.description.clone(),
            ]
        })
        .collect();
    let header = ["method", "group", "family", "data", "tuning", "less", "what it does"];
    output::line(table(&header, &[], rows))
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
        ("family", format!("{}: {}", method.family, method.sub_family)),
        ("data", data(method)),
        ("tuning", method.tuning.clone()),
        ("changes", method.changes.join(", ")),
        ("makes less", method.speeds_up.join(", ")),
        ("kernel", or_none(&method.kernel)),
        ("models", method.families.join(", ")),
        ("scale", method.scale_class.clone()),
        ("comes after", or_none(&method.composes_after.join(", "))),
        ("comes before", or_none(&method.composes_before.join(", "))),
        ("usual then", or_none(&method.followed_by.join(", "))),
        ("cost", cost(method)),
        ("built from", method.seed_paper.clone()),
    ]))?;
    for conflict in &method.conflicts {
        output::line(format!("not after {}: {}", conflict.after, conflict.why))?;
    }
    output::line(format!("\n{}\n", method.description))?;
    let rows = method
        .options
        .iter()
        .map(|o| vec![o.name.clone(), o.r#type.clone(), o.description.clone()])
        .collect();
    output::line(table(&["option", "type", "meaning"], &[], rows))
}

fn or_none(text: &str) -> String {
    if text.is_empty() { "none".to_owned() } else { text.to_owned() }
}

fn data(method: &Method) -> String {
    match method.data_tokens {
        0 => method.data_need.clone(),
        tokens => format!("{} ({tokens} tokens by default)", method.data_need),
    }
}

/// What a model of 100 million parameters would cost with the tokens that are the default, or a million.
fn cost(method: &Method) -> String {
    const PARAMETERS: f64 = 1e8;
    let Some(cost) = &method.cost else { return "unknown".to_owned() };
    let tokens = match (method.data_tokens, method.data_need.as_str()) {
        (0, "none") => 0.0,
        (0, _) => 1e6,
        (tokens, _) => tokens as f64,
    };
    let seconds =
        PARAMETERS * (cost.seconds_per_parameter + tokens * cost.seconds_per_parameter_and_token);
    let bytes = PARAMETERS * cost.bytes_per_parameter + tokens * cost.bytes_per_token;
    let data = if tokens > 0.0 { format!(" and {tokens} tokens") } else { String::new() };
    format!(
        "about {} and {} for 100 million parameters{data} ({})",
        output::seconds(seconds),
        output::size(bytes as i64),
        cost.basis
    )
}
