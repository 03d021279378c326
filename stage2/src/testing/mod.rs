//! Fakes for tests: table frames in boxes, a walker written from the architecture, and CPUs whose
//! translation caches forget nothing until the right instruction tells them.
//!
//! Emulators and most machines hide a missing invalidate. [`Mmu`] does not: see `mmu` for what it keeps and
//! for how long. [`walker`] shares no code with `descriptor` or `geometry`, so that a bit that is wrong in
//! one is wrong against the other. [`Guest`] joins them to tables under test and to what ought to be true.
//! Neighbours: every test; nothing in the product.

mod caches;
pub mod cpus;
mod frames;
mod guest;
mod meanwhile;
mod mmu;
pub mod walker;

pub use frames::Frames;
pub use guest::{Checked, Guest};
pub use meanwhile::Meanwhile;
pub use mmu::{Access, Fault, Mmu, Op};
