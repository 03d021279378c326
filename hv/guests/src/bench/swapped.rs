//! What comes back from swap, and what goes there although many share it: the harness outside says when.
//!
//! With `swap` it writes pages, waits for a byte while they are paged out, and reads them back. With `evict` it writes
//! pages and has so many `children`, which read them all and then sleep for ever; for each byte that it gets it then writes
//! some pages of its own, until memory is short and those go that nobody uses. `pages=1024` of each kind.

use hv_abi::machine::RAM_BASE;

use super::forked::fork;
use super::{Touch, faults};
use crate::console;
use crate::memory::{peek, poke};
use crate::runtime::Machine;

/// Pages that are written for a byte.
const MORE: u64 = 512;

/// The address behind so many pages of what is used here.
fn place(machine: &Machine, pages: u64) -> u64 {
    let first = (RAM_BASE + machine.memory / 8).next_multiple_of(2 << 20);
    let at = first + pages * 4096;
    assert!(at <= machine.end(), "too little RAM for this");
    at
}

/// Measures what a page costs that comes back.
pub(super) fn run(machine: &Machine, empty: u64) {
    let pages = machine.option("pages", 1024);
    let region = |which: u64| place(machine, which * pages);
    write(region(0), region(2));
    println!("bench: {} pages are written", 2 * pages);
    console::read();
    faults("fault.swap_in", Touch::Read, pages, empty, region(0), region(1));
    for page in (region(0)..region(2)).step_by(4096) {
        assert_eq!(peek(page), page, "what came back");
    }
    println!("bench: they are read");
    console::read();
}

/// Has pages shared by many, and then wants memory.
pub(super) fn shared(machine: &Machine) {
    let end = place(machine, machine.option("pages", 1024));
    write(place(machine, 0), end);
    if fork(machine.option("children", 1)) > 0 {
        (place(machine, 0)..end)
            .step_by(4096)
            .for_each(|page| assert_eq!(peek(page), page, "what is shared"));
        loop {
            instruction!("wfi");
        }
    }
    println!("bench: everybody reads");
    let mut next = end;
    loop {
        console::read();
        let after = next + MORE * 4096;
        assert!(after <= machine.end(), "all RAM is written");
        write(next, after);
        next = after;
        println!("bench: more is written");
    }
}

fn write(from: u64, to: u64) {
    for page in (from..to).step_by(4096) {
        poke(page, page);
    }
}
