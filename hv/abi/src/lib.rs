//! Numbers shared by guests, the hypervisor and xtask.
//!
//! A number is here when two programs that are built apart must agree on it. What only one of them knows
//! stays there. Read [`machine`] for what a guest finds where, [`call`] for what it may ask of EL2,
//! [`forkpage`] for the same by loads and stores, [`manifest`] for what xtask tells the hypervisor,
//! [`mark`] for what it sees of a guest from outside. No code but a few conversions, no dependencies.
#![no_std]

pub mod call;
pub mod forkpage;
pub mod image;
pub mod machine;
pub mod manifest;
pub mod mark;
