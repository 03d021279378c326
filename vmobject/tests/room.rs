//! When there is no more memory for the books: what would have them grow waits or is refused, and leaves nothing behind;
//! what they have room for goes on, and so does what gives room back.

use std::sync::atomic::Ordering::Relaxed;

use vmobject::VmError;
use vmobject::fault::WaitFor;
use vmobject::lock::Held;
use vmobject::map::NotDiscarded;
use vmobject::testing::{FakePmap, Refused, Rig, at};

/// Pages that one leaf of an object's index is for.
const LEAF: u32 = 64;
/// Pages that one region of it is for.
const REGION: u32 = 4096;

fn fill(rig: &Rig, full: bool) {
    rig.vm.machine().full.store(full, Relaxed);
}

#[test]
fn a_page_that_needs_a_leaf_waits_for_room_and_its_neighbours_do_not() {
    let rig = Rig::new(256);
    let guest = rig.guest(4 * LEAF);
    rig.store(&guest, at(0, 0), 1).unwrap();
    let free = rig.free();
    fill(&rig, true);
    assert_eq!(rig.store(&guest, at(LEAF, 0), 2), Err(Refused::Stuck(WaitFor::Memory)));
    assert_eq!(rig.free(), free, "no frame is kept meanwhile");
    rig.store(&guest, at(LEAF - 1, 0), 3).unwrap();
    rig.check();
    fill(&rig, false);
    rig.store(&guest, at(LEAF, 0), 4).unwrap();
    assert_eq!(
        [0, LEAF - 1, LEAF].map(|page| rig.load(&guest, at(page, 0))),
        [Ok(1), Ok(3), Ok(4)],
        "nothing is lost"
    );
    rig.check();
}

#[test]
fn zeros_are_marked_only_while_there_is_room_for_the_marks() {
    let rig = Rig::new(256);
    let guest = rig.guest(2 * REGION);
    rig.store(&guest, at(0, 0), 1).unwrap();
    let child = rig.clone(&guest);
    rig.store(&child, at(0, 0), 2).unwrap();
    fill(&rig, true);
    let refused = Err(NotDiscarded::Refused(VmError::NoMemory));
    assert_eq!(rig.discard(&child, 2 * LEAF, 1), refused);
    assert_eq!(rig.discard(&child, REGION, LEAF), refused);
    assert_eq!(rig.discard(&child, LEAF, LEAF), Ok(0), "a whole leaf is one bit of its region");
    assert_eq!(rig.discard(&child, LEAF, 1), Ok(0), "and says so of each page");
    assert_eq!(rig.discard(&child, 0, 1), Ok(1), "its leaf is there");
    assert_eq!((rig.load(&child, at(0, 0)), rig.load(&guest, at(0, 0))), (Ok(0), Ok(1)));
    rig.check();
    fill(&rig, false);
    assert_eq!(rig.discard(&child, REGION, LEAF), Ok(0));
    rig.check();
}

#[test]
fn objects_are_refused_and_those_that_end_give_room_although_there_is_none() {
    let rig = Rig::new(256);
    let guest = rig.guest(4 * LEAF);
    for page in 0..4 {
        rig.store(&guest, at(page * LEAF, 0), 1).unwrap();
    }
    let child = rig.clone(&guest);
    rig.store(&child, at(1, 0), 2).unwrap();
    fill(&rig, true);
    assert_eq!(rig.vm.anonymous(4, &mut Held::root()), Err(VmError::NoMemory));
    // The copy itself makes no object; whoever writes next needs one.
    let grandchild = rig.vm.copy_map(&child, FakePmap::default(), &mut Held::root()).unwrap();
    assert_eq!(rig.store(&grandchild, at(1, 0), 3), Err(Refused::Stuck(WaitFor::Memory)));
    rig.destroy(guest);
    rig.settle();
    assert_eq!(rig.objects(), 1, "the child's object and its parent's have become one");
    assert_eq!((rig.load(&child, at(1, 0)), rig.load(&child, at(LEAF, 0))), (Ok(2), Ok(1)));
    rig.check();
    fill(&rig, false);
    rig.store(&grandchild, at(1, 0), 3).unwrap();
    assert_eq!((rig.load(&child, at(1, 0)), rig.load(&grandchild, at(1, 0))), (Ok(2), Ok(3)));
    rig.check();
}
