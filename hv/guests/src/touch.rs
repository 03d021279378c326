//! Writes and reads every page of its RAM. Fresh RAM must be zero, and what was written must be there.
//!
//! Options: `passes=2`.

use hv_abi::machine::RAM_BASE;

use crate::memory::{peek, poke};
use crate::mmu;
use crate::runtime::Machine;

const PAGE: u64 = 4096;
/// What the loader puts the tree into.
const TREE_ROOM: u64 = 0x1_0000;

/// Touches all RAM but its own image and the tree.
pub fn run(machine: &Machine) {
    mmu::enable();
    let (start, end) = machine.image();
    let pages = || {
        let all = (RAM_BASE + TREE_ROOM..machine.end()).step_by(4096);
        all.filter(move |page| !(start..end).contains(page))
    };
    for page in pages() {
        for at in [page, page + PAGE / 2, page + PAGE - 8] {
            assert_eq!(peek(at), 0, "fresh RAM at {at:#x}");
        }
    }
    for pass in 1..=machine.option("passes", 2) {
        for page in pages() {
            poke(page, pattern(page, pass));
            poke(page + PAGE - 8, !pattern(page, pass));
        }
        for page in pages() {
            assert_eq!(peek(page), pattern(page, pass), "the start of page {page:#x} in pass {pass}");
            assert_eq!(peek(page + PAGE - 8), !pattern(page, pass), "the end of page {page:#x}");
            assert_eq!(peek(page + PAGE / 2), 0, "the middle of page {page:#x}");
        }
    }
    println!("touched {} pages", pages().count());
}

fn pattern(page: u64, pass: u64) -> u64 {
    page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ pass
}
