//! Locks with ranks: the order is code, and the wrong order does not build.
//!
//! Every lock of the VM has a rank, listed here and nowhere else. A [`Held`] is the proof of the
//! deepest rank that a call chain holds; trap entry makes the first one, of rank 0. Locking needs a
//! `&mut` to it and gives back a deeper one, so a rank can be taken only under smaller ranks, once.
//!
//! ```compile_fail
//! use vmobject::lock::{self, Held, Ranked};
//! let queues = Ranked::<{ lock::QUEUES }, u32>::new(0);
//! let map = Ranked::<{ lock::MAP }, u32>::new(0);
//! let mut root = Held::root();
//! let (_q, mut held) = queues.lock(&mut root);
//! let _m = map.lock(&mut held); // a map under the queues: against the order
//! ```
//!
//! ```compile_fail
//! use vmobject::lock::{self, Held, Ranked};
//! let a = Ranked::<{ lock::MAP }, u32>::new(0);
//! let b = Ranked::<{ lock::MAP }, u32>::new(0);
//! let mut root = Held::root();
//! let (_a, _ha) = a.lock(&mut root);
//! let (_b, _hb) = b.lock(&mut root); // the first proof is still borrowed
//! drop((_a, _ha));
//! ```

use core::marker::PhantomData;
use spin::mutex::{SpinMutex, SpinMutexGuard};

/// One guest's map: its entries.
pub const MAP: u8 = 10;
/// One object; a shadow before what it shadows.
pub const OBJECT: u8 = 20;
/// One guest's stage-2 tables.
pub const PMAP: u8 = 30;
/// The registry of objects: ids, pager identities, the cache.
pub const REGISTRY: u8 = 40;
/// The page queues.
pub const QUEUES: u8 = 50;
/// The free list of frames.
pub const FREE: u8 = 60;
/// A backing store's own state.
pub const STORE: u8 = 70;

/// Data that may be locked only under locks of smaller rank.
pub struct Ranked<const RANK: u8, T>(SpinMutex<T>);

/// A guard of a ranked lock.
pub type Guard<'a, T> = SpinMutexGuard<'a, T>;

/// Proof of the deepest rank this call chain holds.
pub struct Held<'h, const RANK: u8>(PhantomData<&'h mut ()>);

impl Held<'static, 0> {
    /// The proof of holding nothing. Only trap entry, a CPU's main loop and tests may make one: a
    /// second root in one call chain would defeat the order.
    pub const fn root() -> Self {
        Self(PhantomData)
    }
}

impl<const RANK: u8, T> Ranked<RANK, T> {
    /// Wraps a value.
    pub const fn new(value: T) -> Self {
        Self(SpinMutex::new(value))
    }

    /// Locks, spinning until it is free. Interrupts are masked at EL2, so nothing preempts a holder.
    pub fn lock<'h, const OUTER: u8>(
        &'h self,
        _outer: &'h mut Held<'_, OUTER>,
    ) -> (Guard<'h, T>, Held<'h, RANK>) {
        const { assert!(OUTER < RANK, "lock taken against the order in lock.rs") };
        (self.0.lock(), Held(PhantomData))
    }

    /// The value, without locking: nobody else can have it.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }
}
