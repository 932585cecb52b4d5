//! The recurrent part of an LSTM layer, over sequences that run side by side.

use std::sync::Arc;

use super::tape::{Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::f32_panels::F32Panels;
use crate::kernels::gemm::{self, View};
use crate::kernels::training::lstm;

impl Tape {
    /// States `[steps * rows, h]` of an LSTM layer. `gates` `[steps * rows, 4 h]` is what the inputs give to
    /// the gates (input, forget, cell, output) with all biases; row `t * rows + r` is step `t` of sequence `r`.
    /// `recurrent` is `[4 h, h]`. Where `starts` is true the sequence begins anew: nothing is remembered.
    ///
    /// # Errors
    /// INTERNAL for shapes that do not fit.
    pub fn lstm(
        &self,
        gates: Value,
        recurrent: &Value,
        rows: usize,
        starts: &Arc<[bool]>,
    ) -> Result<Value> {
        let (h, total) = (recurrent.width(), gates.rows());
        if recurrent.rows() != 4 * h
            || gates.width() != 4 * h
            || rows == 0
            || !total.is_multiple_of(rows)
            || starts.len() != total
        {
            return Err(Error::internal("the parts of an LSTM layer do not fit each other"));
        }
        let (steps, nodes) = (total / rows, [gates.node(), recurrent.node()]);
        let mut acts = self.own(gates);
        let (mut cells, mut states) = (self.pool().take(total * h), self.pool().take(total * h));
        {
            let w = recurrent.read();
            let panels = F32Panels::pack(4 * h, h, |row, out| {
                out.copy_from_slice(&w[row * h..][..h]);
            });
            let (mut remembered, mut before) = (vec![0.0; rows * h], vec![0.0; rows * h]);
            let mut product = vec![0.0; rows * 4 * h];
            for step in 0..steps {
                forget(&mut remembered, &mut before, &starts[step * rows..][..rows], h);
                let acts = &mut acts[step * rows * 4 * h..][..rows * 4 * h];
                if step > 0 {
                    panels.multiply(&remembered, &mut product);
                    acts.iter_mut().zip(&product).for_each(|(a, p)| *a += p);
                }
                let place = step * rows * h..(step + 1) * rows * h;
                let (cell, state) = (&mut cells[place.clone()], &mut states[place]);
                lstm::forward(h, acts, &before, cell, state);
                remembered.copy_from_slice(state);
                before.copy_from_slice(cell);
            }
        }
        Ok(self.result_of(Arc::new(states), h, &nodes, |states| {
            let kept = Kept {
                recurrent: recurrent.clone(),
                states: Arc::clone(states),
                starts: Arc::clone(starts),
                nodes,
                rows,
                h,
            };
            move |g: super::Shared, sink: &super::Sink<'_>| {
                kept.back(&g, &acts, &cells, sink);
                Ok(())
            }
        }))
    }
}

/// Zeros for the sequences that begin here.
fn forget(states: &mut [f32], cells: &mut [f32], starts: &[bool], h: usize) {
    for (row, _) in starts.iter().enumerate().filter(|(_, start)| **start) {
        states[row * h..][..h].fill(0.0);
        cells[row * h..][..h].fill(0.0);
    }
}

struct Kept {
    recurrent: Value,
    states: super::Shared,
    starts: Arc<[bool]>,
    nodes: [Option<usize>; 2],
    rows: usize,
    h: usize,
}

impl Kept {
    fn back(self, g: &[f32], acts: &[f32], cells: &[f32], sink: &super::Sink<'_>) {
        let (h, rows) = (self.h, self.rows);
        let (size, total) = (rows * h, g.len() / h);
        let steps = total / rows;
        let mut dgates = sink.pool().take(total * 4 * h);
        let w = self.recurrent.read();
        let panels = F32Panels::pack(h, 4 * h, |column, out| {
            out.iter_mut().enumerate().for_each(|(row, out)| *out = w[row * h + column]);
        });
        let (mut dstate, mut dcell) = (vec![0.0; size], vec![0.0; size]);
        let mut before = vec![0.0; size];
        for step in (0..steps).rev() {
            let place = step * size..(step + 1) * size;
            dstate.iter_mut().zip(&g[place.clone()]).for_each(|(d, g)| *d += g);
            before.fill(0.0);
            if step > 0 {
                before.copy_from_slice(&cells[place.start - size..place.start]);
            }
            let starts = &self.starts[step * rows..][..rows];
            for (row, _) in starts.iter().enumerate().filter(|(_, start)| **start) {
                before[row * h..][..h].fill(0.0);
            }
            let wide = 4 * place.start..4 * place.end;
            let kept = (&acts[wide.clone()], &before[..], &cells[place]);
            lstm::backward(h, kept, &dstate, &mut dcell, &mut dgates[wide.clone()]);
            if step > 0 {
                panels.multiply(&dgates[wide], &mut dstate);
                forget(&mut dstate, &mut dcell, starts, h);
            }
        }
        if let Some(node) = self.nodes[1] {
            // Each step's gates saw the states of the step before, unless the sequence began there.
            let mut seen = sink.pool().take(total * h);
            seen[..size].fill(0.0);
            seen[size..].copy_from_slice(&self.states[..(total * h) - size]);
            for (row, _) in self.starts.iter().enumerate().filter(|(_, start)| **start) {
                seen[row * h..][..h].fill(0.0);
            }
            sink.accumulate(node, 4 * h * h, |dw, adding| {
                let dgates = View::new(&dgates, total, 4 * h);
                gemm::gemm(dgates.t(), View::new(&seen, total, h), dw, h, adding, true);
            });
        }
        if let Some(node) = self.nodes[0] {
            sink.add(node, Arc::new(dgates));
        }
    }
}
