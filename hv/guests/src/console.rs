//! The PL011, polled, one byte at a time, and `println!` over it.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use hv_abi::machine::{INTID_PL011, PL011};

use crate::gic;
use crate::mmio::{read32, write8, write32};

const UARTDR: u64 = PL011.base;
const UARTFR: u64 = PL011.base + 0x18;
const UARTLCR_H: u64 = PL011.base + 0x2c;
const FIFOS: u32 = 1 << 4;
const EIGHT_BITS: u32 = 3 << 5;
const UARTIMSC: u64 = PL011.base + 0x38;
/// Bytes have come, enough or for long.
const RECEIVE_INTERRUPTS: u32 = 1 << 4 | 1 << 6;
const TRANSMIT_FULL: u32 = 1 << 5;
const RECEIVE_EMPTY: u32 = 1 << 4;

/// One line at a time, whichever vCPU prints it.
static LINE: AtomicBool = AtomicBool::new(false);

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while read32(UARTFR) & TRANSMIT_FULL != 0 {}
            write8(UARTDR, byte);
        }
        Ok(())
    }
}

/// A typed byte, if there is one.
pub fn typed() -> Option<u8> {
    (read32(UARTFR) & RECEIVE_EMPTY == 0).then(|| read32(UARTDR).to_le_bytes()[0])
}

/// Waits for a typed byte.
pub fn read() -> u8 {
    loop {
        if let Some(byte) = typed() {
            return byte;
        }
        instruction!("yield");
    }
}

/// Takes all that was typed so far.
pub fn forget() {
    while read32(UARTFR) & RECEIVE_EMPTY == 0 {
        read32(UARTDR);
    }
}

/// Has typed bytes raise the interrupt, for [`asleep_until_typed`]. What was typed before is lost, so it comes before
/// anything is printed that says that one may type.
pub fn listen() {
    write32(UARTLCR_H, FIFOS | EIGHT_BITS);
    write32(UARTIMSC, RECEIVE_INTERRUPTS);
}

/// The same as [`read`], asleep meanwhile, after [`listen`]. The console's interrupt is let through, and masked.
pub fn asleep_until_typed() -> u8 {
    loop {
        // What comes after this look makes it pending again.
        gic::unpend(INTID_PL011);
        if read32(UARTFR) & RECEIVE_EMPTY == 0 {
            return read();
        }
        instruction!("wfi");
    }
}

/// Prints a line. A line that is never finished, because a trap came in its middle, holds up the next one
/// only for a while.
pub fn line(text: fmt::Arguments<'_>) {
    for _ in 0..10_000_000 {
        if !LINE.swap(true, Ordering::Acquire) {
            break;
        }
        core::hint::spin_loop();
    }
    // The PL011 takes everything.
    let _ = writeln!(Console, "{text}\r");
    LINE.store(false, Ordering::Release);
}

/// Prints a line.
macro_rules! println {
    ($($text:tt)*) => { $crate::console::line(format_args!($($text)*)) };
}
