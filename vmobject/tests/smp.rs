//! Several CPUs at once: threads that fault, clone, collapse, page out and look up in one machine.
//!
//! Which interleavings come up is the host's affair, so a run proves little and many runs prove more; what must hold
//! holds in all of them. A guest's access is made under its tables' lock, as a CPU's is made before an invalidate
//! that it would have seen is done.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::thread;

use vmobject::fault::{Faulted, Looked};
use vmobject::lock::Held;
use vmobject::prot::Prot;
use vmobject::store::{PhysMemory as _, StoreId};
use vmobject::testing::{FakeMachine, Rig, TestMap, at};

const PAGES: u32 = 4;
const FRAMES: u32 = 256;
const ROUNDS: u8 = 100;

/// A guest's access of one byte: faults and waits until it is made.
fn access(rig: &Rig, map: &TestMap, page: u32, write: Option<u8>) -> u8 {
    let access = if write.is_some() { Prot::WRITE } else { Prot::READ };
    let memory = &rig.vm.machine().memory;
    loop {
        let done = map.with_pmap(&mut Held::root(), |pmap| {
            let frame = pmap.access(at(page, 0), access)?;
            let mut byte = [0];
            match write {
                Some(value) => memory.write(frame, 0, &[value]),
                None => memory.read(frame, 0, &mut byte),
            }
            Some(write.unwrap_or(byte[0]))
        });
        if let Some(byte) = done {
            return byte;
        }
        match rig.vm.fault(map, at(page, 0), access, &mut Held::root()).unwrap() {
            Faulted::Mapped => {}
            Faulted::Wait(_) => {
                rig.deliver_all();
                thread::yield_now();
            }
        }
    }
}

fn bytes(rig: &Rig, map: &TestMap) -> Vec<u8> {
    (0..PAGES).map(|page| access(rig, map, page, None)).collect()
}

/// The guest writes its pages in turn: at any one instant they are of one round, or of two, the later ones first.
fn assert_of_one_instant(bytes: &[u8]) {
    let falls = bytes.windows(2).all(|pair| pair[0] >= pair[1]);
    assert!(falls && bytes[0] - bytes[bytes.len() - 1] <= 1, "{bytes:?} was never there");
}

/// Runs others beside a guest that writes on, until it has written all its rounds; in each they have a turn.
fn beside_a_writer(rig: &Rig, others: &[&(dyn Fn(&TestMap) + Sync)]) {
    let (guest, done, turns) = (rig.guest(PAGES), AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        for other in others {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    other(&guest);
                    turns.fetch_add(1, Relaxed);
                }
            });
        }
        for round in 1..=ROUNDS {
            for page in 0..PAGES {
                access(rig, &guest, page, Some(round));
                assert_eq!(access(rig, &guest, page, None), round, "a guest reads what it wrote");
                thread::yield_now();
            }
            let before = turns.load(Relaxed);
            while turns.load(Relaxed) == before {
                access(rig, &guest, 0, Some(round));
                thread::yield_now();
            }
        }
        done.store(true, Relaxed);
    });
    rig.deliver_all();
    rig.settle();
    rig.check();
    assert_eq!(rig.vm.check_at_rest(&mut Held::root()), Ok(()));
    assert_eq!(bytes(rig, &guest), [ROUNDS; PAGES as usize]);
    rig.destroy(guest);
    while rig.deliver_all() > 0 {}
    rig.settle();
    let slots = rig.vm.swap_info(&mut Held::root()).in_use;
    assert_eq!((rig.free(), rig.objects(), slots), (FRAMES, 0, 0), "something is left");
}

/// A clone is of one instant, and stays so.
fn clone_and_look(rig: &Rig, guest: &TestMap) {
    let clone = rig.clone(guest);
    thread::yield_now();
    let first = bytes(rig, &clone);
    assert_of_one_instant(&first);
    access(rig, &clone, 1, Some(251));
    let then = bytes(rig, &clone);
    assert_eq!((then[0], then[1], &then[2..]), (first[0], 251, &first[2..]), "a clone keeps what it has");
    rig.vm.destroy_map(clone, &mut Held::root());
}

fn snapshot_and_look(rig: &Rig, guest: &TestMap, freeze: bool) {
    let (vm, held) = (&rig.vm, &mut Held::root());
    let kept = if freeze { vm.freeze(guest, held) } else { vm.snapshot(guest, held) }.unwrap();
    // The guest is to change something meanwhile, unless it has ended.
    let changes = || vm.stats().shadow_made + vm.stats().pushed;
    let before = changes();
    (0..1000).take_while(|_| changes() == before).for_each(|_| thread::yield_now());
    let seen = (0..PAGES).map(|page| {
        thread::yield_now();
        let mut byte = [0];
        while vm.read_snapshot(&kept, at(page, 0), &mut byte, &mut Held::root()).unwrap() != Looked::Done {
            rig.deliver_all();
            thread::yield_now();
        }
        byte[0]
    });
    assert_of_one_instant(&seen.collect::<Vec<_>>());
    vm.delete_snapshot(kept, &mut Held::root());
}

#[test]
fn a_clone_that_is_made_while_its_source_writes_is_of_one_instant() {
    let rig = Rig::with_swap(FRAMES, 64);
    beside_a_writer(&rig, &[&|guest| clone_and_look(&rig, guest), &|guest| clone_and_look(&rig, guest)]);
}

#[test]
fn a_chain_is_shortened_while_guests_fault_on_it() {
    let rig = Rig::with_swap(FRAMES, 64);
    let shorten = |guest: &TestMap| {
        snapshot_and_look(&rig, guest, false);
        rig.vm.step(3, &mut Held::root());
    };
    beside_a_writer(&rig, &[&shorten, &shorten]);
    let counts = rig.vm.stats();
    assert!(counts.collapsed + counts.bypassed > 0);
}

#[test]
fn what_is_pushed_while_an_image_is_read_is_what_was_there() {
    let rig = Rig::with_swap(FRAMES, 64);
    beside_a_writer(&rig, &[&|guest| snapshot_and_look(&rig, guest, true)]);
    assert!(rig.vm.stats().pushed > 0);
}

#[test]
fn pages_leave_and_come_back_while_guests_use_them() {
    let rig = Rig::with_swap(FRAMES, 64);
    let pageout = |_: &TestMap| {
        rig.vm.set_free_target(u32::MAX, u32::MAX); // after a fruitless look it would pause
        rig.vm.pageout(200, &mut Held::root());
        rig.deliver_all();
        thread::yield_now();
    };
    beside_a_writer(&rig, &[&pageout, &|guest| clone_and_look(&rig, guest)]);
    assert!(rig.vm.stats().page_out > 0);
}

#[test]
fn the_last_reference_to_an_image_may_go_while_somebody_looks_it_up() {
    let machine = FakeMachine::new();
    machine.store.add(StoreId(1), vec![42; 4096 * PAGES as usize]);
    let rig = Rig::with(machine, FRAMES);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let image = rig.vm.image(StoreId(1), &mut Held::root()).unwrap();
                    let map = rig.map();
                    rig.put(&map, 0, PAGES, image, 0, Prot::ALL, vmobject::map::Share::Copy).unwrap();
                    assert_eq!(access(&rig, &map, 2, None), 42);
                    access(&rig, &map, 2, Some(1));
                    rig.vm.destroy_map(map, &mut Held::root());
                }
            });
        }
    });
    while rig.deliver_all() > 0 {}
    rig.settle();
    rig.check();
    assert_eq!((rig.free(), rig.objects()), (FRAMES, 0));
}
