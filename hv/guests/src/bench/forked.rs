//! What a fork makes dearer later: a child's first reads and writes of its parent's pages.
//!
//! The child measures while the parent sleeps; each then waits for a byte, so that whoever looks on can read the
//! child's figures.

use hv_abi::call::{status, vendor};
use hv_abi::machine::{INTID_VIRTUAL_TIMER, RAM_BASE};

use super::{Touch, faults};
use crate::memory::poke;
use crate::power::hvc;
use crate::runtime::Machine;
use crate::timer::{self, milliseconds};
use crate::{console, gic};

/// Pages of one figure.
const PAGES: u64 = 1024;
/// Figures with pages of their own.
const REGIONS: u64 = 4;
/// For how long the parent sleeps: far longer than the child takes, and asleep it costs nothing.
const CHILD_MS: u64 = 200;

pub(super) fn run(machine: &Machine, empty: u64) {
    let first = (RAM_BASE + machine.memory / 4).next_multiple_of(2 << 20);
    let region = |which: u64| first + which * PAGES * 4096;
    assert!(region(REGIONS) <= machine.end(), "too little RAM for this");
    for page in (first..region(REGIONS)).step_by(4096) {
        poke(page, page);
    }
    let [answer, place, ..] = hvc(vendor::FORK.into(), [1, 0, 0]);
    assert_eq!(answer.cast_signed(), status::SUCCESS, "the fork");
    let measure =
        |metric, touch, which| faults(metric, touch, PAGES, empty, region(which), region(which + 1));
    if place == 1 {
        measure("fault.shared_read", Touch::Read, 0);
        measure("fault.cow", Touch::Write, 2);
    } else {
        gic::enable(INTID_VIRTUAL_TIMER);
        let end = timer::now() + milliseconds(CHILD_MS);
        timer::arm(end);
        while timer::now() < end {
            instruction!("wfi");
        }
    }
    println!("bench: place {place} waits");
    console::read();
}
