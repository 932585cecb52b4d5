//! Stochastic gradient descent with momentum; weight decay is decoupled, as in AdamW.
//!
//! ```text
//! m <- mu m + g
//! p <- p - lr wd p - lr m            with Nesterov: - lr (g + mu m)
//! ```

/// Constants of SGD.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sgd {
    /// 0 needs no memory.
    pub momentum: f64,
    pub nesterov: bool,
}

impl Sgd {
    /// Updates a run of elements; without momentum `m` is not looked at.
    pub fn update(&self, (rate, decay): (f64, f64), p: &mut [f32], g: &[f32], m: &mut [f32]) {
        let (keep, rate, mu) = ((1.0 - rate * decay) as f32, rate as f32, self.momentum as f32);
        if self.momentum == 0.0 {
            p.iter_mut().zip(g).for_each(|(p, g)| *p = keep * *p - rate * g);
            return;
        }
        for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
            *m = mu * *m + g;
            let step = if self.nesterov { g + mu * *m } else { *m };
            *p = keep * *p - rate * step;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn twice(rule: &Sgd, decay: f64) -> (f32, f32) {
        let (mut p, mut m) = ([1f32], [0f32]);
        rule.update((0.5, decay), &mut p, &[1.0], &mut m);
        let first = p[0];
        rule.update((0.5, decay), &mut p, &[1.0], &mut m);
        (first, p[0])
    }

    #[test]
    fn updates_are_those_worked_out_by_hand() {
        assert_eq!(twice(&Sgd::default(), 0.0), (0.5, 0.0));
        // Momentum 1, then 1.5.
        let momentum = Sgd { momentum: 0.5, nesterov: false };
        assert_eq!(twice(&momentum, 0.0), (0.5, -0.25));
        // 1 + 0.5 * 1, then 1 + 0.5 * 1.5.
        let nesterov = Sgd { momentum: 0.5, nesterov: true };
        assert_eq!(twice(&nesterov, 0.0), (0.25, -0.625));
        // 0.75 of 1 less 0.5, then 0.75 of that less 0.5.
        assert_eq!(twice(&Sgd::default(), 0.5), (0.25, -0.3125));
    }
}
