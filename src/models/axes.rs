//! Which axes of a model's tensors hold the same channels, and new orders for them.
//!
//! A channel is made by a row of one weight and read by a column of the next; biases, norms and depthwise filters
//! hold something for each channel in between. All these axes are *tied*: whoever changes the order of one must
//! change that of all, and then the model computes what it did. Where results are added (residuals), or where
//! heads share their values, several makers are tied too. Axes whose order something else fixes (rotary
//! embedding, the classes) are marked as fixed, with the reason, and stay.

pub mod families;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Reason, Result};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};

/// Weights by name.
type Weights = BTreeMap<String, Arc<Weight>>;

/// A dimension of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The first dimension: rows of a matrix, elements of a vector.
    Rows,
    /// The second dimension of a matrix.
    Columns,
}

/// Channels on one side of a tensor. Channel `c` stands at `start + c` for each of the starts: once, or once
/// for each tap of a convolution, or for each head that shares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Axis {
    pub tensor: String,
    pub side: Side,
    pub starts: Vec<usize>,
    pub channels: usize,
}

impl Axis {
    /// The rows of a tensor.
    pub fn rows(tensor: impl Into<String>, channels: usize) -> Self {
        Self { tensor: tensor.into(), side: Side::Rows, starts: vec![0], channels }
    }

    /// The columns of a matrix.
    pub fn columns(tensor: impl Into<String>, channels: usize) -> Self {
        Self { side: Side::Columns, ..Self::rows(tensor, channels) }
    }

    /// The same channels at other places.
    #[must_use]
    pub fn at(self, starts: Vec<usize>) -> Self {
        Self { starts, ..self }
    }
}

/// An axis in a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id(usize);

#[derive(Debug)]
struct Node {
    axis: Axis,
    /// Whether the tensor makes the channels.
    makes: bool,
    parent: usize,
    /// Of a root: why its set cannot be reordered.
    fixed: Option<String>,
}

/// Axes, and which of them are tied.
#[derive(Debug, Default)]
pub struct Graph {
    nodes: Vec<Node>,
}

/// Tied axes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    pub channels: usize,
    /// Rows that make the channels, in the order of the network.
    pub makers: Vec<Axis>,
    /// All other axes.
    pub others: Vec<Axis>,
    /// Why the order cannot change.
    pub fixed: Option<String>,
}

impl Graph {
    /// Adds an axis of a tensor that makes the channels.
    pub fn maker(&mut self, axis: Axis) -> Id {
        self.add(axis, true)
    }

    /// Adds an axis of a tensor that reads the channels or holds something for each.
    pub fn other(&mut self, axis: Axis) -> Id {
        self.add(axis, false)
    }

    fn add(&mut self, axis: Axis, makes: bool) -> Id {
        let id = self.nodes.len();
        self.nodes.push(Node { axis, makes, parent: id, fixed: None });
        Id(id)
    }

    fn root(&self, Id(mut id): Id) -> usize {
        while self.nodes[id].parent != id {
            id = self.nodes[id].parent;
        }
        id
    }

    /// Ties two axes, and all that are tied to them.
    ///
    /// # Errors
    /// INTERNAL for axes of different lengths.
    pub fn tie(&mut self, a: Id, b: Id) -> Result<()> {
        let (a, b) = (self.root(a), self.root(b));
        let (left, right) = (&self.nodes[a].axis, &self.nodes[b].axis);
        if left.channels != right.channels {
            return Err(Error::internal(format!(
                "{} channels of '{}' are tied to {} of '{}'",
                left.channels, left.tensor, right.channels, right.tensor
            )));
        }
        // The lower number stays the root, so that sets come in the order of the network.
        let (root, child) = (a.min(b), a.max(b));
        if root != child {
            let fixed = self.nodes[child].fixed.take();
            self.nodes[child].parent = root;
            let own = &mut self.nodes[root].fixed;
            *own = own.take().or(fixed);
        }
        Ok(())
    }

    /// Ties one axis to many.
    ///
    /// # Errors
    /// As [`Graph::tie`].
    pub fn tie_all(&mut self, first: Id, rest: impl IntoIterator<Item = Id>) -> Result<()> {
        rest.into_iter().try_for_each(|id| self.tie(first, id))
    }

    /// The order of the axis, and of those tied to it, cannot change.
    pub fn fix(&mut self, id: Id, why: impl Into<String>) {
        let root = self.root(id);
        self.nodes[root].fixed.get_or_insert(why.into());
    }

    /// The sets, by their first axis.
    pub fn sets(&self) -> Vec<Set> {
        let mut sets: BTreeMap<usize, Set> = BTreeMap::new();
        for (id, node) in self.nodes.iter().enumerate() {
            let root = self.root(Id(id));
            let set = sets.entry(root).or_insert_with(|| Set {
                channels: node.axis.channels,
                makers: Vec::new(),
                others: Vec::new(),
                fixed: self.nodes[root].fixed.clone(),
            });
            let place = if node.makes { &mut set.makers } else { &mut set.others };
            place.push(node.axis.clone());
        }
        sets.into_values().collect()
    }
}

impl Set {
    /// All axes.
    pub fn axes(&self) -> impl Iterator<Item = &Axis> {
        self.makers.iter().chain(&self.others)
    }

    /// Channels by the falling sum of the absolute weights that make them, over all makers; equal ones stay in
    /// their order. `order[new]` is the old place.
    ///
    /// # Errors
    /// `TENSOR_NOT_FOUND`; `UNSUPPORTED_MODEL` for tensors of other sizes.
    pub fn order(&self, weights: &Weights) -> Result<Vec<usize>> {
        self.order_of(weights, &mut Decoded::default())
    }

    fn order_of(&self, weights: &Weights, decoded: &mut Decoded) -> Result<Vec<usize>> {
        let mut norms = vec![0.0_f64; self.channels];
        for axis in &self.makers {
            let (shape, values) = decoded.find(weights, axis)?;
            let cols = shape[1..].iter().product::<usize>();
            for start in &axis.starts {
                for (channel, norm) in norms.iter_mut().enumerate() {
                    let row = &values[(start + channel) * cols..][..cols];
                    *norm += row.iter().map(|v| f64::from(v.abs())).sum::<f64>();
                }
            }
        }
        let mut order: Vec<usize> = (0..self.channels).collect();
        order.sort_by(|a, b| norms[*b].total_cmp(&norms[*a]).then(a.cmp(b)));
        Ok(order)
    }

    /// Puts the channels of all axes into a new order. Dense tensors keep their number format, others become
    /// f32.
    ///
    /// # Errors
    /// As [`Set::order`]; INTERNAL where `order` is none.
    pub fn apply(&self, order: &[usize], weights: &mut Weights) -> Result<()> {
        let mut decoded = Decoded::default();
        self.permute(order, weights, &mut decoded)?;
        decoded.store(weights, |_| true)
    }

    fn permute(&self, order: &[usize], weights: &Weights, decoded: &mut Decoded) -> Result<()> {
        let mut seen = vec![false; self.channels];
        order.iter().for_each(|old| {
            if let Some(seen) = seen.get_mut(*old) {
                *seen = true;
            }
        });
        if order.len() != self.channels || !seen.iter().all(|seen| *seen) {
            return Err(Error::internal("an order that does not hold each channel once"));
        }
        for axis in self.axes() {
            let (shape, values) = decoded.find(weights, axis)?;
            permute(values, shape, axis, order);
        }
        Ok(())
    }
}

/// Puts the channels of each set into the order of [`Set::order`], one set after the other, as [`Set::apply`] does.
/// A tensor that many sets share, as the heads of a block do, is decoded and stored once. `before` hears the
/// number of each set.
///
/// # Errors
/// As [`Set::order`], and what `before` gives; tensors that were not stored yet are then what they were.
pub fn reorder(
    sets: &[&Set],
    weights: &mut Weights,
    mut before: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let mut last: BTreeMap<&str, usize> = BTreeMap::new();
    for (i, set) in sets.iter().enumerate() {
        last.extend(set.axes().map(|axis| (axis.tensor.as_str(), i)));
    }
    let mut decoded = Decoded::default();
    for (i, set) in sets.iter().enumerate() {
        before(i)?;
        let order = set.order_of(weights, &mut decoded)?;
        set.permute(&order, weights, &mut decoded)?;
        // Sets come in the order of the network: few tensors wait for another.
        decoded.store(weights, |name| last.get(name).is_none_or(|last| *last <= i))?;
    }
    Ok(())
}

/// Values of tensors that are being reordered, by name.
#[derive(Default)]
struct Decoded(BTreeMap<String, Vec<f32>>);

impl Decoded {
    /// The shape and values of an axis' tensor, decoded where they were not.
    fn find<'a>(
        &'a mut self,
        weights: &'a Weights,
        axis: &Axis,
    ) -> Result<(&'a [usize], &'a mut [f32])> {
        let weight = find(weights, axis)?;
        let values = self.0.entry(axis.tensor.clone()).or_insert_with(|| weight.to_f32());
        Ok((weight.shape(), values.as_mut_slice()))
    }

    /// Puts the tensors that are done in the place of what they were.
    fn store(&mut self, weights: &mut Weights, done: impl Fn(&str) -> bool) -> Result<()> {
        let names: Vec<String> = self.0.keys().filter(|name| done(name)).cloned().collect();
        for name in names {
            let (Some(values), Some(weight)) = (self.0.remove(&name), weights.get_mut(&name))
            else {
                continue;
            };
            let dtype = match &**weight {
                Weight::Dense(dense) => dense.dtype(),
                _ => Dtype::F32,
            };
            let dense = Dense::from_f32(weight.shape().to_vec(), &values, dtype)?;
            *weight = Arc::new(Weight::Dense(dense));
        }
        Ok(())
    }
}

/// The tensor of an axis, which must have room for it.
fn find<'a>(weights: &'a Weights, axis: &Axis) -> Result<&'a Arc<Weight>> {
    let name = &axis.tensor;
    let weight = weights.get(name).ok_or_else(|| {
        Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
    })?;
    let length = match axis.side {
        Side::Rows => weight.shape().first(),
        Side::Columns => weight.shape().get(1),
    };
    let end = axis.starts.iter().max().map_or(0, |start| start + axis.channels);
    match length {
        Some(length) if end <= *length => Ok(weight),
        _ => Err(Error::new(
            Reason::UnsupportedModel,
            format!("'{name}' has shape {:?}, too small for {end} channels", weight.shape()),
        )),
    }
}

/// Puts the channels of an axis into another order.
fn permute(values: &mut [f32], shape: &[usize], axis: &Axis, order: &[usize]) {
    if values.is_empty() {
        return;
    }
    // Elements of a channel, and of all that stands beside it on the axis.
    let (inner, line) = match axis.side {
        Side::Rows => (shape[1..].iter().product::<usize>(), values.len()),
        Side::Columns => (1, shape[1]),
    };
    let mut old_order = vec![0.0; axis.channels * inner];
    for line in values.chunks_exact_mut(line) {
        for start in &axis.starts {
            let channels = &mut line[start * inner..][..axis.channels * inner];
            old_order.copy_from_slice(channels);
            for (to, old) in channels.chunks_exact_mut(inner).zip(order) {
                to.copy_from_slice(&old_order[old * inner..][..inner]);
            }
        }
    }
}
