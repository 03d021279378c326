//! The syndrome of an exit, as a type: what `ESR_EL2` says, and no more.
//!
//! [`Syndrome::decode`] is total: every exception class has a variant or lands in
//! [`Syndrome::Other`], so the dispatch in `exit` is exhaustive by construction (invariant I11).
//! Pure bits; tested on the host. Read by `exit`, `memory`, `mmio`, `sysreg` and `aarch32`.

/// The exception classes that can reach EL2 from a guest and that we tell apart.
pub mod class {
    /// Unknown reason: an UNDEFINED instruction that EL2 was asked to take.
    pub const UNKNOWN: u8 = 0x00;
    /// WFI, WFE and their timed forms.
    pub const WFX: u8 = 0x01;
    /// MCR or MRC to coprocessor 15.
    pub const CP15_32: u8 = 0x03;
    /// MCRR or MRRC to coprocessor 15.
    pub const CP15_64: u8 = 0x04;
    /// MCR or MRC to coprocessor 14.
    pub const CP14_32: u8 = 0x05;
    /// LDC or STC to coprocessor 14.
    pub const CP14_LS: u8 = 0x06;
    /// SIMD, floating point or SVE, trapped by CPTR.
    pub const FP: u8 = 0x07;
    /// VMRS of an identification register.
    pub const CP10_ID: u8 = 0x08;
    /// MRRC to coprocessor 14.
    pub const CP14_64: u8 = 0x0c;
    /// Illegal execution state.
    pub const ILLEGAL: u8 = 0x0e;
    /// HVC in AArch32.
    pub const HVC32: u8 = 0x12;
    /// SMC in AArch32.
    pub const SMC32: u8 = 0x13;
    /// HVC in AArch64.
    pub const HVC64: u8 = 0x16;
    /// SMC in AArch64.
    pub const SMC64: u8 = 0x17;
    /// MSR, MRS or a system instruction in AArch64.
    pub const SYS64: u8 = 0x18;
    /// Instruction abort from a lower level.
    pub const IABT_LOWER: u8 = 0x20;
    /// Instruction abort at the same level.
    pub const IABT_SAME: u8 = 0x21;
    /// PC alignment.
    pub const PC_ALIGN: u8 = 0x22;
    /// Data abort from a lower level.
    pub const DABT_LOWER: u8 = 0x24;
    /// Data abort at the same level.
    pub const DABT_SAME: u8 = 0x25;
    /// SP alignment.
    pub const SP_ALIGN: u8 = 0x26;
    /// SError interrupt.
    pub const SERROR: u8 = 0x2f;
}

/// The "instruction is 32 bits long" bit of a syndrome.
pub const IL: u64 = 1 << 25;

/// What the guest did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syndrome {
    /// An instruction that is undefined, or whose trap has no class of its own.
    Unknown,
    /// WFI or WFE.
    Wfx(Wfx),
    /// MCR or MRC to coprocessor 15, from AArch32 EL0.
    Cp15(CpAccess),
    /// MCRR or MRRC to coprocessor 15, from AArch32 EL0.
    Cp15Pair(CpPair),
    /// Any access to coprocessor 14 or an identification VMRS, from AArch32 EL0.
    Cp14(Condition),
    /// Floating point or SIMD, while another guest's registers may be loaded.
    Fp(Condition),
    /// Illegal execution state.
    Illegal,
    /// HVC in AArch64, with its immediate.
    Hvc(u16),
    /// SMC in AArch64, with its immediate.
    Smc(u16),
    /// HVC or SMC in AArch32: cannot come from EL0; answered all the same.
    Call32(Condition),
    /// A system register or a system instruction.
    Sys(SysAccess),
    /// An instruction fetch that stage 2 refused.
    Fetch(Abort),
    /// A load, store or maintenance that stage 2 refused.
    Data(DataAbort),
    /// Everything else: the class, for the log.
    Other(u8),
}

/// The condition of an AArch32 instruction, when the syndrome has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Condition(Option<u8>);

impl Condition {
    const fn decode(iss: u32) -> Self {
        if iss & (1 << 24) != 0 { Self(Some(field(iss, 20, 4))) } else { Self(None) }
    }
    /// The condition code; `None` when the syndrome does not say (then the IT state does).
    pub const fn code(self) -> Option<u8> {
        self.0
    }
}

/// A trapped WFI or WFE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wfx {
    /// True for WFE and WFET.
    pub event: bool,
    /// True for WFIT and WFET.
    pub timed: bool,
    /// The register that holds the time-out.
    pub rn: u8,
    /// The condition, in AArch32.
    pub condition: Condition,
}

/// A 32-bit coprocessor access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpAccess {
    /// Which register: opc1, CRn, CRm, opc2, as [`cp32`] makes it.
    pub register: u32,
    /// The general register.
    pub rt: u8,
    /// True for MRC.
    pub read: bool,
    /// The condition.
    pub condition: Condition,
}

/// A 64-bit coprocessor access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpPair {
    /// opc1.
    pub opc1: u8,
    /// CRm.
    pub crm: u8,
    /// The general register of the low half.
    pub rt: u8,
    /// The general register of the high half.
    pub rt2: u8,
    /// True for MRRC.
    pub read: bool,
    /// The condition.
    pub condition: Condition,
}

/// A system register, by its encoding; equal registers compare equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SysReg(u32);

impl SysReg {
    /// All that names a register in a syndrome: everything but Rt and the direction.
    const MASK: u32 = 0x3f_fc1e;

    /// From the five numbers of the assembler's `S3_0_C1_C0_0`.
    pub const fn new(op0: u32, op1: u32, crn: u32, crm: u32, op2: u32) -> Self {
        Self(op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | crm << 1)
    }
    /// op0, op1, CRn, CRm, op2.
    pub const fn parts(self) -> [u8; 5] {
        [
            field(self.0, 20, 2),
            field(self.0, 14, 3),
            field(self.0, 10, 4),
            field(self.0, 1, 4),
            field(self.0, 17, 3),
        ]
    }
}

impl core::fmt::Display for SysReg {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let [op0, op1, crn, crm, op2] = self.parts();
        write!(f, "s{op0}_{op1}_c{crn}_c{crm}_{op2}")
    }
}

/// A trapped MSR, MRS or system instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SysAccess {
    /// Which register.
    pub register: SysReg,
    /// The general register; 31 is zero.
    pub rt: u8,
    /// True for MRS.
    pub read: bool,
}

/// What kind of fault an abort was, from its status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No translation.
    Translation,
    /// The access flag is clear.
    AccessFlag,
    /// Not allowed.
    Permission,
    /// The address is wider than the machine.
    AddressSize,
    /// A device or memory refused; true when on a translation table walk.
    External(bool),
    /// Two entries of a translation cache match: a CPU that lets a block and a table replace each other in
    /// place (FEAT_BBM) may find both.
    Conflict,
    /// Anything else: alignment, unsupported atomic.
    Other(u8),
}

impl Fault {
    const fn decode(code: u8) -> Self {
        // The four of stage 2 first, by their kind: the rest are rare.
        match code >> 2 {
            0 => return Self::AddressSize,
            1 => return Self::Translation,
            2 => return Self::AccessFlag,
            3 => return Self::Permission,
            _ => {}
        }
        match code {
            0x29 | 0x2c => Self::AddressSize,
            0x2b | 0x2a => Self::Translation,
            0x10 | 0x18 => Self::External(false),
            0x12..=0x17 | 0x1a..=0x1f => Self::External(true),
            0x30 => Self::Conflict,
            other => Self::Other(other),
        }
    }
}

/// What instruction and data aborts have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort {
    /// The kind.
    pub fault: Fault,
    /// True when the guest's own table walk was refused.
    pub walk: bool,
    /// True when the fault address register was not written.
    pub no_address: bool,
}

/// A data abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataAbort {
    /// The common part.
    pub abort: Abort,
    /// True for a cache maintenance or address translation instruction.
    pub maintenance: bool,
    /// The write bit as it is; [`DataAbort::is_write`] says what it means.
    pub wnr: bool,
    /// How to complete the access by hand, when the hardware says.
    pub access: Option<Access>,
}

impl DataAbort {
    /// True when the guest must be allowed to write (DESIGN 14): a refused walk with a permission fault
    /// wants to update its descriptor; a maintenance instruction never writes, whatever the bit says.
    pub const fn is_write(self) -> bool {
        if self.abort.walk {
            return matches!(self.abort.fault, Fault::Permission);
        }
        self.wnr && !self.maintenance
    }
}

/// A load or store that the hardware described well enough to be done by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// log2 of the size in bytes.
    pub size: u8,
    /// True when a load extends the sign.
    pub sign: bool,
    /// True when the register is 64 bits wide.
    pub wide: bool,
    /// The general register; 31 is zero.
    pub rt: u8,
}

/// A coprocessor register's key: what [`CpAccess::register`] holds.
pub const fn cp32(opc1: u32, crn: u32, crm: u32, opc2: u32) -> u32 {
    opc2 << 17 | opc1 << 14 | crn << 10 | crm << 1
}

/// `width` bits (at most 8) of `value` from `shift` on.
const fn field(value: u32, shift: u32, width: u32) -> u8 {
    let bits = (value >> shift) & ((1 << width) - 1);
    #[expect(clippy::cast_possible_truncation, reason = "at most eight bits are left")]
    let bits = bits as u8;
    bits
}

impl Syndrome {
    /// The class of a syndrome.
    #[inline]
    pub const fn class(esr: u64) -> u8 {
        ((esr >> 26) & 0x3f) as u8
    }

    /// Reads a syndrome register.
    #[expect(clippy::inline_always, reason = "every exit comes by; beside that one, only an error does")]
    #[inline(always)]
    pub const fn decode(esr: u64) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
        let iss = esr as u32 & 0x1ff_ffff;
        match Self::class(esr) {
            class::UNKNOWN => Self::Unknown,
            class::WFX => Self::Wfx(Wfx {
                event: iss & 1 != 0,
                timed: iss & 2 != 0,
                rn: field(iss, 5, 5),
                condition: Condition::decode(iss),
            }),
            class::CP15_32 => Self::Cp15(CpAccess {
                register: iss & 0xf_fc1e,
                rt: field(iss, 5, 5),
                read: iss & 1 != 0,
                condition: Condition::decode(iss),
            }),
            class::CP15_64 => Self::Cp15Pair(CpPair {
                opc1: field(iss, 16, 4),
                crm: field(iss, 1, 4),
                rt: field(iss, 5, 5),
                rt2: field(iss, 10, 5),
                read: iss & 1 != 0,
                condition: Condition::decode(iss),
            }),
            class::CP14_32 | class::CP14_LS | class::CP14_64 | class::CP10_ID => {
                Self::Cp14(Condition::decode(iss))
            }
            class::FP => Self::Fp(Condition::decode(iss)),
            class::ILLEGAL => Self::Illegal,
            class::HVC32 | class::SMC32 => Self::Call32(Condition::decode(iss)),
            class::HVC64 => Self::Hvc(immediate(iss)),
            class::SMC64 => Self::Smc(immediate(iss)),
            class::SYS64 => Self::Sys(SysAccess {
                register: SysReg(iss & SysReg::MASK),
                rt: field(iss, 5, 5),
                read: iss & 1 != 0,
            }),
            class::IABT_LOWER => Self::Fetch(abort(iss)),
            class::DABT_LOWER => Self::Data(DataAbort {
                abort: abort(iss),
                maintenance: iss & (1 << 8) != 0,
                wnr: iss & (1 << 6) != 0,
                access: if iss & (1 << 24) != 0 {
                    Some(Access {
                        size: field(iss, 22, 2),
                        sign: iss & (1 << 21) != 0,
                        wide: iss & (1 << 15) != 0,
                        rt: field(iss, 16, 5),
                    })
                } else {
                    None
                },
            }),
            other => Self::Other(other),
        }
    }
}

const fn immediate(iss: u32) -> u16 {
    #[expect(clippy::cast_possible_truncation, reason = "the immediate is the lower half")]
    let immediate = iss as u16;
    immediate
}

const fn abort(iss: u32) -> Abort {
    Abort {
        fault: Fault::decode(field(iss, 0, 6)),
        walk: iss & (1 << 7) != 0,
        no_address: iss & (1 << 10) != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn esr(class: u8, iss: u64) -> u64 {
        u64::from(class) << 26 | IL | iss
    }

    #[test]
    fn every_class_decodes_to_something() {
        for class in 0..64 {
            let decoded = Syndrome::decode(esr(class, 0));
            if let Syndrome::Other(other) = decoded {
                assert_eq!(other, class);
            }
        }
    }

    #[test]
    fn a_store_to_a_device_says_its_size_and_register() {
        // str w7, [x1]: ISV, SAS=2, SRT=7, WnR, translation fault level 3.
        let iss = 1 << 24 | 2 << 22 | 7 << 16 | 1 << 6 | 7;
        let Syndrome::Data(data) = Syndrome::decode(esr(class::DABT_LOWER, iss)) else {
            panic!("not a data abort")
        };
        assert_eq!(data.access, Some(Access { size: 2, sign: false, wide: false, rt: 7 }));
        assert_eq!(data.abort.fault, Fault::Translation);
        assert!(data.is_write());
    }

    #[test]
    fn cache_maintenance_is_never_a_write() {
        let iss = 1 << 8 | 1 << 6 | 0xf;
        let Syndrome::Data(data) = Syndrome::decode(esr(class::DABT_LOWER, iss)) else {
            panic!("not a data abort")
        };
        assert!(!data.is_write());
    }

    #[test]
    fn a_walk_refused_by_permission_is_a_write_and_by_translation_a_read() {
        let walk = |code: u64| {
            let decoded = Syndrome::decode(esr(class::DABT_LOWER, 1 << 7 | code));
            let Syndrome::Data(data) = decoded else { panic!("not a data abort") };
            data.is_write()
        };
        assert!(walk(0xf));
        assert!(!walk(0x7));
    }

    #[test]
    fn a_system_register_compares_by_its_five_numbers() {
        // mrs x5, s3_0_c0_c4_0
        let reg = SysReg::new(3, 0, 0, 4, 0);
        let iss = 3 << 20 | 5 << 5 | 4 << 1 | 1;
        let access = SysAccess { register: reg, rt: 5, read: true };
        assert_eq!(Syndrome::decode(esr(class::SYS64, iss)), Syndrome::Sys(access));
        assert_eq!(SysReg::new(3, 3, 14, 2, 1).parts(), [3, 3, 14, 2, 1]);
    }

    #[test]
    fn a_condition_is_there_only_when_the_syndrome_says_so() {
        let with = Syndrome::decode(esr(class::FP, 1 << 24 | 0xb << 20));
        let without = Syndrome::decode(esr(class::FP, 0xb << 20));
        assert_eq!(with, Syndrome::Fp(Condition(Some(0xb))));
        assert_eq!(without, Syndrome::Fp(Condition(None)));
    }
}
