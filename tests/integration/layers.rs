//! The map of `ARCHITECTURE.md` holds: which room may use which, and where three things may appear.

use std::fs;
use std::path::{Path, PathBuf};

/// Rooms from the wire down to the metal; a room may use the rooms below it.
const ROOMS: &[&str] = &[
    "main",
    "cli",
    "bench",
    "server",
    "jobs",
    "recipe",
    "eval",
    "methods",
    "calibrate",
    "train",
    "serve",
    "store",
    "models",
    "formats",
    "data",
    "nn",
    "machine",
    "kernels",
    "telemetry",
    "config",
    "code",
    "seed",
    "progress",
    "proto",
    "error",
    "lib",
];

fn sources() -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push((path.clone(), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut found = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    assert!(found.len() > 30, "the source tree was not found");
    found
}

/// First folder below `src`, or the file's stem.
fn room(path: &Path) -> String {
    let inside = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

/// Lines of code, without comments and without the tests at the end of the file.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let end = text.find("#[cfg(test)]\nmod tests").unwrap_or(text.len());
    text[..end]
        .lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line.trim()))
        .filter(|(_, line)| !line.starts_with("//"))
}

fn offences(bad: impl Fn(&Path, &str, &str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for (path, text) in sources() {
        let room = room(&path);
        for (number, line) in code(&text) {
            if bad(&path, &room, line) {
                found.push(format!("{}:{number}: {line}", path.display()));
            }
        }
    }
    found
}

#[test]
fn no_tonic_below_the_server() {
    let found = offences(|_, room, line| {
        !matches!(room, "server" | "cli" | "main")
            && (line.contains("tonic::") || line.contains("tonic_") || line.contains("_client::"))
    });
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn no_sql_outside_the_store() {
    let found = offences(|_, room, line| {
        room != "store"
            && (line.contains("sqlx")
                || ["SELECT ", "INSERT INTO", "UPDATE ", "DELETE FROM"]
                    .iter()
                    .any(|word| line.contains(&format!("\"{word}"))))
    });
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn no_unsafe_outside_the_kernels_and_the_memory_map() {
    let found = offences(|path, room, line| {
        let word = line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe");
        word && room != "kernels" && !path.ends_with("formats/mmap.rs")
    });
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn every_unsafe_block_gives_its_reason() {
    let mut found = Vec::new();
    for (path, text) in sources() {
        let lines: Vec<_> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let opens = line.contains("unsafe {") && !line.trim_start().starts_with("//");
            let explained = lines[i.saturating_sub(6)..=i].iter().any(|l| l.contains("SAFETY"));
            if opens && !explained {
                found.push(format!("{}:{}: {}", path.display(), i + 1, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn arrows_point_down() {
    let rank = |room: &str| ROOMS.iter().position(|r| *r == room);
    let mut found = Vec::new();
    for (path, text) in sources() {
        let here = room(&path);
        let from = rank(&here).unwrap_or_else(|| panic!("room '{here}' is not on the map"));
        for (number, line) in code(&text) {
            for (at, _) in line.match_indices("crate::") {
                let used: String = line[at + "crate::".len()..]
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                if rank(&used).is_some_and(|to| to < from) {
                    found.push(format!("{}:{number}: {line}", path.display()));
                }
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}
