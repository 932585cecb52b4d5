//! Rotary position embedding: channel `i` and channel `i + dim / 2` of a head turn together.

use super::multiversion::multiversion;

multiversion! {
    /// Turns every head of `row` (`heads * dim` channels); `cos` and `sin` hold the `dim / 2` angles of
    /// the row's position.
    pub fn rotate(row: &mut [f32], cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        for head in row.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*a, *b) = (*a * *c - *b * *s, *b * *c + *a * *s);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarter_and_half_turns() {
        // Two heads of four channels: pair 0 turns by 90 degrees, pair 1 by 180.
        let mut row = [1.0, 2.0, 3.0, 4.0, 0.0, 1.0, 0.0, 0.0];
        rotate(&mut row, &[0.0, -1.0], &[1.0, 0.0]);
        assert_eq!(row, [-3.0, -2.0, 1.0, -4.0, 0.0, -1.0, 0.0, 0.0]);
    }
}
