//! The vector registers, FPCR and FPSR.

use super::Ledger;
use crate::runtime::Random;

/// All of them.
#[repr(C, align(16))]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Vectors {
    q: [[u64; 2]; 32],
    control: u64,
    status: u64,
}

impl Vectors {
    /// Gives each a value.
    pub(super) fn fill(random: &mut Random) -> Self {
        let mut vectors = Self { q: [[0; 2]; 32], control: 0, status: 0 };
        for q in &mut vectors.q {
            *q = [random.draw(), random.draw()];
        }
        // Rounding mode and flush to zero; the cumulative flags.
        vectors.control = random.draw() & 0x01c0_0000;
        vectors.status = random.draw() & 0x0800_001f;
        load(&vectors);
        vectors
    }

    /// Looks at them.
    pub(super) fn check(&self, ledger: &Ledger) {
        let mut seen = Self { q: [[0; 2]; 32], ..*self };
        store(&mut seen);
        assert!(seen == *self, "the vector registers in round {}", ledger.round);
    }
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
