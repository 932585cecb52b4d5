//! Generates messages, services, JSON mappings and the descriptor set from `proto/`.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use prost::Message as _;

#[path = "src/code/digest.rs"]
mod digest;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    println!("cargo:rerun-if-changed={}", root.display());
    // New migrations are embedded by a macro that sees changed files only.
    println!("cargo:rerun-if-changed=migrations");

    write_method_code(&out)?;

    let mut files = Vec::new();
    collect(&root, &mut files)?;
    files.sort();
    for file in &files {
        println!("cargo:rerun-if-changed={}", file.display());
    }

    let mut compiler = protox::Compiler::new([&root])?;
    compiler.include_imports(true).include_source_info(true).open_files(&files)?;
    // These bytes keep custom options and comments; the prost types below would drop the former.
    let descriptors = compiler.encode_file_descriptor_set();
    fs::write(out.join("planish.descriptors.bin"), &descriptors)?;
    let set = prost_types::FileDescriptorSet::decode(descriptors.as_slice())?;

    // Messages know their names, which `Any` needs.
    let mut config = tonic_prost_build::Config::new();
    // Maps in the order of their keys: the same message, the same bytes.
    config.btree_map(["."]);
    config.enable_type_names().type_name_domain(["."], "type.googleapis.com");
    tonic_prost_build::configure()
        .compile_well_known_types(true)
        .extern_path(".google.protobuf", "::pbjson_types")
        .bytes(".planish.v1")
        .bytes(".inference")
        .compile_fds_with_config(set, config)?;
    pbjson_build::Builder::new()
        .register_descriptors(&descriptors)?
        .preserve_proto_field_names()
        .btree_map(["."])
        .build(&[".planish.v1", ".google.longrunning", ".google.rpc"])?;
    Ok(())
}

/// The names by which recipes know the methods are those of their files.
fn write_method_code(out: &Path) -> io::Result<()> {
    println!("cargo:rerun-if-changed=src/methods");
    println!("cargo:rerun-if-changed=src/calibrate");
    println!("cargo:rerun-if-changed=src/train");
    let digests = digest::of_methods(Path::new("src"))?;
    let rows: Vec<String> = digests
        .iter()
        .map(|(place, digest)| {
            let slug = place.rsplit('/').next().unwrap_or_default();
            format!("({slug:?}, {digest:?})")
        })
        .collect();
    fs::write(out.join("method_code.rs"), format!("&[{}]", rows.join(", ")))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "proto") {
            files.push(path);
        }
    }
    Ok(())
}
