//! The command as users run it: the built program against a real `planish serve` process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support;

const PROGRAM: &str = env!("CARGO_BIN_EXE_planish");

/// The program without settings of whoever runs the tests.
fn planish() -> Command {
    let mut command = Command::new(PROGRAM);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PLANISH_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs and expects the exit code.
fn expect(code: i32, command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert_eq!(
        output.status.code(),
        Some(code),
        "{command:?}\nstdout: {}\nstderr: {}",
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

/// A `planish serve` process; killed when the test ends.
pub struct Service {
    process: Child,
    endpoint: String,
    address_file: PathBuf,
}

impl Service {
    pub fn start(data: &Path, more: &[&str]) -> Self {
        // A killed service leaves its address behind; each start has its own file.
        static STARTS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let start = STARTS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let address_file = data.with_extension(format!("address-{start}"));
        let mut process = planish()
            .args(["serve", "--listen", "127.0.0.1:0", "--data"])
            .arg(data)
            .arg("--address-file")
            .arg(&address_file)
            .args(["--set", "telemetry.filter=warn"])
            .args(more)
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let endpoint = loop {
            if let Ok(address) = std::fs::read_to_string(&address_file) {
                break address;
            }
            if let Some(status) = process.try_wait().unwrap() {
                panic!("the service ended at its start: {status}");
            }
            assert!(Instant::now() < deadline, "the service does not start");
            std::thread::sleep(Duration::from_millis(20));
        };
        Self { process, endpoint, address_file }
    }

    fn client(&self, line: &str) -> Command {
        let mut command = planish();
        command.args(["--endpoint", &self.endpoint]).args(line.split_whitespace());
        command
    }

    /// Runs a verb that must succeed; gives its standard output.
    pub fn run(&self, line: &str) -> String {
        text(&expect(0, &mut self.client(line)).stdout)
    }

    /// Runs a verb that must succeed; gives its JSON.
    pub fn json(&self, line: &str) -> Value {
        let output = self.run(&format!("--output json {line}"));
        serde_json::from_str(&output).unwrap_or_else(|e| panic!("{line}: {e}\n{output}"))
    }

    /// Runs a verb that must fail with `code`; gives its standard error.
    pub fn fail(&self, code: i32, line: &str) -> String {
        text(&expect(code, &mut self.client(line)).stderr)
    }

    /// Ends the process as a crash would (SIGKILL).
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Asks the process to end, as a service manager does.
    #[cfg(unix)]
    fn terminate(mut self) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        assert_eq!(self.process.wait().unwrap().code(), Some(0));
        assert!(!self.address_file.exists(), "the address outlives the service");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Numbers in [0, 1) from a linear congruential generator: the same on every machine.
fn noise(seed: &mut u64) -> f32 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 40) as f32 / (1u64 << 24) as f32
}

const RECIPE: &str = r#"
seed = 3
[[steps]]
[steps.magnitude.sparsity]
share = 0.5
[[steps]]
[steps.gptq.grid]
bits = 4
group_size = 32
[steps.gptq.calibration]
dataset = "datasets/words"
sequences = 4
sequence_length = 32
[evaluation]
dataset = "datasets/words"
context = 64
max_tokens = 500
compare_with_base = true
"#;

/// A text that is long enough to calibrate and to measure on.
fn words() -> String {
    let words = ["the", "sea", "and", "a", "small", "green", "boat", "went", "out", "again."];
    let mut seed = 7;
    (0..600).map(|_| words[(noise(&mut seed) * 10.0) as usize]).collect::<Vec<_>>().join(" ")
}

/// A scratch folder with a model, a text and a recipe.
fn workshop(layers: usize, hidden: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    support::tiny_model(folder.path(), layers, hidden);
    std::fs::write(folder.path().join("words.txt"), words()).unwrap();
    std::fs::write(folder.path().join("recipe.toml"), RECIPE).unwrap();
    folder
}

#[test]
fn a_model_travels_from_a_folder_to_an_export() {
    let folder = workshop(2, 64);
    let at = folder.path().display().to_string();
    let service = Service::start(&folder.path().join("data"), &[]);

    // Nothing there yet.
    assert_eq!(service.json("models list"), json!({ "models": [] }));
    assert!(service.run("models list").contains("no models"));
    assert!(service.fail(66, "models show tiny").contains("reason RESOURCE_NOT_FOUND"));

    // In.
    let imported = service.json(&format!("models import {at}/tiny"));
    assert_eq!(imported["response"]["name"], "models/tiny/versions/1");
    assert_eq!(
        imported["response"]["@type"], "type.googleapis.com/planish.v1.ModelVersion",
        "{imported}"
    );
    let models = service.json("models list");
    assert_eq!(models["models"][0]["latest_version"], "models/tiny/versions/1");
    service.run(&format!("datasets import {at}/words.txt --id words"));
    assert_eq!(service.json("datasets show words")["name"], "datasets/words");

    // A recipe: the plan, the run, and the same answer to the same request id.
    let plan = service.json(&format!("run {at}/recipe.toml --model tiny --validate-only"));
    assert_eq!(plan["done"], true);
    assert_eq!(plan["response"]["steps"].as_array().unwrap().len(), 2);
    let line = format!("run {at}/recipe.toml --model tiny@1 --request-id once");
    let run = service.json(&line);
    let report = &run["response"];
    assert_eq!(report["versions"], json!(["models/tiny/versions/2", "models/tiny/versions/3"]));
    let metrics = |side: &str| -> Vec<String> {
        let list = report[side]["measurements"].as_array().unwrap();
        list.iter().map(|m| m["metric"].as_str().unwrap().to_owned()).collect()
    };
    assert!(metrics("before").contains(&"perplexity".to_owned()));
    assert!(metrics("after").contains(&"kl_divergence".to_owned()), "{:?}", metrics("after"));
    assert_eq!(service.json(&line)["name"], run["name"]);
    let table = service.run(&line);
    assert!(table.contains("perplexity") && table.contains("gptq"), "{table}");

    // The job remains to be looked at.
    let job = run["name"].as_str().unwrap().trim_start_matches("operations/");
    assert!(service.run(&format!("jobs show {job}")).contains("succeeded"));
    let watched = service.run(&format!("--output json jobs watch {job}"));
    let last: Value = serde_json::from_str(watched.lines().last().unwrap()).unwrap();
    assert_eq!(last["operation"]["done"], true);
    assert!(service.run("jobs list").contains(job));
    let evaluated = service.json("evaluate --model tiny@3 --dataset words --context 64");
    assert!(evaluated["response"]["measurements"].is_array());

    // Online.
    service.run("models load tiny@3");
    assert!(service.run("models show tiny@3").contains("until it is unloaded"));
    assert!(service.run("models list").contains(" @3"));
    assert!(service.run("models loaded").contains("tiny@3"));
    let loaded = service.json("models loaded");
    assert_eq!(loaded["loaded_models"][0]["versions"], json!(["models/tiny/versions/3"]));
    assert_eq!(loaded["loaded_models"][0]["pinned"], true);
    let greedy = "generate --model tiny@3 --tokens 10,20,30 --max-tokens 5 --temperature 0";
    let parts = service.run(&format!("--output json {greedy}"));
    let parts: Vec<Value> = parts.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(parts.last().unwrap()["usage"]["generated_tokens"], 5, "{parts:?}");
    assert_eq!(service.run(greedy), service.run(greedy));
    assert!(service.run("score --model tiny hello").contains("perplexity"));
    assert_eq!(service.run("tokenize --model tiny --tokens 104,105"), "hi\n");
    assert_eq!(service.json("tokenize --model tiny hi")["tokens"][1]["id"], 105);
    service.run("models unload tiny@3");
    assert!(service.run("models show tiny@3").contains("in memory     no"));

    // Out.
    for (format, file) in
        [("dense", "model.safetensors"), ("gguf", "small.gguf"), ("native", "planish.json")]
    {
        let to = match format {
            "gguf" => format!("{at}/{format}/small.gguf"),
            _ => format!("{at}/{format}"),
        };
        service.run(&format!("models export tiny@3 --form {format} --to {to}"));
        let card = if format == "gguf" { "small.README.md" } else { "README.md" };
        let card = std::fs::read_to_string(folder.path().join(format).join(card)).unwrap();
        assert!(card.contains("models/tiny/versions/3"), "{card}");
        let written = folder.path().join(format).join(file);
        assert!(written.metadata().unwrap().len() > 0, "{format}");
        service.fail(64, &format!("models export tiny@3 --format {format} --to {to}"));
    }
    let again = service.json(&format!("models import {at}/dense --id again"));
    assert_eq!(again["response"]["name"], "models/again/versions/1");

    // Gone. A version that another was made from stays.
    service.fail(1, "models delete tiny@2");
    service.run("models delete tiny@3");
    service.run("models delete tiny");
    service.fail(66, "models show tiny");
    service.run(&format!("jobs delete {job}"));
    service.fail(66, &format!("jobs show {job}"));
    service.run("datasets delete words");

    #[cfg(unix)]
    service.terminate();
}

#[test]
fn failures_have_their_exit_codes() {
    let folder = workshop(1, 32);
    let at = folder.path().display().to_string();
    let token = "server.token=0123456789abcdef0123456789abcdef";
    let service = Service::start(&folder.path().join("data"), &["--set", token]);

    service.fail(77, "models list");
    service.fail(77, "--token wrong-wrong-wrong-wrong models list");
    std::fs::write(folder.path().join("token"), "0123456789abcdef0123456789abcdef\n").unwrap();
    let with = |line: &str| format!("--token-file {at}/token {line}");
    service.run(&with("models list"));
    service.run(&with(&format!("models import {at}/tiny")));

    // The command line, files, arguments, resources.
    service.fail(64, &with("models frobnicate"));
    service.fail(66, &with("models import no/such/folder"));
    service.fail(66, &with("run no-such-recipe.toml --model tiny"));
    service.fail(66, &with("generate --model absent hello"));
    service.fail(65, &with("generate --model tiny hello --temperature -1"));
    std::fs::write(folder.path().join("unknown.toml"), "[[steps]]\n[steps.wunda]\n").unwrap();
    service.fail(65, &with(&format!("run {at}/unknown.toml --model tiny")));
    let bad = "[[steps]]\n[steps.magnitude.sparsity]\nshare = 1.5\n";
    std::fs::write(folder.path().join("bad.toml"), bad).unwrap();
    let error = service.fail(65, &with(&format!("run {at}/bad.toml --model tiny")));
    assert!(error.contains("steps[0]") && error.contains("share"), "{error}");
    let error = service.fail(65, &with(&format!("--output json run {at}/bad.toml --model tiny")));
    let error: Value = serde_json::from_str(&error).unwrap();
    assert_eq!(error["error"]["exit_code"], 65);
    assert!(error["error"]["violations"][0]["field"].as_str().unwrap().contains("share"));

    let endpoint = service.endpoint.clone();
    service.kill();
    let error = expect(69, planish().args(["--endpoint", &endpoint, "models", "list"]));
    assert!(text(&error.stderr).contains("planish serve"));
}

#[test]
fn the_configuration_is_printed_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("planish.toml");
    let print = |more: &[&str]| {
        let mut command = planish();
        command.args(["config", "print", "--data", "/data", "--config"]).arg(&file).args(more);
        command
    };
    std::fs::write(&file, "[limits]\ncontext = 512\n").unwrap();
    let out =
        expect(0, print(&["--listen", "127.0.0.1:7"]).env("PLANISH_LIMITS__QUEUED_JOBS", "9"));
    let out = text(&out.stdout);
    for line in ["context = 512", "queued_jobs = 9", "listen = \"127.0.0.1:7\""] {
        assert!(out.contains(line), "{line}\n{out}");
    }
    assert!(out.contains("from: flag --listen"), "{out}");
    let out = expect(0, print(&[]).args(["--output", "json"]));
    let out: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(out["limits"]["context"], 512);

    std::fs::write(&file, "[limits]\ncolour = 1\n").unwrap();
    let error = text(&expect(64, &mut print(&[])).stderr);
    assert!(error.contains("colour") && error.contains("planish.toml"), "{error}");
    std::fs::write(&file, "[limits]\ncontext = 1\n").unwrap();
    expect(64, &mut print(&[]));
    expect(64, planish().args(["serve", "--listen", "nowhere"]));
}

#[test]
fn a_killed_service_finishes_its_job_with_the_same_bytes() {
    let folder = workshop(4, 128);
    let at = folder.path().display().to_string();
    let mut recipe = String::from("seed = 5\n");
    for step in ["magnitude.sparsity]\nshare = 0.3", "sparsegpt.sparsity]\nshare = 0.5"] {
        recipe.push_str(&format!("[[steps]]\n[steps.{step}\n"));
    }
    recipe
        .push_str("[steps.sparsegpt.calibration]\ndataset = \"datasets/words\"\nsequences = 256\n");
    recipe.push_str("sequence_length = 128\n[[steps]]\n[steps.gptq.grid]\ngroup_size = 32\n");
    recipe.push_str("[steps.gptq.calibration]\ndataset = \"datasets/words\"\nsequences = 256\n");
    recipe.push_str("sequence_length = 128\n");
    std::fs::write(folder.path().join("long.toml"), recipe).unwrap();

    let prepare = |service: &Service| {
        service.run(&format!("models import {at}/tiny"));
        service.run(&format!("datasets import {at}/words.txt"));
    };
    let digests = |service: &Service| -> Vec<Value> {
        let versions = service.json("models versions tiny");
        versions["versions"].as_array().unwrap().iter().map(|v| v["digest"].clone()).collect()
    };

    let calm = Service::start(&folder.path().join("calm"), &[]);
    prepare(&calm);
    calm.run(&format!("run {at}/long.toml --model tiny"));
    let expected = digests(&calm);
    assert_eq!(expected.len(), 4);
    calm.kill();

    let data = folder.path().join("data");
    let service = Service::start(&data, &[]);
    prepare(&service);
    let job = service.json(&format!("run {at}/long.toml --model tiny --detach"));
    let job = job["name"].as_str().unwrap().to_owned();
    // The first step is done, a later one is at work.
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let now = service.json(&format!("jobs show {job}"));
        assert_ne!(now["done"], true, "the job is too short to be interrupted: {now}");
        if now["metadata"]["versions"].as_array().is_some_and(|v| !v.is_empty()) {
            break;
        }
        assert!(Instant::now() < deadline, "the job does not get on: {now}");
    }
    service.kill();

    let service = Service::start(&data, &[]);
    service.run(&format!("jobs watch {job} --timeout 120s"));
    let done = service.json(&format!("jobs show {job}"));
    assert_eq!(done["metadata"]["state"], "OPERATION_STATE_SUCCEEDED");
    assert_eq!(done["metadata"]["attempt"], 2);
    assert_eq!(digests(&service), expected);
}

const COMPARISON: &str = r#"
display_name = "what fits"
model = "models/tiny"
seeds = [0, 1]
[evaluation]
dataset = "datasets/words"
context = 64
max_tokens = 500
compare_with_base = true
[[arms]]
name = "pruned"
[[arms.steps]]
[arms.steps.sparsegpt.sparsity]
share = 0.5
[arms.steps.sparsegpt.calibration]
dataset = "datasets/words"
sequences = 256
sequence_length = 128
[[arms]]
name = "both"
[[arms.steps]]
[arms.steps.sparsegpt.sparsity]
share = 0.5
[arms.steps.sparsegpt.calibration]
dataset = "datasets/words"
sequences = 256
sequence_length = 128
[[arms.steps]]
round_to_nearest = { grid = { group_size = 32 } }
[[arms]]
name = "rounded"
[[arms.steps]]
round_to_nearest = { grid = { group_size = 32 } }
[[contrasts]]
metric = "perplexity"
arm = "both"
against = "pruned"
"#;

/// A report without clocks and memory, and without what follows from them.
fn timeless(mut report: Value) -> Value {
    let report_fields = report.as_object_mut().unwrap();
    for name in ["seconds", "peak_memory_bytes", "shared", "columns"] {
        report_fields.remove(name);
    }
    for arm in report["arms"].as_array_mut().unwrap() {
        arm.as_object_mut().unwrap().remove("cells");
        for run in arm["runs"].as_array_mut().into_iter().flatten() {
            run.as_object_mut().unwrap().remove("seconds");
            for step in run["steps"].as_array_mut().into_iter().flatten() {
                step.as_object_mut().unwrap().remove("seconds");
                step.as_object_mut().unwrap().remove("peak_memory_bytes");
            }
            let noisy = ["make_seconds", "peak_memory_bytes"];
            let measured = run["measurements"].as_array_mut().unwrap();
            measured.retain(|m| !noisy.contains(&m["metric"].as_str().unwrap()));
        }
    }
    report
}

#[test]
fn a_killed_comparison_goes_on_and_gives_the_same_table() {
    let folder = workshop(4, 128);
    let at = folder.path().display().to_string();
    std::fs::write(folder.path().join("compare.toml"), COMPARISON).unwrap();
    let prepare = |service: &Service| {
        service.run(&format!("models import {at}/tiny"));
        service.run(&format!("datasets import {at}/words.txt"));
    };
    let calm = Service::start(&folder.path().join("calm"), &[]);
    prepare(&calm);
    let plan = calm.json(&format!("compare {at}/compare.toml --validate-only"));
    assert_eq!(plan["response"]["runs"], 5);
    // One SparseGPT for both arms with each seed, what follows it, and one rounding for all seeds.
    assert_eq!(plan["response"]["steps"], 5);
    let table = calm.run(&format!("compare {at}/compare.toml --to {at}/out"));
    for part in ["perplexity", "pruned", "± standard deviation", "both / pruned", "shared"] {
        assert!(table.contains(part), "{part}\n{table}");
    }
    let written = |name: &str| std::fs::read(folder.path().join("out").join(name)).unwrap();
    let expected: Value = serde_json::from_slice(&written("report.json")).unwrap();
    assert_eq!(expected["complete"], true);
    assert!(text(&written("table.md")).starts_with("| arm |"));
    assert!(text(&written("table.csv")).starts_with("arm,seed,digest,metric"));
    assert!(
        text(&written("bytes.svg")).starts_with("<svg") && written("bytes.png")[1..4] == *b"PNG"
    );
    assert!(!folder.path().join("out/latency.svg").exists(), "speed was not measured");
    let csv = calm.run(&format!("compare {at}/compare.toml --format csv --request-id x"));
    assert!(csv.starts_with("arm,seed,"), "{csv}");
    calm.kill();

    let data = folder.path().join("data");
    let service = Service::start(&data, &[]);
    prepare(&service);
    let job = service.json(&format!("compare {at}/compare.toml --detach"));
    let job = job["name"].as_str().unwrap().to_owned();
    let deadline = Instant::now() + Duration::from_secs(60);
    // Killed while an arm is at work and another is finished.
    loop {
        let now = service.json(&format!("jobs show {job}"));
        assert_ne!(now["done"], true, "the job is too short to be interrupted: {now}");
        let message = now["metadata"]["message"].as_str().unwrap_or_default();
        if message.contains("seed 1") {
            let so_far = &now["comparison"];
            assert_eq!(so_far["arms"][1]["runs"].as_array().map(Vec::len), Some(1), "{so_far}");
            break;
        }
        assert!(Instant::now() < deadline, "the job does not get on: {now}");
    }
    service.kill();
    let service = Service::start(&data, &[]);
    service.run(&format!("jobs watch {job} --timeout 120s"));
    let done = service.json(&format!("jobs show {job}"));
    assert_eq!(done["metadata"]["attempt"], 2, "{done}");
    let mut found = done["response"].clone();
    found.as_object_mut().unwrap().remove("@type");
    assert!(found["seconds"].as_f64() > Some(0.0));
    assert_eq!(timeless(found), timeless(expected));
}

/// Largest resident memory of a process so far, in bytes.
#[cfg(target_os = "linux")]
fn peak(process: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
}

#[cfg(target_os = "linux")]
#[test]
fn twelve_arms_take_the_memory_of_two_models() {
    let folder = workshop(6, 512);
    let at = folder.path().display().to_string();
    let mut file = String::from("model = \"models/tiny\"\n[evaluation]\ncontext = 64\n");
    file.push_str("dataset = \"datasets/words\"\nmax_tokens = 200\ncompare_with_base = true\n");
    for i in 1..=12 {
        let share = f64::from(i) / 16.0;
        file.push_str(&format!("[[arms]]\nname = \"m{i}\"\n[[arms.steps]]\n"));
        file.push_str(&format!(
            "[arms.steps.magnitude.sparsity]\nshare = {share}\nvalues = \"VALUE_TYPE_F32\"\n"
        ));
    }
    std::fs::write(folder.path().join("compare.toml"), file).unwrap();
    let service = Service::start(&folder.path().join("data"), &[]);
    let imported = service.json(&format!("models import {at}/tiny"));
    let bytes: u64 = imported["response"]["weight_bytes"].as_str().unwrap().parse().unwrap();
    assert!(bytes > 50_000_000, "large enough to be seen: {bytes}");
    service.run(&format!("datasets import {at}/words.txt"));
    let before = peak(&service.process);
    let done = service.json(&format!("compare {at}/compare.toml"));
    assert_eq!(done["response"]["complete"], true);
    let more = peak(&service.process).saturating_sub(before);
    assert!(more < 2 * bytes, "{more} more bytes for a model of {bytes}");
}

/// A claim about the tiny model that holds: half of the weights take less room.
fn write_claim(folder: &Path, bound: f64) {
    let digest = |path: &Path| {
        let sum = expect(0, Command::new("sha256sum").arg(path));
        format!("sha256:{}", text(&sum.stdout).split_whitespace().next().unwrap())
    };
    let at = folder.display();
    let claim = format!(
        r#"
name = "half"
system = "magnitude pruning"
papers = ["none"]
statement = "half of the weights take less room"
model_source = "{at}/tiny"
[[data]]
dataset = "datasets/words"
file = "words.txt"
digest = "{}"
[comparison]
seeds = [0, 1]
[comparison.evaluation]
dataset = "datasets/words"
context = 64
max_tokens = 500
[[comparison.arms]]
name = "half"
[[comparison.arms.steps]]
[comparison.arms.steps.wanda.calibration]
dataset = "datasets/words"
sequences = 4
sequence_length = 32
[[expectations]]
effect = "smaller than the base"
metric = "weight_bytes"
arm = "half"
against = "base"
relation = "RELATION_RATIO_AT_MOST"
bound = {bound:?}
headline = true
[short]
max_tokens = 128
"#,
        digest(&folder.join("words.txt"))
    );
    std::fs::create_dir_all(folder.join("claims/half")).unwrap();
    std::fs::write(folder.join("claims/half/claim.toml"), claim).unwrap();
}

#[test]
fn claims_are_run_checked_and_shown_without_a_server_of_ones_own() {
    let folder = workshop(2, 64);
    let at = folder.path();
    write_claim(at, 0.9);
    std::fs::create_dir(at.join("docs")).unwrap();
    let claims = |code: i32, line: &str| {
        let mut command = planish();
        command.args(["claims"]).args(line.split_whitespace());
        command.arg("--claims").arg(at.join("claims")).arg("--folder").arg(at.join("service"));
        let out = expect(code, &mut command);
        text(&out.stdout) + &text(&out.stderr)
    };
    let data = at.display();
    let said = claims(1, "check");
    assert!(said.contains("has no result"), "{said}");
    let said = claims(0, &format!("run --all --short --data {data}"));
    assert!(said.contains("ran (short form)"), "{said}");
    assert!(!at.join("claims/half/result.json").exists(), "a short form writes no result");
    // The data set is in the service by now, so its file is not looked for.
    let said = claims(0, "run half");
    assert!(said.contains("half: reproduced (full form"), "{said}");
    for name in ["claims/half/result.json", "claims/half/bytes.svg"] {
        assert!(at.join(name).metadata().unwrap().len() > 1000, "{name}");
    }
    // The same model, code and seeds: the same bytes.
    let digests = || -> Vec<Value> {
        let result = std::fs::read(at.join("claims/half/result.json")).unwrap();
        let result: Value = serde_json::from_slice(&result).unwrap();
        let runs = result["report"]["arms"][1]["runs"].as_array().unwrap().iter();
        runs.map(|run| run["digest"].clone()).collect()
    };
    let before = digests();
    assert_eq!(before.len(), 2);
    claims(0, "run --all");
    assert_eq!(digests(), before);

    let said = claims(1, "check");
    assert!(said.contains("claims table"), "the page is not written: {said}");
    let said = claims(0, "table");
    assert!(said.contains("reproduced"), "{said}");
    let page = std::fs::read_to_string(at.join("docs/claims.md")).unwrap();
    assert!(page.contains("half of the weights take less room"), "{page}");
    claims(0, "check");

    // By hand.
    let result = at.join("claims/half/result.json");
    let good = std::fs::read_to_string(&result).unwrap();
    let mut edited: Value = serde_json::from_str(&good).unwrap();
    edited["minutes"] = json!(0.5);
    std::fs::write(&result, edited.to_string()).unwrap();
    let said = claims(1, "check half");
    assert!(said.contains("not as the program wrote it"), "{said}");
    // Another layout of the same JSON is no edit.
    let same: Value = serde_json::from_str(&good).unwrap();
    std::fs::write(&result, same.to_string()).unwrap();
    claims(0, "check half");
    // Other code.
    let mut stale = same.clone();
    stale["provenance"]["method_code"]["wanda"] = json!("sha256:of other code");
    let sealed: planish::proto::v1::ClaimResult = serde_json::from_value(stale).unwrap();
    let seal = planish::recipe::claim::seal(&sealed).unwrap();
    let sealed = planish::proto::v1::ClaimResult { seal, ..sealed };
    std::fs::write(&result, serde_json::to_string(&sealed).unwrap()).unwrap();
    let said = claims(1, "check half");
    assert!(said.contains("the code of 'wanda' changed"), "{said}");
    std::fs::write(&result, &good).unwrap();

    // Another expectation is judged on the same runs, after a look.
    write_claim(at, 0.01);
    let said = claims(1, "check half");
    assert!(said.contains("--rejudge"), "{said}");
    let said = claims(0, "check half --rejudge");
    assert!(said.contains("not"), "{said}");
    claims(0, "check half");
}

#[test]
fn the_recipes_of_the_repository_are_valid() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut count = 0;
    for folder in [root.clone(), root.join("reference")] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "toml") {
                let recipe = planish::recipe::file::read::<planish::proto::v1::Recipe>(&path);
                assert!(recipe.is_ok(), "{}: {}", path.display(), recipe.unwrap_err());
                count += 1;
            }
        }
    }
    assert!(count >= 10);
}

#[test]
fn the_claims_of_the_repository_are_valid() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["claims", "open-claims"].map(|name| std::fs::read_dir(root.join(name)).unwrap());
    let mut count = 0;
    for folder in folders.into_iter().flatten().map(|entry| entry.unwrap().path()) {
        if !folder.is_dir() {
            continue;
        }
        let path = folder.join("claim.toml");
        let claim: planish::proto::v1::Claim =
            planish::recipe::file::read(&path).unwrap_or_else(|e| panic!("{e}"));
        planish::recipe::claim::check_text(&claim)
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        count += 1;
    }
    assert!(count >= 2);
}
