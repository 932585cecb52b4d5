//! Models on the Hugging Face hub.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Repo, RepoType};

use super::{Watch, is_model_file};
use crate::error::{Error, Reason, Result};

/// A place on the hub: `owner/name[/file.gguf][@revision]`.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    repo: String,
    file: Option<String>,
    revision: String,
}

impl Place {
    pub fn parse(text: &str) -> Result<Self> {
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let segment = |s: &str| {
            !s.is_empty()
                && s.len() <= 200
                && !s.starts_with('.')
                && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
        };
        let parts: Vec<_> = path.split('/').collect();
        let sound = parts.iter().all(|p| segment(p)) && revision.split('/').all(segment);
        let file = match parts.as_slice() {
            [_, _] if sound => None,
            [_, _, file] if sound && file.ends_with(".gguf") => Some((*file).to_owned()),
            _ => {
                return Err(Error::field(
                    "source",
                    format!(
                        "'hf:{text:.120}' is no model of the hub; write hf:owner/name, \
                         hf:owner/name@revision or hf:owner/name/file.gguf"
                    ),
                ));
            }
        };
        Ok(Self { repo: parts[..2].join("/"), file, revision: revision.to_owned() })
    }
}

/// Downloads the model at `place` into `folder` and gives its file or folder.
pub fn fetch(place: &Place, folder: &Path, watch: Watch<'_>) -> Result<PathBuf> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::new(
            Reason::SourceUnavailable,
            format!(
                "the hub did not give {}@{}: {error}; check the name, and that this machine reaches the \
                 hub (HF_ENDPOINT names a mirror), or import from a file or with pypi:",
                place.repo, place.revision
            ),
        )
    };
    let api = ApiBuilder::from_env()
        .with_cache_dir(folder.to_owned())
        .with_progress(false)
        .with_retries(2)
        .build()
        .map_err(|e| failed(&e))?;
    let repo = Repo::with_revision(place.repo.clone(), RepoType::Model, place.revision.clone());
    let files = match &place.file {
        Some(file) => vec![file.clone()],
        None => {
            (watch.progress)(&format!("asking the hub for {}", place.repo));
            let handle = api.repo(repo.clone());
            let info = attend(watch, None, move || handle.info().map_err(|e| describe(&e)))?
                .map_err(|e| failed(&e))?;
            choose(info.siblings.into_iter().map(|s| s.rfilename).collect())
                .map_err(|e| failed(&e))?
        }
    };
    let mut first = None;
    for file in files {
        watch.check()?;
        let handle = api.repo(repo.clone());
        let path = download(handle, file, watch)?.map_err(|e| failed(&e))?;
        first.get_or_insert(path);
    }
    let path = first.ok_or_else(|| failed(&"it has no files"))?;
    // The first file is the .gguf itself or the config.json of a folder.
    let folder = path.parent().filter(|_| path.extension().is_none_or(|e| e != "gguf"));
    Ok(folder.map_or_else(|| path.clone(), Path::to_path_buf))
}

/// The files to fetch, the one to open first: all of a safetensors model, or the only `.gguf`.
fn choose(files: Vec<String>) -> Result<Vec<String>, String> {
    // Names with a folder are other variants of the model, and a stranger's paths; but for the one where
    // sentence-transformers says how to pool.
    const POOLING: &str = "1_Pooling/config.json";
    let mut files: Vec<_> = files
        .into_iter()
        .filter(|f| {
            let plain = !f.contains(['/', '\\']) && !f.starts_with('.');
            f == POOLING || (plain && is_model_file(f))
        })
        .collect();
    files.sort();
    let mut ggufs: Vec<_> = files.extract_if(.., |f| f.ends_with(".gguf")).collect();
    let weights = |f: &String| f.ends_with(".safetensors");
    if files.iter().any(weights) && files.iter().any(|f| f == "config.json") {
        // Some models come twice, the second time in their makers' own form.
        if files.iter().any(|f| weights(f) && f.starts_with("model")) {
            files.retain(|f| !weights(f) || f.starts_with("model"));
        }
        files.sort_by_key(|f| f != "config.json");
        return Ok(files);
    }
    match ggufs.len() {
        0 => Err("it has neither .safetensors files with a config.json nor a .gguf file".into()),
        1 => Ok(vec![ggufs.remove(0)]),
        _ => Err(format!("it has several .gguf files ({}); name one", ggufs.join(", "))),
    }
}

fn download(repo: ApiRepo, file: String, watch: Watch<'_>) -> Result<Result<PathBuf, String>> {
    let meter = Arc::new(Meter::default());
    let seen = meter.clone();
    let name = file.clone();
    attend(watch, Some((&name, &meter)), move || {
        repo.download_with_progress(&file, Seen(seen)).map_err(|e| describe(&e))
    })
}

/// How far a download is, and whether it shall go on.
#[derive(Default)]
struct Meter {
    total: AtomicU64,
    done: AtomicU64,
    stop: AtomicBool,
}

struct Seen(Arc<Meter>);

impl Progress for Seen {
    fn init(&mut self, size: usize, _: &str) {
        self.0.total.store(size as u64, Ordering::Relaxed);
    }

    fn update(&mut self, size: usize) {
        self.0.done.fetch_add(size as u64, Ordering::Relaxed);
        if self.0.stop.load(Ordering::Relaxed) {
            // The library offers no other way to end a download; nobody waits for this thread.
            resume_unwind(Box::new("cancelled"));
        }
    }

    fn finish(&mut self) {}
}

/// Does `work` on a thread of its own, so that cancelling need not wait for the network.
fn attend<T: Send + 'static>(
    watch: Watch<'_>,
    download: Option<(&str, &Arc<Meter>)>,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<Result<T, String>> {
    let thread = thread::spawn(work);
    let mut told = 0;
    while !thread.is_finished() {
        if let Err(cancelled) = watch.check() {
            if let Some((_, meter)) = download {
                meter.stop.store(true, Ordering::Relaxed);
            }
            return Err(cancelled);
        }
        if let Some((file, meter)) = download {
            let done = meter.done.load(Ordering::Relaxed) >> 20;
            if done >= told + 16 {
                told = done;
                let total = meter.total.load(Ordering::Relaxed) >> 20;
                (watch.progress)(&format!("{file}: {done} of {total} MB"));
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(thread.join().unwrap_or_else(|_| Err("the download broke off".into())))
}

/// The error with its causes, in one line.
fn describe(error: &ApiError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    use super::*;

    fn place(text: &str) -> (String, Option<String>, String) {
        let Place { repo, file, revision } = Place::parse(text).unwrap();
        (repo, file, revision)
    }

    #[test]
    fn places() {
        assert_eq!(place("a/b"), ("a/b".into(), None, "main".into()));
        assert_eq!(place("a/b@refs/pr/1"), ("a/b".into(), None, "refs/pr/1".into()));
        assert_eq!(place("a/b/c.gguf@v1"), ("a/b".into(), Some("c.gguf".into()), "v1".into()));
        for bad in
            ["", "a", "a/b/c", "a/../c.gguf", "a//b", "a/b@", "a/b@../x", "a b/c", "a/b?x", "./b"]
        {
            assert!(Place::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn choice_of_files() {
        let pick = |names: &[&str]| choose(names.iter().map(|n| (*n).to_owned()).collect());
        assert_eq!(
            pick(&[
                "README.md",
                "tokenizer.json",
                "onnx/model.safetensors",
                "../config.json",
                "1_Pooling/config.json",
                "2_Pooling/../config.json",
                "consolidated.safetensors",
                "model-00001-of-00001.safetensors",
                "config.json",
                "extra.gguf",
                "pytorch_model.bin",
            ])
            .unwrap(),
            [
                "config.json",
                "1_Pooling/config.json",
                "model-00001-of-00001.safetensors",
                "tokenizer.json",
            ]
        );
        assert_eq!(pick(&["x.gguf", "config.json"]).unwrap(), ["x.gguf"]);
        assert!(pick(&["x.gguf", "y.gguf"]).unwrap_err().contains("x.gguf, y.gguf"));
        assert!(pick(&["config.json"]).is_err());
    }

    #[test]
    fn a_closed_network_is_a_clear_error() {
        // A port that nobody listens on any more.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let api = ApiBuilder::new()
            .with_endpoint(format!("http://127.0.0.1:{port}"))
            .with_progress(false)
            .build()
            .unwrap();
        let repo = api.model("a/b".into());
        let watch = Watch { progress: &|_| (), cancelled: &|| false };
        let answer = attend(watch, None, move || repo.info().map_err(|e| describe(&e))).unwrap();
        assert!(answer.is_err());
    }

    #[test]
    fn cancelling_does_not_wait_for_the_network() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = server.local_addr().unwrap().port();
        let held = thread::spawn(move || {
            // Takes the request and never finishes its answer.
            let (mut stream, _) = server.accept().unwrap();
            let mut line = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n").unwrap();
            stream
        });
        let api = ApiBuilder::new()
            .with_endpoint(format!("http://127.0.0.1:{port}"))
            .with_progress(false)
            .build()
            .unwrap();
        let repo = api.model("a/b".into());
        let watch = Watch { progress: &|_| (), cancelled: &|| held.is_finished() };
        let answer = attend(watch, None, move || repo.info().map_err(|e| describe(&e)));
        assert_eq!(answer.unwrap_err().reason(), Reason::Cancelled);
    }
}
