//! Gradients of every operation against differences of its own values.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use super::*;
use crate::nn::dtype::Dtype;
use crate::nn::tuning::{Dropout, LowRank};
use crate::nn::weight::{Dense, Ggml, GgmlType, Weight};

fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747_796_405) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn tensor(dims: &[usize], seed: u32) -> Tensor {
    Tensor::from_vec(noise(dims.iter().product(), seed), dims, &Device::Cpu).unwrap()
}

/// `sum(out r)` for fixed numbers `r`.
fn weigh(out: &[f32]) -> f64 {
    noise(out.len(), 99).iter().zip(out).map(|(r, v)| f64::from(*r) * f64::from(*v)).sum()
}

/// Checks the gradient of `f` for inputs of these shapes; `f` gets tensors, variables or not.
fn check(what: &str, shapes: &[&[usize]], f: impl Fn(&Tape, &[Tensor]) -> Value) {
    let pool = Pool::default();
    let inputs: Vec<Tensor> = shapes.iter().zip(1..).map(|(s, i)| tensor(s, i)).collect();
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let labels: Vec<String> = (0..vars.len()).map(|i| i.to_string()).collect();
    let names: HashMap<_, _> =
        labels.iter().zip(&vars).map(|(name, var)| (var.id(), (&name[..], var))).collect();

    let tape = Tape::new(&pool);
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tape, &tracked);
    assert!(out.tracked(), "{what}");
    let mut g = pool.take(out.read().len());
    let len = g.len();
    g.copy_from_slice(&noise(len, 99));
    let mut sums = BTreeMap::new();
    tape.backward(&out, g.into()).unwrap().collect(&names, &mut sums).unwrap();
    drop(out);
    assert_eq!(pool.live_bytes(), 0, "{what} keeps memory");

    // Nothing is kept where nothing is trained.
    let plain = Tape::new(&pool);
    assert!(!f(&plain, &inputs).tracked(), "{what}");
    for (i, input) in inputs.iter().enumerate() {
        let values = input.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let got = sums[&labels[i]].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(sums[&labels[i]].dims(), input.dims(), "{what}");
        for at in 0..values.len() {
            let moved = |by: f32| {
                let mut inputs = inputs.clone();
                let mut values = values.clone();
                values[at] += by;
                inputs[i] = Tensor::from_vec(values, shapes[i], &Device::Cpu).unwrap();
                weigh(&f(&Tape::forgetful(&pool), &inputs).read())
            };
            let want = (moved(5e-3) - moved(-5e-3)) / 1e-2;
            let error = (f64::from(got[at]) - want).abs();
            assert!(error < 4e-3 + 4e-3 * want.abs(), "{what} {i} [{at}]: {} not {want}", got[at]);
        }
    }
}

fn leaf(tape: &Tape, t: &Tensor) -> Value {
    tape.leaf(t).unwrap()
}

fn stored(rows: usize, cols: usize, precision: Precision) -> Arc<Linear> {
    let values = noise(rows * cols, 7);
    let weight = Dense::from_f32(vec![rows, cols], &values, Dtype::F32).unwrap();
    Arc::new(Linear::new(&Arc::new(Weight::Dense(weight)), precision))
}

#[test]
fn products() {
    let linear = stored(6, 4, Precision::F32);
    check("frozen", &[&[5, 4]], |tape, x| tape.product(&leaf(tape, &x[0]), &linear).unwrap());
    let values = noise(3 * 32, 5);
    let blocks = Ggml::quantize([3, 32], GgmlType::Q8_0, &values).unwrap();
    let blocks = Arc::new(Linear::new(&Arc::new(Weight::Ggml(blocks)), Precision::F32));
    check("blocks", &[&[2, 32]], |tape, x| tape.product(&leaf(tape, &x[0]), &blocks).unwrap());
    check("trained", &[&[5, 4], &[3, 4]], |tape, x| {
        tape.dense(&leaf(tape, &x[0]), &leaf(tape, &x[1])).unwrap()
    });
    check("bias", &[&[5, 4], &[4]], |tape, x| {
        tape.add_bias(leaf(tape, &x[0]), &leaf(tape, &x[1])).unwrap()
    });
    // One value as the input of several.
    check("shared", &[&[5, 4]], |tape, x| {
        let x = leaf(tape, &x[0]);
        let (a, b) = (tape.product(&x, &linear).unwrap(), tape.product(&x, &linear).unwrap());
        let both = tape.add(&a, &b).unwrap();
        tape.add(&both, &a).unwrap()
    });
}

#[test]
fn low_rank_changes() {
    let linear = stored(6, 4, Precision::F32);
    let bias = noise(6, 3);
    let change = |x: &[Tensor]| LowRank {
        a: x[1].clone(),
        b: x[2].clone(),
        rows: x.get(3).cloned(),
        scale: 0.7,
        dropout: None,
    };
    let shapes: [&[usize]; 4] = [&[5, 4], &[2, 4], &[6, 2], &[6]];
    for count in [3, 4] {
        for probability in [0.0, 0.4] {
            check("low rank", &shapes[..count], |tape, x| {
                let mut change = change(x);
                change.dropout = (probability > 0.0).then_some(Dropout { probability, seed: 3 });
                let x = leaf(tape, &x[0]);
                tape.tuned_product(&x, &linear, Some(&change), Some(&bias)).unwrap()
            });
        }
    }
    // Only a core is trained; the factors are computed from it.
    let (a, b) = (tensor(&[2, 4], 11), tensor(&[6, 2], 12));
    check("core", &[&[5, 4], &[2, 2]], |tape, x| {
        let b = b.matmul(&x[1]).unwrap();
        let change = LowRank { a: a.clone(), b, rows: None, scale: 1.5, dropout: None };
        tape.tuned_product(&leaf(tape, &x[0]), &linear, Some(&change), None).unwrap()
    });
    let tape = Tape::new(&Pool::default());
    let x = leaf(&tape, &tensor(&[5, 4], 1));
    let bad = LowRank { b: tensor(&[5, 2], 1), ..change(&[a.clone(), a.clone(), a.clone()]) };
    assert!(tape.tuned_product(&x, &linear, Some(&bad), None).is_err());
    assert!(tape.product(&leaf(&tape, &tensor(&[5, 3], 1)), &linear).is_err());
}

#[test]
fn rounded_products_are_near_exact_ones() {
    let (exact, rounded) = (stored(40, 70, Precision::F32), stored(40, 70, Precision::Bf16));
    let (x, g) = (noise(9 * 70, 1), noise(9 * 40, 2));
    let [mut y, mut y16] = [const { [0.0; 9 * 40] }; 2];
    exact.multiply(&x, &mut y);
    rounded.multiply(&x, &mut y16);
    let packed = rounded.packed_bytes();
    assert!(packed > 0 && exact.packed_bytes() == 0);
    let [mut dx, mut dx16] = [const { [0.0; 9 * 70] }; 2];
    exact.multiply_transposed(&g, &mut dx);
    rounded.multiply_transposed(&g, &mut dx16);
    assert_eq!(rounded.packed_bytes(), packed, "the transposed weight is not kept");
    for (a, b) in y.iter().zip(&y16).chain(dx.iter().zip(&dx16)) {
        assert!((a - b).abs() < 0.08, "{a} and {b}");
    }
    assert!(y != y16 && dx != dx16);
}

#[test]
fn norms_and_activations() {
    check("rms norm", &[&[3, 10], &[10]], |tape, x| {
        tape.rms_norm(&leaf(tape, &x[0]), &leaf(tape, &x[1]), 1e-2).unwrap()
    });
    check("offset", &[&[3, 10], &[10]], |tape, x| {
        let weight = tape.offset(leaf(tape, &x[1]), 1.0);
        tape.rms_norm(&leaf(tape, &x[0]), &weight, 1e-2).unwrap()
    });
    check("layer norm", &[&[3, 10], &[10], &[10]], |tape, x| {
        let x: Vec<Value> = x.iter().map(|x| leaf(tape, x)).collect();
        tape.layer_norm(&x[0], &x[1], &x[2], 1e-2).unwrap()
    });
    check("norm of heads", &[&[3, 8], &[4]], |tape, x| {
        let heads = leaf(tape, &x[0]).in_rows_of(4);
        tape.rms_norm(&heads, &leaf(tape, &x[1]), 1e-2).unwrap().in_rows_of(8)
    });
    for f in [Function::Silu, Function::Gelu, Function::GeluTanh] {
        check("activation", &[&[3, 7]], |tape, x| tape.activation(f, &leaf(tape, &x[0])));
    }
    for f in [Function::Silu, Function::GeluTanh] {
        check("gate", &[&[3, 7], &[3, 7]], |tape, x| {
            tape.gated(f, &leaf(tape, &x[0]), &leaf(tape, &x[1]), Precision::F32).unwrap()
        });
    }
    check("softcap", &[&[3, 7]], |tape, x| tape.softcap(leaf(tape, &x[0]), 0.8));
}

/// In bf16 the gradient of a gate is that of its rounded sides.
#[test]
fn gates_kept_in_halves() {
    let gradients = |sides: [Vec<f32>; 2], precision| {
        let pool = Pool::default();
        let tape = Tape::new(&pool);
        let starts = sides.map(|side| {
            let mut data = pool.take(side.len());
            data.copy_from_slice(&side);
            tape.start(&Value::constant(data, 7))
        });
        let [gate, up] = &starts;
        let out = tape.gated(Function::Silu, gate, up, precision).unwrap();
        let result = out.read().to_vec();
        let mut g = pool.take(result.len());
        g.copy_from_slice(&noise(result.len(), 99));
        let mut taken = tape.backward(&out, g.into()).unwrap();
        (result, starts.map(|start| taken.of(&start).unwrap().to_vec()))
    };
    let sides = [noise(21, 3), noise(21, 4)];
    let rounded = sides.clone().map(|side| {
        let half = |v: &f32| half::bf16::from_f32(*v).to_f32();
        side.iter().map(half).collect::<Vec<f32>>()
    });
    let (exact, _) = gradients(sides.clone(), Precision::F32);
    let (result, of) = gradients(sides, Precision::Bf16);
    assert_eq!(result, exact, "the result itself is not rounded");
    assert_eq!(of, gradients(rounded, Precision::F32).1);
}

#[test]
fn attention_and_positions() {
    struct Turn;
    impl Angles for Turn {
        fn at(&self, position: usize) -> (&[f32], &[f32]) {
            match position {
                0 => (&[1.0, 1.0], &[0.0, 0.0]),
                1 => (&[0.6, 0.8], &[0.8, 0.6]),
                _ => (&[0.0, -0.6], &[1.0, 0.8]),
            }
        }
    }
    let sequences = Sequences::of([3, 2]);
    let angles: Arc<dyn Angles> = Arc::new(Turn);
    let shape = Attention {
        heads: 2,
        kv_heads: 1,
        dim: 4,
        scale: 0.5,
        softcap: None,
        causal: true,
        window: None,
    };
    check("attention", &[&[5, 8], &[5, 4], &[5, 4]], |tape, x| {
        let x: Vec<Value> = x.iter().map(|x| leaf(tape, x)).collect();
        let q = tape.rotate(x[0].clone(), &angles, sequences.positions()).unwrap();
        let k = tape.rotate(x[1].clone(), &angles, sequences.positions()).unwrap();
        tape.attention(&shape, sequences.ranges(), &q, &k, &x[2]).unwrap()
    });
    // Positions start anew.
    assert_eq!(sequences.positions()[..], [0, 1, 2, 0, 1]);
    assert_eq!((sequences.rows(), sequences.longest()), (5, 3));
    let tape = Tape::new(&Pool::default());
    let x = leaf(&tape, &tensor(&[4, 8], 1));
    assert!(tape.attention(&shape, sequences.ranges(), &x, &x, &x).is_err());
    assert!(tape.rotate(x, &angles, sequences.positions()).is_err());
}

#[test]
fn rows_of_values() {
    let sequences = Sequences::of([3, 1]);
    check("add", &[&[2, 3], &[2, 3]], |tape, x| {
        tape.add(&leaf(tape, &x[0]), &leaf(tape, &x[1])).unwrap()
    });
    check("scale", &[&[2, 3]], |tape, x| tape.scale(leaf(tape, &x[0]), -1.5));
    check("dropout", &[&[4, 5]], |tape, x| {
        tape.dropout(&leaf(tape, &x[0]), Dropout { probability: 0.5, seed: 8 })
    });
    let at: Arc<[u32]> = [2, 0, 2].into();
    check("rows", &[&[4, 3]], |tape, x| tape.rows(&leaf(tape, &x[0]), &at).unwrap());
    check("mean", &[&[4, 3]], |tape, x| {
        tape.mean_rows(&leaf(tape, &x[0]), sequences.ranges()).unwrap()
    });
    check("max", &[&[4, 3]], |tape, x| {
        tape.max_rows(&leaf(tape, &x[0]), sequences.ranges()).unwrap()
    });
    let tape = Tape::new(&Pool::default());
    let x = leaf(&tape, &tensor(&[2, 3], 1));
    assert!(tape.rows(&x, &at).is_err());
    assert!(tape.mean_rows(&x, sequences.ranges()).is_err());
    assert!(tape.max_rows(&x, Sequences::of([2, 0]).ranges()).is_err());
}

#[test]
fn losses() {
    let head = stored(11, 4, Precision::F32);
    let targets = [3, 10, 0, 3, 5];
    for cap in [None, Some(1.5)] {
        check("frozen head", &[&[5, 4]], |tape, x| {
            let x = leaf(tape, &x[0]);
            tape.cross_entropy(&x, &Matrix::Frozen(&head), &targets, cap).unwrap().value
        });
        check("trained head", &[&[5, 4], &[11, 4]], |tape, x| {
            let w = leaf(tape, &x[1]);
            let x = leaf(tape, &x[0]);
            tape.cross_entropy(&x, &Matrix::Trained(&w), &targets, cap).unwrap().value
        });
        check("logits", &[&[5, 11]], |tape, x| {
            tape.cross_entropy_of(leaf(tape, &x[0]), &targets, cap).unwrap().value
        });
    }
    check("squares", &[&[3, 1]], |tape, x| {
        tape.squares(&leaf(tape, &x[0]), &[0.5, -1.0, 2.0]).unwrap().value
    });
    let tape = Tape::new(&Pool::default());
    let x = leaf(&tape, &tensor(&[5, 4], 1));
    for targets in [&[0_u32; 4][..], &[11; 5]] {
        assert!(tape.cross_entropy(&x, &Matrix::Frozen(&head), targets, None).is_err());
    }
    assert!(tape.cross_entropy_of(x.clone(), &[4; 5], None).is_err());
    assert!(tape.squares(&x, &[1.0; 5]).is_err());
}

#[test]
fn a_head_in_chunks_equals_all_logits() {
    // More rows than a chunk.
    let (rows, outputs) = (600, 9);
    let head = stored(outputs, 4, Precision::F32);
    let x = Var::from_tensor(&tensor(&[rows, 4], 1)).unwrap();
    let targets: Vec<u32> = (0..rows).map(|i| (i % outputs) as u32).collect();
    let names: HashMap<_, _> = [(x.id(), ("x", &x))].into();
    let gradient = |f: &dyn Fn(&Tape, &Value) -> Loss| {
        let pool = Pool::default();
        let tape = Tape::new(&pool);
        let loss = f(&tape, &leaf(&tape, x.as_tensor()));
        let mut one = pool.take(1);
        one[0] = 1.0;
        let mut sums = BTreeMap::new();
        tape.backward(&loss.value, one.into()).unwrap().collect(&names, &mut sums).unwrap();
        (loss.sums, sums["x"].flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    let (a, da) =
        gradient(&|tape, x| tape.cross_entropy(x, &Matrix::Frozen(&head), &targets, None).unwrap());
    let (b, db) = gradient(&|tape, x| {
        tape.cross_entropy_of(tape.product(x, &head).unwrap(), &targets, None).unwrap()
    });
    assert!((a.loss - b.loss).abs() < 1e-3 && a.right == b.right && a.right > 0);
    assert!(da.iter().zip(&db).all(|(a, b)| (a - b).abs() < 1e-6));
}

#[test]
fn parts_of_other_operations() {
    // As a tuned layer of the tensor library's own operations, with a variable of its own.
    check("foreign", &[&[5, 4], &[3, 4]], |tape, x| {
        let weight = &x[1];
        let f = |x: &Tensor| Ok(Some((x.matmul(&weight.t()?)? + 1.0)?.tanh()?));
        tape.foreign(&leaf(tape, &x[0]), f).unwrap().unwrap()
    });
    let tape = Tape::new(&Pool::default());
    let x = leaf(&tape, &tensor(&[5, 4], 1));
    assert!(tape.foreign(&x, |_| Ok(None)).unwrap().is_none());
    // Gradients are asked of what has them.
    let g = Pool::default().zeros(20);
    assert!(Tape::new(&Pool::default()).backward(&x, g.into()).is_err());
    assert!(tape.leaf(&Tensor::zeros(3, candle_core::DType::U32, &Device::Cpu).unwrap()).is_err());
}

#[test]
fn convolutions() {
    let window = |stride| Window::centred([4, 3], 2, 3, stride);
    for stride in [1, 2] {
        let wide = 9 * 2;
        check("convolution", &[&[24, 2], &[3, wide]], |tape, x| {
            let rows = tape.unfold(&leaf(tape, &x[0]), window(stride)).unwrap();
            tape.dense(&rows, &leaf(tape, &x[1])).unwrap()
        });
        check("depthwise", &[&[24, 2], &[2, 9]], |tape, x| {
            tape.depthwise(&leaf(tape, &x[0]), &leaf(tape, &x[1]), window(stride)).unwrap()
        });
    }
}

#[test]
fn batch_norms() {
    check("batch norm", &[&[12, 3], &[3], &[3]], |tape, x| {
        let inputs = [0, 1, 2].map(|i| leaf(tape, &x[i]));
        tape.batch_norm(&inputs[0], &inputs[1], &inputs[2], 1e-3).unwrap().0
    });
    // Away from its corners, so that differences make sense.
    check("relu6", &[&[3, 4]], |tape, x| {
        let y = tape.scale(leaf(tape, &x[0]), 8.0);
        let y = tape.offset(y, 0.37);
        tape.relu6(y)
    });
}

#[test]
fn recurrent_layers() {
    // Three steps of two sequences; the second begins anew at its second step.
    let starts: Arc<[bool]> = [true, true, false, true, false, false].into();
    check("lstm", &[&[6, 8], &[8, 2]], |tape, x| {
        tape.lstm(leaf(tape, &x[0]), &leaf(tape, &x[1]), 2, &starts).unwrap()
    });
    // What comes before a beginning changes nothing after it.
    let pool = Pool::default();
    let run = |first: f32| {
        let tape = Tape::forgetful(&pool);
        let mut values = noise(48, 3);
        values[8..16].fill(first);
        let gates = Tensor::from_vec(values, (6, 8), &Device::Cpu).unwrap();
        let y = tape.lstm(leaf(&tape, &gates), &leaf(&tape, &tensor(&[8, 2], 5)), 2, &starts);
        y.unwrap().read().to_vec()
    };
    let (a, b) = (run(0.3), run(-0.9));
    assert_ne!(a[2..4], b[2..4]);
    assert_eq!((&a[..2], &a[4..]), (&b[..2], &b[4..]));
}

#[test]
fn what_is_dropped_is_the_input_of_the_factors_alone() {
    let linear = stored(6, 4, Precision::F32);
    let tape = Tape::forgetful(&Pool::default());
    let (x, a, b) = (tensor(&[5, 4], 1), tensor(&[2, 4], 2), tensor(&[6, 2], 3));
    let plain = tape.product(&leaf(&tape, &x), &linear).unwrap().read().to_vec();
    let with = |b: &Tensor| {
        let dropout = Some(Dropout { probability: 0.5, seed: 3 });
        let change = LowRank { a: a.clone(), b: b.clone(), rows: None, scale: 0.7, dropout };
        let x = leaf(&tape, &x);
        tape.tuned_product(&x, &linear, Some(&change), None).unwrap().read().to_vec()
    };
    // A second factor of zeros: the weight sees its whole input.
    assert_eq!(with(&b.zeros_like().unwrap()), plain);
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let mut seen = vec![0.0; 20];
    crate::kernels::training::elementwise::dropout(&flat(&x), 0.5, 3, &mut seen);
    assert!(seen.contains(&0.0) && seen.iter().any(|v| *v != 0.0));
    let (a, b_values) = (flat(&a), flat(&b));
    for (i, got) in with(&b).iter().enumerate() {
        let (t, o) = (i / 6, i % 6);
        let h = [0, 1].map(|r| (0..4).map(|c| a[r * 4 + c] * seen[t * 4 + c]).sum::<f32>());
        let want = plain[i] + 0.7 * (b_values[o * 2] * h[0] + b_values[o * 2 + 1] * h[1]);
        assert!((got - want).abs() < 1e-5, "{i}: {got} is not {want}");
    }
}
