//! System registers by name, barriers, and which vCPU this is.

use hv_abi::machine::{MAX_VCPUS, index_of};

/// Reads a system register.
macro_rules! read_register {
    ($name:expr) => {{
        let value: u64;
        // SAFETY: reading a system register changes no memory.
        unsafe { core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack)) };
        value
    }};
}

/// Writes a system register, and makes the write take effect.
macro_rules! write_register {
    ($name:expr, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: the caller knows what the register does; memory is taken to change.
        unsafe { core::arch::asm!(concat!("msr ", $name, ", {}"), "isb", in(reg) value, options(nostack)) }
    }};
}

/// Runs an instruction that has no operands.
macro_rules! instruction {
    ($text:literal) => {{
        // SAFETY: barriers, hints, maintenance and masks of interrupts: memory is taken to change.
        unsafe { core::arch::asm!($text, options(nostack)) }
    }};
}

/// The index of the vCPU that runs this.
pub(crate) fn cpu() -> usize {
    index_of(read_register!("mpidr_el1") & 0x00ff_ffff).unwrap_or(MAX_VCPUS - 1)
}

/// Leaves a mark in a log of the run, of which the guest knows nothing.
macro_rules! mark {
    ($which:ident) => {
        // SAFETY: a hint without a meaning.
        unsafe { core::arch::asm!("hint #{}", const hv_abi::mark::$which, options(nostack)) }
    };
}
