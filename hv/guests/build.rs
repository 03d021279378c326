//! Links the guests with the project's linker script; on the host there is nothing to do.

use std::{env, fs};

fn main() {
    let here = env!("CARGO_MANIFEST_DIR");
    let script = format!("{here}/../../linker/guest.ld");
    println!("cargo:rerun-if-changed={script}");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/bin");
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none") {
        for program in fs::read_dir(format!("{here}/src/bin")).into_iter().flatten().flatten() {
            let name = program.path().with_extension("");
            if let Some(name) = name.file_name().and_then(|name| name.to_str()) {
                println!("cargo:rustc-link-arg-bin={name}=--script={script}");
            }
        }
    }
}
