//! QEMU virt: the devices the hypervisor itself uses.
#![no_std]
