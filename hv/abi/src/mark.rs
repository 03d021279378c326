//! Marks that a guest leaves for whoever follows a run from outside, instruction by instruction.
//!
//! Each is the number of a HINT that no architecture gives a meaning: a CPU does nothing, and a log of the
//! run shows that it was there.

/// An operation that is measured begins.
pub const BEGIN: u32 = 0x70;
/// It has ended.
pub const END: u32 = 0x71;
/// A line with a figure is printed, of the operations since the line before.
pub const REPORT: u32 = 0x72;

/// The instruction with a HINT's number.
pub const fn hint(number: u32) -> u32 {
    0xd503_201f | number << 5
}
