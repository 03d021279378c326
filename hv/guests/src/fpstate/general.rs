//! The general registers, the stack pointer, and the flags: all in use at once.
//!
//! While they are, the stack pointer is at a record in memory, and everything else has a value of its own. Two registers
//! count, one up and one down, so that they tell whether a step was lost or done twice.

use hv_abi::call::{status, vendor};

use crate::memory::{peek, poke};
use crate::runtime::Random;

core::arch::global_asm!(include_str!("hold.S"));

unsafe extern "C" {
    /// Loads all registers from a record, counts or calls, and stores what they are then.
    fn fpstate_hold(record: u64);
}

/// Steps of one hold: a millisecond or two.
const STEPS: u64 = 300_000;
/// X30, which counts down; a record without steps calls instead.
const X30: u64 = 30;
/// The flags' word.
const FLAGS: u64 = 32;
/// What was found: X0 to X29 from here on, the flags, the stack pointer, and the masks.
const FOUND: u64 = 34;

/// A record.
pub(super) struct General {
    at: u64,
}

impl General {
    /// A record in these 16 KiB, at a place that another guest's is not likely to have.
    pub(super) fn new(area: u64, random: &mut Random) -> Self {
        let at = area + random.below(8) * 0x400;
        for word in 0..X30 {
            poke(at + word * 8, random.draw());
        }
        poke(at + FLAGS * 8, random.draw() & 0xf000_0000);
        Self { at }
    }

    fn word(&self, word: u64) -> u64 {
        peek(self.at + word * 8)
    }

    /// Loads all, goes on from there, and compares those from `first` on; X29 has gone up by that much.
    fn run(&self, first: u64, up: u64, round: u64) {
        (FOUND..FOUND + 33).for_each(|word| poke(self.at + word * 8, 0));
        let masks = read_register!("daif");
        // SAFETY: it uses the record and this stack, and leaves every register that it must not change as it was.
        unsafe { fpstate_hold(self.at) };
        for word in first..X30 {
            let (had, found) = (self.word(word), self.word(FOUND + word));
            let had = if word == 29 { had.wrapping_add(up) } else { had };
            assert!(found == had, "x{word} in round {round} is {found:#x}, was {had:#x}");
        }
        assert_eq!(self.word(FOUND + X30), self.word(FLAGS), "the flags in round {round}");
        assert_eq!(self.word(FOUND + 31), self.at, "the stack pointer in round {round}");
        assert_eq!(self.word(FOUND + 32), masks, "the masks in round {round}");
    }

    /// Keeps all registers for a while.
    pub(super) fn hold(&self, round: u64) {
        poke(self.at + X30 * 8, STEPS);
        self.run(0, STEPS, round);
    }

    /// Forks a child with all in place; what place this relative has.
    pub(super) fn fork(&self) -> u64 {
        let kept = [0, 1, 2, 3].map(|word| self.word(word));
        for (word, value) in [(0, vendor::FORK.into()), (1, 1), (2, 0), (3, 0), (X30, 0)] {
            poke(self.at + word * 8, value);
        }
        self.run(4, 0, 0);
        for (word, value) in (0..).zip(kept) {
            poke(self.at + word * 8, value);
        }
        assert_eq!(self.word(FOUND).cast_signed(), status::SUCCESS, "the fork");
        self.word(FOUND + 1)
    }
}
