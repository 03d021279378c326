//! Exceptions: interrupts are counted, expected faults are kept, others end the guest.
//!
//! A guest that wants to see what a fault looks like runs the instruction by `probe!`: the fault's
//! syndrome comes back as a value. Interrupts need no handlers: each is counted by vCPU and number with
//! the time at which the vector was entered, and a timer's is masked at its source so that it falls.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hv_abi::machine::{INTID_PHYSICAL_TIMER, INTID_VIRTUAL_TIMER, MAX_VCPUS};

use crate::register::cpu;

/// Interrupts counted by number; the rest are counted as the last.
pub const COUNTED: usize = 64;

/// What the vectors save.
#[repr(C)]
pub struct Frame {
    x: [u64; 31],
    elr: u64,
    spsr: u64,
    esr: u64,
    far: u64,
    time: u64,
}

/// A fault that was expected.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// ESR_EL1.
    pub esr: u64,
    /// FAR_EL1.
    pub far: u64,
}

impl Fault {
    /// The exception class.
    pub fn class(self) -> u64 {
        self.esr >> 26 & 0x3f
    }
    /// True for a data or instruction abort at this level, reported as a synchronous external one.
    pub fn is_external_abort(self) -> bool {
        matches!(self.class(), 0x21 | 0x25) && self.esr & 0x3f == 0x10
    }
    /// True for an instruction that does not exist.
    pub fn is_undefined(self) -> bool {
        self.class() == 0
    }
}

impl core::fmt::Debug for Fault {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "esr {:#x} far {:#x}", self.esr, self.far)
    }
}

/// What one vCPU expects and has seen. Written by that vCPU alone, read by all.
pub struct Seen {
    /// Where to go on after an expected fault; zero when none is expected.
    pub resume: AtomicU64,
    esr: AtomicU64,
    far: AtomicU64,
    counts: [AtomicU32; COUNTED],
    spurious: AtomicU32,
    last: AtomicU64,
}

static SEEN: [Seen; MAX_VCPUS] = [const {
    Seen {
        resume: AtomicU64::new(0),
        esr: AtomicU64::new(0),
        far: AtomicU64::new(0),
        counts: [const { AtomicU32::new(0) }; COUNTED],
        spurious: AtomicU32::new(0),
        last: AtomicU64::new(0),
    }
}; MAX_VCPUS];

/// This vCPU's.
pub fn seen() -> &'static Seen {
    of(cpu())
}

/// Another vCPU's.
pub fn of(index: usize) -> &'static Seen {
    &SEEN[index % MAX_VCPUS]
}

impl Seen {
    /// The fault that the last `probe!` met.
    pub fn fault(&self) -> Option<Fault> {
        let esr = self.esr.swap(0, Ordering::Relaxed);
        (esr != 0).then(|| Fault { esr: esr & !(1 << 63), far: self.far.load(Ordering::Relaxed) })
    }
    /// How often interrupt `intid` has come.
    pub fn count(&self, intid: u32) -> u32 {
        self.counts[(intid as usize).min(COUNTED - 1)].load(Ordering::Acquire)
    }
    /// When the last interrupt entered its vector.
    pub fn last(&self) -> u64 {
        self.last.load(Ordering::Relaxed)
    }
    /// Interrupts that were gone when they were asked for.
    pub fn spurious(&self) -> u32 {
        self.spurious.load(Ordering::Relaxed)
    }
}

/// Runs an instruction that may fault, with operands as `asm!` takes them; says how it did.
macro_rules! probe {
    ($text:expr $(, $($operand:tt)*)?) => {{
        let seen = $crate::trap::seen();
        // SAFETY: a fault resumes behind the instruction; the caller answers for what else it does. It
        // may have been a call, so X30 and what a function may change are taken to change.
        unsafe {
            core::arch::asm!(
                "adr {resume}, 22f",
                "str {resume}, [{slot}]",
                $text,
                "22: str xzr, [{slot}]",
                resume = out(reg) _,
                slot = inout(reg) seen.resume.as_ptr() => _,
                $($($operand)*)?
            )
        };
        seen.fault()
    }};
}

/// The vectors come here.
#[unsafe(no_mangle)]
extern "C" fn guest_trap(kind: u64, frame: &mut Frame) {
    const SYNC: u64 = 4;
    const IRQ: u64 = 5;
    match kind {
        IRQ => interrupt(frame.time),
        SYNC => {
            let seen = seen();
            let resume = seen.resume.swap(0, Ordering::Relaxed);
            if resume == 0 {
                unexpected("exception", frame);
            }
            // The high bit tells a syndrome of zero, an undefined instruction without IL, from none.
            seen.esr.store(frame.esr | 1 << 63, Ordering::Relaxed);
            seen.far.store(frame.far, Ordering::Relaxed);
            frame.elr = resume;
        }
        _ => unexpected("vector", frame),
    }
}

fn unexpected(what: &str, frame: &Frame) -> ! {
    panic!(
        "unexpected {what} on vcpu {}: esr {:#x} far {:#x} elr {:#x} spsr {:#x} lr {:#x}",
        cpu(),
        frame.esr,
        frame.far,
        frame.elr,
        frame.spsr,
        frame.x[30]
    );
}

fn interrupt(time: u64) {
    let seen = seen();
    #[expect(clippy::cast_possible_truncation, reason = "24 bits")]
    let intid = read_register!("icc_iar1_el1") as u32;
    if intid >= 1020 {
        seen.spurious.fetch_add(1, Ordering::Relaxed);
        return;
    }
    // Enabled, and masked at the source.
    match intid {
        INTID_VIRTUAL_TIMER => write_register!("cntv_ctl_el0", 3),
        INTID_PHYSICAL_TIMER => write_register!("cntp_ctl_el0", 3),
        _ => {}
    }
    seen.last.store(time, Ordering::Relaxed);
    seen.counts[(intid as usize).min(COUNTED - 1)].fetch_add(1, Ordering::Release);
    write_register!("icc_eoir1_el1", intid.into());
}
