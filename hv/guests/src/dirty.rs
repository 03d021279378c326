//! Writes every page of its RAM, then as many as it is told to, again and again: for whoever wants to know what was
//! written since.
//!
//! Two letters are typed to it: the first says how many pages, the second how far one is from the next, as the powers of
//! two from `a` = 1 on.

use hv_abi::machine::RAM_BASE;

use crate::memory::poke;
use crate::runtime::Machine;
use crate::{console, mmu};

const PAGE: u64 = 4096;
/// Where the pages are: above the image.
const START: u64 = RAM_BASE + 0x20_0000;

/// Writes, and waits to be told more.
pub fn run(machine: &Machine) {
    mmu::enable();
    let (_, end) = machine.image();
    assert!(end <= START, "the image reaches up to {end:#x}");
    for page in (START..machine.end()).step_by(4096) {
        poke(page, page);
    }
    println!("dirty: all pages are written");
    for round in 1_u64.. {
        let (pages, apart) = (power(), power());
        let all = (START..machine.end()).step_by(usize::try_from(apart * PAGE).unwrap_or(usize::MAX));
        let mut written = 0;
        for page in all.zip(0..pages).map(|(page, _)| page) {
            poke(page, page ^ round);
            written += 1;
        }
        println!("dirty: {written} pages are written");
    }
}

/// The number that is typed next: a letter.
fn power() -> u64 {
    loop {
        let typed = console::read();
        if typed.is_ascii_lowercase() {
            return 1 << (typed - b'a');
        }
    }
}
