//! AArch64 stage-2 translation tables as a Mach pmap; pure, runs on any host.
//!
//! [`Stage2`] is one guest's tables and implements [`vmobject::pmap::Pmap`]. It is told where table frames
//! come from ([`table::TableSource`]), how to talk to the translation caches ([`tlb::TlbOps`]) and what
//! the CPU can do ([`geometry::Features`]); the rest is here. Whoever edits holds the guest's pmap lock,
//! so there is one editor; the walkers of all CPUs read along, and set flags.
//!
//! To read it: `descriptor` for the bits, `tree` for the struct, `edit` for how a reachable entry changes,
//! then `park`, the reason why a clone's pause does not grow with its memory.
//!
//! Modules, each using only those before it (a method of `Stage2` lives in the module of its subject):
//! `descriptor` `table` `geometry` `tlb` `tree` `walk` `edit` `block` `park` `clear` `aging` `vmid` `pmap` `testing`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod aging;
mod block;
mod clear;
pub mod descriptor;
mod edit;
pub mod geometry;
mod park;
pub mod pmap;
pub mod table;
#[cfg(feature = "testing")]
pub mod testing;
pub mod tlb;
mod tree;
pub mod vmid;
mod walk;

pub use tree::Stage2;
