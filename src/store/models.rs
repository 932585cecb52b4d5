//! Rows of models and versions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, Sqlite, Transaction};
use tempfile::TempDir;

use super::objects::{Object, consume_lease, digest_text, hash_file};
use super::sql::json;
use super::{Store, blocking, check_etag, names, new_etag, now_ms};
use crate::error::{Error, Reason, Result};
use crate::models::{AnyInfo, AnyModel, Model, package};
use crate::proto::v1;

/// A model's row.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelRow {
    pub id: String,
    pub display_name: String,
    pub labels: BTreeMap<String, String>,
    pub created_ms: i64,
    pub updated_ms: i64,
    pub etag: String,
    pub latest: Option<i64>,
    pub versions: i64,
}

/// A version's row. `lineage` is a `planish.v1.Lineage` message in its JSON mapping.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionRow {
    pub model: String,
    pub version: i64,
    pub digest: String,
    pub family: String,
    pub architecture: String,
    pub config: Value,
    pub parameters: i64,
    pub weight_bytes: i64,
    pub total_bytes: i64,
    pub layout_bytes: BTreeMap<String, i64>,
    pub files: Vec<(String, Object)>,
    pub lineage: Value,
    pub created_ms: i64,
}

impl VersionRow {
    /// `models/{model}/versions/{version}`.
    pub fn name(&self) -> String {
        names::of_version(&self.model, self.version)
    }

    /// Digest of the weights alone, which is the same wherever and however a version with them was made.
    pub fn weights_digest(&self) -> String {
        weights_digest(&self.files)
    }

    /// How the version came to be.
    pub fn lineage(&self) -> Result<v1::Lineage> {
        serde_json::from_value(self.lineage.clone()).map_err(|error| {
            Error::new(
                Reason::StoreCorrupt,
                format!("the lineage of {} is damaged: {error}; restore a backup", self.name()),
            )
        })
    }

    /// The row as a message of the API.
    pub fn message(&self) -> Result<v1::ModelVersion> {
        let config = serde_json::from_value(self.config.clone()).map_err(|error| {
            Error::new(
                Reason::StoreCorrupt,
                format!(
                    "the configuration of {} is damaged: {error}; restore a backup",
                    self.name()
                ),
            )
        })?;
        let files = self.files.iter().map(|(file_name, object)| v1::ModelFile {
            file_name: file_name.clone(),
            digest: object.digest.clone(),
            size_bytes: i64::try_from(object.size).unwrap_or(i64::MAX),
        });
        Ok(v1::ModelVersion {
            name: self.name(),
            digest: self.digest.clone(),
            family: self.family.clone(),
            architecture: self.architecture.clone(),
            config: Some(config),
            parameter_count: self.parameters,
            weight_bytes: self.weight_bytes,
            total_bytes: self.total_bytes,
            layout_bytes: self.layout_bytes.clone().into_iter().collect(),
            files: files.collect(),
            lineage: Some(self.lineage()?),
            create_time: Some(timestamp(self.created_ms)),
        })
    }

    fn read(row: &SqliteRow) -> Result<Self> {
        let text = |column: &str| row.try_get::<&str, _>(column);
        let files: Vec<(String, String, u64)> = json(text("files")?)?;
        Ok(Self {
            model: row.try_get("model")?,
            version: row.try_get("version")?,
            digest: row.try_get("digest")?,
            family: row.try_get("family")?,
            architecture: row.try_get("architecture")?,
            config: json(text("config")?)?,
            parameters: row.try_get("parameters")?,
            weight_bytes: row.try_get("weight_bytes")?,
            total_bytes: row.try_get("total_bytes")?,
            layout_bytes: json(text("layout_bytes")?)?,
            files: files
                .into_iter()
                .map(|(name, digest, size)| (name, Object { digest, size }))
                .collect(),
            lineage: json(text("lineage")?)?,
            created_ms: row.try_get("created_ms")?,
        })
    }
}

impl ModelRow {
    fn read(row: &SqliteRow) -> Result<Self> {
        Ok(Self {
            id: row.try_get("id")?,
            display_name: row.try_get("display_name")?,
            labels: json(row.try_get("labels")?)?,
            created_ms: row.try_get("created_ms")?,
            updated_ms: row.try_get("updated_ms")?,
            etag: row.try_get("etag")?,
            latest: row.try_get("latest")?,
            versions: row.try_get("versions")?,
        })
    }
}

/// A version by its name and content alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexRow {
    pub model: String,
    pub version: i64,
    pub digest: String,
}

/// Versions that an index may have.
const MAX_INDEX: usize = 100_000;

/// A version whose files are stored and whose row is not yet.
pub(super) struct NewVersion {
    pub model: String,
    /// Used when the model is new.
    pub display_name: String,
    pub facts: Facts,
    pub files: Vec<(String, Object)>,
    pub lineage: v1::Lineage,
    /// Number of the version among those that its operation makes.
    pub place: i32,
}

/// What a version's row says of its model.
pub(super) struct Facts {
    pub family: String,
    pub architecture: String,
    pub config: Value,
    pub parameters: u64,
    pub weight_bytes: u64,
    pub layout_bytes: BTreeMap<String, u64>,
}

impl Facts {
    fn of(model: &AnyModel) -> Self {
        let mut layout_bytes = BTreeMap::new();
        for weight in model.weights().values() {
            *layout_bytes.entry(layout_name(&weight.record())).or_insert(0) += weight.bytes();
        }
        Self {
            family: model.family().to_owned(),
            architecture: model.architecture().to_owned(),
            config: model.config().clone(),
            parameters: model.parameters(),
            weight_bytes: model.bytes(),
            layout_bytes,
        }
    }
}

/// A version's files in a folder of their own, not stored and known to nobody; gone when dropped.
pub struct Draft {
    folder: TempDir,
    files: Vec<(String, Object)>,
    facts: Facts,
}

impl Draft {
    /// The digest that the version has or would have.
    pub fn digest(&self) -> String {
        version_digest(&self.files)
    }

    /// As of [`VersionRow::weights_digest`].
    pub fn weights_digest(&self) -> String {
        weights_digest(&self.files)
    }

    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|(_, object)| object.size).sum()
    }

    /// Opens the model (weights memory-mapped). Blocks.
    pub fn open(&self) -> Result<AnyModel> {
        let paths =
            self.files.iter().map(|(name, _)| (name.clone(), self.folder.path().join(name)));
        package::read_any(&paths.collect())
    }
}

impl Store {
    /// Writes a model's files as a new version (creating the model where it is new). `lineage` without
    /// times and names goes into `planish.json`; the row keeps it whole. Idempotent by (operation,
    /// place): writing the version of that number of the same operation again returns the one that
    /// exists.
    pub async fn write_version(
        &self,
        model_id: &str,
        display_name: &str,
        model: impl Into<AnyModel>,
        (lineage, place): (&v1::Lineage, i32),
        scratch: &Path,
    ) -> Result<VersionRow> {
        names::check_id(model_id)?;
        if let Some(row) = self.step_version(&lineage.operation, place).await? {
            return Ok(row);
        }
        let draft = self.draft(model, lineage, scratch).await?;
        let mut files = Vec::with_capacity(draft.files.len());
        for (name, object) in draft.files {
            let path = draft.folder.path().join(&name);
            files.push((name, self.objects.put_file(&path, Some(object)).await?));
        }
        self.commit_version(NewVersion {
            model: model_id.to_owned(),
            display_name: display_name.to_owned(),
            facts: draft.facts,
            files,
            lineage: lineage.clone(),
            place,
        })
        .await
    }

    /// Writes a model's files below `scratch` as [`Store::write_version`] would store them.
    pub async fn draft(
        &self,
        model: impl Into<AnyModel>,
        lineage: &v1::Lineage,
        scratch: &Path,
    ) -> Result<Draft> {
        let model = model.into();
        let kept = reproducible(lineage)?;
        let (copy, parent) = (model.clone(), scratch.to_owned());
        let (folder, files) = blocking(move || {
            std::fs::create_dir_all(&parent)?;
            let folder = tempfile::Builder::new().prefix("version-").tempdir_in(parent)?;
            let written = package::write_any(&copy, &kept, folder.path())?;
            let files = written.into_iter().map(|name| {
                let object = hash_file(&folder.path().join(&name))?;
                Ok((name, object))
            });
            let files = files.collect::<Result<Vec<_>>>()?;
            Ok((folder, files))
        })
        .await?;
        Ok(Draft { folder, files, facts: Facts::of(&model) })
    }

    /// Makes a version visible, or gives up its objects where the same step was written before.
    pub(super) async fn commit_version(&self, new: NewVersion) -> Result<VersionRow> {
        let row = self.insert_version(&new).await;
        if !matches!(&row, Ok((_, true))) {
            for (_, object) in &new.files {
                if let Err(error) = self.objects.release(object).await {
                    tracing::warn!(%error, digest = object.digest, "an object was not released");
                }
            }
        }
        row.map(|(row, _)| row)
    }

    /// The version of the step, and whether it is new.
    async fn insert_version(&self, new: &NewVersion) -> Result<(VersionRow, bool)> {
        let lineage = &new.lineage;
        let mut tx = self.sql.write().await?;
        if let Some(row) = find_step(&mut *tx, &lineage.operation, new.place).await? {
            return Ok((row, false));
        }
        let now = now_ms();
        let version: i64 = sqlx::query_scalar(
            "INSERT INTO models (id, display_name, created_ms, updated_ms, etag, next_version) \
             VALUES (?1, ?2, ?3, ?3, ?4, 2) ON CONFLICT (id) DO UPDATE SET updated_ms = ?3, \
             etag = ?4, next_version = next_version + 1 RETURNING next_version - 1",
        )
        .bind(&new.model)
        .bind(&new.display_name)
        .bind(now)
        .bind(new_etag())
        .fetch_one(&mut *tx)
        .await?;
        let total = new.files.iter().try_fold(0u64, |sum, (_, o)| sum.checked_add(o.size));
        sqlx::query(
            "INSERT INTO versions (model, version, digest, family, architecture, config, parameters, \
             weight_bytes, total_bytes, layout_bytes, lineage, parent, operation, step, created_ms) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&new.model)
        .bind(version)
        .bind(version_digest(&new.files))
        .bind(&new.facts.family)
        .bind(&new.facts.architecture)
        .bind(new.facts.config.to_string())
        .bind(integer(new.facts.parameters)?)
        .bind(integer(new.facts.weight_bytes)?)
        .bind(integer(total.unwrap_or(u64::MAX))?)
        .bind(serde_json::json!(new.facts.layout_bytes).to_string())
        .bind(message_json(lineage)?.to_string())
        .bind(&lineage.parent)
        .bind(&lineage.operation)
        .bind(new.place)
        .bind(now)
        .execute(&mut *tx)
        .await?;
        for (name, object) in &new.files {
            sqlx::query(
                "INSERT INTO version_files (model, version, file_name, digest) VALUES (?, ?, ?, ?)",
            )
            .bind(&new.model)
            .bind(version)
            .bind(name)
            .bind(&object.digest)
            .execute(&mut *tx)
            .await?;
            consume_lease(&mut tx, &object.digest).await?;
        }
        let row = sqlx::query("SELECT * FROM version_rows WHERE model = ? AND version = ?")
            .bind(&new.model)
            .bind(version)
            .fetch_one(&mut *tx)
            .await?;
        let row = VersionRow::read(&row)?;
        tx.commit().await?;
        self.recent.forget();
        Ok((row, true))
    }

    /// The version that an operation wrote as this number of its versions, if it got that far.
    pub async fn step_version(&self, operation: &str, place: i32) -> Result<Option<VersionRow>> {
        find_step(&self.sql.reader, operation, place).await
    }

    /// A version by resource name; `models/{model}` gives the newest.
    pub async fn version(&self, name: &str) -> Result<VersionRow> {
        let (model, number) = names::version(name)?;
        let changes = match self.recent.find(name) {
            Ok(row) => return Ok(row),
            Err(changes) => changes,
        };
        let row = sqlx::query(
            "SELECT * FROM version_rows WHERE model = ?1 AND version = \
             coalesce(?2, (SELECT max(version) FROM versions WHERE model = ?1))",
        )
        .bind(model)
        .bind(number)
        .fetch_optional(&self.sql.reader)
        .await?;
        match row {
            Some(row) => {
                let row = VersionRow::read(&row)?;
                self.recent.keep(name, changes, &row);
                Ok(row)
            }
            None if number.is_some() => Err(Error::not_found(name, "list the model's versions")),
            None => {
                self.model(model).await?;
                Err(Error::not_found(&format!("a version of {name}"), "import one"))
            }
        }
    }

    /// Local paths of a version's files, by file name.
    pub async fn version_paths(&self, row: &VersionRow) -> Result<BTreeMap<String, PathBuf>> {
        let mut paths = BTreeMap::new();
        for (name, object) in &row.files {
            paths.insert(name.clone(), self.objects.local_path(&object.digest).await?);
        }
        Ok(paths)
    }

    /// Opens a version's model of whatever family (weights memory-mapped).
    pub async fn open_any_version(&self, row: &VersionRow) -> Result<AnyModel> {
        let paths = self.version_paths(row).await?;
        blocking(move || package::read_any(&paths)).await
    }

    /// Opens a version's model as one that methods change (weights memory-mapped).
    pub async fn open_version(&self, row: &VersionRow) -> Result<Model> {
        let paths = self.version_paths(row).await?;
        blocking(move || package::read(&paths)).await
    }

    /// Shapes, layouts and sizes of a version's model, from headers only.
    pub async fn version_info(&self, row: &VersionRow) -> Result<AnyInfo> {
        let paths = self.version_paths(row).await?;
        blocking(move || package::read_any_info(&paths)).await
    }

    /// A model by id.
    pub async fn model(&self, id: &str) -> Result<ModelRow> {
        let row = sqlx::query("SELECT * FROM model_rows WHERE id = ?")
            .bind(id)
            .fetch_optional(&self.sql.reader)
            .await?;
        ModelRow::read(&row.ok_or_else(|| no_model(id))?)
    }

    /// The versions of `model`, or of all models, by model and newest first. TOO_LARGE beyond
    /// 100,000.
    pub async fn version_index(&self, model: Option<&str>) -> Result<Vec<IndexRow>> {
        let rows = sqlx::query(
            "SELECT model, version, digest FROM versions WHERE (?1 IS NULL OR model = ?1) \
             ORDER BY model, version DESC LIMIT ?2",
        )
        .bind(model)
        .bind(page(MAX_INDEX + 1))
        .fetch_all(&self.sql.reader)
        .await?;
        if rows.len() > MAX_INDEX {
            return Err(Error::new(
                Reason::TooLarge,
                format!("there are more than {MAX_INDEX} versions; list them model by model"),
            ));
        }
        let read = |row: &SqliteRow| {
            Ok(IndexRow {
                model: row.try_get("model")?,
                version: row.try_get("version")?,
                digest: row.try_get("digest")?,
            })
        };
        rows.iter().map(read).collect()
    }

    /// Models by id, after `after`, at most `limit`.
    pub async fn models(&self, after: Option<&str>, limit: usize) -> Result<Vec<ModelRow>> {
        let rows = sqlx::query("SELECT * FROM model_rows WHERE id > ? ORDER BY id LIMIT ?")
            .bind(after.unwrap_or_default())
            .bind(page(limit))
            .fetch_all(&self.sql.reader)
            .await?;
        rows.iter().map(ModelRow::read).collect()
    }

    /// Versions newest first, below `before`, at most `limit`.
    pub async fn versions(
        &self,
        model: &str,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<VersionRow>> {
        let rows = sqlx::query(
            "SELECT * FROM version_rows WHERE model = ?1 AND (?2 IS NULL OR version < ?2) \
             ORDER BY version DESC LIMIT ?3",
        )
        .bind(model)
        .bind(before)
        .bind(page(limit))
        .fetch_all(&self.sql.reader)
        .await?;
        if rows.is_empty() {
            self.model(model).await?;
        }
        rows.iter().map(VersionRow::read).collect()
    }

    /// Changes what is given; ETAG_MISMATCH when `etag` is not the current one.
    pub async fn update_model(
        &self,
        id: &str,
        display_name: Option<&str>,
        labels: Option<&BTreeMap<String, String>>,
        etag: Option<&str>,
    ) -> Result<ModelRow> {
        let mut tx = self.sql.write().await?;
        guard(&mut tx, id, etag).await?;
        sqlx::query(
            "UPDATE models SET display_name = coalesce(?2, display_name), \
             labels = coalesce(?3, labels), updated_ms = ?4, etag = ?5 WHERE id = ?1",
        )
        .bind(id)
        .bind(display_name)
        .bind(labels.map(|labels| serde_json::json!(labels).to_string()))
        .bind(now_ms())
        .bind(new_etag())
        .execute(&mut *tx)
        .await?;
        let row = sqlx::query("SELECT * FROM model_rows WHERE id = ?")
            .bind(id)
            .fetch_one(&mut *tx)
            .await?;
        let row = ModelRow::read(&row)?;
        tx.commit().await?;
        Ok(row)
    }

    /// Deletes a model, its versions, and the objects nothing else uses. Refused while an unfinished
    /// operation, a version of another model or an adapter depends on it.
    pub async fn delete_model(&self, id: &str, etag: Option<&str>) -> Result<()> {
        let mut tx = self.sql.write().await?;
        guard(&mut tx, id, etag).await?;
        let name = format!("models/{id}");
        let user: Option<String> = sqlx::query_scalar(
            "SELECT operation FROM needed \
             WHERE resource = ?1 OR substr(resource, 1, length(?1) + 1) = ?1 || '/' \
             UNION ALL \
             SELECT 'models/' || model || '/versions/' || version FROM versions \
             WHERE model <> ?2 AND substr(parent, 1, length(?1) + 1) = ?1 || '/' \
             UNION ALL SELECT 'adapters/' || id FROM adapters WHERE base_model = ?2 LIMIT 1",
        )
        .bind(&name)
        .bind(id)
        .fetch_optional(&mut *tx)
        .await?;
        if let Some(user) = user {
            return Err(in_use(&name, &user));
        }
        sqlx::query("DELETE FROM models WHERE id = ?").bind(id).execute(&mut *tx).await?;
        tx.commit().await?;
        self.recent.forget();
        self.sweep().await;
        Ok(())
    }

    /// Deletes a version and the objects nothing else uses. Refused while an unfinished operation
    /// needs it or made it, and while another version was made from it.
    pub async fn delete_version(&self, name: &str) -> Result<()> {
        self.remove_version(name, "").await
    }

    /// Deletes a version on behalf of the unfinished operation `maker`, which made it; otherwise like
    /// [`Store::delete_version`].
    pub async fn drop_version(&self, name: &str, maker: &str) -> Result<()> {
        self.remove_version(name, maker).await
    }

    async fn remove_version(&self, name: &str, maker: &str) -> Result<()> {
        let (model, version) = names::exact_version(name)?;
        let mut tx = self.sql.write().await?;
        let operation: Option<String> =
            sqlx::query_scalar("SELECT operation FROM versions WHERE model = ? AND version = ?")
                .bind(model)
                .bind(version)
                .fetch_optional(&mut *tx)
                .await?;
        let operation =
            operation.ok_or_else(|| Error::not_found(name, "list the model's versions"))?;
        let user: Option<String> = sqlx::query_scalar(
            "SELECT operation FROM needed WHERE (resource = ?1 OR operation = ?2) AND operation <> ?3 \
             UNION ALL \
             SELECT 'models/' || model || '/versions/' || version FROM versions WHERE parent = ?1 \
             LIMIT 1",
        )
        .bind(name)
        .bind(operation)
        .bind(maker)
        .fetch_optional(&mut *tx)
        .await?;
        if let Some(user) = user {
            return Err(in_use(name, &user));
        }
        sqlx::query("DELETE FROM versions WHERE model = ? AND version = ?")
            .bind(model)
            .bind(version)
            .execute(&mut *tx)
            .await?;
        sqlx::query("UPDATE models SET updated_ms = ?, etag = ? WHERE id = ?")
            .bind(now_ms())
            .bind(new_etag())
            .bind(model)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        self.recent.forget();
        self.sweep().await;
        Ok(())
    }
}

/// Digest of a version: SHA-256 over its files in the order of their names, each as the name, a NUL,
/// the file's digest and a line feed.
pub fn version_digest(files: &[(String, Object)]) -> String {
    let mut sorted: Vec<_> = files.iter().map(|(name, object)| (name, &object.digest)).collect();
    sorted.sort();
    let mut hash = Sha256::new();
    for (name, digest) in sorted {
        hash.update(format!("{name}\0{digest}\n"));
    }
    digest_text(hash)
}

fn weights_digest(files: &[(String, Object)]) -> String {
    let shards = files.iter().filter(|(name, _)| name.ends_with(".safetensors"));
    version_digest(&shards.cloned().collect::<Vec<_>>())
}

/// The part of a lineage that equal runs have in common. Names are left out with the times: the
/// second run of a recipe makes versions of other numbers, and `parent_digest` says the same better.
fn reproducible(lineage: &v1::Lineage) -> Result<Value> {
    let kept = v1::Lineage {
        parent: String::new(),
        operation: String::new(),
        seconds: 0.0,
        ..lineage.clone()
    };
    Ok(sorted(message_json(&kept)?))
}

/// With the keys of all objects in order, whatever map the JSON library uses.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let entries: BTreeMap<_, _> = map.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

fn message_json(message: &impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(message).map_err(|error| {
        Error::internal(format!("a message has no JSON form: {error}")).with_source(error)
    })
}

/// The `layout` tag of a weight's record.
fn layout_name(record: &crate::nn::weight::Record) -> String {
    let value = serde_json::to_value(record).unwrap_or_default();
    value["layout"].as_str().unwrap_or("unknown").to_owned()
}

async fn find_step<'e>(
    executor: impl sqlx::Executor<'e, Database = Sqlite>,
    operation: &str,
    step: i32,
) -> Result<Option<VersionRow>> {
    if operation.is_empty() {
        return Ok(None);
    }
    let row = sqlx::query("SELECT * FROM version_rows WHERE operation = ? AND step = ?")
        .bind(operation)
        .bind(step)
        .fetch_optional(executor)
        .await?;
    row.as_ref().map(VersionRow::read).transpose()
}

/// Refuses what concerns a model that is not there or changed since `etag`.
async fn guard(tx: &mut Transaction<'_, Sqlite>, id: &str, etag: Option<&str>) -> Result<()> {
    let current: Option<String> = sqlx::query_scalar("SELECT etag FROM models WHERE id = ?")
        .bind(id)
        .fetch_optional(&mut **tx)
        .await?;
    check_etag(&format!("models/{id}"), etag, &current.ok_or_else(|| no_model(id))?)
}

pub(super) fn in_use(name: &str, user: &str) -> Error {
    Error::new(
        Reason::ResourceInUse,
        format!("{name} is used by {user}; delete or cancel that first"),
    )
}

/// Rows of a page as SQL takes it.
pub(super) fn page(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

fn integer(value: u64) -> Result<i64> {
    i64::try_from(value).map_err(|_| Error::internal("a size does not fit 63 bits"))
}

/// Milliseconds since 1970 as a message.
pub fn timestamp(ms: i64) -> pbjson_types::Timestamp {
    let nanos = i32::try_from(ms.rem_euclid(1000) * 1_000_000).unwrap_or_default();
    pbjson_types::Timestamp { seconds: ms.div_euclid(1000), nanos }
}

fn no_model(id: &str) -> Error {
    Error::not_found(&format!("models/{id}"), "list the models")
}
