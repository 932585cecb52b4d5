//! Nonlinearities of feed-forward networks.

use std::ops::Deref;
use std::sync::Arc;

use super::buffer::{Buffer, Halves, Pool};
use super::linear::Precision;
use super::tape::{Read, Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::training::activation::{self, Function};

impl Tape {
    /// `f(x)`.
    #[must_use]
    pub fn activation(&self, f: Function, x: &Value) -> Value {
        let (width, len) = (x.width(), x.rows() * x.width());
        let mut y = self.pool().take(len);
        activation::apply(f, &x.read(), &mut y);
        self.result(y, width, &[x], || {
            let x = x.clone();
            move |g, sink| {
                if let Some(node) = x.node() {
                    let mut dx = sink.pool().take(len);
                    activation::backward(f, &x.read(), &g, &mut dx);
                    sink.add(node, Arc::new(dx));
                }
                Ok(())
            }
        })
    }

    /// `f(gate) * up`, for SiLU and the tanh form of GELU. The gradient is made of both as `kept` says.
    ///
    /// # Errors
    /// INTERNAL for another function or for values of different sizes.
    pub fn gated(&self, f: Function, gate: &Value, up: &Value, kept: Precision) -> Result<Value> {
        let (width, len) = (gate.width(), gate.rows() * gate.width());
        if !matches!(f, Function::Silu | Function::GeluTanh)
            || up.width() != width
            || up.rows() != gate.rows()
        {
            return Err(Error::internal(format!("a gate of {f:?}, {width} and {}", up.width())));
        }
        let mut y = self.pool().take(len);
        activation::gated(f, &gate.read(), &up.read(), &mut y);
        Ok(self.result(y, width, &[gate, up], || {
            let nodes = [gate.node(), up.node()];
            let sides = [gate, up].map(|side| Kept::new(self.pool(), side, kept));
            move |g, sink| {
                let (mut dgate, mut dup) = (sink.pool().take(len), sink.pool().take(len));
                let [gate, up] = sides.each_ref().map(Kept::read);
                activation::gated_backward(f, &gate, &up, &g, &mut dgate, &mut dup);
                for (node, gradient) in nodes.into_iter().zip([dgate, dup]) {
                    if let Some(node) = node {
                        sink.add(node, Arc::new(gradient));
                    }
                }
                Ok(())
            }
        }))
    }

    /// `cap * tanh(x / cap)`, in the place of `x`.
    #[must_use]
    pub fn softcap(&self, x: Value, cap: f32) -> Value {
        let (width, node) = (x.width(), x.node());
        let mut y = self.own(x);
        activation::cap(&mut y, cap);
        self.result_of(Arc::new(y), width, &[node], |y| {
            let y = Arc::clone(y);
            move |g, sink| {
                let Some(node) = node else { return Ok(()) };
                let mut dx = sink.unique(g);
                activation::cap_backward(&y, cap, &mut dx);
                sink.add(node, Arc::new(dx));
                Ok(())
            }
        })
    }
}

/// A value that a gradient needs.
enum Kept {
    Whole(Value),
    Halves(Halves),
}

impl Kept {
    fn new(pool: &Pool, value: &Value, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::Whole(value.clone()),
            Precision::Bf16 => Self::Halves(pool.halves(&value.read())),
        }
    }

    fn read(&self) -> Elements<'_> {
        match self {
            Self::Whole(value) => Elements::Whole(value.read()),
            Self::Halves(halves) => Elements::Widened(halves.widened()),
        }
    }
}

/// Elements of what was kept.
enum Elements<'a> {
    Whole(Read<'a>),
    Widened(Buffer),
}

impl Deref for Elements<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Whole(read) => read,
            Self::Widened(buffer) => buffer,
        }
    }
}
