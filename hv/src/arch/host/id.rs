//! Identification registers: a Neoverse N1, more or less.

use crate::arch::context::IdRegisters;

/// The registers of this CPU.
pub fn read() -> IdRegisters {
    IdRegisters {
        midr: 0x414f_d0c1,
        ctr: 0x8444_c004,
        dczid: 4,
        clidr: 0x0a20_0023,
        pfr0: 0x1101_0000_1111_1112,
        pfr1: 0x20,
        dfr0: 0x1030_5408,
        isar0: 0x0000_1000_1021_1120,
        isar1: 0x10_0001,
        mmfr0: 0x0010_1125,
        mmfr1: 0x1021_2122,
        mmfr2: 0x1_1011,
        ..IdRegisters::default()
    }
}

/// Bits of physical address that the CPU has.
pub fn pa_bits() -> u32 {
    48
}
