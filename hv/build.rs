//! Links the bare-metal image with the project's linker script; on the host there is nothing to do.
//!
//! The script is named by its absolute path because the linker runs in a directory of cargo's choosing.

use std::env;

fn main() {
    let script = format!("{}/../linker/hv.ld", env!("CARGO_MANIFEST_DIR"));
    println!("cargo:rerun-if-changed={script}");
    println!("cargo:rerun-if-changed=build.rs");
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none") {
        println!("cargo:rustc-link-arg-bins=--script={script}");
    }
}
