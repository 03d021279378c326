//! More stories for the schedulers of `interleavings`: what those of several subjects have in common.

mod chains;
mod soup;
mod transfers;

use std::collections::BTreeMap;
use std::sync::Arc;

use shuttle::rand::{RngCore as _, thread_rng};
use shuttle::thread;
use vmobject::addr::{IpaRange, PAGE_SIZE};
use vmobject::fault::{Copied, Looked, WaitFor};
use vmobject::lock::Held;
use vmobject::map::{Discarded, Share, Snapshot};
use vmobject::object::ObjectId;
use vmobject::prot::Prot;
use vmobject::store::StoreId;
use vmobject::testing::{FakePmap, Rig, TestMap, at, byte_of};

use crate::{access_after, serve};

const DISK: StoreId = StoreId(4);
/// What a disk has in each byte at first.
const OLD: u8 = 0x11;

/// A guest with a new disk of so many pages.
fn disk(rig: &Rig, pages: u32) -> (TestMap, ObjectId) {
    let bytes = usize::try_from(u64::from(pages) * PAGE_SIZE).unwrap();
    rig.vm.machine().store.add(DISK, vec![OLD; bytes]);
    let (map, disk) = (rig.map(), rig.vm.disk(DISK, &mut Held::root()).unwrap());
    rig.put(&map, 0, pages, disk, 0, Prot::READ | Prot::WRITE, Share::Shared).unwrap();
    (map, disk)
}

/// What the disk's store has of a page.
fn stored(rig: &Rig, page: u32) -> u8 {
    rig.vm.machine().store.page(DISK, page.into())[77]
}

fn page_range(first: u32, pages: u32) -> IpaRange {
    IpaRange::from_pages(at(first, 0), pages).unwrap()
}

/// What a snapshot has of a page.
fn look(rig: &Rig, snapshot: &Snapshot, page: u32) -> u8 {
    let mut byte = [0];
    loop {
        match rig.vm.read_snapshot(snapshot, at(page, 77), &mut byte, &mut Held::root()).unwrap() {
            Looked::Done => return byte[0],
            Looked::Wait(what) => serve(rig, what),
            Looked::Again => {}
        }
    }
}

/// Throws that the scheduler's seed decides.
struct Dice(u64);

impl Dice {
    fn new() -> Self {
        Self(thread_rng().next_u64() | 1)
    }

    fn throw(&mut self, sides: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from((self.0 >> 20) % u64::from(sides)).unwrap()
    }

    fn one_in(&mut self, sides: u32) -> bool {
        self.throw(sides) == 0
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.throw(u32::try_from(all.len()).unwrap())).unwrap()]
    }
}

/// What each page has.
type Bytes = BTreeMap<u32, u8>;

/// A guest that knows what it has to see.
struct Guest {
    rig: Arc<Rig>,
    map: TestMap,
    bytes: Bytes,
    /// How it waits.
    wait: fn(&Rig, WaitFor),
}

impl Guest {
    fn new(rig: &Arc<Rig>, pages: u32, wait: fn(&Rig, WaitFor)) -> Self {
        let map = rig.guest(pages);
        rig.fill(&map, 0..pages);
        Self {
            rig: Arc::clone(rig),
            map,
            bytes: (0..pages).map(|page| (page, byte_of(page))).collect(),
            wait,
        }
    }

    /// Another one, which sees the same.
    fn alike(&self, map: TestMap, bytes: &Bytes) -> Self {
        Self { rig: Arc::clone(&self.rig), map, bytes: bytes.clone(), wait: self.wait }
    }

    fn child(&self) -> Self {
        let map = self.rig.vm.copy_map(&self.map, FakePmap::default(), &mut Held::root()).unwrap();
        self.alike(map, &self.bytes)
    }

    fn store(&mut self, page: u32, byte: u8) {
        access_after(&self.rig, &self.map, page, Some(byte), self.wait);
        self.bytes.insert(page, byte);
    }

    /// EL2 writes for it.
    fn write(&mut self, page: u32, byte: u8) {
        while let Copied::Wait(what) =
            self.rig.vm.write(&self.map, at(page, 77), &[byte], &mut Held::root()).unwrap()
        {
            (self.wait)(&self.rig, what);
        }
        self.bytes.insert(page, byte);
    }

    fn discard(&mut self, page: u32) {
        loop {
            match self.rig.vm.discard(&self.map, page_range(page, 1), &mut Held::root()).unwrap() {
                Discarded::Done(_) => break,
                Discarded::Wait(what) => (self.wait)(&self.rig, what),
                Discarded::Part(_) => {}
            }
        }
        self.bytes.insert(page, 0);
    }

    /// It reads what it has to.
    fn load(&self, page: u32) {
        let byte = access_after(&self.rig, &self.map, page, None, self.wait);
        assert_eq!(byte, self.bytes[&page], "page {page}");
    }

    fn load_all(&self) {
        self.bytes.keys().for_each(|&page| self.load(page));
    }

    fn end(self) {
        self.rig.vm.destroy_map(self.map, &mut Held::root());
    }
}

/// A CPU beside the story's first one.
fn beside<T: Send + 'static>(
    rig: &Arc<Rig>,
    what: impl FnOnce(&Arc<Rig>) -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let rig = Arc::clone(rig);
    thread::spawn(move || what(&rig))
}
