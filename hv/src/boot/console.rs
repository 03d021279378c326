//! The console: the first serial port, where the attached guest talks and the monitor opens.
//!
//! Where the machine has two ports the second is our log's and the first is taken here; where it has one,
//! both share it through the log's lock. Both locks are leaves.
#![expect(unsafe_code, reason = "the port's address comes from the device tree")]

use super::log;
use crate::guest::console::Wire;
use board::pl011::Pl011;
use board::platform::{Interrupt, Platform};
use core::fmt;
use spin::Mutex;

static PORT: Mutex<Option<Pl011>> = Mutex::new(None);

/// The wire as guests and the monitor see it.
pub(super) struct Serial;

/// Takes the port over, with its receive interrupt on. Its interrupt, if there is a port.
pub(super) fn init(platform: &Platform) -> Option<Interrupt> {
    let uart = platform.uarts.first()?;
    if platform.uarts.len() > 1 {
        // SAFETY: the tree names the port, the map has it as device memory, and the log took the second.
        *PORT.lock() = unsafe { Pl011::new(uart) };
    }
    with(|port| port.set_receive_interrupt(true));
    Some(uart.device.interrupt)
}

/// Runs `work` on the console's port.
fn with<R>(work: impl FnOnce(&mut Pl011) -> R) -> Option<R> {
    let mut port = PORT.lock();
    match port.as_mut() {
        Some(port) => Some(work(port)),
        None => {
            drop(port);
            log::with_port(work)
        }
    }
}

/// A typed byte.
pub(super) fn next() -> Option<u8> {
    // The interrupt goes with the last byte that is read. To clear it would lose what comes just then, and what whoever
    // reads only so many leaves there.
    with(Pl011::read).flatten()
}

impl Wire for Serial {
    fn put(&self, byte: u8) {
        with(|port| port.write(byte));
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            self.put(byte);
        }
        Ok(())
    }
}
