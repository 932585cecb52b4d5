//! Tensors on the wire. Types, shapes and lengths are checked before anything is allocated for them.

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::proto::inference::InferTensorContents;
use crate::proto::inference::model_infer_request::InferInputTensor;

/// Dimensions that a shape may have.
const MAX_RANK: usize = 8;

/// The types of elements that some input or output has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Datatype {
    Bool,
    Int32,
    Int64,
    Uint32,
    Uint64,
    Fp32,
    Fp64,
    Bytes,
}

impl Datatype {
    /// The name that the protocol uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bytes => "BYTES",
        }
    }

    /// Bytes of an element; strings have their own lengths.
    fn size(self) -> Option<usize> {
        match self {
            Self::Bool => Some(1),
            Self::Int32 | Self::Uint32 | Self::Fp32 => Some(4),
            Self::Int64 | Self::Uint64 | Self::Fp64 => Some(8),
            Self::Bytes => None,
        }
    }
}

/// The elements of an input, or the value of a parameter.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    Bools(Vec<bool>),
    Integers(Vec<i128>),
    Floats(Vec<f64>),
    Strings(Vec<Bytes>),
}

/// Reads the input at place `at`, whose elements are of one of the types `accepted` and `most` at most.
/// `raw` are its bytes where they travel apart from it. Errors name the tensor and the field.
pub fn read(
    at: usize,
    input: InferInputTensor,
    raw: Option<Bytes>,
    accepted: &[Datatype],
    most: usize,
) -> Result<Values> {
    let Some(datatype) = accepted.iter().copied().find(|d| d.name() == input.datatype) else {
        let names: Vec<_> = accepted.iter().map(|d| d.name()).collect();
        return Err(Error::field(
            format!("inputs[{at}].datatype"),
            format!("'{}' is of another type; send {}", input.name, names.join(" or ")),
        ));
    };
    let elements = elements(&input.shape).filter(|n| *n <= most).ok_or_else(|| {
        let problem = format!(
            "'{}' takes at most {most} elements in at most {MAX_RANK} dimensions, none of them \
             negative",
            input.name
        );
        Error::field(format!("inputs[{at}].shape"), problem)
    })?;
    match (raw, input.contents) {
        (Some(_), Some(contents)) if contents != InferTensorContents::default() => {
            let problem = format!(
                "'{}' has elements here and in raw_input_contents; leave one out",
                input.name
            );
            Err(Error::field(format!("inputs[{at}].contents"), problem))
        }
        (Some(raw), _) => from_raw(&raw, datatype, elements).map_err(|problem| {
            let field = format!("raw_input_contents[{at}]");
            Error::field(field, format!("'{}': {problem}", input.name))
        }),
        (None, contents) => {
            from_typed(contents.unwrap_or_default(), datatype, elements).map_err(|problem| {
                let field = format!("inputs[{at}].contents");
                Error::field(field, format!("'{}': {problem}", input.name))
            })
        }
    }
}

/// Product of the dimensions; none when it overflows, a dimension is negative, or there are too many.
fn elements(shape: &[i64]) -> Option<usize> {
    if shape.len() > MAX_RANK {
        return None;
    }
    shape.iter().try_fold(1_usize, |n, dim| n.checked_mul(usize::try_from(*dim).ok()?))
}

fn from_typed(
    contents: InferTensorContents,
    datatype: Datatype,
    elements: usize,
) -> Result<Values, String> {
    let c = contents;
    let (own, values_len) = match datatype {
        Datatype::Bool => ("bool_contents", c.bool_contents.len()),
        Datatype::Int32 => ("int_contents", c.int_contents.len()),
        Datatype::Int64 => ("int64_contents", c.int64_contents.len()),
        Datatype::Uint32 => ("uint_contents", c.uint_contents.len()),
        Datatype::Uint64 => ("uint64_contents", c.uint64_contents.len()),
        Datatype::Fp32 => ("fp32_contents", c.fp32_contents.len()),
        Datatype::Fp64 => ("fp64_contents", c.fp64_contents.len()),
        Datatype::Bytes => ("bytes_contents", c.bytes_contents.len()),
    };
    let all = c.bool_contents.len()
        + c.int_contents.len()
        + c.int64_contents.len()
        + c.uint_contents.len()
        + c.uint64_contents.len()
        + c.fp32_contents.len()
        + c.fp64_contents.len()
        + c.bytes_contents.len();
    if values_len != elements || all != elements {
        return Err(format!(
            "{own} has {values_len} elements and the other fields {}, but the shape and the datatype \
             ask for {elements} in {own} alone",
            all - values_len
        ));
    }
    Ok(match datatype {
        Datatype::Bool => Values::Bools(c.bool_contents),
        Datatype::Int32 => integers(c.int_contents),
        Datatype::Int64 => integers(c.int64_contents),
        Datatype::Uint32 => integers(c.uint_contents),
        Datatype::Uint64 => integers(c.uint64_contents),
        Datatype::Fp32 => Values::Floats(c.fp32_contents.into_iter().map(f64::from).collect()),
        Datatype::Fp64 => Values::Floats(c.fp64_contents),
        Datatype::Bytes => Values::Strings(c.bytes_contents),
    })
}

fn integers<T: Into<i128>>(values: Vec<T>) -> Values {
    Values::Integers(values.into_iter().map(Into::into).collect())
}

fn from_raw(raw: &Bytes, datatype: Datatype, elements: usize) -> Result<Values, String> {
    let Some(size) = datatype.size() else { return strings(raw, elements).map(Values::Strings) };
    if elements.checked_mul(size) != Some(raw.len()) {
        return Err(format!(
            "{} bytes are not {elements} elements of {size} bytes each",
            raw.len()
        ));
    }
    Ok(match datatype {
        Datatype::Bool => {
            if let Some(odd) = raw.iter().find(|b| **b > 1) {
                return Err(format!("{odd} is no boolean; send bytes of 0 and 1"));
            }
            Values::Bools(raw.iter().map(|b| *b == 1).collect())
        }
        Datatype::Int32 => integers(parts(raw, i32::from_le_bytes)),
        Datatype::Int64 => integers(parts(raw, i64::from_le_bytes)),
        Datatype::Uint32 => integers(parts(raw, u32::from_le_bytes)),
        Datatype::Uint64 => integers(parts(raw, u64::from_le_bytes)),
        Datatype::Fp32 => {
            Values::Floats(parts(raw, f32::from_le_bytes).into_iter().map(f64::from).collect())
        }
        Datatype::Fp64 => Values::Floats(parts(raw, f64::from_le_bytes)),
        Datatype::Bytes => Values::Strings(Vec::new()),
    })
}

fn parts<T, const N: usize>(raw: &[u8], read: fn([u8; N]) -> T) -> Vec<T> {
    raw.as_chunks::<N>().0.iter().map(|part| read(*part)).collect()
}

/// Strings, each behind its length in four bytes.
fn strings(raw: &Bytes, elements: usize) -> Result<Vec<Bytes>, String> {
    let mut rest = raw.clone();
    let mut strings = Vec::new();
    for index in 0..elements {
        let Some((length, _)) = rest.split_first_chunk::<4>() else {
            return Err(format!("ends before string {index} of {elements}"));
        };
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let mut body = rest.split_off(4);
        if length > body.len() {
            return Err(format!(
                "string {index} claims {length} bytes, but {} are left",
                body.len()
            ));
        }
        rest = body.split_off(length);
        strings.push(body);
    }
    match rest.len() {
        0 => Ok(strings),
        left => Err(format!("{left} bytes are left after {elements} strings")),
    }
}

/// Floats as raw bytes.
pub fn floats(values: &[f32]) -> Bytes {
    let mut raw = Vec::with_capacity(values.len() * 4);
    raw.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    raw.into()
}

/// One string as raw bytes.
pub fn string(text: &str) -> Result<Bytes> {
    let length = u32::try_from(text.len())
        .map_err(|_| Error::internal("a text of more than four gigabytes"))?;
    Ok([&length.to_le_bytes(), text.as_bytes()].concat().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: &[Datatype] = &[
        Datatype::Bool,
        Datatype::Int32,
        Datatype::Int64,
        Datatype::Uint32,
        Datatype::Uint64,
        Datatype::Fp32,
        Datatype::Fp64,
        Datatype::Bytes,
    ];

    fn tensor(datatype: &str, shape: &[i64]) -> InferInputTensor {
        InferInputTensor {
            name: "x".into(),
            datatype: datatype.into(),
            shape: shape.to_vec(),
            ..Default::default()
        }
    }

    fn raw(datatype: &str, shape: &[i64], bytes: &[u8]) -> Result<Values> {
        read(2, tensor(datatype, shape), Some(Bytes::copy_from_slice(bytes)), EVERY, 4)
    }

    #[test]
    fn raw_and_typed_elements_are_the_same() {
        let typed = |datatype: &str, contents| {
            let input = InferInputTensor { contents: Some(contents), ..tensor(datatype, &[1, 2]) };
            read(2, input, None, EVERY, 4).unwrap()
        };
        type C = InferTensorContents;
        let none = C::default;
        let cases = [
            ("BOOL", vec![1, 0], C { bool_contents: vec![true, false], ..none() }),
            (
                "INT32",
                vec![255, 255, 255, 255, 2, 1, 0, 0],
                C { int_contents: vec![-1, 258], ..none() },
            ),
            (
                "UINT32",
                vec![255, 255, 255, 255, 2, 1, 0, 0],
                C { uint_contents: vec![u32::MAX, 258], ..none() },
            ),
            (
                "INT64",
                [[255; 8], [5, 0, 0, 0, 0, 0, 0, 0]].concat(),
                C { int64_contents: vec![-1, 5], ..none() },
            ),
            (
                "UINT64",
                [[255; 8], [5, 0, 0, 0, 0, 0, 0, 0]].concat(),
                C { uint64_contents: vec![u64::MAX, 5], ..none() },
            ),
            // 1.5 is 3FC00000 and 3FF8000000000000; -2 is C0000000 and C000000000000000.
            (
                "FP32",
                vec![0, 0, 0xc0, 0x3f, 0, 0, 0, 0xc0],
                C { fp32_contents: vec![1.5, -2.0], ..none() },
            ),
            (
                "FP64",
                [[0, 0, 0, 0, 0, 0, 0xf8, 0x3f], [0, 0, 0, 0, 0, 0, 0, 0xc0]].concat(),
                C { fp64_contents: vec![1.5, -2.0], ..none() },
            ),
            (
                "BYTES",
                vec![2, 0, 0, 0, b'h', b'i', 0, 0, 0, 0],
                C { bytes_contents: vec!["hi".into(), "".into()], ..none() },
            ),
        ];
        for (datatype, bytes, contents) in cases {
            assert_eq!(raw(datatype, &[2], &bytes).unwrap(), typed(datatype, contents));
        }
        assert_eq!(raw("UINT64", &[1], &[255; 8]).unwrap(), Values::Integers(vec![(1 << 64) - 1]));
        assert_eq!(raw("FP32", &[], &[0, 0, 0xc0, 0x3f]).unwrap(), Values::Floats(vec![1.5]));
    }

    #[test]
    fn shapes_that_lie_are_refused_before_allocation() {
        for shape in [
            &[-1][..],
            &[5],
            &[2, 3],
            &[i64::MAX],
            &[i64::MAX, i64::MAX],
            &[1 << 32, 1 << 32],
            &[1 << 62, 4],
            &[i64::MIN, 2],
            &[1; 9],
        ] {
            let error = raw("INT64", shape, &[]).unwrap_err();
            assert_eq!(error.violations()[0].field, "inputs[2].shape", "{shape:?}");
            assert!(error.message().contains("'x'"), "{error}");
        }
        // Nothing is nothing, however large the other dimensions claim to be.
        assert_eq!(raw("INT64", &[0, i64::MAX], &[]).unwrap(), Values::Integers(Vec::new()));
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for (datatype, elements, bytes) in [
            ("INT64", 1, &[0; 7][..]),
            ("INT64", 2, &[0; 8]),
            ("INT64", 0, &[0; 8]),
            ("BOOL", 1, &[2]),
            ("BYTES", 1, &[]),
            ("BYTES", 1, &[1, 0, 0]),
            ("BYTES", 1, &[255, 255, 255, 255, b'x']),
            ("BYTES", 1, &[2, 0, 0, 0, b'x']),
            ("BYTES", 1, &[0, 0, 0, 0, b'x']),
            ("BYTES", 2, &[1, 0, 0, 0, b'x']),
        ] {
            let error = raw(datatype, &[elements], bytes).unwrap_err();
            assert_eq!(
                error.violations()[0].field,
                "raw_input_contents[2]",
                "{datatype} {bytes:?}"
            );
        }
    }

    #[test]
    fn contents_belong_to_the_datatype() {
        let read = |datatype: &str, contents| {
            let input = InferInputTensor { contents, ..tensor(datatype, &[1]) };
            super::read(2, input, None, EVERY, 4)
        };
        let floats = InferTensorContents { fp32_contents: vec![1.0], ..Default::default() };
        assert!(read("FP32", Some(floats.clone())).is_ok());
        let both = InferTensorContents { fp64_contents: vec![1.0], ..floats.clone() };
        for (datatype, contents) in
            [("INT32", Some(floats.clone())), ("FP32", Some(both)), ("FP32", None)]
        {
            let error = read(datatype, contents).unwrap_err();
            assert_eq!(error.violations()[0].field, "inputs[2].contents");
        }
        let input = InferInputTensor { contents: Some(floats), ..tensor("FP32", &[1]) };
        let twice = super::read(2, input, Some(Bytes::from_static(&[0; 4])), EVERY, 4);
        assert_eq!(twice.unwrap_err().violations()[0].field, "inputs[2].contents");
        let error = read("FP16", None).unwrap_err();
        assert_eq!(error.violations()[0].field, "inputs[2].datatype");
        assert!(error.message().contains("BOOL or INT32"), "{error}");
    }

    #[test]
    fn outputs_are_little_endian() {
        assert_eq!(floats(&[1.5, -2.0])[..], [0, 0, 0xc0, 0x3f, 0, 0, 0, 0xc0]);
        assert_eq!(string("hé").unwrap()[..], [3, 0, 0, 0, b'h', 0xc3, 0xa9]);
    }

    proptest::proptest! {
        /// Whatever comes is refused, or has as many elements as its shape says.
        #[test]
        fn any_bytes_are_read_or_refused(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..48),
            shape in proptest::collection::vec(-1_i64..5, 0..3),
            which in 0..EVERY.len(),
        ) {
            if let Ok(values) = raw(EVERY[which].name(), &shape, &bytes) {
                let count = match values {
                    Values::Bools(values) => values.len(),
                    Values::Integers(values) => values.len(),
                    Values::Floats(values) => values.len(),
                    Values::Strings(values) => values.len(),
                };
                let expected: i64 = shape.iter().product();
                proptest::prop_assert_eq!(count as i64, expected);
                proptest::prop_assert!(count <= 4);
            }
        }
    }
}
