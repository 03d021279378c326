//! Stories of transfers that end at the moment at which somebody asks what became of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use shuttle::thread;
use vmobject::addr::PageIndex;
use vmobject::defect::Defect;
use vmobject::fault::{WaitFor, Wiring};
use vmobject::lock::Held;
use vmobject::map::Discarded;
use vmobject::object::ObjectId;
use vmobject::pager::{Clean, Cleaned, Down, Left, Shutdown};
use vmobject::prot::Prot;
use vmobject::store::{IoToken, StoreError};
use vmobject::testing::{Rig, at, byte_of};

use super::{OLD, beside, disk, page_range, stored};
use crate::{ROUNDS, access, at_rest, attempt, hold, nothing_is_left, park, rig, tell};

/// Goes on with a flush until it is done; how many pages stayed changed.
fn cleaned(rig: &Rig, clean: &mut Clean, wait: impl Fn(&Rig, WaitFor)) -> u32 {
    loop {
        match rig.vm.clean_step(clean, 64, &mut Held::root()) {
            Cleaned::Done { failed } => return failed,
            Cleaned::Wait(what) => wait(rig, what),
            Cleaned::More => thread::yield_now(),
        }
    }
}

/// Begins to flush a disk of four pages, until there is something to wait for.
fn begin(rig: &Rig, disk: ObjectId) -> Clean {
    let mut clean = rig.vm.page_clean(disk, PageIndex::new(0)..PageIndex::new(4));
    let step = rig.vm.clean_step(&mut clean, 64, &mut Held::root());
    assert!(matches!(step, Cleaned::Wait(WaitFor::Io(_))), "{step:?}");
    clean
}

/// Nothing of a disk has to be written, but its store does not do the flush.
fn a_store_fails_a_flush(defect: Option<Defect>) {
    let rig = rig(defect);
    let (guest, disk) = disk(&rig, 4);
    let mut clean = begin(&rig, disk);
    let ends = beside(&rig, |rig| rig.deliver(0, Err(StoreError::Io)));
    assert_eq!(cleaned(&rig, &mut clean, park), 1, "a failed flush is told as done");
    assert!(ends.join().unwrap());
    assert_eq!(rig.clean(disk, 0..4), 0);
    at_rest(&rig);
    assert!((0..4).all(|page| access(&rig, &guest, page, None) == OLD && stored(&rig, page) == OLD));
    rig.destroy(guest);
    nothing_is_left(&rig);
}

/// A disk's store does not take a page, and does the flush after it.
fn a_store_fails_a_write(defect: Option<Defect>) {
    let rig = rig(defect);
    let (guest, disk) = disk(&rig, 4);
    rig.store(&guest, at(1, 77), 9).unwrap();
    let mut clean = begin(&rig, disk);
    let ends = beside(&rig, |rig| rig.deliver(0, Err(StoreError::Io)));
    let failed = cleaned(&rig, &mut clean, |rig, _| {
        let requests = rig.vm.machine().store.requests();
        if let Some(flush) = requests.iter().position(|request| request.frames.is_empty()) {
            rig.deliver(flush, Ok(()));
        }
        thread::yield_now();
    });
    assert_eq!(failed, 1, "a failed write is told as done");
    assert!(ends.join().unwrap());
    at_rest(&rig);
    assert_eq!([0, 1].map(|page| stored(&rig, page)), [OLD, OLD]);
    assert_eq!((rig.clean(disk, 0..4), stored(&rig, 1)), (0, 9), "it is tried again");
    assert_eq!([0, 1, 2, 3].map(|page| access(&rig, &guest, page, None)), [OLD, 9, OLD, OLD]);
    at_rest(&rig);
    rig.destroy(guest);
    nothing_is_left(&rig);
}

/// Pages are discarded that are on their way out, and then one that is on its way in.
fn a_discard_meets_a_transfer(defect: Option<Defect>) {
    let rig = rig(defect);
    let guest = rig.guest(5);
    for out in [true, false] {
        rig.fill(&guest, 0..5);
        if out {
            rig.page_out();
        } else {
            rig.page_out_all();
            assert!(attempt(&rig, &guest, 0, None).is_err());
        }
        let started: Vec<IoToken> =
            rig.vm.machine().store.requests().iter().map(|request| request.token).collect();
        assert!(!started.is_empty());
        let ends = beside(&rig, |rig| rig.deliver_all());
        while let Discarded::Wait(what) = rig.vm.discard(&guest, page_range(0, 4), &mut Held::root()).unwrap()
        {
            let WaitFor::Io(token) = what else { panic!("there is memory") };
            assert!(started.contains(&token), "{token:?} never was");
            park(&rig, what);
        }
        ends.join().unwrap();
        at_rest(&rig);
        let seen = [0, 1, 2, 3, 4].map(|page| access(&rig, &guest, page, None));
        assert_eq!(seen, [0, 0, 0, 0, byte_of(4)]);
    }
    rig.destroy(guest);
    nothing_is_left(&rig);
}

/// A device lets pages go while the transfer that writes them ends.
fn a_wired_page_is_let_go_while_its_transfer_ends(defect: Option<Defect>) {
    let rig = rig(defect);
    let guest = rig.guest(8);
    rig.fill(&guest, 0..4);
    rig.page_out();
    assert!(rig.vm.machine().store.pending() > 0);
    rig.fill(&guest, 6..8);
    let wired =
        [0, 1].map(|page| match rig.vm.wire(&guest, at(page, 0), Prot::READ, &mut Held::root()).unwrap() {
            Wiring::Done(wired) => wired,
            Wiring::Wait(what) => panic!("{what:?}: it is there"),
        });
    let lets_go = beside(&rig, move |rig| {
        for wired in wired {
            rig.vm.unwire(wired, &mut Held::root());
        }
    });
    rig.deliver_all();
    lets_go.join().unwrap();
    at_rest(&rig);
    for page in (0..4).chain(6..8) {
        assert_eq!(access(&rig, &guest, page, None), byte_of(page), "page {page}");
    }
    rig.page_out_all();
    assert_eq!(rig.free(), 64, "nothing is wired any more");
    rig.destroy(guest);
    nothing_is_left(&rig);
}

/// A device takes pages of a disk and lets them go while that begins to be written, and has been.
fn a_disk_is_flushed_while_a_device_has_its_pages(defect: Option<Defect>) {
    let rig = rig(defect);
    let (guest, disk) = disk(&rig, 4);
    for page in 0..4 {
        rig.store(&guest, at(page, 77), byte_of(page)).unwrap();
    }
    let device = {
        let guest = guest.clone();
        beside(&rig, move |rig| {
            for page in 0..4 {
                let wiring = rig.vm.wire(&guest, at(page, 0), Prot::READ, &mut Held::root()).unwrap();
                if let Wiring::Done(wired) = wiring {
                    rig.vm.unwire(wired, &mut Held::root());
                }
            }
        })
    };
    let done = Arc::new(AtomicBool::new(false));
    let store = {
        let done = Arc::clone(&done);
        beside(&rig, move |rig| {
            while !done.load(Relaxed) {
                rig.deliver(0, Ok(()));
                thread::yield_now();
            }
        })
    };
    let mut clean = rig.vm.page_clean(disk, PageIndex::new(0)..PageIndex::new(4));
    assert_eq!(cleaned(&rig, &mut clean, park), 0);
    done.store(true, Relaxed);
    store.join().unwrap();
    device.join().unwrap();
    at_rest(&rig);
    for page in 0..4 {
        let seen = access(&rig, &guest, page, None);
        assert_eq!((seen, stored(&rig, page)), (byte_of(page), byte_of(page)), "page {page}");
    }
    rig.destroy(guest);
    nothing_is_left(&rig);
}

/// The machine is turned off while another CPU takes apart what the last guest had, much of it in swap.
fn a_machine_is_turned_off_while_the_last_guest_goes(defect: Option<Defect>) {
    let rig = rig(defect);
    let guest = rig.guest(24);
    rig.fill(&guest, 0..24);
    rig.page_out_all();
    rig.vm.destroy_map(guest, &mut Held::root());
    let chores = beside(&rig, |rig| while rig.vm.step(8, &mut Held::root()) {});
    let mut shutdown = Shutdown::default();
    let left = loop {
        match rig.vm.shutdown_step(&mut shutdown, 8, &mut Held::root()) {
            Down::Done(left) => break left,
            Down::Wait(_) | Down::More => thread::yield_now(),
        }
    };
    assert_eq!(left, Left::default(), "told while it was still being given back");
    chores.join().unwrap();
}

#[test]
fn a_machine_that_is_turned_off_counts_what_is_left_when_nobody_gives_back_any_more() {
    tell(a_machine_is_turned_off_while_the_last_guest_goes, Defect::CountsTooEarly);
}

#[test]
fn a_flush_that_the_store_fails_is_never_told_as_done() {
    tell(a_store_fails_a_flush, Defect::EndsUnlocked);
}

#[test]
fn a_write_that_the_store_fails_is_never_told_as_done() {
    tell(a_store_fails_a_write, Defect::EndsUnlocked);
}

#[test]
fn a_discard_that_meets_a_transfer_waits_for_that_and_for_no_other() {
    hold(a_discard_meets_a_transfer, ROUNDS);
}

#[test]
fn a_page_that_is_unwired_while_its_transfer_ends_is_on_one_queue() {
    hold(a_wired_page_is_let_go_while_its_transfer_ends, ROUNDS);
}

#[test]
fn a_disk_whose_pages_a_device_takes_and_lets_go_is_flushed_all_the_same() {
    hold(a_disk_is_flushed_while_a_device_has_its_pages, ROUNDS);
}
