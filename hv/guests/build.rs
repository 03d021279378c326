//! Links the guests with the project's linker script; on the host there is nothing to do.

use std::env;

fn main() {
    let script = format!("{}/../../linker/guest.ld", env!("CARGO_MANIFEST_DIR"));
    println!("cargo:rerun-if-changed={script}");
    println!("cargo:rerun-if-changed=build.rs");
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none") {
        println!("cargo:rustc-link-arg-bins=--script={script}");
    }
}
