//! Damaged and malicious files. Small valid files are built here and then broken in every way; no
//! case may panic, and none may take memory for what a header merely claims.

use bytes::Bytes;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::gguf::{self, Array, Metadata, TensorType, Value};
use super::safetensors;
use crate::error::Reason;
use crate::nn::dtype::Dtype;
use crate::nn::weight::GgmlType;
use crate::seed::Stream;

/// A safetensors file from its header.
pub(crate) fn safetensors_bytes(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend((0..data).map(|i| i as u8));
    file
}

fn small_safetensors() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let plan = |name: &str, dtype, shape: &[usize]| safetensors::Plan {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    };
    let plans = [
        plan("a.codes", Dtype::U8, &[3]),
        plan("a", Dtype::F32, &[2, 3]),
        plan("b", Dtype::BF16, &[5]),
    ];
    safetensors::write(&path, &plans, &mut |plan, out| {
        let bytes = plan.shape.iter().product::<usize>() * plan.dtype.size();
        Ok(out.write_all(&vec![plan.name.len() as u8; bytes])?)
    })
    .unwrap();
    std::fs::read(path).unwrap()
}

fn small_gguf() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", Value::String("llama".to_owned()));
    metadata.set("a.u8", Value::U8(1));
    metadata.set("a.i8", Value::I8(-1));
    metadata.set("a.u16", Value::U16(2));
    metadata.set("a.i16", Value::I16(-2));
    metadata.set("a.u32", Value::U32(3));
    metadata.set("a.i32", Value::I32(-3));
    metadata.set("a.f32", Value::F32(0.5));
    metadata.set("a.bool", Value::Bool(true));
    metadata.set("a.u64", Value::U64(4));
    metadata.set("a.i64", Value::I64(-4));
    metadata.set("a.f64", Value::F64(0.25));
    metadata.set("b.texts", Value::Array(Array::String(vec!["x".to_owned(), "".to_owned()])));
    metadata.set("b.bools", Value::Array(Array::Bool(vec![true, false])));
    metadata.set("b.floats", Value::Array(Array::F32(vec![1.0, 2.0])));
    let nested = Array::Array(vec![Array::U16(vec![1, 2]), Array::I64(vec![])]);
    metadata.set("b.nested", Value::Array(nested));
    let plan = |name: &str, kind, shape: &[usize]| gguf::Plan {
        name: name.to_owned(),
        kind,
        shape: shape.to_vec(),
    };
    let plans = [
        plan("norm", TensorType::F32, &[3]),
        plan("q", TensorType::Blocks(GgmlType::Q4_0), &[2, 32]),
        plan("h", TensorType::F16, &[2, 5]),
    ];
    gguf::write(&path, &metadata, &plans, &mut |i, out| {
        let bytes = plans[i].kind.bytes(&plans[i].shape).unwrap();
        Ok(out.write_all(&vec![i as u8; bytes])?)
    })
    .unwrap();
    let file = std::fs::read(path).unwrap();
    let read = gguf::File::parse(Bytes::from(file.clone())).unwrap();
    assert_eq!(read.metadata, metadata);
    file
}

/// One to four changes: bits, bytes, extreme numbers, bytes lost or doubled; mostly in the header.
pub(crate) fn damage(file: &[u8], header: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut file = file.to_vec();
    for _ in 0..rng.random_range(1..=4) {
        let end = if rng.random_bool(0.9) { header.min(file.len()) } else { file.len() };
        let at = rng.random_range(0..end.max(1));
        match rng.random_range(0..6) {
            _ if file.len() < 16 => break,
            0 => file[at] ^= 1 << rng.random_range(0..8),
            1 => file[at] = rng.random(),
            2 => {
                let extreme = [0, 1, 127, 1 << 20, 1 << 31, 1 << 40, u64::MAX >> 1, u64::MAX];
                let value: u64 = extreme[rng.random_range(0..extreme.len())];
                let at = at.min(file.len() - 8);
                file[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            3 => {
                file.remove(at);
            }
            4 => file.insert(at, file[at]),
            _ => file[at] = b"{}[]\",:0123456789eE-.\\"[rng.random_range(0..22)],
        }
    }
    file
}

fn parse_safetensors(file: Vec<u8>) -> crate::error::Result<()> {
    let size = file.len();
    let file = safetensors::File::parse(Bytes::from(file))?;
    let held: usize = file.tensors.values().map(|t| t.data.len()).sum();
    assert!(held <= size, "tensors overlap");
    Ok(())
}

fn parse_gguf(file: Vec<u8>) -> crate::error::Result<()> {
    let size = file.len();
    let file = gguf::File::parse(Bytes::from(file))?;
    let held: usize = file.tensors.values().map(|t| t.data.len()).sum();
    assert!(held <= size, "tensors overlap");
    for tensor in file.tensors.values() {
        if let Ok(weight) = tensor.weight() {
            weight.to_f32();
        }
    }
    Ok(())
}

#[test]
fn cut_files_are_refused_at_every_byte() {
    let file = small_safetensors();
    parse_safetensors(file.clone()).unwrap();
    for length in 0..file.len() {
        let error = parse_safetensors(file[..length].to_vec()).unwrap_err();
        assert_eq!(error.reason(), Reason::MalformedFile, "{length}");
    }
    let file = small_gguf();
    parse_gguf(file.clone()).unwrap();
    // The last tensor has 20 bytes and is padded.
    let needed = file.len() - (32 - 20);
    for length in 0..needed {
        parse_gguf(file[..length].to_vec()).unwrap_err();
    }
}

#[test]
fn random_damage_is_survived() {
    let mut rng = Stream::root(1).child("damage").rng();
    let file = small_safetensors();
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    for _ in 0..10_000 {
        let _ = parse_safetensors(damage(&file, header, &mut rng));
    }
    let file = small_gguf();
    for _ in 0..10_000 {
        let _ = parse_gguf(damage(&file, file.len() - 128, &mut rng));
    }
}

#[test]
fn lying_safetensors_headers_are_refused() {
    let entry = |text: &str| safetensors_bytes(&format!("{{{text}}}"), 8);
    let one = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    parse_safetensors(entry(one)).unwrap();
    parse_safetensors(safetensors_bytes("{}", 0)).unwrap();
    let half = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let cases = [
        // Twice the same name; the second would shadow the first.
        format!("{one},{one}"),
        // Overlap, gap, unclaimed bytes, past the end, backwards.
        format!(r#"{one},"b":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#),
        r#""a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#.to_owned(),
        half.to_owned(),
        r#""a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}"#.to_owned(),
        r#""a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#.to_owned(),
        // Shapes that overflow, or do not fill the bytes.
        r#""a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,8]}"#.to_owned(),
        r#""a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8]}"#.to_owned(),
        r#""a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#.to_owned(),
        r#""a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#.to_owned(),
        r#""a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]}"#.to_owned(),
        // Names.
        r#""":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#.to_owned(),
        r#""a\u0000":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#.to_owned(),
        format!(r#""{}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, "x".repeat(513)),
        // Entries of another form.
        r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1}"#.to_owned(),
        r#""a":{"dtype":"F32","shape":[2]}"#.to_owned(),
        r#""a":[]"#.to_owned(),
        format!(r#""__metadata__":{{"a":1}},{one}"#),
        format!(r#""__metadata__":{{}},"__metadata__":{{}},{one}"#),
        // Deep nesting, which a recursive parser would fall into.
        format!(r#""a":{}"#, "[".repeat(100_000)),
        format!(r#""__metadata__":{}"#, r#"{"a":"#.repeat(100_000)),
    ];
    for case in cases {
        let error = parse_safetensors(entry(&case)).unwrap_err();
        assert_eq!(error.reason(), Reason::MalformedFile, "{case:.100}");
        assert!(error.message().len() < 600);
    }
    for dtype in ["F64", "BOOL", "F8_E4M3", "", "f32"] {
        let text = format!(r#""a":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,8]}}"#);
        let error = parse_safetensors(entry(&text)).unwrap_err();
        assert_eq!(error.reason(), Reason::UnsupportedFormat, "{dtype}");
    }
    for length in [3, 1 << 31, 1 << 40, u64::MAX - 7, u64::MAX] {
        let mut file = entry(one);
        file[..8].copy_from_slice(&u64::to_le_bytes(length));
        parse_safetensors(file).unwrap_err();
    }
}

#[test]
fn lying_indexes_are_refused() {
    let index = |file: &str| {
        safetensors::read_index(format!(r#"{{"weight_map":{{"a":"{file}"}}}}"#).as_bytes())
    };
    index("model-00001-of-00002.safetensors").unwrap();
    for file in ["../x.safetensors", "/x", "a/b", "", "..", "a\\\\b", "a\\u0000"] {
        assert_eq!(index(file).unwrap_err().reason(), Reason::MalformedFile, "{file}");
    }
    for json in ["", "[]", "{}", r#"{"weight_map":[]}"#, &"[".repeat(1 << 20)] {
        safetensors::read_index(json.as_bytes()).unwrap_err();
    }
}

/// The parts of a GGUF file, so that single fields can lie.
struct Gguf(Vec<u8>);

impl Gguf {
    fn new(version: u32, tensors: u64, pairs: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(version).u64(tensors).u64(pairs)
    }
    fn u32(mut self, v: u32) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u64(mut self, v: u64) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn text(self, text: &[u8]) -> Self {
        let mut this = self.u64(text.len() as u64);
        this.0.extend(text);
        this
    }
    fn tensor(self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let this = self.text(name.as_bytes()).u32(dims.len() as u32);
        dims.iter().fold(this, |g, &d| g.u64(d)).u32(kind).u64(offset)
    }
    fn data(mut self, bytes: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + bytes, 0);
        self
    }
    fn reason(self) -> Option<Reason> {
        parse_gguf(self.0).err().map(|e| e.reason())
    }
}

#[test]
fn lying_gguf_headers_are_refused() {
    const BAD: Option<Reason> = Some(Reason::MalformedFile);
    const UNREAD: Option<Reason> = Some(Reason::UnsupportedFormat);
    let counts = [1 << 20, 1 << 30, 1 << 32, 1 << 40, 1 << 61, u64::MAX / 8, u64::MAX];

    for version in [2, 3] {
        assert_eq!(Gguf::new(version, 0, 0).reason(), None);
    }
    for version in [0, 1, 4, 3_u32.swap_bytes(), u32::MAX] {
        assert_eq!(Gguf::new(version, 0, 0).reason(), UNREAD, "{version}");
    }
    assert_eq!(
        parse_gguf(b"GGML00000000".to_vec()).unwrap_err().reason(),
        Reason::UnsupportedFormat
    );
    for count in counts {
        assert_eq!(Gguf::new(3, count, 0).data(1000).reason(), BAD);
        assert_eq!(Gguf::new(3, 0, count).data(1000).reason(), BAD);
        // A key, a text, and an array of every kind that claim to be huge.
        assert_eq!(Gguf::new(3, 0, 1).u64(count).data(1000).reason(), BAD);
        assert_eq!(Gguf::new(3, 0, 1).text(b"k").u32(8).u64(count).data(1000).reason(), BAD);
        for kind in 0..=12 {
            let file = Gguf::new(3, 0, 1).text(b"k").u32(9).u32(kind).u64(count).data(1000);
            assert_eq!(file.reason(), BAD, "{kind} {count}");
        }
    }
    for kind in [13, 99, u32::MAX] {
        assert_eq!(Gguf::new(3, 0, 1).text(b"k").u32(kind).data(100).reason(), BAD);
        assert_eq!(Gguf::new(3, 0, 1).text(b"k").u32(9).u32(kind).u64(0).data(100).reason(), BAD);
    }
    // Arrays in arrays in arrays, without end.
    let deep = (0..100_000).fold(Gguf::new(3, 0, 1).text(b"k").u32(9), |g, _| g.u32(9).u64(1));
    assert_eq!(deep.reason(), BAD);
    // A truth value of 2, a text that is not UTF-8, a key twice, alignments.
    assert_eq!(Gguf::new(3, 0, 1).text(b"k").u32(7).u32(2).data(100).reason(), BAD);
    assert_eq!(Gguf::new(3, 0, 1).text(b"k").u32(8).text(b"\xff").data(100).reason(), BAD);
    let twice = Gguf::new(3, 0, 2).text(b"k").u32(4).u32(1).text(b"k").u32(4).u32(1);
    assert_eq!(twice.reason(), BAD);
    for alignment in [0, 3, 48, 1 << 21, u32::MAX] {
        let file = Gguf::new(3, 0, 1).text(b"general.alignment").u32(4).u32(alignment);
        assert_eq!(file.data(100).reason(), BAD, "{alignment}");
    }

    let one =
        |dims: &[u64], kind, offset| Gguf::new(3, 1, 0).tensor("t", dims, kind, offset).data(64);
    assert_eq!(one(&[4, 4], 0, 0).reason(), None);
    assert_eq!(one(&[32, 1], 8, 0).reason(), None);
    // Ranks, empty and absurd shapes, rows that are no whole blocks.
    for dims in [&[][..], &[0], &[4, 0], &[1, 1, 1, 1, 1], &[1 << 63], &[1 << 32, 1 << 32]] {
        assert_eq!(one(dims, 0, 0).reason(), BAD, "{dims:?}");
    }
    assert_eq!(one(&[u64::MAX, u64::MAX, u64::MAX, u64::MAX], 0, 0).reason(), BAD);
    assert_eq!(one(&[16, 2], 8, 0).reason(), BAD);
    // Offsets: unaligned, past the end, overflowing.
    for offset in [1, 16, 32, 64, 1 << 40, u64::MAX - 31] {
        assert_eq!(one(&[4, 4], 0, offset).reason(), BAD, "{offset}");
    }
    // Types by name and by number.
    for kind in [4, 5, 9, 15, 16, 23, 24, 28, 39, 1000, u32::MAX] {
        assert_eq!(one(&[256, 1], kind, 0).reason(), UNREAD, "{kind}");
    }
    let error = parse_gguf(one(&[256, 1], 23, 0).0).unwrap_err();
    assert!(error.message().contains("IQ4_XS"), "{error}");

    let two = |name: &str, offset| {
        let first = Gguf::new(3, 2, 0).tensor("t", &[4, 4], 0, 0);
        first.tensor(name, &[4, 4], 0, offset).data(128)
    };
    assert_eq!(two("u", 64).reason(), None);
    assert_eq!(two("t", 64).reason(), BAD);
    assert_eq!(two("u", 32).reason(), BAD);
    assert_eq!(two("", 64).reason(), BAD);
    assert_eq!(two("u\0", 64).reason(), BAD);
}

/// The tests above again in a process that has little memory: a reader that believed a count would
/// be ended by the system.
#[test]
#[cfg(target_os = "linux")]
fn lies_take_no_memory() {
    const LIMIT_KIB: u32 = 1 << 20;
    let status = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("ulimit -v {LIMIT_KIB}; exec \"$0\" formats::hostile::lying --test-threads 1"))
        .arg(std::env::current_exe().unwrap())
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}
