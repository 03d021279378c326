//! Stored guests on disks, as pure logic: what is there, and writing one so that a power cut harms none.
//!
//! The format is [`hv_abi::image`]'s. What a guest is made of is not known here: its pages come from a [`write::Source`],
//! its state is bytes. Used by `guest` and `sched`.
//!
//! * [`open`] - reading headers, the table of sums and the state, all of them checked.
//! * [`mod@write`] - writing a guest in small steps, in the order that the format asks for.

pub mod open;
pub mod write;
