//! Clients that users write: Python with generated stubs, and `buf curl` against reflection. Both need
//! pip and a package registry; they install into a virtual environment under the target folder once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::support;

fn run(command: &mut Command, what: &str) -> String {
    let done = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{what}: {e}"));
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{what} failed ({}):\n{out}\n{err}", done.status);
    out.into_owned()
}

/// The folder of the programs of the environment `name`, which is made with `packages` when it is not there.
fn environment(name: &str, packages: &[&str]) -> PathBuf {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let ready = home.join("ready");
    if !ready.exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&home), "python3 -m venv");
        run(
            Command::new(home.join("bin/pip"))
                .args(["install", "--quiet", "--disable-pip-version-check"])
                .args(packages),
            "installing the client packages with pip",
        );
        fs::write(&ready, "").unwrap();
    }
    home.join("bin")
}

fn tools() -> &'static Path {
    static TOOLS: OnceLock<PathBuf> = OnceLock::new();
    TOOLS.get_or_init(|| {
        let packages =
            ["grpcio==1.85.1", "grpcio-tools==1.85.1", "grpcio-status==1.85.1", "buf-bin"];
        environment("clients", &packages)
    })
}

/// Triton's client has an environment of its own, for it asks for an older protobuf.
fn triton() -> &'static Path {
    static TRITON: OnceLock<PathBuf> = OnceLock::new();
    TRITON.get_or_init(|| environment("triton-client", &["tritonclient[grpc]==2.73.0"]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_imports_runs_watches_and_streams() {
    let folder = tempfile::tempdir().unwrap();
    let model = support::tiny_model(folder.path(), 2, 64);
    let running = support::serve(folder.path()).await;
    let endpoint = running.address().to_string();

    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let stubs = folder.path().join("stubs");
    fs::create_dir(&stubs).unwrap();
    let mut protos: Vec<_> = fs::read_dir(root.join("proto/planish/v1"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    protos.sort();
    let said = tokio::task::spawn_blocking(move || {
        run(
            Command::new(tools().join("python"))
                .args(["-m", "grpc_tools.protoc"])
                .arg(format!("-I{}", root.join("proto").display()))
                .arg(format!("--python_out={}", stubs.display()))
                .arg(format!("--grpc_python_out={}", stubs.display()))
                .args(protos)
                .arg(root.join("proto/google/longrunning/operations.proto")),
            "generating the Python stubs",
        );
        run(
            Command::new(tools().join("python"))
                .arg(root.join("tests/integration/clients/client.py"))
                .args([&endpoint, stubs.to_str().unwrap(), model.to_str().unwrap()]),
            "the Python client",
        )
    })
    .await
    .unwrap();
    assert!(said.contains("python client: ok"), "{said}");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_triton_client_infers_streams_and_manages_models() {
    let service = crate::harness::Service::start().await;
    let folder = tempfile::tempdir().unwrap();
    service.import("tiny", &support::tiny_model(folder.path(), 2, 64)).await;
    let endpoint = service.running.address().to_string();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/integration/clients/triton.py");
    let said = tokio::task::spawn_blocking(move || {
        run(
            Command::new(triton().join("python")).arg(script).args([&endpoint, "tiny"]),
            "the Triton client",
        )
    })
    .await
    .unwrap();
    assert!(said.contains("triton client: ok"), "{said}");
    service.running.stop().await.unwrap();
}

/// One call through `buf curl`, which learns the API from the server's reflection. Returns the stream of
/// answers.
fn curl(address: &str, method: &str, requests: &[Value], folder: &Path) -> Vec<Value> {
    let body = folder.join("body.json");
    fs::write(&body, requests.iter().map(|r| format!("{r}\n")).collect::<String>()).unwrap();
    let out = run(
        Command::new(tools().join("buf"))
            .args(["curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data"])
            .arg(format!("@{}", body.display()))
            .arg(format!("http://{address}/{method}")),
        method,
    );
    serde_json::Deserializer::from_str(&out).into_iter().map(Result::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn buf_curl_imports_runs_watches_and_streams() {
    let folder = tempfile::tempdir().unwrap();
    let model = support::tiny_model(folder.path(), 1, 32);
    let running = support::serve(folder.path()).await;
    let address = running.address().to_string();
    tokio::task::spawn_blocking(move || {
        let scratch = folder.path();
        let mut files = Vec::new();
        for entry in fs::read_dir(model).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            let mut requests =
                vec![json!({"header": {"fileName": name, "sizeBytes": bytes.len()}})];
            requests.extend(bytes.chunks(1 << 18).map(|c| json!({ "chunk": base64(c) })));
            let stored = curl(&address, "planish.v1.ModelService/UploadFile", &requests, scratch);
            let digest = stored[0]["file"]["digest"].clone();
            files.push(json!({"fileName": name, "digest": digest, "sizeBytes": bytes.len()}));
        }
        let operation = curl(
            &address,
            "planish.v1.ModelService/ImportModel",
            &[json!({"modelId": "curl", "uploaded": {"files": files}})],
            scratch,
        );
        let watch = |operation: &Value| {
            let looks = curl(
                &address,
                "planish.v1.JobService/WatchOperation",
                &[json!({"name": operation["name"]})],
                scratch,
            );
            let last = looks.last().unwrap()["operation"].clone();
            assert_eq!(last["done"], json!(true), "{last}");
            assert!(last["error"].is_null(), "{last}");
            last
        };
        let version = watch(&operation[0]);
        assert_eq!(version["response"]["name"], "models/curl/versions/1");

        let recipe = json!({
            "model": "models/curl",
            "recipe": {"steps": [{"roundToNearest": {"grid": {"bits": 4, "groupSize": 16}}}]},
        });
        let operation = curl(&address, "planish.v1.JobService/RunRecipe", &[recipe], scratch);
        let report = watch(&operation[0]);
        assert_eq!(report["response"]["versions"], json!(["models/curl/versions/2"]));

        let request = json!({
            "model": "models/curl", "text": "abc", "maxTokens": 5, "ignoreEos": true,
            "sampling": {"temperature": 0},
        });
        let parts = curl(&address, "planish.v1.GenerationService/Generate", &[request], scratch);
        let tokens: usize = parts.iter().map(|p| p["tokens"].as_array().map_or(0, Vec::len)).sum();
        assert_eq!(tokens, 5, "{parts:?}");
        assert_eq!(parts.last().unwrap()["finishReason"], "FINISH_REASON_LENGTH");
    })
    .await
    .unwrap();
    running.stop().await.unwrap();
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    bytes
        .chunks(3)
        .flat_map(|group| {
            let word =
                group.iter().enumerate().fold(0_u32, |w, (i, b)| w | u32::from(*b) << (16 - 8 * i));
            (0..4).map(move |i| match i <= group.len() {
                true => char::from(LETTERS[(word >> (18 - 6 * i) & 63) as usize]),
                false => '=',
            })
        })
        .collect()
}
