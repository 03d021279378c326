//! The object cache: objects with a store that nobody refers to any more are kept, with their pages
//! (`vm_object_cache_trim`, `vm_object_cache_clear`, `vm_object_deactivate_pages`).
//!
//! The next guest from the same image finds its pages resident. What the cache keeps is bounded in frames, not
//! in objects (D20), and the object that is longest unused goes first. A cached object is live and has no
//! references; its pages are on the inactive queue, so memory that runs short takes them before what guests use,
//! and changed ones are written back. Called by `shadow` and `work`.

use core::sync::atomic::Ordering::Relaxed;

use super::index::Slot;
use super::work::Progress;
use super::{Life, ObjectId, Pager, State};
use crate::Vm;
use crate::addr::PageIndex;
use crate::lock::{CALLER, Held, OBJECT};
use crate::page::Queue;
use crate::store::{Machine, StoreId};

/// How far it got to write back what changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    /// Everything is on its way or was before.
    All,
    /// Not all, for want of budget.
    Budget,
    /// Not all, for want of a frame.
    Memory,
    /// The store takes nothing more now.
    Store,
}

impl<M: Machine> Vm<M> {
    /// How many frames the objects that nobody refers to may keep; none at first.
    pub fn set_cache_limit<const OUTER: u8>(&self, frames: u32, held: &mut Held<'_, OUTER>) {
        self.objects.cache_limit.store(frames, Relaxed);
        self.cache_trim(&mut held.deepen());
    }

    /// Ends every object that nobody refers to.
    pub fn cache_clear<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) {
        while let Some(id) = self.objects.cached(0, held) {
            self.evict_cached(id, &mut held.deepen());
        }
    }

    /// Ends the object of a store that nobody refers to; false while there is one. For a store whose contents are
    /// about to change.
    pub fn forget_store<const OUTER: u8>(&self, store: StoreId, held: &mut Held<'_, OUTER>) -> bool {
        if let Ok(Some(id)) = self.objects.find_image(store, held) {
            self.evict_cached(id, &mut held.deepen());
            let (state, mut held) = self.objects.get(id).read(held);
            // It goes by and by, and by another name: it has nothing that its store still wants of it.
            if state.id == id && state.life == Life::Dying && matches!(state.pager, Pager::Image(_)) {
                self.objects.unregister(store, id, &mut held);
            }
        }
        matches!(self.objects.find_image(store, held), Ok(None))
    }

    /// Keeps an object that has just lost its last reference, if it has an identity and there is a cache.
    pub(super) fn retire(&self, state: &mut State, held: &mut Held<'_, OBJECT>) -> bool {
        let wanted = state.pager.store().is_some() && self.objects.cache_limit.load(Relaxed) > 0;
        let kept = wanted && self.objects.cache(state.id, held);
        if kept {
            (state.deactivated, state.sent) = (0, 0);
            self.objects.chore(state.id.index, held);
        }
        kept
    }

    /// Moves the pages of an object in the cache to the inactive queue, and writes back what changed.
    pub(super) fn cool(&self, state: &mut State, left: &mut u32, held: &mut Held<'_, OBJECT>) -> Progress {
        let end = PageIndex::new(state.pages);
        while let Some((page, slot)) = state.slots.next_present(PageIndex::new(state.deactivated)..end) {
            if *left == 0 {
                return Progress::More;
            }
            *left -= 1;
            if let Slot::Resident(frame) = slot
                && !self.frames.page(frame).is_busy()
            {
                self.frames.page(frame).take_accessed();
                self.frames.enqueue(frame, Queue::Inactive, held);
            }
            state.deactivated = page.number() + 1;
        }
        if !matches!(state.pager, Pager::Disk(_)) {
            return Progress::Done;
        }
        match self.send_last(state, left, held) {
            Put::All => Progress::Done,
            Put::Budget => Progress::More,
            Put::Memory | Put::Store => Progress::Blocked,
        }
    }

    /// Goes on sending what changed of an object without references to its store.
    pub(super) fn send_last(&self, state: &mut State, left: &mut u32, held: &mut Held<'_, OBJECT>) -> Put {
        let (mut next, end) = (state.sent, state.pages);
        let put = self.put_dirty(state, &mut next, end, left, held);
        state.sent = next;
        put
    }

    /// Ends the objects that are longest unused until the others have no more frames than the cache may.
    pub(super) fn cache_trim(&self, held: &mut Held<'_, CALLER>) {
        loop {
            let (mut frames, mut nth) = (0u32, 0);
            while let Some(id) = self.objects.cached(nth, held) {
                let resident = self.objects.get(id).read(held).0.slots.counts().resident;
                frames = frames.saturating_add(resident);
                nth += 1;
            }
            let limit = self.objects.cache_limit.load(Relaxed);
            let Some(oldest) = self.objects.cached(0, held).filter(|_| frames > limit || limit == 0) else {
                return;
            };
            self.evict_cached(oldest, held);
        }
    }

    /// Ends an object of the cache, unless somebody has come to refer to it.
    fn evict_cached(&self, id: ObjectId, held: &mut Held<'_, CALLER>) {
        let (mut state, mut held) = self.objects.get(id).write(held);
        self.objects.uncache(id, &mut held);
        if state.id == id && state.life == Life::Live && state.refs == 0 {
            self.end(&mut state, &mut held);
        }
    }
}
