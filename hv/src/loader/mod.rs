//! From files to a guest that can be started: what is where in its memory, and the tree that says so.
//!
//! [`manifest`] reads what xtask asks for; [`image`] tells what kind of program an image is from its
//! first page; [`mod@plan`] lays RAM and flash out; [`fdt`] writes the device tree. All of it is pure: bytes
//! and numbers in, values out. Nothing is copied: an image becomes a map entry over its object, and only
//! the tree is written into the guest's memory, by whoever carries a plan out (`guest`).

pub mod fdt;
pub mod image;
pub mod manifest;
pub mod plan;

pub use manifest::{Boot, DiskConfig, GuestConfig, Manifest, Writes};
pub use plan::{Blob, Plan, plan};
