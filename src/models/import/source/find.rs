//! Finds the model among fetched files, and puts a split one together.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use super::Watch;
use crate::error::{Error, Reason, Result};

/// The `.gguf` file or the folder with a `config.json` to open among `files`; parts of a split file
/// are joined inside `folder`.
pub fn model(files: &[PathBuf], folder: &Path, watch: Watch<'_>) -> Result<PathBuf> {
    let name = |path: &Path| path.file_name().map_or(String::new(), |n| n.to_string_lossy().into());
    let ggufs: Vec<_> = files.iter().filter(|f| has_extension(f, "gguf")).collect();
    let split: Vec<_> = files.iter().filter(|f| part(&name(f)).is_some()).collect();
    match (ggufs.as_slice(), split.as_slice()) {
        ([one], []) => return Ok((*one).clone()),
        ([], []) => {}
        ([], _) => return join(&split, folder, watch),
        (many, rest) => {
            let names: Vec<_> = many.iter().chain(rest).map(|f| name(f)).collect();
            return Err(unavailable(format!(
                "it has several models ({}); name a source with one",
                names.join(", ")
            )));
        }
    }
    let mut folders: Vec<_> = files
        .iter()
        .filter(|f| f.file_name().is_some_and(|n| n == "config.json"))
        .filter_map(|f| f.parent())
        .filter(|dir| {
            files.iter().any(|f| f.parent() == Some(dir) && has_extension(f, "safetensors"))
        })
        .collect();
    folders.sort_by_key(|dir| dir.components().count());
    match folders.as_slice() {
        [] => Err(unavailable(
            "it holds neither a .gguf file nor a config.json beside .safetensors files; name a source \
             that carries a model",
        )),
        [one] => Ok(one.to_path_buf()),
        [first, second, ..] if first.components().count() < second.components().count() => {
            Ok(first.to_path_buf())
        }
        many => Err(unavailable(format!(
            "it has {} folders with models; name a source with one",
            many.len()
        ))),
    }
}

/// The whole's name and the number, if `name` is `whole.gguf.partNN`.
pub fn part(name: &str) -> Option<(&str, u32)> {
    let (whole, number) = name.rsplit_once(".part")?;
    let digits =
        !number.is_empty() && number.len() <= 4 && number.bytes().all(|b| b.is_ascii_digit());
    let whole = Some(whole).filter(|w| w.len() > 5 && has_extension(Path::new(w), "gguf"))?;
    digits.then(|| number.parse().ok().map(|n| (whole, n))).flatten()
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case(wanted))
}

/// Joins parts numbered from 0 or 1 without gaps. The parts are used up, so that a model never takes
/// its room twice.
fn join(parts: &[&PathBuf], folder: &Path, watch: Watch<'_>) -> Result<PathBuf> {
    let mut wholes: BTreeMap<&str, BTreeMap<u32, &Path>> = BTreeMap::new();
    for path in parts {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let Some((whole, number)) = part(name) else { continue };
        if wholes.entry(whole).or_default().insert(number, path).is_some() {
            return Err(unavailable(format!("part {number} of {whole} is there twice")));
        }
    }
    let mut wholes = wholes.into_iter();
    let (Some((name, numbered)), None) = (wholes.next(), wholes.next()) else {
        return Err(unavailable("its parts belong to several models; name the parts of one"));
    };
    let first = numbered.keys().next().copied().unwrap_or_default();
    let numbers = numbered.keys().copied();
    if first > 1 || !numbers.eq(first..first + numbered.len() as u32) {
        let have: Vec<_> = numbered.keys().map(u32::to_string).collect();
        return Err(unavailable(format!(
            "parts of {name} are missing (found {}); name the packages of all parts",
            have.join(", ")
        )));
    }
    let target = folder.join(name);
    (watch.progress)(&format!("joining {} parts of {name}", numbered.len()));
    let mut whole: Option<File> = None;
    for path in numbered.values() {
        watch.check()?;
        match &mut whole {
            None => {
                fs::rename(path, &target)?;
                whole = Some(OpenOptions::new().append(true).open(&target)?);
            }
            Some(whole) => {
                io::copy(&mut File::open(path)?, whole)?;
                fs::remove_file(path)?;
            }
        }
    }
    Ok(target)
}

fn unavailable(what: impl std::fmt::Display) -> Error {
    Error::new(Reason::SourceUnavailable, format!("the source cannot be used: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(names: &[&str]) -> (tempfile::TempDir, Result<PathBuf>) {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<_> = names.iter().map(|name| folder.path().join(name)).collect();
        for (file, name) in files.iter().zip(names) {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, name).unwrap();
        }
        let found = model(&files, folder.path(), Watch { progress: &|_| (), cancelled: &|| false });
        (folder, found)
    }

    #[test]
    fn parts_are_joined_in_order() {
        let names = ["b/m.gguf.part10", "a/m.gguf.part09", "b/m.gguf.part08"];
        let (_, found) = find(&names);
        assert!(found.unwrap_err().message().contains("missing (found 8, 9, 10)"));
        let (folder, found) = find(&["b/m.gguf.part01", "a/m.gguf.part00", "c/m.gguf.part02"]);
        assert_eq!(found.unwrap(), folder.path().join("m.gguf"));
        let joined = fs::read_to_string(folder.path().join("m.gguf")).unwrap();
        assert_eq!(joined, "a/m.gguf.part00b/m.gguf.part01c/m.gguf.part02");
        assert!(!folder.path().join("c/m.gguf.part02").exists());
    }

    #[test]
    fn gaps_doubles_and_mixtures_are_refused() {
        for (names, what) in [
            (&["m.gguf.part00", "m.gguf.part02"][..], "missing"),
            (&["m.gguf.part2"], "missing"),
            (&["a/m.gguf.part1", "b/m.gguf.part01"], "twice"),
            (&["m.gguf.part0", "n.gguf.part1"], "several models"),
            (&["m.gguf", "n.gguf"], "several models"),
            (&["m.gguf", "n.gguf.part0"], "several models"),
            (&["config.json"], "neither"),
            (
                &["a/config.json", "a/m.safetensors", "b/config.json", "b/m.safetensors"],
                "2 folders",
            ),
        ] {
            let error = find(names).1.unwrap_err();
            assert_eq!(error.reason(), Reason::SourceUnavailable);
            assert!(error.message().contains(what), "{error}");
        }
    }

    #[test]
    fn the_outer_folder_is_the_model() {
        let (folder, found) = find(&[
            "p/model/config.json",
            "p/model/model.safetensors",
            "p/model/1_pooling/config.json",
            "p/model/2_dense/config.json",
            "p/model/2_dense/model.safetensors",
        ]);
        assert_eq!(found.unwrap(), folder.path().join("p/model"));
        let (folder, found) = find(&["p/one.GGUF", "p/config.json"]);
        assert_eq!(found.unwrap(), folder.path().join("p/one.GGUF"));
    }

    #[test]
    fn names_of_parts() {
        assert_eq!(part("a.b.gguf.part00"), Some(("a.b.gguf", 0)));
        assert_eq!(part("a.gguf.part12"), Some(("a.gguf", 12)));
        for name in
            [".gguf.part0", "a.gguf.part", "a.gguf.part-1", "a.gguf.part99999", "a.bin.part0"]
        {
            assert_eq!(part(name), None, "{name}");
        }
    }
}
