#![no_main]

use libfuzzer_sys::fuzz_target;
use planish::data::tokenizer::Tokenizer;

fuzz_target!(
    init: {
        // The library panics on some files; that is contained, and only what is not may end the run.
        std::panic::set_hook(Box::new(|_| {}));
    },
    |json: &str| {
        let Ok(tokenizer) = Tokenizer::new(json.to_owned()) else { return };
        if let Ok(ids) = tokenizer.encode("a b\u{e9}\n<s>", false, true) {
            let _ = tokenizer.decode(&ids, false);
        }
    }
);
