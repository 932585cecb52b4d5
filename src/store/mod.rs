//! Models, data sets, operations and their lineage in SQL; content-addressed objects beside them.

pub mod datasets;
pub mod models;
pub mod objects;
pub mod operations;

use crate::error::Result;

/// The store: one pool, one object store.
pub struct Store {
    pub objects: objects::Objects,
}

impl Store {
    /// Opens (and migrates) the store in `folder`: `planish.db` and `objects/`.
    pub async fn open(_folder: &std::path::Path) -> Result<Self> {
        todo!()
    }
    /// Whether the database answers and the object folder is writable.
    pub async fn ping(&self) -> Result<()> {
        todo!()
    }
}
