//! Calls to whoever is above: HVC, SMC, and PSCI by HVC.

use hv_abi::call::psci;
use hv_abi::machine::affinity;

/// Calls by HVC: a function and three arguments in, X0 to X3 out.
pub fn hvc(function: u64, arguments: [u64; 3]) -> [u64; 4] {
    let [mut x1, mut x2, mut x3] = arguments;
    let mut x0 = function;
    // SAFETY: SMCCC lets a call change X0 to X17, and memory.
    unsafe {
        core::arch::asm!("hvc #0", inout("x0") x0, inout("x1") x1, inout("x2") x2, inout("x3") x3,
            clobber_abi("C"), options(nostack));
    };
    [x0, x1, x2, x3]
}

/// Switches the machine off.
pub fn off() -> ! {
    hvc(psci::SYSTEM_OFF.into(), [0; 3]);
    loop {
        instruction!("wfi");
    }
}

/// Has the machine begin again.
pub fn reset() -> ! {
    hvc(psci::SYSTEM_RESET.into(), [0; 3]);
    panic!("SYSTEM_RESET came back");
}

/// Starts vCPU `index` at an address of the caller's choice; its X0 will be `context`.
pub fn cpu_on_at(index: usize, entry: u64, context: u64) -> i64 {
    hvc(psci::CPU_ON.into(), [affinity(index), entry, context])[0].cast_signed()
}

/// Switches this vCPU off.
pub fn cpu_off() -> ! {
    hvc(psci::CPU_OFF.into(), [0; 3]);
    panic!("CPU_OFF came back");
}

/// True while vCPU `index` is off.
pub fn is_off(index: usize) -> bool {
    hvc(psci::AFFINITY_INFO.into(), [affinity(index), 0, 0])[0] == 1
}
