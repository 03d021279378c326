//! Ending the machine: semihosting, which gives QEMU an exit status.

use super::sysreg::instruction;

/// SYS_EXIT's argument block.
#[repr(C)]
struct ExitBlock {
    reason: u64,
    status: u64,
}

/// ADP_Stopped_ApplicationExit.
const APPLICATION_EXIT: u64 = 0x2_0026;
const SYS_WRITE0: u64 = 0x04;
const SYS_EXIT: u64 = 0x18;

/// Leaves with an exit status. Where nobody listens to semihosting the HLT is undefined, which ends in the
/// panic path; that stops the CPU.
pub fn exit(status: u32) -> ! {
    let block = ExitBlock { reason: APPLICATION_EXIT, status: status.into() };
    semihost(SYS_EXIT, &raw const block as u64);
    stop()
}

/// Says something where no serial port is known yet. `text` ends with a zero byte.
pub fn whisper(text: &core::ffi::CStr) {
    semihost(SYS_WRITE0, text.as_ptr() as u64);
}

/// Stops this CPU for good.
pub fn stop() -> ! {
    loop {
        instruction!("wfi");
    }
}

fn semihost(operation: u64, argument: u64) {
    // SAFETY: the debugger behind HLT #0xf000 reads the argument block, which lives on our stack, and changes
    // x0 only.
    unsafe {
        core::arch::asm!(
            "hlt #0xf000",
            inout("x0") operation => _,
            in("x1") argument,
            options(nostack),
        );
    }
}
