//! CPUs in each other's way: real guests, whose entries are played, on CPUs that are played one at a time.
//!
//! What another CPU does in between is done where the code under test calls out. All tests share the machine's queues, so
//! one runs at a time.

use super::*;
use crate::arch::context::Trap;
use crate::arch::{irq, percpu, switch};
use crate::guest::devices::Devices;
use crate::guest::exit::Ending;
use crate::guest::family::Birth;
use crate::guest::genid;
use crate::guest::mmio::Target;
use crate::guest::snapshot::{self, Moment, Snapshot};
use crate::guest::stored::numbered;
use crate::guest::trng::Generator;
use crate::guest::vcpu::Vcpu;
use crate::loader::manifest::{Boot, GuestConfig};
use crate::mm::direct::Direct;
use crate::mm::machine::Metal;
use crate::mm::store::Disks;
use crate::mm::{self, machine};
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use vmobject::addr::Pfn;

const FIRST: u32 = 0x4_0000;
const FRAMES: u32 = 4096;
/// A device's interrupt.
const DEVICE: u32 = 77;

/// A machine with two CPUs and nobody on them, for one test.
fn machine_of_two() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    static MADE: Once = Once::new();
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    MADE.call_once(|| {
        let frames = Pfn::new(FIRST)..Pfn::new(FIRST + FRAMES);
        machine::init(Metal::new(Direct::of_zeros(&frames), Disks::new()), core::slice::from_ref(&frames))
            .unwrap();
    });
    let held = &mut Held::root();
    percpu::set(0, 2);
    reserve(64, held).unwrap();
    QUEUES[..2].iter().for_each(|queue| while queue.pop(held).is_some() {});
    let _ = irq::take_kicks();
    guard
}

fn guest(held: &mut Held<'_, 0>) -> Arc<Guest> {
    let config = GuestConfig {
        name: "guest".to_string(),
        boot: Boot::Kernel { image: "kernel".to_string(), initrd: None },
        append: String::new(),
        memory: 1 << 20,
        vcpus: 1,
        grant_fork: 0,
        disks: Vec::new(),
        stored: false,
    };
    let devices = Box::new(Devices::new(1, 4, 62_500_000, 0));
    let (contexts, powers) = (alloc::vec![Vcpu::new(0).context.get_mut().clone()], alloc::vec![Power::On]);
    guest_of(Moment { config, contexts, powers, devices, time: 0 }, held)
}

/// A guest without RAM that was this once.
fn guest_of(moment: Moment, held: &mut Held<'_, 0>) -> Arc<Guest> {
    let map = mm::new_map(held).unwrap();
    genid::install(&map, held).unwrap();
    let memory = mm::vm().snapshot(&map, held).unwrap();
    mm::vm().destroy_map(map, held);
    let snapshot = Snapshot::new(moment, memory, Generator::new(&[1], 1));
    let (id, name, birth) = (table::next_id(), "guest".to_string(), Birth::first(0));
    let guest = snapshot::make(&snapshot, id, name, birth, &|_| {}, held).unwrap();
    snapshot::delete(snapshot, held);
    guest
}

fn ready(guest: &Arc<Guest>) -> VcpuRef {
    let entry = VcpuRef::new(guest, 0).unwrap();
    entry.vcpu().set_state(State::Ready);
    entry
}

/// The guest runs until an interrupt, and what happens meanwhile pauses it.
fn runs_and_is_paused(guest: &Arc<Guest>) {
    let guest = guest.clone();
    switch::expect(move |_| {
        guest.move_life(Life::Running, Life::Paused);
        Trap::Irq
    });
}

/// Something that happens once, in a device.
type Happens = Box<dyn FnOnce(&mut Held<'_, { rank::VCPU }>) + Send>;

/// A guest in the list, whose vCPU waits for something.
fn listed_and_blocked(held: &mut Held<'_, 0>) -> (Arc<Guest>, VcpuRef) {
    let guest = guest(held);
    assert!(table::add(guest.clone(), held).is_ok());
    let entry = ready(&guest);
    entry.vcpu().set_state(State::Blocked);
    (guest, entry)
}

/// A CPU that has run a guest's vCPU, which is ready again; its registers are still there.
fn cpu_that_ran(guest: &Arc<Guest>, board: &Board, held: &mut Held<'_, 0>) -> Cpu {
    let mut cpu = Cpu::new(0);
    runs_and_is_paused(guest);
    slice::run(&mut cpu, &ready(guest), board, held);
    assert!(guest.go_on() && cpu.loaded.is_some());
    cpu
}

/// A CPU goes round a few times, and does what there is to do.
fn go_round(cpu: &mut Cpu, board: &Board, held: &mut Held<'_, 0>) {
    (0..10).for_each(|_| turn(cpu, board, held));
}

#[derive(Default)]
struct Board {
    /// When a vCPU's registers come or go, on another CPU.
    loads: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// When a device interrupts.
    interrupts: Mutex<Option<Happens>>,
}

impl Outside for Board {
    fn interrupt(&self, _: u32, held: &mut Held<'_, { rank::VCPU }>) {
        if let Some(what) = self.interrupts.lock().unwrap().take() {
            what(held);
        }
    }
    fn last_guest_ended(&self) {}
    fn job_ended(&self) {}
    fn set_timer_active(&self, _: bool) {
        let what = self.loads.lock().unwrap().take();
        if let Some(what) = what {
            what();
        }
    }
    fn look_around(&self, _: &mut Cpu, _: &mut Held<'_, 0>) {}
    fn poll(&self, _: &mut Held<'_, 0>) {}
}

#[test]
fn a_vcpu_that_is_about_to_run_while_its_guest_is_kept_still_is_waited_for() {
    let _one = machine_of_two();
    let held = &mut Held::root();
    let (before, guest, board) = (guest(held), guest(held), Board::default());
    // Somebody else's registers are in the CPU, so there is something to do before the vCPU runs.
    let mut cpu = cpu_that_ran(&before, &board, held);
    let seen = Arc::new(Mutex::new((false, false)));
    let (other, quiet) = (guest.clone(), seen.clone());
    *board.loads.lock().unwrap() = Some(Box::new(move || {
        assert!(other.keep_still() && other.move_life(Life::Running, Life::Paused));
        interrupt_guest(&other, &mut Held::root());
        quiet.lock().unwrap().0 = other.is_quiet();
    }));
    let (runs, ran) = (guest.clone(), seen.clone());
    switch::expect(move |_| {
        ran.lock().unwrap().1 = runs.life() == Life::Paused;
        Trap::Irq
    });
    slice::run(&mut cpu, &ready(&guest), &board, held);
    let (quiet, ran) = *seen.lock().unwrap();
    assert!(!(quiet && ran), "it was called quiet, and then it ran");
    assert!(guest.let_go(true), "and it goes on");
    [before, guest].iter().for_each(|guest| create::destroy(guest, held));
}

#[test]
fn what_an_interrupt_tells_the_vcpu_that_it_ended_reaches_it_at_once() {
    let _one = machine_of_two();
    let held = &mut Held::root();
    let (guest, board) = (guest(held), Board::default());
    let mut cpu = Cpu::new(0);
    let entry = ready(&guest);
    let console = hv_abi::machine::INTID_PL011;
    {
        let (word, bit) = (4 * u64::from(console / 32), 1 << (console % 32));
        let (mut devices, _held) = guest.devices.lock(held);
        for (target, bytes) in [
            (Target::Distributor(0), 0x13),
            (Target::Distributor(0x80 + word), bit),
            (Target::Distributor(0x100 + word), bit),
            (Target::Uart(0x30), 0x301),
            (Target::Uart(0x38), 0x50),
        ] {
            let _ = devices.write(target, 2, bytes, 0);
        }
    }
    let types = guest.clone();
    *board.interrupts.lock().unwrap() = Some(Box::new(move |held| {
        let kicks = types.type_in(b"x", held);
        assert_eq!(kicks, 1);
        wake_many(&types, kicks, held);
    }));
    switch::expect(|_| {
        irq::raise(DEVICE);
        Trap::Irq
    });
    let runs = guest.clone();
    switch::expect(move |_| {
        assert!(!runs.devices.lock(&mut Held::root()).0.vgic.is_dirty(0), "the guest runs without it");
        Trap::Irq
    });
    runs_and_is_paused(&guest);
    slice::run(&mut cpu, &entry, &board, held);
    assert!(board.interrupts.lock().unwrap().is_none(), "something was typed");
    create::destroy(&guest, held);
}

#[test]
fn a_guest_that_ends_while_it_is_kept_still_is_buried() {
    let _one = machine_of_two();
    let held = &mut Held::root();
    let ((guest, entry), board, mut cpu) = (listed_and_blocked(held), Board::default(), Cpu::new(0));
    let during = |_: &Cpu, held: &mut Held<'_, 0>| {
        assert!(guest.end(Ending::Lost));
        interrupt_guest(&guest, held);
        go_round(&mut Cpu::new(1), &board, held);
        table::get(guest.id, held).is_some()
    };
    let there = still::while_still(&guest, &mut cpu, &board, held, during).unwrap().0;
    assert!(there, "it is not taken apart while somebody copies it");
    go_round(&mut cpu, &board, held);
    assert!(table::get(guest.id, held).is_none(), "{:?}", entry.vcpu().state());
}

#[test]
fn a_cpu_does_not_sleep_beside_a_vcpu_that_it_could_run() {
    let _one = machine_of_two();
    let held = &mut Held::root();
    let guest = guest(held);
    let entry = ready(&guest);
    while mm::vm().step(64, held) {}
    // CPU 1 has looked, and is about to sleep. CPU 0 is busy, and has one more to run.
    percpu::set(1, 2);
    assert!(next(1, held).is_none());
    percpu::set(0, 2);
    entry.vcpu().home.store(0, Ordering::SeqCst);
    enqueue(&entry, held);
    assert_eq!(irq::take_kicks(), 0, "nobody sleeps");
    percpu::set(1, 2);
    crate::arch::timer::arm_host(5);
    idle::sleep(&mut Cpu::new(1), false, &Board::default(), held);
    assert_eq!(crate::arch::timer::armed(), Some(5), "it did not sleep");
    assert!(next(1, held).is_some());
    create::destroy(&guest, held);
}

#[test]
fn a_vcpu_that_leaves_its_cpu_while_it_waits_for_one_is_offered_to_those_that_sleep() {
    let _one = machine_of_two();
    let held = &mut Held::root();
    let (guest, board) = (guest(held), Board::default());
    let mut cpu = cpu_that_ran(&guest, &board, held);
    ASLEEP[1].store(true, Ordering::SeqCst);
    cpu.make_way(&board, held);
    assert_eq!((irq::take_kicks(), ASLEEP[1].load(Ordering::SeqCst)), (1 << 1, false));
    assert!(cpu.loaded.is_none());
    create::destroy(&guest, held);
}

#[test]
fn nothing_of_a_guest_that_ended_stays_with_those_who_sleep() {
    let _one = machine_of_two();
    let held = &mut Held::root();
    let ((guest, entry), board, mut cpu) = (listed_and_blocked(held), Board::default(), Cpu::new(0));
    assert!(cpu.sleepers.add(u64::MAX - 1, entry).is_ok());
    end(&guest, Ending::Killed, held);
    go_round(&mut cpu, &board, held);
    assert!(table::get(guest.id, held).is_none());
    assert_eq!(Arc::strong_count(&guest), 1);
}

#[test]
fn who_is_killed_while_it_begins_again_does_not() {
    let _one = machine_of_two();
    let held = &mut Held::root();
    let again = guest(held);
    assert!(again.end(Ending::Reset) && again.end(Ending::Killed));
    assert_eq!((again.ending(), again.make_room()), (Ending::Killed, false));
    create::destroy(&again, held);
    let [old, mut new, mut late] = [guest(held), guest(held), guest(held)];
    assert!(table::add(old.clone(), held).is_ok());
    assert!(old.end(Ending::Reset));
    for guest in [&mut new, &mut late] {
        Arc::get_mut(guest).unwrap().id = old.id;
    }
    // In time: the old one was not to begin again. Too late: the new one ends.
    assert!(table::replace(new.clone(), held).is_ok());
    end(&old, Ending::Killed, held);
    assert_eq!((new.life(), new.ending()), (Life::Ending, Ending::Killed));
    assert!(table::replace(late.clone(), held).is_err());
    let found = table::after(crate::guest::GuestId(old.id.0 - 1), held).map(|guest| guest.id);
    assert_eq!((found, table::after(old.id, held).is_none()), (Some(old.id), true));
    table::remove(old.id, held);
    [old, new, late].iter().for_each(|guest| create::destroy(guest, held));
}

/// What a guest has is what a snapshot kept, but for what tells it of a new generation; and a counter goes on where that
/// stood.
fn is_as_kept(guest: &Guest, kept: &Moment, pass: u32, held: &mut Held<'_, 0>) {
    for (index, vcpu) in guest.vcpus.iter().enumerate() {
        let found = numbered::differences(&*vcpu.context.lock(held).0, &kept.contexts[index]);
        assert_eq!(found, [""; 0], "vCPU {index} in pass {pass}");
        assert_eq!(*vcpu.power.lock(held).0, kept.powers[index], "vCPU {index} in pass {pass}");
    }
    let mut devices = Devices::clone(&kept.devices);
    genid::announce(&mut devices);
    devices.rng.renew();
    devices.rtc = guest.devices.lock(held).0.rtc;
    let found = numbered::differences(&*guest.devices.lock(held).0, &devices);
    assert_eq!(found, [""; 0], "devices in pass {pass}");
    let clock = numbered::differences(&devices.rtc, &kept.devices.rtc);
    assert!(
        matches!(&clock[..], [place] if place.starts_with(".skipped:")),
        "the clock in pass {pass}: {clock:?}"
    );
    assert_eq!(guest.time(), kept.time, "the counter goes on where it stood");
}

#[test]
fn a_clone_and_a_reset_guest_have_in_each_place_what_the_snapshot_kept() {
    let _one = machine_of_two();
    let held = &mut Held::root();
    for pass in 0..numbered::PASSES {
        let mut moment = numbered::moment(pass);
        // It has no memory that they could be in.
        moment.config.disks.clear();
        let source = guest_of(moment, held);
        let draft = snapshot::draft(&source, held).unwrap();
        let kept = snapshot::take(&source, draft, snapshot::Keep::Shadowed, held).unwrap();
        let (id, birth) = (table::next_id(), Birth::first(0));
        crate::arch::timer::set(crate::arch::timer::now() + 1000);
        let child = snapshot::make(&kept, id, "child".to_string(), birth, &|_| {}, held).unwrap();
        is_as_kept(&child, &kept.moment, pass, held);
        // It has become another in all of it.
        for vcpu in &child.vcpus {
            *vcpu.context.lock(held).0 = Vcpu::new(0).context.get_mut().clone();
            *vcpu.power.lock(held).0 = Power::Off;
        }
        **child.devices.lock(held).0 = Devices::new(1, 4, 1, 0);
        crate::arch::timer::set(crate::arch::timer::now() + 1000);
        snapshot::restore(&child, &kept, &|_| {}, held).unwrap();
        is_as_kept(&child, &kept.moment, pass, held);
        snapshot::delete(kept, held);
    }
}
