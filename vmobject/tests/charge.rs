//! Promises and their limits: charges, what a vCPU needs to get on, and ends that take their time.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use vmobject::VmError;
use vmobject::addr::{Ipa, PageIndex};
use vmobject::charge::Overcommit;
use vmobject::fault::Faulted;
use vmobject::lock::Held;
use vmobject::map::{Instruction, Share};
use vmobject::pmap::Pmap as _;
use vmobject::prot::Prot;
use vmobject::testing::{FakePmap, Rig, TestMap, at};

fn committed(rig: &Rig) -> u64 {
    rig.vm.charges(&mut Held::root()).committed
}

fn strict(frames: u32, swap: u32, percent: u32) -> Rig {
    let rig = Rig::new(frames);
    rig.add_swap(swap);
    rig.vm.set_overcommit(Overcommit::Percent(percent), &mut Held::root());
    rig
}

#[test]
fn a_guest_is_charged_whole_when_it_is_made_and_given_back_when_it_ends_d21() {
    let rig = strict(1000, 1000, 100);
    let guest = rig.guest(512);
    assert_eq!(committed(&rig), 512 + 2, "its pages, a table and a part of an index");
    rig.check();
    rig.destroy(guest);
    assert_eq!(committed(&rig), 0);
    rig.check();
}

#[test]
fn what_does_not_fit_is_refused_at_the_call_and_changes_nothing_d21() {
    let rig = strict(1000, 1000, 100);
    let limit = rig.vm.charges(&mut Held::root()).limit.unwrap();
    assert_eq!(limit, 2000 - 16, "frames and slots, less the reserve");
    let guest = rig.guest(1500);
    let (before, objects) = (committed(&rig), rig.objects());
    let left = limit - before;
    let refused = VmError::Overcommit { wanted: before, left };
    let held = &mut Held::root();
    assert_eq!(rig.vm.copy_map(&guest, FakePmap::default(), held).err(), Some(refused));
    assert_eq!(rig.vm.snapshot(&guest, held).err(), Some(refused));
    let (map, object) = (rig.map(), rig.anonymous(1500));
    assert_eq!(rig.put(&map, 0, 1500, object, 0, Prot::ALL, Share::Shared), Err(refused));
    assert_eq!((committed(&rig), rig.objects()), (before, objects));
    rig.check();
    rig.store(&guest, at(3, 3), 3).unwrap();
    assert_eq!(rig.load(&guest, at(3, 3)), Ok(3), "the guest that is there goes on");
}

#[test]
fn a_ratio_lets_more_be_promised_and_none_lets_all() {
    let rig = strict(1000, 0x100, 300);
    let limit = rig.vm.charges(&mut Held::root()).limit.unwrap();
    assert_eq!(limit, (1000 + 256 - 16) * 3);
    let guests: Vec<TestMap> = (0..3).map(|_| rig.guest(1000)).collect();
    assert!(rig.vm.copy_map(&guests[0], FakePmap::default(), &mut Held::root()).is_err());
    rig.vm.set_overcommit(Overcommit::None, &mut Held::root());
    let clones: Vec<TestMap> = (0..50).map(|_| rig.clone(&guests[0])).collect();
    assert_eq!(committed(&rig), 53 * 1004);
    rig.check();
    drop((guests, clones));
}

#[test]
fn snapshots_are_charged_and_a_reset_costs_nothing_more() {
    let rig = strict(1000, 1000, 100);
    let guest = rig.guest(900);
    let held = &mut Held::root();
    let snapshot = rig.vm.snapshot(&guest, held).unwrap();
    assert_eq!(committed(&rig), 2 * 904);
    rig.check();
    rig.store(&guest, at(0, 0), 1).unwrap();
    rig.vm.reset_map(&guest, &snapshot, &|_| {}, held).unwrap();
    assert_eq!(rig.load(&guest, at(0, 0)), Ok(0), "there was room for no third promise, nor need");
    rig.check();
    rig.vm.delete_snapshot(snapshot, held);
    assert_eq!(committed(&rig), 904);
    rig.check();
}

#[test]
fn what_can_only_be_read_is_not_charged() {
    let rig = strict(1000, 8, 100);
    let (map, object) = (rig.map(), rig.anonymous(5000));
    rig.put(&map, 0, 5000, object, 0, Prot::READ_EXECUTE, Share::Shared).unwrap();
    assert_eq!(committed(&rig), 0);
    rig.check();
}

/// The pages that one instruction needs, far apart.
const NEEDED: [u32; 15] = [3, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 220, 240, 260, 280];

/// Runs one instruction that needs all of them at once while pageout takes everything it can between any two
/// faults; how many faults it took, if it came to an end.
fn run(rig: &Rig, guest: &TestMap, vcpu: Option<usize>) -> Option<u32> {
    let held = &mut Held::root();
    for faults in 0..200 {
        let missing = NEEDED.iter().find(|&&page| {
            let leaf = guest.with_pmap(held, |pmap| pmap.lookup(at(page, 0)));
            leaf.is_none_or(|leaf| !leaf.prot.allows(Prot::WRITE))
        });
        let Some(&page) = missing else { return Some(faults) };
        let by = vcpu.map(|vcpu| Instruction { vcpu, pc: 0x4008_0000 });
        match rig.vm.fault_for(guest, by, at(page, 0), Prot::WRITE, held).unwrap() {
            Faulted::Mapped => {}
            Faulted::Wait(_) => {
                rig.deliver_all();
            }
        }
        rig.page_out_all();
        // And for a while there is enough.
        rig.ease();
        rig.check();
    }
    None
}

#[test]
fn a_vcpu_gets_on_although_pageout_takes_all_it_can_i15() {
    let rig = Rig::new(400);
    rig.add_swap(1000);
    let guest = rig.guest(300);
    rig.vm.set_vcpus(&guest, 2, &mut Held::root()).unwrap();
    for page in 0..300 {
        rig.store(&guest, at(page, 1), 1).unwrap();
    }
    rig.page_out_all();
    assert_eq!(run(&rig, &guest, None), None, "the test is as hard as it is meant to be");
    for vcpu in [0, 1] {
        let faults = run(&rig, &guest, Some(vcpu)).unwrap();
        assert!(faults <= 2 * 15 + 2, "{faults} faults");
        guest.forget_needs(vcpu);
        rig.page_out_all();
        assert_eq!(rig.free(), 400, "what was needed may go when the instruction is done");
    }
}

#[test]
fn what_vcpus_need_must_fit_in_frames_whatever_the_policy_i15() {
    let rig = Rig::new(400);
    rig.add_swap(10_000);
    let guest = rig.guest(300);
    let held = &mut Held::root();
    assert!(matches!(rig.vm.set_vcpus(&guest, 22, held), Err(VmError::Overcommit { .. })));
    rig.vm.set_vcpus(&guest, 21, held).unwrap();
    let other = rig.guest(300);
    assert!(rig.vm.set_vcpus(&other, 1, held).is_err());
    rig.destroy(guest);
    rig.vm.set_vcpus(&other, 1, held).unwrap();
}

#[test]
fn a_large_map_ends_in_bounded_steps_and_leaves_nothing_i6() {
    let rig = Rig::new(4096);
    rig.add_swap(1000);
    let guest = rig.guest(3000);
    for page in 0..3000 {
        rig.store(&guest, at(page, 0), 1).unwrap();
    }
    let leaves = |guest: &TestMap| guest.with_pmap(&mut Held::root(), |pmap| pmap.leaves().count());
    let other = guest.clone();
    rig.vm.destroy_map(guest, &mut Held::root());
    let mut steps = 0;
    let mut before = leaves(&other);
    assert!(before > 2000);
    while rig.vm.step(100, &mut Held::root()) {
        let now = leaves(&other);
        assert!(before - now <= 100);
        rig.check();
        (before, steps) = (now, steps + 1);
    }
    assert!(steps > 50);
    assert_eq!((rig.free(), rig.objects(), leaves(&other)), (4096, 0, 0));
}

#[test]
fn a_map_with_no_room_left_for_an_entry_gives_its_promise_back() {
    let rig = strict(1000, 8, 100);
    let map = rig.map();
    let object = rig.anonymous(8);
    rig.put(&map, 0, 8, object, 0, Prot::ALL, Share::Shared).unwrap();
    let before = committed(&rig);
    let second = rig.anonymous(8);
    let range = vmobject::addr::IpaRange::from_pages(at(4, 0), 8).unwrap();
    let first = PageIndex::new(0);
    let held = &mut Held::root();
    let overlap = rig.vm.insert(&map, range, second, first, Prot::ALL, Share::Shared, held);
    assert_eq!((overlap, committed(&rig)), (Err(VmError::Overlap), before));
    let beyond = vmobject::addr::IpaRange::from_pages(Ipa::new(1 << 40), 8).unwrap();
    let third = rig.anonymous(8);
    assert!(rig.vm.insert(&map, beyond, third, first, Prot::ALL, Share::Shared, held).is_err());
    assert_eq!(committed(&rig), before);
    rig.check();
}
