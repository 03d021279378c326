//! Frames that are none of the VM's: mapped as they are, shared by everybody who has them, and never paged, copied, kept
//! or touched by EL2.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use vmobject::VmError;
use vmobject::addr::{IpaRange, PageIndex, Pfn};
use vmobject::fault::{FaultError, Looked, Wiring};
use vmobject::lock::Held;
use vmobject::map::{NotDiscarded, Share};
use vmobject::object::ObjectId;
use vmobject::prot::Prot;
use vmobject::testing::{FakePmap, Refused, Rig, TestMap, at};

/// Behind the rig's frames.
const DEVICE: Pfn = Pfn::new(0x9_0000);

/// A guest with ten pages of memory, and a device of four behind them.
fn guest(rig: &Rig) -> (TestMap, ObjectId) {
    let guest = rig.guest(10);
    let device = rig.vm.device(DEVICE..DEVICE.checked_add(4).unwrap(), &mut Held::root()).unwrap();
    rig.vm.reference(device, &mut Held::root()).unwrap();
    rig.put(&guest, 10, 4, device, 0, Prot::READ | Prot::WRITE, Share::Shared).unwrap();
    rig.fill(&guest, 0..10);
    (guest, device)
}

/// The frame that a guest reaches.
fn reached(rig: &Rig, guest: &TestMap, page: u32, access: Prot) -> Option<Pfn> {
    rig.fault(guest, at(page, 0), access).unwrap();
    guest.with_pmap(&mut Held::root(), |pmap| pmap.access(at(page, 0), access))
}

#[test]
fn a_guest_reaches_a_devices_own_frames_and_so_does_every_clone() {
    let rig = Rig::new(64);
    let (parent, device) = guest(&rig);
    let clone = rig.clone(&parent);
    for guest in [&parent, &clone] {
        for page in 0..4 {
            let frame = reached(&rig, guest, 10 + page, Prot::WRITE);
            assert_eq!(frame, DEVICE.checked_add(page), "not a copy");
        }
    }
    rig.store(&parent, at(12, 5), 0x5a).unwrap();
    assert_eq!(rig.load(&clone, at(12, 5)), Ok(0x5a));
    rig.check();
    assert_eq!(rig.vm.stats().fault_copy, 0);
    rig.vm.release(device, &mut Held::root());
    rig.destroy(parent);
    assert_eq!(rig.load(&clone, at(12, 5)), Ok(0x5a));
    rig.destroy(clone);
    assert_eq!((rig.free(), rig.objects()), (64, 0));
}

#[test]
fn a_devices_leaves_go_with_its_entry_and_no_sooner() {
    let rig = Rig::with_swap(64, 64);
    let (parent, device) = guest(&rig);
    for page in 10..14 {
        assert!(reached(&rig, &parent, page, Prot::WRITE).is_some());
    }
    rig.page_out_all();
    let leaves = |guest: &TestMap| guest.with_pmap(&mut Held::root(), |pmap| pmap.leaves().count());
    assert_eq!(leaves(&parent), 4, "memory went, the device did not");
    rig.check();
    let snapshot = rig.vm.snapshot(&parent, &mut Held::root()).unwrap();
    rig.vm.reset_map(&parent, &snapshot, &|_| {}, &mut Held::root()).unwrap();
    assert_eq!(leaves(&parent), 0);
    assert_eq!(reached(&rig, &parent, 13, Prot::WRITE), DEVICE.checked_add(3));
    rig.vm.delete_snapshot(snapshot, &mut Held::root());
    rig.vm.release(device, &mut Held::root());
    rig.destroy(parent);
    assert_eq!((rig.free(), rig.objects()), (64, 0));
}

#[test]
fn el2_does_not_touch_a_device_for_a_guest() {
    let rig = Rig::new(64);
    let (guest, _) = guest(&rig);
    let hole = Err(Refused::Fault(FaultError::Hole(at(11, 0))));
    assert_eq!(rig.read(&guest, at(11, 0), &mut [0; 8]), hole);
    assert_eq!(rig.write(&guest, at(11, 0), &[0; 8]), hole);
    let held = &mut Held::root();
    assert!(matches!(rig.vm.wire(&guest, at(11, 0), Prot::WRITE, held), Err(FaultError::Hole(_))));
    assert!(matches!(rig.vm.wire(&guest, at(9, 0), Prot::WRITE, held), Ok(Wiring::Done(_))));
    let snapshot = rig.vm.freeze(&guest, held).unwrap();
    let mut byte = [0];
    assert_eq!(rig.vm.read_snapshot(&snapshot, at(11, 0), &mut byte, held), Err(FaultError::Hole(at(11, 0))));
    assert_eq!(rig.vm.read_snapshot(&snapshot, at(9, 77), &mut byte, held), Ok(Looked::Done));
    rig.vm.delete_snapshot(snapshot, held);
    rig.check();
}

#[test]
fn a_device_is_charged_to_nobody_and_neither_discarded_nor_copied() {
    let rig = Rig::new(64);
    let (guest, device) = guest(&rig);
    let mut promised = 0;
    rig.vm.for_each_entry(&guest, &mut Held::root(), |entry| promised += entry.range.pages());
    assert_eq!((promised, rig.vm.charges(&mut Held::root()).committed), (14, 10 + 2));
    assert_eq!(rig.discard(&guest, 12, 1), Err(NotDiscarded::Denied(at(12, 0))));
    rig.vm.reference(device, &mut Held::root()).unwrap();
    let range = IpaRange::from_pages(at(50, 0), 4).unwrap();
    let first = PageIndex::new(0);
    let put = rig.vm.insert(&guest, range, device, first, Prot::ALL, Share::Copy, &mut Held::root());
    assert_eq!(put, Err(VmError::Device));
    // A copy of a range that has it shares it.
    let range = IpaRange::from_pages(at(8, 0), 4).unwrap();
    let kept = rig.vm.copy_in(&guest, range, &mut Held::root()).unwrap();
    let other = rig.vm.create_map(FakePmap::default(), &mut Held::root()).unwrap();
    rig.vm.copy_out(&kept, &other, at(0, 0), &mut Held::root()).unwrap();
    assert_eq!(reached(&rig, &other, 3, Prot::WRITE), DEVICE.checked_add(1));
    rig.check();
    rig.vm.delete_snapshot(kept, &mut Held::root());
}

#[test]
fn a_device_may_have_frames_between_the_vms_and_none_of_them() {
    let rig = Rig::new(64);
    let first = Pfn::new(0x1000);
    let device = |from: u32, to: u32| {
        let frames = Pfn::new(first.number() + from)..Pfn::new(first.number() + to);
        rig.vm.device(frames, &mut Held::root())
    };
    assert_eq!(device(0, 1), Err(VmError::Range));
    assert_eq!(device(63, 70), Err(VmError::Range));
    assert_eq!(device(70, 70), Err(VmError::Range));
    assert!(device(64, 70).is_ok());
    let below = Pfn::new(0)..first;
    assert!(rig.vm.device(below, &mut Held::root()).is_ok());
}

#[test]
fn a_device_that_may_only_be_read_is_only_read() {
    let rig = Rig::new(64);
    let (guest, _) = guest(&rig);
    let range = IpaRange::from_pages(at(10, 0), 1).unwrap();
    rig.vm.protect(&guest, range, Prot::READ, &mut Held::root()).unwrap();
    assert_eq!(reached(&rig, &guest, 10, Prot::READ), Some(DEVICE));
    let denied = FaultError::Denied { at: at(10, 0), wanted: Prot::WRITE };
    assert_eq!(rig.store(&guest, at(10, 0), 1), Err(Refused::Fault(denied)));
    assert_eq!(reached(&rig, &guest, 11, Prot::WRITE), DEVICE.checked_add(1));
    rig.check();
}
