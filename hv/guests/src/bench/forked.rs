//! What a fork makes dearer later: a child's first reads and writes of its parent's pages, and a survivor's writes.
//!
//! The child measures while the parent sleeps; each then waits for a byte, so that whoever looks on can read the
//! child's figures. With `survive` the child dies at once and the parent measures, all its pages being write-protected
//! and nobody else's; then it forks again and dies, and its child is the last to refer to them.

use hv_abi::call::{status, vendor};
use hv_abi::machine::{INTID_VIRTUAL_TIMER, RAM_BASE};

use super::{Touch, faults};
use crate::memory::poke;
use crate::power::{self, hvc};
use crate::runtime::Machine;
use crate::timer::{self, milliseconds};
use crate::{console, gic};

/// Pages of one figure.
const PAGES: u64 = 1024;
/// Figures with pages of their own.
const REGIONS: u64 = 4;
/// For how long one sleeps while the other works: far longer than that takes, and asleep it costs nothing.
const ASLEEP_MS: u64 = 200;

pub(super) fn run(machine: &Machine, empty: u64) {
    let first = (RAM_BASE + machine.memory / 4).next_multiple_of(2 << 20);
    let region = |which: u64| first + which * PAGES * 4096;
    assert!(region(REGIONS) <= machine.end(), "too little RAM for this");
    for page in (first..region(REGIONS)).step_by(4096) {
        poke(page, page);
    }
    gic::enable(INTID_VIRTUAL_TIMER);
    let measure =
        |metric, touch, which| faults(metric, touch, PAGES, empty, region(which), region(which + 1));
    let place = if machine.flag("survive") {
        if fork(1) == 1 {
            power::off();
        }
        sleep();
        measure("fault.write_protect", Touch::Write, 0);
        let place = fork(1);
        if place == 0 {
            println!("bench: the parent goes");
            power::off();
        }
        sleep();
        measure("fault.cow_last_ref", Touch::Write, 2);
        place
    } else {
        let place = fork(1);
        if place == 1 {
            measure("fault.shared_read", Touch::Read, 0);
            measure("fault.cow", Touch::Write, 2);
        } else {
            sleep();
        }
        place
    };
    println!("bench: place {place} waits");
    console::read();
}

/// Which of the relatives this is: 0 the parent, from 1 on a child.
pub(super) fn fork(children: u64) -> u64 {
    let [answer, place, ..] = hvc(vendor::FORK.into(), [children, 0, 0]);
    assert_eq!(answer.cast_signed(), status::SUCCESS, "the fork");
    place
}

fn sleep() {
    let end = timer::now() + milliseconds(ASLEEP_MS);
    timer::arm(end);
    while timer::now() < end {
        instruction!("wfi");
    }
}
