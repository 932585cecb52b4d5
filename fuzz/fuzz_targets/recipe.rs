#![no_main]

use libfuzzer_sys::fuzz_target;
use planish::recipe::file::parse;

fuzz_target!(|text: &str| {
    let _ = parse(text, false);
    let _ = parse(text, true);
});
