//! The Mach virtual memory system, for guests of a hypervisor.
//!
//! Stage 2 is a cache of the map. The map is made of objects. An object is a cache of its pager. Any
//! layer may forget and ask the one below again.
//!
//! Modules, each using only those before it:
//! `addr` `prot` `lock` `pmap` `store`.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod addr;
pub mod lock;
pub mod pmap;
pub mod prot;
pub mod store;
