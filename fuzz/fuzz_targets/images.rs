#![no_main]

use libfuzzer_sys::fuzz_target;
use planish::data::images::{Format, parse};

fuzz_target!(|data: &[u8]| {
    for format in [Format::Idx, Format::Cifar] {
        let Ok(images) = parse(format, data) else { continue };
        assert!(images.pixels.len() <= data.len(), "more pixels than the file has");
        assert_eq!(images.pixels.len(), images.len() * images.image());
        assert!(images.labels() <= 256);
    }
});
