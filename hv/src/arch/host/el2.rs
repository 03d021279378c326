//! EL2 control registers.

use std::cell::Cell;

std::thread_local! {
    static VIRTUAL_SERROR: Cell<bool> = const { Cell::new(false) };
    static TRAP_WFI: Cell<bool> = const { Cell::new(true) };
}

/// Brings this CPU's EL2 control registers to the state that everything else counts on.
pub fn init_cpu() {}

/// Makes a virtual SError pending for the guest, or takes it back.
pub fn set_virtual_serror(pending: bool) {
    VIRTUAL_SERROR.set(pending);
}

/// True while a virtual SError that was made pending has not been taken.
pub fn virtual_serror() -> bool {
    VIRTUAL_SERROR.get()
}

/// Chooses whether the guest's WFI traps.
pub fn set_twi(trap: bool) {
    TRAP_WFI.set(trap);
}

/// What [`set_twi`] chose on this thread's CPU.
pub fn twi() -> bool {
    TRAP_WFI.get()
}
