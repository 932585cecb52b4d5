//! Where pages come from and go back to.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::super::Config;
use super::page::{CacheFormat, Data, Layout, Page};
use crate::error::{Error, Reason, Result};

/// Pages of one layout within a budget. Memory of pages that are let go is used again, so a service in
/// a steady state allocates none. Clones are the same pool.
#[derive(Clone)]
pub struct PagePool(Arc<Inner>);

pub(super) struct Inner {
    layout: Layout,
    /// Most pages that live at once.
    budget: usize,
    live: AtomicUsize,
    free: Mutex<Vec<Data>>,
}

impl PagePool {
    /// A pool of as many pages as fit into `bytes`.
    pub fn new(config: &Config, format: CacheFormat, bytes: u64) -> Self {
        let each = Layout::new(config, format).bytes().max(1) as u64;
        Self::of(config, format, usize::try_from(bytes / each).unwrap_or(usize::MAX))
    }

    /// A pool without a budget, for caches whose capacity bounds them.
    pub(super) fn unlimited(config: &Config, format: CacheFormat) -> Self {
        Self::of(config, format, usize::MAX)
    }

    fn of(config: &Config, format: CacheFormat, budget: usize) -> Self {
        let layout = Layout::new(config, format);
        Self(Arc::new(Inner { layout, budget, live: AtomicUsize::new(0), free: Mutex::default() }))
    }

    /// Most pages that live at once.
    pub fn budget(&self) -> usize {
        self.0.budget
    }

    /// Pages that live now.
    pub fn live(&self) -> usize {
        self.0.live.load(Ordering::Acquire)
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.0.layout.bytes()
    }

    pub(super) fn format(&self) -> CacheFormat {
        self.0.layout.format()
    }

    pub(super) fn layout(&self) -> Layout {
        self.0.layout
    }

    /// A page with any content.
    pub(super) fn take(&self) -> Result<Arc<Page>> {
        Ok(Arc::new(Page::new(self.0.data()?, Arc::clone(&self.0))))
    }

    /// A page with the content of `page`.
    pub(super) fn copy(&self, page: &Page) -> Result<Arc<Page>> {
        let mut data = self.0.data()?;
        data.copy_from(page.data());
        Ok(Arc::new(Page::new(data, Arc::clone(&self.0))))
    }
}

impl Inner {
    pub fn layout(&self) -> Layout {
        self.layout
    }

    fn free(&self) -> MutexGuard<'_, Vec<Data>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn data(&self) -> Result<Data> {
        let one_more = |live: usize| (live < self.budget).then_some(live + 1);
        self.live.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).map_err(|_| {
            Error::new(
                Reason::LimitReached,
                format!(
                    "all {} pages of keys and values are in use; try again later or raise \
                     limits.kv_bytes",
                    self.budget
                ),
            )
        })?;
        let again = self.free().pop();
        Ok(again.unwrap_or_else(|| Data::new(self.layout)))
    }

    pub fn put_back(&self, data: Data) {
        self.free().push(data);
        self.live.fetch_sub(1, Ordering::AcqRel);
    }
}
