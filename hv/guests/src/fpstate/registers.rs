//! System registers: those that any CPU has, and those that only some have, as far as the identification registers or a try
//! tell.

use super::Ledger;
use crate::memory::peek;
use crate::runtime::Random;

macro_rules! registers {
    ($($name:literal & $mask:expr, $set:expr;)*) => {
        /// Writes each, as far as random bits are allowed there.
        pub(super) fn fill(random: &mut Random) {
            $(write_register!($name, random.draw() & $mask | $set);)*
        }
        /// Looks at each.
        pub(super) fn see(ledger: &mut Ledger) {
            $(ledger.see($name, 0, read_register!($name));)*
        }
    };
}

/// What every CPU has, but for what this guest runs on.
mod plain {
    use super::{Ledger, Random};
    const ALL: u64 = !0;
    const WORD: u64 = 0xffff_ffff;

    registers! {
        "tpidr_el0" & ALL, 0;
        "tpidrro_el0" & ALL, 0;
        "tpidr_el1" & ALL, 0;
        "contextidr_el1" & WORD, 0;
        "sp_el0" & ALL, 0;
        "ttbr1_el1" & 0x00ff_0fff_ffff_f000, 0;
        "elr_el1" & ALL, 0;
        "spsr_el1" & WORD, 0;
        "esr_el1" & WORD, 0;
        "far_el1" & ALL, 0;
        "par_el1" & ALL, 0;
        "amair_el1" & ALL, 0;
        "afsr0_el1" & WORD, 0;
        "afsr1_el1" & WORD, 0;
        // A level from 2 on; reset is 0.
        "csselr_el1" & 0x9, 0x4;
        "cntkctl_el1" & 0xfb, 0x300;
    }
}

/// Looked at only: written elsewhere.
macro_rules! seen_only {
    ($($name:literal)*) => {
        fn see_others(ledger: &mut Ledger) {
            $(ledger.see($name, 0, read_register!($name));)*
        }
    };
}

seen_only! {
    "sctlr_el1" "ttbr0_el1" "tcr_el1" "mair_el1" "vbar_el1" "cpacr_el1" "daif" "mpidr_el1" "midr_el1"
    "cntv_ctl_el0" "cntv_cval_el0" "cntp_ctl_el0" "cntp_cval_el0"
    "mdscr_el1" "mdccint_el1" "oslsr_el1" "osdlr_el1"
}

/// The keys of pointer authentication.
mod keys {
    use super::{Ledger, Random};

    registers! {
        "s3_0_c2_c1_0" & !0, 0; "s3_0_c2_c1_1" & !0, 0; "s3_0_c2_c1_2" & !0, 0; "s3_0_c2_c1_3" & !0, 0;
        "s3_0_c2_c2_0" & !0, 0; "s3_0_c2_c2_1" & !0, 0; "s3_0_c2_c2_2" & !0, 0; "s3_0_c2_c2_3" & !0, 0;
        "s3_0_c2_c3_0" & !0, 0; "s3_0_c2_c3_1" & !0, 0;
    }

    /// True when the CPU has them.
    pub(super) fn exist() -> bool {
        // APA, API; APA3.
        read_register!("s3_0_c0_c6_1") & 0xff0 != 0 || read_register!("s3_0_c0_c6_2") & 0xf000 != 0
    }
}

/// DISR_EL1: not promised, for RAS is hidden, but there where the CPU has that.
mod deferred {
    registers! {
        "s3_0_c12_c1_1" & 0x00ff_ffff, 1 << 31;
    }
    use super::{Ledger, Random};

    /// True when it can be read.
    pub(super) fn exists() -> bool {
        probe!("mrs {a}, s3_0_c12_c1_1", a = out(reg) _).is_none()
    }
}

/// Parts of the processor's state that came later, each with the field that says so: register, shift, and least value.
macro_rules! state_bits {
    ($($name:literal: $id:literal $shift:literal $least:literal, $bit:literal;)*) => {
        fn fill_state(random: &mut Random) {
            $(if read_register!($id) >> $shift & 0xf >= $least {
                write_register!($name, (random.draw() & 1) << $bit);
            })*
        }
        fn see_state(ledger: &mut Ledger) {
            $(if read_register!($id) >> $shift & 0xf >= $least {
                ledger.see($name, 0, read_register!($name));
            })*
        }
    };
}

state_bits! {
    "s3_0_c4_c2_3": "s3_0_c0_c7_1" 20 1, 22; // PAN
    "s3_0_c4_c2_4": "s3_0_c0_c7_2" 4 1, 23; // UAO
    "s3_3_c4_c2_5": "s3_0_c0_c4_0" 48 1, 24; // DIT
    "s3_3_c4_c2_6": "s3_0_c0_c4_1" 4 2, 12; // SSBS
}

/// Breakpoints and watchpoints by number, which is part of the instruction.
macro_rules! slots {
    ($($n:literal)*) => {
        fn fill_slots(random: &mut Random, breakpoints: u64, watchpoints: u64) {
            $(if $n < breakpoints {
                write_register!(concat!("dbgbvr", $n, "_el1"), random.draw() & ADDRESS);
                write_register!(concat!("dbgbcr", $n, "_el1"), random.draw() & CONTROL);
            }
            if $n < watchpoints {
                write_register!(concat!("dbgwvr", $n, "_el1"), random.draw() & ADDRESS);
                write_register!(concat!("dbgwcr", $n, "_el1"), random.draw() & CONTROL);
            })*
        }
        fn see_slots(ledger: &mut Ledger, breakpoints: u64, watchpoints: u64) {
            $(if $n < breakpoints {
                ledger.see("dbgbvr", $n, read_register!(concat!("dbgbvr", $n, "_el1")));
                ledger.see("dbgbcr", $n, read_register!(concat!("dbgbcr", $n, "_el1")));
            }
            if $n < watchpoints {
                ledger.see("dbgwvr", $n, read_register!(concat!("dbgwvr", $n, "_el1")));
                ledger.see("dbgwcr", $n, read_register!(concat!("dbgwcr", $n, "_el1")));
            })*
        }
        fn watch(slot: u64, at: u64, control: u64) {
            match slot {
                $($n => {
                    write_register!(concat!("dbgwvr", $n, "_el1"), at);
                    write_register!(concat!("dbgwcr", $n, "_el1"), control);
                })*
                _ => panic!("watchpoint {slot}"),
            }
        }
    };
}

slots! { 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 }

/// An address in the upper half, or the lower.
const ADDRESS: u64 = 0x0000_ffff_ffff_fffc;
/// All of a control register but the enable bit, and what asks for a match at EL2.
const CONTROL: u64 = 0x1fff_1ffe;
/// A watchpoint for loads and stores of a doubleword at EL1, on.
const WATCHED: u64 = 0xff << 5 | 3 << 3 | 1 << 1 | 1;
/// MDSCR_EL1: exceptions for watchpoints, and in the kernel, too; users do not get at the channel.
const MDE: u64 = 1 << 15;
const KDE: u64 = 1 << 13;
const TDCC: u64 = 1 << 12;

/// Breakpoints and watchpoints that there are.
fn debug_slots() -> (u64, u64) {
    let dfr0 = read_register!("id_aa64dfr0_el1");
    ((dfr0 >> 12 & 0xf) + 1, (dfr0 >> 20 & 0xf) + 1)
}

/// Writes all; the last watchpoint is on, for the word at `watched`.
pub(super) fn fill(random: &mut Random, odd: bool, watched: u64) {
    plain::fill(random);
    translation(random, odd);
    timers(random, odd);
    if keys::exist() {
        keys::fill(random);
    }
    if deferred::exists() {
        deferred::fill(random);
    }
    fill_state(random);
    let (breakpoints, watchpoints) = debug_slots();
    fill_slots(random, breakpoints, watchpoints);
    watch(watchpoints - 1, watched, WATCHED);
    // Only where it can fire do the exceptions get through, in the end; and only there SErrors, of which there are none.
    write_register!("mdscr_el1", if odd { MDE | KDE } else { TDCC });
    write_register!("mdccint_el1", if odd { 1 << 30 } else { 1 << 29 });
    write_register!("oslar_el1", u64::from(!odd));
    write_register!("osdlr_el1", u64::from(!odd));
    if odd {
        instruction!("msr daifclr, #4");
    }
}

/// What this guest runs on: what it does not use of that.
fn translation(random: &mut Random, odd: bool) {
    // For EL0, which nobody is at: alignment, barriers, SETEND, masks, DC ZVA, CTR, WFI, WFE, byte order, maintenance.
    const USER: u64 =
        1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 14 | 1 << 15 | 1 << 16 | 1 << 18 | 1 << 24 | 1 << 26;
    let sctlr = read_register!("sctlr_el1");
    write_register!("sctlr_el1", sctlr & !USER | random.draw() & USER);
    // The upper half is off: its size, caching, tag.
    let upper = (16 + random.below(24)) << 16 | random.draw() & (0xf << 24 | 1 << 38) | 2 << 30;
    write_register!("tcr_el1", read_register!("tcr_el1") & !(0x3f << 16) | upper);
    write_register!("ttbr0_el1", read_register!("ttbr0_el1") | (1 + random.below(0xff)) << 48);
    write_register!("mair_el1", read_register!("mair_el1") & 0xffff | random.draw() << 16);
    if !odd {
        write_register!("vbar_el1", read_register!("vbar_el1") + 2048);
    }
}

/// One timer's time has come, and it is masked; the other's is far, and it is on.
fn timers(random: &mut Random, odd: bool) {
    let (near, far) = (random.draw() & 0xffff | 1, random.draw() >> 2 | 1 << 61);
    if odd {
        write_register!("cntv_cval_el0", near);
        write_register!("cntv_ctl_el0", 3);
        write_register!("cntp_cval_el0", far);
        write_register!("cntp_ctl_el0", 1);
    } else {
        write_register!("cntv_cval_el0", far);
        write_register!("cntv_ctl_el0", 1);
        write_register!("cntp_cval_el0", near);
        write_register!("cntp_ctl_el0", 3);
    }
}

/// Looks at all.
pub(super) fn see(ledger: &mut Ledger) {
    plain::see(ledger);
    see_others(ledger);
    if keys::exist() {
        keys::see(ledger);
    }
    see_state(ledger);
    let (breakpoints, watchpoints) = debug_slots();
    see_slots(ledger, breakpoints, watchpoints);
    if deferred::exists() {
        deferred::see(ledger);
    }
}

/// The watchpoint that was on all the time fires.
pub(super) fn end(odd: bool, watched: u64) {
    const WATCHPOINT_HERE: u64 = 0x35;
    if odd {
        peek(watched);
        instruction!("msr daifclr, #8\nisb");
        let fault = probe!("ldr {at}, [{at}]", at = inout(reg) watched => _);
        instruction!("msr daifset, #8\nisb");
        assert_eq!(fault.map(crate::trap::Fault::class), Some(WATCHPOINT_HERE), "the watchpoint");
    }
}
