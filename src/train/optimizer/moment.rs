//! What an optimiser remembers of a tensor: one number an element, in f32 or in 8 bits.

use super::blocks::{BLOCK, Codes, SIGNED, UNSIGNED};
use crate::train::tensors::RUN;

/// Tensors with fewer elements are remembered in f32 in any case: they cost little and matter most.
pub const LEAST_FOR_8_BIT: usize = 4096;

/// Numbers of a tensor's elements.
#[derive(Debug, Clone, PartialEq)]
pub enum Moment {
    Full(Vec<f32>),
    /// Codes, and a scale for each block.
    Blocks {
        signed: bool,
        codes: Vec<u8>,
        scales: Vec<f32>,
    },
}

/// A part of a moment.
pub enum Run<'a> {
    Full(&'a mut [f32]),
    Blocks { codes: &'static Codes, bytes: &'a mut [u8], scales: &'a mut [f32] },
}

impl Moment {
    /// Zeros.
    pub fn zeros(elements: usize, signed: bool, eight_bit: bool) -> Self {
        if !eight_bit || elements < LEAST_FOR_8_BIT {
            return Self::Full(vec![0.0; elements]);
        }
        let mut codes = vec![0; elements];
        codes_of(signed).encode(&vec![0.0; BLOCK], &mut codes[..BLOCK]);
        let zero = codes[0];
        codes.fill(zero);
        Self::Blocks { signed, codes, scales: vec![0.0; elements.div_ceil(BLOCK)] }
    }

    /// A moment in 8 bits as it was stored; `None` where the scales are not as many as the blocks.
    pub fn blocks(signed: bool, codes: Vec<u8>, scales: Vec<f32>) -> Option<Self> {
        let fits = scales.len() == codes.len().div_ceil(BLOCK);
        fits.then_some(Self::Blocks { signed, codes, scales })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Full(values) => values.len(),
            Self::Blocks { codes, .. } => codes.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in memory of a moment of so many elements.
    pub fn bytes(elements: usize, eight_bit: bool) -> u64 {
        let elements = elements as u64;
        if !eight_bit || elements < LEAST_FOR_8_BIT as u64 {
            return elements * 4;
        }
        elements + elements.div_ceil(BLOCK as u64) * 4
    }

    /// The numbers.
    pub fn values(&self) -> Vec<f32> {
        match self {
            Self::Full(values) => values.clone(),
            Self::Blocks { signed, codes, scales } => {
                let mut values = vec![0.0; codes.len()];
                let blocks = values.chunks_mut(BLOCK).zip(codes.chunks(BLOCK)).zip(scales);
                blocks.for_each(|((values, codes), scale)| {
                    codes_of(*signed).decode(codes, *scale, values);
                });
                values
            }
        }
    }

    /// Replaces the numbers, which must be as many.
    pub fn set(&mut self, new: &[f32]) {
        match self {
            Self::Full(values) => values.copy_from_slice(new),
            Self::Blocks { signed, codes, scales } => {
                let blocks = new.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(scales);
                blocks.for_each(|((values, codes), scale)| {
                    *scale = codes_of(*signed).encode(values, codes);
                });
            }
        }
    }

    /// The parts of [`RUN`] elements.
    pub fn runs(&mut self) -> Vec<Run<'_>> {
        const { assert!(RUN.is_multiple_of(BLOCK), "runs are made of whole blocks") };
        match self {
            Self::Full(values) => values.chunks_mut(RUN).map(Run::Full).collect(),
            Self::Blocks { signed, codes, scales } => {
                let table = codes_of(*signed);
                let parts = codes.chunks_mut(RUN).zip(scales.chunks_mut(RUN / BLOCK));
                parts.map(|(bytes, scales)| Run::Blocks { codes: table, bytes, scales }).collect()
            }
        }
    }
}

impl Run<'_> {
    /// Reads block `index` into `buffer`.
    pub fn load(&self, index: usize, buffer: &mut [f32]) {
        let start = index * BLOCK;
        let range = start..start + buffer.len();
        match self {
            Self::Full(values) => buffer.copy_from_slice(&values[range]),
            Self::Blocks { codes, bytes, scales } => {
                codes.decode(&bytes[range], scales[index], buffer);
            }
        }
    }

    /// Writes block `index`.
    pub fn store(&mut self, index: usize, buffer: &[f32]) {
        let start = index * BLOCK;
        let range = start..start + buffer.len();
        match self {
            Self::Full(values) => values[range].copy_from_slice(buffer),
            Self::Blocks { codes, bytes, scales } => {
                scales[index] = codes.encode(buffer, &mut bytes[range]);
            }
        }
    }
}

fn codes_of(signed: bool) -> &'static Codes {
    if signed { &SIGNED } else { &UNSIGNED }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bits_cost_a_quarter() {
        for (elements, eight_bit, bytes) in
            [(5000, false, 20_000), (5000, true, 5080), (4095, true, 16_380), (8192, true, 8320)]
        {
            assert_eq!(Moment::bytes(elements, eight_bit), bytes);
            let real = match Moment::zeros(elements, true, eight_bit) {
                Moment::Full(values) => values.len() * 4,
                Moment::Blocks { codes, scales, .. } => codes.len() + scales.len() * 4,
            };
            assert_eq!(real as u64, bytes);
        }
    }

    #[test]
    fn runs_and_whole_moments_agree() {
        let elements = RUN + 3 * BLOCK + 5;
        let new: Vec<f32> = (0..elements).map(|i| (i as f32 * 0.1).sin()).collect();
        for eight_bit in [false, true] {
            let (mut whole, mut parts) = (
                Moment::zeros(elements, true, eight_bit),
                Moment::zeros(elements, true, eight_bit),
            );
            assert!(whole.values().iter().all(|v| *v == 0.0));
            whole.set(&new);
            for (run, new) in parts.runs().iter_mut().zip(new.chunks(RUN)) {
                for (index, block) in new.chunks(BLOCK).enumerate() {
                    run.store(index, block);
                    let mut back = vec![0.0; block.len()];
                    run.load(index, &mut back);
                    assert!(block.iter().zip(&back).all(|(a, b)| (a - b).abs() < 0.01));
                }
            }
            assert_eq!(whole, parts);
            assert!(new.iter().zip(whole.values()).all(|(a, b)| (a - b).abs() < 0.01));
        }
    }
}
