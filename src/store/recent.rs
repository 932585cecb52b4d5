//! Version rows that were asked for lately. Every request that generates asks for one, and reading a file
//! of the database takes longer than the rest of the way through the server.
//!
//! Versions never change, but the newest of a model does, and they can be deleted. Whoever commits such a
//! change calls [`Recent::forget`]; what was read before a change is not kept after it. Rows are also read
//! again after a second, for databases that other processes write to.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::models::VersionRow;

/// How long a row is believed.
const LIFETIME: Duration = Duration::from_secs(1);
/// Names that are kept at most.
const MOST: usize = 256;

/// Rows by the name that was asked for.
#[derive(Default)]
pub struct Recent {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// Number of changes so far.
    changes: u64,
    rows: HashMap<String, (Instant, VersionRow)>,
}

impl Recent {
    /// The row called `name`, or the number to give to [`Recent::keep`] after reading it.
    pub fn find(&self, name: &str) -> Result<VersionRow, u64> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.rows.get(name) {
            Some((since, row)) if since.elapsed() < LIFETIME => Ok(row.clone()),
            _ => Err(kept.changes),
        }
    }

    /// Keeps a row that was read after [`Recent::find`] gave `changes`, unless something changed since.
    pub fn keep(&self, name: &str, changes: u64, row: &VersionRow) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.changes != changes {
            return;
        }
        if kept.rows.len() >= MOST {
            kept.rows.clear();
        }
        kept.rows.insert(name.to_owned(), (Instant::now(), row.clone()));
    }

    /// After a change of versions was committed.
    pub fn forget(&self) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.changes += 1;
        kept.rows.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(version: i64) -> VersionRow {
        VersionRow {
            model: "m".into(),
            version,
            digest: String::new(),
            family: String::new(),
            architecture: String::new(),
            config: serde_json::Value::Null,
            parameters: 0,
            weight_bytes: 0,
            total_bytes: 0,
            layout_bytes: std::collections::BTreeMap::new(),
            files: Vec::new(),
            lineage: serde_json::Value::Null,
            created_ms: 0,
        }
    }

    #[test]
    fn what_was_read_before_a_change_is_not_kept() {
        let recent = Recent::default();
        let changes = recent.find("models/m").unwrap_err();
        recent.forget();
        recent.keep("models/m", changes, &row(1));
        let changes = recent.find("models/m").unwrap_err();
        recent.keep("models/m", changes, &row(2));
        assert_eq!(recent.find("models/m").unwrap().version, 2);
        recent.forget();
        assert!(recent.find("models/m").is_err());
    }

    #[test]
    fn names_are_limited() {
        let recent = Recent::default();
        for i in 0..3 * MOST {
            let name = format!("models/m/versions/{i}");
            let changes = recent.find(&name).unwrap_err();
            recent.keep(&name, changes, &row(1));
        }
        assert!(recent.kept.lock().unwrap().rows.len() <= MOST);
    }
}
