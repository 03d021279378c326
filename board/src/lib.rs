//! QEMU virt: the devices the hypervisor itself uses.
//!
//! Read in this order, which is also who may use whom: a module uses only those before it.
//!
//! * [`platform`] - what the host's device tree says of the machine, as plain data. Everything else is built
//!   from it; nothing about the board is assumed that the tree says.
//! * [`pl011`] - the serial ports: the console, and our own log.
//! * [`pl031`] - the clock, which is read once.
//! * [`gic`] - the physical interrupt controller.
//! * [`psci`] - starting CPUs, and ending the machine. AArch64 only.
//! * [`virtio`] - the disk and the control port, over virtio-mmio, asynchronous throughout.
//! * [`gpt`] - named partitions on the disk.
//!
//! Drivers hold no locks: each is `&mut`, and its owner in `hv` ranks the lock around it. Nothing here waits,
//! except what says so in its name and runs at boot.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod gic;
pub mod gpt;
pub mod pl011;
pub mod pl031;
pub mod platform;
#[cfg(target_arch = "aarch64")]
pub mod psci;
pub mod virtio;
