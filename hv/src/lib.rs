//! The hypervisor: EL2 runtime, guests, virtual devices, scheduler, monitor.
//!
//! Read in this order, which is also who may use whom: a module uses only those before it. Calls go down,
//! wants come back up as values.
//!
//! * [`bounded`] - lists and arrays that are read back with a bound.
//! * [`arch`] - every assembly line and every EL2 register; on the host the same names over memory.
//! * [`mm`] - what joins `vmobject` and `stage2` to the machine: frames' bytes, tables, the heap.
//! * [`vdev`] - the devices that a guest sees, as pure logic: values in, values out.
//! * [`loader`] - what kind of program an image is, what is where in a new guest, its device tree.
//! * [`stored`] - what a stored guest looks like on a disk: reading it, writing it.
//! * [`guest`] - a guest's vCPUs and devices, and what happens when one of them stops.
//! * [`sched`] - who runs when, on which CPU.
//! * [`monitor`] - what a person types: parsing, answers, the console's switch.
//! * `boot` - from the first Rust instruction to guests running (on the target only).
#![no_std]

extern crate alloc;
// The host's fake CPU is per thread; nothing else uses it.
#[cfg(not(target_os = "none"))]
extern crate std;

// In the order above; the blank lines keep the formatter from sorting them.
pub mod bounded;

pub mod arch;

pub mod mm;

pub mod vdev;

pub mod loader;

pub mod stored;

pub mod guest;

pub mod sched;

pub mod monitor;

#[cfg(target_os = "none")]
pub mod boot;
