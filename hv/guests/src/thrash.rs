//! Writes every word of its RAM and reads every word back, round after round, with another pattern each time; for
//! hosts that have less memory than this, whose disks may fail. A page that answers with an external abort is given up, and
//! counted: it cannot be read, which is allowed. A word that reads as what was not written is not.
//!
//! Options: `rounds=3`, or with `typed` as many as begin before a line is typed; `seed=1`; `words=512` of each page;
//! `stride=1`, where an odd number of pages lies between one and the next, so that with few words every instruction needs
//! another page.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hv_abi::machine::RAM_BASE;

use crate::runtime::Machine;
use crate::trap::Fault;
use crate::{console, mmu};

const PAGE: u64 = 4096;
/// What the loader puts the tree into.
const TREE_ROOM: u64 = 0x1_0000;
/// Pages that can be told apart: 512 MiB. A bit for each that was given up.
const PAGES: u64 = 1 << 17;
static GIVEN_UP: [AtomicU64; (PAGES / 64) as usize] = [const { AtomicU64::new(0) }; (PAGES / 64) as usize];

/// Fills and compares all RAM but its own image and the tree.
pub fn run(machine: &Machine) {
    mmu::enable();
    let (start, end) = machine.image();
    assert!(machine.memory <= PAGES * PAGE, "more than {PAGES} pages");
    let (all, stride) = (machine.memory / PAGE, machine.option("stride", 1));
    assert!(stride % 2 == 1 && (stride == 1 || all.is_power_of_two()), "pages would be left out");
    let pages = || {
        let all = (0..all).map(move |number| RAM_BASE + number * stride % all * PAGE);
        all.filter(move |page| *page >= RAM_BASE + TREE_ROOM && !(start - start % PAGE..end).contains(page))
    };
    let words = machine.option("words", PAGE / 8);
    let seed = machine.option("seed", 1);
    let (until_typed, rounds) = (machine.flag("typed"), machine.option("rounds", 3));
    let (mut done, mut typed) = (0, None);
    while if until_typed { typed.is_none() } else { done < rounds } {
        let round = done + 1;
        let key = seed << 32 | round;
        pages().for_each(|page| each_word(page, words, |at| write(at, value(at, key))));
        println!("thrash: round {round} is written");
        pages().for_each(|page| {
            each_word(page, words, |at| {
                let read = read(at)?;
                assert_eq!(read, value(at, key), "at {at:#x} in round {round}");
                Ok(())
            });
        });
        println!("thrash: round {round} is read");
        done = round;
        typed = until_typed.then(console::typed).flatten();
    }
    while typed.is_some_and(|byte| byte != b'\r') {
        typed = Some(console::read());
    }
    let lost: u32 = GIVEN_UP.iter().map(|word| word.load(Relaxed).count_ones()).sum();
    println!("thrash: {} pages, {done} rounds, {lost} given up", pages().count());
}

/// What a word holds.
const fn value(at: u64, key: u64) -> u64 {
    (at ^ key.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ key
}

/// Does something to the first words of a page, unless the page has been given up or is now.
fn each_word(page: u64, words: u64, mut what: impl FnMut(u64) -> Result<(), Fault>) {
    let number = (page - RAM_BASE) / PAGE;
    let bits = &GIVEN_UP[(number / 64) as usize];
    let bit = 1 << (number % 64);
    if bits.load(Relaxed) & bit != 0 {
        return;
    }
    for at in (0..words).map(|word| page + word * 8) {
        if let Err(fault) = what(at) {
            assert!(fault.is_external_abort() && fault.far == at, "at {at:#x}: {fault:x?}");
            bits.fetch_or(bit, Relaxed);
            return;
        }
    }
}

fn read(at: u64) -> Result<u64, Fault> {
    let value: u64;
    probe!("ldr {value}, [{at}]", value = out(reg) value, at = in(reg) at).map_or(Ok(value), Err)
}

fn write(at: u64, value: u64) -> Result<(), Fault> {
    probe!("str {value}, [{at}]", value = in(reg) value, at = in(reg) at).map_or(Ok(()), Err)
}
