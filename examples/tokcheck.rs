use std::io::Write;
use std::time::Instant;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let t = Instant::now();
    let file = planish::formats::gguf::open(std::path::Path::new(&a[1])).unwrap();
    eprintln!("open {:?}", t.elapsed());
    let t = Instant::now();
    let tok = planish::formats::tokenizer::from_gguf(&file.metadata).unwrap().unwrap();
    eprintln!("tokenizer {:?} json {} bytes {:?}", t.elapsed(), tok.json.len(), tok);
    for f in &a[3..] {
        let (special, path) = f.split_once(':').unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        let t = Instant::now();
        let ids = tok.encode(&text, false, special == "s").unwrap();
        eprintln!("encode {} bytes -> {} ids {:?}", text.len(), ids.len(), t.elapsed());
        let t = Instant::now();
        let back = tok.decode(&ids, false).unwrap();
        eprintln!("decode {:?} equal {}", t.elapsed(), back == text);
        let mut out = std::fs::OpenOptions::new().append(true).create(true).open(&a[2]).unwrap();
        writeln!(out, "{}", serde_json::to_string(&ids).unwrap()).unwrap();
    }
    let t = Instant::now();
    let meta = planish::formats::tokenizer::to_gguf(&tok, tok.vocab_size()).unwrap();
    eprintln!("to_gguf {:?}", t.elapsed());
    let mut m = planish::formats::gguf::Metadata::default();
    for (k, v) in meta {
        m.set(k, v);
    }
    for (k, v) in m.iter() {
        let old = file.metadata.get(k);
        if old != Some(v) && !format!("{v:?}").is_empty() {
            eprintln!("differs {k}: {:.80} vs {:.80}", format!("{v:?}"), format!("{old:?}"));
        }
    }
    let again = planish::formats::tokenizer::from_gguf(&m).unwrap().unwrap();
    eprintln!("json equal after a round trip: {}", again.json == tok.json);
    eprintln!(
        "config equal {} generation equal {}",
        again.tokenizer_config() == tok.tokenizer_config(),
        again.generation_config() == tok.generation_config()
    );
    let copy = planish::data::tokenizer::Tokenizer::from_files(planish::data::tokenizer::Files {
        tokenizer: tok.json.clone(),
        tokenizer_config: Some(&tok.tokenizer_config().to_string()),
        generation_config: Some(&tok.generation_config().to_string()),
        ..Default::default()
    })
    .unwrap();
    eprintln!("copy: {copy:?}");
    let msgs =
        [planish::data::chat::Message { role: "user".into(), content: "Hi <|im_end|>".into() }];
    let _ = msgs;
}
