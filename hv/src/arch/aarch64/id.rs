//! Identification registers, read once more each time: they are constant, and reads are cheap.

use super::sysreg::read_sysreg;
use crate::arch::context::IdRegisters;
use stage2::geometry::Features;

/// The registers of this CPU. Those newer than the CPU read as zero, as the architecture promises.
pub fn read() -> IdRegisters {
    IdRegisters {
        midr: read_sysreg!("midr_el1"),
        revidr: read_sysreg!("revidr_el1"),
        aidr: read_sysreg!("aidr_el1"),
        ctr: read_sysreg!("ctr_el0"),
        dczid: read_sysreg!("dczid_el0"),
        clidr: read_sysreg!("clidr_el1"),
        pfr0: read_sysreg!("s3_0_c0_c4_0"),
        pfr1: read_sysreg!("s3_0_c0_c4_1"),
        pfr2: read_sysreg!("s3_0_c0_c4_2"),
        zfr0: read_sysreg!("s3_0_c0_c4_4"),
        smfr0: read_sysreg!("s3_0_c0_c4_5"),
        dfr0: read_sysreg!("s3_0_c0_c5_0"),
        dfr1: read_sysreg!("s3_0_c0_c5_1"),
        isar0: read_sysreg!("s3_0_c0_c6_0"),
        isar1: read_sysreg!("s3_0_c0_c6_1"),
        isar2: read_sysreg!("s3_0_c0_c6_2"),
        isar3: read_sysreg!("s3_0_c0_c6_3"),
        mmfr0: read_sysreg!("s3_0_c0_c7_0"),
        mmfr1: read_sysreg!("s3_0_c0_c7_1"),
        mmfr2: read_sysreg!("s3_0_c0_c7_2"),
        mmfr3: read_sysreg!("s3_0_c0_c7_3"),
        mmfr4: read_sysreg!("s3_0_c0_c7_4"),
        aarch32: aarch32(),
    }
}

/// Bits of physical address that the CPU has, 52 taken as 48: we use the 4 KiB granule without LPA2.
pub fn pa_bits() -> u32 {
    Features::from_id_registers(read_sysreg!("s3_0_c0_c7_0"), 0).pa_bits()
}

/// The AArch32 registers, whose encodings have no names for the newest.
fn aarch32() -> [[u64; 8]; 3] {
    [
        [
            read_sysreg!("s3_0_c0_c1_0"),
            read_sysreg!("s3_0_c0_c1_1"),
            read_sysreg!("s3_0_c0_c1_2"),
            read_sysreg!("s3_0_c0_c1_3"),
            read_sysreg!("s3_0_c0_c1_4"),
            read_sysreg!("s3_0_c0_c1_5"),
            read_sysreg!("s3_0_c0_c1_6"),
            read_sysreg!("s3_0_c0_c1_7"),
        ],
        [
            read_sysreg!("s3_0_c0_c2_0"),
            read_sysreg!("s3_0_c0_c2_1"),
            read_sysreg!("s3_0_c0_c2_2"),
            read_sysreg!("s3_0_c0_c2_3"),
            read_sysreg!("s3_0_c0_c2_4"),
            read_sysreg!("s3_0_c0_c2_5"),
            read_sysreg!("s3_0_c0_c2_6"),
            read_sysreg!("s3_0_c0_c2_7"),
        ],
        [
            read_sysreg!("s3_0_c0_c3_0"),
            read_sysreg!("s3_0_c0_c3_1"),
            read_sysreg!("s3_0_c0_c3_2"),
            read_sysreg!("s3_0_c0_c3_3"),
            read_sysreg!("s3_0_c0_c3_4"),
            read_sysreg!("s3_0_c0_c3_5"),
            read_sysreg!("s3_0_c0_c3_6"),
            read_sysreg!("s3_0_c0_c3_7"),
        ],
    ]
}
