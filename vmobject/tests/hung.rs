//! A store that never answers, and one whose queue stays full: everybody who does not need that one goes on.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use std::sync::atomic::Ordering::Relaxed;

use vmobject::addr::{PAGE_SIZE, PageIndex};
use vmobject::fault::{Copied, Faulted, WaitFor};
use vmobject::limits::{CLUSTER_PAGES, PUTS_OF_ONE};
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::object::ObjectId;
use vmobject::pager::{Clean, Cleaned};
use vmobject::prot::Prot;
use vmobject::store::{StoreError, StoreId};
use vmobject::testing::{Request, Rig, SWAP, TestMap, at, byte_of};

const DISK: StoreId = StoreId(4);
/// Attempts after which somebody is held up for good.
const PATIENCE: u32 = 20_000;
const PUTS: usize = PUTS_OF_ONE as usize;

/// A guest with a disk of so many pages.
fn disk(rig: &Rig, pages: u32) -> (TestMap, ObjectId) {
    let bytes = usize::try_from(u64::from(pages) * PAGE_SIZE).unwrap();
    rig.vm.machine().store.add(DISK, vec![0x11; bytes]);
    let (map, disk) = (rig.map(), rig.vm.disk(DISK, &mut Held::root()).unwrap());
    rig.put(&map, 0, pages, disk, 0, Prot::READ | Prot::WRITE, Share::Shared).unwrap();
    (map, disk)
}

/// Pages of a disk are written, and a flush has sent what it can.
fn flush_hangs(rig: &Rig, guest: &TestMap, disk: ObjectId, pages: impl Iterator<Item = u32>) -> Clean {
    for page in pages {
        rig.store(guest, at(page, 7), 0xaa).unwrap();
    }
    let mut clean = rig.vm.page_clean(disk, PageIndex::new(0)..PageIndex::new(1024));
    while rig.vm.clean_step(&mut clean, 64, &mut Held::root()) == Cleaned::More {}
    clean
}

/// A transfer ends that is not of the store which never answers.
fn answer_others(rig: &Rig, hung: StoreId) {
    let requests = rig.vm.machine().store.requests();
    if let Some(place) = requests.iter().position(|request| request.store != hung) {
        rig.deliver(place, Ok(()));
    }
}

/// How many transfers of a store there are.
fn pending(rig: &Rig, store: StoreId) -> usize {
    rig.vm.machine().store.requests().iter().filter(|request| request.store == store).count()
}

/// A guest writes its pages one after the other while a store never answers; whenever it waits it waits for memory.
fn write_all(rig: &Rig, guest: &TestMap, pages: u32, hung: StoreId) {
    let (mut page, mut attempts) = (0, 0);
    while page < pages {
        match rig.vm.fault(guest, at(page, 77), Prot::WRITE, &mut Held::root()).unwrap() {
            Faulted::Mapped => {
                rig.store(guest, at(page, 77), byte_of(page)).unwrap();
                (page, attempts) = (page + 1, 0);
            }
            Faulted::Wait(what) => {
                assert_eq!(what, WaitFor::Memory);
                attempts += 1;
                assert!(attempts < PATIENCE, "held up for good at page {page}");
            }
        }
        rig.vm.pageout(64, &mut Held::root());
        answer_others(rig, hung);
    }
    rig.check();
}

/// At last the store answers, and the guest reads everything that it wrote.
fn read_all(rig: &Rig, guest: &TestMap, pages: u32) {
    for page in 0..pages {
        rig.deliver_all();
        assert_eq!(rig.load(guest, at(page, 77)), Ok(byte_of(page)), "page {page}");
        while rig.vm.pageout(64, &mut Held::root()).more {}
    }
    rig.check();
}

#[test]
fn a_swap_store_that_never_answers_does_not_stop_pageout_to_another() {
    let rig = Rig::new(4096);
    let [hung, well] = [StoreId(0), StoreId(1)];
    for store in [hung, well] {
        rig.vm.machine().store.add(store, vec![0; usize::try_from(4096 * PAGE_SIZE).unwrap()]);
        rig.vm.add_swap_at(store, 0, &mut Held::root()).unwrap();
    }
    let guest = rig.guest(6000);
    write_all(&rig, &guest, 6000, hung);
    assert_eq!(pending(&rig, hung), PUTS, "it is asked no more");
    read_all(&rig, &guest, 6000);
}

#[test]
fn a_queue_that_stays_full_does_not_stop_the_eviction_of_clean_pages() {
    for queue in [4, 14] {
        let rig = Rig::with_swap(4096, 4096);
        let clean = rig.guest(500);
        rig.fill(&clean, 0..500);
        rig.page_out_all();
        let dirty = rig.guest(400);
        rig.fill(&dirty, 0..400);
        for page in 0..500 {
            rig.load(&clean, at(page, 77)).unwrap();
        }
        rig.vm.machine().store.queue.store(queue, Relaxed);
        rig.vm.set_free_target(u32::MAX, u32::MAX);
        let before = rig.vm.stats().evicted;
        for _ in 0..PATIENCE {
            rig.vm.pageout(64, &mut Held::root());
        }
        assert_eq!(rig.vm.stats().evicted - before, 500, "all that need no writing");
        assert_eq!(pending(&rig, SWAP), PUTS.min(usize::try_from(queue).unwrap()));
        rig.check();
        rig.ease();
        rig.vm.machine().store.queue.store(0, Relaxed);
        read_all(&rig, &clean, 500);
        read_all(&rig, &dirty, 400);
    }
}

#[test]
fn a_limited_guest_goes_on_although_somebody_elses_disk_never_answers() {
    let rig = Rig::with_swap(4096, 2048);
    let (other, disk) = disk(&rig, 256);
    let _flush = flush_hangs(&rig, &other, disk, 0..3 * CLUSTER_PAGES);
    assert_eq!(pending(&rig, DISK), 3);
    let guest = rig.guest(1000);
    rig.vm.set_limit(&guest, Some(128), &mut Held::root()).unwrap();
    write_all(&rig, &guest, 300, DISK);
    let own = rig.vm.own_frames(&guest, &mut Held::root());
    assert!((64..=128).contains(&own), "{own} of 128");
    assert_eq!(pending(&rig, DISK), 3);
    rig.vm.set_limit(&guest, None, &mut Held::root()).unwrap();
    read_all(&rig, &guest, 300);
}

#[test]
fn a_disk_that_never_answers_leaves_room_for_writes_to_swap() {
    let rig = Rig::with_swap(4096, 2048);
    let (other, disk) = disk(&rig, 1024);
    let cluster = usize::try_from(CLUSTER_PAGES).unwrap();
    let _flush = flush_hangs(&rig, &other, disk, (0..1024).step_by(cluster));
    assert_eq!(pending(&rig, DISK), PUTS, "of 64");
    let guest = rig.guest(200);
    rig.fill(&guest, 0..200);
    rig.vm.set_free_target(u32::MAX, u32::MAX);
    for _ in 0..PATIENCE {
        rig.vm.pageout(64, &mut Held::root());
        answer_others(&rig, DISK);
    }
    assert_eq!(rig.vm.swap_info(&mut Held::root()).in_use, 200);
    assert_eq!((pending(&rig, DISK), pending(&rig, SWAP)), (PUTS, 0));
    rig.ease();
    read_all(&rig, &guest, 200);
}

#[test]
fn a_disk_is_flushed_although_the_swap_store_never_answers() {
    let rig = Rig::with_swap(4096, 2048);
    let (guest, disk) = disk(&rig, 64);
    let other = rig.guest(1000);
    rig.fill(&other, 0..1000);
    rig.vm.set_free_target(u32::MAX, u32::MAX);
    for _ in 0..5000 {
        rig.vm.pageout(64, &mut Held::root());
    }
    rig.ease();
    assert_eq!(pending(&rig, SWAP), PUTS);
    while rig.vm.write(&guest, at(3, 7), &[0xaa], &mut Held::root()).unwrap() != Copied::Done {
        answer_others(&rig, SWAP);
    }
    let mut clean = rig.vm.page_clean(disk, PageIndex::new(0)..PageIndex::new(64));
    let failed = (0..PATIENCE).find_map(|_| match rig.vm.clean_step(&mut clean, 64, &mut Held::root()) {
        Cleaned::Done { failed } => Some(failed),
        Cleaned::More => None,
        Cleaned::Wait(_) => {
            answer_others(&rig, SWAP);
            None
        }
    });
    assert_eq!(failed, Some(0));
    assert_eq!((rig.vm.machine().store.page(DISK, 3)[7], pending(&rig, SWAP)), (0xaa, PUTS));
    rig.check();
    read_all(&rig, &other, 1000);
}

#[test]
fn what_a_disk_never_takes_does_not_count_as_memory_that_is_about_to_be_free() {
    let rig = Rig::with_swap(4096, 4096);
    let (other, disk) = disk(&rig, 64);
    let mut flush = flush_hangs(&rig, &other, disk, 0..CLUSTER_PAGES);
    assert_eq!(pending(&rig, DISK), 1);
    let guest = rig.guest(6000);
    write_all(&rig, &guest, 5000, DISK);
    assert_eq!((pending(&rig, DISK), rig.vm.is_short()), (1, false));
    read_all(&rig, &guest, 5000);
    let step = rig.vm.clean_step(&mut flush, 64, &mut Held::root());
    assert!(matches!(step, Cleaned::Wait(WaitFor::Io(_))), "{step:?}: its store is told to keep it");
    rig.deliver_all();
    let step = rig.vm.clean_step(&mut flush, 64, &mut Held::root());
    assert_eq!(step, Cleaned::Done { failed: 0 });
}

/// What fails together is tried alone: not so often that a store which then says nothing has every place.
#[test]
fn a_swap_store_that_fails_and_then_never_answers_leaves_the_others_their_places() {
    let rig = Rig::new(4096);
    let [bad, well] = [StoreId(0), StoreId(1)];
    for store in [bad, well] {
        rig.vm.machine().store.add(store, vec![0; 4096 << 12]);
        rig.vm.add_swap_at(store, 0, &mut Held::root()).unwrap();
    }
    let guest = rig.guest(6000);
    let to = |store: StoreId| {
        let requests = rig.vm.machine().store.requests();
        requests.iter().filter(|request| request.store == store).count()
    };
    let (mut page, mut attempts, mut errors) = (0, 0, 0);
    while page < 6000 {
        match rig.vm.fault(&guest, at(page, 77), Prot::WRITE, &mut Held::root()).unwrap() {
            Faulted::Mapped => {
                rig.store(&guest, at(page, 77), byte_of(page)).unwrap();
                (page, attempts) = (page + 1, 0);
            }
            Faulted::Wait(_) => attempts += 1,
        }
        assert!(attempts < 20_000, "{page} pages; {} and {} transfers", to(bad), to(well));
        rig.vm.pageout(64, &mut Held::root());
        assert!(to(bad) <= PUTS, "{} transfers to one store", to(bad));
        let nth = |which: &dyn Fn(&Request) -> bool| rig.vm.machine().store.requests().iter().position(which);
        while let Some(nth) = nth(&|request| request.store == well) {
            rig.deliver(nth, Ok(()));
        }
        if errors < 8
            && to(bad) >= PUTS
            && let Some(nth) = nth(&|request| request.store == bad && request.frames.len() > 1)
        {
            errors += 1;
            rig.deliver(nth, Err(StoreError::Io));
        }
    }
    assert!(errors > 0, "nothing failed");
}
