//! Files to the server and back, in chunks, with a bar.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sha2::{Digest, Sha256};
use tokio::fs::{self, File};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::client::Client;
use super::error::{CliError, Result};
use super::output::Output;
use crate::proto::v1::{
    Dataset, DatasetHeader, ExportAdapterRequest, ExportModelRequest, ExportReport,
    ImportDatasetRequest, ModelFile, UploadFileRequest, UploadHeader, export_adapter_response,
    export_model_response, import_dataset_request, upload_file_request,
};
use crate::recipe::card;

const CHUNK: usize = 1 << 20;

/// A bar that counts bytes; hidden unless people look on.
pub fn bytes_bar(output: Output, total: u64) -> ProgressBar {
    let target = if output.shows_bar() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let template = "{bar:32} {bytes} of {total_bytes}, {bytes_per_sec} {wide_msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bar
}

/// Sends a file of a model; the answer is checked against the digest of what was read.
pub async fn upload(client: &Client, path: &Path, bar: &ProgressBar) -> Result<ModelFile> {
    let (file, size) = open(path).await?;
    let file_name = file_name(path)?;
    bar.set_message(file_name.clone());
    let header =
        UploadHeader { file_name: file_name.clone(), size_bytes: size, ..Default::default() };
    let part = |part| UploadFileRequest { part: Some(part) };
    let reading = Arc::new(Mutex::new(Reading::default()));
    let parts = chunks(
        file,
        part(upload_file_request::Part::Header(header)),
        move |bytes| part(upload_file_request::Part::Chunk(bytes)),
        bar.clone(),
        reading.clone(),
    );
    let answer = client.models().upload_file(parts).await;
    let digest = finish(&reading, path)?;
    let stored = answer?.into_inner().file.unwrap_or_default();
    if stored.digest != digest || stored.size_bytes != size {
        return Err(CliError::failure(format!(
            "{file_name} arrived as {} with {} bytes but was sent as {digest} with {size}; \
             was it changed meanwhile?",
            stored.digest, stored.size_bytes
        )));
    }
    Ok(ModelFile { file_name, ..stored })
}

/// Sends a data set; size and file name of the header are filled in here.
pub async fn upload_dataset(
    client: &Client,
    path: &Path,
    header: DatasetHeader,
    bar: &ProgressBar,
) -> Result<Dataset> {
    let (file, size) = open(path).await?;
    let header = DatasetHeader { file_name: file_name(path)?, size_bytes: size, ..header };
    let part = |part| ImportDatasetRequest { part: Some(part) };
    let reading = Arc::new(Mutex::new(Reading::default()));
    let parts = chunks(
        file,
        part(import_dataset_request::Part::Header(header)),
        move |bytes| part(import_dataset_request::Part::Chunk(bytes)),
        bar.clone(),
        reading.clone(),
    );
    let answer = client.datasets().import_dataset(parts).await;
    finish(&reading, path)?;
    Ok(answer?.into_inner())
}

/// Sends a data set that is text in memory.
pub async fn upload_text(client: &Client, header: DatasetHeader, text: &str) -> Result<Dataset> {
    let size_bytes = i64::try_from(text.len()).unwrap_or(i64::MAX);
    let header = DatasetHeader { size_bytes, ..header };
    let mut parts = vec![import_dataset_request::Part::Header(header)];
    for chunk in text.as_bytes().chunks(CHUNK) {
        parts.push(import_dataset_request::Part::Chunk(Bytes::copy_from_slice(chunk)));
    }
    let parts = parts.into_iter().map(|part| ImportDatasetRequest { part: Some(part) });
    Ok(client.datasets().import_dataset(futures::stream::iter(parts)).await?.into_inner())
}

/// What is known of a file after it was sent.
#[derive(Default)]
struct Reading {
    digest: Option<String>,
    failure: Option<std::io::Error>,
}

/// A read that failed explains the answer of the server, which only saw the stream end early.
fn finish(reading: &Mutex<Reading>, path: &Path) -> Result<String> {
    let mut reading = reading.lock().unwrap_or_else(PoisonError::into_inner);
    match reading.failure.take() {
        Some(error) => Err(CliError::file(&format!("reading {}", path.display()), &error)),
        None => Ok(reading.digest.take().unwrap_or_default()),
    }
}

fn chunks<T>(
    mut file: File,
    header: T,
    wrap: impl Fn(Bytes) -> T + Send + 'static,
    bar: ProgressBar,
    reading: Arc<Mutex<Reading>>,
) -> impl Stream<Item = T> + Send + 'static
where
    T: Send + 'static,
{
    async_stream::stream! {
        yield header;
        let mut hash = Sha256::new();
        loop {
            let mut buffer = bytes::BytesMut::with_capacity(CHUNK);
            let failure = match file.read_buf(&mut buffer).await {
                Ok(0) => {
                    let digest = format!("sha256:{:x}", hash.finalize());
                    reading.lock().unwrap_or_else(PoisonError::into_inner).digest = Some(digest);
                    break;
                }
                Ok(read) => {
                    hash.update(&buffer);
                    bar.inc(read as u64);
                    None
                }
                Err(error) => Some(error),
            };
            if failure.is_some() {
                reading.lock().unwrap_or_else(PoisonError::into_inner).failure = failure;
                break;
            }
            yield wrap(buffer.freeze());
        }
    }
}

async fn open(path: &Path) -> Result<(File, i64)> {
    let failed = |e| CliError::file(&format!("reading {}", path.display()), &e);
    let file = File::open(path).await.map_err(failed)?;
    let metadata = file.metadata().await.map_err(failed)?;
    if !metadata.is_file() {
        return Err(CliError::usage(format!("{} is not a file", path.display())));
    }
    Ok((file, i64::try_from(metadata.len()).unwrap_or(i64::MAX)))
}

/// The last part of a path, as text.
pub fn file_name(path: &Path) -> Result<String> {
    path.file_name()
        .and_then(|name| name.to_str())
        .map(str::to_owned)
        .ok_or_else(|| CliError::usage(format!("{} has no name that can be sent", path.display())))
}

/// Where an export goes.
pub struct Destination {
    /// A folder; or, with `single`, the file itself.
    pub path: PathBuf,
    /// The export is one file and `path` names it.
    pub single: bool,
    /// Replace files that exist.
    pub force: bool,
}

/// Receives an export; gives the files written with their sizes, and what became of the tensors. Files
/// appear under their names when all are whole.
pub async fn download(
    client: &Client,
    request: ExportModelRequest,
    to: &Destination,
    bar: &ProgressBar,
) -> Result<(Vec<(PathBuf, i64)>, Option<ExportReport>)> {
    let parts = client.models().export_model(request).await?.into_inner();
    let parts = parts.map(|message| Ok(message?.part));
    receive(parts, to, bar).await
}

/// Receives the files of an adapter, like [`download`].
pub async fn download_adapter(
    client: &Client,
    request: ExportAdapterRequest,
    to: &Destination,
    bar: &ProgressBar,
) -> Result<Vec<(PathBuf, i64)>> {
    use export_adapter_response::Part;
    let parts = client.adapters().export_adapter(request).await?.into_inner();
    let parts = parts.map(|message| {
        Ok(message?.part.map(|part| match part {
            Part::File(file) => export_model_response::Part::File(file),
            Part::Chunk(bytes) => export_model_response::Part::Chunk(bytes),
        }))
    });
    Ok(receive(parts, to, bar).await?.0)
}

async fn receive(
    parts: impl Stream<Item = Result<Option<export_model_response::Part>, tonic::Status>>,
    to: &Destination,
    bar: &ProgressBar,
) -> Result<(Vec<(PathBuf, i64)>, Option<ExportReport>)> {
    let mut parts = std::pin::pin!(parts);
    let folder = if to.single { to.path.parent() } else { Some(to.path.as_path()) };
    if let Some(folder) = folder.filter(|f| !f.as_os_str().is_empty()) {
        fs::create_dir_all(folder)
            .await
            .map_err(|e| CliError::file(&format!("creating {}", folder.display()), &e))?;
    }
    let mut whole: Vec<Whole> = Vec::new();
    let mut report = None;
    let mut current: Option<Incoming> = None;
    while let Some(part) = parts.next().await {
        match part? {
            Some(export_model_response::Part::File(header)) => {
                if let Some(done) = current.take() {
                    whole.push(done.close().await?);
                }
                if to.single && whole.iter().any(|w| w.path == to.path) && !is_card(&header) {
                    return Err(CliError::failure(format!(
                        "the export has several files; name a folder instead of {}",
                        to.path.display()
                    )));
                }
                bar.inc_length(u64::try_from(header.size_bytes).unwrap_or(0));
                bar.set_message(header.file_name.clone());
                current = Some(Incoming::create(to, &header).await?);
            }
            Some(export_model_response::Part::Chunk(bytes)) => {
                let Some(file) = &mut current else {
                    return Err(CliError::failure("the server sent bytes that belong to no file"));
                };
                file.write(&bytes).await?;
                bar.inc(bytes.len() as u64);
            }
            Some(export_model_response::Part::Report(made)) => report = Some(made),
            None => {}
        }
    }
    match current {
        Some(done) => whole.push(done.close().await?),
        None => return Err(CliError::failure("the server sent no file")),
    }
    let written = whole.into_iter().map(Whole::keep).collect::<Result<_>>()?;
    bar.finish_and_clear();
    Ok((written, report))
}

/// Whether a file is the model card.
fn is_card(header: &ModelFile) -> bool {
    header.file_name == card::FILE
}

/// A file that has come whole, not under its name yet.
struct Whole {
    path: PathBuf,
    partial: tempfile::TempPath,
    size: i64,
}

impl Whole {
    /// Gives the file its name.
    fn keep(self) -> Result<(PathBuf, i64)> {
        self.partial
            .persist(&self.path)
            .map_err(|e| CliError::file(&format!("writing {}", self.path.display()), &e.error))?;
        Ok((self.path, self.size))
    }
}

/// A file on its way in.
struct Incoming {
    path: PathBuf,
    /// Removed when the download ends early.
    partial: tempfile::TempPath,
    file: File,
    expected: i64,
    size: i64,
}

impl Incoming {
    async fn create(to: &Destination, header: &ModelFile) -> Result<Self> {
        let path = match to.single {
            // The card of a file lies beside it, under its name.
            true if is_card(header) => to.path.with_extension(card::FILE),
            true => to.path.clone(),
            false => to.path.join(safe(&header.file_name)?),
        };
        if !to.force && fs::try_exists(&path).await.unwrap_or(true) {
            return Err(CliError::usage(format!(
                "{} exists; choose another place or add --force",
                path.display()
            )));
        }
        let folder = path.parent().filter(|f| !f.as_os_str().is_empty());
        let failed = |e| CliError::file(&format!("writing {}", path.display()), &e);
        if let Some(folder) = folder.filter(|_| !to.single) {
            fs::create_dir_all(folder).await.map_err(failed)?;
        }
        let (file, partial) = tempfile::Builder::new()
            .prefix(".planish-")
            .tempfile_in(folder.unwrap_or(Path::new(".")))
            .map_err(failed)?
            .into_parts();
        let file = File::from_std(file);
        Ok(Self { path, partial, file, expected: header.size_bytes, size: 0 })
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.size = self.size.saturating_add(i64::try_from(bytes.len()).unwrap_or(i64::MAX));
        if self.size > self.expected {
            return Err(self.wrong_size());
        }
        let path = &self.path;
        self.file
            .write_all(bytes)
            .await
            .map_err(|e| CliError::file(&format!("writing {}", path.display()), &e))
    }

    async fn close(mut self) -> Result<Whole> {
        if self.size != self.expected {
            return Err(self.wrong_size());
        }
        let failed = |e| CliError::file(&format!("writing {}", self.path.display()), &e);
        self.file.flush().await.map_err(failed)?;
        readable(&self.file).await.map_err(failed)?;
        Ok(Whole { path: self.path, partial: self.partial, size: self.size })
    }

    fn wrong_size(&self) -> CliError {
        CliError::failure(format!(
            "{} was announced with {} bytes, {} came",
            self.path.display(),
            self.expected,
            self.size
        ))
    }
}

/// Temporary files are private; an export is for other programs.
async fn readable(file: &File) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(std::fs::Permissions::from_mode(0o644)).await?;
    }
    Ok(())
}

/// A file name from the server that stays inside the folder; a module of an encoder has its settings in
/// a folder of its own (`1_Pooling/config.json`).
fn safe(name: &str) -> Result<&str> {
    let plain = |name: &str| {
        !name.is_empty()
            && !name.starts_with('.')
            && !name.contains(['/', '\\', ':'])
            && !name.chars().any(char::is_control)
    };
    let module = name
        .strip_suffix("/config.json")
        .is_some_and(|folder| plain(folder) && folder.starts_with(|c: char| c.is_ascii_digit()));
    if plain(name) || module {
        Ok(name)
    } else {
        Err(CliError::failure(format!("the server sent a file called {name:?}; not written")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_the_server_stay_in_the_folder() {
        assert!(safe("model-00001-of-00002.safetensors").is_ok());
        assert!(safe("1_Pooling/config.json").is_ok());
        let inside = ["../config.json", "/config.json", "a/config.json", "1/../config.json"];
        for bad in inside.iter().chain(&["1/b/config.json", "1_Pooling/x.json"]) {
            assert!(safe(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "..", "../x", "/etc/passwd", "a/b", "a\\b", "c:x", ".bashrc", "a\nb"] {
            assert!(safe(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_file_appears_only_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let to = Destination { path: folder.path().to_owned(), single: false, force: false };
        let header = ModelFile { file_name: "a.json".into(), size_bytes: 4, ..Default::default() };
        let mut file = Incoming::create(&to, &header).await.unwrap();
        file.write(b"ab").await.unwrap();
        assert!(file.close().await.is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let mut file = Incoming::create(&to, &header).await.unwrap();
        file.write(b"abcd").await.unwrap();
        assert!(file.write(b"e").await.is_err());
        let mut file = Incoming::create(&to, &header).await.unwrap();
        file.write(b"abcd").await.unwrap();
        let whole = file.close().await.unwrap();
        assert!(!folder.path().join("a.json").exists(), "the others may fail yet");
        let (path, size) = whole.keep().unwrap();
        assert_eq!((std::fs::read(path).unwrap().as_slice(), size), (b"abcd".as_slice(), 4));
        assert!(Incoming::create(&to, &header).await.is_err(), "no silent overwrite");
    }
}
