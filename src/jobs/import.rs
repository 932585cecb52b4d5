//! Importing a model: bring the files, open them, keep them as a version.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use prost::Message;

use super::work::Job;
use crate::error::{Error, Result};
use crate::models::import::{self, Source};
use crate::proto::v1;
use crate::proto::v1::import_model_request::Source as Asked;

/// Progress when the files are there, and when the model is open.
const FETCHED: f64 = 0.6;
const OPENED: f64 = 0.7;

/// Gives an encoded `ModelVersion`.
pub fn run(job: &Job<'_>) -> Result<Vec<u8>> {
    let start = Instant::now();
    let operation = job.operation.name();
    if let Some(row) = job.wait(job.store.step_version(&operation, 0))? {
        return Ok(row.message()?.encode_to_vec());
    }
    let request: v1::ImportModelRequest = job.request()?;
    let (path, source) = match request.source {
        Some(Asked::Uri(uri)) => {
            let source = Source::parse(&uri)?;
            let report = |message: &str| {
                // The cancellation is what `fetch` polls for.
                let _ = job.progress.report(FETCHED / 2.0, message);
            };
            (source.fetch(job.scratch, &report, &|| job.progress.cancelled())?, uri)
        }
        Some(Asked::Uploaded(files)) => (gather(job, &files)?, "upload".to_owned()),
        None => return Err(Error::field("source", "is missing; give a uri or uploaded files")),
    };
    job.progress.report(FETCHED, "opening the model")?;
    let model = import::open_any(&path)?;
    job.progress.report(OPENED, "writing the version")?;
    let lineage = v1::Lineage {
        source,
        code_version: env!("CARGO_PKG_VERSION").to_owned(),
        seconds: start.elapsed().as_secs_f64(),
        operation,
        ..Default::default()
    };
    let written = job.store.write_version(
        &request.model_id,
        &request.display_name,
        &model,
        (&lineage, 0),
        job.scratch,
    );
    Ok(job.wait(written)?.message()?.encode_to_vec())
}

/// Lays uploaded files out in a folder under the names they are to have, and says what to open.
fn gather(job: &Job<'_>, uploaded: &v1::UploadedFiles) -> Result<PathBuf> {
    let folder = job.scratch.join("uploaded");
    std::fs::create_dir(&folder)?;
    let mut names = BTreeSet::new();
    for (i, file) in uploaded.files.iter().enumerate() {
        let field = format!("uploaded.files[{i}].file_name");
        if !plain(&file.file_name) {
            return Err(Error::field(field, "must be a file name without a folder"));
        }
        if !names.insert(file.file_name.as_str()) {
            return Err(Error::field(field, "comes twice; give each file a name of its own"));
        }
        job.progress.check()?;
        let object = job.wait(job.store.objects.local_path(&file.digest))?;
        place(&object, &folder.join(&file.file_name))?;
    }
    match uploaded.files.as_slice() {
        [] => Err(Error::field("uploaded.files", "is empty; upload the model's files first")),
        [only] if !only.file_name.eq_ignore_ascii_case("config.json") => {
            Ok(folder.join(&only.file_name))
        }
        _ => Ok(folder),
    }
}

/// Objects are write-once, so a second name for the same bytes is as good as a copy.
fn place(object: &Path, target: &Path) -> Result<()> {
    if std::fs::hard_link(object, target).is_err() {
        std::fs::copy(object, target)?;
    }
    Ok(())
}

/// Whether a name from a client names a file in a folder and nothing else, on any system.
fn plain(name: &str) -> bool {
    (1..=255).contains(&name.len())
        && !name.starts_with('.')
        && !name.chars().any(|c| matches!(c, '/' | '\\' | ':') || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_taken() {
        for good in ["model.safetensors", "a b-ü.gguf", "x..y"] {
            assert!(plain(good), "{good}");
        }
        let long = "a".repeat(256);
        for bad in ["", ".", "..", ".hidden", "../x", "a/b", "a\\b", "c:x", "a\0", "a\n", &long] {
            assert!(!plain(bad), "{bad}");
        }
    }
}
