//! The thin binary around the library: on the target nothing but the link, on the host a hint.
//!
//! The image's entry is `_start` in `arch/aarch64/start.S`, which ends in [`hv::boot`].
#![cfg_attr(target_os = "none", no_std, no_main)]

// Named so that the linker sees the library, whose assembly holds the entry point.
use hv as _;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("hv is the image of a bare-metal hypervisor: build and start it with `cargo xtask run`");
}
