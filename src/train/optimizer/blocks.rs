//! Numbers in 8 bits: blocks of 256 share the largest magnitude as their scale, and codes stand for numbers
//! between 0 and 1 that lie densest where moments do.
//!
//! The numbers are those of the dynamic tree of Dettmers et al., 8-bit Optimizers via Block-wise
//! Quantization (arXiv 2110.02861): seven decades below 1, each cut into equal cells, half as many in each
//! further decade; a code is the middle of its cell. Signed: 64 cells in the first decade, with both signs;
//! unsigned: 128. To these come 0 and 1.
//!
//! Gradients that are less than about 1/2000 of the largest in their block have squares below the lowest
//! code, which stands for them: their elements move more slowly than with moments in f32.

use std::sync::LazyLock;

/// Numbers that share a scale.
pub const BLOCK: usize = 256;

const DECADES: i32 = 7;

/// What the codes stand for, in rising order, and how they are found.
pub struct Codes {
    values: [f32; 256],
    /// Half way between neighbours.
    borders: [f32; 255],
    /// The lowest code of the numbers that share their upper 16 bits.
    first: Vec<u8>,
}

/// Codes of numbers of either sign.
pub static SIGNED: LazyLock<Codes> = LazyLock::new(|| Codes::new(true));

/// Codes of numbers that are not negative.
pub static UNSIGNED: LazyLock<Codes> = LazyLock::new(|| Codes::new(false));

impl Codes {
    fn new(signed: bool) -> Self {
        let mut all = vec![0.0, 1.0];
        for decade in 0..DECADES {
            let top = 10f64.powi(-decade);
            let cells = (if signed { 64u32 } else { 128 }) >> decade;
            for cell in 0..cells {
                let middle = (f64::from(cell) + 0.5) / f64::from(cells);
                let value = top * (0.1 + 0.9 * middle);
                all.push(value);
                if signed {
                    all.push(-value);
                }
            }
        }
        all.sort_by(f64::total_cmp);
        let mut values = [0f32; 256];
        for (value, exact) in values.iter_mut().zip(&all) {
            *value = *exact as f32;
        }
        let mut borders = [0f32; 255];
        for (i, border) in borders.iter_mut().enumerate() {
            *border = f32::midpoint(values[i], values[i + 1]);
        }
        let lowest = |upper: u32| {
            let (a, b) = (f32::from_bits(upper << 16), f32::from_bits((upper << 16) | 0xffff));
            let least = if a.is_nan() || b.is_nan() { 0.0 } else { a.min(b) };
            // There are 255 borders.
            u8::try_from(borders.partition_point(|border| *border < least)).unwrap_or(u8::MAX)
        };
        let first = (0..1 << 16).map(lowest).collect();
        Self { values, borders, first }
    }

    /// The code of the number nearest to `x`, which is within -1 and 1.
    fn nearest(&self, x: f32) -> u8 {
        let mut code = self.first[(x.to_bits() >> 16) as usize];
        while usize::from(code) < self.borders.len() && self.borders[usize::from(code)] < x {
            code += 1;
        }
        code
    }

    /// Reads a block.
    pub fn decode(&self, codes: &[u8], scale: f32, values: &mut [f32]) {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = self.values[usize::from(*code)] * scale;
        }
    }

    /// Writes a block of finite numbers and gives its scale. Second moments (unsigned) that are not zero do
    /// not become zero: an update is divided by their roots.
    pub fn encode(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let scale = values.iter().fold(0f32, |most, v| most.max(v.abs()));
        let unsigned = self.values[0] == 0.0;
        // The inverse of the least scales would be infinite.
        for (code, value) in codes.iter_mut().zip(values) {
            let x = if scale > 0.0 { (value / scale).clamp(-1.0, 1.0) } else { 0.0 };
            *code = self.nearest(x);
            if unsigned && *code == 0 && *value > 0.0 {
                *code = 1;
            }
        }
        scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_256_numbers_from_the_paper() {
        for (codes, low) in [(&SIGNED, -0.992_968_75f32), (&UNSIGNED, 0.0)] {
            assert!(codes.values.windows(2).all(|pair| pair[0] < pair[1]));
            assert_eq!((codes.values[0], codes.values[255]), (low, 1.0));
            assert!(codes.values.contains(&0.0));
        }
        // The middle of the lowest of 128 cells between 0.1 and 1, and the two of the lowest decade.
        assert!(UNSIGNED.values.contains(&0.103_515_625));
        assert!((UNSIGNED.values[1] - 3.25e-7).abs() < 1e-12);
        assert!((UNSIGNED.values[2] - 7.75e-7).abs() < 1e-12);
    }

    #[test]
    fn the_nearest_code_is_found() {
        for codes in [&SIGNED, &UNSIGNED] {
            let low = codes.values[0];
            for i in 0..100_000 {
                let share = f64::from(i) / 99_999.0;
                // Small numbers are looked at as closely as large ones.
                let x = if i % 2 == 0 { share } else { 10f64.powf(-9.0 * share) };
                for x in [x as f32, -(x as f32)] {
                    if x < low {
                        continue;
                    }
                    let found = codes.values[usize::from(codes.nearest(x))];
                    let best = codes.values.iter().map(|v| (v - x).abs()).fold(2.0, f32::min);
                    assert!((found - x).abs() <= best * 1.000_001, "{x}: {found}");
                }
            }
        }
    }

    #[test]
    fn blocks_come_back_nearly() {
        let values: Vec<f32> = (0..256).map(|i| ((i * 37 % 256) as f32 - 128.0) * 0.01).collect();
        let (mut codes, mut back) = (vec![0u8; 256], vec![0f32; 256]);
        let scale = SIGNED.encode(&values, &mut codes);
        SIGNED.decode(&codes, scale, &mut back);
        // Half a cell of the first decade, of the scale.
        assert!(
            values.iter().zip(&back).all(|(a, b)| (a - b).abs() <= scale * 0.45 / 64.0 * 1.001)
        );
        let again = SIGNED.encode(&back, &mut codes);
        let mut twice = vec![0f32; 256];
        SIGNED.decode(&codes, again, &mut twice);
        assert!(back.iter().zip(&twice).all(|(a, b)| (a - b).abs() <= scale * 0.45 / 64.0 * 1.01));
    }

    #[test]
    fn zeros_stay_zero_and_small_second_moments_do_not_become_zero() {
        let (mut codes, mut back) = (vec![9u8; 4], vec![0f32; 4]);
        assert_eq!(SIGNED.encode(&[0.0; 4], &mut codes), 0.0);
        SIGNED.decode(&codes, 0.0, &mut back);
        assert_eq!(back, [0.0; 4]);
        let scale = UNSIGNED.encode(&[1.0, 0.0, 1e-20, 1e-3], &mut codes);
        UNSIGNED.decode(&codes, scale, &mut back);
        assert_eq!((back[0], back[1]), (1.0, 0.0));
        assert!(back[2] > 0.0 && back[2] < 1e-6, "{}", back[2]);
        // The least positive number as a scale.
        let least = f32::from_bits(1);
        let scale = UNSIGNED.encode(&[least, 0.0, 0.0, 0.0], &mut codes);
        UNSIGNED.decode(&codes, scale, &mut back);
        assert_eq!(back[0], least);
    }
}
