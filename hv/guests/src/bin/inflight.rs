//! The guest `inflight`; see the module of that name.
#![cfg_attr(target_os = "none", no_std, no_main)]

hv_guests::program!(inflight);
