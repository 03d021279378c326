//! Numbers shared by guests, the hypervisor and xtask.
#![no_std]
