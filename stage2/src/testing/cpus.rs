//! CPUs as their identification registers describe them, oldest first.
//!
//! The values are those that the technical reference manuals give for each core's ID registers. Between them
//! they cover what this crate makes a difference of.

use crate::geometry::Features;

/// Armv8.0: 40 bits of physical address, 8-bit VMIDs, access and dirty flags by software.
pub const CORTEX_A53: Features = Features::from_id_registers(0x1122, 0);

/// Armv8.2: 48 bits, 16-bit VMIDs, both flags by hardware.
pub const NEOVERSE_N1: Features = Features::from_id_registers(0x10_1125, 0x1021_2122).with_mmfr2(0x1011);

/// Armv9.0: range invalidates, BBM level 2, forced write-back.
pub const CORTEX_A710: Features = Features::from_id_registers(0x222_0010_1122, 0x1021_2122)
    .with_mmfr2(0x1221_0111_1010_1011)
    .with_isar0(0x221_1111_1021_2120);
