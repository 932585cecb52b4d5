//! What every layout owes: products as of its dense rows, a bit-exact way through parts, and an error
//! for parts that do not fit.

use candle_core::{Device, Tensor, Var};
use proptest::prelude::*;

use super::*;

/// Values between -1 and 1, none of them 0, the same ones every time.
fn noise(len: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 0.999_99
        })
        .collect()
}

fn grouped(shape: [usize; 2], spec: GroupedSpec, values: &[f32]) -> (Vec<u8>, Vec<f32>, Vec<u8>) {
    let (scales, zeros): (Vec<_>, Vec<_>) =
        values.chunks_exact(spec.group).map(|g| spec.fit(g)).unzip();
    let codes = (0..shape[0] * shape[1])
        .map(|i| spec.code(values[i], scales[i / spec.group], zeros[i / spec.group]))
        .collect();
    (codes, scales, zeros)
}

/// A weight of every layout and variant that the shape allows.
fn all(shape: [usize; 2]) -> Vec<Weight> {
    let [rows, cols] = shape;
    let values = noise(rows * cols);
    let mut weights = Vec::new();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        weights.push(Weight::Dense(Dense::from_f32(shape.to_vec(), &values, dtype).unwrap()));
    }
    for kind in [GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q4_1] {
        if cols % 32 == 0 {
            weights.push(Weight::Ggml(Ggml::quantize(shape, kind, &values).unwrap()));
        }
    }
    for group in [32, 96] {
        if cols % group == 0 {
            let w = DualGrained::round(shape, group, &values).unwrap();
            weights.push(Weight::DualGrained(w));
        }
    }
    // One of four and five of eight at random places; a row without any.
    let quarter: Vec<f32> =
        values.iter().enumerate().map(|(i, v)| if i % 4 == i / 4 % 4 { *v } else { 0.0 }).collect();
    let half: Vec<f32> = (0..rows * cols)
        .map(|i| if i / cols == 2 || i * 5 % 8 > 4 { 0.0 } else { values[i] })
        .collect();
    for (sparse, hint) in [(&half, None), (&half, Some((2, 4))), (&quarter, Some((3, 4)))] {
        for format in [ValueFormat::F32, ValueFormat::F16, ValueFormat::BF16] {
            let w = Sparse::from_dense(shape, sparse, format, hint).unwrap();
            weights.push(Weight::Sparse(w));
        }
    }
    for group in [2, 4, 8, 16, 32] {
        for format in [RowGroupValues::F32, RowGroupValues::BF16] {
            let w = RowGroups::from_dense(shape, &half, group, format).unwrap();
            weights.push(Weight::RowGroups(w));
        }
    }
    for rank in [1, rows.min(cols).min(5)] {
        for dtype in [Dtype::F32, Dtype::BF16] {
            let (left, right) = (noise(rows * rank), noise(rank * cols));
            let low = Factored::from_f32(shape, rank, &left, &right, dtype).unwrap();
            for base in [0, 2, weights.len() - 1] {
                let sum = Sum::new(weights[base].clone(), low.clone());
                weights.extend(sum.map(Weight::Sum).ok());
            }
            weights.push(Weight::Factored(low));
        }
    }
    for bits in [2, 3, 4, 8] {
        for symmetric in [false, true] {
            for group in [cols, 16, 32].into_iter().filter(|g| cols % g == 0) {
                let spec = GroupedSpec { bits, group, symmetric };
                let (codes, scales, zeros) = grouped(shape, spec, &values);
                let w = Grouped::pack(shape, spec, &codes, &scales, &zeros).unwrap();
                weights.push(Weight::Grouped(w));
                for (sparse, hint) in [(&half, None), (&quarter, Some((3, 4)))] {
                    let mask: Vec<bool> = sparse.iter().map(|v| *v != 0.0).collect();
                    let w = Sparse::from_codes(shape, &mask, spec, &codes, &scales, &zeros, hint)
                        .unwrap();
                    assert_eq!(w.mask(), mask);
                    weights.push(Weight::Sparse(w));
                }
            }
        }
    }
    weights
}

#[test]
fn packed_and_faster_forms_hold_the_same_numbers() {
    let (mut packed, mut faster) = (0, 0);
    for shape in [[7, 32], [17, 96], [5, 20]] {
        let [rows, cols] = shape;
        for w in all(shape) {
            let (dense, record) = (w.to_f32(), w.record());
            if let Some(form) = w.packed() {
                packed += usize::from(matches!(w, Weight::Sparse(_)));
                let mut row = vec![f32::NAN; cols];
                for r in 0..rows {
                    form.read_row(r, &mut row);
                    assert_eq!(row, dense[r * cols..(r + 1) * cols], "{record:?}");
                }
            }
            if let Some(form) = w.faster() {
                faster += 1;
                assert_eq!(form.to_f32(), dense, "{record:?}");
                let x = noise(3 * cols);
                let (mut y, mut exact) = (vec![f32::NAN; 3 * rows], vec![f32::NAN; 3 * rows]);
                form.multiply(&x, &mut y);
                w.multiply(&x, &mut exact);
                close(&y, &exact.into_iter().map(f64::from).collect::<Vec<_>>(), &record);
                assert!(form.faster().is_none());
            }
        }
    }
    // Bits, symmetry, two patterns, and groups of 32 and of a row; three kinds of values with places.
    assert_eq!((packed, faster), (4 * 2 * 2 * (2 + 2), 3 * 3));
}

/// The layouts whose products round activations too.
fn rounding(shape: [usize; 2]) -> Vec<Weight> {
    let values = noise(shape[0] * shape[1]);
    let build = |group| RowGroups::from_dense(shape, &values, group, RowGroupValues::Int8).unwrap();
    [2, 8, 32].into_iter().map(|group| Weight::RowGroups(build(group))).collect()
}

fn close(got: &[f32], exact: &[f64], what: &dyn std::fmt::Debug) {
    let size = exact.iter().fold(1.0_f64, |m, v| m.max(v.abs()));
    for (got, exact) in got.iter().zip(exact) {
        assert!((f64::from(*got) - exact).abs() <= 1e-5 * size, "{what:?}: {got} is not {exact}");
    }
}

#[test]
fn products_are_those_of_the_dense_rows() {
    for shape in [[1, 32], [7, 32], [7, 96], [5, 20], [33, 64]] {
        let [rows, cols] = shape;
        for w in all(shape) {
            let dense = w.to_f32();
            let record = w.record();
            for tokens in [1, 3, 9, 17] {
                let (x, g) = (noise(tokens * cols), noise(tokens * rows));
                let mut y = vec![f32::NAN; tokens * rows];
                w.multiply(&x, &mut y);
                let mut exact = vec![0.0; tokens * rows];
                let mut exact_dx = vec![0.0; tokens * cols];
                for t in 0..tokens {
                    for r in 0..rows {
                        for c in 0..cols {
                            let v = f64::from(dense[r * cols + c]);
                            exact[t * rows + r] += f64::from(x[t * cols + c]) * v;
                            exact_dx[t * cols + c] += f64::from(g[t * rows + r]) * v;
                        }
                    }
                }
                close(&y, &exact, &record);
                let mut dx = vec![f32::NAN; tokens * cols];
                w.multiply_transposed(&g, &mut dx);
                close(&dx, &exact_dx, &record);
            }
            let mut last = vec![f32::NAN; cols];
            w.read_rows(rows - 1, &mut last);
            assert_eq!(last, dense[(rows - 1) * cols..]);
        }
    }
}

fn by_suffix(w: &Weight) -> BTreeMap<String, Part> {
    w.parts().into_iter().map(|p| (p.suffix.to_string(), p)).collect()
}

#[test]
fn parts_and_record_give_back_the_same_bits() {
    for w in all([7, 96]).into_iter().chain(all([5, 20])).chain(rounding([7, 96])) {
        let json = serde_json::to_string(&w.record()).unwrap();
        let record: Record = serde_json::from_str(&json).unwrap();
        assert_eq!(record, w.record());
        let back = Weight::from_parts(&record, by_suffix(&w)).unwrap();
        let (parts, again) = (w.parts(), back.parts());
        assert_eq!(parts.len(), again.len());
        for (a, b) in parts.iter().zip(&again) {
            assert_eq!(
                (a.suffix, a.dtype, &a.shape, &a.data),
                (b.suffix, b.dtype, &b.shape, &b.data)
            );
            assert_eq!(a.shape.iter().product::<usize>() * a.dtype.size(), a.data.len());
        }
        assert_eq!(parts.iter().map(|p| p.data.len() as u64).sum::<u64>(), w.bytes());
        assert_eq!(w.to_f32(), back.to_f32());
    }
}

fn malformed_parts(record: &Record, parts: BTreeMap<String, Part>, what: &str) {
    match Weight::from_parts(record, parts) {
        Ok(_) => panic!("{what} was accepted for {record:?}"),
        Err(error) => assert!(
            matches!(error.reason(), Reason::MalformedFile | Reason::UnsupportedFormat),
            "{what}: {error}"
        ),
    }
}

#[test]
fn parts_that_lie_are_refused() {
    for w in all([7, 96]).into_iter().chain(all([5, 20])).chain(rounding([7, 96])) {
        let (record, parts) = (w.record(), by_suffix(&w));
        for name in parts.keys() {
            let mut missing = parts.clone();
            missing.remove(name);
            malformed_parts(&record, missing, "a missing part");

            let change = |f: &dyn Fn(&mut Part)| {
                let mut changed = parts.clone();
                f(changed.get_mut(name).unwrap());
                changed
            };
            malformed_parts(&record, change(&|p| p.dtype = Dtype::I64), "a wrong type");
            malformed_parts(&record, change(&|p| p.data = p.data.slice(1..)), "a short part");
            malformed_parts(&record, change(&|p| p.shape[0] += 1), "a long shape");
            malformed_parts(&record, change(&|p| p.shape.insert(0, 1)), "another rank");
            let grown = change(&|p| {
                p.shape[0] += 1;
                let size = p.shape.iter().product::<usize>() * p.dtype.size();
                p.data = vec![0; size].into();
            });
            malformed_parts(&record, grown, "a part with more rows");
        }
        let mut extra = parts.clone();
        let part = parts.values().next().unwrap().clone();
        extra.insert("bias".to_string(), part);
        malformed_parts(&record, extra, "an unexpected part");

        for shape in [[0, 96], [7, 0], [usize::MAX, 96], [7, usize::MAX - 31], [1 << 40, 1 << 40]] {
            let mut absurd = record.clone();
            match &mut absurd {
                Record::Dense { shape: s } => *s = shape.to_vec(),
                Record::Grouped { shape: s, .. }
                | Record::DualGrained { shape: s, .. }
                | Record::Ggml { shape: s, .. }
                | Record::Sparse { shape: s, .. }
                | Record::RowGroups { shape: s, .. }
                | Record::Factored { shape: s, .. } => *s = shape,
                Record::Sum { base, .. } => **base = Record::Dense { shape: shape.to_vec() },
            }
            malformed_parts(&absurd, parts.clone(), "an absurd shape");
        }
    }
}

#[test]
fn masks_that_lie_are_refused() {
    let w =
        Sparse::from_dense([1, 9], &[1., 0., 0., 2., 0., 0., 0., 0., 3.], ValueFormat::F32, None);
    let w = Weight::Sparse(w.unwrap());
    let parts = by_suffix(&w);
    assert_eq!(parts["mask"].data, [0b1001, 1][..]);
    for (bits, what) in [
        ([0b1011, 1], "a bit too many"),
        ([0b1000, 1], "a bit too few"),
        ([0b1000, 3], "a bit beyond the row"),
    ] {
        let mut lying = parts.clone();
        lying.get_mut("mask").unwrap().data = Bytes::copy_from_slice(&bits);
        malformed_parts(&w.record(), lying, what);
    }
}

#[test]
fn places_that_lie_are_refused() {
    // Two of six, three bits a place: group (1, 4), then (0, 5).
    let mut dense = [0.0; 24];
    for i in [1, 4, 6, 11, 12, 13, 18, 19] {
        dense[i] = i as f32;
    }
    let pattern = SparsePattern::NOfM { keep: 2, of: 6 };
    let record = Record::Sparse { shape: [1, 24], pattern, values: ValueFormat::F32 };
    let list = |places: [u8; 8]| {
        let mut bytes = Vec::new();
        bits::put(places, 3, &mut bytes);
        let values: Vec<f32> = dense.iter().copied().filter(|v| *v != 0.0).collect();
        [
            Part { suffix: "places", dtype: Dtype::U8, shape: vec![1, 3], data: bytes.into() },
            Part {
                suffix: "values",
                dtype: Dtype::F32,
                shape: vec![8],
                data: dense::encode(&values, Dtype::F32).unwrap(),
            },
        ]
        .into_iter()
        .map(|p| (p.suffix.to_string(), p))
        .collect::<BTreeMap<_, _>>()
    };
    let good = list([1, 4, 0, 5, 0, 1, 0, 1]);
    assert_eq!(Weight::from_parts(&record, good.clone()).unwrap().to_f32(), dense);
    malformed_parts(&record, list([4, 1, 0, 5, 0, 1, 0, 1]), "falling places");
    malformed_parts(&record, list([1, 1, 0, 5, 0, 1, 0, 1]), "a place twice");
    malformed_parts(&record, list([1, 4, 0, 6, 0, 1, 0, 1]), "a place outside its group");
    for (keep, of) in [(0, 6), (7, 6), (1, 0), (1, 1), (2, 7), (2, 255)] {
        let pattern = SparsePattern::NOfM { keep, of };
        let record = Record::Sparse { shape: [1, 24], pattern, values: ValueFormat::F32 };
        malformed_parts(&record, good.clone(), "a pattern that cannot be");
    }
}

#[test]
fn grids_that_lie_are_refused() {
    let spec = GroupedSpec { bits: 4, group: 2, symmetric: false };
    let w = Weight::Grouped(Grouped::pack([1, 2], spec, &[1, 2], &[1.0], &[3]).unwrap());
    for (part, bytes, what) in [
        ("zeros", &[16_u8][..], "a zero point that is no code"),
        ("scales", &[0, 0x7c], "infinity"),
    ] {
        let mut parts = by_suffix(&w);
        parts.get_mut(part).unwrap().data = Bytes::copy_from_slice(bytes);
        malformed_parts(&w.record(), parts, what);
    }
    for (bits, group) in [(5, 2), (0, 2), (255, 2), (4, 0), (4, 3)] {
        let spec = GroupedSpec { bits, group, symmetric: false };
        let record = Record::Grouped { shape: [1, 2], spec };
        malformed_parts(&record, by_suffix(&w), "a bad grid");
    }
}

#[test]
fn the_smaller_list_of_positions_is_taken() {
    let ones = |keep: usize, of: usize| -> Vec<f32> {
        (0..64 * 2).map(|i| if i % of < keep { 1.0 } else { 0.0 }).collect()
    };
    let pattern = |dense: &[f32], hint| {
        Sparse::from_dense([2, 64], dense, ValueFormat::BF16, hint).unwrap().pattern()
    };
    assert_eq!(pattern(&ones(2, 4), Some((2, 4))), SparsePattern::Bitmap);
    assert_eq!(pattern(&ones(1, 4), Some((3, 4))), SparsePattern::NOfM { keep: 1, of: 4 });
    assert_eq!(pattern(&ones(2, 16), Some((14, 16))), SparsePattern::NOfM { keep: 2, of: 16 });
    assert_eq!(pattern(&ones(2, 16), None), SparsePattern::Bitmap);
    // The hint does not hold, does not divide the row, or is no pattern.
    assert_eq!(pattern(&ones(2, 4), Some((3, 4))), SparsePattern::Bitmap);
    assert_eq!(pattern(&ones(1, 5), Some((4, 5))), SparsePattern::Bitmap);
    for hint in [(4, 4), (5, 4), (0, 0), (0, 1), (254, 255)] {
        assert_eq!(pattern(&ones(1, 64), Some(hint)), SparsePattern::Bitmap);
    }
    // A missing element is filled with a zero that does not count as kept.
    let mut dense = ones(1, 4);
    dense[0] = 0.0;
    let w = Sparse::from_dense([2, 64], &dense, ValueFormat::F16, Some((3, 4))).unwrap();
    assert_eq!(w.pattern(), SparsePattern::NOfM { keep: 1, of: 4 });
    assert_eq!(w.mask(), dense.iter().map(|v| *v != 0.0).collect::<Vec<_>>());
    assert_eq!(Weight::Sparse(w).to_f32(), dense);
}

#[test]
fn what_rounds_to_zero_is_not_kept() {
    let w = Sparse::from_dense([1, 4], &[1e-9, -0.0, 2.0, 0.0], ValueFormat::F16, None).unwrap();
    assert_eq!(w.mask(), [false, false, true, false]);
    assert_eq!(w.bytes(), 3);
    assert!(Sparse::from_dense([1, 1], &[1e6], ValueFormat::F16, None).is_err());
    let none = Sparse::from_dense([1, 4], &[0.0; 4], ValueFormat::F32, None).unwrap();
    let none = Weight::Sparse(none);
    let back = Weight::from_parts(&none.record(), by_suffix(&none)).unwrap();
    assert_eq!((back.to_f32(), back.zeros()), (vec![0.0; 4], 4));
}

#[test]
fn kept_elements_stay_kept_when_their_code_is_zero() {
    let spec = GroupedSpec { bits: 2, group: 4, symmetric: true };
    let mask = [true, true, false, false];
    let w = Sparse::from_codes([1, 4], &mask, spec, &[2, 3, 2, 2], &[0.5], &[], None).unwrap();
    assert_eq!(w.mask(), mask);
    assert_eq!(Weight::Sparse(w).to_f32(), [0.0, 0.5, 0.0, 0.0]);
}

#[test]
fn the_graph_product_has_the_gradient_of_finite_differences() {
    let device = Device::Cpu;
    for w in all([7, 32]) {
        let w = std::sync::Arc::new(w);
        // A transposed view: leading dimensions and strides must not matter.
        let start = noise(2 * 3 * 32);
        let x = Var::from_vec(start.clone(), (2, 32, 3), &device).unwrap();
        let c = Tensor::from_vec(noise(2 * 3 * 7), (2, 3, 7), &device).unwrap();
        let loss = |x: &Tensor| {
            let y = product(&x.transpose(1, 2).unwrap(), &w).unwrap();
            assert_eq!(y.dims(), [2, 3, 7]);
            (y * &c).unwrap().sum_all().unwrap()
        };
        let grads = loss(x.as_tensor()).backward().unwrap();
        let grad: Vec<f32> = grads.get(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        for at in [0, 5, 100, 191] {
            // The loss is linear in x, so a large step is exact but for rounding.
            let shifted = |by: f32| {
                let mut values = start.clone();
                values[at] += by;
                let x = Tensor::from_vec(values, (2, 32, 3), &device).unwrap();
                loss(&x).to_scalar::<f32>().unwrap()
            };
            let slope = (shifted(4.0) - shifted(-4.0)) / 8.0;
            assert!((slope - grad[at]).abs() < 1e-4, "{:?}: {slope} {}", w.record(), grad[at]);
        }
    }
    let w = std::sync::Arc::new(all([7, 32]).remove(0));
    assert!(
        product(&Tensor::zeros((2, 7), candle_core::DType::F32, &device).unwrap(), &w).is_err()
    );
}

proptest! {
    #[test]
    fn sparse_weights_give_back_what_they_were_given(
        rows in 1_usize..5,
        groups in 1_usize..12,
        of in 2_u8..=40,
        keep in 1_u8..=8,
        seed: u64,
    ) {
        let cols = groups * usize::from(of);
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let dense: Vec<f32> = (0..rows * cols)
            .map(|_| if next() % u64::from(of) < u64::from(keep) { (next() % 9) as f32 - 4.0 } else { 0.0 })
            .collect();
        let hint = Some((of.saturating_sub(keep), of));
        for format in [ValueFormat::F32, ValueFormat::BF16] {
            let w = Weight::Sparse(Sparse::from_dense([rows, cols], &dense, format, hint).unwrap());
            prop_assert_eq!(&w.to_f32(), &dense);
            let back = Weight::from_parts(&w.record(), by_suffix(&w)).unwrap();
            prop_assert_eq!(&back.to_f32(), &dense);
            prop_assert_eq!(w.zeros() as usize, dense.iter().filter(|v| **v == 0.0).count());
        }
    }

    #[test]
    fn random_parts_never_panic(
        mask in prop::collection::vec(any::<u8>(), 12),
        values in prop::collection::vec(any::<u8>(), 0..60),
        keep in 0_u8..9,
        of in 0_u8..40,
    ) {
        let spec = GroupedSpec { bits: 3, group: 16, symmetric: true };
        for (pattern, suffix) in
            [(SparsePattern::Bitmap, "mask"), (SparsePattern::NOfM { keep, of }, "places")]
        {
            let parts = [
                Part { suffix, dtype: Dtype::U8, shape: vec![2, 6], data: mask.clone().into() },
                Part { suffix: "codes", dtype: Dtype::U8, shape: vec![values.len()], data: values.clone().into() },
                Part { suffix: "scales", dtype: Dtype::F16, shape: vec![2, 3], data: vec![1; 12].into() },
            ];
            let parts = parts.into_iter().map(|p| (p.suffix.to_string(), p)).collect();
            let record = Record::Sparse { shape: [2, 48], pattern, values: ValueFormat::Grouped(spec) };
            if let Ok(w) = Weight::from_parts(&record, parts) {
                let mut y = [0.0; 2];
                w.multiply(&[1.0; 48], &mut y);
            }
        }
    }
}

#[test]
fn factors_that_lie_are_refused() {
    let low =
        |rank| Factored::from_f32([3, 4], rank, &noise(3 * rank), &noise(4 * rank), Dtype::F32);
    assert!(low(3).is_ok());
    assert!(low(4).is_err(), "more ranks than rows");
    let wide = Dense::from_f32(vec![2, 4], &noise(8), Dtype::F32).unwrap();
    let tall = Dense::from_f32(vec![3, 1], &noise(3), Dtype::F32).unwrap();
    assert!(Factored::new(tall, wide.clone()).is_err(), "ranks that differ");
    assert!(Sum::new(Weight::Dense(wide), low(1).unwrap()).is_err(), "shapes that differ");
    let base = Weight::Dense(Dense::from_f32(vec![3, 4], &noise(12), Dtype::F32).unwrap());
    let sum = Weight::Sum(Sum::new(base, low(1).unwrap()).unwrap());
    assert!(Sum::new(sum.clone(), low(2).unwrap()).is_err(), "a sum of sums");
    let nested = Record::Sum { base: Box::new(sum.record()), rank: 1 };
    malformed_parts(&nested, by_suffix(&sum), "a sum of sums");
    let vector = Record::Sum { base: Box::new(Record::Dense { shape: vec![12] }), rank: 1 };
    malformed_parts(&vector, by_suffix(&sum), "a sum with a vector");
}

#[test]
fn a_product_of_factors_by_hand() {
    // (1, 2)' (3, 4) = [[3, 4], [6, 8]]
    let low = Factored::from_f32([2, 2], 1, &[1.0, 2.0], &[3.0, 4.0], Dtype::F32).unwrap();
    assert_eq!((low.rank(), low.stored(), low.bytes()), (1, 4, 16));
    let base = Dense::from_f32(vec![2, 2], &[1.0, 0.0, 0.0, 1.0], Dtype::F32).unwrap();
    let sum = Weight::Sum(Sum::new(Weight::Dense(base), low.clone()).unwrap());
    assert_eq!(Weight::Factored(low).to_f32(), [3.0, 4.0, 6.0, 8.0]);
    assert_eq!(sum.to_f32(), [4.0, 4.0, 6.0, 9.0]);
    let mut y = [0.0; 2];
    sum.multiply(&[1.0, -1.0], &mut y);
    assert_eq!(y, [0.0, -3.0]);
    sum.multiply_transposed(&[1.0, -1.0], &mut y);
    assert_eq!(y, [-2.0, -5.0]);
}
