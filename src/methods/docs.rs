//! What the API definition says of the methods' options: the comments in `proto/` are the one place
//! where an option is described; the method service and `docs/methods` both read them here.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorSet};

use super::Card;
use super::catalogue::{self, Cost, Entry, Family};
use crate::proto::DESCRIPTORS;

/// An option of a method; messages inside messages are flattened to `outer.inner`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionDoc {
    /// Path in recipes, `sparsity.share` for instance.
    pub name: String,
    /// Type as in the API definition; the allowed names of an enum.
    pub kind: String,
    /// Meaning, domain and default.
    pub description: String,
}

/// Numbers of the fields that lead to a comment in a file descriptor's source information.
const FILE_MESSAGES: i32 = 4;
const MESSAGE_FIELDS: i32 = 2;

struct Field {
    name: String,
    kind: Type,
    repeated: bool,
    type_name: String,
    comment: String,
    /// Kinds of key and value of a map.
    map: Option<[Type; 2]>,
}

#[derive(Default)]
struct Api {
    messages: BTreeMap<String, Vec<Field>>,
    enums: BTreeMap<String, Vec<String>>,
}

/// Messages whose fields are the methods.
const STEP: &str = ".planish.v1.Step";
const ADAPTATION: &str = ".planish.v1.Adaptation";

/// Names of the methods a step can hold, in the order of the API definition.
pub fn methods() -> Vec<String> {
    names(STEP)
}

/// Names of the methods that tune, in the order of the API definition.
pub fn adaptations() -> Vec<String> {
    names(ADAPTATION)
}

fn names(message: &str) -> Vec<String> {
    api().messages.get(message).into_iter().flatten().map(|f| f.name.clone()).collect()
}

/// The options of the method called `method`; empty when there is none.
pub fn options(method: &str) -> Vec<OptionDoc> {
    let api = api();
    let fields = [STEP, ADAPTATION].iter().filter_map(|name| api.messages.get(*name)).flatten();
    let mut out = Vec::new();
    for field in fields.filter(|f| f.name == method) {
        flatten(api, &field.type_name, "", &mut out);
    }
    out
}

/// The page of a method, in Markdown.
pub fn page(card: &Card, entry: &Entry) -> String {
    let needs = if card.needs_calibration { "calibration text" } else { "nothing but the model" };
    let none = |text: String| if text.is_empty() { "none".to_owned() } else { text };
    let links = |names: &[&str]| {
        none(names.iter().map(|n| format!("[{n}]({n}.md)")).collect::<Vec<_>>().join(", "))
    };
    let (after, before) = catalogue::neighbours(card, entry);
    let words = |words: Vec<&str>| words.join(", ");
    let data = match entry.data.tokens() {
        0 => entry.data.word().to_owned(),
        tokens => format!("{}, {tokens} tokens by default", entry.data.word()),
    };
    let kernel = match entry.kernel {
        "" => "none".to_owned(),
        name => format!("`{name}`"),
    };
    let Cost { parameter, parameter_token, parameter_bytes, token_bytes, basis } = entry.cost;
    let mut page = format!(
        "# {}\n\n`{}` ({})\n\n{}\n\n- Paper: {}\n- Needs: {needs}\n- Families: {}\n- Usually followed \
         by: {}\n\n",
        card.title,
        card.name,
        card.verb,
        card.summary,
        card.paper,
        card.families.join(", "),
        links(card.followed_by),
    );
    let rows = [
        ("family", format!("{}: {}", entry.family.word(), entry.sub)),
        ("data", data),
        ("tuning", entry.tuning.word().to_owned()),
        ("changes", words(entry.changes.iter().map(|c| c.word()).collect())),
        ("makes less", words(entry.gains())),
        ("kernel", kernel),
        ("may come after", links(&after)),
        ("may come before", links(&before)),
        ("scale", entry.scale.word().to_owned()),
        ("built from", format!("`{}`", entry.seed_paper)),
        ("seconds", format!("p ({parameter:e} + {parameter_token:e} t), {}", basis.word())),
        ("peak bytes", format!("{parameter_bytes} p + {token_bytes} t, {}", basis.word())),
    ];
    page += "| fact | |\n|---|---|\n";
    for (name, value) in rows {
        page += &format!("| {name} | {value} |\n");
    }
    if !entry.conflicts.is_empty() {
        page += "\nNot after, where both change the same weights:\n\n";
    }
    for conflict in entry.conflicts {
        page += &format!("- {}: {}\n", conflict.after, conflict.why);
    }
    page += "\n| option | type | meaning |\n|---|---|---|\n";
    for option in options(card.name) {
        page += &format!("| `{}` | {} | {} |\n", option.name, option.kind, option.description);
    }
    page
}

/// The pages of `docs/methods`, file name and content.
pub fn pages() -> Vec<(String, String)> {
    let all = catalogue::all();
    let mut index = String::from(INDEX);
    for family in Family::WORDS {
        let title = family.replace('_', " ");
        index += &format!(
            "\n## {}{}\n\n| method | group | data | tuning | less | what it does |\n|---|---|---|---|---|---|\n",
            title[..1].to_uppercase(),
            &title[1..]
        );
        for (card, entry) in all.iter().filter(|(_, entry)| entry.family.word() == *family) {
            index += &format!(
                "| [{0}]({0}.md) | {1} | {2} | {3} | {4} | {5} |\n",
                card.name,
                card.verb,
                entry.data.word(),
                entry.tuning.word(),
                entry.gains().join(", "),
                card.summary
            );
        }
    }
    let mut pages = vec![("README.md".to_owned(), index)];
    pages.extend(all.iter().map(|(card, entry)| (format!("{}.md", card.name), page(card, entry))));
    pages
}

/// The beginning of the index.
const INDEX: &str = "# Methods\n\nWritten by the program from its catalogue; `planish methods list` prints the same, and filters \
    it. *Data* is what a method takes beside the model, *tuning* how much of it is trained, *less* what becomes less. Costs \
    on the pages are rough: `p` is the number of parameters, `t` that of the data's tokens, on two cores; `--validate-only` \
    says what a recipe costs for a model.\n";

fn api() -> &'static Api {
    static API: OnceLock<Api> = OnceLock::new();
    API.get_or_init(|| {
        // The descriptors are our own build's output; should they ever be unreadable, the completeness
        // test of the registry says so.
        let set = FileDescriptorSet::decode(DESCRIPTORS).unwrap_or_default();
        let mut api = Api::default();
        for file in &set.file {
            let prefix = format!(".{}", file.package());
            let comments: BTreeMap<&[i32], &str> = file
                .source_code_info
                .iter()
                .flat_map(|info| &info.location)
                .map(|l| (l.path.as_slice(), l.leading_comments()))
                .collect();
            for (m, message) in file.message_type.iter().enumerate() {
                let fields = fields(message, |f| {
                    let path = [FILE_MESSAGES, m as i32, MESSAGE_FIELDS, f as i32];
                    comments.get(path.as_slice()).copied().unwrap_or_default()
                });
                api.messages.insert(format!("{prefix}.{}", message.name()), fields);
            }
            for item in &file.enum_type {
                api.enums.insert(format!("{prefix}.{}", item.name()), values(item));
            }
        }
        api
    })
}

fn fields<'a>(message: &DescriptorProto, comment: impl Fn(usize) -> &'a str) -> Vec<Field> {
    let one = |(i, f): (usize, &prost_types::FieldDescriptorProto)| Field {
        name: f.name().to_owned(),
        kind: f.r#type(),
        repeated: f.label() == Label::Repeated,
        type_name: f.type_name().to_owned(),
        comment: comment(i).split_whitespace().collect::<Vec<_>>().join(" "),
        map: map(message, f.type_name()),
    };
    message.field.iter().enumerate().map(one).collect()
}

/// Kinds of key and value, where a field's type is the entry of a map that the message declares.
fn map(message: &DescriptorProto, type_name: &str) -> Option<[Type; 2]> {
    let name = type_name.rsplit('.').next()?;
    let entry = message.nested_type.iter().find(|nested| {
        nested.name() == name && nested.options.as_ref().is_some_and(|o| o.map_entry())
    })?;
    match entry.field.as_slice() {
        [key, value] => Some([key.r#type(), value.r#type()]),
        _ => None,
    }
}

/// Names of an enum, without the one that only says "not set".
fn values(item: &EnumDescriptorProto) -> Vec<String> {
    let set = item.value.iter().filter(|v| v.number() != 0);
    set.map(|v| v.name().to_owned()).collect()
}

fn flatten(api: &Api, message: &str, prefix: &str, out: &mut Vec<OptionDoc>) {
    for field in api.messages.get(message).into_iter().flatten() {
        let name = format!("{prefix}{}", field.name);
        // What is not ours has no options of its own: it is JSON in recipes.
        let ours = !field.type_name.starts_with(".google.");
        if field.kind == Type::Message && ours && api.messages.contains_key(&field.type_name) {
            flatten(api, &field.type_name, &format!("{name}."), out);
            continue;
        }
        let word = |kind: Type| format!("{kind:?}").to_lowercase();
        let kind = match (field.kind, api.enums.get(&field.type_name)) {
            (Type::Enum, Some(names)) => names.join(", "),
            (Type::Message, _) if !ours => "object".to_owned(),
            (kind, _) => word(kind),
        };
        let kind = match field.map {
            Some([key, value]) => format!("map of {} to {}", word(key), word(value)),
            None if field.repeated => format!("repeated {kind}"),
            None => kind,
        };
        out.push(OptionDoc { name, kind, description: field.comment.clone() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flattened_with_their_comments() {
        let options = options("wanda");
        let share = options.iter().find(|o| o.name == "sparsity.share").expect("flattened");
        assert_eq!(share.kind, "double");
        assert!(share.description.contains("[0, 1)"));
        let values = options.iter().find(|o| o.name == "sparsity.values").expect("an enum");
        assert!(values.kind.contains("VALUE_TYPE_F16") && !values.kind.contains("UNSPECIFIED"));
        assert!(options.iter().all(|o| !o.description.is_empty()), "{options:?}");
    }

    /// `UPDATE_DOCS=1 cargo test --release methods::docs` writes the pages anew.
    #[test]
    fn the_pages_in_docs_are_current() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/methods");
        for (name, page) in pages() {
            let path = folder.join(&name);
            if std::env::var_os("UPDATE_DOCS").is_some() {
                std::fs::create_dir_all(&folder).expect("docs folder");
                std::fs::write(&path, &page).expect("docs page");
            }
            let found = std::fs::read_to_string(&path).unwrap_or_default();
            assert_eq!(found, page, "{name} is out of date; run with UPDATE_DOCS=1");
        }
    }
}
