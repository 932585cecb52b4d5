//! Digests of the code of each method. The build script includes this file, so it uses nothing of the
//! crate.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use sha2::{Digest, Sha256};

/// Digest by method (`verb/slug`) below the folder `src`: over the code of the method's file and of
/// every file of its group, of `methods` and of `calibrate` that it mentions, directly or not, and for methods
/// that tune of all of `train`. Comments, blank lines and tests do not count: they change no number.
pub fn of_methods(src: &Path) -> io::Result<BTreeMap<String, String>> {
    let methods = read(&src.join("methods"))?;
    let calibrate = read(&src.join("calibrate"))?;
    let mut train = BTreeMap::new();
    read_below(&src.join("train"), "", &mut train)?;
    let mut digests = BTreeMap::new();
    for entry in fs::read_dir(src.join("methods"))? {
        let folder = entry?.path();
        if !folder.is_dir() {
            continue;
        }
        let verb = name(&folder);
        let group = read(&folder)?;
        // The other files of a group are parts of methods.
        let tunes = |code: &str| code.contains("impl Adapt for ");
        let methods_of = |code: &String| code.contains("impl Method for ") || tunes(code);
        for (slug, code) in group.iter().filter(|(_, code)| methods_of(code)) {
            let tunes = tunes(code);
            let group: &BTreeMap<String, String> = match tunes {
                true => &group.iter().filter(|(f, _)| !apart(f)).map(copy).collect(),
                false => &group,
            };
            let mut used = BTreeSet::new();
            follow(slug, group, &mut used);
            follow("mod", group, &mut used);
            // Methods that use each other have one code and are two methods all the same.
            let mut hash = Sha256::new();
            hash.update(format!("{slug}\n"));
            let mut words = BTreeSet::new();
            for file in &used {
                let code = &group[file];
                hash.update(format!("{file}\n{code}\n"));
                words.extend(identifiers(code));
            }
            let shared = methods.iter().filter(|(file, _)| words.contains(file.as_str()));
            for (file, code) in
                shared.filter(|(file, _)| !matches!(file.as_str(), "mod" | "docs" | "registry"))
            {
                hash.update(format!("methods/{file}\n{code}\n"));
            }
            if words.contains("calibrate") {
                for (file, code) in &calibrate {
                    hash.update(format!("calibrate/{file}\n{code}\n"));
                }
            }
            if tunes || words.contains("train") {
                for (file, code) in &train {
                    hash.update(format!("train/{file}\n{code}\n"));
                }
            }
            let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
            digests.insert(format!("{verb}/{slug}"), format!("sha256:{hex}"));
        }
    }
    Ok(digests)
}

/// What names all methods and is used by none: their list, and their tests.
fn apart(file: &str) -> bool {
    matches!(file, "registry" | "contract" | "testing" | "tests")
}

fn copy((file, code): (&String, &String)) -> (String, String) {
    (file.clone(), code.clone())
}

/// Code of a folder and of those in it, by path without its ending.
fn read_below(folder: &Path, path: &str, all: &mut BTreeMap<String, String>) -> io::Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    let files = read(folder)?.into_iter().filter(|(file, _)| file != "tests");
    all.extend(files.map(|(file, code)| (format!("{path}{file}"), code)));
    for entry in fs::read_dir(folder)? {
        let inner = entry?.path();
        if inner.is_dir() {
            read_below(&inner, &format!("{path}{}/", name(&inner)), all)?;
        }
    }
    Ok(())
}

/// Code by file stem.
fn read(folder: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "rs") {
            files.insert(name(&path), code(&fs::read_to_string(&path)?));
        }
    }
    Ok(files)
}

fn name(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Lines of code without indentation: no comments, no tests, no declarations of modules.
fn code(text: &str) -> String {
    // Tests stand at the end; test modules with files of their own may be declared anywhere.
    const TESTS: &str = "#[cfg(test)]\nmod test";
    let inline = |at: &usize| {
        text[at + TESTS.len()..].lines().next().is_none_or(|rest| !rest.ends_with(';'))
    };
    let end = text.match_indices(TESTS).map(|(at, _)| at).find(inline).unwrap_or(text.len());
    let lines = text[..end].lines().map(str::trim);
    let kept = lines.filter(|line| {
        let module = line.trim_start_matches("pub ").starts_with("mod ") && line.ends_with(';');
        !(line.is_empty() || line.starts_with("//") || *line == "#[cfg(test)]" || module)
    });
    kept.collect::<Vec<_>>().join("\n")
}

/// Adds `file` and every file of the group that it mentions.
fn follow(file: &str, group: &BTreeMap<String, String>, used: &mut BTreeSet<String>) {
    let Some(code) = group.get(file) else { return };
    if !used.insert(file.to_owned()) {
        return;
    }
    for word in identifiers(code) {
        if word != "mod" && group.contains_key(word) {
            follow(word, group, used);
        }
    }
}

/// The words of code, without those in strings, which name things and use none.
fn identifiers(code: &str) -> BTreeSet<&str> {
    let mut words = BTreeSet::new();
    let (mut inside, mut escaped, mut start) = (false, false, 0);
    for (at, c) in code.char_indices() {
        if c == '"' && !escaped {
            if !inside {
                words.extend(split(&code[start..at]));
            }
            (inside, start) = (!inside, at + 1);
        }
        escaped = inside && c == '\\' && !escaped;
    }
    words.extend(split(&code[start..]));
    words
}

fn split(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}
