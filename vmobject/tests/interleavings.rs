//! Interleavings, chosen: CPUs that come in between each other wherever they can, as a scheduler says.
//!
//! `smp` lets the host's threads run as they come. Here one of them runs at a time, and at each point
//! ([`vmobject::point`]) a scheduler chooses who goes on: at random, or rarely and at few places (PCT). The stories are
//! those in which it matters who comes first. The six in this file: a page under way and those who wait for it, collapse
//! against fault and against prune, push against a look through the copy, the last reference against a look-up, clone
//! against fault. In `stories` are `chains` (a copy that is mapped while its source writes, one that is forgotten, a
//! part of a guest that ends, a hop to what is another object by now), `transfers` (one that ends while somebody
//! flushes, discards or lets pages go) and `soup` (everything at once: guests with clones and snapshots, and storms of
//! swapping and of writing to a disk). A story for which there is a defect is played with that until it is found, and
//! then each is played without. A failure prints the scheduler's seed and the schedule, which `shuttle::replay` takes;
//! `SHUTTLE_SEED=n` begins elsewhere and `SHUTTLE_ROUNDS=n` plays longer.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

mod stories;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::atomic::AtomicBool;
use shuttle::{Config, MaxSteps, Runner, thread};
use vmobject::addr::{CHUNK_PAGES, IpaRange};
use vmobject::defect::Defect;
use vmobject::fault::{Faulted, Looked, WaitFor};
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::pmap::Pmap as _;
use vmobject::point::{self, Point};
use vmobject::prot::Prot;
use vmobject::store::{IoToken, PhysMemory as _, StoreId};
use vmobject::testing::{FakePmap, Rig, TestMap, at, byte_of};

const IMAGE: StoreId = StoreId(5);
/// Rounds of a story that nothing is wrong with, under each scheduler; or as many as its defect took to be found, if those
/// are more.
const ROUNDS: usize = 1000;
/// Rounds in which a defect has to be found.
const ENOUGH: usize = 20_000;
/// Places at which the PCT scheduler lets another one go on.
const DEPTH: usize = 3;
/// Steps of a round after which somebody waits for what never comes.
const STEPS: usize = 1_000_000;

fn given(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

/// What a scheduler is asked at a point: who goes on. It is only told to let another one if this one cannot.
fn ask(point: Point) {
    match point {
        Point::Free => {
            AtomicBool::new(false).load(SeqCst);
        }
        Point::Blocked => thread::yield_now(),
    }
}

/// Rounds that were played under the present scheduler.
static PLAYED: AtomicU32 = AtomicU32::new(0);

/// A story of a machine, in which something may be wrong.
type Story = fn(Option<Defect>);

/// Plays a story under a scheduler: whether it came to a good end, always.
fn plays(
    story: Story,
    defect: Option<Defect>,
    scheduler: impl Scheduler + 'static,
) -> std::thread::Result<()> {
    point::set_hook(ask);
    let mut config = Config::new();
    config.max_steps = MaxSteps::FailAfter(STEPS);
    config.stack_size = 1 << 20;
    let runner = Runner::new(scheduler, config);
    PLAYED.store(0, Relaxed);
    catch_unwind(AssertUnwindSafe(|| {
        runner.run(move || {
            PLAYED.fetch_add(1, Relaxed);
            story(defect);
        });
    }))
}

/// A story is good.
fn hold(story: Story, rounds: usize) {
    let _one = one();
    play_well(story, DEPTH, rounds, 0);
}

/// A story is good, and is not when a defect is in it.
fn tell(story: Story, defect: Defect) {
    tell_to(DEPTH, story, defect);
}

/// The same with another depth: the defect takes more than the others.
fn tell_to(depth: usize, story: Story, defect: Defect) {
    let _one = one();
    let seed = seed();
    let found = plays(story, Some(defect), PctScheduler::new_from_seed(seed, depth, ENOUGH)).is_err()
        || plays(story, Some(defect), RandomScheduler::new_from_seed(seed, ENOUGH)).is_err();
    assert!(found, "with {defect:?} all is well in {ENOUGH} rounds from seed {seed}");
    let round = PLAYED.load(Relaxed);
    println!("{defect:?} was found in round {round}; from here on nothing is to be");
    // What would be found without the defect, and as late, is to be found here.
    play_well(story, depth, ROUNDS, usize::try_from(round).unwrap());
}

/// Only one story at a time: a schedule is of one.
fn one() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn seed() -> u64 {
    given("SHUTTLE_SEED").unwrap_or(1)
}

/// Plays a story in which nothing is wrong under each scheduler, so many rounds or as many as are asked for, and `least`
/// at least.
fn play_well(story: Story, depth: usize, rounds: usize, least: usize) {
    let seed = seed();
    let rounds = given("SHUTTLE_ROUNDS").map_or(rounds, |rounds| usize::try_from(rounds).unwrap());
    let rounds = rounds.max(least);
    for (name, good) in [
        ("random", plays(story, None, RandomScheduler::new_from_seed(seed, rounds))),
        ("PCT", plays(story, None, PctScheduler::new_from_seed(seed, depth, rounds))),
    ] {
        good.unwrap_or_else(|panic| {
            println!("under the {name} scheduler from seed {seed}");
            resume_unwind(panic)
        });
    }
}

fn rig(defect: Option<Defect>) -> Arc<Rig> {
    let rig = Rig::with_swap(64, 64);
    rig.vm.seed(defect);
    Arc::new(rig)
}

/// An access of a guest: `Err` if it has to wait first.
fn attempt(rig: &Rig, map: &TestMap, page: u32, write: Option<u8>) -> Result<u8, WaitFor> {
    let access = if write.is_some() { Prot::WRITE } else { Prot::READ };
    let memory = &rig.vm.machine().memory;
    loop {
        // Under the tables' lock, as a CPU's access is made before an invalidate that it would have seen is done.
        let done = map.with_pmap(&mut Held::root(), |pmap| {
            let frame = pmap.access(at(page, 77), access)?;
            let mut byte = [0];
            match write {
                Some(value) => memory.write(frame, 77, &[value]),
                None => memory.read(frame, 77, &mut byte),
            }
            Some(write.unwrap_or(byte[0]))
        });
        if let Some(byte) = done {
            return Ok(byte);
        }
        match rig.vm.fault(map, at(page, 77), access, &mut Held::root()).unwrap() {
            Faulted::Mapped => {}
            Faulted::Wait(wait) => return Err(wait),
        }
    }
}

/// The same, however often it has to wait, and this is how it does.
fn access_after(rig: &Rig, map: &TestMap, page: u32, write: Option<u8>, wait: impl Fn(&Rig, WaitFor)) -> u8 {
    loop {
        match attempt(rig, map, page, write) {
            Ok(byte) => return byte,
            Err(what) => wait(rig, what),
        }
    }
}

/// The same for who is the device himself.
fn access(rig: &Rig, map: &TestMap, page: u32, write: Option<u8>) -> u8 {
    access_after(rig, map, page, write, serve)
}

/// Waits by doing what the device does.
fn serve(rig: &Rig, _what: WaitFor) {
    rig.deliver_all();
    thread::yield_now();
}

/// Waits as a vCPU does, while somebody else is the device.
fn park(rig: &Rig, what: WaitFor) {
    thread::yield_now();
    if let WaitFor::Io(token) = what {
        while rig.vm.in_flight(token) {
            thread::yield_now();
        }
    }
}

/// Takes away the leaves of a guest's first pages, as an eviction does.
fn unmap(guest: &TestMap, pages: u32) {
    let range = IpaRange::from_pages(at(0, 0), pages).unwrap();
    guest.with_pmap(&mut Held::root(), |pmap| pmap.remove(range, &mut |_| {}));
}

/// A guest of three pages and two children: each child has the first page for itself, the guest the other two.
fn family(rig: &Rig) -> (TestMap, [TestMap; 2]) {
    let guest = rig.guest(3);
    rig.fill(&guest, 0..3);
    let children = [1, 2].map(|page| {
        let child = Rig::clone(rig, &guest);
        rig.store(&child, at(0, 77), 50).unwrap();
        rig.store(&guest, at(page, 77), 60).unwrap();
        child
    });
    rig.settle();
    (guest, children)
}

fn at_rest(rig: &Rig) {
    while rig.deliver_all() > 0 {}
    rig.settle();
    rig.check();
    assert_eq!(rig.vm.check_at_rest(&mut Held::root()), Ok(()));
}

/// Nobody has anything any more: no frame, no object, no slot.
fn nothing_is_left(rig: &Rig) {
    at_rest(rig);
    let (memory, swap) = (rig.vm.memory(&mut Held::root()), rig.vm.swap_info(&mut Held::root()));
    assert_eq!((memory.queues.free, memory.objects, swap.in_use), (memory.total, 0, 0));
}

/// Two guests of one image and two vCPUs of each want pages that are under way. Each parks for the transfer that it is told,
/// and is woken when that one has ended: none is told of one that never does.
fn those_who_wait_for_a_page_are_woken(defect: Option<Defect>) {
    let rig = rig(defect);
    let guest = rig.guest(4);
    rig.fill(&guest, 0..4);
    rig.page_out_all();
    let (ended, done): (Arc<Mutex<Vec<IoToken>>>, Arc<AtomicU32>) = Default::default();
    let vcpus: Vec<_> = (0..3)
        .map(|vcpu: u32| {
            let (rig, guest) = (Arc::clone(&rig), guest.clone());
            let (ended, done) = (Arc::clone(&ended), Arc::clone(&done));
            thread::spawn(move || {
                for page in [vcpu % 2, 2] {
                    let seen = loop {
                        match attempt(&rig, &guest, page, None) {
                            Ok(byte) => break byte,
                            Err(WaitFor::Io(token)) => {
                                while !ended.lock().unwrap().contains(&token) {
                                    thread::yield_now();
                                }
                            }
                            Err(WaitFor::Memory | WaitFor::Turn) => panic!("there is memory"),
                        }
                    };
                    assert_eq!(seen, byte_of(page), "a page is seen before it is there");
                }
                done.fetch_add(1, Relaxed);
            })
        })
        .collect();
    while done.load(Relaxed) < 3 {
        if let Some(request) = rig.vm.machine().store.requests().first() {
            let token = request.token;
            rig.deliver(0, Ok(()));
            ended.lock().unwrap().push(token);
        }
        thread::yield_now();
    }
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    at_rest(&rig);
}

/// The oldest of seven generations ends, and what it had moves up by one while the youngest reads and writes it, along a
/// trail that leads past all between them.
fn a_fault_finds_its_page_while_a_collapse_moves_it(defect: Option<Defect>) {
    let rig = rig(defect);
    let first = rig.guest(2 * CHUNK_PAGES);
    rig.fill(&first, 0..24); // more than one step moves
    let mut between = Vec::new();
    let mut youngest = Rig::clone(&rig, &first);
    for generation in 0..5 {
        rig.store(&youngest, at(CHUNK_PAGES + generation, 77), 1).unwrap();
        let next = Rig::clone(&rig, &youngest);
        between.push(std::mem::replace(&mut youngest, next));
    }
    assert_eq!(access(&rig, &youngest, 20, None), byte_of(20));
    assert!(rig.vm.stats().trail_laid > 0, "the way is too short");
    let end = {
        let rig = Arc::clone(&rig);
        thread::spawn(move || {
            rig.vm.destroy_map(first, &mut Held::root());
            while rig.vm.step(3, &mut Held::root()) {}
        })
    };
    for page in 0..3 {
        unmap(&youngest, 24);
        assert_eq!(access(&rig, &youngest, page, None), byte_of(page), "page {page}");
        access(&rig, &youngest, page, Some(100));
        assert_eq!(access(&rig, &youngest, page, None), 100, "page {page}");
    }
    end.join().unwrap();
    at_rest(&rig);
    between.into_iter().for_each(|map| rig.destroy(map));
    at_rest(&rig);
    assert_eq!([0, 4].map(|page| access(&rig, &youngest, page, None)), [100, byte_of(4)]);
    rig.destroy(youngest);
    nothing_is_left(&rig);
}

/// A parent ends whose child has copied pages: one CPU moves those down to what the parent leaves, another one looks for
/// what they hide there.
fn what_hides_a_page_takes_its_place_while_that_is_pruned(defect: Option<Defect>) {
    let rig = rig(defect);
    let parent = rig.guest(12);
    rig.fill(&parent, 0..12);
    let child = Rig::clone(&rig, &parent);
    // More than one step moves.
    for page in 0..4 {
        rig.store(&child, at(page, 77), 100).unwrap();
    }
    let other = {
        let rig = Arc::clone(&rig);
        thread::spawn(move || while rig.vm.step(3, &mut Held::root()) {})
    };
    rig.vm.destroy_map(parent, &mut Held::root());
    while rig.vm.step(3, &mut Held::root()) {}
    other.join().unwrap();
    unmap(&child, 12);
    for page in 0..5 {
        let written = if page < 4 { 100 } else { byte_of(page) };
        assert_eq!(access(&rig, &child, page, None), written, "page {page}");
    }
    at_rest(&rig);
    rig.destroy(child);
    nothing_is_left(&rig);
}

/// A guest of whose memory an image is made writes a page that its children have copies of: what the image saw through it
/// becomes nobody's, and goes, while the image's writer is on his way to it.
fn an_image_is_of_one_instant(defect: Option<Defect>) {
    let rig = rig(defect);
    let (guest, children) = family(&rig);
    let kept = rig.vm.freeze(&guest, &mut Held::root()).unwrap();
    let writes = {
        let (rig, guest) = (Arc::clone(&rig), guest.clone());
        thread::spawn(move || {
            access(&rig, &guest, 0, Some(100));
            while rig.vm.step(8, &mut Held::root()) {}
        })
    };
    let mut byte = [0];
    while rig.vm.read_snapshot(&kept, at(0, 77), &mut byte, &mut Held::root()).unwrap() != Looked::Done {
        thread::yield_now();
    }
    assert_eq!(byte, [byte_of(0)], "an image keeps what was there");
    writes.join().unwrap();
    at_rest(&rig);
    rig.vm.delete_snapshot(kept, &mut Held::root());
    children.into_iter().for_each(|child| rig.destroy(child));
    rig.destroy(guest);
    nothing_is_left(&rig);
}

/// A clone of an image reads a page through it, and through the guest, that lies below both, while the guest changes its
/// neighbour: the clone has mapped what the image received of that, or nothing.
fn what_is_mapped_along_is_of_the_same_instant(defect: Option<Defect>) {
    let rig = rig(defect);
    let guest = rig.guest(4);
    rig.fill(&guest, 0..4);
    let other = Rig::clone(&rig, &guest);
    access(&rig, &guest, 2, Some(60));
    let kept = rig.vm.freeze(&guest, &mut Held::root()).unwrap();
    let child = rig.vm.map_snapshot(&kept, FakePmap::default(), &mut Held::root()).unwrap();
    access(&rig, &child, 3, Some(50));
    let writes = {
        let (rig, guest) = (Arc::clone(&rig), guest.clone());
        thread::spawn(move || {
            access(&rig, &guest, 1, Some(100));
        })
    };
    assert_eq!(access(&rig, &child, 0, None), byte_of(0));
    writes.join().unwrap();
    assert_eq!(access(&rig, &child, 1, None), byte_of(1), "a neighbour as it was");
    at_rest(&rig);
    rig.vm.delete_snapshot(kept, &mut Held::root());
    [child, guest, other].into_iter().for_each(|map| rig.destroy(map));
    nothing_is_left(&rig);
}

/// The last guest of an image ends while another one opens it: it finds the object that is there, or makes a new one,
/// and never has one that is gone.
fn who_opens_an_image_while_its_last_user_ends_has_it(defect: Option<Defect>) {
    let rig = rig(defect);
    rig.vm.machine().store.add(IMAGE, vec![7; 2 << 12]);
    let open = |rig: &Rig| {
        let map = rig.map();
        let image = rig.vm.image(IMAGE, &mut Held::root()).unwrap();
        rig.put(&map, 0, 2, image, 0, Prot::READ, Share::Shared).unwrap();
        map
    };
    let last = open(&rig);
    let ends = {
        let rig = Arc::clone(&rig);
        thread::spawn(move || {
            rig.vm.destroy_map(last, &mut Held::root());
            while rig.vm.step(4, &mut Held::root()) {}
        })
    };
    let other = {
        let rig = Arc::clone(&rig);
        thread::spawn(move || {
            let map = open(&rig);
            assert_eq!(access(&rig, &map, 1, None), 7);
            map
        })
    };
    let map = open(&rig);
    assert_eq!(access(&rig, &map, 0, None), 7);
    let other = other.join().unwrap();
    ends.join().unwrap();
    at_rest(&rig);
    assert_eq!(rig.objects(), 1, "one store has one object (D27)");
    [map, other].into_iter().for_each(|map| rig.destroy(map));
    nothing_is_left(&rig);
}

/// A guest writes its pages in turn while it is cloned: the clone is of one instant, and stays so.
fn a_clone_is_of_one_instant(defect: Option<Defect>) {
    let rig = rig(defect);
    let guest = rig.guest(2);
    rig.fill(&guest, 0..2);
    // The first page has no leaf, the second one a writable one.
    unmap(&guest, 1);
    let writes = {
        let (rig, guest) = (Arc::clone(&rig), guest.clone());
        thread::spawn(move || {
            for round in 100..102 {
                for page in 0..2 {
                    access(&rig, &guest, page, Some(round));
                    assert_eq!(access(&rig, &guest, page, None), round, "a guest reads what it wrote");
                }
            }
        })
    };
    let clone = rig.vm.copy_map(&guest, FakePmap::default(), &mut Held::root()).unwrap();
    let look = || [0, 1].map(|page| access(&rig, &clone, page, None));
    let seen = look();
    let known: Vec<[u8; 2]> =
        vec![[byte_of(0), byte_of(1)], [100, byte_of(1)], [100, 100], [101, 100], [101, 101]];
    assert!(known.contains(&seen), "{seen:?} was never there");
    writes.join().unwrap();
    assert_eq!(look(), seen, "a clone keeps what it has");
    at_rest(&rig);
    rig.destroy(guest);
    rig.destroy(clone);
    nothing_is_left(&rig);
}

#[test]
fn those_who_wait_for_a_page_are_woken_when_it_is_there_and_not_before() {
    tell(those_who_wait_for_a_page_are_woken, Defect::SeesWhatFills);
}

#[test]
fn a_fault_finds_its_page_wherever_a_collapse_has_moved_it() {
    tell(a_fault_finds_its_page_while_a_collapse_moves_it, Defect::HopsBlindly);
}

#[test]
fn who_looks_an_object_up_while_its_last_reference_goes_has_it_or_a_new_one() {
    tell(who_opens_an_image_while_its_last_user_ends_has_it, Defect::FindsTheDead);
}

#[test]
fn a_clone_that_is_made_between_faults_is_of_one_instant() {
    tell(a_clone_is_of_one_instant, Defect::ParksUnlocked);
}

#[test]
fn a_page_that_came_down_in_place_of_a_hidden_one_is_not_pruned_for_it() {
    tell(what_hides_a_page_takes_its_place_while_that_is_pruned, Defect::PrunesWhatCameDown);
}

#[test]
fn an_image_that_is_read_while_its_guest_writes_is_of_one_instant() {
    tell(an_image_is_of_one_instant, Defect::ReadsPastAPush);
}

#[test]
fn what_is_mapped_along_with_a_page_below_an_image_is_of_its_instant() {
    tell(what_is_mapped_along_is_of_the_same_instant, Defect::AroundPastAPush);
}
