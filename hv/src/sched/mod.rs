//! The scheduler: every CPU's main loop, and the only caller of the guests' run functions.
//!
//! Read [`main_loop`], then [`slice::run`](mod@slice). A CPU takes a vCPU from its queue, runs it for at most
//! one slice, and goes round; with nothing to run it sleeps. Others reach a vCPU through [`wake`] only.
//! What EL2 does for a vCPU happens inside its slice and so is charged to it (invariant I17).
//!
//! A wake-up is never lost: the waker leaves a note, then looks at the state; the waiter sets the state,
//! then looks for a note.

mod daemon;
mod errands;
pub mod fork;
mod idle;
pub mod jobs;
pub mod load;
pub mod quiet;
pub mod runqueue;
pub mod slice;
pub mod still;
#[cfg(test)]
mod tests;
pub mod wait;

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::arch::percpu::MAX_CPUS;
use crate::arch::{irq, percpu, timer};
use crate::guest::exit::Ending;
use crate::guest::vcpu::{NOWHERE, Power, State, VcpuRef};
use crate::guest::{Guest, GuestId, Life, MAX_VCPUS, create, rank, table};
use alloc::sync::Arc;
use load::Cpu;
use runqueue::RunQueue;
use vmobject::lock::Held;
use vmobject::store::IoToken;
use wait::Waiters;

/// How long a vCPU may run while others wait.
pub const SLICE_MS: u64 = 10;
/// Steps of chores that a busy CPU does in each slice.
const CHORE_STEPS: usize = 16;

/// Pages and leaves that pageout looks at between two looks around (invariant I6).
const PAGEOUT: u32 = 64;
/// How often it looks so between two slices.
const PAGEOUT_STEPS: usize = 8;

static QUEUES: [RunQueue<VcpuRef>; MAX_CPUS] = [const { RunQueue::new() }; MAX_CPUS];
static WAITERS: Waiters<VcpuRef> = Waiters::new();
/// CPUs that sleep, by number: a vCPU that becomes ready elsewhere may be worth waking one.
static ASLEEP: [AtomicBool; MAX_CPUS] = [const { AtomicBool::new(false) }; MAX_CPUS];
/// The transfer that a CPU waits for with its vCPU still on it, or 0: no token is that.
static STANDS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
/// Where the next vCPU is put first.
static NEXT_HOME: AtomicUsize = AtomicUsize::new(0);
/// Ticks that pageout has taken.
static PAGING_OUT: AtomicU64 = AtomicU64::new(0);
/// Something for the daemon: a guest ended, or wants to begin again.
static CHORES: AtomicBool = AtomicBool::new(false);

/// What the scheduler asks of whoever owns the machine's devices.
pub trait Outside: Sync {
    /// A device interrupt arrived on this CPU; it is acknowledged and will be ended afterwards.
    fn interrupt(&self, intid: u32, held: &mut Held<'_, { rank::VCPU }>);
    /// The last guest has ended.
    fn last_guest_ended(&self);
    /// A job is over.
    fn job_ended(&self);
    /// Makes the virtual timer's physical interrupt active or not, on this CPU.
    fn set_timer_active(&self, active: bool);
    /// This CPU looks around before it picks a vCPU: for work that no interrupt announces.
    fn look_around(&self, cpu: &mut Cpu, held: &mut Held<'_, 0>);
    /// Lets transfers finish, while something on this CPU waits for one.
    fn poll(&self, held: &mut Held<'_, 0>);
}

/// Runs guests on this CPU, for ever.
pub fn main_loop(outside: &dyn Outside) -> ! {
    let mut held = Held::root();
    let mut cpu = Cpu::new(percpu::cpu());
    loop {
        turn(&mut cpu, outside, &mut held);
    }
}

/// One turn of the main loop: a chore, a slice or a sleep.
pub fn turn(cpu: &mut Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    quiet::stand_by(held);
    // What a vCPU left behind and what comes next are long enough, each: interrupts in between (invariant I6).
    slice::idle_interrupts(cpu, outside, held);
    if cpu.loaded.as_ref().is_some_and(|loaded| loaded.guest.life() != Life::Running) {
        cpu.unload(outside, held);
        // Whoever looked before saw that its registers were still here.
        call_daemon_here();
    }
    let ended = ENDED.load(Ordering::SeqCst);
    if core::mem::replace(&mut cpu.ended, ended) != ended {
        // Their deadlines may be as far away as they liked.
        cpu.sleepers.forget(|vcpu| vcpu.guest.life() != Life::Ending);
    }
    if CHORES.swap(false, Ordering::SeqCst) {
        daemon::work(cpu, outside, held);
    }
    // After the chores: what it asks for is for the next round.
    outside.look_around(cpu, held);
    while let Some(vcpu) = cpu.sleepers.expired(timer::now()) {
        wake(&vcpu, held);
    }
    let more = share_with_pageout(cpu, outside, held) | jobs::work(cpu, outside, held);
    share_with_chores(cpu, outside, held);
    match next(cpu.id, held) {
        Some(vcpu) => slice::run(cpu, &vcpu, outside, held),
        None => idle::sleep(cpu, more, outside, held),
    }
}

/// Lets pageout go on for a while, if there is something to do for it; true if there is more.
fn share_with_pageout(cpu: &Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) -> bool {
    for _ in 0..PAGEOUT_STEPS {
        if !page_out(held) {
            return false;
        }
        slice::idle_interrupts(cpu, outside, held);
    }
    true
}

/// Does some of the memory manager's chores, once in a slice: what the dead had comes back on a busy machine, too.
fn share_with_chores(cpu: &mut Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    let now = timer::now();
    if now < cpu.chores_due {
        return;
    }
    cpu.chores_due = now.saturating_add(load::ticks(SLICE_MS));
    for _ in 0..CHORE_STEPS {
        if !chores(held) {
            return;
        }
        slice::idle_interrupts(cpu, outside, held);
    }
}

/// Counts the calls for the daemon: a guest may have ended, and no CPU is to keep anything of it.
static ENDED: AtomicU64 = AtomicU64::new(0);

/// Ticks that the memory manager's chores have taken on all CPUs.
static CHORE_TICKS: AtomicU64 = AtomicU64::new(0);

/// Does some of the memory manager's chores (invariant I6); true if there are more.
fn chores(held: &mut Held<'_, 0>) -> bool {
    let start = timer::now();
    let more = crate::mm::vm().step(idle::CHORES, held);
    CHORE_TICKS.fetch_add(timer::now().wrapping_sub(start), Ordering::Relaxed);
    more
}

/// How long the memory manager's chores have taken since the start, in ticks of all CPUs together.
pub fn chore_ticks() -> u64 {
    CHORE_TICKS.load(Ordering::Relaxed)
}

/// Between two short parts of long work: takes the interrupts that came (invariant I6).
pub fn let_interrupts_in(cpu: &Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    slice::idle_interrupts(cpu, outside, held);
}

/// Between two parts of long work: takes the interrupts that came, and what disks have finished (invariant I6). Frees
/// memory if it is short, too: the work may wait for it, on a machine with no other CPU.
pub fn take_interrupts(cpu: &Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    slice::idle_interrupts(cpu, outside, held);
    outside.poll(held);
    page_out(held);
}

/// The next vCPU for a CPU: from its own queue, else from another's.
fn next(cpu: usize, held: &mut Held<'_, 0>) -> Option<VcpuRef> {
    if let Some(vcpu) = QUEUES[cpu].pop(held) {
        return Some(vcpu);
    }
    let cpus = percpu::count();
    (1..cpus).find_map(|step| QUEUES[(cpu + step) % cpus].steal(is_movable, held))
}

/// True for a vCPU whose registers are in no CPU.
fn is_movable(entry: &VcpuRef) -> bool {
    entry.vcpu().loaded_on.load(Ordering::SeqCst) == NOWHERE
}

/// True when [`next`] would find one.
fn has_next(cpu: usize, held: &mut Held<'_, 0>) -> bool {
    let cpus = percpu::count();
    !QUEUES[cpu].is_empty(held) || (1..cpus).any(|step| QUEUES[(cpu + step) % cpus].has(is_movable, held))
}

/// True when somebody waits for this CPU.
fn contended<const R: u8>(cpu: usize, held: &mut Held<'_, R>) -> bool {
    const { assert!(R < rank::SCHED) };
    !QUEUES[cpu].is_empty(held)
}

/// True when a vCPU waits for any CPU.
fn is_anybody_ready<const R: u8>(held: &mut Held<'_, R>) -> bool {
    const { assert!(R < rank::SCHED) };
    QUEUES[..percpu::count()].iter().any(|queue| !queue.is_empty(held))
}

/// Tells a vCPU that there is something to look at. Any CPU may, holding any lock below the scheduler's.
pub fn wake<const R: u8>(entry: &VcpuRef, held: &mut Held<'_, R>) {
    const { assert!(R < rank::SCHED) };
    let vcpu = entry.vcpu();
    vcpu.note();
    match vcpu.state() {
        State::Running => {
            let home = vcpu.home.load(Ordering::SeqCst);
            if home != percpu::cpu() {
                irq::kick(home);
            }
        }
        State::Blocked => {
            if vcpu.move_state(State::Blocked, State::Ready) {
                enqueue(entry, held);
            }
        }
        State::Ready | State::Off => {}
    }
}

/// Queues a vCPU that the caller has just made ready, and sees that a CPU takes it.
fn enqueue<const R: u8>(entry: &VcpuRef, held: &mut Held<'_, R>) {
    const { assert!(R < rank::SCHED) };
    let vcpu = entry.vcpu();
    let home = vcpu.home.load(Ordering::SeqCst);
    QUEUES[home].push(entry.clone(), held);
    if home != percpu::cpu() {
        irq::kick(home);
    }
    if vcpu.loaded_on.load(Ordering::SeqCst) == NOWHERE && !ASLEEP[home].load(Ordering::SeqCst) {
        // Its own CPU is busy and any other may run it: one that sleeps will find it.
        rouse();
    }
}

/// Wakes a CPU that sleeps, if there is one: each call another.
fn rouse() {
    let sleeps =
        |&cpu: &usize| ASLEEP[cpu].load(Ordering::SeqCst) && ASLEEP[cpu].swap(false, Ordering::SeqCst);
    if let Some(cpu) = (0..percpu::count()).find(sleeps) {
        irq::kick(cpu);
    }
}

/// Wakes the vCPUs of a guest whose bits are set; one that PSCI has switched on starts.
pub fn wake_many<const R: u8>(guest: &Arc<Guest>, mut kicks: u64, held: &mut Held<'_, R>) {
    const { assert!(R < rank::SCHED) };
    while kicks != 0 {
        let index = kicks.trailing_zeros() as usize;
        kicks &= kicks - 1;
        // Who wakes all names more than there are.
        let Some(entry) = VcpuRef::new(guest, index) else { return };
        wake(&entry, held);
    }
}

/// Has one of a guest's vCPUs come to do what its devices have to do.
pub fn attend<const R: u8>(guest: &Arc<Guest>, held: &mut Held<'_, R>) {
    const { assert!(R < rank::WAITERS) };
    errands::resume(guest, held);
}

/// Starts a vCPU that was switched on: from `Off` into a queue.
pub fn start<const R: u8>(entry: &VcpuRef, held: &mut Held<'_, R>) {
    const { assert!(R < rank::SCHED) };
    let vcpu = entry.vcpu();
    if vcpu.move_state(State::Off, State::Ready) {
        let home = NEXT_HOME.fetch_add(1, Ordering::Relaxed) % percpu::count();
        vcpu.home.store(home, Ordering::SeqCst);
        enqueue(entry, held);
    }
}

/// Lets a new guest run: into the list, and its first vCPU into a queue. False when the list is full: then
/// the guest is gone.
pub fn launch(guest: Arc<Guest>, held: &mut Held<'_, 0>) -> bool {
    if let Err(guest) = table::add(guest.clone(), held) {
        log::error!("guest {}: there is no room for it among the guests, or the machine ends", guest.id);
        create::destroy(&guest, held);
        return false;
    }
    start_all(&guest, held);
    true
}

/// Lets a guest run in the place of the one with its number; hands it back when that is not to begin again.
fn launch_again(guest: Arc<Guest>, held: &mut Held<'_, 0>) -> Result<(), Arc<Guest>> {
    table::replace(guest.clone(), held)?;
    start_all(&guest, held);
    Ok(())
}

/// Starts the vCPUs of a guest that are switched on and are nowhere yet.
pub fn start_all(guest: &Arc<Guest>, held: &mut Held<'_, 0>) {
    for index in 0..guest.vcpus.len() {
        let Some(entry) = VcpuRef::new(guest, index) else { continue };
        let power = *entry.vcpu().power.lock(held).0;
        match power {
            Power::Off => {}
            Power::On | Power::OnPending { .. } => start(&entry, held),
        }
    }
}

/// Stops a guest's vCPUs where they are; false when it is not running.
pub fn pause(guest: &Arc<Guest>, held: &mut Held<'_, 0>) -> bool {
    let done = guest.move_life(Life::Running, Life::Paused);
    if done {
        interrupt_guest(guest, held);
    }
    done
}

/// Lets a paused guest's vCPUs go on; false when it is not paused, or just being copied or reset.
pub fn resume(guest: &Arc<Guest>, held: &mut Held<'_, 0>) -> bool {
    let done = guest.go_on();
    if done {
        interrupt_guest(guest, held);
    }
    done
}

/// Ends a guest.
pub fn end(guest: &Arc<Guest>, ending: Ending, held: &mut Held<'_, 0>) {
    let mut guest = guest.clone();
    while !guest.end(ending) {
        // It has just begun again.
        let Some(next) = table::get(guest.id, held) else { break };
        guest = next;
    }
    interrupt_guest(&guest, held);
    call_daemon();
}

/// Ends every guest, and lets nobody follow: who is being made now comes too late. `rest` lets interrupts in.
pub fn end_all(rest: &dyn Fn(&mut Held<'_, 0>), held: &mut Held<'_, 0>) {
    table::close(held);
    let mut last = GuestId(0);
    while let Some(guest) = table::after(last, held) {
        last = guest.id;
        end(&guest, Ending::Killed, held);
        rest(held);
    }
}

/// A transfer is finished: wakes who waited for it, and CPUs that stand still for it. After the memory manager was told.
pub fn io_done<const R: u8>(token: IoToken, held: &mut Held<'_, R>) {
    const { assert!(R < rank::WAITERS) };
    while let Some(vcpu) = WAITERS.take_io(token, held) {
        wake(&vcpu, held);
    }
    // After the fence in `take_io`.
    for (cpu, stands) in STANDS.iter().enumerate().take(percpu::count()) {
        if stands.load(Ordering::Relaxed) == token.0 && cpu != percpu::cpu() {
            irq::kick(cpu);
        }
    }
    errands::io_done(token, held);
}

/// Frames became free: wakes who waited for memory.
pub fn memory_freed<const R: u8>(held: &mut Held<'_, R>) {
    const { assert!(R < rank::WAITERS) };
    while let Some(vcpu) = WAITERS.take_memory(held) {
        wake(&vcpu, held);
    }
    errands::memory_freed(held);
}

/// Frees memory for a while if it is short; true if more could be done now.
fn page_out(held: &mut Held<'_, 0>) -> bool {
    let begun = timer::now();
    let done = crate::mm::vm().pageout(PAGEOUT, held);
    PAGING_OUT.fetch_add(timer::now().wrapping_sub(begun), Ordering::Relaxed);
    if done.freed > 0 {
        memory_freed(held);
    }
    done.more
}

/// How many ticks of the host's counter pageout has taken, on all CPUs.
pub fn ticks_of_pageout() -> u64 {
    PAGING_OUT.load(Ordering::Relaxed)
}

/// Makes room for a new guest's vCPUs in every list, so that running it allocates nothing here.
pub fn reserve(vcpus: usize, held: &mut Held<'_, 0>) -> Result<(), alloc::collections::TryReserveError> {
    let all = MAX_VCPUS.max(vcpus);
    for queue in QUEUES.iter().take(percpu::count()) {
        queue.reserve(all, held)?;
    }
    WAITERS.reserve(all, held)
}

/// Asks for the daemon, on whichever CPU goes round next, and shakes every CPU: one may still hold
/// registers of a guest that ended.
pub fn call_daemon() {
    ENDED.fetch_add(1, Ordering::SeqCst);
    CHORES.store(true, Ordering::SeqCst);
    let me = percpu::cpu();
    for cpu in (0..percpu::count()).filter(|&cpu| cpu != me) {
        irq::kick(cpu);
    }
}

/// Asks for another round of this CPU and of whichever has an interrupt next, without shaking any.
pub fn call_daemon_here() {
    CHORES.store(true, Ordering::SeqCst);
}

/// Shakes other CPUs, and again every millisecond, until they have come; false if they do not within two seconds. Once is
/// not enough: one may have been between looking for this and running a guest. They come at once, but for one that makes a
/// guest and waits for a disk, or that an emulator does not run for a while.
fn shake_until(mut shake: impl FnMut(), come: impl Fn() -> bool) -> bool {
    let deadline = timer::now().saturating_add(load::ticks(2000));
    let mut next = 0;
    while !come() {
        let now = timer::now();
        if now > deadline {
            return false;
        }
        if now >= next {
            shake();
            next = now.saturating_add(load::ticks(1));
        }
        core::hint::spin_loop();
    }
    true
}

/// Stops a guest's vCPUs: each leaves its CPU at its next exit, which this brings about.
pub fn interrupt_guest<const R: u8>(guest: &Arc<Guest>, held: &mut Held<'_, R>) {
    const { assert!(R < rank::SCHED) };
    wake_many(guest, u64::MAX, held);
}
