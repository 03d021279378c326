//! AArch64 stage-2 translation tables as a Mach pmap; pure, runs on any host.
//!
//! Modules, each using only those before it:
//! `tlb` `table` `descriptor` `geometry` `vmid` `pmap`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod descriptor;
pub mod geometry;
pub mod pmap;
pub mod table;
pub mod tlb;
pub mod vmid;

pub use pmap::Stage2;
