//! One slice: a vCPU on this CPU, from its entry to whatever makes it leave.
//!
//! The loop in [`run`] is the hottest code of the hypervisor. An exit that needs nothing special costs
//! one test each for kicks, the timer and the list registers, and goes back in; list registers are touched
//! only when something changed for this vCPU, EL1 registers only when another vCPU comes.

use core::sync::atomic::{Ordering, fence};

use crate::arch::context::Trap;
use crate::arch::percpu::MAX_CPUS;
use crate::arch::{irq, switch, timer};
use crate::guest::devices::timer_is_high;
use crate::guest::exit::{self, Asked, Ending, Exit, Refault, Run, Waiting};
use crate::guest::vcpu::{Cause, Context, Power, State, VcpuRef, count};
use crate::guest::{Life, memory, rank};
use crate::mm::machine::Metal;
use crate::vdev::vtimer::{host_time, virtual_deadline};
use hv_abi::machine::{INTID_HYP_TIMER, INTID_MAINTENANCE, INTID_VIRTUAL_TIMER};
use vmobject::Vm;
use vmobject::lock::{Held, Ranked};
use vmobject::store::{IoToken, Machine as _};

use super::load::{Cpu, ticks};
use super::{
    ASLEEP, Outside, SLICE_MS, STANDS, WAITERS, call_daemon, contended, enqueue, errands, idle,
    is_anybody_ready, start, wake,
};

/// The interrupt by which CPUs kick each other.
const KICK_SGI: u32 = 0;
/// How many interrupts are handled in a row before the guest runs again (invariant I6).
const MAX_INTERRUPTS: usize = 16;
/// How long who waits for memory sleeps before it looks by itself: what is freed may be another's the next moment. The
/// end of a transfer is told to all who wait for it, and to them alone.
const PATIENCE_MS: u64 = 20;

/// What stands for the running vCPU's lock while there is none, one for each CPU.
static IDLE: [Ranked<{ rank::VCPU }, ()>; MAX_CPUS] = [const { Ranked::new(()) }; MAX_CPUS];

/// What an interrupt round found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    /// Somebody wants this CPU to look around.
    kicked: bool,
    /// The host's timer fired.
    ticked: bool,
    /// The loaded vCPU's virtual timer fired.
    timer: bool,
}

/// Runs a vCPU that was taken from a queue.
pub fn run(cpu: &mut Cpu, entry: &VcpuRef, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    let vcpu = entry.vcpu();
    vcpu.home.store(cpu.id, Ordering::SeqCst);
    // Before the look at its guest's life: who keeps that still either is seen here, or sees this and waits.
    vcpu.set_state(State::Running);
    // And the note before it, too: whoever ends the guest says so first, and notes then.
    vcpu.take_note();
    match entry.guest.life() {
        Life::Running => {}
        Life::Paused => {
            // The note brings it back when the guest is resumed.
            vcpu.set_cause(Cause::Event);
            vcpu.set_state(State::Blocked);
            vcpu.note();
            // Or it has ended, and whoever told found this one still in a queue.
            if entry.guest.life() != Life::Paused && vcpu.move_state(State::Blocked, State::Ready) {
                enqueue(entry, held);
            }
            return;
        }
        Life::Ending => {
            vcpu.set_state(State::Off);
            call_daemon();
            return;
        }
    }
    if *vcpu.power.lock(held).0 == Power::Off {
        // A reset has switched it off while it was in a queue.
        switch_off(entry, held);
        return;
    }
    if !cpu.has_loaded(entry) {
        cpu.unload(outside, held);
    }
    vcpu.set_cause(Cause::Event);
    let begun = timer::now();
    cpu.stood = 0;
    let leaves = {
        let (mut context, mut held) = vcpu.context.lock(held);
        if !cpu.has_loaded(entry) {
            Cpu::start(vcpu, &mut context, &mut held);
            cpu.load(entry, &mut context, outside, &mut held);
        } else if Cpu::is_starting(vcpu, &mut held) {
            // Switched off and on again while its registers were still here.
            Cpu::start(vcpu, &mut context, &mut held);
            switch::load_el1(&context.el1);
        }
        cpu.flush = true;
        if entry.guest.work.waits() {
            entry.guest.work.wake();
        }
        go(cpu, entry, &mut context, outside, &mut held)
    };
    // Another CPU may run it already.
    let ran = timer::now().wrapping_sub(begun).wrapping_sub(cpu.stood);
    vcpu.counts.ticks.fetch_add(ran, Ordering::Relaxed);
    leave(cpu, entry, leaves, outside, held);
}

/// Why the slice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaves {
    /// Its turn is over.
    Ready,
    /// It waits; the state says so already.
    Blocked,
    /// It switched itself off.
    Off,
    /// Its guest ends.
    End(Ending),
    /// Its guest forks itself into that many children.
    Fork(u32, Asked),
}

fn go(
    cpu: &mut Cpu,
    entry: &VcpuRef,
    context: &mut Context,
    outside: &dyn Outside,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Leaves {
    let (guest, vcpu) = (&*entry.guest, entry.vcpu());
    cpu.slice_end = timer::now().saturating_add(ticks(SLICE_MS));
    arm(cpu, entry, held);
    let mut run = Run { guest, vcpu, context, kicks: 0, timer_changed: false, fp_live: cpu.fp_live };
    loop {
        if cpu.flush {
            while guest.work.take() {
                if let Some(leaves) = run_errands(cpu, entry, outside, held) {
                    cpu.fp_live = run.fp_live;
                    return leaves;
                }
            }
            let kicks = cpu.flush(guest, vcpu, outside, held) & !(1 << vcpu.index);
            if kicks != 0 {
                super::wake_many(&entry.guest, kicks, held);
            }
        }
        let trap = switch::enter(&mut run.context.regs);
        let number = count(&vcpu.counts.exits);
        vcpu.trace.note(number, trap.syndrome(), run.context.regs.pc);
        let mut what = match trap {
            Trap::Sync { esr, far, hpfar } => exit::sync(&mut run, esr, far, hpfar, held),
            Trap::Irq | Trap::Fiq => {
                if let Some(leaves) = interrupted(cpu, entry, outside, held) {
                    cpu.fp_live = run.fp_live;
                    return leaves;
                }
                Exit::Resume
            }
            Trap::SError { esr } => {
                log::error!("guest {}: SError, esr {esr:#x}, at {:#x}", guest.id, run.context.regs.pc);
                crate::arch::el2::set_virtual_serror(true);
                Exit::Resume
            }
        };
        loop {
            if run.kicks != 0 {
                kick(cpu, entry, &mut run, held);
            }
            if run.timer_changed {
                run.timer_changed = false;
                arm(cpu, entry, held);
            }
            if what == Exit::Resume {
                break;
            }
            cpu.fp_live = run.fp_live;
            what = match decide(cpu, entry, what, outside, held) {
                Then::On => break,
                Then::Again(fault) => memory::again(&mut run, fault, held),
                Then::Leave(leaves) => return leaves,
            };
        }
    }
}

/// What comes of an exit that does not simply go on.
enum Then {
    /// It goes on after all.
    On,
    /// What its fault waited for has come: it is served again.
    Again(Refault),
    /// The vCPU leaves.
    Leave(Leaves),
}

impl Then {
    fn leave(leaves: Option<Leaves>) -> Self {
        leaves.map_or(Self::On, Self::Leave)
    }
}

/// Does the work of the guest's disks for as long as there is some and no interrupt ends the slice.
#[cold]
fn run_errands(
    cpu: &mut Cpu,
    entry: &VcpuRef,
    outside: &dyn Outside,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Option<Leaves> {
    while errands::run(cpu, entry, held) {
        if irq::is_pending()
            && let Some(leaves) = interrupted(cpu, entry, outside, held)
        {
            entry.guest.work.want();
            return Some(leaves);
        }
    }
    None
}

/// Passes kicks on; one for this vCPU itself means that its list registers are out of date.
#[cold]
fn kick(cpu: &mut Cpu, entry: &VcpuRef, run: &mut Run<'_>, held: &mut Held<'_, { rank::VCPU }>) {
    let mine = 1u64 << entry.vcpu().index;
    cpu.flush |= run.kicks & mine != 0;
    let mut others = core::mem::take(&mut run.kicks) & !mine;
    while others != 0 {
        let index = others.trailing_zeros() as usize;
        others &= others - 1;
        if let Some(other) = VcpuRef::new(&entry.guest, index) {
            if Cpu::is_starting(other.vcpu(), held) {
                start(&other, held);
            }
            wake(&other, held);
        }
    }
}

/// Decides what becomes of an exit that does not simply go on.
#[cold]
fn decide(
    cpu: &mut Cpu,
    entry: &VcpuRef,
    what: Exit,
    outside: &dyn Outside,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Then {
    match what {
        Exit::Resume => Then::On,
        Exit::Off => Then::Leave(Leaves::Off),
        Exit::End(ending) => Then::Leave(Leaves::End(ending)),
        Exit::Fork(count, asked) => Then::Leave(Leaves::Fork(count, asked)),
        Exit::Idle => Then::leave(idle(cpu, entry, held)),
        Exit::Wait(waiting, fault) => {
            let vcpu = entry.vcpu();
            count(&vcpu.counts.waits);
            vcpu.set_cause(match waiting {
                Waiting::Io(_) => Cause::Transfer,
                Waiting::Memory => Cause::Memory,
            });
            let vm = crate::mm::vm();
            if let Waiting::Io(token) = waiting
                && has_nothing_else(cpu, entry, vm, held)
            {
                if let Some(leaves) = stand_still(cpu, entry, (vm, token), outside, held) {
                    return Then::Leave(leaves);
                }
                if !vm.in_flight(token) {
                    vcpu.set_cause(Cause::Event);
                    return Then::Again(fault);
                }
            }
            let added = WAITERS.add(waiting, entry, held);
            if let Waiting::Io(token) = waiting {
                // Look once more now that a completion would find us: it may have come before.
                if !vm.in_flight(token) {
                    vcpu.set_cause(Cause::Event);
                    return Then::Again(fault);
                }
                // Somebody has told us of something else meanwhile: the guest looks at that, and faults again.
                if cpu.flush {
                    vcpu.set_cause(Cause::Event);
                    return Then::On;
                }
            }
            let told = added && matches!(waiting, Waiting::Io(_));
            let deadline = if told { u64::MAX } else { timer::now().saturating_add(ticks(PATIENCE_MS)) };
            let leaves = block(cpu, entry, deadline);
            if leaves.is_none() {
                vcpu.set_cause(Cause::Event);
            }
            Then::leave(leaves)
        }
    }
}

/// True when a CPU would sleep if its vCPU left it, unless another one is ready.
fn has_nothing_else(cpu: &Cpu, entry: &VcpuRef, vm: &Vm<Metal>, held: &mut Held<'_, { rank::VCPU }>) -> bool {
    let busy = super::CHORES.load(Ordering::SeqCst) || super::jobs::are_running();
    let wanted = cpu.flush || entry.guest.work.is_wanted();
    !busy && !wanted && !vm.wants_pageout() && !vm.has_chores(held)
}

/// Waits for an interrupt, unless another vCPU is ready, without putting away the one that waits for a transfer, and takes it:
/// a page comes back sooner than that would take. Says whether it has to leave.
fn stand_still(
    cpu: &mut Cpu,
    entry: &VcpuRef,
    (vm, token): (&Vm<Metal>, IoToken),
    outside: &dyn Outside,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Option<Leaves> {
    STANDS[cpu.id].store(token.0, Ordering::Relaxed);
    ASLEEP[cpu.id].store(true, Ordering::SeqCst);
    // As in `idle`: whoever comes after this sees both, and what came before it is seen here.
    fence(Ordering::SeqCst);
    if !is_anybody_ready(held) && vm.in_flight(token) {
        let begun = timer::now();
        let watched = vm.machine().store().is_watched();
        let watch = watched.then(|| begun.saturating_add(ticks(idle::WATCH_MS)));
        match cpu.sleepers.next().into_iter().chain(watch).min() {
            Some(deadline) => timer::arm_host(deadline),
            None => timer::disarm_host(),
        }
        irq::wait_for_interrupt();
        cpu.stood = cpu.stood.wrapping_add(timer::now().wrapping_sub(begun));
    }
    ASLEEP[cpu.id].store(false, Ordering::SeqCst);
    STANDS[cpu.id].store(0, Ordering::Relaxed);
    timer::arm_host(cpu.armed);
    interrupted(cpu, entry, outside, held)
}

/// A WFI: waits unless an interrupt is there already.
fn idle(cpu: &mut Cpu, entry: &VcpuRef, held: &mut Held<'_, { rank::VCPU }>) -> Option<Leaves> {
    let (guest, vcpu) = (&*entry.guest, entry.vcpu());
    cpu.flush = true;
    let (control, compare) = switch::virtual_timer();
    let (here, physical, kicks) = {
        let (mut devices, _held) = guest.devices.lock(held);
        let kicks = devices.sync(vcpu.index);
        let pending = devices.vgic.has_pending(vcpu.index, crate::arch::gich::read_vmcr());
        // High, and its interrupt not yet with the guest: it is about to fire here.
        let fires = timer_is_high(control) && !devices.vgic.timer_is_live(vcpu.index);
        (pending || fires, devices.timer_deadline(vcpu.index), kicks)
    };
    super::wake_many(&entry.guest, kicks & !(1 << vcpu.index), held);
    if here {
        return None;
    }
    if crate::mm::vm().is_short() || guest.map.limit().is_some() {
        guest.map.forget_needs(vcpu.index);
    }
    count(&vcpu.counts.waits);
    vcpu.set_cause(Cause::Event);
    let virtual_timer =
        virtual_deadline(control, compare, guest.offset()).filter(|_| !timer_is_high(control));
    let physical = physical.map(|at| host_time(at, guest.offset()));
    let deadline = virtual_timer.unwrap_or(u64::MAX).min(physical.unwrap_or(u64::MAX));
    let disks = guest.work.waits().then(|| timer::now().saturating_add(ticks(PATIENCE_MS)));
    block(cpu, entry, deadline.min(disks.unwrap_or(u64::MAX)))
}

/// Leaves the CPU until somebody wakes the vCPU, or `deadline`.
fn block(cpu: &mut Cpu, entry: &VcpuRef, deadline: u64) -> Option<Leaves> {
    let vcpu = entry.vcpu();
    vcpu.set_state(State::Blocked);
    if vcpu.take_note() {
        if vcpu.move_state(State::Blocked, State::Running) {
            if entry.guest.life() != Life::Running {
                return Some(Leaves::Ready);
            }
            // Of what else, only a look at everything says.
            cpu.flush = true;
            return None;
        }
        // A waker was faster: the vCPU is in a queue already.
        return Some(Leaves::Blocked);
    }
    if deadline != u64::MAX && cpu.sleepers.add(deadline, entry.clone()).is_err() {
        return vcpu
            .move_state(State::Blocked, State::Running)
            .then_some(Leaves::Ready)
            .or(Some(Leaves::Blocked));
    }
    Some(Leaves::Blocked)
}

/// Does what the end of a slice asks for, with no lock held.
fn leave(cpu: &mut Cpu, entry: &VcpuRef, leaves: Leaves, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    let vcpu = entry.vcpu();
    match leaves {
        Leaves::Blocked => {}
        Leaves::Ready => {
            vcpu.set_state(State::Ready);
            enqueue(entry, held);
        }
        Leaves::Off => {
            cpu.unload(outside, held);
            switch_off(entry, held);
        }
        Leaves::Fork(count, asked) => {
            // Ready, and in no queue: nobody but us touches it.
            vcpu.set_state(State::Ready);
            super::fork::by_itself(cpu, entry, (count, asked), outside, held);
            enqueue(entry, held);
        }
        Leaves::End(ending) => {
            entry.guest.end(ending);
            cpu.unload(outside, held);
            vcpu.set_state(State::Off);
            super::interrupt_guest(&entry.guest, held);
            call_daemon();
        }
    }
}

/// Leaves a vCPU that is switched off to whoever switches it on.
fn switch_off(entry: &VcpuRef, held: &mut Held<'_, 0>) {
    entry.vcpu().set_state(State::Off);
    // CPU_ON may have come before that.
    if Cpu::is_starting(entry.vcpu(), held) {
        start(entry, held);
    }
    // And so may the guest's end: the daemon did not bury it, for this vCPU was not off.
    if entry.guest.life() == Life::Ending {
        call_daemon();
    }
}

/// Sets the host's timer: the end of the slice, the guest's physical timer, the first sleeper.
fn arm(cpu: &mut Cpu, entry: &VcpuRef, held: &mut Held<'_, { rank::VCPU }>) {
    let guest = &entry.guest;
    let physical = guest.devices.lock(held).0.timer_deadline(entry.vcpu().index);
    let physical = physical.map_or(u64::MAX, |at| host_time(at, guest.offset()));
    let sleeper = cpu.sleepers.next().unwrap_or(u64::MAX);
    let mut deadline = cpu.slice_end.min(physical).min(sleeper);
    if guest.offset().cast_signed() < 0 {
        deadline = deadline.min(look_again(guest.offset()));
    }
    cpu.armed = deadline;
    timer::arm_host(deadline);
}

/// When to look at the virtual timer of a guest whose counter is ahead of the host's. By the architecture its timer
/// fires by itself; QEMU's adds CNTV_CVAL and CNTVOFF without wrapping, takes an overflow for "never", and looks again
/// whenever one of the two is written. A timer that is set later in the slice is looked at when that ends.
#[cold]
fn look_again(offset: u64) -> u64 {
    switch::set_cntvoff(offset);
    let (control, compare) = switch::virtual_timer();
    virtual_deadline(control, compare, offset).filter(|_| !timer_is_high(control)).unwrap_or(u64::MAX)
}

/// Interrupts ended a guest run: handles them, and says whether the vCPU has to leave.
fn interrupted(
    cpu: &mut Cpu,
    entry: &VcpuRef,
    outside: &dyn Outside,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Option<Leaves> {
    let (guest, vcpu) = (&*entry.guest, entry.vcpu());
    count(&vcpu.counts.interrupts);
    let seen = acknowledge(outside, held);
    if seen.timer {
        let _ = guest.devices.lock(held).0.vgic.timer_fired(vcpu.index);
        cpu.flush = true;
    }
    // A kick may mean new interrupts for us; the maintenance interrupt does; and what this CPU has just been told of
    // itself, a byte for the console say, left only the note.
    cpu.flush |= vcpu.take_note() | seen.kicked;
    if seen.ticked && guest.work.waits() {
        guest.work.wake();
    }
    // What has come may be what a disk waited for.
    cpu.flush |= guest.work.is_wanted();
    if seen.ticked {
        let kicks = guest.devices.lock(held).0.timer_update(vcpu.index, guest.time());
        cpu.flush |= kicks & 1 << vcpu.index != 0;
        super::wake_many(&entry.guest, kicks & !(1 << vcpu.index), held);
        while let Some(sleeper) = cpu.sleepers.expired(timer::now()) {
            wake(&sleeper, held);
        }
        if timer::now() >= cpu.slice_end {
            let daemon = super::CHORES.load(Ordering::SeqCst);
            let vm = crate::mm::vm();
            let ended = super::ENDED.load(Ordering::SeqCst) != cpu.ended;
            let watch = crate::mm::disks().is_watch_due(timer::now());
            let work = daemon || ended || vm.has_chores(held) || vm.wants_pageout();
            if work || watch || contended(cpu.id, held) {
                return Some(Leaves::Ready);
            }
            cpu.slice_end = timer::now().saturating_add(ticks(SLICE_MS));
        }
        arm(cpu, entry, held);
    }
    if guest.life() != Life::Running || super::CHORES.load(Ordering::SeqCst) {
        return Some(Leaves::Ready);
    }
    None
}

/// Takes the interrupts that came while no vCPU ran.
pub fn idle_interrupts(cpu: &Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    let seen = {
        // Nobody contends for it: it only says that this call chain holds what a running vCPU would.
        let (_guard, mut inner) = IDLE[cpu.id].lock(held);
        acknowledge(outside, &mut inner)
    };
    if !seen.timer {
        return;
    }
    if let Some(entry) = cpu.loaded.clone() {
        let _ = entry.guest.devices.lock(held).0.vgic.timer_fired(entry.vcpu().index);
        wake(&entry, held);
    }
}

/// Acknowledges and ends what is pending, a bounded number of times.
fn acknowledge(outside: &dyn Outside, held: &mut Held<'_, { rank::VCPU }>) -> Seen {
    let mut seen = Seen::default();
    for _ in 0..MAX_INTERRUPTS {
        let intid = irq::ack();
        match intid {
            1020..=1023 => break,
            INTID_VIRTUAL_TIMER => {
                // Stays active: the guest ends it, through the list register that is linked to it.
                seen.timer = true;
                irq::eoi(intid);
                continue;
            }
            KICK_SGI | INTID_MAINTENANCE => seen.kicked = true,
            INTID_HYP_TIMER => {
                seen.ticked = true;
                timer::disarm_host();
            }
            other => outside.interrupt(other, held),
        }
        irq::eoi(intid);
        irq::deactivate(intid);
    }
    seen
}
