//! Asks its disk for something and goes on meanwhile: for whoever clones or resets it while the disk takes its time.
//!
//! When `w` is typed it writes a sector of a page of the disk that it never had to do with before, so that the rest of that
//! page has to come first; when `?` is typed it says how far it is. What it asked for must be answered once: when it
//! is, the page is read back, and an answer more than there were questions ends it. The disk has at each eight bytes
//! their own place.

use hv_abi::machine::RAM_BASE;

use crate::console;
use crate::memory::{peek, poke};
use crate::mmio::{read8, write8};
use crate::mmu;
use crate::runtime::Machine;
use crate::virtio::{Queue, Transport, low};

const PAGE: u64 = 4096;
const SECTOR: u64 = 512;
/// From one page that is written to the next: more than is read from the disk at once.
const APART: u64 = 128 << 10;
/// In the page, the sector that is written.
const WRITTEN: u64 = 3 * SECTOR;
/// virtio's number for a disk.
const DISK: u32 = 2;

/// A queue, and where requests lie: a header, the data behind it, the status behind that.
struct Driver {
    queue: Queue,
    request: u64,
    asked: u16,
}

impl Driver {
    fn set_up(machine: &Machine) -> Self {
        let disk = Transport::new(0);
        assert_eq!((disk.get(0), disk.get(4), disk.get(8)), (0x7472_6976, 2, DISK), "there is no disk");
        let ring = (RAM_BASE + machine.memory / 2).next_multiple_of(PAGE);
        disk.begin(0);
        let queue = Queue::new(disk, 0, ring);
        disk.go();
        Self { queue, request: ring + PAGE, asked: 0 }
    }

    fn data(&self) -> u64 {
        self.request + 16
    }

    fn status(&self) -> u64 {
        self.data() + PAGE
    }

    fn header(&mut self, kind: u64, at: u64) {
        poke(self.request, kind);
        poke(self.request + 8, at / SECTOR);
        write8(self.status(), 0xee);
        self.asked += 1;
    }

    /// Begins to write a sector of the page there.
    fn write(&mut self, page: u64) {
        self.header(1, page + WRITTEN);
        for at in (0..SECTOR).step_by(8) {
            poke(self.data() + at, !(page + WRITTEN + at));
        }
        self.queue.ask((self.request, 16 + low(SECTOR)), (self.status(), 1));
    }

    /// True when all that was asked for is answered, and well.
    fn is_answered(&self) -> bool {
        let answered = self.queue.answered();
        assert!(answered <= self.asked, "{answered} answers to {} requests", self.asked);
        let all = answered == self.asked;
        assert!(!all || self.asked == 0 || read8(self.status()) == 0, "request {answered} failed");
        all
    }

    /// Reads the page there, which has the sector that was written and else what it had.
    fn check(&mut self, page: u64) {
        self.header(0, page);
        self.queue.ask((self.request, 16), (self.data(), low(PAGE) + 1));
        assert!(self.queue.is_served() && self.is_answered(), "it is not read back");
        for at in (0..PAGE).step_by(8) {
            let written = (WRITTEN..WRITTEN + SECTOR).contains(&at);
            let expected = if written { !(page + at) } else { page + at };
            assert_eq!(peek(self.data() + at), expected, "byte {:#x} of the disk", page + at);
        }
    }
}

/// Does as it is told.
pub fn run(machine: &Machine) {
    mmu::enable();
    let mut driver = Driver::set_up(machine);
    let (mut begun, mut done) = (0, 0);
    println!("inflight: ready");
    loop {
        match console::typed() {
            Some(b'w') => {
                assert_eq!(begun, done, "one at a time");
                begun += 1;
                driver.write(begun * APART);
                println!("inflight: asks for write {begun}");
            }
            Some(b'?') => println!("inflight: {begun} begun, {done} done"),
            Some(_) | None => {}
        }
        if driver.is_answered() && done < begun {
            done = begun;
            driver.check(done * APART);
            println!("inflight: write {done} is there");
        }
    }
}
