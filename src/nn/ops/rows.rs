//! Sums, tables, choices and means of rows.

use std::ops::Range;
use std::sync::Arc;

use super::tape::{Shared, Sink, Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::training::elementwise;

impl Tape {
    /// `a + b`.
    ///
    /// # Errors
    /// INTERNAL for values of different sizes.
    pub fn add(&self, a: &Value, b: &Value) -> Result<Value> {
        if a.width() != b.width() || a.rows() != b.rows() {
            return Err(Error::internal("values of different sizes cannot be added"));
        }
        let mut y = self.pool().take(a.rows() * a.width());
        elementwise::sum(&a.read(), &b.read(), &mut y);
        Ok(self.result(y, a.width(), &[a, b], || to_both([a.node(), b.node()])))
    }

    /// `a + b` for a sum that nobody reads: only its gradient is wanted.
    ///
    /// # Errors
    /// INTERNAL for values of different sizes.
    pub fn unread_sum(&self, a: &Value, b: &Value) -> Result<Value> {
        if a.width() != b.width() || a.rows() != b.rows() {
            return Err(Error::internal("values of different sizes cannot be added"));
        }
        let nodes = [a.node(), b.node()];
        Ok(self.alias(a, &nodes, || to_both(nodes)))
    }

    /// `x * by`, in the place of `x`.
    #[must_use]
    pub fn scale(&self, x: Value, by: f32) -> Value {
        let (width, node) = (x.width(), x.node());
        let mut y = self.own(x);
        elementwise::scale(&mut y, by);
        self.result_of(Arc::new(y), width, &[node], |_| {
            move |g, sink| {
                let Some(node) = node else { return Ok(()) };
                let mut dx = sink.unique(g);
                elementwise::scale(&mut dx, by);
                sink.add(node, Arc::new(dx));
                Ok(())
            }
        })
    }

    /// Elements that stay with probability `1 - probability` and are scaled such that the mean stays, and
    /// zeros; the same for the same seed.
    #[must_use]
    pub fn dropout(&self, x: &Value, dropout: crate::nn::tuning::Dropout) -> Value {
        let len = x.rows() * x.width();
        let keep = 1.0 - dropout.probability;
        let mut y = self.pool().take(len);
        elementwise::dropout(&x.read(), keep, dropout.seed, &mut y);
        self.result(y, x.width(), &[x], || {
            let node = x.node();
            move |g, sink| {
                let Some(node) = node else { return Ok(()) };
                let mut dx = sink.pool().take(len);
                elementwise::dropout(&g, keep, dropout.seed, &mut dx);
                sink.add(node, Arc::new(dx));
                Ok(())
            }
        })
    }

    /// Rows `at` of `table`, which may come again.
    ///
    /// # Errors
    /// INTERNAL for a row that the table does not have.
    pub fn rows(&self, table: &Value, at: &Arc<[u32]>) -> Result<Value> {
        let (width, rows) = (table.width(), table.rows());
        if at.iter().any(|row| *row as usize >= rows) {
            return Err(Error::internal(format!("a row outside a table of {rows}")));
        }
        let mut y = self.pool().take(at.len() * width);
        {
            let table = table.read();
            for (row, out) in at.iter().zip(y.chunks_exact_mut(width)) {
                out.copy_from_slice(&table[*row as usize * width..][..width]);
            }
        }
        Ok(self.result(y, width, &[table], || {
            let (node, at) = (table.node(), Arc::clone(at));
            move |g, sink| {
                if let Some(node) = node {
                    sink.accumulate_zeroed(node, rows * width, |dt| {
                        elementwise::scatter_add(dt, width, &at, &g);
                    });
                }
                Ok(())
            }
        }))
    }

    /// The mean of the rows of each sequence, none of which is empty.
    ///
    /// # Errors
    /// INTERNAL for an empty sequence, or one beyond the rows.
    pub fn mean_rows(&self, x: &Value, sequences: &Arc<[Range<usize>]>) -> Result<Value> {
        let (width, rows) = (x.width(), x.rows());
        check(sequences, rows)?;
        let mut y = self.pool().zeros(sequences.len() * width);
        {
            let x = x.read();
            for (s, out) in sequences.iter().zip(y.chunks_exact_mut(width)) {
                elementwise::add_columns(&x[s.start * width..s.end * width], out);
                out.iter_mut().for_each(|v| *v /= s.len() as f32);
            }
        }
        Ok(self.result(y, width, &[x], || {
            let (node, sequences) = (x.node(), Arc::clone(sequences));
            move |g, sink| {
                let Some(node) = node else { return Ok(()) };
                let mut dx = sink.pool().zeros(rows * width);
                for (s, g) in sequences.iter().zip(g.chunks_exact(width)) {
                    let share = 1.0 / s.len() as f32;
                    for row in dx[s.start * width..s.end * width].chunks_exact_mut(width) {
                        row.iter_mut().zip(g).for_each(|(d, g)| *d = g * share);
                    }
                }
                sink.add(node, Arc::new(dx));
                Ok(())
            }
        }))
    }

    /// The largest value of each channel over the rows of each sequence, none of which is empty. The
    /// gradient goes to the first row that has it.
    ///
    /// # Errors
    /// As of [`Tape::mean_rows`].
    pub fn max_rows(&self, x: &Value, sequences: &Arc<[Range<usize>]>) -> Result<Value> {
        let (width, rows) = (x.width(), x.rows());
        check(sequences, rows)?;
        let mut y = self.pool().take(sequences.len() * width);
        // Rows of the largest.
        let mut places = vec![0; y.len()];
        {
            let x = x.read();
            let outs = y.chunks_exact_mut(width).zip(places.chunks_exact_mut(width));
            for (s, (out, places)) in sequences.iter().zip(outs) {
                out.copy_from_slice(&x[s.start * width..][..width]);
                places.fill(s.start);
                for row in s.clone() {
                    let values = &x[row * width..][..width];
                    for ((out, place), v) in out.iter_mut().zip(&mut *places).zip(values) {
                        // Not a number must show.
                        if *v > *out || v.is_nan() {
                            (*out, *place) = (*v, row);
                        }
                    }
                }
            }
        }
        Ok(self.result(y, width, &[x], || {
            let node = x.node();
            move |g, sink| {
                let Some(node) = node else { return Ok(()) };
                let mut dx = sink.pool().zeros(rows * width);
                for (i, (row, g)) in places.iter().zip(g.iter()).enumerate() {
                    dx[row * width + i % width] += g;
                }
                sink.add(node, Arc::new(dx));
                Ok(())
            }
        }))
    }
}

/// The gradient of a sum.
fn to_both(nodes: [Option<usize>; 2]) -> impl FnOnce(Shared, &Sink<'_>) -> Result<()> + 'static {
    move |g, sink| {
        for node in nodes.into_iter().flatten() {
            sink.add(node, Arc::clone(&g));
        }
        Ok(())
    }
}

fn check(sequences: &[Range<usize>], rows: usize) -> Result<()> {
    match sequences.iter().all(|s| s.start < s.end && s.end <= rows) {
        true => Ok(()),
        false => Err(Error::internal("a sequence is empty or ends beyond the rows")),
    }
}
