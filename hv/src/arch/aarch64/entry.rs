//! Where CPUs arrive (start.S) and where EL2's own exceptions end (vectors.S).
//!
//! The assembly goes on in two functions of `boot`, `hv_start` and `hv_secondary`: the only call upwards, made
//! by name because nothing here may import what is above.

use super::mmu;
use super::percpu::MAX_CPUS;
use super::sysreg::read_sysreg;
use crate::arch::context::GuestRegs;
use crate::arch::stage1::{EARLY_BLOCK, MAIR, TCR, Table};
use core::fmt;
use core::mem::{offset_of, size_of};
use core::sync::atomic::{AtomicU64, Ordering};

/// Where each CPU's stack starts. Written before the CPU that uses it starts.
static STACK_TOPS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
/// Where each CPU's stack for telling of a disaster starts.
static EMERGENCY_TOPS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
/// The frame pointer and PC that a CPU's own exception found, for the backtrace.
static DIED_AT: [(AtomicU64, AtomicU64); MAX_CPUS] =
    [const { (AtomicU64::new(0), AtomicU64::new(0)) }; MAX_CPUS];

/// The two tables of early boot.
#[repr(C, align(4096))]
struct EarlyTable(core::cell::UnsafeCell<Table>);
// SAFETY: only start.S writes it, before there is a second CPU or any Rust code.
unsafe impl Sync for EarlyTable {}
static EARLY_L0: EarlyTable = EarlyTable(core::cell::UnsafeCell::new([0; 512]));
static EARLY_L1: EarlyTable = EarlyTable(core::cell::UnsafeCell::new([0; 512]));

unsafe extern "C" {
    /// `boot`'s, for the first CPU, with what was in x0.
    safe fn hv_start(x0: u64) -> !;
    /// `boot`'s, for every other CPU.
    safe fn hv_secondary(cpu: u64) -> !;
    /// start.S: where PSCI starts a CPU.
    fn secondary_start();
}

core::arch::global_asm!(
    include_str!("start.S"),
    boot_l0 = sym EARLY_L0,
    boot_l1 = sym EARLY_L1,
    hv_mmu = sym mmu::FINAL,
    stack_tops = sym STACK_TOPS,
    start = sym hv_start,
    secondary = sym hv_secondary,
    tcr = const TCR,
    mair = const MAIR,
    sctlr_early = const mmu::SCTLR_EARLY,
    block_rwx = const EARLY_BLOCK,
);
core::arch::global_asm!(include_str!("vectors.S"), emergency = sym EMERGENCY_TOPS, el2_died = sym el2_died);

/// Says where a CPU's stacks start.
pub fn set_stacks(cpu: usize, top: u64, emergency_top: u64) {
    if let (Some(stack), Some(emergency)) = (STACK_TOPS.get(cpu), EMERGENCY_TOPS.get(cpu)) {
        stack.store(top, Ordering::Relaxed);
        emergency.store(emergency_top, Ordering::Relaxed);
    }
}

/// The address that PSCI starts a CPU at; its context argument is the CPU's number.
pub fn secondary_entry() -> u64 {
    secondary_start as *const () as u64
}

/// ESR_EL2.EC of an instruction abort from EL2 itself.
const INSTRUCTION_ABORT: u64 = 0x21;

/// What an exception at EL2 found.
#[repr(C, align(16))]
struct Frame {
    x: [u64; 31],
    sp: u64,
    pc: u64,
    pstate: u64,
    kind: u64,
}

// What vectors.S knows.
const _: () =
    assert!(offset_of!(Frame, sp) == 248 && offset_of!(Frame, kind) == 272 && size_of::<Frame>() == 288);
const _: () = assert!(size_of::<GuestRegs>() == 272);

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind & 3 {
            0 => "synchronous exception",
            1 => "IRQ",
            2 => "FIQ",
            _ => "SError",
        };
        writeln!(
            f,
            "{kind} at EL2: ESR {:#x} FAR {:#x} PC {:#x} SP {:#x} PSTATE {:#x}",
            read_sysreg!("esr_el2"),
            read_sysreg!("far_el2"),
            self.pc,
            self.sp,
            self.pstate
        )?;
        for (n, four) in self.x.chunks(4).enumerate() {
            for (m, value) in four.iter().enumerate() {
                write!(f, "  x{:<2} {value:016x}", n * 4 + m)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// An exception at EL2 is a bug of ours: vectors.S comes here, on the emergency stack.
extern "C" fn el2_died(frame: &Frame) -> ! {
    if let Some((fp, pc)) = DIED_AT.get(super::percpu::cpu()) {
        // Where nothing can be executed, x30 still says which call went there.
        let nowhere = (read_sysreg!("esr_el2") >> 26) & 0x3f == INSTRUCTION_ABORT;
        let place = if nowhere { frame.x[30].wrapping_sub(4) } else { frame.pc };
        fp.store(frame.x[29], Ordering::Relaxed);
        pc.store(place, Ordering::Relaxed);
    }
    panic!("{frame}");
}

/// Calls `each` with the addresses of the calls that led here, on this CPU, innermost first; at most 48. After an
/// exception at EL2 they start with the instruction that it stopped, or with the call that jumped to nowhere.
pub fn backtrace(mut each: impl FnMut(u64)) {
    let (mut fp, pc) = DIED_AT
        .get(super::percpu::cpu())
        .map_or((0, 0), |(fp, pc)| (fp.load(Ordering::Relaxed), pc.load(Ordering::Relaxed)));
    if pc != 0 {
        each(pc);
    } else {
        // SAFETY: copies a register.
        unsafe { core::arch::asm!("mov {}, x29", out(reg) fp, options(nomem, nostack, preserves_flags)) };
    }
    let mut last = 0;
    for _ in 0..48 {
        // A chain goes up the stack, and a stack is at most a few pages: anything else is no frame of ours.
        if fp == 0 || fp % 16 != 0 || fp <= last || (last != 0 && fp - last > 0x1_0000) {
            return;
        }
        let Ok(address) = usize::try_from(fp) else { return };
        let record: *const [u64; 2] = core::ptr::with_exposed_provenance(address);
        // SAFETY: a frame record on this CPU's stack, by the checks above; if not, the read faults, and the
        // panic path notices that it is there already.
        let [next, pc] = unsafe { record.read_volatile() };
        if pc == 0 {
            return;
        }
        // A return address is that of the instruction after the call.
        each(pc.wrapping_sub(4));
        last = fp;
        fp = next;
    }
}
