//! A console's queue with its buffers: as many as it has places, all of one size, in one page.
//!
//! A chain is one buffer. What the device gives back is looked up by its head, so one that gives back what it does not
//! have is found out. A queue is either one to fill ([`Buffers::offer`], [`Buffers::filled`], [`Buffers::copy`]) or one
//! to send by ([`Buffers::put`], [`Buffers::reclaim`]). Called by `console`, which has four.
#![expect(unsafe_code, reason = "the device moves bytes to and from pages that it shares with us")]

use super::hal::{Identity, Pages};
use super::{DeviceError, kick, queue};
use core::ptr::NonNull;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

/// The device gave back a buffer that it did not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotGiven;

/// A buffer that the device gave back, and how many bytes it wrote there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Filled {
    pub(super) buffer: usize,
    pub(super) bytes: usize,
}

/// A queue and its buffers.
/// # Invariants
/// C1. `of[head]` names the buffer behind each chain in the queue.
/// C2. A buffer is behind one chain at most; one that is behind none is ours to read and write.
pub(super) struct Buffers<const SIZE: usize> {
    queue: VirtQueue<Identity, SIZE>,
    index: u16,
    page: Pages,
    of: [Option<u8>; SIZE],
}

impl<const SIZE: usize> Buffers<SIZE> {
    /// Bytes of a buffer.
    const BYTES: usize = 4096 / SIZE;

    /// Sets a queue up. The device has none of the buffers yet.
    pub(super) fn new<T: Transport>(transport: &mut T, index: u16) -> Result<Self, DeviceError> {
        let queue = queue(transport, index)?;
        let page = Pages::take(1).ok_or(DeviceError::NoMemory)?;
        Ok(Self { queue, index, page, of: [None; SIZE] })
    }

    /// Tells the device of what was offered or put.
    pub(super) fn kick<T: Transport>(&self, transport: &mut T) {
        kick(transport, &self.queue, self.index);
    }

    /// True when the device has no buffer.
    pub(super) fn is_empty(&self) -> bool {
        self.of.iter().all(Option::is_none)
    }

    /// Gives the device every buffer to fill; it has none yet.
    pub(super) fn offer_all(&mut self) {
        (0..SIZE).for_each(|buffer| self.offer(buffer));
    }

    /// Gives the device a buffer to fill: one that it has not.
    pub(super) fn offer(&mut self, buffer: usize) {
        let mut whole = self.whole(buffer);
        // SAFETY: C2: the buffer is ours until the next call.
        let whole = unsafe { whole.as_mut() };
        // SAFETY: the page lives as long as the queue, and the buffer is not touched before it comes back.
        if let Ok(head) = unsafe { self.queue.add(&[], &mut [whole]) } {
            self.remember(head, buffer);
        }
    }

    /// Takes back a buffer that the device has filled.
    pub(super) fn filled(&mut self) -> Result<Option<Filled>, NotGiven> {
        let Some(head) = self.queue.peek_used() else { return Ok(None) };
        let buffer = self.forget(head)?;
        let mut whole = self.whole(buffer);
        // SAFETY: the buffer lies in the page, and is ours once popped.
        let whole = unsafe { whole.as_mut() };
        // SAFETY: C1: this is the buffer that went in with the head.
        let bytes = unsafe { self.queue.pop_used(head, &[], &mut [whole]) }.map_err(|_| NotGiven)?;
        Ok(Some(Filled { buffer, bytes: usize::try_from(bytes).unwrap_or(Self::BYTES).min(Self::BYTES) }))
    }

    /// Copies bytes of a buffer that came back and was not offered again.
    pub(super) fn copy(&self, buffer: usize, from: usize, out: &mut [u8]) {
        assert!(buffer < SIZE && from + out.len() <= Self::BYTES, "past the end of a buffer");
        let from = self.page.at(buffer * Self::BYTES + from);
        // SAFETY: C2: the buffer is ours, and the bytes lie in it.
        unsafe { from.copy_to_nonoverlapping(NonNull::from(&mut *out).cast(), out.len()) };
    }

    /// Gives the device as much to send as one buffer takes; how much that is. 0: it has them all.
    pub(super) fn put(&mut self, bytes: &[u8]) -> usize {
        let part = &bytes[..bytes.len().min(Self::BYTES)];
        let taken = |buffer: usize| self.of.iter().flatten().any(|used| usize::from(*used) == buffer);
        let Some(buffer) = (0..SIZE).find(|buffer| !taken(*buffer)).filter(|_| !part.is_empty()) else {
            return 0;
        };
        let start = self.page.at(buffer * Self::BYTES);
        // SAFETY: C2: the buffer is ours; a part fits in it.
        unsafe { start.copy_from_nonoverlapping(NonNull::from(part).cast(), part.len()) };
        let whole = NonNull::slice_from_raw_parts(start, part.len());
        // SAFETY: C2: nobody writes the buffer until it is reclaimed.
        let whole = unsafe { whole.as_ref() };
        // SAFETY: the page lives as long as the queue, and the buffer is not touched before it comes back.
        let Ok(head) = (unsafe { self.queue.add(&[whole], &mut []) }) else { return 0 };
        self.remember(head, buffer);
        part.len()
    }

    /// Takes back the buffers that the device has sent.
    pub(super) fn reclaim(&mut self) -> Result<(), NotGiven> {
        while let Some(head) = self.queue.peek_used() {
            let buffer = self.forget(head)?;
            let whole = self.whole(buffer);
            // SAFETY: the buffer lies in the page; only its address and count matter to the queue.
            let whole = unsafe { whole.as_ref() };
            // SAFETY: C1: this is the buffer that went in with the head.
            unsafe { self.queue.pop_used(head, &[whole], &mut []) }.map_err(|_| NotGiven)?;
        }
        Ok(())
    }

    fn whole(&self, buffer: usize) -> NonNull<[u8]> {
        NonNull::slice_from_raw_parts(self.page.at(buffer * Self::BYTES), Self::BYTES)
    }

    fn remember(&mut self, head: u16, buffer: usize) {
        if let Some(entry) = self.of.get_mut(usize::from(head)) {
            debug_assert!(entry.is_none(), "C1");
            *entry = u8::try_from(buffer).ok();
        }
    }

    fn forget(&mut self, head: u16) -> Result<usize, NotGiven> {
        self.of.get_mut(usize::from(head)).and_then(Option::take).map(usize::from).ok_or(NotGiven)
    }
}
