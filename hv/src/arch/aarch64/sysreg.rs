//! System registers by name: the only place where `mrs` and `msr` are written.
//!
//! The macros take the name as the assembler knows it (or the `s3_4_c1_c2_2` form, for registers newer than
//! the assembler's baseline). Neither is `nomem`: an access to a system register is never moved across a
//! memory access, which is what everything here counts on. Ordering as the CPU sees it is the caller's,
//! with [`super::barrier`].

/// Reads a system register.
macro_rules! read_sysreg {
    ($name:expr) => {{
        let value: u64;
        // SAFETY: reading one of the registers named in this crate changes nothing that Rust knows of, and
        // each is read only where the CPU has it.
        unsafe {
            core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack, preserves_flags));
        }
        value
    }};
}

/// Writes a system register.
macro_rules! write_sysreg {
    ($name:expr, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: the registers written through this macro govern guests, timers and interrupts, not the
        // memory that EL2 itself sees; those that do are written in `stage1`, which says why it may.
        unsafe {
            core::arch::asm!(concat!("msr ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags));
        }
    }};
}

/// Executes an instruction without operands, or with one register.
macro_rules! instruction {
    ($text:literal) => {{
        // SAFETY: barriers, hints and invalidates change no memory and no register that Rust knows of.
        unsafe { core::arch::asm!($text, options(nostack, preserves_flags)) };
    }};
    ($text:literal, $operand:expr) => {{
        let operand: u64 = $operand;
        // SAFETY: as above; the operand names what to invalidate or clean.
        unsafe { core::arch::asm!(concat!($text, ", {}"), in(reg) operand, options(nostack, preserves_flags)) };
    }};
}

pub(crate) use {instruction, read_sysreg, write_sysreg};
