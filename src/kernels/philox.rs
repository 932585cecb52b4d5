//! Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random numbers by
//! their place, so that any part of a random matrix can be made anew, in any order, on any thread.

use std::array::from_fn;

use rayon::prelude::*;

use super::multiversion::multiversion;

/// Name of the generator, and of the order in which a matrix takes its numbers, in files; another one
/// gets another name.
pub const NAME: &str = "philox4x32-10";

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The four numbers at `counter` of the stream `key`.
#[inline(always)]
pub fn block(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], [mut k, mut l]) = (counter, key);
    for _ in 0..ROUNDS {
        let p = u64::from(MULTIPLIERS[0]) * u64::from(a);
        let q = u64::from(MULTIPLIERS[1]) * u64::from(c);
        (a, b, c, d) = ((q >> 32) as u32 ^ b ^ k, q as u32, (p >> 32) as u32 ^ d ^ l, p as u32);
        (k, l) = (k.wrapping_add(WEYL[0]), l.wrapping_add(WEYL[1]));
    }
    [a, b, c, d]
}

/// A number in [-1, 1) from the top 24 bits; exact.
#[inline(always)]
pub fn symmetric(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / 8_388_608.0) - 1.0
}

/// A number in [0, 1) from the top 24 bits; exact.
#[inline(always)]
pub fn unit(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Blocks that are made together; a matrix takes its elements from them word by word.
const LANES: usize = 16;
/// Elements of that many blocks.
pub const GROUP: usize = 4 * LANES;
/// Elements that a thread works on before it looks for the next: whole groups.
const CHUNK: usize = 64 * GROUP;

/// A family of random matrices: element `e` (in row order) of matrix `index` has word `e % 64 / 16` of the
/// block at counter `[e / 64 * 16 + e % 16, index, family, 0]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    pub key: [u32; 2],
    pub family: u32,
}

/// The blocks of group `group` of matrix `index`.
#[inline(always)]
fn group(of: Family, group: u32, index: u32) -> [[u32; LANES]; 4] {
    let first = group.wrapping_mul(LANES as u32);
    let mut a: [u32; LANES] = from_fn(|l| first.wrapping_add(l as u32));
    let (mut b, mut c, mut d) = ([index; LANES], [of.family; LANES], [0; LANES]);
    let [mut k, mut l] = of.key;
    for _ in 0..ROUNDS {
        for i in 0..LANES {
            let p = u64::from(MULTIPLIERS[0]) * u64::from(a[i]);
            let q = u64::from(MULTIPLIERS[1]) * u64::from(c[i]);
            (a[i], b[i], c[i], d[i]) =
                ((q >> 32) as u32 ^ b[i] ^ k, q as u32, (p >> 32) as u32 ^ d[i] ^ l, p as u32);
        }
        (k, l) = (k.wrapping_add(WEYL[0]), l.wrapping_add(WEYL[1]));
    }
    [a, b, c, d]
}

multiversion! {
    /// `out[e] += sum_i c[i] u_i[e]` for the elements from group `first` on; summed in the order of `i`,
    /// and never fused, so that every processor gives the same bits.
    fn combine_part(of: Family, first: u32, coefficients: &[f32], out: &mut [f32]) {
        for (g, out) in out.chunks_mut(GROUP).enumerate() {
            let mut sums = [[0f32; LANES]; 4];
            for (i, c) in coefficients.iter().enumerate() {
                let bits = group(of, first + g as u32, i as u32);
                for w in 0..4 {
                    for l in 0..LANES {
                        sums[w][l] += c * symmetric(bits[w][l]);
                    }
                }
            }
            for (o, s) in out.iter_mut().zip(sums.iter().flatten()) {
                *o += s;
            }
        }
    }

    /// `sum_e g[e] u_index[e]`.
    fn project_one(of: Family, index: u32, g: &[f32]) -> f64 {
        let mut sums = [[0f64; LANES]; 4];
        let mut part = [0f32; GROUP];
        for (at, g) in g.chunks(GROUP).enumerate() {
            part[..g.len()].copy_from_slice(g);
            part[g.len()..].fill(0.0);
            let bits = group(of, at as u32, index);
            for w in 0..4 {
                for l in 0..LANES {
                    sums[w][l] += f64::from(part[w * LANES + l] * symmetric(bits[w][l]));
                }
            }
        }
        sums.iter().flatten().sum()
    }
}

/// `out = sum_i c[i] u_i`, where the `u_i` are uniform in [-1, 1) and never kept.
pub fn combine(of: Family, coefficients: &[f32], out: &mut [f32]) {
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(at, out)| {
        out.fill(0.0);
        combine_part(of, (at * CHUNK / GROUP) as u32, coefficients, out);
    });
}

/// `<g, u_i>` for the first `count` matrices, each rounded once.
pub fn project(of: Family, count: usize, g: &[f32]) -> Vec<f32> {
    (0..count).into_par_iter().map(|i| project_one(of, i as u32, g) as f32).collect()
}

/// Element `e` of matrix `index`, uniform in [-1, 1).
pub fn element(of: Family, index: u32, e: usize) -> f32 {
    let (lane, word) = (e % LANES, e % GROUP / LANES);
    let at = (e / GROUP * LANES + lane) as u32;
    symmetric(block([at, index, of.family, 0], of.key)[word])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: Family = Family { key: [1, 2], family: 3 };

    #[test]
    fn combinations_are_sums_of_the_elements_by_their_places() {
        for len in [1, 15, 64, 65, 200, CHUNK + 70] {
            let c = [0.5, -2.0, 0.25];
            let mut out = vec![9.0; len];
            combine(SOME, &c, &mut out);
            for (e, got) in out.iter().enumerate() {
                let want = (0..3).fold(0.0, |s, i| s + c[i] * element(SOME, i as u32, e));
                assert_eq!(*got, want, "element {e} of {len}");
            }
        }
    }

    #[test]
    fn projections_are_inner_products() {
        let g: Vec<f32> = (0..200).map(|e| (e as f32 * 0.37).sin()).collect();
        for (i, got) in project(SOME, 5, &g).iter().enumerate() {
            let want: f64 = g
                .iter()
                .enumerate()
                .map(|(e, g)| f64::from(*g) * f64::from(element(SOME, i as u32, e)))
                .sum();
            assert!((f64::from(*got) - want).abs() < 1e-5, "{got} is not {want}");
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let c: Vec<f32> = (0..9).map(|i| i as f32 - 3.5).collect();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut out = vec![0.0; 3 * CHUNK + 5];
                combine(SOME, &c, &mut out);
                let projections = project(SOME, 9, &out);
                (out, projections)
            })
        };
        assert_eq!(run(1), run(2));
    }

    /// The known answers that the authors publish beside their generator.
    #[test]
    fn known_answers() {
        assert_eq!(block([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            block([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            block([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn floats_cover_their_range() {
        assert_eq!((symmetric(0), symmetric(1 << 31), unit(1 << 31)), (-1.0, 0.0, 0.5));
        assert!(symmetric(u32::MAX) < 1.0 && unit(u32::MAX) < 1.0);
        let numbers: Vec<f32> =
            (0..4000).flat_map(|i| block([i, 0, 0, 0], [7, 8])).map(symmetric).collect();
        let n = numbers.len() as f32;
        let mean = numbers.iter().sum::<f32>() / n;
        let square = numbers.iter().map(|v| v * v).sum::<f32>() / n;
        assert!(mean.abs() < 0.02 && (square - 1.0 / 3.0).abs() < 0.02, "{mean} {square}");
    }
}
