//! The other side, for tests: RAM, a disk that may say "wait", and a driver of the queue.

use super::blk::{Blk, Did, Medium, SLOTS};
use super::{Fault, PART, Ram};
use std::collections::BTreeMap;
use std::{vec, vec::Vec};

/// Where RAM starts, and its size.
pub(super) const RAM: u64 = 0x4000_0000;
pub(super) const RAM_BYTES: usize = 1 << 20;
/// The driver's rings: a page each.
pub(super) const TABLE: u64 = RAM;
pub(super) const AVAILABLE: u64 = RAM + 0x1000;
pub(super) const USED: u64 = RAM + 0x2000;
/// What is free for requests.
pub(super) const ROOM: u64 = RAM + 0x3000;
/// Entries of the driver's queue.
pub(super) const SIZE: u16 = 16;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// Numbers that look random (xorshift).
#[derive(Clone)]
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }
    pub(super) fn small(&mut self, limit: usize) -> usize {
        usize::try_from(self.roll()).unwrap() % limit
    }
}

/// RAM and a disk, either of which may be slow.
#[derive(Clone)]
pub(super) struct Bench {
    pub(super) ram: Vec<u8>,
    pub(super) disk: Vec<u8>,
    /// What the last flush made durable.
    pub(super) durable: Vec<u8>,
    /// One access in so many has to wait; 0 for none.
    pub(super) slow: u64,
    pub(super) dice: Dice,
    /// Accesses that reached something.
    pub(super) accesses: u64,
    /// What each slot's flush will make durable, and how often it is still to be asked for.
    passes: BTreeMap<usize, (Vec<u8>, u32)>,
    /// Page of the disk that cannot be read or written.
    pub(super) broken: Option<u64>,
}

fn place(at: u64, base: u64, len: usize, all: usize) -> Option<core::ops::Range<usize>> {
    let start = usize::try_from(at.checked_sub(base)?).ok()?;
    let end = start.checked_add(len)?;
    (end <= all).then_some(start..end)
}

impl Bench {
    pub(super) fn new(sectors: usize, slow: u64, seed: u64) -> Self {
        let disk: Vec<u8> = (0..sectors * 512).map(|n| (n / 512 + n % 7).to_le_bytes()[0]).collect();
        let durable = disk.clone();
        let (ram, dice, passes) = (vec![0; RAM_BYTES], Dice(seed | 1), BTreeMap::new());
        Self { ram, disk, durable, slow, dice, accesses: 0, passes, broken: None }
    }

    fn wait(&mut self) -> Result<(), Fault<u64>> {
        if self.slow > 0 && self.dice.below(self.slow) == 0 {
            return Err(Fault::Wait(self.dice.roll()));
        }
        self.accesses += 1;
        Ok(())
    }

    fn of_disk(&mut self, at: u64, len: usize) -> Result<core::ops::Range<usize>, Fault<u64>> {
        self.wait()?;
        assert!(at % 4096 + len as u64 <= 4096, "a piece crosses a page of the disk");
        if self.broken == Some(at / 4096) {
            return Err(Fault::Bad);
        }
        Ok(place(at, 0, len, self.disk.len()).expect("the device was to see that this is on the disk"))
    }

    pub(super) fn bytes(&self, at: u64, len: usize) -> &[u8] {
        &self.ram[place(at, RAM, len, RAM_BYTES).unwrap()]
    }

    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.ram[place(at, RAM, bytes.len(), RAM_BYTES).unwrap()].copy_from_slice(bytes);
    }

    pub(super) fn word(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.bytes(at, 2).try_into().unwrap())
    }
}

impl Ram for Bench {
    type Wait = u64;
    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Fault<u64>> {
        self.wait()?;
        out.copy_from_slice(&self.ram[place(at, RAM, out.len(), RAM_BYTES).ok_or(Fault::Bad)?]);
        Ok(())
    }
    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Fault<u64>> {
        self.wait()?;
        self.ram[place(at, RAM, bytes.len(), RAM_BYTES).ok_or(Fault::Bad)?].copy_from_slice(bytes);
        Ok(())
    }
}

impl Medium for Bench {
    fn load(&mut self, at: u64, out: &mut [u8]) -> Result<(), Fault<u64>> {
        let place = self.of_disk(at, out.len())?;
        out.copy_from_slice(&self.disk[place]);
        Ok(())
    }
    fn store(&mut self, at: u64, bytes: &[u8]) -> Result<(), Fault<u64>> {
        let place = self.of_disk(at, bytes.len())?;
        self.disk[place].copy_from_slice(bytes);
        Ok(())
    }
    fn clear(&mut self, at: u64, bytes: u64) -> Result<u64, Fault<u64>> {
        self.wait()?;
        assert!(at.is_multiple_of(4096) && bytes.is_multiple_of(4096), "parts of pages are not cleared");
        assert_eq!(at / PART, (at + bytes - 1) / PART, "too much at once");
        let bytes = bytes.min(7 * 4096);
        let range = place(at, 0, usize::try_from(bytes).unwrap(), self.disk.len()).unwrap();
        self.disk[range].fill(0);
        Ok(bytes)
    }
    fn flush(&mut self, slot: usize, first: bool) -> Result<bool, Fault<u64>> {
        assert!(slot < SLOTS);
        if first {
            self.passes.insert(slot, (self.disk.clone(), 3));
        }
        let (disk, left) = self.passes.entry(slot).or_insert((self.disk.clone(), 3));
        *left -= 1;
        match *left {
            0 => {
                self.durable = disk.clone();
                self.passes.remove(&slot);
                Ok(true)
            }
            1 => Ok(false),
            _ => Err(Fault::Wait(u64::MAX)),
        }
    }
}

/// One buffer of a request: where, how long, and whether the device writes it.
#[derive(Clone, Copy)]
pub(super) struct Buffer(pub(super) u64, pub(super) u32, pub(super) bool);

/// A descriptor as it lies in memory.
pub(super) fn descriptor(at: u64, bytes: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&at.to_le_bytes());
    raw[8..12].copy_from_slice(&bytes.to_le_bytes());
    raw[12..14].copy_from_slice(&flags.to_le_bytes());
    raw[14..].copy_from_slice(&next.to_le_bytes());
    raw
}

/// A driver with its device.
#[derive(Clone)]
pub(super) struct Driver {
    pub(super) blk: Blk,
    pub(super) bench: Bench,
    next: u16,
    free: u16,
    seen: u16,
}

impl Driver {
    /// Sets the device up as a well-behaved driver does.
    pub(super) fn new(sectors: usize, read_only: bool, slow: u64, seed: u64) -> Self {
        let bench = Bench::new(sectors, slow, seed);
        let blk = Blk::new(sectors as u64, read_only, "disk0");
        let mut driver = Self { blk, bench, next: 0, free: 0, seen: 0 };
        driver.set_up();
        driver
    }

    pub(super) fn set(&mut self, offset: u64, value: u64) -> bool {
        self.blk.write(offset, 4, value)
    }

    pub(super) fn get(&self, offset: u64) -> u64 {
        self.blk.read(offset, 4)
    }

    /// From reset to a working queue.
    pub(super) fn set_up(&mut self) {
        (self.next, self.free, self.seen) = (0, 0, 0);
        self.bench.ram[..0x3000].fill(0);
        let settings = [
            (0x70, 0),
            (0x70, 1),
            (0x70, 3),
            (0x24, 0),
            (0x20, 0x1000_0000),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x30, 0),
            (0x38, u64::from(SIZE)),
            (0x80, TABLE),
            (0x84, 0),
            (0x90, AVAILABLE),
            (0x94, 0),
            (0xa0, USED),
            (0xa4, 0),
            (0x44, 1),
            (0x70, 15),
        ];
        for (offset, value) in settings {
            self.set(offset, value);
        }
        assert_eq!((self.get(0x70), self.get(0x44)), (15, 1));
    }

    /// Puts a chain of these buffers into the queue, through a table of its own at `indirect` or without; its head.
    pub(super) fn offer(&mut self, buffers: &[Buffer], indirect: Option<u64>) -> u16 {
        let head = self.free % SIZE;
        let last = buffers.len() - 1;
        for (index, &Buffer(at, bytes, written)) in buffers.iter().enumerate() {
            let flags = if written { WRITE } else { 0 } | if index < last { NEXT } else { 0 };
            let index = u16::try_from(index).unwrap();
            match indirect {
                Some(table) => {
                    let raw = descriptor(at, bytes, flags, index + 1);
                    self.bench.put(table + 16 * u64::from(index), &raw);
                }
                None => {
                    let here = (head + index) % SIZE;
                    let raw = descriptor(at, bytes, flags, (here + 1) % SIZE);
                    self.bench.put(TABLE + 16 * u64::from(here), &raw);
                }
            }
        }
        if let Some(table) = indirect {
            let bytes = u32::try_from(16 * buffers.len()).unwrap();
            self.bench.put(TABLE + 16 * u64::from(head), &descriptor(table, bytes, INDIRECT, 0));
        }
        self.free += if indirect.is_some() { 1 } else { u16::try_from(buffers.len()).unwrap() };
        self.publish(head);
        head
    }

    /// Makes a head available and notifies.
    pub(super) fn publish(&mut self, head: u16) {
        self.bench.put(AVAILABLE + 4 + 2 * u64::from(self.next % SIZE), &head.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.bench.put(AVAILABLE + 2, &self.next.to_le_bytes());
        self.set(0x50, 0);
    }

    /// Lets the device work until it has nothing to do; whatever it waits for happens at once.
    pub(super) fn run(&mut self) {
        for _ in 0..1_000_000 {
            match self.blk.step(&mut self.bench) {
                Did::Some => {}
                Did::Nothing => {
                    let waited = self.blk.clone();
                    self.blk.wake();
                    if self.blk.step(&mut self.bench) == Did::Nothing && waited.under_way() == 0 {
                        return;
                    }
                }
                Did::Wait(..) if self.bench.dice.below(2) == 0 => self.blk.wake(),
                Did::Wait(..) => {}
            }
        }
        panic!("the device does not come to rest");
    }

    /// Chains that came back since the last look, with the bytes written.
    pub(super) fn used(&mut self) -> Vec<(u32, u32)> {
        let mut list = Vec::new();
        while self.seen != self.bench.word(USED + 2) {
            let raw = self.bench.bytes(USED + 4 + 8 * u64::from(self.seen % SIZE), 8);
            let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
            list.push((word(0), word(4)));
            self.seen = self.seen.wrapping_add(1);
        }
        list
    }

    /// One request from beginning to end: its data go to or come from [`ROOM`] + 0x1000. Its status, and the bytes
    /// written.
    pub(super) fn ask(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, u32) {
        self.header(ROOM, kind, sector);
        self.bench.put(ROOM + 0x800, &[0xee]);
        self.bench.put(ROOM + 0x1000, data);
        let mut buffers = vec![Buffer(ROOM, 16, false)];
        if !data.is_empty() {
            buffers.push(Buffer(ROOM + 0x1000, u32::try_from(data.len()).unwrap(), false));
        }
        if room > 0 {
            buffers.push(Buffer(ROOM + 0x1000, room, true));
        }
        buffers.push(Buffer(ROOM + 0x800, 1, true));
        let head = self.offer(&buffers, None);
        self.run();
        let used = self.used();
        assert_eq!(used.iter().map(|used| used.0).collect::<Vec<_>>(), [u32::from(head)]);
        (self.bench.bytes(ROOM + 0x800, 1)[0], used[0].1)
    }

    pub(super) fn header(&mut self, at: u64, kind: u32, sector: u64) {
        self.bench.put(at, &kind.to_le_bytes());
        self.bench.put(at + 8, &sector.to_le_bytes());
    }

    /// What a request has read.
    pub(super) fn answer(&self, len: usize) -> &[u8] {
        self.bench.bytes(ROOM + 0x1000, len)
    }
}
