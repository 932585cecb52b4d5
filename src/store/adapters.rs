//! Rows of adapters.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::datasets::request_id_reused;
use super::models::{in_use, page, version_digest};
use super::objects::{Object, consume_lease};
use super::sql::json;
use super::{Store, check_etag, names, new_etag, now_ms};
use crate::error::{Error, Reason, Result};
use crate::nn::adapter::Adapter;
use crate::proto::v1;

/// What a row says of an adapter's content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Smallest and largest.
    pub ranks: (u32, u32),
    pub scales: (f32, f32),
    /// Last parts of the names of the linears, in order.
    pub targets: Vec<String>,
    pub linears: u32,
    pub parameters: u64,
    pub resident_bytes: u64,
}

impl Facts {
    pub fn of(adapter: &Adapter) -> Self {
        let (mut ranks, mut scales) = ((u32::MAX, 0), (f32::INFINITY, f32::NEG_INFINITY));
        let mut targets = std::collections::BTreeSet::new();
        for (name, factors) in &adapter.linears {
            let rank = u32::try_from(factors.rank()).unwrap_or(u32::MAX);
            ranks = (rank.min(ranks.0), rank.max(ranks.1));
            scales = (factors.scale().min(scales.0), factors.scale().max(scales.1));
            let module = name.strip_suffix(".weight").unwrap_or(name);
            targets.insert(module.rsplit('.').next().unwrap_or(module).to_owned());
        }
        Self {
            ranks,
            scales,
            targets: targets.into_iter().collect(),
            linears: u32::try_from(adapter.linears.len()).unwrap_or(u32::MAX),
            parameters: adapter.parameters(),
            resident_bytes: adapter.bytes(),
        }
    }
}

/// An adapter's row.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterRow {
    pub id: String,
    pub display_name: String,
    /// Id of the model.
    pub base_model: String,
    /// Resource name of the version it was checked against.
    pub base_version: String,
    pub digest: String,
    pub method: v1::AdapterMethod,
    pub facts: Facts,
    /// How it was trained; none of an imported one.
    pub lineage: Option<v1::AdapterLineage>,
    pub files: Vec<(String, Object)>,
    pub source: String,
    pub created_ms: i64,
    pub etag: String,
}

impl AdapterRow {
    /// `adapters/{adapter}`.
    pub fn name(&self) -> String {
        format!("adapters/{}", self.id)
    }

    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, (_, object)| sum.saturating_add(object.size))
    }

    fn read(row: &SqliteRow) -> Result<Self> {
        let files: Vec<(String, String, u64)> = json(row.try_get("files")?)?;
        let lineage: Option<&str> = row.try_get("lineage")?;
        Ok(Self {
            method: method(row.try_get("method")?)?,
            lineage: lineage.map(json).transpose()?,
            id: row.try_get("id")?,
            display_name: row.try_get("display_name")?,
            base_model: row.try_get("base_model")?,
            base_version: row.try_get("base_version")?,
            digest: row.try_get("digest")?,
            facts: json(row.try_get("facts")?)?,
            files: files
                .into_iter()
                .map(|(name, digest, size)| (name, Object { digest, size }))
                .collect(),
            source: row.try_get("source")?,
            created_ms: row.try_get("created_ms")?,
            etag: row.try_get("etag")?,
        })
    }
}

/// An adapter whose files were checked and are not stored yet.
pub struct NewAdapter<'a> {
    pub id: &'a str,
    pub display_name: &'a str,
    pub base_model: &'a str,
    pub base_version: &'a str,
    pub method: v1::AdapterMethod,
    pub facts: Facts,
    pub source: &'a str,
    pub request_id: &'a str,
    /// How it was trained.
    pub lineage: Option<v1::AdapterLineage>,
}

impl Store {
    /// Stores the files of `folder` (moved, where that is possible) and writes the row. The same
    /// `request_id` (where not empty), arguments and content give the row that exists; with others
    /// REQUEST_ID_REUSED.
    pub async fn create_adapter(
        &self,
        new: &NewAdapter<'_>,
        folder: &Path,
        file_names: &[&str],
    ) -> Result<AdapterRow> {
        names::check_id(new.id)?;
        let mut files = Vec::with_capacity(file_names.len());
        for name in file_names {
            let object = self.objects.put_file(&folder.join(name), None).await?;
            files.push(((*name).to_owned(), object));
        }
        let row = self.insert_adapter(new, &files).await;
        // The claims on the objects go to the row that was made; without one, they are given up.
        if !matches!(&row, Ok((_, true))) {
            for (_, object) in &files {
                self.objects.release(object).await?;
            }
        }
        row.map(|(row, _)| row)
    }

    /// The row, and whether it is new.
    async fn insert_adapter(
        &self,
        new: &NewAdapter<'_>,
        files: &[(String, Object)],
    ) -> Result<(AdapterRow, bool)> {
        let digest = version_digest(files);
        let mut tx = self.sql.write().await?;
        if !new.request_id.is_empty() {
            let row = sqlx::query("SELECT * FROM adapter_rows WHERE request_id = ?")
                .bind(new.request_id)
                .fetch_optional(&mut *tx)
                .await?;
            if let Some(row) = row.as_ref().map(AdapterRow::read).transpose()? {
                let same = row.id == new.id
                    && row.display_name == new.display_name
                    && row.base_model == new.base_model
                    && row.digest == digest;
                return if same {
                    Ok((row, false))
                } else {
                    Err(request_id_reused(new.request_id))
                };
            }
        }
        let facts = serde_json::to_string(&new.facts)
            .map_err(|e| Error::internal("an adapter's facts have no JSON form").with_source(e))?;
        let lineage =
            new.lineage.as_ref().map(serde_json::to_string).transpose().map_err(|e| {
                Error::internal("an adapter's lineage has no JSON form").with_source(e)
            })?;
        let base: Option<i64> = sqlx::query_scalar("SELECT 1 FROM models WHERE id = ?")
            .bind(new.base_model)
            .fetch_optional(&mut *tx)
            .await?;
        if base.is_none() {
            let name = format!("models/{}", new.base_model);
            return Err(Error::not_found(&name, "it was deleted meanwhile"));
        }
        let inserted = sqlx::query(
            "INSERT INTO adapters (id, display_name, base_model, base_version, method, digest, facts, \
             source, created_ms, etag, request_id, lineage) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) \
             ON CONFLICT (id) DO NOTHING",
        )
        .bind(new.id)
        .bind(new.display_name)
        .bind(new.base_model)
        .bind(new.base_version)
        .bind(method_name(new.method))
        .bind(digest)
        .bind(facts)
        .bind(new.source)
        .bind(now_ms())
        .bind(new_etag())
        .bind(new.request_id)
        .bind(lineage)
        .execute(&mut *tx)
        .await?;
        if inserted.rows_affected() == 0 {
            return Err(Error::new(
                Reason::ResourceExists,
                format!("adapters/{} exists; choose another id or delete it first", new.id),
            ));
        }
        for (name, object) in files {
            sqlx::query("INSERT INTO adapter_files (adapter, file_name, digest) VALUES (?, ?, ?)")
                .bind(new.id)
                .bind(name)
                .bind(&object.digest)
                .execute(&mut *tx)
                .await?;
            consume_lease(&mut tx, &object.digest).await?;
        }
        let row = sqlx::query("SELECT * FROM adapter_rows WHERE id = ?")
            .bind(new.id)
            .fetch_one(&mut *tx)
            .await?;
        let row = AdapterRow::read(&row)?;
        tx.commit().await?;
        Ok((row, true))
    }

    /// An adapter by id.
    pub async fn adapter(&self, id: &str) -> Result<AdapterRow> {
        let row = sqlx::query("SELECT * FROM adapter_rows WHERE id = ?")
            .bind(id)
            .fetch_optional(&self.sql.reader)
            .await?;
        AdapterRow::read(&row.ok_or_else(|| no_adapter(id))?)
    }

    /// Adapters by id (of one model, where `base` names it), after `after`, at most `limit`.
    pub async fn adapters(
        &self,
        base: Option<&str>,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<AdapterRow>> {
        let rows = sqlx::query(
            "SELECT * FROM adapter_rows WHERE id > ?1 AND (?2 IS NULL OR base_model = ?2) \
             ORDER BY id LIMIT ?3",
        )
        .bind(after.unwrap_or_default())
        .bind(base)
        .bind(page(limit))
        .fetch_all(&self.sql.reader)
        .await?;
        rows.iter().map(AdapterRow::read).collect()
    }

    /// Deletes an adapter and the objects nothing else uses; gives its row as it was. Refused while an
    /// unfinished operation needs it.
    pub async fn delete_adapter(&self, id: &str, etag: Option<&str>) -> Result<AdapterRow> {
        let mut tx = self.sql.write().await?;
        let row = sqlx::query("SELECT * FROM adapter_rows WHERE id = ?")
            .bind(id)
            .fetch_optional(&mut *tx)
            .await?;
        let row = AdapterRow::read(&row.ok_or_else(|| no_adapter(id))?)?;
        check_etag(&row.name(), etag, &row.etag)?;
        let user: Option<String> =
            sqlx::query_scalar("SELECT operation FROM needed WHERE resource = ? LIMIT 1")
                .bind(row.name())
                .fetch_optional(&mut *tx)
                .await?;
        if let Some(user) = user {
            return Err(in_use(&row.name(), &user));
        }
        sqlx::query("DELETE FROM adapters WHERE id = ?").bind(id).execute(&mut *tx).await?;
        tx.commit().await?;
        self.sweep().await;
        Ok(row)
    }

    /// Local paths of an adapter's files, by file name.
    pub async fn adapter_paths(&self, row: &AdapterRow) -> Result<BTreeMap<String, PathBuf>> {
        let mut paths = BTreeMap::new();
        for (name, object) in &row.files {
            paths.insert(name.clone(), self.objects.local_path(&object.digest).await?);
        }
        Ok(paths)
    }
}

/// Names of methods in the database.
const METHODS: [(v1::AdapterMethod, &str); 4] = [
    (v1::AdapterMethod::Lora, "lora"),
    (v1::AdapterMethod::Dora, "dora"),
    (v1::AdapterMethod::Tensors, "tensors"),
    (v1::AdapterMethod::Head, "head"),
];

fn method_name(method: v1::AdapterMethod) -> &'static str {
    METHODS.iter().find(|(known, _)| *known == method).map_or("lora", |(_, name)| name)
}

fn method(name: &str) -> Result<v1::AdapterMethod> {
    METHODS.iter().find(|(_, known)| *known == name).map(|(method, _)| *method).ok_or_else(|| {
        Error::new(
            Reason::StoreCorrupt,
            format!("an adapter's row has the method '{name}'; restore a backup"),
        )
    })
}

fn no_adapter(id: &str) -> Error {
    Error::not_found(&format!("adapters/{id}"), "list the adapters")
}
