use super::super::testing::{Case, all_linear, low_rank_methods};
use super::super::{Adapt, registry};
use super::*;
use crate::proto::v1::adaptation::Method;

fn bytes(folder: &Path) -> [Vec<u8>; 2] {
    [HEADER, TENSORS].map(|name| std::fs::read(folder.join(name)).unwrap())
}

fn nola(bits: u32) -> v1::Nola {
    v1::Nola {
        adapter: Some(all_linear(3)),
        basis_a: Some(7),
        basis_b: Some(5),
        coefficient_bits: Some(bits),
        ..Default::default()
    }
}

/// Writes what a method made after some training, and reads it.
fn round(case: &Case, method: &dyn Adapt, folder: &Path) -> (Tuned, Read) {
    let tuned = case.start(method);
    case.disturb(&tuned, 0.1);
    let tuned = method.finish(tuned).unwrap();
    let lora = v1::Adaptation { method: Some(Method::Lora(v1::Lora::default())) };
    write(&tuned, &registry::resolve(&lora), "sha256:base", folder).unwrap();
    let read = read(folder, "sha256:base", case.shapes(), case.weights()).unwrap();
    (tuned, read)
}

#[test]
fn what_is_read_gives_the_same_bits_and_is_written_the_same() {
    let case = Case::decoder();
    let mut methods = low_rank_methods();
    methods.push(Box::new(nola(8)));
    methods.push(Box::new(nola(4)));
    for method in methods {
        let name = method.card().name;
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (tuned, read) = round(&case, method.as_ref(), one.path());
        assert_eq!(case.outputs(&read.tuned), case.outputs(&tuned), "{name}");
        let kinds = |t: &Tuned| t.parameters().into_keys().collect::<Vec<_>>();
        assert_eq!(kinds(&read.tuned), kinds(&tuned), "{name}");
        write(&read.tuned, &read.adaptation, &read.base, two.path()).unwrap();
        assert_eq!(bytes(one.path()), bytes(two.path()), "{name}");
    }
}

#[test]
fn generated_factors_are_not_stored() {
    let case = Case::decoder();
    let data = |method: &dyn Adapt| {
        let folder = tempfile::tempdir().unwrap();
        round(&case, method, folder.path());
        let file = safetensors::open(&folder.path().join(TENSORS)).unwrap();
        file.tensors.values().map(|t| t.data.len()).sum::<usize>()
    };
    assert_eq!(data(&nola(32)), 21 * 4 * (7 + 5));
    assert_eq!(data(&nola(8)), 21 * (7 + 5));
    assert_eq!(data(&nola(4)), 21 * (4 + 3));
    let full = v1::AdapterOptions { r: None, ..all_linear(1) };
    let loldu = v1::Loldu { adapter: Some(full), ..Default::default() };
    assert_eq!(data(&loldu), 21 * 4 * 32);
}

#[test]
fn lies_and_other_bases_are_refused() {
    let case = Case::decoder();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    round(&case, &nola(32), path);
    let read_as = |digest: &str| read(path, digest, case.shapes(), case.weights());
    assert_eq!(read_as("sha256:other").unwrap_err().reason(), Reason::ModelUnsuitable);
    let other = Case::encoder();
    let error = read(path, "sha256:base", other.shapes(), other.weights()).unwrap_err();
    assert_eq!(error.reason(), Reason::ModelUnsuitable);
    let good = std::fs::read_to_string(path.join(HEADER)).unwrap();
    for (from, to, reason) in [
        ("\"version\": 1", "\"version\": 2", Reason::UnsupportedFormat),
        (philox::NAME, "mt19937", Reason::UnsupportedFormat),
        ("\"count\": 7", "\"count\": 0", Reason::MalformedFile),
        ("\"count\": 7", "\"count\": 8", Reason::MalformedFile),
        ("\"count\": 7", "\"count\": 99999999999", Reason::MalformedFile),
        ("\"rank\": 3", "\"rank\": 0", Reason::MalformedFile),
        ("\"scale\": 1.0", "\"scale\": 1e300", Reason::MalformedFile),
        ("\"core\": \"none\"", "\"core\": \"diagonal\"", Reason::MalformedFile),
        ("\"start\": false", "\"start\": true", Reason::MalformedFile),
        ("\"magnitude\": false", "\"magnitude\": true", Reason::MalformedFile),
        ("\"dropout\"", "\"drop\"", Reason::MalformedFile),
        ("\n  \"dropout\": 0.0", "\n  \"dropout\": 1.0", Reason::MalformedFile),
        ("\"count\": 7", "\"count\": 1048577", Reason::MalformedFile),
        ("\"key\": [", "\"key\": [1,", Reason::MalformedFile),
        ("\"a\": {", "\"a\": {\"x\": 1,", Reason::MalformedFile),
        ("down_proj", "other_proj", Reason::ModelUnsuitable),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good, "{from}");
        std::fs::write(path.join(HEADER), bad).unwrap();
        let error = read_as("sha256:base").unwrap_err();
        assert_eq!(error.reason(), reason, "{from} to {to}: {error}");
    }
    std::fs::write(path.join(HEADER), &good).unwrap();
    std::fs::write(path.join(TENSORS), b"no").unwrap();
    assert_eq!(read_as("sha256:base").unwrap_err().reason(), Reason::MalformedFile);
    std::fs::remove_file(path.join(TENSORS)).unwrap();
    assert_eq!(read_as("sha256:base").unwrap_err().reason(), Reason::SourceUnavailable);
    assert_eq!(unpack(&pack(&[1, 15, 7]), 3), [1, 15, 7]);
}

fn loldu() -> v1::Loldu {
    v1::Loldu { adapter: Some(all_linear(4)), ..Default::default() }
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    let case = Case::decoder();
    let methods: [Box<dyn Adapt>; 2] = [Box::new(loldu()), Box::new(nola(32))];
    for method in methods {
        let tuned = case.start(method.as_ref());
        let (name, parameter) = tuned.parameters().into_iter().next().unwrap();
        let var = parameter.var;
        let mut values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values[1] = f32::NAN;
        let broken = candle_core::Tensor::from_vec(values, var.shape(), &Device::Cpu);
        var.set(&broken.unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        write(&tuned, &v1::Adaptation::default(), "sha256:base", folder.path()).unwrap();
        let error = read(folder.path(), "sha256:base", case.shapes(), case.weights());
        let error = error.unwrap_err();
        assert_eq!(error.reason(), Reason::MalformedFile, "{name}: {error}");
        assert!(error.message().contains(&name), "{error} does not name {name}");
    }
}

/// Triangles and norms are those of the weights that were trained on; without their digest nobody knows
/// whether these are they.
#[test]
fn what_is_made_from_the_base_asks_for_its_digest() {
    let case = Case::decoder();
    let dora = v1::Dora { adapter: Some(all_linear(2)) };
    let lora = v1::Lora { adapter: Some(all_linear(2)), ..Default::default() };
    let methods: [(Box<dyn Adapt>, bool); 4] = [
        (Box::new(loldu()), false),
        (Box::new(dora), false),
        (Box::new(nola(32)), true),
        (Box::new(lora), true),
    ];
    for (method, alone) in methods {
        let folder = tempfile::tempdir().unwrap();
        let (tuned, _) = round(&case, method.as_ref(), folder.path());
        let files = [HEADER, TENSORS].map(|name| folder.path().join(name));
        let [header, tensors] = files.each_ref().map(|path| path.as_path());
        let found = open([header, tensors], None, case.shapes(), case.weights());
        let name = method.card().name;
        match found {
            Ok(found) => {
                assert!(alone, "{name} was read");
                assert_eq!(case.outputs(&found.tuned), case.outputs(&tuned), "{name}");
            }
            Err(error) => {
                assert!(!alone, "{name}: {error}");
                assert_eq!(error.reason(), Reason::ModelUnsuitable, "{name}");
            }
        }
    }
}
