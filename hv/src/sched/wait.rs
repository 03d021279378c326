//! Those who wait: for a time, for a transfer, for memory.
//!
//! Every entry is a hint. A vCPU that was woken by something else leaves stale entries behind, and a stale
//! entry wakes it once for nothing: it looks, and waits again. So nothing has to be taken out, only kept
//! few: a vCPU has at most one entry of each kind.

use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::{AtomicUsize, fence};

use crate::guest::exit::Waiting;
use crate::guest::rank;
use vmobject::lock::{Held, Ranked};
use vmobject::store::IoToken;

/// vCPUs with a deadline, of one CPU.
pub struct Sleepers<T>(Vec<(u64, T)>);

impl<T> Default for Sleepers<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: PartialEq> Sleepers<T> {
    /// Nobody.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Puts a vCPU to sleep until `deadline`; replaces an earlier entry of it. `Err` hands it back when
    /// there is no memory: the caller wakes it at once, which is only less lazy.
    pub fn add(&mut self, deadline: u64, vcpu: T) -> Result<(), T> {
        if let Some(entry) = self.0.iter_mut().find(|(_, other)| *other == vcpu) {
            entry.0 = deadline;
            return Ok(());
        }
        if self.0.try_reserve(1).is_err() {
            return Err(vcpu);
        }
        self.0.push((deadline, vcpu));
        Ok(())
    }

    /// Takes one whose time has come.
    pub fn expired(&mut self, now: u64) -> Option<T> {
        let place = self.0.iter().position(|&(deadline, _)| deadline <= now)?;
        Some(self.0.swap_remove(place).1)
    }

    /// The earliest deadline.
    pub fn next(&self) -> Option<u64> {
        self.0.iter().map(|&(deadline, _)| deadline).min()
    }

    /// Forgets a guest's vCPUs.
    pub fn forget(&mut self, keep: impl Fn(&T) -> bool) {
        self.0.retain(|(_, vcpu)| keep(vcpu));
    }
}

/// vCPUs, or requests of disks, that wait for a transfer or for memory, of all CPUs; not those with which a CPU stands still.
pub struct Waiters<T> {
    list: Ranked<{ rank::WAITERS }, Vec<(Waiting, T)>>,
    /// How many are on the list: mostly nobody is, and what has come is told to several such lists.
    count: AtomicUsize,
}

impl<T> Default for Waiters<T> {
    fn default() -> Self {
        Self { list: Ranked::new(Vec::new()), count: AtomicUsize::new(0) }
    }
}

impl<T: Clone + PartialEq> Waiters<T> {
    /// Nobody.
    pub const fn new() -> Self {
        Self { list: Ranked::new(Vec::new()), count: AtomicUsize::new(0) }
    }

    /// Makes room for as many vCPUs as there will be.
    pub fn reserve<const R: u8>(&self, vcpus: usize, held: &mut Held<'_, R>) -> Result<(), TryReserveError> {
        const { assert!(R < rank::WAITERS) };
        let (mut list, _held) = self.list.lock(held);
        let more = vcpus.saturating_sub(list.len());
        list.try_reserve(more)
    }

    /// Adds one; it must look once more afterwards, because what it waits for may have come meanwhile. Where no
    /// room was made and there is no memory it is left out, and has to look by itself after a while: false.
    pub fn add<const R: u8>(&self, what: Waiting, vcpu: &T, held: &mut Held<'_, R>) -> bool {
        const { assert!(R < rank::WAITERS) };
        let (mut list, _held) = self.list.lock(held);
        match list.iter().position(|(_, other)| other == vcpu) {
            Some(place) => list[place].0 = what,
            None if list.try_reserve(1).is_ok() => list.push((what, vcpu.clone())),
            None => return false,
        }
        self.count.store(list.len(), Relaxed);
        // Before the look whether it has come: `take` looks the other way round.
        fence(SeqCst);
        true
    }

    /// Takes out one who waits for this; to be called until it says `None`.
    fn take<const R: u8>(&self, what: Waiting, held: &mut Held<'_, R>) -> Option<T> {
        const { assert!(R < rank::WAITERS) };
        fence(SeqCst);
        if self.count.load(Relaxed) == 0 {
            return None;
        }
        let (mut list, _held) = self.list.lock(held);
        let place = list.iter().position(|&(other, _)| other == what)?;
        let taken = list.swap_remove(place).1;
        self.count.store(list.len(), Relaxed);
        Some(taken)
    }

    /// Takes out one who waits for a transfer.
    pub fn take_io<const R: u8>(&self, token: IoToken, held: &mut Held<'_, R>) -> Option<T> {
        self.take(Waiting::Io(token), held)
    }

    /// Takes out one who waits for memory.
    pub fn take_memory<const R: u8>(&self, held: &mut Held<'_, R>) -> Option<T> {
        self.take(Waiting::Memory, held)
    }

    /// Forgets a guest's vCPUs.
    pub fn forget<const R: u8>(&self, keep: impl Fn(&T) -> bool, held: &mut Held<'_, R>) {
        const { assert!(R < rank::WAITERS) };
        let (mut list, _held) = self.list.lock(held);
        list.retain(|(_, vcpu)| keep(vcpu));
        self.count.store(list.len(), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleepers_wake_when_their_time_has_come_and_not_before() {
        let mut sleepers = Sleepers::new();
        for (deadline, vcpu) in [(30, 'c'), (10, 'a'), (20, 'b')] {
            assert_eq!(sleepers.add(deadline, vcpu), Ok(()));
        }
        assert_eq!((sleepers.next(), sleepers.expired(9)), (Some(10), None));
        assert_eq!(sleepers.expired(10), Some('a'));
        assert_eq!(sleepers.add(40, 'b'), Ok(()));
        assert_eq!((sleepers.expired(29), sleepers.next()), (None, Some(30)));
    }

    #[test]
    fn all_who_wait_for_a_transfer_are_found_and_nobody_else() {
        let (waiters, mut held) = (Waiters::new(), Held::root());
        let (one, two) = (IoToken(1), IoToken(2));
        for (what, vcpu) in [(Waiting::Io(one), 'a'), (Waiting::Io(two), 'b'), (Waiting::Io(one), 'c')] {
            waiters.add(what, &vcpu, &mut held);
        }
        waiters.add(Waiting::Memory, &'b', &mut held);
        let mut found = [waiters.take_io(one, &mut held), waiters.take_io(one, &mut held)];
        found.sort_unstable();
        assert_eq!(found, [Some('a'), Some('c')]);
        assert_eq!((waiters.take_io(one, &mut held), waiters.take_io(two, &mut held)), (None, None));
        assert_eq!(waiters.take_memory(&mut held), Some('b'));
    }
}
