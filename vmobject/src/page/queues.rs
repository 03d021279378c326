//! The page queues: doubly linked lists through the frame array, by index.
//!
//! A list is two ends and a length; the links are in the pages. Everything here is O(1). Pages that a
//! transfer has, tables and wired pages are on no queue. Called by `page` only, under the queue lock.

use core::sync::atomic::Ordering::Relaxed;

use super::runs::Runs;
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
    runs: Runs,
    /// Frames that hold tables.
    pub(super) tables: u32,
}

impl Queues {
    pub(super) const fn new(runs: Runs) -> Self {
        Self { lists: [List { first: NIL, last: NIL, length: 0 }; 5], runs, tables: 0 }
    }

    /// A page becomes free.
    pub(super) fn give(&mut self, pages: &[VmPage], place: u32) {
        self.put_first(pages, place, &pages[place as usize]);
    }

    /// A page that is free no more, and for a queue that [`Self::append`] is told next: the one that is wanted if that
    /// is free.
    #[inline]
    pub(super) fn take<'p>(&mut self, pages: &'p [VmPage], wanted: u32) -> Option<(u32, &'p VmPage)> {
        let list = &mut self.lists[Queue::Free as usize];
        let is_free = |page: &&VmPage| page.queue.load(Relaxed) == Queue::Free as u8;
        let (place, page) = match pages.get(wanted as usize).filter(is_free) {
            Some(page) => (wanted, page),
            None => (list.first, pages.get(list.first as usize)?),
        };
        let (prev, next) = (page.prev.load(Relaxed), page.next.load(Relaxed));
        match pages.get(prev as usize) {
            Some(before) => before.next.store(next, Relaxed),
            None => list.first = next,
        }
        match pages.get(next as usize) {
            Some(after) => after.prev.store(prev, Relaxed),
            None => list.last = prev,
        }
        list.length = list.length.wrapping_sub(1); // there was one
        self.runs.took(place);
        Some((place, page))
    }

    /// The place so far into 2 MiB that are free whole; else none.
    pub(super) fn whole_at(&self, offset: u32) -> u32 {
        self.runs.whole_at(offset).unwrap_or(NIL)
    }

    /// How many aligned 2 MiB are free whole.
    pub(super) fn whole(&self) -> u32 {
        self.runs.whole()
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

    /// Puts a page that is on no queue first among the free.
    #[inline]
    fn put_first(&mut self, pages: &[VmPage], place: u32, page: &VmPage) {
        page.set_queue(Queue::Free);
        let list = &mut self.lists[Queue::Free as usize];
        page.prev.store(NIL, Relaxed);
        page.next.store(list.first, Relaxed);
        match pages.get(list.first as usize) {
            Some(first) => first.prev.store(place, Relaxed),
            None => list.last = place,
        }
        list.first = place;
        debug_assert!((list.length as usize) < pages.len());
        list.length = list.length.wrapping_add(1);
        self.runs.gave(place);
    }

    #[inline]
    pub(super) fn push_back(&mut self, pages: &[VmPage], queue: Queue, place: u32) {
        self.append(pages, queue, place, &pages[place as usize]);
    }

    /// Puts a page that is on no queue at the end of one.
    #[inline]
    pub(super) fn append(&mut self, pages: &[VmPage], queue: Queue, place: u32, page: &VmPage) {
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
        if self.detach(pages, page) {
            page.next.store(NIL, Relaxed);
            page.prev.store(NIL, Relaxed);
            page.set_queue(Queue::None);
        }
    }

    /// An object's page becomes free.
    #[inline]
    pub(super) fn take_back(&mut self, pages: &[VmPage], place: u32, page: &VmPage) {
        self.detach(pages, page);
        self.put_first(pages, place, page);
    }

    /// The same as [`Self::unlink`] for a page that is put on another queue at once: what itself says is left as it is.
    /// False if it is on none.
    #[inline]
    fn detach(&mut self, pages: &[VmPage], page: &VmPage) -> bool {
        let queue = page.queue();
        if queue == Queue::None {
            return false;
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
        debug_assert!(list.length > 0);
        list.length = list.length.wrapping_sub(1);
        true
    }

    /// Walks every list both ways: links, marks and lengths agree, only free pages are on the free
    /// list (P1, P2), and what is counted of them is so. The place that is wrong on failure.
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
        let is_free = |place: u32| pages.get(place as usize).is_some_and(|page| page.queue() == Queue::Free);
        self.runs.check(u32::try_from(pages.len()).unwrap_or(NIL), is_free)
    }
}
