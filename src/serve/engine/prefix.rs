//! Beginnings of prompts whose keys and values are known: a radix tree over pages of tokens.
//!
//! A node stands for the tokens of one page behind those of its ancestors. Running sequences hold the
//! nodes of their beginnings, so these cannot be evicted; of the others, leaves go first, the one that
//! was used longest ago before the rest. Sequences with different namespaces share nothing: their keys
//! and values were made by different weights.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::models::decoder::plan::{PAGE, Page};

/// Names a node for as long as somebody holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(usize);

type Children = BTreeMap<Arc<[u32]>, NodeId>;

struct Node {
    namespace: u64,
    tokens: Arc<[u32]>,
    parent: Option<NodeId>,
    children: Children,
    page: Arc<Page>,
    /// Sequences that hold the node, itself or through a descendant.
    users: usize,
    /// When the last of them let go.
    used: u64,
}

/// The tree.
#[derive(Default)]
pub struct Prefixes {
    roots: BTreeMap<u64, Children>,
    nodes: Vec<Option<Node>>,
    /// Places of `nodes` that are empty.
    spare: Vec<NodeId>,
    /// Leaves that nobody holds, least recently used first.
    idle: BTreeSet<(u64, NodeId)>,
    clock: u64,
    held: usize,
}

impl Prefixes {
    /// Pages in the tree.
    pub fn len(&self) -> usize {
        self.nodes.len() - self.spare.len()
    }

    /// Pages that running sequences hold; all others can be evicted.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Whether a sequence holds the node.
    pub fn is_held(&self, id: NodeId) -> bool {
        self.node(id).users > 0
    }

    /// Fills `path` with the nodes of the longest known beginning of `tokens`, whole pages only.
    pub fn find(&self, namespace: u64, tokens: &[u32], path: &mut Vec<NodeId>) {
        path.clear();
        for chunk in tokens.chunks_exact(PAGE) {
            let children = self.children(namespace, path.last().copied());
            match children.and_then(|children| children.get(chunk)) {
                Some(id) => path.push(*id),
                None => break,
            }
        }
    }

    /// The page of a node.
    pub fn page(&self, id: NodeId) -> &Arc<Page> {
        &self.node(id).page
    }

    /// Holds a node for a sequence that holds its ancestors.
    pub fn hold(&mut self, id: NodeId) {
        let node = self.node_mut(id);
        node.users += 1;
        if node.users == 1 {
            let entry = (node.used, id);
            self.held += 1;
            self.idle.remove(&entry);
        }
    }

    /// The node of the [`PAGE`] tokens that follow `parent`, held for the sequence that made `page` (and
    /// holds `parent`). If the tokens are known, the page that was there stays.
    pub fn enter(
        &mut self,
        namespace: u64,
        parent: Option<NodeId>,
        tokens: &[u32],
        page: &Arc<Page>,
    ) -> NodeId {
        debug_assert!(parent.is_none_or(|parent| self.is_held(parent)));
        let known = self.children(namespace, parent).and_then(|c| c.get(tokens)).copied();
        let id = known.unwrap_or_else(|| {
            let tokens: Arc<[u32]> = tokens.into();
            let node = Node {
                namespace,
                tokens: Arc::clone(&tokens),
                parent,
                children: Children::new(),
                page: Arc::clone(page),
                users: 0,
                used: self.clock,
            };
            let id = self.spare.pop().unwrap_or_else(|| {
                self.nodes.push(None);
                NodeId(self.nodes.len() - 1)
            });
            self.nodes[id.0] = Some(node);
            match parent {
                Some(parent) => &mut self.node_mut(parent).children,
                None => self.roots.entry(namespace).or_default(),
            }
            .insert(tokens, id);
            id
        });
        self.hold(id);
        id
    }

    /// Lets go of a node and its ancestors, for a sequence that ends.
    pub fn release(&mut self, last: Option<NodeId>) {
        self.clock += 1;
        let clock = self.clock;
        let mut next = last;
        while let Some(id) = next {
            let node = self.node_mut(id);
            next = node.parent;
            node.users -= 1;
            if node.users == 0 {
                node.used = clock;
                let leaf = node.children.is_empty();
                self.held -= 1;
                if leaf {
                    self.idle.insert((clock, id));
                }
            }
        }
    }

    /// Forgets the leaf that was used longest ago; false if every page is held.
    pub fn evict(&mut self) -> bool {
        let Some((_, id)) = self.idle.pop_first() else { return false };
        let Some(node) = self.nodes[id.0].take() else { return false };
        self.spare.push(id);
        match node.parent {
            Some(parent) => {
                let above = self.node_mut(parent);
                above.children.remove(&node.tokens);
                if above.children.is_empty() && above.users == 0 {
                    let entry = (above.used, parent);
                    self.idle.insert(entry);
                }
            }
            None => {
                if let Some(children) = self.roots.get_mut(&node.namespace) {
                    children.remove(&node.tokens);
                    if children.is_empty() {
                        self.roots.remove(&node.namespace);
                    }
                }
            }
        }
        true
    }

    fn children(&self, namespace: u64, parent: Option<NodeId>) -> Option<&Children> {
        match parent {
            Some(parent) => Some(&self.node(parent).children),
            None => self.roots.get(&namespace),
        }
    }

    fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.0].as_ref().expect("held nodes and children are there")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id.0].as_mut().expect("held nodes and children are there")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::plan::{Cache, CacheFormat, PagePool};
    use crate::models::decoder::random;

    /// `count` pages, each with a content of its own.
    fn pages(count: usize) -> (PagePool, Vec<Arc<Page>>) {
        let model = random::model(random::tiny("llama"), 1).unwrap();
        let pool = PagePool::new(model.decoder().unwrap(), CacheFormat::F16, 1 << 30);
        let mut cache = Cache::in_pool(&pool, count * PAGE);
        cache.prepare(count * PAGE).unwrap();
        (pool, cache.pages().to_vec())
    }

    fn tokens(chunks: &[u32]) -> Vec<u32> {
        chunks.iter().flat_map(|c| vec![*c; PAGE]).collect()
    }

    /// Enters a whole text; its last node.
    fn enter(tree: &mut Prefixes, namespace: u64, chunks: &[u32], pages: &[Arc<Page>]) -> NodeId {
        let mut last = None;
        for (chunk, page) in tokens(chunks).chunks(PAGE).zip(pages) {
            last = Some(tree.enter(namespace, last, chunk, page));
        }
        last.unwrap()
    }

    fn found(tree: &Prefixes, namespace: u64, tokens: &[u32]) -> usize {
        let mut path = Vec::new();
        tree.find(namespace, tokens, &mut path);
        path.len()
    }

    #[test]
    fn the_longest_beginning_of_whole_pages_is_found() {
        let (_pool, pages) = pages(4);
        let mut tree = Prefixes::default();
        enter(&mut tree, 0, &[1, 2, 3], &pages);
        assert_eq!(found(&tree, 0, &tokens(&[1, 2, 3, 4])), 3);
        assert_eq!(found(&tree, 0, &tokens(&[1, 2, 3])[..3 * PAGE - 1]), 2);
        assert_eq!(found(&tree, 0, &tokens(&[1, 3])), 1);
        assert_eq!(found(&tree, 0, &tokens(&[2, 1])), 0);
        assert_eq!(found(&tree, 5, &tokens(&[1, 2, 3])), 0, "another namespace");
        // Known tokens keep their page, new ones branch off.
        let mut path = Vec::new();
        enter(&mut tree, 0, &[1, 9], &pages[2..]);
        tree.find(0, &tokens(&[1, 9]), &mut path);
        assert!(Arc::ptr_eq(tree.page(path[0]), &pages[0]));
        assert!(Arc::ptr_eq(tree.page(path[1]), &pages[3]));
        assert_eq!(tree.len(), 4);
    }

    #[test]
    fn leaves_go_in_the_order_of_their_last_use_and_never_while_held() {
        let (pool, pages) = pages(6);
        let mut tree = Prefixes::default();
        let a = enter(&mut tree, 0, &[1, 2], &pages[..2]);
        let b = enter(&mut tree, 0, &[1, 3], &[pages[0].clone(), pages[2].clone()]);
        let c = enter(&mut tree, 7, &[1], &pages[3..]);
        assert_eq!((tree.len(), tree.held()), (4, 4));
        assert!(!tree.evict());
        tree.release(Some(b));
        tree.release(Some(c));
        assert_eq!(tree.held(), 2);
        drop(pages);
        // Those that the tree holds: the others went back.
        assert_eq!(pool.live(), 4);
        assert!(tree.evict());
        assert_eq!((found(&tree, 0, &tokens(&[1, 3])), pool.live()), (1, 3));
        // A use makes it young again.
        let mut path = Vec::new();
        tree.find(7, &tokens(&[1]), &mut path);
        tree.hold(path[0]);
        tree.release(Some(a));
        tree.release(path.last().copied());
        assert!(tree.evict());
        assert_eq!(found(&tree, 0, &tokens(&[1, 2])), 1, "the leaf before its parent");
        assert!(tree.evict());
        assert_eq!(found(&tree, 0, &tokens(&[1])), 0);
        assert!(tree.evict() && !tree.evict());
        assert_eq!((tree.len(), tree.held(), pool.live()), (0, 0, 0));
        assert!(tree.roots.is_empty());
    }
}
