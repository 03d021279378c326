//! The end: prints what is wrong and how we got there, and makes QEMU exit with status 1.
//!
//! Addresses in the backtrace are the image's own (EL2 runs on an identity map), so `xtask` names them.

use super::log;
use crate::arch::{entry, percpu, power};
use core::ffi::CStr;
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicUsize, Ordering};

/// The CPU that panics, plus one: the first to come tells its story, the others stop.
static PANICKING: AtomicUsize = AtomicUsize::new(0);

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let me = percpu::cpu().wrapping_add(1);
    match PANICKING.compare_exchange(0, me, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        // A panic about a panic: the port, or semihosting, is what does not work.
        Err(first) if first == me => power::stop(),
        Err(_) => power::stop(),
    }
    let told = match info.location() {
        Some(at) => log::force(format_args!(
            "panic on CPU {}: {} at {}:{}",
            percpu::cpu(),
            info.message(),
            at.file(),
            at.line()
        )),
        None => log::force(format_args!("panic on CPU {}: {}", percpu::cpu(), info.message())),
    };
    if !told {
        whisper(info);
    }
    let mut depth = 0_u32;
    entry::backtrace(|pc| {
        log::force(format_args!("backtrace {depth}: {pc:#018x}"));
        depth = depth.saturating_add(1);
    });
    power::exit(1)
}

/// Tells of a panic before there was a log, as far as it fits.
fn whisper(info: &PanicInfo<'_>) {
    let mut words = Words { bytes: [0; 256], len: 0 };
    // What does not fit is cut.
    let _ = writeln!(words, "hv: panic before there was a log: {}", info.message());
    if let Ok(words) = CStr::from_bytes_until_nul(&words.bytes) {
        power::whisper(words);
    }
}

/// Text that always ends with a zero byte.
struct Words {
    bytes: [u8; 256],
    len: usize,
}

impl Write for Words {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.len() - 1;
        for byte in text.bytes() {
            let Some(place) = self.bytes[..room].get_mut(self.len) else { return Err(fmt::Error) };
            *place = byte;
            self.len += 1;
        }
        Ok(())
    }
}
