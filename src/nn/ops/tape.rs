//! What was computed, so that gradients can be taken.
//!
//! The graph of the tensor library adds every gradient to a tensor of zeros of its own and keeps all
//! values until the end; at the sizes of activations that costs as much as the products. A tape moves
//! gradients from one operation to the one before, adds in place where two meet, and lets go of what an
//! operation kept as soon as its gradient is known.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Shape, Storage, StorageRef, Tensor, TensorId, Var,
};

use super::buffer::{Buffer, Pool};
use crate::error::{Error, Result};
use crate::kernels::training::elementwise;

/// A gradient, or a value that several hold.
pub type Shared = Arc<Buffer>;

/// Takes the gradient of an operation's result to those of its inputs.
type Back = Box<dyn FnOnce(Shared, &Sink<'_>) -> Result<()>>;

/// Operations in the order in which they ran.
pub struct Tape {
    pool: Pool,
    /// Whether operations are kept at all.
    recording: bool,
    nodes: RefCell<Vec<Option<Back>>>,
    leaves: RefCell<Vec<(usize, Tensor)>>,
}

/// A matrix `[rows, width]`, row-major; a vector is one row.
#[derive(Clone)]
pub struct Value {
    data: Data,
    width: usize,
    /// The operation it came from, if a gradient is wanted for anything that went into it.
    node: Option<usize>,
}

#[derive(Clone)]
enum Data {
    Buffer(Shared),
    /// Contiguous f32.
    Tensor(Tensor),
}

impl Value {
    /// A value without a gradient.
    pub fn constant(data: Buffer, width: usize) -> Self {
        Self { data: Data::Buffer(Arc::new(data)), width, node: None }
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn rows(&self) -> usize {
        self.len() / self.width
    }

    fn len(&self) -> usize {
        match &self.data {
            Data::Buffer(buffer) => buffer.len(),
            Data::Tensor(tensor) => tensor.elem_count(),
        }
    }

    /// Whether a gradient is wanted for it.
    pub fn tracked(&self) -> bool {
        self.node.is_some()
    }

    pub(super) fn node(&self) -> Option<usize> {
        self.node
    }

    /// The elements.
    pub fn read(&self) -> Read<'_> {
        match &self.data {
            Data::Buffer(buffer) => Read::Slice(buffer),
            Data::Tensor(tensor) => {
                let (storage, layout) = tensor.storage_and_layout();
                Read::Storage { storage, start: layout.start_offset(), len: tensor.elem_count() }
            }
        }
    }

    /// The same elements in rows of another width.
    ///
    /// # Panics
    /// If the width does not divide them.
    #[must_use]
    pub fn in_rows_of(self, width: usize) -> Self {
        assert!(width > 0 && self.len().is_multiple_of(width), "rows of {width}");
        Self { width, ..self }
    }

    /// The same without a gradient.
    #[must_use]
    pub fn detached(&self) -> Self {
        Self { node: None, ..self.clone() }
    }
}

/// Elements of a value.
pub enum Read<'a> {
    Slice(&'a [f32]),
    Storage { storage: StorageRef<'a>, start: usize, len: usize },
}

impl Deref for Read<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Slice(slice) => slice,
            Self::Storage { storage, start, len } => match &**storage {
                Storage::Cpu(CpuStorage::F32(all)) => &all[*start..start + len],
                // Leaves are made of f32 tensors of this device only.
                _ => &[],
            },
        }
    }
}

impl Tape {
    /// A tape that keeps operations; its buffers come from `pool`.
    pub fn new(pool: &Pool) -> Self {
        Self::with(pool, true)
    }

    /// A tape that keeps nothing: values say whether a gradient would be wanted, and cannot be taken back.
    pub fn forgetful(pool: &Pool) -> Self {
        Self::with(pool, false)
    }

    fn with(pool: &Pool, recording: bool) -> Self {
        Self {
            pool: pool.clone(),
            recording,
            nodes: RefCell::default(),
            leaves: RefCell::default(),
        }
    }

    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// A tensor in rows of its last dimension. Its gradient is wanted if it is a variable or was computed
    /// from one.
    pub fn leaf(&self, tensor: &Tensor) -> Result<Value> {
        let width = tensor.dims().last().copied().unwrap_or(1);
        if tensor.dtype() != DType::F32 || !tensor.device().is_cpu() || tensor.elem_count() == 0 {
            return Err(Error::internal(format!(
                "a trained tensor is {:?} {:?}, but must be f32, in memory and not empty",
                tensor.dtype(),
                tensor.dims()
            )));
        }
        let tensor = tensor.contiguous()?;
        let node = tensor.track_op().then(|| {
            let node = self.push(None);
            if self.recording {
                self.leaves.borrow_mut().push((node, tensor.clone()));
            }
            node
        });
        Ok(Value { data: Data::Tensor(tensor), width, node })
    }

    /// A value whose gradient [`Taken::of`] gives: where a part of a forward starts.
    #[must_use]
    pub fn start(&self, value: &Value) -> Value {
        Value { node: Some(self.push(None)), ..value.clone() }
    }

    /// The result of an operation. `back` is made if one of `inputs` is tracked, and called with the
    /// result's gradient if there is one.
    pub(super) fn result<B>(
        &self,
        data: Buffer,
        width: usize,
        inputs: &[&Value],
        back: impl FnOnce() -> B,
    ) -> Value
    where
        B: FnOnce(Shared, &Sink<'_>) -> Result<()> + 'static,
    {
        let nodes: Vec<_> = inputs.iter().map(|v| v.node).collect();
        self.result_of(Arc::new(data), width, &nodes, |_| back())
    }

    /// The same where the inputs are gone, or the gradient needs the result.
    pub(super) fn result_of<B>(
        &self,
        data: Shared,
        width: usize,
        inputs: &[Option<usize>],
        back: impl FnOnce(&Shared) -> B,
    ) -> Value
    where
        B: FnOnce(Shared, &Sink<'_>) -> Result<()> + 'static,
    {
        let node = inputs.iter().any(Option::is_some).then(|| {
            let back = self.recording.then(|| Box::new(back(&data)) as Back);
            self.push(back)
        });
        Value { data: Data::Buffer(data), width, node }
    }

    /// The result of an operation that nobody reads, which takes the elements of `like`.
    pub(super) fn alias<B>(
        &self,
        like: &Value,
        inputs: &[Option<usize>],
        back: impl FnOnce() -> B,
    ) -> Value
    where
        B: FnOnce(Shared, &Sink<'_>) -> Result<()> + 'static,
    {
        let node = inputs.iter().any(Option::is_some).then(|| {
            let back = self.recording.then(|| Box::new(back()) as Back);
            self.push(back)
        });
        Value { node, ..like.clone() }
    }

    /// One number; `back` gets the number that its gradient is.
    pub(super) fn number<B>(
        &self,
        number: f32,
        inputs: &[Option<usize>],
        back: impl FnOnce() -> B,
    ) -> Value
    where
        B: FnOnce(f32, &Sink<'_>) -> Result<()> + 'static,
    {
        let mut data = self.pool.take(1);
        data[0] = number;
        self.result_of(Arc::new(data), 1, inputs, |_| {
            let back = back();
            move |g: Shared, sink: &Sink<'_>| back(g[0], sink)
        })
    }

    pub(super) fn is_recording(&self) -> bool {
        self.recording
    }

    fn push(&self, back: Option<Back>) -> usize {
        if !self.recording {
            return 0;
        }
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(back);
        nodes.len() - 1
    }

    /// The elements to be changed in place: those of `value` itself if nothing else holds them, else a copy.
    pub(super) fn own(&self, value: Value) -> Buffer {
        match value.data {
            Data::Buffer(buffer) => {
                Arc::try_unwrap(buffer).unwrap_or_else(|shared| self.copy(&shared))
            }
            Data::Tensor(_) => self.copy(&value.read()),
        }
    }

    pub(super) fn copy(&self, of: &[f32]) -> Buffer {
        let mut copy = self.pool.take(of.len());
        elementwise::copy(of, &mut copy);
        copy
    }

    /// A part of the forward made of the tensor library's operations: `f` gets `x` as a tensor `[rows,
    /// width]` and may answer `None`. Slower than what is made of this module's own.
    pub fn foreign(
        &self,
        x: &Value,
        f: impl FnOnce(&Tensor) -> Result<Option<Tensor>>,
    ) -> Result<Option<Value>> {
        let tensor = Tensor::from_slice(&x.read(), (x.rows(), x.width), &Device::Cpu)?;
        let input =
            if x.tracked() && self.recording { Some(Var::from_tensor(&tensor)?) } else { None };
        let Some(y) = f(input.as_ref().map_or(&tensor, |var| var.as_tensor()))? else {
            return Ok(None);
        };
        let y = y.contiguous()?;
        if y.dtype() != DType::F32 || y.rank() == 0 || y.elem_count() == 0 {
            return Err(Error::internal(format!(
                "a tuned layer gave {:?} {:?}",
                y.dtype(),
                y.dims()
            )));
        }
        let width = y.dims().last().copied().unwrap_or(1);
        let node = (x.tracked() || y.track_op()).then(|| {
            let (node, y) = (x.node, y.clone());
            let back: Back = Box::new(move |g, sink| {
                let g = Tensor::from_slice(&g, y.shape(), &Device::Cpu)?;
                let mut store = y.apply_op1(Seed(g))?.backward()?;
                if let (Some(node), Some(dx)) =
                    (node, input.and_then(|input| store.remove(input.as_tensor())))
                {
                    sink.add(node, Arc::new(sink.copy(&dx)?));
                }
                sink.stores.borrow_mut().push(store);
                Ok(())
            });
            self.push(self.recording.then_some(back))
        });
        Ok(Some(Value { data: Data::Tensor(y.detach()), width, node }))
    }

    /// Takes gradients back from `end`, whose own is `g`.
    ///
    /// # Errors
    /// INTERNAL if `end` is not tracked by this tape, or for a gradient of another size.
    pub fn backward(self, end: &Value, g: Shared) -> Result<Taken> {
        let mut nodes = self.nodes.into_inner();
        let Some(last) = end.node.filter(|last| *last < nodes.len() && g.len() == end.len()) else {
            return Err(Error::internal("a gradient was asked of a value that has none"));
        };
        let sink = Sink {
            pool: &self.pool,
            slots: RefCell::new((0..nodes.len()).map(|_| None).collect()),
            stores: RefCell::default(),
        };
        sink.add(last, g);
        while let Some(back) = nodes.pop() {
            let Some(back) = back else { continue };
            let slot = sink.slots.borrow_mut()[nodes.len()].take();
            if let Some(g) = slot {
                back(g, &sink)?;
            }
        }
        let mut slots = sink.slots.into_inner();
        let leaves = self.leaves.into_inner();
        let leaves = leaves
            .into_iter()
            .filter_map(|(node, tensor)| slots[node].take().map(|g| (tensor, g)))
            .collect();
        Ok(Taken { slots, leaves, stores: sink.stores.into_inner() })
    }
}

/// Where operations put the gradients of their inputs.
pub struct Sink<'a> {
    pool: &'a Pool,
    slots: RefCell<Vec<Option<Shared>>>,
    stores: RefCell<Vec<GradStore>>,
}

impl Sink<'_> {
    pub fn pool(&self) -> &Pool {
        self.pool
    }

    fn copy(&self, of: &Tensor) -> Result<Buffer> {
        let of = of.contiguous()?;
        let value = Value { width: 1, data: Data::Tensor(of), node: None };
        let read = value.read();
        let mut out = self.pool.take(read.len());
        elementwise::copy(&read, &mut out);
        Ok(out)
    }

    /// A gradient to be changed in place: copied if something else holds it.
    pub fn unique(&self, g: Shared) -> Buffer {
        Arc::try_unwrap(g).unwrap_or_else(|shared| {
            let mut copy = self.pool.take(shared.len());
            elementwise::copy(&shared, &mut copy);
            copy
        })
    }

    /// Adds to the gradient of an operation's result.
    pub fn add(&self, node: usize, g: Shared) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[node];
        *slot = Some(match slot.take() {
            None => g,
            Some(before) => self.sum(before, g),
        });
    }

    fn sum(&self, mut a: Shared, mut b: Shared) -> Shared {
        if let Some(sum) = Arc::get_mut(&mut a) {
            elementwise::add(sum, &b);
            return a;
        }
        if let Some(sum) = Arc::get_mut(&mut b) {
            elementwise::add(sum, &a);
            return b;
        }
        let mut out = self.pool.take(a.len());
        elementwise::sum(&a, &b, &mut out);
        Arc::new(out)
    }

    /// Lets `f` add to the gradient of an operation's result of `len` elements: it gets the elements, and
    /// whether they hold a sum already (else they are to be overwritten).
    pub fn accumulate(&self, node: usize, len: usize, f: impl FnOnce(&mut [f32], bool)) {
        let before = self.slots.borrow_mut()[node].take();
        let (mut slot, adding) = match before {
            None => (Arc::new(self.pool.take(len)), false),
            Some(before) => (before, true),
        };
        if Arc::get_mut(&mut slot).is_none() {
            let mut own = self.pool.take(len);
            elementwise::copy(&slot, &mut own);
            slot = Arc::new(own);
        }
        if let Some(own) = Arc::get_mut(&mut slot) {
            f(own, adding);
        }
        self.slots.borrow_mut()[node] = Some(slot);
    }

    /// [`Sink::accumulate`] for operations that can only add.
    pub fn accumulate_zeroed(&self, node: usize, len: usize, f: impl FnOnce(&mut [f32])) {
        self.accumulate(node, len, |out, adding| {
            if !adding {
                out.fill(0.0);
            }
            f(out);
        });
    }
}

/// The gradients that a tape gave.
pub struct Taken {
    slots: Vec<Option<Shared>>,
    leaves: Vec<(Tensor, Shared)>,
    stores: Vec<GradStore>,
}

impl Taken {
    /// The gradient of a [`Tape::start`].
    pub fn of(&mut self, start: &Value) -> Option<Shared> {
        self.slots.get_mut(start.node?)?.take()
    }

    /// Adds the gradients of variables to `sums`, `names` naming them by the id of their tensor. What was
    /// computed from variables is taken back to them first.
    pub fn collect(
        self,
        names: &HashMap<TensorId, (&str, &Var)>,
        sums: &mut BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let mut add = |name: &str, g: Tensor| -> Result<()> {
            let sum = match sums.remove(name) {
                None => g,
                Some(sum) => (sum + g)?,
            };
            sums.insert(name.to_owned(), sum);
            Ok(())
        };
        let mut stores = self.stores;
        let mut end: Option<Tensor> = None;
        for (tensor, g) in self.leaves {
            let g = Tensor::from_slice(&g, tensor.shape(), tensor.device())?;
            match names.get(&tensor.id()) {
                Some((name, _)) => add(name, g)?,
                None if tensor.is_variable() => {}
                None => {
                    let seed = tensor.apply_op1(Seed(g))?;
                    end = Some(match end {
                        None => seed,
                        Some(end) => (end + seed)?,
                    });
                }
            }
        }
        if let Some(end) = end {
            stores.push(end.backward()?);
        }
        for mut store in stores {
            for (name, var) in names.values() {
                if let Some(g) = store.remove(var.as_tensor()) {
                    add(name, g)?;
                }
            }
        }
        Ok(())
    }
}

/// A number whose gradient with respect to its input is given.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "given-gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
