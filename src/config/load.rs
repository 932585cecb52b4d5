//! Putting the layers together, and saying where each value came from.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use figment::value::{Dict, Map, Tag, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::fields::{FIELDS, Field, Kind, find, variable};
use super::{Config, bad};
use crate::error::{Error, Reason, Result};

/// A value given on the command line.
#[derive(Debug, Clone)]
pub struct Flag {
    /// As it is typed, `--listen`; for messages.
    pub flag: String,
    /// The key it sets, `server.listen`.
    pub key: String,
    pub value: String,
}

/// A configuration and where its values came from.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub config: Config,
    /// Key to source, for every key that is not at its default.
    sources: BTreeMap<String, String>,
}

/// Loads the configuration: defaults, then `file` (`PLANISH_CONFIG` when absent), then `PLANISH_*`
/// variables, then `flags`. Unknown keys are refused; errors (INVALID_CONFIG) name the key and the
/// source of the value.
pub fn load(file: Option<&Path>, flags: &[Flag]) -> Result<Loaded> {
    let named = env::var_os("PLANISH_CONFIG").filter(|v| !v.is_empty()).map(PathBuf::from);
    // A variable that is not Unicode cannot be one of ours by accident: its name decides.
    let variables = env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.into_string().ok()));
    load_from(file.or(named.as_deref()), variables, flags)
}

fn load_from(
    file: Option<&Path>,
    variables: impl Iterator<Item = (String, Option<String>)>,
    flags: &[Flag],
) -> Result<Loaded> {
    let mut layers = Vec::new();
    if let Some(path) = file {
        layers.push(file_layer(path)?);
    }
    for (name, value) in variables {
        layers.extend(variable_layer(&name, value.as_deref())?);
    }
    for flag in flags {
        let source = format!("flag {}", flag.flag);
        let field = find(&flag.key).ok_or_else(|| unknown(&flag.key, &source))?;
        layers.push(Layer::single(source, field, &flag.value));
    }

    let mut sources = BTreeMap::new();
    let mut figment = Figment::new();
    for layer in layers {
        for key in leaves("", &layer.values) {
            if find(&key).is_none() {
                return Err(unknown(&key, &layer.source));
            }
            sources.insert(key, layer.source.clone());
        }
        figment = figment.merge(layer);
    }
    let config: Config = figment.extract().map_err(|error| type_error(error, &sources))?;
    config.validate().map_err(|error| {
        let Some(violation) = error.violations().first() else { return error };
        match sources.get(&violation.field) {
            Some(source) => {
                bad(&violation.field, format!("{} (from {source})", violation.description))
            }
            None => error,
        }
    })?;
    Ok(Loaded { config, sources })
}

/// Values of one source.
struct Layer {
    source: String,
    values: Dict,
}

impl Layer {
    fn single(source: String, field: &Field, text: &str) -> Self {
        let mut value = parse(field.kind, text);
        for part in field.key.rsplit('.') {
            value = Value::Dict(Tag::Default, Dict::from([(part.to_owned(), value)]));
        }
        let values = value.into_dict().unwrap_or_default();
        Self { source, values }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.source.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

fn file_layer(path: &Path) -> Result<Layer> {
    let source = format!("file {}", path.display());
    let invalid =
        |problem: String| Error::new(Reason::InvalidConfig, format!("{source}: {problem}"));
    let text = fs::read_to_string(path)
        .map_err(|e| invalid(format!("cannot be read: {e}; check the path and its rights")))?;
    // Only the message: the whole error quotes the line, which may hold a secret.
    let table: toml::Table = toml::from_str(&text).map_err(|e: toml::de::Error| {
        let line =
            e.span().map_or(0, |s| text[..s.start.min(text.len())].matches('\n').count()) + 1;
        invalid(format!("line {line}: {}; the file must be toml", e.message()))
    })?;
    let values = Value::serialize(&table)
        .ok()
        .and_then(Value::into_dict)
        .ok_or_else(|| invalid("cannot be read as toml".to_owned()))?;
    Ok(Layer { source, values })
}

/// The layer of a `PLANISH_*` variable; nothing for variables that are not ours and for empty ones.
fn variable_layer(name: &str, value: Option<&str>) -> Result<Option<Layer>> {
    let Some(rest) = name.strip_prefix("PLANISH_") else { return Ok(None) };
    let source = format!("variable {name}");
    if !rest.contains("__") {
        // PLANISH_CONFIG, PLANISH_DATA and the client's variables have one underscore; a key written
        // with too few is a slip that must not pass unseen.
        let flat = |key: &str| key.replace('.', "_").to_uppercase();
        return match FIELDS.iter().find(|f| flat(f.key) == rest) {
            Some(field) => Err(Error::new(
                Reason::InvalidConfig,
                format!("{source}: not a setting; write {}", variable(field.key)),
            )),
            None => Ok(None),
        };
    }
    let key = rest.to_lowercase().replace("__", ".");
    let Some(field) = find(&key) else { return Err(unknown(&key, &source)) };
    match value {
        None => Err(bad(&key, format!("not unicode (from {source})"))),
        Some("") => Ok(None),
        Some(text) => Ok(Some(Layer::single(source, field, text))),
    }
}

/// Text as a value; what does not fit stays text, and the error of the type says so.
fn parse(kind: Kind, text: &str) -> Value {
    match kind {
        Kind::Text | Kind::Secret => Value::from(text),
        Kind::Number => text.parse::<u64>().map_or_else(|_| Value::from(text), Value::from),
        Kind::Switch => text.parse::<bool>().map_or_else(|_| Value::from(text), Value::from),
        Kind::Paths => env::split_paths(text)
            .filter(|p| !p.as_os_str().is_empty())
            .map(|p| p.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .into(),
    }
}

/// Keys of all values that are not tables.
fn leaves(prefix: &str, values: &Dict) -> Vec<String> {
    let mut keys = Vec::new();
    for (name, value) in values {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Dict(_, inner) if find(&key).is_none() => keys.extend(leaves(&key, inner)),
            _ => keys.push(key),
        }
    }
    keys
}

fn unknown(key: &str, source: &str) -> Error {
    bad(key, format!("unknown key (from {source}); `planish config print` lists all keys"))
}

fn type_error(error: figment::Error, sources: &BTreeMap<String, String>) -> Error {
    let key = error.path.join(".");
    let from = sources.get(&key).map_or_else(String::new, |source| format!(" (from {source})"));
    if find(&key).is_some_and(|f| f.kind == Kind::Secret) {
        return bad(&key, format!("must be a string{from}"));
    }
    bad(&key, format!("{}{from}", error.kind))
}

impl Loaded {
    /// Where the value of `key` came from: `file ...`, `variable ...`, `flag ...` or `default`.
    pub fn source(&self, key: &str) -> &str {
        self.sources.get(key).map_or("default", String::as_str)
    }

    /// The configuration as a TOML file: every key with its meaning and its source. Secrets and keys
    /// that are not set are comments, so the text can be used as a file again.
    pub fn to_toml(&self) -> Result<String> {
        let table = toml::Table::try_from(&self.config).map_err(|e| {
            Error::internal(format!("the configuration cannot be printed: {e}")).with_source(e)
        })?;
        let mut text = String::new();
        let mut section = "";
        for field in FIELDS {
            let (parent, name) = field.key.rsplit_once('.').unwrap_or(("", field.key));
            if parent != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                let _ = writeln!(text, "{gap}[{parent}]");
                section = parent;
            }
            let value = field.key.split('.').try_fold(None, |at: Option<&toml::Value>, part| {
                at.map_or_else(|| table.get(part), |v| v.get(part)).map(Some)
            });
            let _ = writeln!(text, "# {} (from: {})", field.about, self.source(field.key));
            let _ = match value.flatten() {
                None => writeln!(text, "# {name} ="),
                Some(value) if field.kind == Kind::Secret => writeln!(text, "# {name} = {value}"),
                Some(value) => writeln!(text, "{name} = {value}"),
            };
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> impl Iterator<Item = (String, Option<String>)> {
        std::iter::empty()
    }

    fn variables(pairs: &[(&str, &str)]) -> impl Iterator<Item = (String, Option<String>)> + use<> {
        let pairs: Vec<_> =
            pairs.iter().map(|(k, v)| ((*k).to_owned(), Some((*v).to_owned()))).collect();
        pairs.into_iter()
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        file
    }

    fn flag(flag: &str, key: &str, value: &str) -> Flag {
        Flag { flag: flag.into(), key: key.into(), value: value.into() }
    }

    #[test]
    fn later_layers_win_and_are_named() {
        let f = file(
            "[data]\nfolder = '/d'\n[limits]\ncontext = 100\nqueued_jobs = 7\nupload_bytes = '1GiB'\n",
        );
        let v = variables(&[
            ("PLANISH_LIMITS__CONTEXT", "200"),
            ("PLANISH_SERVER__LISTEN", "127.0.0.1:2"),
            ("PLANISH_SERVER__TOKEN", "0123456789012345"),
            ("PLANISH_DATA", "/elsewhere"),
            ("PLANISH_COMPUTE__THREADS", ""),
        ]);
        let flags = [flag("--listen", "server.listen", "127.0.0.1:3")];
        let loaded = load_from(Some(f.path()), v, &flags).unwrap();
        assert_eq!(loaded.config.limits.context, 200);
        assert_eq!(loaded.config.limits.queued_jobs, 7);
        assert_eq!(loaded.config.limits.upload_bytes, 1 << 30);
        assert_eq!(loaded.config.server.listen.port(), 3);
        assert_eq!(loaded.config.data.folder, Path::new("/d"));
        // A token of digits stays the text that was written.
        assert_eq!(loaded.config.server.token.as_ref().unwrap().reveal(), "0123456789012345");
        assert_eq!(loaded.source("server.listen"), "flag --listen");
        assert_eq!(loaded.source("limits.context"), "variable PLANISH_LIMITS__CONTEXT");
        assert!(loaded.source("limits.queued_jobs").starts_with("file "));
        assert_eq!(loaded.source("compute.threads"), "default");
    }

    #[test]
    fn bad_values_name_their_source() {
        let message = |result: Result<Loaded>| {
            let error = result.unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidConfig);
            error.message().to_owned()
        };
        let f = file("[server]\nlisten = 'nowhere'\n");
        let m = message(load_from(Some(f.path()), none(), &[]));
        assert!(m.contains("server.listen") && m.contains(f.path().to_str().unwrap()), "{m}");

        let m = message(load_from(None, variables(&[("PLANISH_LIMITS__CONTEXT", "many")]), &[]));
        assert!(m.contains("PLANISH_LIMITS__CONTEXT"), "{m}");

        let flags = [flag("--running-jobs", "limits.running_jobs", "50")];
        let m = message(load_from(None, none(), &flags));
        assert!(m.contains("--running-jobs") && m.contains("1 to 2"), "{m}");

        let f = file("[server]\ntoken = 12345678901234567\n");
        let m = message(load_from(Some(f.path()), none(), &[]));
        assert!(m.contains("server.token") && !m.contains("1234567"), "{m}");

        let f = file("[server]\ntoken = hunter2hunter2hunter2\n");
        let m = message(load_from(Some(f.path()), none(), &[]));
        assert!(m.contains("line 2") && !m.contains("hunter2"), "{m}");

        let m = message(load_from(Some(Path::new("/does/not/exist.toml")), none(), &[]));
        assert!(m.contains("/does/not/exist.toml"), "{m}");
    }

    #[test]
    fn unknown_keys_are_refused() {
        for text in
            ["colour = 1", "[server]\nlissten = 'x'", "server = 5", "[server.tls]\nca = 'x'"]
        {
            let f = file(text);
            let error = load_from(Some(f.path()), none(), &[]).unwrap_err();
            assert!(error.message().contains("unknown key"), "{text}: {error}");
        }
        assert!(load_from(None, variables(&[("PLANISH_SERVER__LISSTEN", "x")]), &[]).is_err());
        let error = load_from(None, none(), &[flag("--set", "server.lissten", "x")]).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidConfig);
        let slip = load_from(None, variables(&[("PLANISH_SERVER_LISTEN", "x")]), &[]).unwrap_err();
        assert!(slip.message().contains("PLANISH_SERVER__LISTEN"), "{slip}");
        // Container platforms set variables of this form for services called `planish-server`.
        load_from(None, variables(&[("PLANISH_SERVER_PORT", "x")]), &[]).unwrap();
    }

    #[test]
    fn the_printed_file_gives_the_same_configuration() {
        let v = variables(&[
            ("PLANISH_IMPORT__ALLOW_PATHS", "/a:/b c"),
            ("PLANISH_TELEMETRY__FORMAT", "json"),
            ("PLANISH_SERVER__TOKEN", "abcdefghijklmnop"),
        ]);
        let loaded = load_from(None, v, &[]).unwrap();
        let text = loaded.to_toml().unwrap();
        assert!(text.contains("(from: variable PLANISH_TELEMETRY__FORMAT)"), "{text}");
        assert!(text.contains("# token = \"***\"") && !text.contains("abcdefgh"), "{text}");
        let again = load_from(Some(file(&text).path()), none(), &[]).unwrap();
        let mut expected = loaded.config;
        expected.server.token = None;
        assert_eq!(again.config, expected);
    }

    #[test]
    fn every_key_is_described() {
        let mut config = Config::default();
        // Absent values are not written: give each one.
        config.server.token = Some(super::super::Secret::new("x"));
        config.server.tokens_file = Some("x".into());
        config.server.tls.cert = Some("x".into());
        config.server.tls.key = Some("x".into());
        config.server.tls.client_ca = Some("x".into());
        config.telemetry.metrics_listen = Some("127.0.0.1:1".parse().unwrap());
        config.telemetry.otlp_endpoint = Some("x".into());
        let values = Value::serialize(&config).unwrap().into_dict().unwrap();
        let mut written = leaves("", &values);
        written.sort();
        let mut described: Vec<_> = FIELDS.iter().map(|f| f.key.to_owned()).collect();
        described.sort();
        assert_eq!(written, described);
    }
}
