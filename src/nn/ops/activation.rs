//! Nonlinearities of feed-forward networks.

use std::sync::Arc;

use super::tape::{Tape, Value};
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

    /// `f(gate) * up`, for SiLU and the tanh form of GELU.
    ///
    /// # Errors
    /// INTERNAL for another function or for values of different sizes.
    pub fn gated(&self, f: Function, gate: &Value, up: &Value) -> Result<Value> {
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
            let (gate, up) = (gate.clone(), up.clone());
            move |g, sink| {
                let (mut dgate, mut dup) = (sink.pool().take(len), sink.pool().take(len));
                let (a, b) = (gate.read(), up.read());
                activation::gated_backward(f, &a, &b, &g, &mut dgate, &mut dup);
                for (value, gradient) in [(&gate, dgate), (&up, dup)] {
                    if let Some(node) = value.node() {
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
