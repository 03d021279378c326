//! The virtual interface of the interrupt controller: list registers and their neighbours (ICH_*_EL2).
//!
//! `vdev::vgic` decides what is in them; this file only moves values. Writes take effect at the next entry,
//! whose ERET synchronises.

use super::sysreg::{read_sysreg, write_sysreg};

/// The most list registers that the architecture allows.
pub const MAX_LRS: usize = 16;

/// A 32-bit register's value.
fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}

/// ICH_VTR_EL2.
fn vtr() -> u64 {
    read_sysreg!("s3_4_c12_c11_1")
}

/// List registers that the CPU has.
pub fn nr_lrs() -> usize {
    usize::try_from((vtr() & 0x1f).saturating_add(1)).map_or(4, |count| count.min(MAX_LRS))
}

/// Active priority registers of each group that the CPU has: 1, 2 or 4.
pub fn nr_aprs() -> usize {
    // They are for preemption levels.
    match low((vtr() >> 26) & 7).saturating_add(1) {
        0..=5 => 1,
        6 => 2,
        _ => 4,
    }
}

/// Spells out the sixteen list registers: their number is part of the instruction.
macro_rules! list_registers {
    ($($n:literal $name:literal)*) => {
        /// Writes list register `n`.
        pub fn write_lr(n: usize, value: u64) {
            match n {
                $($n => write_sysreg!($name, value),)*
                _ => {}
            }
        }
        /// Reads list register `n`.
        pub fn read_lr(n: usize) -> u64 {
            match n {
                $($n => read_sysreg!($name),)*
                _ => 0,
            }
        }
    };
}

list_registers! {
    0 "s3_4_c12_c12_0" 1 "s3_4_c12_c12_1" 2 "s3_4_c12_c12_2" 3 "s3_4_c12_c12_3"
    4 "s3_4_c12_c12_4" 5 "s3_4_c12_c12_5" 6 "s3_4_c12_c12_6" 7 "s3_4_c12_c12_7"
    8 "s3_4_c12_c13_0" 9 "s3_4_c12_c13_1" 10 "s3_4_c12_c13_2" 11 "s3_4_c12_c13_3"
    12 "s3_4_c12_c13_4" 13 "s3_4_c12_c13_5" 14 "s3_4_c12_c13_6" 15 "s3_4_c12_c13_7"
}

/// Writes ICH_VMCR_EL2.
pub fn write_vmcr(value: u64) {
    write_sysreg!("s3_4_c12_c11_7", value);
}

/// Reads ICH_VMCR_EL2.
pub fn read_vmcr() -> u64 {
    read_sysreg!("s3_4_c12_c11_7")
}

/// Writes the active priorities of both groups.
pub fn write_aprs(group0: &[u32; 4], group1: &[u32; 4]) {
    let count = nr_aprs();
    write_sysreg!("s3_4_c12_c8_0", u64::from(group0[0]));
    write_sysreg!("s3_4_c12_c9_0", u64::from(group1[0]));
    if count >= 2 {
        write_sysreg!("s3_4_c12_c8_1", u64::from(group0[1]));
        write_sysreg!("s3_4_c12_c9_1", u64::from(group1[1]));
    }
    if count >= 4 {
        write_sysreg!("s3_4_c12_c8_2", u64::from(group0[2]));
        write_sysreg!("s3_4_c12_c8_3", u64::from(group0[3]));
        write_sysreg!("s3_4_c12_c9_2", u64::from(group1[2]));
        write_sysreg!("s3_4_c12_c9_3", u64::from(group1[3]));
    }
}

/// Reads the active priorities of both groups.
pub fn read_aprs(group0: &mut [u32; 4], group1: &mut [u32; 4]) {
    let count = nr_aprs();
    group0[0] = low(read_sysreg!("s3_4_c12_c8_0"));
    group1[0] = low(read_sysreg!("s3_4_c12_c9_0"));
    if count >= 2 {
        group0[1] = low(read_sysreg!("s3_4_c12_c8_1"));
        group1[1] = low(read_sysreg!("s3_4_c12_c9_1"));
    }
    if count >= 4 {
        group0[2] = low(read_sysreg!("s3_4_c12_c8_2"));
        group0[3] = low(read_sysreg!("s3_4_c12_c8_3"));
        group1[2] = low(read_sysreg!("s3_4_c12_c9_2"));
        group1[3] = low(read_sysreg!("s3_4_c12_c9_3"));
    }
}

/// Writes ICH_HCR_EL2.
pub fn set_hcr(value: u32) {
    write_sysreg!("s3_4_c12_c11_0", u64::from(value));
}

/// Reads ICH_HCR_EL2, whose EOI count the hardware keeps.
pub fn read_hcr() -> u32 {
    low(read_sysreg!("s3_4_c12_c11_0"))
}

/// Why the maintenance interrupt is asserted.
pub fn misr() -> u32 {
    low(read_sysreg!("s3_4_c12_c11_2"))
}

/// List registers whose guest asked to hear of the end of interrupt.
pub fn eisr() -> u32 {
    low(read_sysreg!("s3_4_c12_c11_3"))
}

/// List registers that are empty.
pub fn elrsr() -> u32 {
    low(read_sysreg!("s3_4_c12_c11_5"))
}
