//! Keys and values of a sequence: a list of pages, which sequences with the same beginning share.

mod page;
mod pool;

use std::sync::Arc;

pub use page::{CacheFormat, PAGE, Page};
pub use pool::PagePool;

use self::page::Layout;
use super::super::Config;
use crate::error::Result;
use crate::kernels::attention::Segment;

/// Keys and values of one sequence, all layers. Pages are taken from a pool as the sequence grows; a
/// page that others hold too is copied before it is written. Layers with a sliding window keep what
/// they no longer read, so a cache can always go back.
pub struct Cache {
    pool: PagePool,
    /// Those of the positions held, and at most those that [`Cache::prepare`] took.
    pages: Vec<Arc<Page>>,
    capacity: usize,
    len: usize,
}

/// Pages that room is made for at once; longer lists grow.
const LISTED: usize = 1 << 12;

impl Cache {
    /// An empty cache for at most `capacity` positions, in f32, with a pool of its own.
    pub fn new(config: &Config, capacity: usize) -> Self {
        Self::with_format(config, capacity, CacheFormat::default())
    }

    /// An empty cache for at most `capacity` positions, with a pool of its own.
    pub fn with_format(config: &Config, capacity: usize, format: CacheFormat) -> Self {
        Self::in_pool(&PagePool::unlimited(config, format), capacity)
    }

    /// An empty cache for at most `capacity` positions that takes its pages from `pool`.
    pub fn in_pool(pool: &PagePool, capacity: usize) -> Self {
        let pages = Vec::with_capacity(capacity.div_ceil(PAGE).min(LISTED));
        Self { pool: pool.clone(), pages, capacity, len: 0 }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub fn format(&self) -> CacheFormat {
        self.pool.format()
    }

    /// Forgets all but the first `len` positions; pages without any go back to the pool. Returns the
    /// positions held.
    pub fn truncate(&mut self, len: usize) -> usize {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(PAGE));
        self.len
    }

    /// Bytes of a position in f32.
    pub fn bytes_per_position(config: &Config) -> usize {
        Layout::new(config, CacheFormat::F32).bytes() / PAGE
    }

    /// Bytes of the pages of a cache that is full to its capacity.
    pub fn bytes_for(config: &Config, capacity: usize, format: CacheFormat) -> usize {
        capacity.div_ceil(PAGE).saturating_mul(Layout::new(config, format).bytes())
    }

    /// The pages taken, the last of them perhaps not full.
    pub fn pages(&self) -> &[Arc<Page>] {
        &self.pages
    }

    /// Where the pages come from.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// Pages that are full.
    pub fn full_pages(&self) -> usize {
        self.len / PAGE
    }

    /// Begins an empty cache with the full pages of another sequence, which must have been made by the
    /// same model for the same tokens. Pages beyond the capacity are left out.
    pub fn attach(&mut self, pages: impl IntoIterator<Item = Arc<Page>>) {
        debug_assert!(self.is_empty(), "pages are attached to an empty cache");
        self.truncate(0);
        let fits = |page: &Arc<Page>| page.layout() == self.pool.layout();
        self.pages.extend(pages.into_iter().take_while(fits).take(self.capacity / PAGE));
        self.len = self.pages.len() * PAGE;
    }

    /// Puts a page with the same content in the place of full page `index`.
    pub fn replace(&mut self, index: usize, page: &Arc<Page>) {
        if index < self.full_pages() && page.layout() == self.pool.layout() {
            self.pages[index] = Arc::clone(page);
        }
    }

    /// Pages that [`Cache::prepare`] would take for `tokens` more positions.
    pub fn missing_pages(&self, tokens: usize) -> usize {
        let new = (self.len + tokens).div_ceil(PAGE).saturating_sub(self.pages.len());
        new + usize::from(tokens > 0 && self.last_is_shared())
    }

    /// Whether the next position goes into a page that others hold too.
    fn last_is_shared(&self) -> bool {
        !self.len.is_multiple_of(PAGE)
            && self.pages.get(self.len / PAGE).is_some_and(|page| Arc::strong_count(page) > 1)
    }

    /// Takes the pages of the next `tokens` positions and makes a page that is begun this cache's own.
    ///
    /// # Errors
    /// LIMIT_REACHED when the pool has no page left; what the cache holds has not changed then.
    pub fn prepare(&mut self, tokens: usize) -> Result<()> {
        if tokens > 0 && self.last_is_shared() {
            let at = self.len / PAGE;
            self.pages[at] = self.pool.copy(&self.pages[at])?;
        }
        while self.pages.len() * PAGE < self.len + tokens {
            let page = self.pool.take()?;
            self.pages.push(page);
        }
        Ok(())
    }

    /// Whether the cache was made for a configuration like this one.
    pub(super) fn fits(&self, config: &Config) -> bool {
        self.pool.layout() == Layout::new(config, self.format())
    }

    /// Stores the keys and values (`[tokens, key_heads * dim]`) that follow the positions held, for
    /// which [`Cache::prepare`] must have made room.
    pub(super) fn write(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        let width = self.pool.layout().width();
        let tokens = keys.len() / width;
        let mut done = 0;
        while done < tokens {
            let position = self.len + done;
            let count = (PAGE - position % PAGE).min(tokens - done);
            let rows = done * width..(done + count) * width;
            Arc::get_mut(&mut self.pages[position / PAGE])
                .expect("a page is the cache's own from `prepare` until it is full")
                .write(layer, position % PAGE, &keys[rows.clone()], &values[rows]);
            done += count;
        }
    }

    /// Counts the positions that were written to every layer.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// Keys and values of a head from `position` to the end of its page.
    pub(super) fn segment(&self, layer: usize, head: usize, position: usize) -> Segment<'_> {
        self.pages[position / PAGE].segment(layer, head, position % PAGE)
    }
}
