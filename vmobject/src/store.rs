//! The machine below the VM: the bytes of frames, and stores that start I/O and never wait.

use core::fmt;

use crate::addr::Pfn;

/// The bytes behind frame numbers; the only door to them.
pub trait PhysMemory: Sync {
    /// Fills a frame with zeros and cleans it as far as a guest can look (invariant I2).
    fn zero(&self, frame: Pfn);
    /// Copies a frame and cleans the copy as far as a guest can look. The source may have been
    /// written uncached: it is cleaned and invalidated first where the CPU needs that (I2).
    fn copy(&self, from: Pfn, to: Pfn);
    /// Fills a frame from `bytes` (at most a page), zero after them, and cleans it.
    fn fill(&self, frame: Pfn, bytes: &[u8]);
    /// Reads `out.len()` bytes from `offset` in the frame; the range must lie in the page.
    fn read(&self, frame: Pfn, offset: usize, out: &mut [u8]);
    /// Writes `bytes` at `offset` in the frame; the range must lie in the page.
    fn write(&self, frame: Pfn, offset: usize, bytes: &[u8]);
    /// Makes a frame that a device has just filled ready for guests: cleaned, and I-cache coherent.
    fn publish(&self, frame: Pfn);
    /// Shows a frame to `each`, eight bytes at a time from its start, as long as that says true. What a
    /// guest wrote uncached is seen (I2).
    fn look(&self, frame: Pfn, each: impl FnMut(u64) -> bool);

    /// True if every byte is zero.
    fn is_zero(&self, frame: Pfn) -> bool {
        let mut zero = true;
        self.look(frame, |word| {
            zero = word == 0;
            zero
        });
        zero
    }

    /// A sum of the bytes that depends on `key`: two frames that differ, or two keys, have the same one by
    /// chance only. Against a store that is mistaken, not one that means harm.
    fn sum(&self, frame: Pfn, key: u64) -> u32 {
        const ODD: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 over the golden ratio
        let mut sum = key.wrapping_mul(ODD);
        self.look(frame, |word| {
            sum = (sum.rotate_left(23) ^ word).wrapping_mul(ODD);
            true
        });
        let [a, b] = [sum >> 32, sum & 0xffff_ffff].map(|half| u32::try_from(half).unwrap_or(0));
        a ^ b
    }

    /// The same for what goes to a store and comes back in one run: whatever this CPU computes fastest. What another
    /// program compares is [`Self::sum`].
    fn seal(&self, frame: Pfn, key: u64) -> u32 {
        self.sum(frame, key)
    }

    /// [`Self::publish`] and [`Self::seal`] in one: a page that comes back is looked through anyway.
    fn publish_sealed(&self, frame: Pfn, key: u64) -> u32 {
        self.publish(frame);
        self.seal(frame, key)
    }
}

/// Names one backing store: a partition of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreId(pub u16);

/// Names one I/O in flight. Given by the VM, returned with the completion; never reused while a stale
/// completion could still arrive. The VM's have a clear top bit: with it set they are somebody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IoToken(pub u64);

/// Why a store could not take or finish a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// The queue is full: try again after a completion.
    Busy,
    /// The device says the transfer failed.
    Io,
    /// The page lies outside the store, or the store is read-only.
    Refused,
    /// The device is gone.
    Gone,
    /// What came back is not what was written.
    Corrupt,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Busy => "its queue is full",
            Self::Io => "the device says that it failed",
            Self::Refused => "it takes no such request",
            Self::Gone => "the device is gone",
            Self::Corrupt => "what came back is not what was written",
        })
    }
}

/// A page that a store did not give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LostPage {
    /// The store.
    pub store: StoreId,
    /// Which of its pages.
    pub page: u32,
    /// Why.
    pub error: StoreError,
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the store into frames.
    In,
    /// From frames to the store.
    Out,
}

/// What a store says of one of its pages, before or after it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Nothing.
    Anything,
    /// It is all zeros, and need not be read.
    Zeros,
    /// Its bytes have this sum under this key ([`PhysMemory::sum`], which is never given as 0 here: that is 1).
    Sum {
        /// The key.
        key: u64,
        /// The sum.
        sum: u32,
    },
}

/// Starts transfers, never waits for one. Its owner delivers each completion to the VM by token.
pub trait PageStore: Sync {
    /// Starts moving `frames.len()` pages between the store's pages from `first` on and `frames`.
    /// Exactly one completion follows an `Ok`, none an error. The frames belong to the device until
    /// then.
    fn start(
        &self,
        store: StoreId,
        direction: Direction,
        first: u64,
        frames: &[Pfn],
        token: IoToken,
    ) -> Result<(), StoreError>;

    /// Makes what was written before it durable; completes like a transfer.
    fn start_flush(&self, store: StoreId, token: IoToken) -> Result<(), StoreError>;

    /// Says that pages are not needed any more; advice, may do nothing.
    fn discard(&self, store: StoreId, first: u64, pages: u64);

    /// Pages in the store; a last part of a page counts, and reads as zero behind its end.
    fn pages(&self, store: StoreId) -> u64;

    /// Pages that are there whole: what is written to one comes back.
    fn whole_pages(&self, store: StoreId) -> u64;

    /// What is known of a page of a store that is only read.
    fn expects(&self, _store: StoreId, _page: u64) -> Expected {
        Expected::Anything
    }
}

/// The machine, as one parameter: what the VM runs on.
pub trait Machine: Sized + Sync + 'static {
    /// The translation tables.
    type Pmap: crate::pmap::Pmap;
    /// The frames' bytes.
    type Memory: PhysMemory;
    /// The backing stores.
    type Store: PageStore;

    /// The frames' bytes.
    fn memory(&self) -> &Self::Memory;
    /// The backing stores.
    fn store(&self) -> &Self::Store;

    /// True while there is memory for more books than there are. Asked before guests have the books grow, so that
    /// what must not fail finds some left; asked with locks held, and often.
    fn has_room(&self) -> bool {
        true
    }
}
