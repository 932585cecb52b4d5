//! Attention and rotary positions.

use std::ops::Range;
use std::sync::Arc;

use super::tape::{Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::training::attention::{self, Kept, Shape};
use crate::kernels::training::elementwise;

/// Cosines and sines of positions.
pub trait Angles: Send + Sync {
    /// Of position `position`, `dim / 2` each.
    fn at(&self, position: usize) -> (&[f32], &[f32]);
}

impl Tape {
    /// Attention within the sequences, which are ranges of rows, ascending; every row belongs to one.
    ///
    /// # Errors
    /// INTERNAL if rows do not fit.
    pub fn attention(
        &self,
        shape: &Shape,
        sequences: &Arc<[Range<usize>]>,
        q: &Value,
        k: &Value,
        v: &Value,
    ) -> Result<Value> {
        let rows = q.rows();
        let mut end = 0;
        let tiled = sequences.iter().all(|s| std::mem::replace(&mut end, s.end) == s.start);
        if !tiled
            || end != rows
            || q.width() != shape.query_width()
            || [k, v].iter().any(|x| x.width() != shape.key_width() || x.rows() != rows)
        {
            return Err(Error::internal("rows of attention do not fit"));
        }
        let mut out = self.pool().take(rows * q.width());
        let mut sums = self.pool().take(rows * shape.heads);
        attention::forward(
            shape,
            sequences,
            (&q.read(), &k.read(), &v.read()),
            &mut out,
            &mut sums,
        );
        let inputs = [q.node(), k.node(), v.node()];
        Ok(self.result_of(Arc::new(out), q.width(), &inputs, |out| {
            let (shape, sequences) = (*shape, Arc::clone(sequences));
            let (q, k, v, out) = (q.clone(), k.clone(), v.clone(), Arc::clone(out));
            move |g, sink| {
                let take = |of: &Value| sink.pool().take(of.rows() * of.width());
                let (mut dq, mut dk, mut dv) = (take(&q), take(&k), take(&v));
                {
                    let (q, k, v) = (q.read(), k.read(), v.read());
                    let kept = Kept { q: &q, k: &k, v: &v, out: &out, sums: &sums };
                    attention::backward(&shape, &sequences, kept, &g, (&mut dq, &mut dk, &mut dv));
                }
                for (value, gradient) in [(&q, dq), (&k, dk), (&v, dv)] {
                    if let Some(node) = value.node() {
                        sink.add(node, Arc::new(gradient));
                    }
                }
                Ok(())
            }
        }))
    }

    /// Turns the heads of every row to the row's position, in the place of `x`.
    ///
    /// # Errors
    /// INTERNAL unless there is one position a row.
    pub fn rotate(
        &self,
        x: Value,
        angles: &Arc<dyn Angles>,
        positions: &Arc<[u32]>,
    ) -> Result<Value> {
        if positions.len() != x.rows() {
            return Err(Error::internal("one position a row is needed"));
        }
        let (width, node) = (x.width(), x.node());
        let mut y = self.own(x);
        elementwise::rotate(&mut y, width, false, |row| angles.at(positions[row] as usize));
        Ok(self.result_of(Arc::new(y), width, &[node], |_| {
            let (angles, positions) = (Arc::clone(angles), Arc::clone(positions));
            move |g, sink| {
                let Some(node) = node else { return Ok(()) };
                let mut dx = sink.unique(g);
                elementwise::rotate(&mut dx, width, true, |row| angles.at(positions[row] as usize));
                sink.add(node, Arc::new(dx));
                Ok(())
            }
        }))
    }
}
