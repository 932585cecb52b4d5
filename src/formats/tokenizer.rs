//! Turns the tokenizer stored in a GGUF file into the `tokenizer.json` form, and back.
