//! Normalisation of rows.

use std::sync::Arc;

use super::tape::{Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::training::norm::{self, Gradients};

impl Tape {
    /// `x / rms(x) * weight` for each row.
    ///
    /// # Errors
    /// INTERNAL for a weight of another length.
    pub fn rms_norm(&self, x: &Value, weight: &Value, eps: f32) -> Result<Value> {
        self.norm(x, weight, None, eps)
    }

    /// `(x - mean(x)) / deviation(x) * weight + shift` for each row.
    ///
    /// # Errors
    /// INTERNAL for a weight or shift of another length.
    pub fn layer_norm(&self, x: &Value, weight: &Value, shift: &Value, eps: f32) -> Result<Value> {
        self.norm(x, weight, Some(shift), eps)
    }

    fn norm(&self, x: &Value, weight: &Value, shift: Option<&Value>, eps: f32) -> Result<Value> {
        let (width, len) = (x.width(), x.rows() * x.width());
        let vectors = [Some(weight), shift];
        for vector in vectors.into_iter().flatten() {
            if vector.rows() != 1 || vector.width() != width {
                return Err(Error::internal(format!(
                    "a norm of {} elements does not fit rows of {width}",
                    vector.width()
                )));
            }
        }
        let mut y = self.pool().take(len);
        match shift {
            None => norm::rms(&x.read(), &weight.read(), eps, &mut y),
            Some(shift) => norm::layer(&x.read(), &weight.read(), &shift.read(), eps, &mut y),
        }
        let inputs: Vec<&Value> = [Some(x), Some(weight), shift].into_iter().flatten().collect();
        Ok(self.result(y, width, &inputs, || {
            let (x, weight) = (x.clone(), weight.clone());
            let (centred, shift) = (shift.is_some(), shift.and_then(Value::node));
            move |g, sink| {
                let (data, w) = (x.read(), weight.read());
                let run = |to: Gradients<'_>| norm::backward(centred, &data, &w, eps, &g, to);
                let none = || Gradients { x: None, weight: None, shift: None };
                if let Some(node) = weight.node() {
                    sink.accumulate_zeroed(node, width, |dw| {
                        run(Gradients { weight: Some(dw), ..none() });
                    });
                }
                if let Some(node) = shift {
                    sink.accumulate_zeroed(node, width, |db| {
                        run(Gradients { shift: Some(db), ..none() });
                    });
                }
                if let Some(node) = x.node() {
                    sink.accumulate(node, len, |dx, adding| {
                        run(Gradients { x: Some((dx, adding)), ..none() });
                    });
                }
                Ok(())
            }
        }))
    }

    /// `x + by`, element by element, with the gradient of `x`: norms whose weights are offsets.
    #[must_use]
    pub fn offset(&self, x: Value, by: f32) -> Value {
        let (width, node) = (x.width(), x.node());
        let mut y = self.own(x);
        y.iter_mut().for_each(|v| *v += by);
        self.result_of(Arc::new(y), width, &[node], |_| {
            move |g, sink| {
                if let Some(node) = node {
                    sink.add(node, g);
                }
                Ok(())
            }
        })
    }
}
