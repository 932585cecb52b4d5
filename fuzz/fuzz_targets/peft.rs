#![no_main]

use libfuzzer_sys::fuzz_target;
use planish::formats::{peft, safetensors::File};

// The settings, a NUL, the file of factors.
fuzz_target!(|data: &[u8]| {
    let end = data.iter().position(|b| *b == 0).unwrap_or(data.len());
    let (config, file) = data.split_at(end);
    let file = File::parse(file.get(1..).unwrap_or_default().to_vec().into()).unwrap_or_default();
    if let Ok(adapter) = peft::parse(config, &file) {
        assert!(adapter.bytes() <= data.len() as u64, "factors out of nothing");
    }
});
