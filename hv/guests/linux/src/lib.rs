//! What programs for a guest's Linux share. They are static and without a library, so they make their own system calls.
//!
//! A program has `#[unsafe(no_mangle)] extern "C" fn main(stack: &Stack) -> !`. On the host there is nothing here.
#![no_std]
#![cfg_attr(
    target_os = "none",
    expect(unsafe_code, reason = "programs without a library make their own system calls")
)]

#[cfg(target_os = "none")]
mod system;

#[cfg(target_os = "none")]
pub use system::{Stack, call, exit, map, open, say};
