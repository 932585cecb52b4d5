//! Model cards: what a version is, how it was made and what was measured of it, for whoever gets its files.
//!
//! The text follows from what is stored, lineage and reports, so that the same version in the same form has
//! the same card, to the byte, as long as nothing more was measured.

mod markdown;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use markdown::{code, fenced, plain, table};

use crate::eval::format;
use crate::methods::registry;
use crate::proto::v1;

/// Name of the file.
pub const FILE: &str = "README.md";

/// Rows of a table of tensors.
const MAX_TENSORS: usize = 40;

/// A version and what is known of it.
pub struct Card<'a> {
    pub version: &'a v1::ModelVersion,
    /// The line that people gave the model; may be empty.
    pub display_name: &'a str,
    /// Labels of the model; `license`, `license_link` and `language` go into the front matter.
    pub labels: &'a BTreeMap<String, String>,
    /// From the import to the version itself.
    pub ancestors: &'a [Ancestor],
    /// Measurements of the version, oldest first.
    pub measured: &'a [Measured],
    pub format: v1::ExportFormat,
    /// What the export made of the tensors; absent of native exports.
    pub export: Option<&'a v1::ExportReport>,
    /// Name of a file to load, where it is one.
    pub file: &'a str,
}

/// A version on the way.
#[derive(Debug, Clone, Default)]
pub struct Ancestor {
    pub name: String,
    pub digest: String,
    pub lineage: v1::Lineage,
    /// What its step reported, where the operation is still there.
    pub step: Option<v1::StepReport>,
}

/// A measurement.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    pub report: v1::EvaluationReport,
    /// The same of the version that the recipe started from.
    pub before: Option<v1::EvaluationReport>,
    /// Names and digests of what it was measured on; the digest is empty where the data set is gone.
    pub datasets: Vec<(String, String)>,
}

/// The text of the card.
pub fn text(card: &Card<'_>) -> String {
    let mut out = front_matter(card);
    let _ = writeln!(out, "\n# {}\n", plain(&card.version.name));
    if !card.display_name.is_empty() {
        let _ = writeln!(out, "{}\n", plain(card.display_name));
    }
    facts(card, &mut out);
    lineage(card, &mut out);
    data(card, &mut out);
    measurements(card, &mut out);
    export(card, &mut out);
    loading(card, &mut out);
    limits(card, &mut out);
    out
}

/// `owner/name` where the model came from the Hugging Face hub: the hub knows no revisions and files here.
fn hub_name(card: &Card<'_>) -> Option<String> {
    let source = card.ancestors.first()?.lineage.source.strip_prefix("hf:")?;
    let path = source.split_once('@').map_or(source, |(path, _)| path);
    Some(path.split('/').take(2).collect::<Vec<_>>().join("/"))
}

/// The licence, as a label of the model or its configuration gives it.
fn license(card: &Card<'_>) -> Option<String> {
    let labels = ["license", "licence"].iter().find_map(|key| card.labels.get(*key));
    let config = || {
        let field = card.version.config.as_ref()?.fields.get("license")?;
        match &field.kind {
            Some(pbjson_types::value::Kind::StringValue(text)) => Some(text.clone()),
            _ => None,
        }
    };
    labels.cloned().or_else(config).filter(|text| !text.is_empty())
}

fn steps(card: &Card<'_>) -> impl Iterator<Item = &'static str> {
    let steps = card.ancestors.iter().filter_map(|a| a.lineage.step.as_ref());
    steps.filter_map(|step| registry::method(step).ok()).map(|method| method.card().name)
}

fn front_matter(card: &Card<'_>) -> String {
    // Strings of JSON are strings of YAML.
    let text = |text: &str| serde_json::Value::from(markdown::line(text)).to_string();
    let mut out = String::from("---\n");
    if let Some(base) = hub_name(card) {
        let _ = writeln!(out, "base_model: {}", text(&base));
    }
    for (key, value) in [
        ("language", card.labels.get("language").cloned()),
        ("library_name", library(card).map(str::to_owned)),
        ("license", license(card)),
        ("license_link", card.labels.get("license_link").cloned()),
        ("pipeline_tag", pipeline(card).map(str::to_owned)),
    ] {
        if let Some(value) = value {
            let _ = writeln!(out, "{key}: {}", text(&value));
        }
    }
    let mut tags =
        vec!["planish", card.version.family.as_str(), card.version.architecture.as_str()];
    tags.extend(match card.format {
        v1::ExportFormat::Gguf => Some("gguf"),
        v1::ExportFormat::CompressedTensors => Some("compressed-tensors"),
        _ => None,
    });
    for name in steps(card) {
        tags.push(name);
    }
    let mut seen = Vec::new();
    out.push_str("tags:\n");
    for tag in tags.into_iter().filter(|tag| !tag.is_empty()) {
        if !seen.contains(&tag) {
            seen.push(tag);
            let _ = writeln!(out, "- {}", text(tag));
        }
    }
    out.push_str("---\n");
    out
}

fn library(card: &Card<'_>) -> Option<&'static str> {
    match (card.format, card.version.family.as_str()) {
        (v1::ExportFormat::Gguf | v1::ExportFormat::Native, _) => None,
        // Modules of sentence-transformers are there, and what they load is a folder of transformers.
        (v1::ExportFormat::CompressedTensors, "encoder") => Some("transformers"),
        (_, "decoder") => Some("transformers"),
        (_, "encoder") => Some("sentence-transformers"),
        _ => None,
    }
}

fn pipeline(card: &Card<'_>) -> Option<&'static str> {
    match card.version.family.as_str() {
        "decoder" | "lstm" => Some("text-generation"),
        "encoder" => Some("sentence-similarity"),
        "vision" => Some("image-classification"),
        "two_tower" => Some("zero-shot-image-classification"),
        _ => None,
    }
}

fn facts(card: &Card<'_>, out: &mut String) {
    let version = card.version;
    let mut layouts: Vec<_> = version.layout_bytes.iter().collect();
    layouts.sort();
    let layouts: Vec<String> =
        layouts.iter().map(|(name, bytes)| format!("{name} {}", format::size(**bytes))).collect();
    let rows = [
        ("family", format!("{}, {}", version.family, version.architecture)),
        ("parameters", version.parameter_count.to_string()),
        ("weights as stored", format::size(version.weight_bytes)),
        ("by layout", layouts.join(", ")),
        ("digest of the version", code(&version.digest)),
        (
            "licence",
            match license(card) {
                Some(license) => plain(&license),
                None => "not known; that of the model it was made from applies".to_owned(),
            },
        ),
    ];
    let rows = rows.map(|(name, value)| vec![name.to_owned(), value]);
    out.push_str(&table(&["", ""], &rows));
}

fn lineage(card: &Card<'_>, out: &mut String) {
    out.push_str("\n## How it was made\n\n");
    if card.ancestors.first().is_some_and(|first| !first.lineage.parent.is_empty()) {
        out.push_str("What came before is not stored any more.\n\n");
    }
    for (i, ancestor) in card.ancestors.iter().enumerate() {
        let lineage = &ancestor.lineage;
        let what = match (&lineage.step, &lineage.merged) {
            (Some(step), _) => match registry::method(step) {
                Ok(method) => format!("{} ({})", method.card().title, code(method.card().name)),
                Err(_) => "a step of another version of the program".to_owned(),
            },
            (None, Some(_)) => "an adapter was merged".to_owned(),
            (None, None) if lineage.source == "random" => "random weights".to_owned(),
            (None, None) => format!("imported from {}", source(&lineage.source)),
        };
        let _ = writeln!(out, "{}. {}: {what}", i + 1, code(&ancestor.name));
        let mut notes = vec![format!("digest {}", code(&ancestor.digest))];
        if let Some(merged) = &lineage.merged {
            let anew = if merged.requantised { ", quantised weights rounded anew" } else { "" };
            let digest = code(&merged.digest);
            notes.push(format!("adapter {digest} times {}{anew}", merged.weight));
        }
        if let Some(step) = &lineage.step {
            let paper = registry::method(step).map(|m| m.card().paper).unwrap_or_default();
            if !paper.is_empty() {
                notes.push(plain(paper));
            }
            notes.push(match lineage.seed {
                0 => format!("step {} of its recipe", lineage.step_index + 1),
                seed => format!("step {} of its recipe, seed {seed}", lineage.step_index + 1),
            });
        }
        if let Some(report) = &ancestor.step {
            let weights = (format::size(report.bytes_before), format::size(report.bytes_after));
            notes.push(format!("weights {} before, {} after", weights.0, weights.1));
            if report.calibration_tokens > 0 {
                notes.push(format!("{} calibration tokens", report.calibration_tokens));
            }
        }
        if let Some((zeros, elements)) = total(lineage) {
            let share = 100.0 * zeros / elements;
            notes.push(format!(
                "{zeros:.0} of {elements:.0} elements in scope are 0 ({share:.1} %)"
            ));
        }
        if !lineage.code_version.is_empty() {
            let threads = lineage.threads;
            notes.push(format!("planish {}, {threads} threads", plain(&lineage.code_version)));
        }
        for note in notes {
            let _ = writeln!(out, "   - {note}");
        }
        if let Some(step) = &lineage.step
            && let Ok(mut value) = serde_json::to_value(step)
        {
            value.sort_all_objects();
            out.push('\n');
            out.push_str(&fenced("json", &format!("{value:#}"), "   "));
        }
    }
}

/// Where an import came from. Places on the server's disk are its own business.
fn source(source: &str) -> String {
    match source.split_once(':') {
        Some(("hf" | "pypi", _)) => code(source),
        _ if source.contains(['/', '\\']) => "files of the server".to_owned(),
        _ => code(source),
    }
}

/// Zeros and elements that a step counted.
fn total(lineage: &v1::Lineage) -> Option<(f64, f64)> {
    use pbjson_types::value::Kind;
    let Some(Kind::StructValue(total)) = &lineage.record.as_ref()?.fields.get("total")?.kind else {
        return None;
    };
    let number = |name: &str| match total.fields.get(name)?.kind {
        Some(Kind::NumberValue(number)) => Some(number),
        _ => None,
    };
    let (zeros, elements) = (number("zeros")?, number("elements")?);
    (elements > 0.0).then_some((zeros, elements))
}

/// Warnings that a step left.
fn step_warnings(ancestor: &Ancestor) -> Vec<String> {
    use pbjson_types::value::Kind;
    if let Some(report) = &ancestor.step {
        return report.warnings.clone();
    }
    let record = ancestor.lineage.record.as_ref();
    let kind = record.and_then(|r| r.fields.get("warnings")).and_then(|v| v.kind.as_ref());
    let Some(Kind::ListValue(list)) = kind else { return Vec::new() };
    let texts = list.values.iter().filter_map(|value| match &value.kind {
        Some(Kind::StringValue(text)) => Some(text.clone()),
        _ => None,
    });
    texts.collect()
}

fn data(card: &Card<'_>, out: &mut String) {
    out.push_str("\n## Data\n\n");
    let mut rows: Vec<Vec<String>> = Vec::new();
    for ancestor in card.ancestors {
        let names = ancestor.lineage.step.as_ref().map(super::step_datasets).unwrap_or_default();
        for (i, digest) in ancestor.lineage.data_digests.iter().enumerate() {
            let name = names.get(i).map_or_else(|| "a data set".to_owned(), |name| code(name));
            rows.push(vec![name, code(digest), format!("made {}", code(&ancestor.name))]);
        }
    }
    for measured in card.measured {
        for (name, digest) in &measured.datasets {
            let digest = match digest.as_str() {
                "" => "gone".to_owned(),
                digest => code(digest),
            };
            rows.push(vec![code(name), digest, "measured".to_owned()]);
        }
    }
    rows.dedup();
    match rows.is_empty() {
        true => out.push_str("No data set was read.\n"),
        false => out.push_str(&table(&["data set", "digest", "use"], &rows)),
    }
}

fn measurements(card: &Card<'_>, out: &mut String) {
    out.push_str("\n## Measured\n\n");
    if card.measured.is_empty() {
        out.push_str("Nothing was measured of this version, or what was is not stored any more.\n");
        return;
    }
    out.push_str(
        "Of the version as it is stored. Numbers of different protocols must not be compared.\n",
    );
    for measured in card.measured {
        let report = &measured.report;
        if !report.adapter.is_empty() {
            let _ = writeln!(out, "\nWith the adapter {}:", code(&report.adapter));
        }
        let value = |report: &v1::EvaluationReport, of: &v1::Measurement| {
            let same = |m: &&v1::Measurement| m.metric == of.metric && m.protocol == of.protocol;
            let found = report.measurements.iter().find(same);
            found.map_or_else(String::new, format::measurement)
        };
        let mut header = vec!["metric", "value", "measured with"];
        if measured.before.is_some() {
            header.insert(2, "before the recipe");
        }
        let rows: Vec<Vec<String>> = report
            .measurements
            .iter()
            .map(|m| {
                let name = plain(&m.metric.replace('_', " "));
                let mut row = vec![name, plain(&format::measurement(m)), plain(&m.protocol)];
                if let Some(before) = &measured.before {
                    row.insert(2, plain(&value(before, m)));
                }
                row
            })
            .collect();
        out.push('\n');
        out.push_str(&table(&header, &rows));
    }
}

fn export(card: &Card<'_>, out: &mut String) {
    out.push_str("\n## This export\n\n");
    let Some(report) = card.export else {
        out.push_str("The files of the version as they are stored, layouts kept.\n");
        return;
    };
    let mut kinds: BTreeMap<(&str, &str, bool), (usize, i64)> = BTreeMap::new();
    for tensor in &report.tensors {
        let kind = (&*tensor.stored_as, &*tensor.written_as, tensor.carried);
        let entry = kinds.entry(kind).or_default();
        *entry = (entry.0 + 1, entry.1.saturating_add(tensor.size_bytes));
    }
    let rows: Vec<Vec<String>> = kinds
        .into_iter()
        .map(|((stored, written, carried), (count, bytes))| {
            let way = if carried { "carried over" } else { "written from its values" };
            let (stored, written) = (plain(stored), plain(written));
            vec![stored, written, way.to_owned(), count.to_string(), format::size(bytes)]
        })
        .collect();
    out.push_str(&table(&["stored as", "written as", "how", "tensors", "size"], &rows));

    let mut moved: Vec<&v1::ExportedTensor> =
        report.tensors.iter().filter(|t| t.max_difference > 0.0).collect();
    if moved.is_empty() {
        out.push_str("\nAll values are those of the version, to the bit.\n");
        return;
    }
    moved.sort_by(|a, b| {
        b.relative_difference.total_cmp(&a.relative_difference).then_with(|| a.name.cmp(&b.name))
    });
    let _ = writeln!(
        out,
        "\nRounding moved the values of {} of {} tensors. The most, by the norm of the differences as a share \
         of the norm of the values:\n",
        moved.len(),
        report.tensors.len()
    );
    let rows: Vec<Vec<String>> = moved
        .iter()
        .take(MAX_TENSORS)
        .map(|t| {
            let relative = format!("{:.2e}", t.relative_difference);
            vec![code(&t.name), plain(&t.written_as), relative, format!("{:.2e}", t.max_difference)]
        })
        .collect();
    out.push_str(&table(&["tensor", "written as", "share", "largest difference"], &rows));
}

fn loading(card: &Card<'_>, out: &mut String) {
    out.push_str("\n## Loading\n\n");
    let (family, file) = (card.version.family.as_str(), card.file);
    let sparse =
        card.export.is_some_and(|e| e.tensors.iter().any(|t| t.written_as.starts_with("2 of 4")));
    // Which transformers does not load, whoever wrote them.
    let zero_points = card.export.is_some_and(|e| {
        let packed = |t: &v1::ExportedTensor| t.written_as.ends_with(", packed");
        e.tensors.iter().any(|t| packed(t) && !t.written_as.contains(", symmetric"))
    });
    let text = match (card.format, family) {
        (v1::ExportFormat::Gguf, _) => format!(
            "With llama.cpp and its relatives (`llama-cli -m {file}`), or `planish models import {file}`."
        ),
        (v1::ExportFormat::Native, _) => {
            "With planish: `planish models import FOLDER`. No other program reads these layouts.".to_owned()
        }
        (v1::ExportFormat::CompressedTensors, _) if sparse => {
            "With the library compressed-tensors up to its version 0.14 (format sparse-24-bitmask), which gives \
             back the dense values."
                .to_owned()
        }
        (v1::ExportFormat::CompressedTensors, family) if zero_points => {
            let with = match family {
                "decoder" => "vLLM (`vllm serve FOLDER`), or the library compressed-tensors",
                _ => "the library compressed-tensors",
            };
            format!(
                "With {with}, which gives back the dense values. transformers does not load packed zero points. \
                 planish does not read this form: keep the native one."
            )
        }
        (v1::ExportFormat::CompressedTensors, "decoder") => {
            "With vLLM (`vllm serve FOLDER`), or transformers with the package compressed-tensors \
             (`AutoModelForCausalLM.from_pretrained`). planish does not read this form: keep the native one."
                .to_owned()
        }
        (v1::ExportFormat::CompressedTensors, _) => {
            "With transformers and the package compressed-tensors (`AutoModel.from_pretrained`). planish does \
             not read this form: keep the native one."
                .to_owned()
        }
        (_, "decoder") => {
            "With transformers (`AutoModelForCausalLM.from_pretrained`), vLLM and whatever reads Hugging Face \
             folders, or `planish models import FOLDER`. Values are dense: zeros and codes take as much room as \
             any other number."
                .to_owned()
        }
        (_, "encoder") => {
            "With sentence-transformers (`SentenceTransformer(FOLDER)`), or `planish models import FOLDER`. \
             Values are dense."
                .to_owned()
        }
        _ => "With planish: `planish models import FOLDER`. Values are dense.".to_owned(),
    };
    let _ = writeln!(out, "{text}");
}

fn limits(card: &Card<'_>, out: &mut String) {
    out.push_str("\n## Limits and warnings\n\n");
    let mut lines = vec![
        "What the model it was made from cannot do, or should not be used for, holds for this version too."
            .to_owned(),
    ];
    if steps(card).next().is_some() {
        lines.push(
            "Compression and tuning change answers in ways that the numbers above need not show; measure on your \
             own task."
                .to_owned(),
        );
    }
    for ancestor in card.ancestors {
        let warnings = step_warnings(ancestor);
        lines.extend(warnings.iter().map(|w| format!("{}: {}", code(&ancestor.name), plain(w))));
    }
    let warnings = card.export.map(|report| report.warnings.as_slice()).unwrap_or_default();
    lines.extend(warnings.iter().map(|w| format!("this export: {}", plain(w))));
    for line in lines {
        let _ = writeln!(out, "- {line}");
    }
}

#[cfg(test)]
mod tests;
