//! Checks that several requests share.

use std::path::{Path, PathBuf};

use crate::error::{Error, Reason, Result};

const MAX_REQUEST_ID: usize = 64;
const MAX_DISPLAY_NAME: usize = 256;
const MAX_LABELS: usize = 64;
const MAX_LABEL: usize = 256;
const MAX_FILE_NAME: usize = 255;

/// Checks a `request_id`.
pub fn request_id(id: &str) -> Result<()> {
    if id.chars().count() > MAX_REQUEST_ID {
        return Err(Error::field(
            "request_id",
            "longer than 64 characters; a UUID is a good choice",
        ));
    }
    printable("request_id", id)
}

/// Checks a line for people; `field` is its path.
pub fn display_name(field: &str, name: &str) -> Result<()> {
    if name.len() > MAX_DISPLAY_NAME {
        return Err(Error::field(field, format!("longer than {MAX_DISPLAY_NAME} bytes")));
    }
    printable(field, name)
}

/// Checks labels; `field` is their path.
pub fn labels<'a>(
    field: &str,
    labels: impl ExactSizeIterator<Item = (&'a String, &'a String)>,
) -> Result<()> {
    if labels.len() > MAX_LABELS {
        return Err(Error::field(field, format!("more than {MAX_LABELS} labels")));
    }
    for (key, value) in labels {
        if key.is_empty() || key.len() > MAX_LABEL || value.len() > MAX_LABEL {
            return Err(Error::field(
                field,
                format!("keys and values take 1 to {MAX_LABEL} bytes"),
            ));
        }
        printable(field, key)?;
        printable(field, value)?;
    }
    Ok(())
}

/// Checks a file name that a client gave: a plain name, no way out of a folder.
pub fn file_name(field: &str, name: &str) -> Result<()> {
    let plain = !name.is_empty()
        && name.len() <= MAX_FILE_NAME
        && !name.starts_with('.')
        && !name.chars().any(|c| c.is_control() || matches!(c, '/' | '\\' | ':'));
    if plain {
        Ok(())
    } else {
        Err(Error::field(field, "not a plain file name; send it without folders"))
    }
}

/// A size that a client declared.
pub fn size(field: &str, size: i64, max: u64) -> Result<u64> {
    match u64::try_from(size) {
        Err(_) => Err(Error::field(field, format!("{size} is negative"))),
        Ok(size) if size > max => Err(Error::at(
            Reason::TooLarge,
            field,
            format!("{size} bytes are more than the {max} that limits.upload_bytes allows"),
        )),
        Ok(size) => Ok(size),
    }
}

fn printable(field: &str, text: &str) -> Result<()> {
    if text.chars().any(char::is_control) {
        return Err(Error::field(field, "holds control characters; leave them out"));
    }
    Ok(())
}

/// The canonical form of a path on this machine, if it lies in one of the `allowed` folders. The answer
/// is the same for what is missing and what is forbidden, so that clients cannot look around.
pub fn allowed_path(path: &Path, allowed: &[PathBuf]) -> Result<PathBuf> {
    path.canonicalize()
        .ok()
        .filter(|path| {
            allowed.iter().filter_map(|a| a.canonicalize().ok()).any(|a| path.starts_with(a))
        })
        .ok_or_else(|| {
            Error::at(
                Reason::PermissionDenied,
                "uri",
                "no path that the server imports from (import.allow_paths); upload the files instead",
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_stay_in_their_folder() {
        for good in ["model.safetensors", "tokenizer.json", "a b.gguf"] {
            file_name("f", good).unwrap();
        }
        for bad in ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "c:x", "a\0", ".hidden"] {
            assert!(file_name("f", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_outside_the_allowed_folders_are_refused() {
        let inside = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let allowed = [inside.path().to_owned()];
        let model = inside.path().join("model");
        std::fs::create_dir(&model).unwrap();
        assert!(allowed_path(&model, &allowed).is_ok());
        let link = inside.path().join("link");
        std::os::unix::fs::symlink(outside.path(), &link).unwrap();
        for bad in [&inside.path().join("missing"), &link, &model.join("../../"), outside.path()] {
            let error = allowed_path(bad, &allowed).unwrap_err();
            assert_eq!(error.reason(), Reason::PermissionDenied, "{}", bad.display());
        }
        assert!(allowed_path(&model, &[]).is_err());
    }

    #[test]
    fn sizes_are_bounded() {
        assert_eq!(size("s", 5, 5).unwrap(), 5);
        assert_eq!(size("s", 6, 5).unwrap_err().reason(), Reason::TooLarge);
        assert_eq!(size("s", -1, 5).unwrap_err().reason(), Reason::InvalidField);
    }
}
