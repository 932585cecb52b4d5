//! Resource names: `models/{model}`, `models/{model}/versions/{version}`, `datasets/{dataset}`,
//! `adapters/{adapter}`, `operations/{operation}`.

use crate::error::{Error, Reason, Result};

/// Longest id of a resource.
const MAX_ID: usize = 63;

/// Checks an id: lower-case letters, digits and inner hyphens, 1 to 63 of them.
pub fn check_id(id: &str) -> Result<()> {
    let bytes = id.as_bytes();
    let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let good = (1..=MAX_ID).contains(&bytes.len())
        && bytes.iter().all(|b| plain(b) || *b == b'-')
        && bytes.first().is_some_and(plain)
        && bytes.last().is_some_and(plain);
    if good {
        return Ok(());
    }
    Err(Error::new(
        Reason::InvalidName,
        format!(
            "'{}' is no id; use 1 to {MAX_ID} lower-case letters, digits and hyphens, with no \
             hyphen at either end",
            shown(id)
        ),
    ))
}

/// The id in `models/{model}`.
pub fn model(name: &str) -> Result<&str> {
    single(name, "models", "models/{model}")
}

/// The id in `datasets/{dataset}`.
pub fn dataset(name: &str) -> Result<&str> {
    single(name, "datasets", "datasets/{dataset}")
}

/// The id in `adapters/{adapter}`.
pub fn adapter(name: &str) -> Result<&str> {
    single(name, "adapters", "adapters/{adapter}")
}

/// The id in `operations/{operation}`.
pub fn operation(name: &str) -> Result<&str> {
    single(name, "operations", "operations/{operation}")
}

/// Model and version number in `models/{model}/versions/{version}`; no number in `models/{model}`,
/// which stands for the newest version.
pub fn version(name: &str) -> Result<(&str, Option<i64>)> {
    const FORM: &str = "models/{model} or models/{model}/versions/{version}";
    let rest = name.strip_prefix("models/").ok_or_else(|| wrong(name, FORM))?;
    let Some((model, number)) = rest.split_once("/versions/") else {
        return Ok((checked(rest, name, FORM)?, None));
    };
    // Only the canonical spelling, so that a version has one name: no sign, no leading zero.
    let number = match number.as_bytes() {
        [b'1'..=b'9', rest @ ..] if rest.iter().all(u8::is_ascii_digit) => number.parse().ok(),
        _ => None,
    };
    let number = number.ok_or_else(|| wrong(name, FORM))?;
    Ok((checked(model, name, FORM)?, Some(number)))
}

/// Model and version number in `models/{model}/versions/{version}`.
pub fn exact_version(name: &str) -> Result<(&str, i64)> {
    match version(name)? {
        (model, Some(number)) => Ok((model, number)),
        _ => Err(wrong(name, "models/{model}/versions/{version}")),
    }
}

/// `models/{model}/versions/{version}`.
pub fn of_version(model: &str, version: i64) -> String {
    format!("models/{model}/versions/{version}")
}

fn single<'a>(name: &'a str, collection: &str, form: &str) -> Result<&'a str> {
    let id = name.strip_prefix(collection).and_then(|rest| rest.strip_prefix('/'));
    checked(id.ok_or_else(|| wrong(name, form))?, name, form)
}

fn checked<'a>(id: &'a str, name: &str, form: &str) -> Result<&'a str> {
    check_id(id).map(|()| id).map_err(|_| wrong(name, form))
}

fn wrong(name: &str, form: &str) -> Error {
    Error::new(
        Reason::InvalidName,
        format!("'{}' is not of the form {form}; check the name", shown(name)),
    )
}

/// A piece of hostile text short enough for a message.
fn shown(text: &str) -> String {
    const LIMIT: usize = 80;
    if text.chars().nth(LIMIT).is_none() {
        return text.escape_debug().to_string();
    }
    text.chars().take(LIMIT).collect::<String>().escape_debug().to_string() + "..."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        assert_eq!(model("models/a").unwrap(), "a");
        assert_eq!(dataset("datasets/wiki-2").unwrap(), "wiki-2");
        assert_eq!(operation("operations/0af").unwrap(), "0af");
        assert_eq!(version("models/a-b").unwrap(), ("a-b", None));
        assert_eq!(version("models/a/versions/12").unwrap(), ("a", Some(12)));
        assert_eq!(exact_version(&of_version("a", 12)).unwrap(), ("a", 12));
        assert!(check_id(&"a".repeat(63)).is_ok());
    }

    #[test]
    fn malformed_names_are_refused() {
        let long = format!("models/{}", "a".repeat(64));
        for bad in [
            "",
            "a",
            "models",
            "models/",
            "models//",
            "models/A",
            "models/-a",
            "models/a-",
            "models/ä",
            "models/a/",
            "models/a/b",
            "models/../x",
            "datasets/a",
            "models/a\0",
            "models/a_b",
            &long,
        ] {
            let error = model(bad).unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidName, "{bad}");
        }
        for bad in [
            "models/a/versions/",
            "models/a/versions/0",
            "models/a/versions/01",
            "models/a/versions/+1",
            "models/a/versions/1/versions/2",
            "models/a/versions/9223372036854775808",
            "models/a/versions/latest",
            "models//versions/1",
        ] {
            assert_eq!(version(bad).unwrap_err().reason(), Reason::InvalidName, "{bad}");
        }
        assert!(exact_version("models/a").is_err());
        assert!(model(&"é".repeat(10_000)).unwrap_err().message().len() < 400);
    }
}
