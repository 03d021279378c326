//! Guests' console output: a bounded ring each, and the wire for the one that is attached.
//!
//! Every byte goes into the ring, so that `log` shows it; the attached guest's goes to the wire too. The
//! wire is whatever `boot` gave us; it must not wait for long. Called by `memory` through
//! [`super::Guest::print`].

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::{GuestId, rank};
use crate::mm;
use spin::Once;
use vmobject::lock::{Held, Ranked};

/// How much of a guest's output is kept.
pub const LOG_BYTES: usize = 64 * 1024;

/// No guest has this number.
const NOBODY: u32 = u32::MAX;
/// A text this long is looked for in as many places at once as is asked for.
const SHORT: usize = 64;

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
    /// What was printed before is not looked at by [`Log::seek`].
    mark: u64,
}

impl Default for Log {
    fn default() -> Self {
        Self::new()
    }
}

impl Log {
    /// Bytes that it has in the heap.
    pub fn heap_bytes(&self, held: &mut Held<'_, 0>) -> usize {
        size_of::<Self>() + self.0.lock(held).0.bytes.capacity()
    }

    /// Nothing yet. The ring grows up to its bound as it is used.
    pub const fn new() -> Self {
        Self(Ranked::new(Ring { bytes: Vec::new(), next: 0, total: 0, mark: 0 }))
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

    /// The next bytes that are kept of what was printed after the first `start` bytes, and how many came before them; at
    /// most so many. `None` when there are none, or no memory for a copy.
    pub fn next<const R: u8>(
        &self,
        start: u64,
        most: usize,
        held: &mut Held<'_, R>,
    ) -> Option<(u64, Vec<u8>)> {
        const { assert!(R < rank::CONSOLE) };
        let (ring, _held) = self.0.lock(held);
        let oldest = ring.total - ring.bytes.len() as u64;
        let start = start.max(oldest);
        let skip = usize::try_from(start - oldest).ok().filter(|skip| *skip < ring.bytes.len())?;
        let mut out = Vec::new();
        out.try_reserve_exact(most.min(ring.bytes.len() - skip)).ok()?;
        out.extend(ring.iter().skip(skip).take(most));
        Some((start, out))
    }

    /// True when the text was printed since the mark, which then moves behind it; `None` when it was not found where it may
    /// begin in the next `most` bytes, and there are more. Bytes before `looked`, counted from the first ever printed, are
    /// known not to begin it; who asks again with the same value has each looked at once.
    pub fn seek<const R: u8>(
        &self,
        text: &[u8],
        looked: &mut u64,
        most: usize,
        held: &mut Held<'_, R>,
    ) -> Option<bool> {
        const { assert!(R < rank::CONSOLE) };
        // A long text may be compared nearly whole at each place.
        let most = (most * SHORT / text.len().max(SHORT)).max(1);
        let (mut ring, _held) = self.0.lock(held);
        let kept = ring.bytes.len();
        let oldest = ring.total - kept as u64;
        let skip = usize::try_from(ring.mark.max(*looked).saturating_sub(oldest)).unwrap_or(kept);
        let length = (most + text.len().saturating_sub(1)).min(kept.saturating_sub(skip));
        let mut fresh = Vec::new();
        if text.is_empty() || fresh.try_reserve_exact(length).is_err() {
            return Some(false);
        }
        fresh.extend(ring.iter().skip(skip).take(length));
        let begins = |window: &[u8]| window.first() == text.first() && window == text;
        if let Some(at) = fresh.windows(text.len()).position(begins) {
            ring.mark = oldest + (skip + at + text.len()) as u64;
            return Some(true);
        }
        if skip + length < kept {
            *looked = oldest + (skip + most) as u64;
            return None;
        }
        // It may have begun in the last bytes.
        *looked = (ring.total + 1).saturating_sub(text.len() as u64);
        Some(false)
    }

    /// Moves the mark behind everything that was printed.
    pub fn mark<const R: u8>(&self, held: &mut Held<'_, R>) {
        const { assert!(R < rank::CONSOLE) };
        let (mut ring, _held) = self.0.lock(held);
        ring.mark = ring.total;
    }

    /// Bytes ever printed.
    pub fn total<const R: u8>(&self, held: &mut Held<'_, R>) -> u64 {
        const { assert!(R < rank::CONSOLE) };
        self.0.lock(held).0.total
    }
}

impl Ring {
    /// Everything that is kept, oldest first.
    fn iter(&self) -> impl Iterator<Item = u8> {
        let (new, old) = self.bytes.split_at(self.next.min(self.bytes.len()));
        old.iter().chain(new).copied()
    }

    fn put(&mut self, byte: u8) {
        self.total = self.total.wrapping_add(1);
        if self.bytes.len() < LOG_BYTES {
            let full = self.bytes.len() == self.bytes.capacity();
            if full && (!mm::has_room() || self.bytes.try_reserve(1024).is_err()) {
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
        let mut kept = Vec::new();
        let mut at = 0;
        while let Some((start, part)) = log.next(at, 1000, &mut held) {
            assert_eq!(start, at.max(3));
            at = start + part.len() as u64;
            kept.extend(part);
        }
        assert_eq!(kept.len(), LOG_BYTES);
        assert_eq!(kept[0], 3);
        assert_eq!(usize::from(*kept.last().unwrap()), (LOG_BYTES + 2) % 251);
        assert_eq!(log.total(&mut held), LOG_BYTES as u64 + 3);
    }

    /// A few bytes at a time.
    fn seek(log: &Log, text: &[u8], looked: &mut u64, held: &mut Held<'_, 0>) -> bool {
        loop {
            if let Some(found) = log.seek(text, looked, 3, held) {
                return found;
            }
        }
    }

    #[test]
    fn text_is_found_once_and_only_behind_the_mark() {
        let log = Log::new();
        let mut held = Held::root();
        let say =
            |text: &str, held: &mut Held<'_, 0>| text.bytes().for_each(|b| log.put(GuestId(1), b, held));
        say("ready ready", &mut held);
        assert!(seek(&log, b"ready", &mut 0, &mut held));
        assert!(seek(&log, b"ready", &mut 0, &mut held));
        assert!(!seek(&log, b"ready", &mut 0, &mut held));
        say(" again: rea", &mut held);
        log.mark(&mut held);
        say("dy", &mut held);
        assert!(!seek(&log, b"ready", &mut 0, &mut held), "it began before the mark");
        assert_eq!(log.next(11, 100, &mut held).unwrap(), (11, b" again: ready".to_vec()));
    }

    #[test]
    fn who_asks_again_has_only_what_came_since_looked_at_and_finds_text_that_came_in_halves() {
        let log = Log::new();
        let mut held = Held::root();
        let say =
            |text: &str, held: &mut Held<'_, 0>| text.bytes().for_each(|b| log.put(GuestId(1), b, held));
        let mut looked = 0;
        say("nothing yet, rea", &mut held);
        assert!(!seek(&log, b"ready", &mut looked, &mut held));
        assert_eq!(looked, 12, "all but four bytes, which may begin it");
        assert!(!seek(&log, b"ready", &mut looked, &mut held));
        say("dy", &mut held);
        assert!(seek(&log, b"ready", &mut looked, &mut held));
        let mut far = 3;
        assert!(!seek(&log, b"a text longer than all that was printed", &mut far, &mut held));
        assert_eq!(far, 0);
    }
}
