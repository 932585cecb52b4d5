#![no_main]

use libfuzzer_sys::fuzz_target;
use planish::formats::{gguf::File, tokenizer::from_gguf};

fuzz_target!(|data: &[u8]| {
    let Ok(file) = File::parse(data.to_vec().into()) else { return };
    let held: usize = file.tensors.values().map(|t| t.data.len()).sum();
    assert!(held <= data.len(), "tensors overlap");
    for weight in file.tensors.values().filter_map(|t| t.weight().ok()) {
        weight.to_f32();
    }
    let _ = from_gguf(&file.metadata);
});
