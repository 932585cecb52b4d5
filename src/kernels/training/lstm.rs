//! The element-wise part of an LSTM cell and its gradient. Gates stand in the order input, forget, cell,
//! output, as in PyTorch.

// Many slices are read side by side; zipped they would be harder to read and no faster.
#![allow(clippy::needless_range_loop)]

use super::super::activation::{exp, tanh};
use super::super::multiversion::multiversion;
use super::super::threads::{self, Shared};

/// Rows that are worth a task.
const ROWS: usize = 16;

/// One step of the rows that run side by side. `gates` `[rows, 4 h]` hold what goes into the nonlinearities
/// and then what comes out; `before` is the cell `[rows, h]` of the step before; `cell` and `state` are
/// overwritten.
pub fn forward(h: usize, gates: &mut [f32], before: &[f32], cell: &mut [f32], state: &mut [f32]) {
    let rows = before.len() / h;
    assert!(gates.len() == 4 * before.len(), "sizes of a cell");
    assert!(cell.len() == before.len() && state.len() == before.len(), "sizes of a cell");
    let (gates, cell, state) = (Shared::new(gates), Shared::new(cell), Shared::new(state));
    threads::for_ranges(rows, ROWS, |range| {
        for row in range {
            // SAFETY: ranges are disjoint, so rows are.
            let (gates, cell, state) = unsafe {
                let own = row * h..(row + 1) * h;
                let gates = gates.slice(4 * row * h..4 * (row + 1) * h);
                (gates, cell.slice(own.clone()), state.slice(own))
            };
            forward_row(gates, &before[row * h..][..h], cell, state);
        }
    });
}

/// The gradient of [`forward`]. `gates` are what came out of the nonlinearities; `dstate` and `dcell` the
/// gradients of the step's state and cell; `dcell` becomes that of the cell before, `dgates` that of what went
/// into the nonlinearities.
pub fn backward(
    h: usize,
    (gates, before, cell): (&[f32], &[f32], &[f32]),
    dstate: &[f32],
    dcell: &mut [f32],
    dgates: &mut [f32],
) {
    let rows = before.len() / h;
    assert!(gates.len() == 4 * before.len() && dgates.len() == gates.len(), "sizes of a cell");
    assert!(cell.len() == before.len() && dstate.len() == before.len(), "sizes of a cell");
    let (dcell, dgates) = (Shared::new(dcell), Shared::new(dgates));
    threads::for_ranges(rows, ROWS, |range| {
        for row in range {
            let own = row * h..(row + 1) * h;
            // SAFETY: ranges are disjoint, so rows are.
            let (dcell, dgates) =
                unsafe { (dcell.slice(own.clone()), dgates.slice(4 * row * h..4 * (row + 1) * h)) };
            let kept = &gates[4 * row * h..4 * (row + 1) * h];
            backward_row(
                kept,
                &before[own.clone()],
                &cell[own.clone()],
                &dstate[own],
                dcell,
                dgates,
            );
        }
    });
}

#[inline(always)]
fn logistic<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

multiversion! {
    fn forward_row(gates: &mut [f32], before: &[f32], cell: &mut [f32], state: &mut [f32]) {
        let h = before.len();
        let (input, rest) = gates.split_at_mut(h);
        let (forget, rest) = rest.split_at_mut(h);
        let (new, output) = rest.split_at_mut(h);
        for i in 0..h {
            let gate = logistic::<FMA>(input[i]);
            let keep = logistic::<FMA>(forget[i]);
            let value = tanh::<FMA>(new[i]);
            let open = logistic::<FMA>(output[i]);
            let c = keep * before[i] + gate * value;
            (input[i], forget[i], new[i], output[i]) = (gate, keep, value, open);
            cell[i] = c;
            state[i] = open * tanh::<FMA>(c);
        }
    }

    fn backward_row(
        gates: &[f32],
        before: &[f32],
        cell: &[f32],
        dstate: &[f32],
        dcell: &mut [f32],
        dgates: &mut [f32],
    ) {
        let h = before.len();
        let (input, rest) = gates.split_at(h);
        let (forget, rest) = rest.split_at(h);
        let (new, output) = rest.split_at(h);
        let (dinput, rest) = dgates.split_at_mut(h);
        let (dforget, rest) = rest.split_at_mut(h);
        let (dnew, doutput) = rest.split_at_mut(h);
        for i in 0..h {
            let t = tanh::<FMA>(cell[i]);
            let dc = dcell[i] + dstate[i] * output[i] * (1.0 - t * t);
            doutput[i] = dstate[i] * t * output[i] * (1.0 - output[i]);
            dinput[i] = dc * new[i] * input[i] * (1.0 - input[i]);
            dforget[i] = dc * before[i] * forget[i] * (1.0 - forget[i]);
            dnew[i] = dc * input[i] * (1.0 - new[i] * new[i]);
            dcell[i] = dc * forget[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_by_hand() {
        // All gates half open; the new value is tanh(1).
        let mut gates = [0.0, 0.0, 1.0, 0.0];
        let (mut cell, mut state) = ([f32::NAN], [f32::NAN]);
        forward(1, &mut gates, &[0.4], &mut cell, &mut state);
        let c = 0.5 * 0.4 + 0.5 * 1f32.tanh();
        assert!((cell[0] - c).abs() < 1e-6 && (state[0] - 0.5 * c.tanh()).abs() < 1e-6);
        // Far out the nonlinearities are at their ends and finite.
        let mut gates = [90.0, -90.0, -90.0, 90.0];
        forward(1, &mut gates, &[0.4], &mut cell, &mut state);
        assert!((cell[0] + 1.0).abs() < 1e-6 && (state[0] + 1f32.tanh()).abs() < 1e-6);
    }
}
