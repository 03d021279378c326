//! Writes over what its own image calls constant, as a kernel does that patches its text, and looks again when
//! a line was typed. Fresh from the image the table must be as it was built, whatever others did to theirs.
//!
//! Options: `mark=1`, what its own values are made of.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::console;
use crate::runtime::Machine;

/// 64 KiB: sixteen pages of the image, and a part of two more.
const WORDS: usize = 8192;

/// Among the constants, though this guest writes it: a flat image has no permissions.
#[unsafe(link_section = ".rodata.scribble")]
static TABLE: [AtomicU64; WORDS] = {
    let mut table = [const { AtomicU64::new(0) }; WORDS];
    let mut index = 0;
    while index < WORDS {
        table[index] = AtomicU64::new(value(index, 0));
        index += 1;
    }
    table
};

/// What a word holds; `mark` 0 is what it was built with.
const fn value(index: usize, mark: u64) -> u64 {
    (index as u64 ^ mark << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Looks, writes, waits for a typed line, and looks again.
pub fn run(machine: &Machine) {
    let mark = machine.option("mark", 1);
    verify(0);
    for (index, word) in TABLE.iter().enumerate() {
        word.store(value(index, mark), Relaxed);
    }
    verify(mark);
    println!("scribbled {mark}");
    while console::read() != b'\r' {}
    verify(mark);
    println!("{mark} is still there");
}

fn verify(mark: u64) {
    for (index, word) in TABLE.iter().enumerate() {
        assert_eq!(word.load(Relaxed), value(index, mark), "word {index} of the table of {mark}");
    }
}
