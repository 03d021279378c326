//! Locks with ranks: the order is code, and the wrong order does not build.
//!
//! Every lock of the VM has a rank, listed here and nowhere else. A [`Held`] is the proof of the
//! deepest rank that a call chain holds; trap entry makes the first one, of rank 0. Locking needs a
//! `&mut` to it and gives back a deeper one, so a rank can be taken only under smaller ranks, once.
//!
//! Two doors lead past that, both narrow. `Descent` goes down a shadow chain hand over hand: objects
//! have one rank, and a shadow comes before what it shadows, so there is an order although the type
//! does not show it. `RankedRw::write_below` is the same for a single step.
//!
//! What does not build (D18, D19): a lock taken against the order, two of one rank, what a lock guards without it.
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
//!
//! ```compile_fail
//! use vmobject::lock::{self, Held, Ranked};
//! let map = Ranked::<{ lock::MAP }, u32>::new(0);
//! let read: u32 = map.0; // without the lock
//! ```

use core::marker::PhantomData;

use crate::point;
use spin::mutex::{SpinMutex, SpinMutexGuard};
use spin::rwlock::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// What a caller of the VM may hold: the ranks of guests and schedulers, 1 to 9.
pub const CALLER: u8 = 9;
/// One guest's map: its entries.
pub const MAP: u8 = 10;
/// One object; a shadow before what it shadows.
pub const OBJECT: u8 = 20;
/// Who maps and who shadows each object: the reverse map's structure.
pub const LINKS: u8 = 25;
/// One guest's stage-2 tables.
pub const PMAP: u8 = 30;
/// The registry of objects: ids, pager identities, the cache.
pub const REGISTRY: u8 = 40;
/// Transfers in flight.
pub const IO: u8 = 45;
/// What was promised.
pub const CHARGE: u8 = 48;
/// The swap store's slots.
pub const SWAP: u8 = 47;
/// The page queues, the free list among them.
pub const QUEUES: u8 = 50;
/// A backing store's own state.
pub const STORE: u8 = 70;

/// Data that may be locked only under locks of smaller rank.
pub struct Ranked<const RANK: u8, T>(SpinMutex<T>);

/// A guard of a ranked lock.
pub type Guard<'a, T> = SpinMutexGuard<'a, T>;

/// Proof of the deepest rank this call chain holds.
pub struct Held<'h, const RANK: u8>(PhantomData<&'h mut ()>);

impl<const RANK: u8> Held<'_, RANK> {
    /// The same proof, claiming that more is held than is: always safe, and makes callers of
    /// different ranks alike.
    pub const fn deepen<const TO: u8>(&mut self) -> Held<'_, TO> {
        const { assert!(RANK <= TO, "a proof cannot become shallower") };
        Held(PhantomData)
    }
}

impl Held<'static, PMAP> {
    /// The proof for code that a pmap calls back into: whoever called the pmap holds at most that.
    pub(crate) const fn under_pmap() -> Self {
        Self(PhantomData)
    }
}

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
        (point::take(|| self.0.try_lock(), || self.0.lock()), Held(PhantomData))
    }

    /// The value, without locking: nobody else can have it.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }
}

/// State of a chore that one CPU does at a time: who comes second does not wait but goes away, so it can be in
/// no deadlock and has no rank.
pub struct Alone<T>(SpinMutex<T>);

impl<T> Alone<T> {
    /// Wraps a value.
    pub const fn new(value: T) -> Self {
        Self(SpinMutex::new(value))
    }

    /// The value, unless somebody has it.
    pub fn enter(&self) -> Option<Guard<'_, T>> {
        point::here();
        self.0.try_lock()
    }
}

/// Data that many may read and one may change, under locks of smaller rank.
pub struct RankedRw<const RANK: u8, T>(RwLock<T>);

/// A reader's guard.
pub type Reading<'a, T> = RwLockReadGuard<'a, T>;
/// A writer's guard.
pub type Writing<'a, T> = RwLockWriteGuard<'a, T>;

impl<const RANK: u8, T> RankedRw<RANK, T> {
    /// Wraps a value.
    pub const fn new(value: T) -> Self {
        Self(RwLock::new(value))
    }

    fn reading(&self) -> Reading<'_, T> {
        point::take(|| self.0.try_read(), || self.0.read())
    }

    fn writing(&self) -> Writing<'_, T> {
        point::take(|| self.0.try_write(), || self.0.write())
    }

    /// Locks for reading, beside other readers.
    pub fn read<'h, const OUTER: u8>(
        &'h self,
        _outer: &'h mut Held<'_, OUTER>,
    ) -> (Reading<'h, T>, Held<'h, RANK>) {
        const { assert!(OUTER < RANK, "lock taken against the order in lock.rs") };
        (self.reading(), Held(PhantomData))
    }

    /// Locks for writing, alone.
    pub fn write<'h, const OUTER: u8>(
        &'h self,
        _outer: &'h mut Held<'_, OUTER>,
    ) -> (Writing<'h, T>, Held<'h, RANK>) {
        const { assert!(OUTER < RANK, "lock taken against the order in lock.rs") };
        (self.writing(), Held(PhantomData))
    }

    /// Starts down a chain at this object, read-locked; `OUTER` may be the object's own rank when the
    /// caller holds an object that shadows this one.
    pub(crate) fn descend<'h, const OUTER: u8>(
        &'h self,
        _outer: &'h mut Held<'_, OUTER>,
    ) -> Descent<'h, RANK, T> {
        const { assert!(OUTER <= RANK, "lock taken against the order in lock.rs") };
        Descent { guard: self.reading(), held: Held(PhantomData) }
    }

    /// The same at an object that may be anything by now, and above what the caller holds: `None` if it cannot be had
    /// for as long as it is `still` what it was.
    pub(crate) fn descend_while<'h, const OUTER: u8>(
        &'h self,
        still: impl Fn() -> bool,
        _outer: &'h mut Held<'_, OUTER>,
    ) -> Option<Descent<'h, RANK, T>> {
        const { assert!(OUTER <= RANK, "lock taken against the order in lock.rs") };
        Some(Descent { guard: self.reading_while(still)?, held: Held(PhantomData) })
    }

    fn reading_while(&self, still: impl Fn() -> bool) -> Option<Reading<'_, T>> {
        point::here();
        loop {
            if let Some(guard) = self.0.try_read() {
                return Some(guard);
            }
            if !still() {
                return None;
            }
            point::blocked();
        }
    }

    /// Locks for reading a lock of the same rank beside one that is held, unless somebody has it: who
    /// does not wait cannot be in a deadlock.
    pub(crate) fn try_read_beside<'h>(&'h self, _outer: &'h mut Held<'_, RANK>) -> Option<Reading<'h, T>> {
        self.0.try_read()
    }

    /// Write-locks what the caller's object shadows.
    pub(crate) fn write_below<'h>(
        &'h self,
        _outer: &'h mut Held<'_, RANK>,
    ) -> (Writing<'h, T>, Held<'h, RANK>) {
        (self.writing(), Held(PhantomData))
    }
}

/// A way down a shadow chain: one object read-locked at a time, the next before the last is let go.
pub(crate) struct Descent<'h, const RANK: u8, T> {
    guard: Reading<'h, T>,
    held: Held<'h, RANK>,
}

impl<'h, const RANK: u8, T> Descent<'h, RANK, T> {
    /// One step down, to what the present object shadows.
    pub(crate) fn step(&mut self, next: &'h RankedRw<RANK, T>) {
        self.guard = next.reading();
    }

    /// The same to an object that may be anything by now; see [`RankedRw::descend_while`].
    pub(crate) fn step_while(&mut self, next: &'h RankedRw<RANK, T>, still: impl Fn() -> bool) -> bool {
        let guard = next.reading_while(still);
        let had = guard.is_some();
        if let Some(guard) = guard {
            self.guard = guard;
        }
        had
    }

    /// The object where we are.
    pub(crate) fn here(&self) -> &T {
        &self.guard
    }

    /// The object where we are, and the proof for locks below it.
    pub(crate) fn split(&mut self) -> (&T, &mut Held<'h, RANK>) {
        (&self.guard, &mut self.held)
    }
}
