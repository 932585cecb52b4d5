//! Rows of data sets.

use std::path::PathBuf;
use std::sync::Arc;

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::models::{in_use, page};
use super::objects::{Object, consume_lease};
use super::{Store, blocking, check_etag, names, new_etag, now_ms};
use crate::data::captions::Captions;
use crate::data::choices::{self, Item};
use crate::data::images::{self, Images};
use crate::data::records::{self, Checked, Layout, Record, Records, Source};
use crate::data::text;
use crate::error::{Error, Reason, Result};

/// Largest unpacked text of a data set: it is held in memory while it is read.
const MAX_TEXT_BYTES: u64 = 1 << 30;

/// What the records of a data set are.
pub use crate::data::records::Kind as DatasetKind;

/// An uploaded file and how its records are to be read.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetFile {
    pub kind: DatasetKind,
    pub name: String,
    pub layout: Layout,
}

impl From<(DatasetKind, &str)> for DatasetFile {
    fn from((kind, name): (DatasetKind, &str)) -> Self {
        Self { kind, name: name.to_owned(), layout: Layout::default() }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct DatasetRow {
    pub id: String,
    pub display_name: String,
    pub kind: DatasetKind,
    pub object: Object,
    pub file_name: String,
    pub records: i64,
    /// Records of the file that were left out as unusable.
    pub skipped: i64,
    /// How the file is read, as it was asked for.
    pub asked: Layout,
    /// How the file is read, as it was found.
    pub layout: Layout,
    pub created_ms: i64,
    pub etag: String,
    pub source: String,
}

impl DatasetRow {
    fn read(row: &SqliteRow) -> Result<Self> {
        Ok(Self {
            id: row.try_get("id")?,
            display_name: row.try_get("display_name")?,
            kind: kind(row.try_get("kind")?)?,
            object: Object {
                digest: row.try_get("digest")?,
                size: row.try_get::<i64, _>("size")?.unsigned_abs(),
            },
            file_name: row.try_get("file_name")?,
            records: row.try_get("records")?,
            skipped: row.try_get("skipped")?,
            asked: layout(row.try_get("asked")?)?,
            layout: layout(row.try_get("layout")?)?,
            created_ms: row.try_get("created_ms")?,
            etag: row.try_get("etag")?,
            source: row.try_get("source")?,
        })
    }
}

impl Store {
    /// Checks an uploaded object as a data set of the kind and writes its row. The same `request_id` (where
    /// not empty) and arguments give the row that exists; with other arguments REQUEST_ID_REUSED.
    pub async fn create_dataset(
        &self,
        id: &str,
        display_name: &str,
        file: impl Into<DatasetFile>,
        object: Object,
        request_id: &str,
    ) -> Result<DatasetRow> {
        let file = file.into();
        let created = async {
            names::check_id(id)?;
            let path = self.objects.local_path(&object.digest).await?;
            let checked = check(path, file.clone()).await?;
            self.insert_dataset(id, display_name, &file, &object, &checked, request_id).await
        };
        let created = created.await;
        // The claim of the upload goes to the row that was made; without one, it is given up.
        if !matches!(&created, Ok((_, true))) {
            self.objects.release(&object).await?;
        }
        created.map(|(row, _)| row)
    }

    /// The row, and whether it is new.
    pub(super) async fn insert_dataset(
        &self,
        id: &str,
        display_name: &str,
        file: &DatasetFile,
        object: &Object,
        checked: &Checked,
        request_id: &str,
    ) -> Result<(DatasetRow, bool)> {
        let mut tx = self.sql.write().await?;
        if !request_id.is_empty() {
            let row = sqlx::query("SELECT * FROM dataset_rows WHERE request_id = ?")
                .bind(request_id)
                .fetch_optional(&mut *tx)
                .await?;
            if let Some(row) = row.as_ref().map(DatasetRow::read).transpose()? {
                let same = row.id == id
                    && row.display_name == display_name
                    && row.kind == file.kind
                    && row.file_name == file.name
                    && row.asked == file.layout
                    && row.object == *object;
                return if same { Ok((row, false)) } else { Err(request_id_reused(request_id)) };
            }
        }
        let inserted = sqlx::query(
            "INSERT INTO datasets (id, display_name, digest, file_name, records, created_ms, etag, \
             source, request_id, kind, asked, layout, skipped) \
             VALUES (?, ?, ?, ?, ?, ?, ?, 'upload', ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
        )
        .bind(id)
        .bind(display_name)
        .bind(&object.digest)
        .bind(&file.name)
        .bind(checked.records.cast_signed())
        .bind(now_ms())
        .bind(new_etag())
        .bind(request_id)
        .bind(file.kind.name())
        .bind(json(&file.layout)?)
        .bind(json(&checked.layout)?)
        .bind(checked.skipped.cast_signed())
        .execute(&mut *tx)
        .await?;
        if inserted.rows_affected() == 0 {
            return Err(Error::new(
                Reason::ResourceExists,
                format!("datasets/{id} exists; choose another id or delete it first"),
            ));
        }
        consume_lease(&mut tx, &object.digest).await?;
        let row = sqlx::query("SELECT * FROM dataset_rows WHERE id = ?")
            .bind(id)
            .fetch_one(&mut *tx)
            .await?;
        let row = DatasetRow::read(&row)?;
        tx.commit().await?;
        Ok((row, true))
    }

    /// A data set by id.
    pub async fn dataset(&self, id: &str) -> Result<DatasetRow> {
        let row = sqlx::query("SELECT * FROM dataset_rows WHERE id = ?")
            .bind(id)
            .fetch_optional(&self.sql.reader)
            .await?;
        DatasetRow::read(&row.ok_or_else(|| no_dataset(id))?)
    }

    /// Data sets by id, after `after`, at most `limit`.
    pub async fn datasets(&self, after: Option<&str>, limit: usize) -> Result<Vec<DatasetRow>> {
        let rows = sqlx::query("SELECT * FROM dataset_rows WHERE id > ? ORDER BY id LIMIT ?")
            .bind(after.unwrap_or_default())
            .bind(page(limit))
            .fetch_all(&self.sql.reader)
            .await?;
        rows.iter().map(DatasetRow::read).collect()
    }

    /// Deletes a data set; refused while an unfinished operation reads it.
    pub async fn delete_dataset(&self, id: &str, etag: Option<&str>) -> Result<()> {
        let name = format!("datasets/{id}");
        let mut tx = self.sql.write().await?;
        let current: Option<String> = sqlx::query_scalar("SELECT etag FROM datasets WHERE id = ?")
            .bind(id)
            .fetch_optional(&mut *tx)
            .await?;
        check_etag(&name, etag, &current.ok_or_else(|| no_dataset(id))?)?;
        let user: Option<String> =
            sqlx::query_scalar("SELECT operation FROM needed WHERE resource = ? LIMIT 1")
                .bind(&name)
                .fetch_optional(&mut *tx)
                .await?;
        if let Some(user) = user {
            return Err(in_use(&name, &user));
        }
        sqlx::query("DELETE FROM datasets WHERE id = ?").bind(id).execute(&mut *tx).await?;
        tx.commit().await?;
        self.sweep().await;
        Ok(())
    }

    /// The text of a data set: documents joined by a blank line.
    pub async fn dataset_text(&self, id: &str) -> Result<Arc<String>> {
        let row = self.of_kind(id, DatasetKind::Text).await?;
        let path = self.objects.local_path(&row.object.digest).await?;
        // The ending of the file name decides how the bytes are read.
        let columns = json(&row.layout.columns)?;
        let key = format!("{}/{}/{columns}", row.object.digest, row.file_name);
        let load = async {
            let documents = documents(source(path, row)).await?;
            blocking(move || Ok(text::join(&documents))).await
        };
        self.shared_text(key, load).await
    }
}

impl Store {
    /// The questions of a data set.
    pub async fn dataset_items(&self, id: &str) -> Result<Vec<Item>> {
        let row = self.of_kind(id, DatasetKind::Choices).await?;
        let path = self.objects.local_path(&row.object.digest).await?;
        items(path, row.file_name).await
    }

    /// The images of a data set.
    pub async fn dataset_images(&self, id: &str) -> Result<Images> {
        let row = self.of_kind(id, DatasetKind::Images).await?;
        let path = self.objects.local_path(&row.object.digest).await?;
        let Layout { labels: names, templates, .. } = row.layout;
        let images = read_images(path, row.file_name).await?;
        Ok(Images { captions: Captions { names, templates }, ..images })
    }

    /// A data set and how to read its records.
    pub async fn dataset_source(&self, id: &str) -> Result<(DatasetRow, Source)> {
        let row = self.dataset(id).await?;
        let path = self.objects.local_path(&row.object.digest).await?;
        Ok((row.clone(), source(path, row)))
    }

    /// A data set, which must be of this kind.
    pub async fn of_kind(&self, id: &str, kind: DatasetKind) -> Result<DatasetRow> {
        let row = self.dataset(id).await?;
        if row.kind == kind {
            return Ok(row);
        }
        Err(Error::new(
            Reason::DatasetUnsuitable,
            format!(
                "datasets/{id} holds {}, but {} are needed here; name another data set",
                row.kind.name(),
                kind.name()
            ),
        ))
    }
}

/// Reads a file of images; classes without names are called by their numbers.
async fn check_images(source: Source) -> Result<Checked> {
    let Source { path, file_name, mut layout, .. } = source;
    let found = read_images(path, file_name.clone()).await?;
    let (named, labels) = (layout.labels.len(), found.labels());
    if named == 0 {
        layout.labels = (0..labels).map(|class| class.to_string()).collect();
    } else if named < labels {
        return Err(Error::field(
            "labels",
            format!("{named} names for the {labels} classes of {file_name}; name them all or none"),
        ));
    }
    Ok(Checked { layout, records: found.len() as u64, skipped: 0 })
}

async fn read_images(path: PathBuf, file_name: String) -> Result<Images> {
    blocking(move || images::read(&path, &file_name, MAX_TEXT_BYTES)).await
}

async fn items(path: PathBuf, file_name: String) -> Result<Vec<Item>> {
    blocking(move || choices::read_items(&path, &file_name, MAX_TEXT_BYTES)).await
}

/// The documents of a text.
async fn documents(source: Source) -> Result<Vec<String>> {
    blocking(move || {
        if plain(&source) {
            return text::read_documents(&source.path, &source.file_name, MAX_TEXT_BYTES);
        }
        let documents = Records::open(&source)?.map(|record| {
            Ok(match record?.1 {
                Record::Text(text) => Some(text),
                _ => None,
            })
        });
        documents.filter_map(Result::transpose).collect()
    })
    .await
}

/// Whether a text is read without columns: as a whole, or from the field that always holds it.
fn plain(source: &Source) -> bool {
    let name = source.file_name.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    source.layout == Layout::default()
        && ![".json", ".csv", ".tsv", ".ndjson", ".parquet"].iter().any(|end| name.ends_with(end))
}

/// Reads a whole file, to see that it can be read.
async fn check(path: PathBuf, file: DatasetFile) -> Result<Checked> {
    let DatasetFile { kind, name, layout } = file;
    let source = Source { path, file_name: name, kind, layout, max_bytes: MAX_TEXT_BYTES };
    source.layout.check(kind)?;
    let records = match kind {
        DatasetKind::Choices => items(source.path.clone(), source.file_name.clone()).await?.len(),
        DatasetKind::Images => return check_images(source).await,
        DatasetKind::Text if plain(&source) => documents(source.clone()).await?.len(),
        _ => return blocking(move || records::check(&source)).await,
    };
    Ok(Checked { layout: source.layout, records: records as u64, skipped: 0 })
}

fn source(path: PathBuf, row: DatasetRow) -> Source {
    let DatasetRow { kind, file_name, layout, .. } = row;
    Source { path, file_name, kind, layout, max_bytes: MAX_TEXT_BYTES }
}

fn kind(name: &str) -> Result<DatasetKind> {
    let known = DatasetKind::ALL.into_iter().find(|kind| kind.name() == name);
    known.ok_or_else(|| {
        Error::new(
            Reason::StoreCorrupt,
            format!(
                "a data set is of a kind '{name:.40}' that this release does not know; upgrade"
            ),
        )
    })
}

fn layout(json: &str) -> Result<Layout> {
    serde_json::from_str(json).map_err(|error| {
        Error::new(
            Reason::StoreCorrupt,
            "the layout of a data set cannot be read; import the data set again",
        )
        .with_source(error)
    })
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|error| Error::internal(format!("a layout is json: {error}")))
}

/// A request id that stands for another request.
pub(super) fn request_id_reused(request_id: &str) -> Error {
    Error::new(
        Reason::RequestIdReused,
        format!(
            "request id '{}' was used for a different request; take a new one",
            request_id.escape_debug()
        ),
    )
}

fn no_dataset(id: &str) -> Error {
    Error::not_found(&format!("datasets/{id}"), "list the data sets")
}
