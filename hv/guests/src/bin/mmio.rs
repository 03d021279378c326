//! The guest `mmio`; see the module `devices`.
#![cfg_attr(target_os = "none", no_std, no_main)]

hv_guests::program!("mmio", devices);
