//! Fills EL2's heap, and writes nothing: it has its disk clear 4 KiB in each 256, sixteen times a request, each of which
//! EL2 has to remember in a leaf of its own.
//!
//! Needs a large disk of its own that takes writes, a sparse one will do. Option: `count`, how many pages it clears;
//! without it as many as the disk has room for.

use hv_abi::machine::RAM_BASE;

use crate::memory::poke;
use crate::mmio::{read8, write8};
use crate::mmu;
use crate::runtime::Machine;
use crate::virtio::{Queue, Transport, low};

/// Bytes that are cleared, and from one to the next, in sectors of 512: a page, and what a leaf of an index is for.
const CLEARED: u64 = 8;
const APART: u64 = 512;
/// Ranges of a request; the disk takes no more.
const RANGES: u64 = 16;
/// A request's bytes: its header, and a range of sixteen bytes each.
const REQUEST: u64 = 16 + 16 * RANGES;
/// virtio's numbers: a disk, the feature and the request.
const DISK: u32 = 2;
const WRITE_ZEROES: u32 = 14;
const CLEAR: u64 = 13;
/// How often it says how far it is, in requests.
const SAID: u64 = 256;

/// Clears all over its disk.
pub fn run(machine: &Machine) {
    mmu::enable();
    let disk = Transport::new(0);
    assert_eq!((disk.get(0), disk.get(4), disk.get(8)), (0x7472_6976, 2, DISK), "there is no disk");
    let ring = (RAM_BASE + machine.memory / 2).next_multiple_of(4096);
    let (request, status) = (ring + 4096, ring + 4096 + REQUEST);
    disk.begin(1 << WRITE_ZEROES);
    let mut queue = Queue::new(disk, 0, ring);
    disk.go();
    let sectors = u64::from(disk.get(0x100)) | u64::from(disk.get(0x104)) << 32;
    let count = machine.option("count", sectors / APART) / RANGES;
    for number in 0..count {
        poke(request, CLEAR);
        poke(request + 8, 0);
        for range in 0..RANGES {
            poke(request + 16 + 16 * range, (number * RANGES + range) * APART);
            poke(request + 24 + 16 * range, CLEARED);
        }
        write8(status, 0xee);
        queue.ask((request, low(REQUEST)), (status, 1));
        assert!(queue.is_served(), "the disk gives up");
        assert_eq!(read8(status), 0, "request {number} of {count}");
        if number % SAID == SAID - 1 {
            println!("zeros: {} pages cleared", (number + 1) * RANGES);
        }
    }
    println!("zeros: {} pages cleared, and that is all", count * RANGES);
}
