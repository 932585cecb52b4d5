//! Exports of versions: the conversion, the model card, the stream.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::StreamExt as _;
use prost::Message;
use tempfile::TempDir;

use super::State;
use super::convert;
use super::download::{self, Messages, Piece, Source as File};
use crate::error::{Error, Reason, Result};
use crate::models::AnyModel;
use crate::models::export::{self, Gguf, GgufFormat, Report};
use crate::nn::dtype::Dtype;
use crate::progress::Progress;
use crate::proto::v1::{self, export_model_response::Part};
use crate::recipe::{self, card};
use crate::store::models::VersionRow;
use crate::store::names;
use crate::store::operations::Operation;

/// Versions that a card goes back.
const MAX_ANCESTORS: usize = 1000;

/// Evaluations that a card tells of, the newest.
const MAX_EVALUATIONS: usize = 20;

/// Tensors of a report, as many as fit into a message for sure.
const MAX_TENSORS: usize = 8192;

/// Converts a version and streams what came of it. Dropped before its end, the conversion stops.
pub async fn export(
    state: &State,
    request: &v1::ExportModelRequest,
) -> Result<Messages<v1::ExportModelResponse>> {
    let form = Form::of(request)?;
    let row = state.store.version(&request.name).await?;
    let story = Story::read(state, &row).await?;
    let folder = tempfile::Builder::new().prefix("export-").tempdir_in(&state.scratch)?;
    let (mut files, folder, report) = match form {
        Form::Native => (native(state, &row).await?, folder, None),
        _ => converted(state, &row, form, folder).await?,
    };
    let path = folder.path().join(card::FILE);
    let text = card::text(&story.card(form, report.as_ref(), &gguf_name(&row)));
    tokio::fs::write(&path, text).await?;
    // First: it is small, and a client that has such files already knows before the large ones come.
    files.insert(0, File { name: card::FILE.to_owned(), path });

    let message = |part| v1::ExportModelResponse { part: Some(part) };
    let files = download::stream(files, Some(folder), move |piece| {
        Some(message(match piece {
            Piece::File { name, size } => Part::File(v1::ModelFile {
                file_name: name,
                digest: String::new(),
                size_bytes: convert::signed(size),
            }),
            Piece::Chunk(chunk) => Part::Chunk(chunk),
        }))
    });
    let report = report.map(|report| Ok(message(Part::Report(report))));
    Ok(Box::pin(futures::stream::iter(report).chain(files)))
}

async fn native(state: &State, row: &VersionRow) -> Result<Vec<File>> {
    let paths = state.store.version_paths(row).await?;
    Ok(paths.into_iter().map(|(name, path)| File { name, path }).collect())
}

type Converted = (Vec<File>, TempDir, Option<v1::ExportReport>);

async fn converted(
    state: &State,
    row: &VersionRow,
    form: Form,
    folder: TempDir,
) -> Result<Converted> {
    // Conversions take all of a disk and a core: few at a time.
    let turn = Arc::clone(&state.exports).acquire_owned().await;
    let model = state.store.open_any_version(row).await?;
    let abandoned = Abandoned::default();
    let progress = Progress::new(Arc::new(|_, _| {}), Arc::clone(&abandoned.0));
    let name = gguf_name(row);
    super::blocking(move || {
        // Work outlives a call that was dropped, by some rows: so does its turn.
        let _turn = turn;
        let (paths, report) = form.write(&model, folder.path(), &name, &progress)?;
        let files = paths.into_iter().map(|path| {
            // Within the folder: some files lie in one of their own.
            let name = path.strip_prefix(folder.path()).unwrap_or(&path);
            File { name: name.to_string_lossy().into_owned(), path }
        });
        Ok((files.collect(), folder, Some(message(form, report))))
    })
    .await
}

fn gguf_name(row: &VersionRow) -> String {
    format!("{}.gguf", row.model)
}

/// Cancels work when the call that wants it is dropped.
#[derive(Default)]
struct Abandoned(Arc<AtomicBool>);

impl Drop for Abandoned {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn message(form: Form, report: Report) -> v1::ExportReport {
    let Report { mut tensors, mut warnings } = report;
    if tensors.len() > MAX_TENSORS {
        warnings.push(format!(
            "only {MAX_TENSORS} of the {} tensors are told of, those that rounding moved most",
            tensors.len()
        ));
        tensors.sort_by(|a, b| b.drift.relative().total_cmp(&a.drift.relative()));
        tensors.truncate(MAX_TENSORS);
    }
    let tensors = tensors.into_iter().map(|tensor| v1::ExportedTensor {
        name: tensor.name,
        stored_as: tensor.stored_as,
        written_as: tensor.written_as,
        size_bytes: convert::signed(tensor.bytes),
        carried: tensor.carried,
        max_difference: f64::from(tensor.drift.max()),
        relative_difference: tensor.drift.relative(),
    });
    v1::ExportReport { format: form.format().into(), tensors: tensors.collect(), warnings }
}

/// What is known of a version.
struct Story {
    version: v1::ModelVersion,
    display_name: String,
    labels: BTreeMap<String, String>,
    ancestors: Vec<card::Ancestor>,
    measured: Vec<card::Measured>,
}

impl Story {
    async fn read(state: &State, row: &VersionRow) -> Result<Self> {
        let model = state.store.model(&row.model).await?;
        let mut reports = Reports { state, known: BTreeMap::new() };
        let mut ancestors = Vec::new();
        let mut next = Some(row.clone());
        while let Some(row) = next.take().filter(|_| ancestors.len() < MAX_ANCESTORS) {
            let lineage = row.lineage()?;
            let name = row.name();
            let step = reports.recipe(&lineage.operation).await?.and_then(|made| {
                made.report.steps.iter().find(|step| step.version == name).cloned()
            });
            next = match lineage.parent.as_str() {
                "" => None,
                parent => found(state.store.version(parent).await)?,
            };
            ancestors.push(card::Ancestor { name, digest: row.digest, lineage, step });
        }
        ancestors.reverse();
        let measured = reports.measured(row).await?;
        Ok(Self {
            version: row.message()?,
            display_name: model.display_name,
            labels: model.labels,
            ancestors,
            measured,
        })
    }

    fn card<'a>(
        &'a self,
        form: Form,
        export: Option<&'a v1::ExportReport>,
        file: &'a str,
    ) -> card::Card<'a> {
        card::Card {
            version: &self.version,
            display_name: &self.display_name,
            labels: &self.labels,
            ancestors: &self.ancestors,
            measured: &self.measured,
            format: form.format(),
            export,
            file,
        }
    }
}

/// `None` for what is not there any more.
fn found<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.reason() == Reason::ResourceNotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A recipe that ran.
#[derive(Clone)]
struct Made {
    recipe: v1::Recipe,
    report: v1::RecipeReport,
    /// When it was asked for.
    created_ms: i64,
}

/// Reports of recipes by operation.
struct Reports<'a> {
    state: &'a State,
    known: BTreeMap<String, Option<Made>>,
}

impl Reports<'_> {
    /// The recipe and the report of an operation, where it is one and is still there.
    async fn recipe(&mut self, name: &str) -> Result<Option<&Made>> {
        if !self.known.contains_key(name) {
            let read = match name.strip_prefix("operations/") {
                None => None,
                Some(id) => found(self.state.store.operation(id).await)?,
            };
            self.known.insert(name.to_owned(), read.as_ref().and_then(recipe_of));
        }
        Ok(self.known.get(name).and_then(Option::as_ref))
    }

    /// What was measured of a version: by the recipe that made it, and since.
    async fn measured(&mut self, row: &VersionRow) -> Result<Vec<card::Measured>> {
        let mut all = Vec::new();
        let operation = row.lineage()?.operation;
        let made = self.recipe(&operation).await?.cloned();
        if let Some(Made { recipe, report, created_ms }) = made
            && let Some(after) = report.after.filter(|after| after.version == row.name())
        {
            let names = recipe.evaluation.as_ref().map(recipe::evaluation_datasets);
            let datasets = self.digests(names.unwrap_or_default(), created_ms).await?;
            all.push(card::Measured { report: after, before: report.before, datasets });
        }
        for operation in self.state.store.evaluations(&row.name(), MAX_EVALUATIONS).await? {
            let request = v1::EvaluateRequest::decode(&*operation.request).ok();
            let response = operation.response.as_deref().map(v1::EvaluationReport::decode);
            let Some(Ok(report)) = response else { continue };
            let names =
                request.and_then(|r| r.evaluation).as_ref().map(recipe::evaluation_datasets);
            let datasets = self.digests(names.unwrap_or_default(), operation.created_ms).await?;
            all.push(card::Measured { report, before: None, datasets });
        }
        all.retain(|measured| !measured.report.measurements.is_empty());
        Ok(all)
    }

    /// Names with digests, of data sets that were there when an operation was asked for: what has such a name
    /// since then is another, and the one that was read is gone.
    async fn digests(&self, names: Vec<String>, asked_ms: i64) -> Result<Vec<(String, String)>> {
        let mut all = Vec::new();
        for name in names.into_iter().filter(|name| !name.is_empty()) {
            let row = match names::dataset(&name) {
                Ok(id) => found(self.state.store.dataset(id).await)?,
                Err(_) => None,
            };
            let row = row.filter(|row| row.created_ms <= asked_ms);
            all.push((name, row.map(|row| row.object.digest).unwrap_or_default()));
        }
        Ok(all)
    }
}

fn recipe_of(operation: &Operation) -> Option<Made> {
    if operation.kind != crate::store::operations::Kind::Recipe {
        return None;
    }
    let request = v1::RunRecipeRequest::decode(&*operation.request).ok()?;
    let report = v1::RecipeReport::decode(operation.response.as_deref()?).ok()?;
    let recipe = request.recipe.unwrap_or_default();
    Some(Made { recipe, report, created_ms: operation.created_ms })
}

/// What an export is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Native,
    HuggingFace(Dtype),
    Gguf(Gguf),
    CompressedTensors(Dtype),
}

impl Form {
    fn of(request: &v1::ExportModelRequest) -> Result<Self> {
        use v1::{ExportFormat as F, ExportType as T};
        let format = F::try_from(request.format)
            .map_err(|_| Error::field("format", format!("{} is no format", request.format)))?;
        let r#type = T::try_from(request.r#type)
            .map_err(|_| Error::field("type", format!("{} is no type", request.r#type)))?;
        let decode_grids = request.decode_grids;
        if decode_grids && format != F::Gguf {
            return Err(Error::field(
                "decode_grids",
                "only gguf files keep grids of their own; leave it out",
            ));
        }
        let gguf = |format| Self::Gguf(Gguf { format, decode_grids });
        Ok(match (format, r#type) {
            (F::Native, T::Unspecified) => Self::Native,
            (F::Native, _) => {
                return Err(Error::field("type", "native exports keep the layouts; leave it out"));
            }
            (F::Unspecified | F::HuggingFace, T::Unspecified | T::Bf16) => {
                Self::HuggingFace(Dtype::BF16)
            }
            (F::Unspecified | F::HuggingFace, T::F16) => Self::HuggingFace(Dtype::F16),
            (F::Unspecified | F::HuggingFace, T::F32) => Self::HuggingFace(Dtype::F32),
            (F::Unspecified | F::HuggingFace, _) => {
                return Err(Error::field("type", "hugging face folders take F32, F16 or BF16"));
            }
            (F::CompressedTensors, T::Unspecified | T::F16) => Self::CompressedTensors(Dtype::F16),
            (F::CompressedTensors, T::Bf16) => Self::CompressedTensors(Dtype::BF16),
            (F::CompressedTensors, T::F32) => Self::CompressedTensors(Dtype::F32),
            (F::CompressedTensors, _) => {
                return Err(Error::field(
                    "type",
                    "compressed-tensors folders take F32, F16 or BF16; codes stay as they are",
                ));
            }
            (F::Gguf, T::Unspecified | T::F16) => gguf(GgufFormat::F16),
            (F::Gguf, T::F32) => gguf(GgufFormat::F32),
            (F::Gguf, T::Bf16) => gguf(GgufFormat::BF16),
            (F::Gguf, T::Q80) => gguf(GgufFormat::Q8_0),
            (F::Gguf, T::Q40) => gguf(GgufFormat::Q4_0),
            (F::Gguf, T::Q41) => gguf(GgufFormat::Q4_1),
        })
    }

    fn format(self) -> v1::ExportFormat {
        match self {
            Self::Native => v1::ExportFormat::Native,
            Self::HuggingFace(_) => v1::ExportFormat::HuggingFace,
            Self::Gguf(_) => v1::ExportFormat::Gguf,
            Self::CompressedTensors(_) => v1::ExportFormat::CompressedTensors,
        }
    }

    /// Writes the model into `folder`; gives the files and what became of the tensors.
    fn write(
        self,
        model: &AnyModel,
        folder: &Path,
        gguf_name: &str,
        progress: &Progress,
    ) -> Result<(Vec<std::path::PathBuf>, Report)> {
        let exported = match self {
            Self::Native => return Err(Error::internal("a native export is not converted")),
            Self::HuggingFace(dtype) => export::dense(model, folder, dtype, progress)?,
            Self::CompressedTensors(dtype) => {
                export::compressed_tensors(model, folder, dtype, progress)?
            }
            Self::Gguf(options) => {
                let AnyModel::Decoder(model) = model else {
                    return Err(Error::new(
                        Reason::ModelUnsuitable,
                        format!(
                            "gguf files hold decoders, and the model is of the family {} ({}); export in the \
                             form hugging_face or native",
                            model.family(),
                            model.architecture()
                        ),
                    ));
                };
                let path = folder.join(gguf_name);
                let report = export::gguf(model, &path, options, progress)?;
                return Ok((vec![path], report));
            }
        };
        Ok((exported.files, exported.report))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_exports() {
        use v1::{ExportFormat as F, ExportType as T};
        let form = |format: F, r#type: T| {
            Form::of(&v1::ExportModelRequest {
                format: format.into(),
                r#type: r#type.into(),
                ..Default::default()
            })
        };
        assert_eq!(form(F::Unspecified, T::Unspecified).unwrap(), Form::HuggingFace(Dtype::BF16));
        assert_eq!(form(F::Gguf, T::Unspecified).unwrap(), Form::Gguf(GgufFormat::F16.into()));
        assert_eq!(form(F::Gguf, T::Bf16).unwrap(), Form::Gguf(GgufFormat::BF16.into()));
        assert_eq!(form(F::Native, T::Unspecified).unwrap(), Form::Native);
        let packed = form(F::CompressedTensors, T::Unspecified).unwrap();
        assert_eq!(packed, Form::CompressedTensors(Dtype::F16));
        for (format, r#type) in
            [(F::Native, T::F16), (F::HuggingFace, T::Q40), (F::CompressedTensors, T::Q80)]
        {
            assert_eq!(form(format, r#type).unwrap_err().violations()[0].field, "type");
        }
        let decoded = |format: F| {
            Form::of(&v1::ExportModelRequest {
                format: format.into(),
                decode_grids: true,
                ..Default::default()
            })
        };
        let options = Gguf { format: GgufFormat::F16, decode_grids: true };
        assert_eq!(decoded(F::Gguf).unwrap(), Form::Gguf(options));
        assert_eq!(decoded(F::Native).unwrap_err().violations()[0].field, "decode_grids");
        let wild = v1::ExportModelRequest { format: 99, ..Default::default() };
        assert_eq!(Form::of(&wild).unwrap_err().violations()[0].field, "format");
    }

    #[test]
    fn long_reports_keep_what_moved_most() {
        let tensor = |i: usize| export::TensorReport {
            name: i.to_string(),
            stored_as: "F32".into(),
            written_as: "F16".into(),
            bytes: 1,
            carried: false,
            drift: export::Drift::default(),
        };
        let tensors = (0..MAX_TENSORS + 1).map(tensor).collect();
        let report = message(Form::Native, Report { tensors, warnings: Vec::new() });
        assert_eq!(report.tensors.len(), MAX_TENSORS);
        assert!(report.warnings[0].contains("8193 tensors"), "{:?}", report.warnings);
    }
}
