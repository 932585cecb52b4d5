//! The models as a repository: index, loading, unloading, statistics.

use std::collections::BTreeMap;

use super::{Inference, resource};
use crate::error::{Error, Result};
use crate::proto::inference as pb;
use crate::proto::inference::repository_index_response::ModelIndex;
use crate::store::names;

impl Inference {
    pub(super) async fn index(
        &self,
        request: pb::RepositoryIndexRequest,
    ) -> Result<Vec<ModelIndex>> {
        repository(&request.repository_name)?;
        let loaded: BTreeMap<_, _> =
            self.state.residency.loaded().into_iter().map(|l| (l.key, l.healthy)).collect();
        let versions = self.state.store.version_index(None).await?;
        let entries = versions.into_iter().map(|version| {
            let (state, reason) = match loaded.get(&version.digest) {
                Some(true) => ("READY", ""),
                Some(false) => {
                    ("UNAVAILABLE", "its engine has failed; the next request loads it again")
                }
                None => ("UNAVAILABLE", "not in memory; the next request loads it"),
            };
            ModelIndex {
                name: version.model,
                version: version.version.to_string(),
                state: state.to_owned(),
                reason: reason.to_owned(),
            }
        });
        Ok(entries.filter(|entry| !request.ready || entry.state == "READY").collect())
    }

    pub(super) async fn load(&self, request: pb::RepositoryModelLoadRequest) -> Result<()> {
        repository(&request.repository_name)?;
        if let Some(key) = request.parameters.keys().next() {
            let key: String = key.chars().take(64).collect();
            return Err(Error::field(
                "parameters",
                format!(
                    "'{}' is not taken: a version never changes; import another",
                    key.escape_debug()
                ),
            ));
        }
        let name = resource(&request.model_name, "", "model_name")?;
        let row = self.state.store.version(&name).await?;
        self.state.load(&row).await.map(drop)
    }

    /// Drops one version, or all of a model: the one that was loaded as the newest may not be it any more.
    pub(super) async fn unload(&self, request: pb::RepositoryModelUnloadRequest) -> Result<()> {
        repository(&request.repository_name)?;
        let name = resource(&request.model_name, "", "model_name")?;
        let (model, number) = names::version(&name)?;
        if number.is_some() {
            let row = self.state.store.version(&name).await?;
            self.state.residency.unload(&row.digest);
            return Ok(());
        }
        self.state.store.model(model).await?;
        for version in self.state.store.version_index(Some(model)).await? {
            self.state.residency.unload(&version.digest);
        }
        Ok(())
    }

    /// Of one version, of all versions of a model, or of all that are in memory or were asked.
    pub(super) async fn statistics_of(
        &self,
        request: pb::ModelStatisticsRequest,
    ) -> Result<Vec<pb::ModelStatistics>> {
        let (model, number) = if request.name.is_empty() {
            if !request.version.is_empty() {
                return Err(Error::field("version", "without a name; give both or neither"));
            }
            (None, None)
        } else {
            let name = resource(&request.name, &request.version, "version")?;
            let (model, number) = names::version(&name)?;
            // What is not there is an error, not an empty list.
            match number {
                Some(_) => drop(self.state.store.version(&name).await?),
                None => drop(self.state.store.model(model).await?),
            }
            (Some(model.to_owned()), number)
        };
        let loaded: BTreeMap<_, _> =
            self.state.residency.loaded().into_iter().map(|l| (l.key, l.resident_bytes)).collect();
        let versions = self.state.store.version_index(model.as_deref()).await?;
        let wanted = versions.into_iter().filter(|v| number.is_none_or(|n| n == v.version));
        let statistics = wanted.filter_map(|v| {
            let counted = self.statistics.get(&v.model, v.version, &v.digest);
            let bytes = loaded.get(&v.digest);
            if model.is_none() && counted.is_none() && bytes.is_none() {
                return None;
            }
            let memory = |bytes: &u64| pb::MemoryUsage {
                r#type: "CPU".to_owned(),
                id: 0,
                byte_size: *bytes,
            };
            Some(pb::ModelStatistics {
                name: v.model,
                version: v.version.to_string(),
                memory_usage: bytes.map(memory).into_iter().collect(),
                ..counted.unwrap_or_default()
            })
        });
        Ok(statistics.collect())
    }
}

/// There is one repository and it has no name.
fn repository(name: &str) -> Result<()> {
    if name.is_empty() {
        return Ok(());
    }
    Err(Error::field("repository_name", "there is one repository, without a name; leave it out"))
}
