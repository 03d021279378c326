//! Guests' console output: a bounded ring each, and the wire for the one that is attached.
//!
//! Every byte goes into the ring, so that `log` shows it; the attached guest's goes to the wire too. The
//! wire is whatever `boot` gave us; it must not wait for long. Called by `memory` through
//! [`super::Guest::print`].

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::{GuestId, rank};
use spin::Once;
use vmobject::lock::{Held, Ranked};

/// How much of a guest's output is kept.
pub const LOG_BYTES: usize = 64 * 1024;

/// No guest has this number.
const NOBODY: u32 = u32::MAX;

static ATTACHED: AtomicU32 = AtomicU32::new(NOBODY);
static HELD_BACK: AtomicBool = AtomicBool::new(false);
static WIRE: Once<&'static dyn Wire> = Once::new();

/// Where the attached guest's output goes.
pub trait Wire: Sync {
    /// Sends a byte.
    fn put(&self, byte: u8);
}

/// Says where the attached guest's output goes; once.
pub fn set_wire(wire: &'static dyn Wire) {
    WIRE.call_once(|| wire);
}

/// Connects the console to a guest, or to nobody.
pub fn attach(guest: Option<GuestId>) {
    ATTACHED.store(guest.map_or(NOBODY, |guest| guest.0), Ordering::SeqCst);
}

/// The attached guest.
pub fn attached() -> Option<GuestId> {
    match ATTACHED.load(Ordering::SeqCst) {
        NOBODY => None,
        id => Some(GuestId(id)),
    }
}

/// Keeps the attached guest's output from the wire while the monitor uses it.
pub fn hold_back(on: bool) {
    HELD_BACK.store(on, Ordering::SeqCst);
}

/// What a guest printed lately.
pub struct Log(Ranked<{ rank::CONSOLE }, Ring>);

struct Ring {
    bytes: Vec<u8>,
    /// Where the next byte goes, once the ring is full.
    next: usize,
    /// Bytes ever printed.
    total: u64,
}

impl Default for Log {
    fn default() -> Self {
        Self::new()
    }
}

impl Log {
    /// Nothing yet. The ring grows up to its bound as it is used.
    pub const fn new() -> Self {
        Self(Ranked::new(Ring { bytes: Vec::new(), next: 0, total: 0 }))
    }

    /// Adds a byte of guest `from`.
    pub fn put<const R: u8>(&self, from: GuestId, byte: u8, held: &mut Held<'_, R>) {
        const { assert!(R < rank::CONSOLE) };
        let (mut ring, _held) = self.0.lock(held);
        ring.put(byte);
        if ATTACHED.load(Ordering::Relaxed) == from.0
            && !HELD_BACK.load(Ordering::Relaxed)
            && let Some(wire) = WIRE.get()
        {
            wire.put(byte);
        }
    }

    /// Everything that is kept, oldest first; `None` when there is no memory for a copy.
    pub fn read<const R: u8>(&self, held: &mut Held<'_, R>) -> Option<Vec<u8>> {
        const { assert!(R < rank::CONSOLE) };
        let (ring, _held) = self.0.lock(held);
        let mut out = Vec::new();
        out.try_reserve_exact(ring.bytes.len()).ok()?;
        let (new, old) = ring.bytes.split_at(ring.next.min(ring.bytes.len()));
        out.extend_from_slice(old);
        out.extend_from_slice(new);
        Some(out)
    }

    /// Bytes ever printed.
    pub fn total<const R: u8>(&self, held: &mut Held<'_, R>) -> u64 {
        const { assert!(R < rank::CONSOLE) };
        self.0.lock(held).0.total
    }
}

impl Ring {
    fn put(&mut self, byte: u8) {
        self.total = self.total.wrapping_add(1);
        if self.bytes.len() < LOG_BYTES {
            if self.bytes.len() == self.bytes.capacity() && self.bytes.try_reserve(1024).is_err() {
                return;
            }
            self.bytes.push(byte);
            return;
        }
        if let Some(place) = self.bytes.get_mut(self.next) {
            *place = byte;
        }
        self.next = (self.next + 1) % LOG_BYTES;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_bytes_in_order() {
        let log = Log::new();
        let mut held = Held::root();
        for n in 0..LOG_BYTES + 3 {
            log.put(GuestId(1), u8::try_from(n % 251).unwrap(), &mut held);
        }
        let kept = log.read(&mut held).unwrap();
        assert_eq!(kept.len(), LOG_BYTES);
        assert_eq!(kept[0], 3);
        assert_eq!(usize::from(*kept.last().unwrap()), (LOG_BYTES + 2) % 251);
        assert_eq!(log.total(&mut held), LOG_BYTES as u64 + 3);
    }
}
