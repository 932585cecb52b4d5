use std::str::FromStr;
use std::time::Instant;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let file = planish::formats::gguf::open(std::path::Path::new(&a[1])).unwrap();
    let tok = planish::formats::tokenizer::from_gguf(&file.metadata).unwrap().unwrap();
    for _ in 0..3 {
        let t = Instant::now();
        let v: serde_json::Value = serde_json::from_str(&tok.json).unwrap();
        eprintln!("value {:?}", t.elapsed());
        drop(v);
        let t = Instant::now();
        let i = tokenizers::Tokenizer::from_str(&tok.json).unwrap();
        eprintln!("inner {:?}", t.elapsed());
        let t = Instant::now();
        let v = i.get_vocab(true);
        eprintln!("vocab {:?} {}", t.elapsed(), v.len());
        let t = Instant::now();
        let v = i.get_added_vocabulary().clone();
        eprintln!("added {:?} {}", t.elapsed(), v.len());
        drop(v);
        let t = Instant::now();
        let k = planish::data::tokenizer::Tokenizer::new(tok.json.clone()).unwrap();
        eprintln!("new {:?}", t.elapsed());
        drop(k);
        let t = Instant::now();
        planish::formats::tokenizer::from_gguf(&file.metadata).unwrap().unwrap();
        eprintln!("gguf {:?}", t.elapsed());
    }
}
