//! Run queues: one for each CPU, first in, first out.
//!
//! A vCPU is in at most one queue, exactly while its state is `Ready`: whoever moved it there pushes it,
//! once. A CPU with nothing to do takes from others, but never a vCPU whose registers are still on
//! another CPU: only that CPU can store them. Room for every vCPU is made when its guest is created, so
//! a push never allocates.

use alloc::collections::{TryReserveError, VecDeque};

use crate::guest::rank;
use vmobject::lock::{Held, Ranked};

/// One CPU's queue.
pub struct RunQueue<T>(Ranked<{ rank::SCHED }, VecDeque<T>>);

impl<T> Default for RunQueue<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> RunQueue<T> {
    /// An empty queue.
    pub const fn new() -> Self {
        Self(Ranked::new(VecDeque::new()))
    }

    /// Makes room for as many as there will be.
    pub fn reserve<const R: u8>(&self, all: usize, held: &mut Held<'_, R>) -> Result<(), TryReserveError> {
        const { assert!(R < rank::SCHED) };
        let (mut queue, _held) = self.0.lock(held);
        let more = all.saturating_sub(queue.len());
        queue.try_reserve(more)
    }

    /// Adds one that has just become ready.
    pub fn push<const R: u8>(&self, entry: T, held: &mut Held<'_, R>) {
        const { assert!(R < rank::SCHED) };
        self.0.lock(held).0.push_back(entry);
    }

    /// Takes the next.
    pub fn pop<const R: u8>(&self, held: &mut Held<'_, R>) -> Option<T> {
        const { assert!(R < rank::SCHED) };
        self.0.lock(held).0.pop_front()
    }

    /// Takes the next that may go to another CPU.
    pub fn steal<const R: u8>(&self, movable: impl Fn(&T) -> bool, held: &mut Held<'_, R>) -> Option<T> {
        const { assert!(R < rank::SCHED) };
        let (mut queue, _held) = self.0.lock(held);
        let place = queue.iter().position(movable)?;
        queue.remove(place)
    }

    /// True when [`Self::steal`] would find one.
    pub fn has<const R: u8>(&self, movable: impl Fn(&T) -> bool, held: &mut Held<'_, R>) -> bool {
        const { assert!(R < rank::SCHED) };
        self.0.lock(held).0.iter().any(movable)
    }

    /// True when nobody waits here.
    pub fn is_empty<const R: u8>(&self, held: &mut Held<'_, R>) -> bool {
        const { assert!(R < rank::SCHED) };
        self.0.lock(held).0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_in_is_the_first_out() {
        let (queue, mut held) = (RunQueue::new(), Held::root());
        for n in 0..3 {
            queue.push(n, &mut held);
        }
        assert_eq!([queue.pop(&mut held), queue.pop(&mut held)], [Some(0), Some(1)]);
        queue.push(3, &mut held);
        assert_eq!([queue.pop(&mut held), queue.pop(&mut held)], [Some(2), Some(3)]);
        assert!(queue.is_empty(&mut held));
    }

    #[test]
    fn what_is_bound_to_its_cpu_is_not_taken_by_another() {
        let (queue, mut held) = (RunQueue::new(), Held::root());
        queue.push(("bound", false), &mut held);
        queue.push(("free", true), &mut held);
        assert_eq!(queue.steal(|entry| entry.1, &mut held), Some(("free", true)));
        assert_eq!(queue.steal(|entry| entry.1, &mut held), None);
        assert_eq!(queue.pop(&mut held), Some(("bound", false)));
    }
}
