//! Everything at once: three guests with their clones and snapshots, a storm of swapping, a storm of writes to a disk.
//!
//! What happens is thrown by dice, and the scheduler's seed decides how they fall. Each guest knows what it has to see.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};

use shuttle::thread::{self, JoinHandle};
use vmobject::addr::PageIndex;
use vmobject::defect::Defect;
use vmobject::lock::Held;
use vmobject::map::Snapshot;
use vmobject::object::ObjectId;
use vmobject::pager::Cleaned;
use vmobject::store::{Direction, StoreError};
use vmobject::testing::{FakePmap, Rig};

use super::{Bytes, Dice, Guest, OLD, beside, disk, look, page_range, stored};
use crate::{at_rest, hold, nothing_is_left, park, serve, unmap};

/// Pages of a guest in the soup.
const PAGES: u32 = 4;
/// What a CPU does before the others come, and as much while they are there.
const DEEDS: u32 = 5;

/// What a CPU does to its guest, at some page.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Store,
    Load,
    /// A load when all leaves are gone.
    Fault,
    /// EL2 writes.
    Write,
    Discard,
    /// Makes a clone; if there is one, that is looked at and ends.
    Clone,
    /// The clone writes.
    CloneStores,
    /// Makes a copy that receives; if a snapshot is kept, that is looked at and deleted.
    Freeze,
    /// The same, but what is looked at is kept.
    Look,
    /// Makes a symmetric snapshot.
    Snapshot,
    /// Makes the clone of the snapshot.
    Make,
    /// Goes back to the snapshot.
    Reset,
    /// Keeps a part of the guest while that writes.
    Part,
    Chores,
    PageOut,
    Deliver,
}

/// What is done while memory is not short.
const DRY: &[Deed] = &[
    Deed::Store,
    Deed::Store,
    Deed::Load,
    Deed::Fault,
    Deed::Write,
    Deed::Discard,
    Deed::Clone,
    Deed::CloneStores,
    Deed::Freeze,
    Deed::Look,
    Deed::Snapshot,
    Deed::Make,
    Deed::Reset,
    Deed::Part,
    Deed::Chores,
];

/// What is done besides while it is.
const PAGING: &[Deed] = &[Deed::PageOut, Deed::Deliver];

/// A CPU with a guest of its own, and with what was made of that.
struct Cpu {
    guest: Guest,
    clone: Option<Guest>,
    kept: Option<(Snapshot, Bytes)>,
    dice: Dice,
    /// What it wrote last.
    value: u8,
}

impl Cpu {
    fn next_value(&mut self) -> u8 {
        self.value = self.value.wrapping_add(1).max(1);
        self.value
    }

    fn act(&mut self, deeds: &[Deed]) {
        let (deed, page) = (self.dice.one_of(deeds), self.dice.throw(PAGES));
        let (rig, held) = (Arc::clone(&self.guest.rig), &mut Held::root());
        match deed {
            Deed::Store => {
                let value = self.next_value();
                self.guest.store(page, value);
            }
            Deed::Load => self.guest.load(page),
            Deed::Fault => {
                unmap(&self.guest.map, PAGES);
                self.guest.load(page);
            }
            Deed::Write => {
                let value = self.next_value();
                self.guest.write(page, value);
                self.guest.load(page);
            }
            Deed::Discard => self.guest.discard(page),
            Deed::Clone => match self.clone.take() {
                Some(clone) => {
                    clone.load(page);
                    clone.end();
                }
                None => self.clone = Some(self.guest.child()),
            },
            Deed::CloneStores => {
                let (value, other) = (self.next_value(), self.dice.throw(PAGES));
                if let Some(clone) = &mut self.clone {
                    clone.store(page, value);
                    unmap(&clone.map, PAGES);
                    clone.load(other);
                }
            }
            Deed::Freeze | Deed::Look => match self.kept.take() {
                Some((snapshot, bytes)) => {
                    assert_eq!(look(&rig, &snapshot, page), bytes[&page], "page {page} of a snapshot");
                    if matches!(deed, Deed::Freeze) {
                        rig.vm.delete_snapshot(snapshot, held);
                    } else {
                        self.kept = Some((snapshot, bytes));
                    }
                }
                None => {
                    let snapshot = rig.vm.freeze(&self.guest.map, held).unwrap();
                    self.kept = Some((snapshot, self.guest.bytes.clone()));
                }
            },
            Deed::Snapshot => {
                if self.kept.is_none() {
                    let snapshot = rig.vm.snapshot(&self.guest.map, held).unwrap();
                    self.kept = Some((snapshot, self.guest.bytes.clone()));
                }
            }
            Deed::Make => {
                if let (None, Some((snapshot, bytes))) = (&self.clone, &self.kept) {
                    let map = rig.vm.map_snapshot(snapshot, FakePmap::default(), held).unwrap();
                    self.clone = Some(self.guest.alike(map, bytes));
                }
            }
            Deed::Reset => {
                if let Some((snapshot, bytes)) = &self.kept {
                    rig.vm.reset_map(&self.guest.map, snapshot, &|_| {}, held).unwrap();
                    self.guest.bytes.clone_from(bytes);
                }
            }
            Deed::Part => {
                let pages = 1 + self.dice.throw(PAGES - page);
                let part = rig.vm.copy_in(&self.guest.map, page_range(page, pages), held).unwrap();
                let (before, value) = (self.guest.bytes[&page], self.next_value());
                self.guest.store(page, value);
                assert_eq!(look(&rig, &part, page), before, "page {page} of a part");
                rig.vm.delete_snapshot(part, held);
            }
            Deed::Chores => {
                rig.vm.step(3, held);
            }
            Deed::PageOut => {
                rig.vm.pageout(40, held);
            }
            Deed::Deliver => {
                rig.deliver(0, Ok(()));
            }
        }
    }

    /// Everything that it has is what it has to be.
    fn look_at_all(&self) {
        self.guest.load_all();
        self.clone.iter().for_each(Guest::load_all);
        if let Some((snapshot, bytes)) = &self.kept {
            for (&page, &byte) in bytes {
                assert_eq!(look(&self.guest.rig, snapshot, page), byte, "page {page} of a snapshot");
            }
        }
    }

    fn end(self) {
        if let Some((snapshot, _)) = self.kept {
            self.guest.rig.vm.delete_snapshot(snapshot, &mut Held::root());
        }
        self.clone.into_iter().chain([self.guest]).for_each(Guest::end);
    }
}

/// A guest and two clones of it, each with a CPU.
fn soup(deeds: Vec<Deed>, is_short: bool) {
    let rig = Arc::new(Rig::with_swap(192, 128));
    let first = Guest::new(&rig, PAGES, serve);
    if is_short {
        rig.vm.set_free_target(u32::MAX, u32::MAX);
    }
    let guests = [first.child(), first.child(), first];
    let mut cpus: Vec<Cpu> = guests
        .into_iter()
        .zip([100, 140, 180])
        .map(|(guest, value)| Cpu { guest, clone: None, kept: None, dice: Dice::new(), value })
        .collect();
    for cpu in &mut cpus {
        (0..DEEDS).for_each(|_| cpu.act(&deeds));
    }
    let cpus: Vec<JoinHandle<Cpu>> = cpus
        .into_iter()
        .map(|mut cpu| {
            let deeds = deeds.clone();
            thread::spawn(move || {
                (0..DEEDS).for_each(|_| cpu.act(&deeds));
                cpu
            })
        })
        .collect();
    let cpus: Vec<Cpu> = cpus.into_iter().map(|cpu| cpu.join().unwrap()).collect();
    rig.ease();
    at_rest(&rig);
    cpus.iter().for_each(Cpu::look_at_all);
    at_rest(&rig);
    cpus.into_iter().for_each(Cpu::end);
    nothing_is_left(&rig);
}

fn dry_soup(_: Option<Defect>) {
    soup(DRY.to_vec(), false);
}

fn wet_soup(_: Option<Defect>) {
    soup([DRY, PAGING].concat(), true);
}

/// What a machine does beside its guests, each with a CPU of its own: its device, which answers in any order, the
/// daemon, and the chores.
struct Works {
    stopped: Arc<AtomicBool>,
    /// Some writes fail.
    fails: Arc<AtomicBool>,
    cpus: Vec<JoinHandle<()>>,
}

impl Works {
    fn start(rig: &Arc<Rig>, fails: bool) -> Self {
        let (stopped, fails) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(fails)));
        let device = {
            let (stopped, fails, mut dice) = (Arc::clone(&stopped), Arc::clone(&fails), Dice::new());
            beside(rig, move |rig| {
                while !stopped.load(Relaxed) || rig.vm.machine().store.pending() > 0 {
                    answer(rig, &mut dice, fails.load(Relaxed));
                    thread::yield_now();
                }
            })
        };
        let daemon = {
            let stopped = Arc::clone(&stopped);
            beside(rig, move |rig| {
                while !stopped.load(Relaxed) {
                    rig.vm.set_free_target(u32::MAX, u32::MAX);
                    rig.vm.pageout(260, &mut Held::root());
                    (0..20).for_each(|_| thread::yield_now());
                }
            })
        };
        let chores = {
            let stopped = Arc::clone(&stopped);
            beside(rig, move |rig| {
                while !stopped.load(Relaxed) {
                    rig.vm.step(3, &mut Held::root());
                    thread::yield_now();
                }
            })
        };
        Self { stopped, fails, cpus: vec![device, daemon, chores] }
    }

    fn stop(self, rig: &Rig) {
        self.stopped.store(true, Relaxed);
        self.cpus.into_iter().for_each(|cpu| cpu.join().unwrap());
        rig.ease();
    }
}

/// Answers one of the transfers.
fn answer(rig: &Rig, dice: &mut Dice, fails: bool) {
    let requests = rig.vm.machine().store.requests();
    let Ok(pending @ 1..) = u32::try_from(requests.len()) else { return };
    let place = usize::try_from(dice.throw(pending)).unwrap();
    let failed = fails && requests[place].direction == Direction::Out && dice.one_in(3);
    rig.deliver(place, if failed { Err(StoreError::Io) } else { Ok(()) });
}

/// Pages of a guest in a storm: three of them at a time are in use.
const SWAPPED: u32 = 10;

/// A guest at work, on a CPU of its own.
fn work(mut guest: Guest, steps: u32) -> JoinHandle<Guest> {
    let mut dice = Dice::new();
    thread::spawn(move || {
        for step in 0..steps {
            let page = (step / 25 * 3 + dice.throw(3)) % SWAPPED;
            let value = u8::try_from(1 + dice.throw(250)).unwrap();
            match dice.throw(24) {
                0..8 => guest.store(page, value),
                8..12 => guest.write(page, value),
                12 => guest.discard(page),
                _ => guest.load(page),
            }
        }
        guest
    })
}

/// A guest, its clone and a clone of that have far less memory than they use; some writes to swap fail.
fn a_storm_of_swapping(_: Option<Defect>) {
    let mut dice = Dice::new();
    let rig = Arc::new(Rig::with_swap(40 + dice.throw(30), 40));
    let parent = Guest::new(&rig, SWAPPED, park);
    if dice.one_in(2) {
        rig.page_out_all();
    }
    let works = Works::start(&rig, dice.one_in(3));
    let child = parent.child();
    let (parent, child) = (work(parent, 250), work(child, 250));
    let (parent, child) = (parent.join().unwrap(), child.join().unwrap());
    let grandchild = child.child();
    parent.end();
    let (child, grandchild) = (work(child, 120), work(grandchild, 250));
    let (child, mut grandchild) = (child.join().unwrap(), grandchild.join().unwrap());
    child.load_all();
    child.end();
    grandchild.load_all();
    works.stop(&rig);
    at_rest(&rig);
    grandchild.wait = serve;
    grandchild.load_all();
    grandchild.end();
    nothing_is_left(&rig);
}

/// Pages of the disk in a storm.
const WRITTEN: u32 = 8;

/// A pass over the disk; how many pages stayed changed.
fn flush(rig: &Rig, disk: ObjectId) -> u32 {
    let mut clean = rig.vm.page_clean(disk, PageIndex::new(0)..PageIndex::new(WRITTEN));
    loop {
        match rig.vm.clean_step(&mut clean, 3, &mut Held::root()) {
            Cleaned::Done { failed } => return failed,
            Cleaned::Wait(what) => park(rig, what),
            Cleaned::More => thread::yield_now(),
        }
    }
}

/// A disk is written and flushed while its pages are paged out; some writes fail. A clone of its guest was made before.
fn a_storm_of_writing(_: Option<Defect>) {
    let rig = Arc::new(Rig::with_swap(64, 40));
    let (map, object) = disk(&rig, WRITTEN);
    let bytes = (0..WRITTEN).map(|page| (page, OLD)).collect();
    let mut guest = Guest { rig: Arc::clone(&rig), map, bytes, wait: park };
    let clone = guest.child();
    let works = Works::start(&rig, Dice::new().one_in(2));
    // Each value is larger than those before it.
    let written: Arc<Vec<AtomicU8>> = Arc::new((0..WRITTEN).map(|_| AtomicU8::new(OLD)).collect());
    let writer = {
        let (written, mut dice) = (Arc::clone(&written), Dice::new());
        thread::spawn(move || {
            for value in OLD + 1..OLD + 61 {
                let page = dice.throw(WRITTEN);
                match dice.throw(3) {
                    0 => guest.store(page, value),
                    1 => guest.write(page, value),
                    _ => guest.load(page),
                }
                written[usize::try_from(page).unwrap()].store(guest.bytes[&page], Relaxed);
                if dice.one_in(6) {
                    thread::yield_now();
                }
            }
            guest
        })
    };
    for _ in 0..4 {
        let before: Vec<u8> = written.iter().map(|value| value.load(Relaxed)).collect();
        if flush(&rig, object) == 0 {
            for (page, before) in (0..).zip(before) {
                let there = stored(&rig, page);
                assert!(there >= before, "page {page} has {there}, and {before} was flushed");
            }
        }
        (0..20).for_each(|_| thread::yield_now());
    }
    let guest = writer.join().unwrap();
    works.fails.store(false, Relaxed);
    guest.load_all();
    clone.load_all();
    clone.end();
    let bytes = guest.bytes.clone();
    guest.end();
    while rig.objects() > 0 {
        thread::yield_now();
    }
    works.stop(&rig);
    for (page, byte) in bytes {
        assert_eq!(stored(&rig, page), byte, "page {page} at the end");
    }
    assert_eq!(rig.vm.stats().page_lost, 0);
    nothing_is_left(&rig);
}

#[test]
fn what_three_cpus_do_to_relatives_is_as_if_each_were_alone() {
    hold(dry_soup, 5000);
}

#[test]
fn what_three_cpus_do_to_relatives_that_are_paged_out_is_as_if_each_were_alone() {
    hold(wet_soup, 5000);
}

#[test]
fn relatives_that_swap_all_the_time_read_what_they_wrote() {
    hold(a_storm_of_swapping, 1000);
}

#[test]
fn what_was_flushed_is_in_the_store_whatever_goes_on_meanwhile() {
    hold(a_storm_of_writing, 2000);
}
