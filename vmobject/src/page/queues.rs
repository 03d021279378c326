//! The page queues: doubly linked lists through the frame array, by index.
//!
//! A list is two ends and a length; the links are in the pages. Everything here is O(1). Pages that a
//! transfer has, tables and wired pages are on no queue. Called by `page` only, under the queue lock.

use core::sync::atomic::Ordering::Relaxed;

use super::{NIL, Owner, VmPage};

/// Which list a page is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Queue {
    /// None: busy, wired, a table, or not memory.
    None = 0,
    /// Nobody's.
    Free = 1,
    /// In use.
    Active = 2,
    /// Not used lately: next to go.
    Inactive = 3,
    /// Waiting to be written out.
    Laundry = 4,
}

impl Queue {
    pub(super) const fn from_bits(bits: u8) -> Self {
        match bits {
            1 => Self::Free,
            2 => Self::Active,
            3 => Self::Inactive,
            4 => Self::Laundry,
            _ => Self::None,
        }
    }
}

/// How long each queue is, and how many frames hold tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLengths {
    /// Nobody's.
    pub free: u32,
    /// In use.
    pub active: u32,
    /// Not used lately.
    pub inactive: u32,
    /// Waiting to be written out.
    pub laundry: u32,
    /// Translation tables.
    pub tables: u32,
}

#[derive(Clone, Copy)]
struct List {
    first: u32,
    last: u32,
    length: u32,
}

/// The lists.
pub(super) struct Queues {
    lists: [List; 5],
    /// Frames that hold tables.
    pub(super) tables: u32,
}

impl Queues {
    pub(super) const fn new() -> Self {
        Self { lists: [List { first: NIL, last: NIL, length: 0 }; 5], tables: 0 }
    }

    #[inline]
    pub(super) fn length(&self, queue: Queue) -> u32 {
        self.lists[queue as usize].length
    }

    pub(super) fn lengths(&self) -> QueueLengths {
        QueueLengths {
            free: self.length(Queue::Free),
            active: self.length(Queue::Active),
            inactive: self.length(Queue::Inactive),
            laundry: self.length(Queue::Laundry),
            tables: self.tables,
        }
    }

    pub(super) fn push_front(&mut self, pages: &[VmPage], queue: Queue, place: u32) {
        let page = &pages[place as usize];
        page.set_queue(queue);
        let list = &mut self.lists[queue as usize];
        page.prev.store(NIL, Relaxed);
        page.next.store(list.first, Relaxed);
        match pages.get(list.first as usize) {
            Some(first) => first.prev.store(place, Relaxed),
            None => list.last = place,
        }
        list.first = place;
        list.length += 1;
    }

    #[inline]
    pub(super) fn push_back(&mut self, pages: &[VmPage], queue: Queue, place: u32) {
        let page = &pages[place as usize];
        page.set_queue(queue);
        if queue == Queue::None {
            return;
        }
        let list = &mut self.lists[queue as usize];
        page.next.store(NIL, Relaxed);
        page.prev.store(list.last, Relaxed);
        match pages.get(list.last as usize) {
            Some(last) => last.next.store(place, Relaxed),
            None => list.first = place,
        }
        list.last = place;
        list.length += 1;
    }

    /// The first page of a queue, taken off it.
    #[inline]
    pub(super) fn pop_front(&mut self, pages: &[VmPage], queue: Queue) -> Option<u32> {
        let list = &mut self.lists[queue as usize];
        let place = list.first;
        let page = pages.get(place as usize)?;
        let next = page.next.load(Relaxed);
        list.first = next;
        match pages.get(next as usize) {
            Some(second) => second.prev.store(NIL, Relaxed),
            None => list.last = NIL,
        }
        list.length -= 1;
        page.next.store(NIL, Relaxed);
        page.set_queue(Queue::None);
        Some(place)
    }

    /// Takes a page off whatever queue it is on.
    pub(super) fn unlink(&mut self, pages: &[VmPage], place: u32) {
        let page = &pages[place as usize];
        let queue = page.queue();
        if queue == Queue::None {
            return;
        }
        let list = &mut self.lists[queue as usize];
        let (prev, next) = (page.prev.load(Relaxed), page.next.load(Relaxed));
        match pages.get(prev as usize) {
            Some(before) => before.next.store(next, Relaxed),
            None => list.first = next,
        }
        match pages.get(next as usize) {
            Some(after) => after.prev.store(prev, Relaxed),
            None => list.last = prev,
        }
        list.length -= 1;
        page.next.store(NIL, Relaxed);
        page.prev.store(NIL, Relaxed);
        page.set_queue(Queue::None);
    }

    /// Walks every list both ways: links, marks and lengths agree, and only free pages are on the free
    /// list (P1, P2). The place that is wrong on failure.
    pub(super) fn check(&self, pages: &[VmPage]) -> Result<(), u32> {
        for queue in [Queue::Free, Queue::Active, Queue::Inactive, Queue::Laundry] {
            let list = &self.lists[queue as usize];
            let (mut place, mut before, mut length) = (list.first, NIL, 0);
            while let Some(page) = pages.get(place as usize) {
                let free = page.owner() == Owner::Free;
                let links = page.queue() == queue && page.prev.load(Relaxed) == before;
                length += 1;
                if !links || free != (queue == Queue::Free) || page.is_busy() || length > list.length {
                    return Err(place);
                }
                before = place;
                place = page.next.load(Relaxed);
            }
            if before != list.last || length != list.length {
                return Err(list.last);
            }
        }
        Ok(())
    }
}
