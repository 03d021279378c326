//! What a copy fault costs, and reading in order, against the number of generations between the page and its owner.
//!
//! Who looks on makes the history: typing `w` begins a generation, and a snapshot ends it. In a guest made from one of
//! them `m` has it measure, and `r` read all that would be measured: then what was in swap is not. The pages that are
//! measured are the oldest generation's. With `one` every generation writes a page in each of their chunks, else
//! somewhere else.

use core::sync::atomic::{AtomicU64, Ordering};

use hv_abi::machine::{INTID_PL011, RAM_BASE};

use super::{SAMPLES, Samples};
use crate::memory::{peek, poke};
use crate::runtime::Machine;
use crate::{console, gic};

const PAGE: u64 = 4096;
const CHUNK: u64 = 2 << 20;
/// Chunks that are measured, and pages of each.
const CHUNKS: u64 = 8;
const PAGES: u64 = 25;
const _: () = assert!(CHUNKS * PAGES == SAMPLES as u64);
/// Generations write the first half of a chunk, and what is measured is in the second.
const HALF: u64 = CHUNK / PAGE / 2;

/// Generations so far.
static LIVED: AtomicU64 = AtomicU64::new(0);

pub(super) fn run(machine: &Machine, empty: u64) {
    let first = (RAM_BASE + machine.memory / 4).next_multiple_of(CHUNK);
    let page = |chunk: u64, page: u64| first + chunk * CHUNK + page * PAGE;
    assert!(page(CHUNKS + 1, 0) <= machine.end(), "too little RAM for this");
    gic::enable(INTID_PL011);
    console::listen();
    for chunk in 0..CHUNKS {
        // Not the first: see `measure`.
        (1..HALF).for_each(|at| poke(page(chunk, HALF + at), at));
    }
    let one = machine.flag("one");
    println!("bench: ready");
    loop {
        match console::asleep_until_typed() {
            b'w' => {
                let lived = LIVED.load(Ordering::Relaxed);
                let chunks = if one { 0..CHUNKS } else { CHUNKS..CHUNKS + 1 };
                chunks.for_each(|chunk| poke(page(chunk, lived % HALF), lived));
                LIVED.store(lived + 1, Ordering::Relaxed);
                println!("bench: generation {} lived", lived + 1);
            }
            b'r' => {
                let read = |chunk| (1..HALF).map(move |at| peek(page(chunk, HALF + at)));
                println!("bench: read {}", (0..CHUNKS).flat_map(read).sum::<u64>());
            }
            b'm' => measure(page, empty),
            _ => {}
        }
    }
}

/// The first fault of each chunk, which has to find the way, then the others in an order that no prefetching foresees; then
/// all the rest are read.
fn measure(page: impl Fn(u64, u64) -> u64, empty: u64) {
    let write = |at: u64| ticks!("str xzr, [{at}]", at = in(reg) at);
    // Its map has a shadow for itself from the first write on.
    poke(page(CHUNKS, HALF), 0);
    let mut ways = Samples { values: [0; SAMPLES], taken: 0 };
    let mut faults = Samples { values: [0; SAMPLES], taken: 0 };
    for chunk in 0..CHUNKS {
        ways.add(write(page(chunk, HALF + 1)));
        for index in 1..=PAGES {
            faults.add(write(page(chunk, HALF + 1 + index * 97 % (HALF - 1))));
        }
    }
    ways.report("fault.cow@depth", "part=first", empty);
    faults.report("fault.cow@depth", "part=later", empty);
    let read = |at: u64| ticks!("ldr {a}, [{at}]", a = out(reg) _, at = in(reg) at);
    let mut reads = Samples { values: [0; SAMPLES], taken: 0 };
    for chunk in 0..CHUNKS {
        let all = (1..HALF).map(|index| read(page(chunk, HALF + index)).saturating_sub(empty));
        reads.add(all.sum::<u64>() / (HALF - 1 - (PAGES + 1)));
    }
    reads.report("fault.shared_read@depth", "mode=sequential", 0);
    println!("bench: measured");
}
