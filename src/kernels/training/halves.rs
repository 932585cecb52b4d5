//! Numbers rounded to bf16, two in the memory of one f32: what is kept for long and read once.
//!
//! Of `n` numbers, number `i` stands in the low half of word `i` and number `i + n / 2` (rounded up) in its high
//! half, so that rows of words are rows of numbers and nothing is shuffled.

use super::super::bf16::half;
use super::super::multiversion::multiversion;
use super::super::threads;
use super::GRAIN;

/// Words that `len` numbers take.
pub const fn words(len: usize) -> usize {
    len.div_ceil(2)
}

/// Rounds `x`, halves to even.
///
/// # Panics
/// If `out` does not have [`words`] of it.
pub fn narrow(x: &[f32], out: &mut [f32]) {
    assert_eq!(out.len(), words(x.len()), "words of halves");
    let (low, high) = x.split_at(out.len());
    threads::for_rows(out, 1, GRAIN, |first, out| {
        let low = &low[first..first + out.len()];
        let high = &high[first.min(high.len())..(first + out.len()).min(high.len())];
        pair(low, high, out);
        if let (Some(last), true) = (out.last_mut(), high.len() < low.len()) {
            *last = f32::from_bits(u32::from(half(low[low.len() - 1])));
        }
    });
}

/// The numbers that [`narrow`] made.
///
/// # Panics
/// If `halves` does not have the [`words`] of `out`.
pub fn widen(halves: &[f32], out: &mut [f32]) {
    assert_eq!(halves.len(), words(out.len()), "words of halves");
    let (low, high) = out.split_at_mut(halves.len());
    threads::for_rows(low, 1, GRAIN, |first, out| lows(&halves[first..first + out.len()], out));
    threads::for_rows(high, 1, GRAIN, |first, out| highs(&halves[first..first + out.len()], out));
}

multiversion! {
    fn pair(low: &[f32], high: &[f32], out: &mut [f32]) {
        for ((low, high), out) in low.iter().zip(high).zip(out) {
            *out = f32::from_bits(u32::from(half(*low)) | u32::from(half(*high)) << 16);
        }
    }

    fn lows(halves: &[f32], out: &mut [f32]) {
        for (word, out) in halves.iter().zip(out) {
            *out = f32::from_bits(word.to_bits() << 16);
        }
    }

    fn highs(halves: &[f32], out: &mut [f32]) {
        for (word, out) in halves.iter().zip(out) {
            *out = f32::from_bits(word.to_bits() & 0xffff_0000);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_back_rounded() {
        // 40,001 and 65,537 are more than one task each.
        for len in [0, 1, 2, 3, 17, 40_001, 65_537] {
            let x: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37 - 50.0).sin() * 9.0).collect();
            let (mut halves, mut back) = (vec![0.0; words(len)], vec![0.0; len]);
            narrow(&x, &mut halves);
            widen(&halves, &mut back);
            for (i, (x, back)) in x.iter().zip(&back).enumerate() {
                assert_eq!(*back, half::bf16::from_f32(*x).to_f32(), "{i} of {len}");
            }
        }
        let (mut halves, mut back) = ([0.0; 3], [0.0; 5]);
        narrow(&[f32::NAN, f32::INFINITY, -0.0, f32::from_bits(0x7f80_0001), 1.0], &mut halves);
        widen(&halves, &mut back);
        assert!(back[0].is_nan() && back[3].is_nan(), "{back:?}");
        assert_eq!(back[1..3], [f32::INFINITY, 0.0]);
        assert!(back[2].is_sign_negative());
        assert_eq!(back[4], 1.0);
    }
}
