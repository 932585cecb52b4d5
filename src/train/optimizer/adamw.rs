//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).
//!
//! With the gradient `g` and the number `t` of this update, from 1:
//!
//! ```text
//! m <- b1 m + (1 - b1) g            m^ = m / (1 - b1^t)
//! v <- b2 v + (1 - b2) g^2          v^ = v / (1 - b2^t)
//! p <- p - lr wd p - lr m^ / (sqrt(v^) + eps)
//! ```

/// Constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

impl AdamW {
    /// Update number `t` of a run of elements.
    pub fn update(
        &self,
        t: u64,
        (rate, decay): (f64, f64),
        p: &mut [f32],
        g: &[f32],
        (m, v): (&mut [f32], &mut [f32]),
    ) {
        let t = t as f64;
        let (b1, b2) = (self.beta1 as f32, self.beta2 as f32);
        let (n1, n2) = ((1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32);
        let step = (rate / (1.0 - self.beta1.powf(t))) as f32;
        let root = (1.0 / (1.0 - self.beta2.powf(t)).sqrt()) as f32;
        let (keep, epsilon) = ((1.0 - rate * decay) as f32, self.epsilon as f32);
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *m = b1 * *m + n1 * g;
            *v = b2 * *v + n2 * g * g;
            *p = keep * *p - step * *m / (v.sqrt() * root + epsilon);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_updates_are_those_worked_out_by_hand() {
        let rule = AdamW { beta1: 0.5, beta2: 0.75, epsilon: 0.0 };
        let (mut p, mut m, mut v) = ([1f32], [0f32], [0f32]);
        // m 1, v 1; corrected 2 and 4; decay 0.1 * 0.5 of 1; step 0.1 * 2 / 2.
        rule.update(1, (0.1, 0.5), &mut p, &[2.0], (&mut m, &mut v));
        assert_eq!((m[0], v[0]), (1.0, 1.0));
        assert!((p[0] - 0.85).abs() < 1e-6, "{}", p[0]);
        // m 0, v 0.75 + 0.25 = 1: only the decay moves it.
        rule.update(2, (0.1, 0.5), &mut p, &[-1.0], (&mut m, &mut v));
        assert_eq!((m[0], v[0]), (0.0, 1.0));
        assert!((p[0] - 0.85 * 0.95).abs() < 1e-6, "{}", p[0]);
        // m 1.5; v 0.75 + 0.25 * 9 = 3; corrected 1.5 / 0.875 and 3 / 0.578125.
        rule.update(3, (0.1, 0.0), &mut p, &[3.0], (&mut m, &mut v));
        let step = 0.1 * (1.5 / 0.875) / (3.0f64 / 0.578_125).sqrt();
        assert!((f64::from(p[0]) - (0.8075 - step)).abs() < 1e-6, "{}", p[0]);
    }

    #[test]
    fn the_first_update_is_the_rate_in_the_direction_of_the_sign() {
        let (mut p, mut m, mut v) = ([0f32; 3], [0f32; 3], [0f32; 3]);
        AdamW::default().update(1, (0.01, 0.0), &mut p, &[5.0, -1e-3, 0.0], (&mut m, &mut v));
        assert!((p[0] + 0.01).abs() < 1e-7 && (p[1] - 0.01).abs() < 1e-6, "{p:?}");
        assert_eq!(p[2], 0.0);
    }

    #[test]
    fn decay_does_not_pass_through_the_moments() {
        let (mut p, mut m, mut v) = ([10f32], [0f32], [0f32]);
        AdamW::default().update(1, (0.1, 0.2), &mut p, &[0.0], (&mut m, &mut v));
        assert_eq!((m[0], v[0]), (0.0, 0.0));
        assert!((p[0] - 9.8).abs() < 1e-6);
    }
}
