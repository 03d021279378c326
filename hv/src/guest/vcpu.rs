//! A virtual CPU: its registers, and where the scheduler has it.
//!
//! Two halves. [`Context`] is what the CPU holds while the vCPU runs; its lock is held by whichever CPU
//! runs it, for as long as it runs, so nobody else ever waits for it. The rest is atomics and small locks
//! that other CPUs use to wake it. `sched` moves [`State`]; the trap handlers only ever see a vCPU that
//! is [`State::Running`].

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use serde::{Deserialize, Serialize};

use super::Guest;
use super::rank;
use crate::arch::context::{DebugContext, El1Context, FpContext, GuestRegs};
use hv_abi::machine::affinity;
use vmobject::lock::{Held, Ranked};

/// The CPU that a vCPU is loaded on when it is loaded on none.
pub const NOWHERE: usize = usize::MAX;

/// Where the scheduler has a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Powered off, or its guest has ended.
    Off,
    /// In a run queue.
    Ready,
    /// On a CPU.
    Running,
    /// Waiting: for an interrupt, for I/O, for memory, or for its guest to be resumed.
    Blocked,
}

impl State {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Off,
            1 => Self::Ready,
            2 => Self::Running,
            _ => Self::Blocked,
        }
    }

    /// The word for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Blocked => "waiting",
        }
    }
}

/// What a [`State::Blocked`] vCPU waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cause {
    /// An interrupt, or that its guest is resumed.
    Event,
    /// A page that is on its way.
    Transfer,
    /// Memory becoming free.
    Memory,
}

/// Whether PSCI has switched a vCPU on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Power {
    /// Off.
    Off,
    /// Switched on, has not run yet: starts here with this X0.
    OnPending {
        /// Where it starts.
        entry: u64,
        /// Its X0.
        context: u64,
    },
    /// On.
    On,
}

/// Saved state of the virtual interrupt controller's CPU interface.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct VgicContext {
    /// ICH_VMCR_EL2.
    pub vmcr: u64,
    /// ICH_AP0Rn_EL2.
    pub ap0r: [u32; 4],
    /// ICH_AP1Rn_EL2.
    pub ap1r: [u32; 4],
}

/// Everything that the CPU holds while this vCPU runs: what a switch moves, and what a snapshot keeps.
#[derive(Clone, Serialize, Deserialize)]
pub struct Context {
    /// The general registers.
    pub regs: GuestRegs,
    /// The EL1 and EL0 system registers; current only while not loaded.
    pub el1: El1Context,
    /// The FP registers; current only while not loaded.
    pub fp: FpContext,
    /// The debug registers: always current, because all accesses trap.
    pub debug: DebugContext,
    /// The interrupt controller's CPU interface; current only while not loaded.
    pub vgic: VgicContext,
    /// OSLSR.OSLK: the OS lock.
    pub os_lock: bool,
    /// A virtual SError is pending; current only while not loaded.
    pub serror: bool,
}

impl Context {
    fn reset(mpidr: u64) -> Self {
        Self {
            regs: GuestRegs::starting_at(0, 0),
            el1: El1Context::reset(mpidr),
            fp: FpContext::ZERO,
            debug: DebugContext::default(),
            vgic: VgicContext::default(),
            os_lock: true,
            serror: false,
        }
    }

    /// Puts every register into its reset state and starts at `entry`.
    pub fn start(&mut self, mpidr: u64, entry: u64, x0: u64) {
        *self = Self::reset(mpidr);
        self.regs = GuestRegs::starting_at(entry, x0);
    }
}

/// Counters of one vCPU; read by anybody, written by the CPU that runs it.
#[derive(Debug, Default)]
pub struct Counts {
    /// Exits of any kind.
    pub exits: AtomicU64,
    /// HVC and SMC.
    pub calls: AtomicU64,
    /// Accesses to device registers.
    pub mmio: AtomicU64,
    /// Trapped system registers.
    pub sysreg: AtomicU64,
    /// Stage-2 faults given to the memory manager.
    pub faults: AtomicU64,
    /// WFI that had to wait.
    pub waits: AtomicU64,
    /// Physical interrupts.
    pub interrupts: AtomicU64,
    /// Exceptions injected.
    pub injected: AtomicU64,
    /// Times that it was put on a CPU.
    pub loads: AtomicU64,
    /// Ticks of the host's counter that it had a CPU, what EL2 did for it meanwhile among them.
    pub ticks: AtomicU64,
}

/// Adds one, with a plain load and store: only the running CPU writes. What it was before.
#[inline]
pub fn count(counter: &AtomicU64) -> u64 {
    let before = counter.load(Ordering::Relaxed);
    counter.store(before.wrapping_add(1), Ordering::Relaxed);
    before
}

/// The last exits of one vCPU, by the number of the exit; written by the CPU that runs it.
#[derive(Debug)]
pub struct Trace([[AtomicU64; 2]; Self::LENGTH]);

impl Trace {
    /// How many are kept; a power of two.
    pub const LENGTH: usize = 16;

    const fn new() -> Self {
        Self([const { [const { AtomicU64::new(0) }; 2] }; Self::LENGTH])
    }

    /// Notes exit `number`: its syndrome (ESR_EL2) and where the guest was.
    #[inline]
    pub fn note(&self, number: u64, esr: u64, pc: u64) {
        // The remainder is less than LENGTH.
        let [syndrome, at] = &self.0[usize::try_from(number % Self::LENGTH as u64).unwrap_or(0)];
        syndrome.store(esr, Ordering::Relaxed);
        at.store(pc, Ordering::Relaxed);
    }

    /// The exits before `number`, oldest first: number, syndrome, address. One that is being written meanwhile
    /// may show parts of two.
    pub fn before(&self, number: u64) -> impl Iterator<Item = (u64, u64, u64)> {
        (number.saturating_sub(Self::LENGTH as u64)..number).map(|number| {
            let [syndrome, at] = &self.0[usize::try_from(number % Self::LENGTH as u64).unwrap_or(0)];
            (number, syndrome.load(Ordering::Relaxed), at.load(Ordering::Relaxed))
        })
    }
}

/// A virtual CPU.
pub struct Vcpu {
    /// Its number in its guest.
    pub index: usize,
    /// What the guest reads as MPIDR_EL1, without the bit that is always one.
    pub mpidr: u64,
    /// Its registers.
    pub context: Ranked<{ rank::VCPU }, Context>,
    /// Whether it is switched on.
    pub power: Ranked<{ rank::POWER }, Power>,
    /// Its counters.
    pub counts: Counts,
    /// Its last exits.
    pub trace: Trace,
    state: AtomicU8,
    cause: AtomicU8,
    woken: AtomicBool,
    /// The CPU whose run queue it uses.
    pub home: AtomicUsize,
    /// The CPU that has its registers, or [`NOWHERE`].
    pub loaded_on: AtomicUsize,
    /// When it must be woken, in ticks of the host's counter; `u64::MAX` is never.
    pub deadline: AtomicU64,
}

impl Vcpu {
    /// A vCPU that is off.
    pub fn new(index: usize) -> Self {
        Self::with(index, Context::reset(affinity(index)), Power::Off)
    }

    /// A vCPU with these registers; no CPU has it yet.
    pub fn with(index: usize, context: Context, power: Power) -> Self {
        Self {
            index,
            mpidr: affinity(index),
            context: Ranked::new(context),
            power: Ranked::new(power),
            counts: Counts::default(),
            trace: Trace::new(),
            state: AtomicU8::new(State::Off as u8),
            cause: AtomicU8::new(Cause::Event as u8),
            woken: AtomicBool::new(false),
            home: AtomicUsize::new(0),
            loaded_on: AtomicUsize::new(NOWHERE),
            deadline: AtomicU64::new(u64::MAX),
        }
    }

    /// Where the scheduler has it.
    pub fn state(&self) -> State {
        State::from_bits(self.state.load(Ordering::SeqCst))
    }

    /// Where it is, in a word for people; of one that waits, for what if that is not an interrupt.
    pub fn word(&self) -> &'static str {
        let cause = self.cause.load(Ordering::Relaxed);
        match self.state() {
            // Where no other vCPU wants its CPU it keeps that meanwhile.
            State::Blocked | State::Running if cause == Cause::Transfer as u8 => "transfer",
            State::Blocked if cause == Cause::Memory as u8 => "no-memory",
            state @ (State::Off | State::Ready | State::Running | State::Blocked) => state.name(),
        }
    }

    /// Says what it is about to wait for. Only its owner may.
    pub fn set_cause(&self, cause: Cause) {
        self.cause.store(cause as u8, Ordering::Relaxed);
    }

    /// Moves it, whatever it was. Only its owner may: the CPU that runs it, or that took it from a queue.
    pub fn set_state(&self, to: State) {
        self.state.store(to as u8, Ordering::SeqCst);
    }

    /// Moves it from `from` to `to`; false when it was not there. Exactly one of several wakers wins.
    pub fn move_state(&self, from: State, to: State) -> bool {
        self.state.compare_exchange(from as u8, to as u8, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Leaves a note that there is something to look at. Before looking at the state.
    pub fn note(&self) {
        self.woken.store(true, Ordering::SeqCst);
    }

    /// Takes the note. After setting the state.
    pub fn take_note(&self) -> bool {
        self.woken.swap(false, Ordering::SeqCst)
    }

    /// Switches it on, if it is off.
    pub fn power_on<const R: u8>(&self, entry: u64, x0: u64, held: &mut Held<'_, R>) -> Result<(), Power> {
        const { assert!(R < rank::POWER) };
        let (mut power, _held) = self.power.lock(held);
        match *power {
            Power::Off => {
                *power = Power::OnPending { entry, context: x0 };
                Ok(())
            }
            other @ (Power::OnPending { .. } | Power::On) => Err(other),
        }
    }
}

/// A vCPU and the guest that keeps it alive.
#[derive(Clone)]
pub struct VcpuRef {
    /// The guest.
    pub guest: Arc<Guest>,
    /// The vCPU's number; always one that the guest has.
    index: usize,
}

impl VcpuRef {
    /// The vCPU `index` of a guest, if it has that many.
    pub fn new(guest: &Arc<Guest>, index: usize) -> Option<Self> {
        (index < guest.vcpus.len()).then(|| Self { guest: guest.clone(), index })
    }

    /// The vCPU.
    pub fn vcpu(&self) -> &Vcpu {
        // Bounds were checked when this was made, and a guest's vCPUs never change.
        &self.guest.vcpus[self.index]
    }
}

/// Equal when both name the same vCPU.
impl PartialEq for VcpuRef {
    fn eq(&self, other: &Self) -> bool {
        self.index == other.index && Arc::ptr_eq(&self.guest, &other.guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_waker_wins() {
        let vcpu = Vcpu::new(0);
        vcpu.set_state(State::Blocked);
        assert!(vcpu.move_state(State::Blocked, State::Ready));
        assert!(!vcpu.move_state(State::Blocked, State::Ready));
    }

    #[test]
    fn the_trace_keeps_the_last_exits_in_order() {
        let trace = Trace::new();
        assert_eq!(trace.before(0).count(), 0);
        (0..100).for_each(|n| trace.note(n, n + 1000, n * 4));
        let kept: alloc::vec::Vec<_> = trace.before(100).collect();
        assert_eq!(kept.len(), Trace::LENGTH);
        assert_eq!((kept[0], kept[15]), ((84, 1084, 336), (99, 1099, 396)));
    }

    #[test]
    fn a_vcpu_is_switched_on_once() {
        let vcpu = Vcpu::new(1);
        let mut held = Held::root();
        assert_eq!(vcpu.power_on(0x4000_0000, 0, &mut held), Ok(()));
        assert!(matches!(vcpu.power_on(0, 0, &mut held), Err(Power::OnPending { .. })));
    }
}
