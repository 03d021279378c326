//! Tiny EL1 guests, one behaviour each, and the little they share.
//!
//! A guest is a module with a `run` function, and a program in `bin/` that names it. It is entered at RAM
//! start + 512 KiB with the MMU off and the device tree in X0, prints to the PL011, ends with one line,
//! `guest NAME: ok` or `guest NAME: FAILED why`, and switches itself off. A failed `assert!` is the usual
//! way to fail. Options come from the command line as words, `seed=7`; with `linger` any of them stays until
//! something is typed.
//!
//! The runtime first: `start.S` is the way in, `trap` what happens on an exception, `runtime` the machine
//! as a guest knows it; `register`, `mmio`, `console`, `power`, `mmu`, `gic`, `timer`, `virtio` are thin. On the host
//! there is nothing here: each program is an empty one.
#![no_std]
#![cfg_attr(
    target_os = "none",
    expect(unsafe_code, reason = "programs without a system below, some of which misbehave for a living")
)]

#[cfg(target_os = "none")]
#[macro_use]
mod register;
#[cfg(target_os = "none")]
#[macro_use]
pub mod console;
#[cfg(target_os = "none")]
#[macro_use]
pub mod trap;
#[cfg(target_os = "none")]
pub mod gic;
#[cfg(target_os = "none")]
pub mod memory;
#[cfg(target_os = "none")]
pub mod mmio;
#[cfg(target_os = "none")]
pub mod mmu;
#[cfg(target_os = "none")]
pub mod power;
#[cfg(target_os = "none")]
pub mod runtime;
#[cfg(target_os = "none")]
pub mod timer;
#[cfg(target_os = "none")]
pub mod virtio;

// The guests.
#[cfg(target_os = "none")]
pub mod asid;
#[cfg(target_os = "none")]
pub mod balloon;
#[cfg(target_os = "none")]
pub mod bench;
#[cfg(target_os = "none")]
pub mod devices;
#[cfg(target_os = "none")]
pub mod dirty;
#[cfg(target_os = "none")]
pub mod fork;
#[cfg(target_os = "none")]
pub mod fpstate;
#[cfg(target_os = "none")]
pub mod generations;
#[cfg(target_os = "none")]
pub mod gicfuzz;
#[cfg(target_os = "none")]
pub mod hello;
#[cfg(target_os = "none")]
pub mod inflight;
#[cfg(target_os = "none")]
pub mod irq;
#[cfg(target_os = "none")]
pub mod rings;
#[cfg(target_os = "none")]
pub mod scribble;
#[cfg(target_os = "none")]
pub mod smp;
#[cfg(target_os = "none")]
pub mod storm;
#[cfg(target_os = "none")]
pub mod thrash;
#[cfg(target_os = "none")]
pub mod touch;
#[cfg(target_os = "none")]
pub mod wfi;
#[cfg(target_os = "none")]
pub mod wild;
#[cfg(target_os = "none")]
pub mod zeros;

/// Makes a program of the guest that a module has; it is called like the module, or as said.
#[macro_export]
macro_rules! program {
    ($guest:ident) => {
        $crate::program!(stringify!($guest), $guest);
    };
    ($name:expr, $guest:ident) => {
        #[cfg(target_os = "none")]
        #[panic_handler]
        fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
            $crate::runtime::fail($name, info)
        }

        /// Called by `_start` with the device tree's address.
        #[cfg(target_os = "none")]
        #[expect(unsafe_code, reason = "assembly calls it by name")]
        #[unsafe(no_mangle)]
        extern "C" fn guest_main(tree: u64) -> ! {
            $crate::runtime::run($name, $crate::$guest::run, tree)
        }

        /// There is nothing to do on the host.
        #[cfg(not(target_os = "none"))]
        fn main() {}
    };
}
