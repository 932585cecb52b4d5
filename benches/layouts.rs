//! Speed of the products of every weight layout: `cargo bench --bench layouts [-- layout]`.
//!
//! For one token the bound is memory bandwidth: GB/s counts stored bytes, and tokens/s is what a model of
//! 134.5 million weights in that layout (SmolLM2-135M) would reach if products were all it did. For
//! 512 tokens the bound is arithmetic: GFLOP/s counts two operations a weight and token, zeros included.
//!
//! A second row, where there is one, is the same weight packed for products in integers; rounding the
//! activations to 8 bits is part of what it takes.

use std::time::Instant;

use planish::kernels::packed::{self, Job};
use planish::kernels::quantize::Activations;
use planish::nn::dtype::Dtype;
use planish::nn::weight::{
    Dense, DualGrained, Ggml, GgmlType, Grouped, GroupedSpec, Sparse, ValueFormat, Weight,
};

const MODEL: f64 = 134.5e6;

fn main() {
    let wanted = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    println!("{} threads", rayon::current_num_threads());
    println!(
        "{:<21}{:>14}{:>9}{:>10}{:>8}{:>8}{:>11}{:>11}{:>10}",
        "layout", "shape", "MB", "t=1 us", "spread", "GB/s", "tokens/s", "t=512 ms", "GFLOP/s"
    );
    for shape in [[1536, 576], [49152, 576]] {
        let values = noise(shape[0] * shape[1]);
        for (name, build) in layouts() {
            if name.contains(&wanted) {
                report(name, &build(shape, &values));
            }
        }
    }
}

type Build = Box<dyn Fn([usize; 2], &[f32]) -> Weight>;

fn layouts() -> Vec<(&'static str, Build)> {
    let mut all: Vec<(&'static str, Build)> = Vec::new();
    for (name, dtype) in
        [("dense f32", Dtype::F32), ("dense f16", Dtype::F16), ("dense bf16", Dtype::BF16)]
    {
        all.push((
            name,
            Box::new(move |shape, v| {
                Weight::Dense(Dense::from_f32(shape.to_vec(), v, dtype).unwrap())
            }),
        ));
    }
    for (name, kind) in [
        ("ggml q4_0", GgmlType::Q4_0),
        ("ggml q4_1", GgmlType::Q4_1),
        ("ggml q5_0", GgmlType::Q5_0),
        ("ggml q5_1", GgmlType::Q5_1),
        ("ggml q8_0", GgmlType::Q8_0),
        ("ggml q2_k", GgmlType::Q2K),
        ("ggml q3_k", GgmlType::Q3K),
        ("ggml q4_k", GgmlType::Q4K),
        ("ggml q5_k", GgmlType::Q5K),
        ("ggml q6_k", GgmlType::Q6K),
    ] {
        all.push((
            name,
            Box::new(move |[rows, cols], _| {
                // Any bytes are blocks; 576 is not a multiple of 256, so those types get rows of 768. Every
                // pair of bytes is a normal f16, as scales are: others are slow to convert.
                let cols = cols.next_multiple_of(kind.block_elements());
                let size = rows * cols / kind.block_elements() * kind.block_bytes();
                let data: Vec<u8> =
                    (0..size).map(|i| (i * 131 % 251) as u8 & 0x3f | 0x10).collect();
                Weight::Ggml(Ggml::new([rows, cols], kind, data.into()).unwrap())
            }),
        ));
    }
    for (name, bits, group, symmetric) in [
        ("grouped 2/16", 2, 16, false),
        ("grouped 2/64", 2, 64, false),
        ("grouped 3/64", 3, 64, false),
        ("grouped 4/64", 4, 64, false),
        ("grouped 4/64 sym", 4, 64, true),
        ("grouped 8/64", 8, 64, false),
    ] {
        let spec = GroupedSpec { bits, group, symmetric };
        all.push((
            name,
            Box::new(move |shape, v| {
                let (codes, scales, zeros) = round(spec, v);
                Weight::Grouped(Grouped::pack(shape, spec, &codes, &scales, &zeros).unwrap())
            }),
        ));
    }
    for (name, group) in [("dual 4/64", 64), ("dual 4/192", 192)] {
        all.push((
            name,
            Box::new(move |shape, v| {
                Weight::DualGrained(DualGrained::round(shape, group, v).unwrap())
            }),
        ));
    }
    for (name, format) in [
        ("50% f32", ValueFormat::F32),
        ("50% f16", ValueFormat::F16),
        ("50% bf16", ValueFormat::BF16),
    ] {
        all.push((
            name,
            Box::new(move |shape, v| {
                Weight::Sparse(Sparse::from_dense(shape, &prune(v, 2, 4), format, None).unwrap())
            }),
        ));
    }
    all.push((
        "1:4 places bf16",
        Box::new(|shape, v| {
            let v = prune(v, 1, 4);
            Weight::Sparse(Sparse::from_dense(shape, &v, ValueFormat::BF16, Some((3, 4))).unwrap())
        }),
    ));
    for (name, bits) in [("50% 4/64", 4), ("50% 8/64", 8)] {
        let spec = GroupedSpec { bits, group: 64, symmetric: false };
        all.push((
            name,
            Box::new(move |shape, v| {
                let mask: Vec<bool> = prune(v, 2, 4).iter().map(|v| *v != 0.0).collect();
                let (codes, scales, zeros) = round(spec, v);
                Weight::Sparse(
                    Sparse::from_codes(shape, &mask, spec, &codes, &scales, &zeros, None).unwrap(),
                )
            }),
        ));
    }
    all
}

/// Pseudo-random values between -1 and 1.
fn noise(len: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 0.999_99
        })
        .collect()
}

/// Keeps the `keep` largest of each `of`.
fn prune(values: &[f32], keep: usize, of: usize) -> Vec<f32> {
    let mut out = values.to_vec();
    for group in out.chunks_exact_mut(of) {
        let mut sizes: Vec<f32> = group.iter().map(|v| v.abs()).collect();
        sizes.sort_by(f32::total_cmp);
        group.iter_mut().filter(|v| v.abs() < sizes[of - keep]).for_each(|v| *v = 0.0);
    }
    out
}

fn round(spec: GroupedSpec, values: &[f32]) -> (Vec<u8>, Vec<f32>, Vec<u8>) {
    let grids: Vec<_> = values.chunks_exact(spec.group).map(|g| spec.fit(g)).collect();
    let codes = values
        .iter()
        .enumerate()
        .map(|(i, v)| spec.code(*v, grids[i / spec.group].0, grids[i / spec.group].1))
        .collect();
    let (scales, zeros) = grids.into_iter().unzip();
    (codes, scales, zeros)
}

/// Median and quartile distance of the seconds a call takes; at least 0.2 s of measuring.
fn time(mut call: impl FnMut()) -> (f64, f64) {
    call();
    let (start, mut seconds) = (Instant::now(), Vec::new());
    while seconds.len() < 5 || start.elapsed().as_secs_f64() < 0.2 {
        let once = Instant::now();
        call();
        seconds.push(once.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let n = seconds.len();
    (seconds[n / 2], seconds[3 * n / 4] - seconds[n / 4])
}

fn report(name: &str, w: &Weight) {
    let shape = [w.rows(), w.cols()];
    line(name, shape, w.bytes(), |x, y| w.multiply(x, y));
    if let Some(packed) = w.packed() {
        let mut rounded = Activations::default();
        let bytes = packed.bytes() as u64;
        line(&format!("{name} int8"), shape, bytes, |x, y| {
            rounded.set(x, shape[1], packed.grain());
            packed::multiply(&rounded, &mut [Some(Job { weight: &packed, y })]);
        });
    }
}

fn line(
    name: &str,
    [rows, cols]: [usize; 2],
    bytes: u64,
    mut multiply: impl FnMut(&[f32], &mut [f32]) + Send,
) {
    let mut measure = |tokens: usize| {
        let (x, mut y) = (noise(tokens * cols), vec![0.0; tokens * rows]);
        // Inside the pool, as the engine runs: entering it costs more than a small product.
        rayon::scope(|_| time(|| multiply(&x, &mut y)))
    };
    let ((one, spread), (many, _)) = (measure(1), measure(512));
    let elements = (rows * cols) as f64;
    println!(
        "{name:<21}{:>14}{:>9.2}{:>10.1}{:>7.0}%{:>8.1}{:>11.1}{:>11.2}{:>10.0}",
        format!("{rows}x{cols}"),
        bytes as f64 / 1e6,
        one * 1e6,
        100.0 * spread / one,
        bytes as f64 / one / 1e9,
        elements / one / MODEL,
        many * 1e3,
        2.0 * 512.0 * elements / many / 1e9,
    );
}
