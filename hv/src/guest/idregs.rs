//! Identification registers as a guest sees them: the CPU's, less what a guest is not given.
//!
//! A guest gets only what it can use without harm and what follows it from CPU to CPU; the rest is
//! hidden here *and* trapped by EL2's controls (DESIGN 15), because hiding alone disables nothing. Made
//! once, at boot, from the first CPU: every vCPU on every CPU reads the same.
//! Read by `sysreg`.

use serde::{Deserialize, Serialize};

use super::syndrome::SysReg;
use crate::arch::context::{IdRegisters, id_field};

/// The AArch64 identification registers by CRm and op2, for CRm from 4 to 7, then AArch32's, 1 to 3.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestIds {
    aarch64: [[u64; 8]; 4],
    aarch32: [[u64; 8]; 3],
}

/// A mask of whole four-bit fields, from their lowest bits.
const fn fields<const N: usize>(shifts: [u32; N]) -> u64 {
    let mut mask = 0;
    let mut i = 0;
    while i < N {
        mask |= 0xf << shifts[i];
        i += 1;
    }
    mask
}

/// ID_AA64PFR0: EL0, FP, AdvSIMD, DIT and CSV3 as they are. EL1 is AArch64 only; CSV2 at most 1, because
/// SCXTNUM is not given; the GIC has system registers. No EL2, EL3, RAS, SVE, MPAM, AMU, RME.
fn pfr0(hw: u64) -> u64 {
    hw & fields([0, 16, 20, 48, 60]) | 1 << 4 | 1 << 24 | id_field(hw, 56).min(1) << 56
}
/// ID_AA64PFR1: branch targets and SSBS. No MTE, SME, NMI, GCS, random traps.
fn pfr1(hw: u64) -> u64 {
    hw & fields([0, 4])
}
/// ID_AA64DFR0: the debug version and its break- and watchpoints. No PMU, trace, SPE, BRBE.
fn dfr0(hw: u64) -> u64 {
    hw & fields([0, 12, 20, 28, 36])
}
/// ID_AA64ISAR0: all but transactional memory.
fn isar0(hw: u64) -> u64 {
    hw & !fields([24])
}
/// ID_AA64ISAR1: all but 64-byte stores and XS.
fn isar1(hw: u64) -> u64 {
    hw & !fields([56, 60])
}
/// ID_AA64ISAR2: arithmetic and pointer authentication; no MOPS, WFxT, 128-bit registers.
fn isar2(hw: u64) -> u64 {
    hw & fields([4, 8, 12, 20, 24, 28, 48, 52])
}
/// ID_AA64MMFR0: the address size that stage 2 gives; granules, ASIDs, endianness. No ECV, FGT, stage 2.
fn mmfr0(hw: u64, pa_range: u64) -> u64 {
    hw & fields([4, 8, 16, 20, 24, 28]) | id_field(hw, 0).min(pa_range)
}
/// ID_AA64MMFR1: access and dirty flags, HPDS, PAN, ETS, FEAT_AFP. No VHE, LOR, XNX, HCX, CMOW.
fn mmfr1(hw: u64) -> u64 {
    hw & fields([0, 12, 20, 36, 44, 48, 60])
}
/// ID_AA64MMFR2: all that stage 1 alone has. No NV, FWB, EVT, IESB.
fn mmfr2(hw: u64) -> u64 {
    hw & !fields([12, 24, 40, 56])
}

impl GuestIds {
    /// What guests of this machine see; `pa_range` is the code of the widest address stage 2 takes.
    pub fn new(hw: &IdRegisters, aarch32: &[[u64; 8]; 3], pa_range: u64) -> Self {
        let mut ids = Self { aarch64: [[0; 8]; 4], aarch32: [[0; 8]; 3] };
        ids.aarch64[0] = [pfr0(hw.pfr0), pfr1(hw.pfr1), 0, 0, 0, 0, 0, 0];
        ids.aarch64[1] = [dfr0(hw.dfr0), 0, 0, 0, 0, 0, 0, 0];
        ids.aarch64[2] = [isar0(hw.isar0), isar1(hw.isar1), isar2(hw.isar2), 0, 0, 0, 0, 0];
        ids.aarch64[3] = [mmfr0(hw.mmfr0, pa_range), mmfr1(hw.mmfr1), mmfr2(hw.mmfr2), 0, 0, 0, 0, 0];
        if id_field(hw.pfr0, 0) == 2 {
            ids.aarch32 = *aarch32;
            ids.aarch32[0][0] &= !fields([20, 28]); // ID_PFR0: no AMU, no RAS
            ids.aarch32[0][1] &= !fields([12, 4, 20, 28]); // ID_PFR1: no security, virtualisation, fractions of it
            ids.aarch32[0][1] |= 1 << 28; // the GIC has system registers
            ids.aarch32[0][2] &= !fields([12, 16, 24, 28]); // ID_DFR0: no trace, no PMU
            ids.aarch32[0][3] = 0; // ID_AFR0
            ids.aarch32[2][4] &= !fields([8]); // ID_PFR2: no RAS fraction
            ids.aarch32[2][5] = 0; // ID_DFR1
        }
        ids
    }

    /// The value of an identification register; reserved places in their space read as zero; `None` for
    /// a register that is not one.
    pub fn read(&self, register: SysReg) -> Option<u64> {
        let [3, 0, 0, crm, op2] = register.parts() else { return None };
        let row = match crm {
            1..=3 => self.aarch32.get(usize::from(crm) - 1)?,
            4..=7 => self.aarch64.get(usize::from(crm) - 4)?,
            _ => return None,
        };
        row.get(usize::from(op2)).copied()
    }

    /// The first register that has another value there: its CRm and op2, and both values.
    pub fn difference(&self, other: &Self) -> Option<(usize, usize, u64, u64)> {
        let rows = self.aarch32.iter().zip(&other.aarch32).chain(self.aarch64.iter().zip(&other.aarch64));
        rows.enumerate().find_map(|(row, (here, there))| {
            let op2 = here.iter().zip(there).position(|(here, there)| here != there)?;
            Some((row + 1, op2, here[op2], there[op2]))
        })
    }

    /// What the CPU has that changes how an exception is taken.
    pub fn features(&self) -> super::inject::Features {
        super::inject::Features {
            pan: id_field(self.aarch64[3][1], 20) != 0,
            ssbs: id_field(self.aarch64[0][1], 4) != 0,
            dit: id_field(self.aarch64[0][0], 48) != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_ones() -> GuestIds {
        let ones = IdRegisters {
            pfr0: u64::MAX,
            pfr1: u64::MAX,
            pfr2: u64::MAX,
            zfr0: u64::MAX,
            smfr0: u64::MAX,
            dfr0: u64::MAX,
            dfr1: u64::MAX,
            isar0: u64::MAX,
            isar1: u64::MAX,
            isar2: u64::MAX,
            isar3: u64::MAX,
            mmfr0: u64::MAX,
            mmfr1: u64::MAX,
            mmfr2: u64::MAX,
            mmfr3: u64::MAX,
            mmfr4: u64::MAX,
            ..IdRegisters::default()
        };
        GuestIds::new(&ones, &[[u64::MAX; 8]; 3], 2)
    }

    #[test]
    fn what_is_not_virtualised_is_hidden_however_much_the_cpu_has() {
        let ids = all_ones();
        let read = |crm, op2| ids.read(SysReg::new(3, 0, 0, crm, op2)).unwrap();
        let pfr0 = read(4, 0);
        for (name, shift) in
            [("EL2", 8), ("EL3", 12), ("RAS", 28), ("SVE", 32), ("MPAM", 40), ("AMU", 44), ("RME", 52)]
        {
            assert_eq!(id_field(pfr0, shift), 0, "{name}");
        }
        let pfr1 = read(4, 1);
        for (name, shift) in [("MTE", 8), ("SME", 24), ("NMI", 36)] {
            assert_eq!(id_field(pfr1, shift), 0, "{name}");
        }
        assert_eq!(id_field(read(5, 0), 8), 0, "PMU");
        assert_eq!(id_field(read(6, 2), 16), 0, "MOPS");
        assert_eq!(id_field(read(7, 0), 0), 2, "PARange");
        assert_eq!(id_field(read(7, 1), 8), 0, "VHE");
        assert_eq!((read(4, 4), read(4, 5), read(5, 1), read(7, 3)), (0, 0, 0, 0));
    }

    #[test]
    fn a_reserved_identification_register_reads_as_zero_and_others_are_not_ours() {
        let ids = all_ones();
        assert_eq!(ids.read(SysReg::new(3, 0, 0, 7, 7)), Some(0));
        assert_eq!(ids.read(SysReg::new(3, 0, 0, 0, 0)), None);
        assert_eq!(ids.read(SysReg::new(3, 3, 0, 4, 0)), None);
    }

    #[test]
    fn a_cpu_without_aarch32_shows_none_of_its_registers() {
        let hw = IdRegisters { pfr0: 0x11, ..IdRegisters::default() };
        let ids = GuestIds::new(&hw, &[[u64::MAX; 8]; 3], 5);
        assert_eq!(ids.read(SysReg::new(3, 0, 0, 1, 0)), Some(0));
    }
}
