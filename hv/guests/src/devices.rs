//! Device registers, accessed in every way there is: those that have a syndrome work, those that have
//! none, and those that go nowhere, come back as external aborts.
//!
//! The program is called `mmio`; the module of that name has the plain accesses.

use hv_abi::call::status;
use hv_abi::forkpage;
use hv_abi::machine::{FLASH0, FLASH1, FORK_PAGE, HOLE, PL011, PL031};

use crate::memory::{call, scratch};
use crate::mmio::{read8, read16, read32, read64, write8, write16, write32};
use crate::mmu;
use crate::runtime::Machine;
use crate::trap::Fault;

const UARTDR: u64 = PL011.base;
const UARTFR: u64 = PL011.base + 0x18;
const UARTILPR: u64 = PL011.base + 0x20;
/// The last of the four bytes 0x0d, 0xf0, 0x05, 0xb1 that say "PrimeCell".
const PCELL3: u64 = PL011.base + 0xffc;

/// Every way, with the MMU off and on.
pub fn run(machine: &Machine) {
    let strict = machine.is_ours();
    for mmu in [false, true] {
        if mmu {
            mmu::enable();
        }
        plain();
        holes();
        if strict {
            without_syndrome();
            flash();
            fork_page();
        }
        odd();
    }
    if strict {
        for at in [UARTDR, UARTFR & !0xfff, PL031.base] {
            aborts("a fetch from a device", call(at));
        }
    }
    aborts("a fetch from a hole", call(HOLE));
    println!("every access has its answer");
}

/// Banks without commands: whoever asks for the CFI query finds none, and the first keeps what is in it whatever
/// is written; the second is memory.
fn flash() {
    /// Both halves of a bank get it: query, identity, status, erase, confirm, program, back to reading.
    const COMMANDS: [u32; 7] = [0x98, 0x90, 0x70, 0x20, 0xd0, 0x40, 0xff];
    for at in [FLASH0.base, FLASH0.base + 0x55 * 4, FLASH0.end() - 4] {
        let kept = read32(at);
        for command in COMMANDS {
            write32(at, command << 16 | command);
            assert_eq!(read32(at), kept, "command {command:#x} to {at:#x} has changed it");
        }
        // What has no syndrome is not skipped: the rest of what it does would be skipped with it.
        aborts("a pair to flash", probe!("stp xzr, xzr, [{at}]", at = in(reg) at & !15));
        let mut base = at;
        aborts("a store to flash with write-back", probe!("str wzr, [{at}], #4", at = inout(reg) base));
        assert_eq!((base, read32(at)), (at, kept), "an abort at {at:#x} did something");
    }
    let query = FLASH0.base + 0x10 * 4;
    write32(FLASH0.base + 0x55 * 4, 0x0098_0098);
    assert_ne!([0, 4, 8].map(|letter| read8(query + letter)), *b"QRY", "there are no commands");
    for at in [FLASH1.base, FLASH1.end() - 4] {
        for value in [0x0070_0070, 0] {
            write32(at, value);
            assert_eq!(read32(at), value, "what was written at {at:#x}");
        }
    }
}

/// What a guest that nobody granted a fork finds there.
fn fork_page() {
    let at = |register| FORK_PAGE.base + register;
    assert_eq!(read32(at(forkpage::MAGIC)), forkpage::MAGIC_VALUE, "the fork page");
    assert_eq!(read8(at(forkpage::MAGIC)), b'F', "a narrow read");
    for (count, answer) in
        [(0, status::INVALID_PARAMETERS), (1, status::DENIED), (u32::MAX, status::INVALID_PARAMETERS)]
    {
        write32(at(forkpage::FORK), count);
        assert_eq!(i64::from(read32(at(forkpage::STATUS)).cast_signed()), answer, "a fork into {count}");
    }
    for register in [forkpage::MAGIC, forkpage::STATUS, forkpage::GUEST, 0x20, 0xffc] {
        let before = read32(at(register));
        write32(at(register), !before);
        assert_eq!(read32(at(register)), before, "what only reads, at {register:#x}");
    }
    assert_eq!([0x01, 0x20, 0xffc].map(|offset| read8(at(offset))), [0; 3], "where no register is");
    assert_ne!(read32(at(forkpage::RANDOM)), read32(at(forkpage::RANDOM)), "random bits, twice the same");
    aborts("eight bytes", probe!("ldr {a}, [{at}]", a = out(reg) _, at = in(reg) FORK_PAGE.base));
    aborts("a fetch", call(FORK_PAGE.base));
}

fn aborts(what: &str, fault: Option<Fault>) {
    match fault {
        Some(fault) if fault.is_external_abort() => {}
        other => panic!("{what}: {other:x?} instead of an external abort"),
    }
}

/// Widths, sign extension, and the zero register.
fn plain() {
    let words = [0xfe0, 0xfe4, 0xff0, 0xff4, 0xff8, 0xffc].map(|offset| read32(PL011.base + offset));
    assert_eq!(words, [0x11, 0x10, 0x0d, 0xf0, 0x05, 0xb1], "the PL011's identity");
    assert_eq!((read8(PCELL3), read16(PCELL3)), (0xb1, 0xb1), "narrow reads");
    let (mut wide, mut narrow, mut kept): (u64, u64, u64);
    // SAFETY: reads of a register that only says who it is.
    unsafe {
        core::arch::asm!("ldrsb {wide}, [{at}]", "ldrsb {narrow:w}, [{at}]", "ldr wzr, [{at}]",
            "mov {kept}, xzr", wide = out(reg) wide, narrow = out(reg) narrow, kept = out(reg) kept,
            at = in(reg) PCELL3);
    };
    assert_eq!((wide, narrow, kept), (!0x4e, 0xffff_ffb1, 0), "sign extension");
    // A register that is only storage for us; its narrow stores, and one of the zero register.
    write16(UARTILPR, 0x5a);
    write8(UARTILPR, 0xa5);
    assert_eq!(read32(UARTILPR) & 0xff, 0xa5, "a narrow store");
    // SAFETY: the same register.
    unsafe { core::arch::asm!("str wzr, [{at}]", at = in(reg) UARTILPR) };
    assert_eq!(read32(UARTILPR), 0, "a store of the zero register");
}

fn holes() {
    for at in [HOLE, HOLE + 0x1000, HOLE + 0x80_0000] {
        aborts("a byte from a hole", probe!("ldrb {a:w}, [{at}]", a = out(reg) _, at = in(reg) at));
        aborts("a word from a hole", probe!("ldr {a}, [{at}]", a = out(reg) _, at = in(reg) at));
        aborts("a word to a hole", probe!("str xzr, [{at}]", at = in(reg) at));
        aborts("a pair to a hole", probe!("stp xzr, xzr, [{at}]", at = in(reg) at));
    }
    let fault = probe!("ldrb {a:w}, [{at}]", a = out(reg) _, at = in(reg) HOLE + 0x123);
    assert_eq!(fault.map(|fault| fault.far), Some(HOLE + 0x123), "the address of an abort");
}

/// What a hypervisor is told no register for.
fn without_syndrome() {
    let at = UARTFR;
    aborts(
        "a load of a pair",
        probe!("ldp {a:w}, {b:w}, [{at}]", a = out(reg) _, b = out(reg) _, at = in(reg) at),
    );
    aborts("a store of a pair", probe!("stp wzr, wzr, [{at}]", at = in(reg) UARTILPR));
    let mut base = at;
    aborts("a load with write-back", probe!("ldr {a:w}, [{at}], #4", a = out(reg) _, at = inout(reg) base));
    assert_eq!(base, at, "an abort wrote back");
    aborts("an exclusive load", probe!("ldxr {a:w}, [{at}]", a = out(reg) _, at = in(reg) at));
    // The vector unit's registers are in no syndrome either.
    write_register!("cpacr_el1", 3 << 20);
    aborts(
        "a load of a vector",
        probe!(".arch_extension fp\n.arch_extension simd\nldr s0, [{at}]", at = in(reg) at),
    );
    write_register!("cpacr_el1", 0);
}

/// What has more than one right answer: it must only come back.
fn odd() {
    // An alignment fault is right; some emulators let it through to the device, or to whoever is above.
    let misaligned = probe!("ldr {a:w}, [{at}]", a = out(reg) _, at = in(reg) UARTFR + 2);
    assert!(misaligned.is_none_or(|fault| fault.class() == 0x25), "a misaligned load: {misaligned:x?}");
    // Too wide for the device: two registers, or an abort.
    for at in [UARTFR, PL031.base] {
        for fault in [
            probe!("ldr {a}, [{at}]", a = out(reg) _, at = in(reg) at),
            probe!("str xzr, [{at}]", at = in(reg) at + 0x10),
        ] {
            assert!(fault.is_none_or(Fault::is_external_abort), "64 bits of {at:#x}: {fault:x?}");
        }
    }
    let scratch = scratch();
    for at in [UARTFR, HOLE, scratch] {
        let faults = [
            probe!("dc cvac, {at}", at = in(reg) at),
            probe!("dc civac, {at}", at = in(reg) at),
            probe!("dc ivac, {at}", at = in(reg) at),
            probe!("dc zva, {at}", at = in(reg) at),
            probe!("ic ivau, {at}", at = in(reg) at),
            probe!("at s1e1r, {at}", at = in(reg) at),
            probe!("prfm pldl1keep, [{at}]", at = in(reg) at),
        ];
        for fault in faults.into_iter().flatten() {
            assert_eq!(fault.class(), 0x25, "maintenance of {at:#x}: {fault:x?}");
        }
    }
    let kept = read64(scratch);
    write_register!("csselr_el1", 1);
    // Lines that are there, and levels, sets and ways that are not.
    for operand in [0, 1 << 6, 2, 4, 12, 14, 0xffff_fffe, 0xffff_ffff, u64::MAX] {
        for fault in [
            probe!("dc isw, {at}", at = in(reg) operand),
            probe!("dc csw, {at}", at = in(reg) operand),
            probe!("dc cisw, {at}", at = in(reg) operand),
        ] {
            assert!(fault.is_none(), "by set and way, {operand:#x}: {fault:x?}");
        }
    }
    assert_eq!((read_register!("csselr_el1"), read64(scratch)), (1, kept), "what is left of that");
}
