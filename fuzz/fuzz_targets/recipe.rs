#![no_main]

use libfuzzer_sys::fuzz_target;
use planish::proto::v1::Recipe;
use planish::recipe::file::parse;

fuzz_target!(|text: &str| {
    let _ = parse::<Recipe>(text, false);
    let _ = parse::<Recipe>(text, true);
});
