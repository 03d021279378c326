//! The fork page: what a guest that cannot make an HVC asks of EL2 with loads and stores.
//!
//! A page of 32-bit registers at [`crate::machine::FORK_PAGE`], in the device tree as [`COMPATIBLE`]. A store of a number
//! of children to [`FORK`] forks the guest before its next instruction; [`STATUS`], [`PLACE`] and [`OF`] then tell
//! each of them what it is. They belong to the last such store of any vCPU, so programs that share a guest take
//! turns. Other offsets read as zero and ignore writes.

/// The device tree's word for it.
pub const COMPATIBLE: &str = "hv,fork-page";
/// What [`MAGIC`] reads as: `FORK`, little end first.
pub const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"FORK");
/// What [`VERSION`] reads as.
pub const VERSION_VALUE: u32 = 1;

/// Read: [`MAGIC_VALUE`].
pub const MAGIC: u64 = 0x00;
/// Read: [`VERSION_VALUE`].
pub const VERSION: u64 = 0x04;
/// Write: fork into that many children.
pub const FORK: u64 = 0x08;
/// Read: how the last fork ended, signed, as [`crate::call::status`] has it.
pub const STATUS: u64 = 0x0c;
/// Read: what the last fork made of this guest: 0 in the parent, from 1 on in a child.
pub const PLACE: u64 = 0x10;
/// Read: how many children it made.
pub const OF: u64 = 0x14;
/// Read: the guest's own number.
pub const GUEST: u64 = 0x18;
/// Read: 32 random bits, others each time.
pub const RANDOM: u64 = 0x1c;
