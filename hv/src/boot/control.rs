//! The control port: port 1 of the first virtio console that has one, behind which `xtask ctl` speaks.
//!
//! Bytes come in when its interrupt says so and the monitor has room for lines; what it has no room for stays in
//! the device's buffers, and QEMU holds its end back. They go out as far as there are buffers, which come back with an
//! interrupt, too. The lock is a leaf.

use board::platform::Interrupt;
use board::virtio::console::Console;
use spin::Mutex;

static PORT: Mutex<Option<(Console, Interrupt)>> = Mutex::new(None);

/// Takes a port over; false when there is one already.
pub(super) fn set(console: Console, interrupt: Interrupt) -> bool {
    let mut port = PORT.lock();
    let first = port.is_none();
    if first {
        *port = Some((console, interrupt));
    }
    first
}

/// Its interrupt, if there is a port.
pub(super) fn interrupt() -> Option<Interrupt> {
    PORT.lock().as_ref().map(|(_, interrupt)| *interrupt)
}

/// Clears its interrupt: before [`read`] until there is nothing.
pub(super) fn acknowledge() {
    if let Some((console, _)) = PORT.lock().as_mut() {
        console.acknowledge();
    }
}

/// Takes what has arrived; 0 when there is nothing.
pub(super) fn read(into: &mut [u8]) -> usize {
    PORT.lock().as_mut().map_or(0, |(console, _)| console.read(into))
}

/// Sends what there is room for, and says how much that was: all of it, where there is no port, or nobody at its other end.
pub(super) fn write(bytes: &[u8]) -> usize {
    PORT.lock().as_mut().map_or(bytes.len(), |(console, _)| console.write(bytes))
}

/// True when everything that was sent has left the machine, or nobody is there to take it.
pub(super) fn is_sent() -> bool {
    PORT.lock().as_mut().is_none_or(|(console, _)| console.is_sent())
}
