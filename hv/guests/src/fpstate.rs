//! Fills every register that a hypervisor must switch with a pattern, and looks at it for a while: when
//! several of these run on one CPU with different seeds, each must see its own only.
//!
//! Options: `ms=500`, `seed=1`; with `fork` it forks a child in the middle, which must find them all, too.

use hv_abi::call::{status, vendor};

use crate::mmu;
use crate::power::hvc;
use crate::runtime::{Machine, Random};
use crate::timer::{milliseconds, now};

/// The vector registers, FPCR and FPSR.
#[repr(C, align(16))]
#[derive(Clone, Copy, PartialEq, Eq)]
struct Vectors {
    q: [[u64; 2]; 32],
    control: u64,
    status: u64,
}

macro_rules! registers {
    ($($name:literal & $mask:expr),* $(,)?) => {
        const NAMES: &[&str] = &[$($name),*];
        /// Writes each, as far as random bits are allowed there.
        fn fill(random: &mut Random) {
            $(write_register!($name, random.draw() & $mask);)*
        }
        /// Reads each.
        fn read() -> [u64; NAMES.len()] {
            [$(read_register!($name)),*]
        }
    };
}

const ALL: u64 = !0;
/// An address in the upper half, or the lower.
const ADDRESS: u64 = 0x0000_ffff_ffff_fffc;

// Nothing that this guest runs on: not its tables, stack or vectors; and nothing switched on.
registers! {
    "tpidr_el0" & ALL,
    "tpidrro_el0" & ALL,
    "tpidr_el1" & ALL,
    "contextidr_el1" & 0xffff_ffff,
    "sp_el0" & ALL,
    "ttbr1_el1" & 0x0000_0fff_ffff_f000,
    "elr_el1" & ADDRESS,
    "spsr_el1" & 0xf000_0000,
    "esr_el1" & 0x03ff_ffff,
    "far_el1" & ADDRESS,
    "par_el1" & 0xffff_f000,
    "amair_el1" & ALL,
    "afsr0_el1" & 0xffff_ffff,
    "afsr1_el1" & 0xffff_ffff,
    "csselr_el1" & 1,
    "cntkctl_el1" & 0x3,
    "cntv_cval_el0" & ALL,
    "cntp_cval_el0" & ALL,
    "mdscr_el1" & (1 << 12),
    "mdccint_el1" & 0,
    "dbgbvr0_el1" & ADDRESS,
    "dbgbvr1_el1" & ADDRESS,
    "dbgwvr0_el1" & ADDRESS,
    "dbgwvr1_el1" & ADDRESS,
    "dbgbcr0_el1" & 0x1e0,
    "dbgwcr0_el1" & 0x1fe0,
    "icc_pmr_el1" & 0xf8,
    "icc_bpr1_el1" & 7,
    "icc_igrpen0_el1" & 1,
    "icc_igrpen1_el1" & 1,
}

/// The keys of pointer authentication, where there is such a thing.
mod keys {
    use super::Random;
    registers! {
        "s3_0_c2_c1_0" & !0, "s3_0_c2_c1_1" & !0, "s3_0_c2_c1_2" & !0, "s3_0_c2_c1_3" & !0,
        "s3_0_c2_c2_0" & !0, "s3_0_c2_c2_1" & !0, "s3_0_c2_c2_2" & !0, "s3_0_c2_c2_3" & !0,
        "s3_0_c2_c3_0" & !0, "s3_0_c2_c3_1" & !0,
    }
    /// True when the CPU has them.
    pub(super) fn exist() -> bool {
        // APA, API; APA3.
        read_register!("s3_0_c0_c6_1") & 0xff0 != 0 || read_register!("s3_0_c0_c6_2") & 0xf000 != 0
    }
    /// Writes and reads them all.
    pub(super) fn start(random: &mut Random) -> [u64; NAMES.len()] {
        fill(random);
        read()
    }
    /// Compares.
    pub(super) fn check(want: &[u64; NAMES.len()], round: u64) {
        for ((name, want), got) in NAMES.iter().zip(want).zip(read()) {
            assert_eq!(got, *want, "{name} in round {round}");
        }
    }
}

/// The round in which a guest forks that is to.
const FORKED: u64 = 100;

/// Looks until time is up.
pub fn run(machine: &Machine) {
    mmu::enable();
    let mut random = Random::new(machine.option("seed", 1));
    write_register!("cpacr_el1", 3 << 20);
    let mut vectors = Vectors { q: [[0; 2]; 32], control: 0, status: 0 };
    for q in &mut vectors.q {
        *q = [random.draw(), random.draw()];
    }
    // Rounding mode and flush to zero; the cumulative flags.
    vectors.control = random.draw() & 0x01c0_0000;
    vectors.status = random.draw() & 0x0800_001f;
    load(&vectors);
    fill(&mut random);
    let want = read();
    let with_keys = keys::exist();
    let keys = with_keys.then(|| keys::start(&mut random));
    let end = now() + milliseconds(machine.option("ms", 500));
    let mut round = 0;
    let mut seen = vectors;
    let mut place = 0;
    while now() < end {
        round += 1;
        if round == FORKED && machine.flag("fork") {
            // All is in place, in the registers of a CPU. Nothing is printed while it is.
            let [answer, which, ..] = hvc(vendor::FORK.into(), [1, 0, 0]);
            assert_eq!(answer.cast_signed(), status::SUCCESS, "the fork");
            place = which;
        }
        for q in &mut seen.q {
            *q = [0; 2];
        }
        store(&mut seen);
        assert!(seen == vectors, "the vector registers in round {round}");
        for ((name, want), got) in NAMES.iter().zip(want).zip(read()) {
            assert_eq!(got, want, "{name} in round {round}");
        }
        if let Some(keys) = &keys {
            keys::check(keys, round);
        }
        if round % 16 == 0 {
            // The floating-point unit is given up and taken again.
            write_register!("cpacr_el1", 0);
            write_register!("cpacr_el1", 3 << 20);
        }
    }
    println!("{round} rounds, place {place}");
}

fn load(from: &Vectors) {
    // SAFETY: reads `from`; the compiler uses none of these registers on this target.
    unsafe {
        core::arch::asm!(
            ".arch_extension fp",
            ".arch_extension simd",
            "ldp q0, q1, [{at}], #32",
            "ldp q2, q3, [{at}], #32",
            "ldp q4, q5, [{at}], #32",
            "ldp q6, q7, [{at}], #32",
            "ldp q8, q9, [{at}], #32",
            "ldp q10, q11, [{at}], #32",
            "ldp q12, q13, [{at}], #32",
            "ldp q14, q15, [{at}], #32",
            "ldp q16, q17, [{at}], #32",
            "ldp q18, q19, [{at}], #32",
            "ldp q20, q21, [{at}], #32",
            "ldp q22, q23, [{at}], #32",
            "ldp q24, q25, [{at}], #32",
            "ldp q26, q27, [{at}], #32",
            "ldp q28, q29, [{at}], #32",
            "ldp q30, q31, [{at}], #32",
            "ldp {a}, {b}, [{at}]",
            "msr fpcr, {a}",
            "msr fpsr, {b}",
            at = inout(reg) from => _,
            a = out(reg) _,
            b = out(reg) _,
            options(nostack)
        );
    }
}

fn store(to: &mut Vectors) {
    // SAFETY: writes `to`.
    unsafe {
        core::arch::asm!(
            ".arch_extension fp",
            ".arch_extension simd",
            "stp q0, q1, [{at}], #32",
            "stp q2, q3, [{at}], #32",
            "stp q4, q5, [{at}], #32",
            "stp q6, q7, [{at}], #32",
            "stp q8, q9, [{at}], #32",
            "stp q10, q11, [{at}], #32",
            "stp q12, q13, [{at}], #32",
            "stp q14, q15, [{at}], #32",
            "stp q16, q17, [{at}], #32",
            "stp q18, q19, [{at}], #32",
            "stp q20, q21, [{at}], #32",
            "stp q22, q23, [{at}], #32",
            "stp q24, q25, [{at}], #32",
            "stp q26, q27, [{at}], #32",
            "stp q28, q29, [{at}], #32",
            "stp q30, q31, [{at}], #32",
            "mrs {a}, fpcr",
            "mrs {b}, fpsr",
            "stp {a}, {b}, [{at}]",
            at = inout(reg) to => _,
            a = out(reg) _,
            b = out(reg) _,
            options(nostack)
        );
    }
}
