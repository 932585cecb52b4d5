#![no_main]

use libfuzzer_sys::fuzz_target;
use planish::formats::safetensors::{File, read_index};

fuzz_target!(|data: &[u8]| {
    let _ = read_index(data);
    if let Ok(file) = File::parse(data.to_vec().into()) {
        let held: usize = file.tensors.values().map(|t| t.data.len()).sum();
        assert!(held <= data.len(), "tensors overlap");
    }
});
