//! Failing on purpose: shows that what should end the machine does, with a story and exit status 1.
//!
//! The host's command line asks for it with `selftest=NAME`; boot tests do. Nothing here returns when what it
//! tests works.

use crate::arch::percpu;
use board::platform::Platform;
use log::info;

unsafe extern "C" {
    // The linker script's; only its address means anything.
    static __boot_stack_guard: u8;
    static __image_start: u8;
}

/// What can be asked for.
const NAMES: [(&str, fn()); 5] = [
    ("panic", panic),
    ("overflow", overflow),
    ("guard", guard),
    ("write-text", write_text),
    ("run-data", run_data),
];

/// Runs what the command line asks for, on the first CPU; with `selftest=last-NAME` on the last.
pub(super) fn run(platform: &Platform) {
    let asked = platform.bootargs.split_whitespace().filter_map(|word| word.strip_prefix("selftest="));
    for name in asked {
        let (name, cpu) = match name.strip_prefix("last-") {
            Some(name) => (name, percpu::count().saturating_sub(1)),
            None => (name, 0),
        };
        if let Some((_, test)) = NAMES.iter().find(|known| known.0 == name)
            && percpu::cpu() == cpu
        {
            info!("self test: {name}");
            test();
            info!("self test: {name} FAILED: we are still here");
        }
    }
}

fn panic() {
    panic!("as asked");
}

/// Runs down the stack until its guard page.
fn overflow() {
    #[expect(unconditional_recursion, reason = "that is the test")]
    fn deeper(depth: u64) -> u64 {
        let room = core::hint::black_box([depth; 64]);
        deeper(depth.wrapping_add(1)).wrapping_add(room[63])
    }
    core::hint::black_box(deeper(0));
}

/// Reads a page that the map leaves out.
fn guard() {
    // SAFETY: none: the test is that the MMU stops it.
    let byte = unsafe { (&raw const __boot_stack_guard).read_volatile() };
    core::hint::black_box(byte);
}

/// Writes to code.
fn write_text() {
    // SAFETY: none: the test is that the MMU stops it.
    unsafe { (&raw const __image_start).cast_mut().write_volatile(0) };
}

/// Executes data: a RET, on the stack.
fn run_data() {
    let code = core::hint::black_box([0xd65f_03c0_u32; 4]);
    // SAFETY: none: the test is that the MMU stops it; if it does not, the RET comes straight back.
    let run: extern "C" fn() = unsafe { core::mem::transmute(code.as_ptr()) };
    run();
}
