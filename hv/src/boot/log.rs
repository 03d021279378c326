//! Where the hypervisor's own words go: the second serial port if there is one, else the first.
//!
//! The `log` crate is the front everywhere; this is its back. Every line starts with `hv: `, so that a person
//! and a test can tell ours from a guest's where both share a port. The port's lock is a leaf, and a panic
//! breaks it.
#![expect(unsafe_code, reason = "a panic takes the port from whoever holds it")]

use board::pl011::Pl011;
use board::platform::Platform;
use core::fmt::{self, Write};
use log::{LevelFilter, Log, Metadata, Record};
use spin::Mutex;

static PORT: Mutex<Option<Pl011>> = Mutex::new(None);

struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut port = PORT.lock();
        if let Some(port) = port.as_mut() {
            // A serial port does not fail.
            let _ = line(port, format_args!("{}", record.args()));
        }
    }

    fn flush(&self) {}
}

/// Puts `hv: ` before every line.
struct Prefixed<'a>(&'a mut Pl011, bool);

impl Write for Prefixed<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive('\n') {
            if self.1 {
                self.0.write_str("hv: ")?;
            }
            self.0.write_str(part)?;
            self.1 = part.ends_with('\n');
        }
        Ok(())
    }
}

fn line(port: &mut Pl011, what: fmt::Arguments<'_>) -> fmt::Result {
    let mut out = Prefixed(port, true);
    out.write_fmt(what)?;
    if out.1 { Ok(()) } else { out.write_str("\n") }
}

/// Takes the port over. Before this, and where there is none, words are lost.
pub fn init(platform: &Platform) {
    if let Some(uart) = platform.uarts.get(1).or(platform.uarts.first()) {
        // SAFETY: the tree names the port, the map has it as device memory, and the console takes the first
        // port only where this took the second.
        *PORT.lock() = unsafe { Pl011::new(uart) };
    }
    log::set_max_level(LevelFilter::Info);
    // Fails only if called twice.
    let _ = log::set_logger(&Logger);
}

/// Runs `work` on our own port: for the console, where both are the same.
pub fn with_port<R>(work: impl FnOnce(&mut Pl011) -> R) -> Option<R> {
    PORT.lock().as_mut().map(work)
}

/// Prints a line although somebody may hold the port: this CPU, in the middle of a line, for one.
pub fn force(what: fmt::Arguments<'_>) -> bool {
    for _ in 0..1_000_000 {
        if let Some(mut port) = PORT.try_lock() {
            return port.as_mut().is_some_and(|port| line(port, what).is_ok());
        }
        core::hint::spin_loop();
    }
    // SAFETY: the machine is ending; whoever holds the lock is us, or is about to be stopped. Two writers of a
    // serial port garble a line and nothing else.
    unsafe { PORT.force_unlock() };
    PORT.lock().as_mut().is_some_and(|port| line(port, what).is_ok())
}
