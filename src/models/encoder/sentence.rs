//! What sentence-transformers keeps in files beside the model: the chain of modules, the pooling, the
//! longest text. Here it is one object inside `config.json`, so that a version's files stay flat.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Config;
use super::config::{Pooling, SENTENCE};
use crate::error::{Error, Reason, Result};
use crate::models::files;

const MODULES: &str = "modules.json";
const SETTINGS: &str = "sentence_bert_config.json";
const POOLING: &str = "1_Pooling";
/// The chain has three or four; more are nothing that is read here.
const MAX_MODULES: usize = 16;

/// Reads the files in `folder`, where there are any, into `config`. What `config` says itself stays:
/// folders that were written here carry it.
///
/// # Errors
/// `UNSUPPORTED_MODEL` for modules and poolings that are not made here, `MALFORMED_FILE`.
pub fn read(folder: &Path, config: &mut Value) -> Result<()> {
    if !folder.join(MODULES).is_file() || config.get(SENTENCE).is_some() {
        return Ok(());
    }
    let modules = files::json(&folder.join(MODULES))?;
    let mut found = chain(&modules)?;
    let path = pooling_file(folder, &found.pooling)?;
    let pooling = pooling(&files::json(&path)?).map_err(|e| e.within(&found.pooling))?;
    let mut settings = json!({ "pooling": pooling.name(), "normalize": found.normalize });
    found.transformer.push(SETTINGS);
    let file = folder.join(&found.transformer);
    if file.is_file() {
        let given = files::json(&file)?;
        for key in ["max_seq_length", "do_lower_case"] {
            // Checked with the rest of the configuration.
            if let Some(value) = given.get(key).filter(|v| !v.is_null()) {
                settings[key] = value.clone();
            }
        }
    }
    match config.as_object_mut() {
        Some(map) => map.insert(SENTENCE.to_owned(), settings),
        None => None,
    };
    Ok(())
}

/// Writes the files for other programs into `folder`; gives their names within it.
pub fn write(config: &Config, folder: &Path) -> Result<Vec<String>> {
    let module = |index: usize, path: &str, kind: &str| {
        json!({
            "idx": index, "name": index.to_string(), "path": path,
            "type": format!("sentence_transformers.models.{kind}"),
        })
    };
    let mut modules = vec![module(0, "", "Transformer"), module(1, POOLING, "Pooling")];
    if config.normalize {
        modules.push(module(2, "2_Normalize", "Normalize"));
    }
    let pooling = json!({
        "word_embedding_dimension": config.hidden,
        "pooling_mode_cls_token": config.pooling == Pooling::Cls,
        "pooling_mode_mean_tokens": config.pooling == Pooling::Mean,
        "pooling_mode_max_tokens": config.pooling == Pooling::Max,
    });
    let settings =
        json!({ "max_seq_length": config.max_tokens, "do_lower_case": config.lowercase });
    std::fs::create_dir_all(folder.join(POOLING))?;
    let mut names = Vec::new();
    for (name, value) in [
        (MODULES.to_owned(), Value::Array(modules)),
        (SETTINGS.to_owned(), settings),
        (format!("{POOLING}/config.json"), pooling),
    ] {
        std::fs::write(folder.join(&name), files::pretty(&value))?;
        names.push(name);
    }
    Ok(names)
}

/// Where the modules are, and whether the last one normalises.
#[derive(Debug)]
struct Chain {
    transformer: PathBuf,
    pooling: String,
    normalize: bool,
}

/// Transformer, pooling and, optionally, normalisation; nothing else gives the same vectors.
fn chain(modules: &Value) -> Result<Chain> {
    let broken = |what: &str| {
        Error::new(Reason::MalformedFile, format!("{MODULES} {what}; export the model again"))
    };
    let list = modules.as_array().ok_or_else(|| broken("is not a list"))?;
    if list.len() > MAX_MODULES {
        return Err(broken("lists more modules than any model has"));
    }
    let mut kinds = Vec::new();
    for module in list {
        let text = |key: &str| {
            let text = module.get(key).and_then(Value::as_str);
            text.ok_or_else(|| broken(&format!("has a module without a {key}")))
        };
        let kind = text("type")?;
        // The classes have moved between packages; their names have not.
        let kind = kind.rsplit('.').next().unwrap_or(kind);
        let path = text("path")?;
        if !plain(path) {
            return Err(broken("names a folder outside the model's"));
        }
        kinds.push((kind, path));
    }
    match kinds.as_slice() {
        [("Transformer", transformer), ("Pooling", pooling), rest @ ..]
            if matches!(rest, [] | [("Normalize", _)]) && !pooling.is_empty() =>
        {
            Ok(Chain {
                transformer: PathBuf::from(transformer),
                pooling: (*pooling).to_owned(),
                normalize: !rest.is_empty(),
            })
        }
        _ => {
            let names: Vec<String> =
                kinds.iter().map(|(kind, _)| kind.chars().take(40).collect()).collect();
            Err(Error::new(
                Reason::UnsupportedModel,
                format!(
                    "{MODULES} chains {}; Transformer, Pooling and, at the end, Normalize are supported",
                    names.join(", ")
                ),
            ))
        }
    }
}

/// The settings of the pooling module. Clients that upload files without folders send them under the
/// folder's name, as `1_Pooling_config.json`.
fn pooling_file(folder: &Path, module: &str) -> Result<PathBuf> {
    [folder.join(module).join(files::CONFIG), folder.join(format!("{module}_{}", files::CONFIG))]
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Error::new(
                Reason::MalformedFile,
                format!("{MODULES} names {module}, but its config.json is missing; add the folder"),
            )
        })
}

/// A name of one folder, or nothing.
fn plain(path: &str) -> bool {
    path.len() <= 64
        && !path.starts_with('.')
        && path.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// The pooling of a module's settings: one word, or a switch for each kind.
fn pooling(config: &Value) -> Result<Pooling> {
    let unsupported = |found: &str| {
        Error::new(
            Reason::UnsupportedModel,
            format!("pooling by {found:.60} is not supported; mean, cls and max are"),
        )
    };
    if let Some(name) = config.get("pooling_mode").filter(|v| !v.is_null()) {
        let name = name.as_str().unwrap_or("something that is no name");
        return Pooling::parse(name).ok_or_else(|| unsupported(name));
    }
    let switches = config.as_object().into_iter().flatten();
    let on: Vec<&str> = switches
        .filter(|(key, value)| key.starts_with("pooling_mode_") && **value == Value::Bool(true))
        .map(|(key, _)| key.as_str())
        .collect();
    match on.as_slice() {
        // What the library takes when nothing is said.
        [] | ["pooling_mode_mean_tokens"] => Ok(Pooling::Mean),
        ["pooling_mode_cls_token"] => Ok(Pooling::Cls),
        ["pooling_mode_max_tokens"] => Ok(Pooling::Max),
        several => Err(unsupported(&several.join(" and "))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::tiny;
    use super::*;

    fn modules(kinds: &[(&str, &str)]) -> Value {
        let one =
            |(kind, path): &(&str, &str)| json!({ "type": format!("x.y.{kind}"), "path": path });
        kinds.iter().map(one).collect()
    }

    #[test]
    fn what_is_written_is_read_again() {
        for (pooling, normalize, length) in
            [(Pooling::Mean, true, 17), (Pooling::Cls, false, 64), (Pooling::Max, true, 3)]
        {
            let mut config = Config::from_hugging_face(&tiny()).unwrap();
            (config.pooling, config.normalize, config.max_tokens) = (pooling, normalize, length);
            config.lowercase = normalize;
            let folder = tempfile::tempdir().unwrap();
            let names = write(&config, folder.path()).unwrap();
            assert!(names.iter().all(|name| folder.path().join(name).is_file()), "{names:?}");
            let mut json = tiny();
            read(folder.path(), &mut json).unwrap();
            assert_eq!(Config::from_hugging_face(&json).unwrap(), config);
            // Flat, as uploads lie.
            let deep = folder.path().join("1_Pooling/config.json");
            std::fs::rename(deep, folder.path().join("1_Pooling_config.json")).unwrap();
            let mut json = tiny();
            read(folder.path(), &mut json).unwrap();
            assert_eq!(Config::from_hugging_face(&json).unwrap(), config);
            std::fs::remove_file(folder.path().join("1_Pooling_config.json")).unwrap();
            let error = read(folder.path(), &mut tiny()).unwrap_err();
            assert!(error.message().contains("1_Pooling"), "{error}");
        }
    }

    #[test]
    fn a_folder_without_modules_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut json = tiny();
        read(folder.path(), &mut json).unwrap();
        assert_eq!(json, tiny());
    }

    #[test]
    fn chains_that_would_give_other_vectors_are_refused() {
        let good = modules(&[("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "n")]);
        assert!(chain(&good).unwrap().normalize);
        for (kinds, reason) in [
            (&[("Transformer", "")][..], Reason::UnsupportedModel),
            (
                &[("Transformer", ""), ("Pooling", "p"), ("Dense", "2_Dense")],
                Reason::UnsupportedModel,
            ),
            (
                &[("Transformer", ""), ("Normalize", "n"), ("Pooling", "p")],
                Reason::UnsupportedModel,
            ),
            (&[("Transformer", ""), ("Pooling", "../p")], Reason::MalformedFile),
            (&[("Transformer", "/etc"), ("Pooling", "p")], Reason::MalformedFile),
            (&[("Transformer", ".."), ("Pooling", "p")], Reason::MalformedFile),
        ] {
            assert_eq!(chain(&modules(kinds)).unwrap_err().reason(), reason, "{kinds:?}");
        }
        let many = modules(&vec![("Normalize", "n"); 1000]);
        for bad in [json!({}), json!(3), json!([{}]), json!([{ "type": "Pooling" }]), many] {
            assert_eq!(chain(&bad).unwrap_err().reason(), Reason::MalformedFile);
        }
    }

    #[test]
    fn poolings_in_both_forms() {
        assert_eq!(pooling(&json!({ "pooling_mode": "cls" })).unwrap(), Pooling::Cls);
        assert_eq!(pooling(&json!({ "pooling_mode_max_tokens": true })).unwrap(), Pooling::Max);
        assert_eq!(pooling(&json!({})).unwrap(), Pooling::Mean);
        for bad in [
            json!({ "pooling_mode": "lasttoken" }),
            json!({ "pooling_mode": 3 }),
            json!({ "pooling_mode_mean_sqrt_len_tokens": true }),
            json!({ "pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true }),
        ] {
            assert_eq!(pooling(&bad).unwrap_err().reason(), Reason::UnsupportedModel, "{bad}");
        }
    }
}
