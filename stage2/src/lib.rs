//! AArch64 stage-2 translation tables as a Mach pmap; pure, runs on any host.
#![no_std]
