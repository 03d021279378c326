//! The hypervisor: EL2 runtime, guests, virtual devices, scheduler, monitor.
#![no_std]
