//! The CPU itself: assembly and EL2 registers.
//!
//! [`entry`] is where CPUs arrive and where EL2's own exceptions end; `switch` where guests are entered.
//! Instructions and registers are named through the macros of `sysreg`, nowhere else.
#![expect(unsafe_code, reason = "this is where assembly is")]

mod sysreg;

pub mod at;
pub mod cache;
pub mod debug;
pub mod el2;
pub mod entry;
pub mod fpsimd;
pub mod gich;
pub mod id;
pub mod irq;
pub mod mmu;
pub mod page;
pub mod percpu;
pub mod power;
pub mod switch;
pub mod timer;
pub mod tlb;
