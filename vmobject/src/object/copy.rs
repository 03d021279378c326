//! Asymmetric copies: a copy of an object that goes on being written where it is (`vm_object_copy`).
//!
//! The source keeps its pages, its pager and its depth. A *copy-object* shadows all of it, page for page, and
//! before the source changes a page, the old one is pushed up to it (`fault::push`). Of the copies of one
//! object only the newest receives: an older one is made to shadow the newer one, and what was pushed there is
//! pushed for both. The source names its newest copy but does not refer to it; the name is compared with what
//! is there, so it may go stale (D3).
//!
//! A copy-object is never written except by a push: whoever has one shadows it first. That is what makes it safe
//! to hand out an empty one again (D28), and [`Role`] says it. When it merges with the only one that shadows it,
//! that one becomes its *heir*: it receives, and may be written. Called by `map` and `collapse`. Locks: the
//! older copy, the newer one, the source: each shadows the next.

use core::ops::Range;

use super::{Life, NOWHERE, ObjectId, Pager, Shadow, State};
use crate::addr::PageIndex;
use crate::defect::Defect;
use crate::lock::{Held, OBJECT};
use crate::pmap::Pmap as _;
use crate::rmap::MappingId;
use crate::stats::Event;
use crate::store::Machine;
use crate::{Vm, VmError};

/// Whether an object receives the old pages of what it shadows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It does not: what it shadows does not change, or is not seen to.
    Plain,
    /// It does, and nobody writes to it: a copy-object.
    Copy,
    /// It does, and it may be written: it has taken over from a copy-object.
    Heir,
}

impl State {
    /// True if this object receives what changes in `source`.
    pub(crate) fn receives_from(&self, source: ObjectId) -> bool {
        let shadows = self.shadow.is_some_and(|shadow| shadow.object == source);
        self.life == Life::Live && self.role != Role::Plain && shadows
    }

    /// Which page of ours a page of the object that we shadow is.
    pub(crate) fn page_above(&self, page: PageIndex) -> Option<PageIndex> {
        let shadow = self.shadow?;
        page.checked_sub(shadow.offset.number()).filter(|ours| ours.number() < shadow.limit)
    }
}

impl<M: Machine> Vm<M> {
    /// True if these pages of an object may be changed through another entry than this one, or its store must see it
    /// change: then it can only be copied asymmetrically.
    pub(crate) fn is_written_elsewhere<const OUTER: u8>(
        &self,
        id: ObjectId,
        besides: Option<MappingId>,
        pages: Range<u32>,
        held: &mut Held<'_, OUTER>,
    ) -> bool {
        let (state, mut held) = self.objects.get(id).read(held);
        match state.pager {
            Pager::Disk(_) => true,
            Pager::Image(_) | Pager::Device(_) => false,
            Pager::None => self.links.read(&mut held).0.is_written(id.index, besides, pages),
        }
    }

    /// A copy of an object as it is now, with one reference. It takes as long as there are entries over the
    /// object. The caller's reference keeps the source.
    pub(crate) fn copy_object<const OUTER: u8>(
        &self,
        source: ObjectId,
        held: &mut Held<'_, OUTER>,
    ) -> Result<ObjectId, VmError> {
        let (pages, newest) = {
            let (state, _held) = self.objects.get(source).read(held);
            (state.pages, state.copy)
        };
        if let Some(newest) = newest
            && self.share_copy(source, newest, held)?
        {
            return Ok(newest);
        }
        let new = self.make_object(pages, Pager::None, None, held)?;
        // The older copy may go, or a newer one come, until all are locked.
        while !self.insert_copy(source, new, held) {}
        self.stats.count(Event::CopyMade);
        Ok(new)
    }

    /// One more reference to a copy-object to which nothing was pushed yet; false if it is not such a one.
    fn share_copy<const OUTER: u8>(
        &self,
        source: ObjectId,
        copy: ObjectId,
        held: &mut Held<'_, OUTER>,
    ) -> Result<bool, VmError> {
        let (mut state, mut held) = self.objects.get(copy).write(held);
        let empty = state.slots.counts().is_empty() && state.role == Role::Copy;
        if state.id != copy || !state.receives_from(source) || !empty {
            return Ok(false);
        }
        state.refs = state.refs.checked_add(1).ok_or(VmError::Limit("references"))?;
        let (source, mut held) = self.objects.get(source).write_below(&mut held);
        // What was pushed and has left the copy since may be written to in place.
        self.guard(&source, &mut held);
        self.stats.count(Event::CopyShared);
        Ok(true)
    }

    /// Puts a new object between a source and its newest copy; false if that has changed meanwhile.
    fn insert_copy<const OUTER: u8>(
        &self,
        source: ObjectId,
        new: ObjectId,
        held: &mut Held<'_, OUTER>,
    ) -> bool {
        let newest = self.objects.get(source).read(held).0.copy;
        let Some(newest) = newest else {
            let (mut new, mut held) = self.objects.get(new).write(held);
            return self.attach_copy(source, None, None, &mut new, &mut held);
        };
        {
            let (mut old, mut held) = self.objects.get(newest).write(held);
            if old.id == newest && old.receives_from(source) {
                let (mut new, mut held) = self.objects.get(new).write_below(&mut held);
                return self.attach_copy(source, Some(newest), Some(&mut old), &mut new, &mut held);
            }
        }
        // Only what receives is above the source, and may be locked before it: a stale name may be anything's.
        self.forget_copy(source, newest, held);
        false
    }

    /// A source's name for its copy is stale.
    pub(crate) fn forget_copy<const OUTER: u8>(
        &self,
        source: ObjectId,
        stale: ObjectId,
        held: &mut Held<'_, OUTER>,
    ) {
        let (mut state, mut held) = self.objects.get(source).write(held);
        let receives = match self.objects.get(stale).try_read_beside(&mut held) {
            // Who found it stale may be late: another copy that came in between may be gone again.
            Some(copy) => copy.id == stale && copy.receives_from(source),
            None => true, // perhaps: whoever asked looks again
        };
        if state.copy == Some(stale) && (!receives || self.has(Defect::ForgetsALiveCopy)) {
            state.copy = None;
        }
    }

    fn attach_copy(
        &self,
        source: ObjectId,
        newest: Option<ObjectId>,
        mut old: Option<&mut State>,
        new: &mut State,
        held: &mut Held<'_, OBJECT>,
    ) -> bool {
        let (mut source, mut held) = self.objects.get(source).write_below(held);
        if source.copy != newest {
            return false;
        }
        (source.shadowed, new.shadowed) = (true, old.is_some());
        self.objects.changed();
        let whole = Shadow { object: source.id, offset: PageIndex::new(0), limit: source.pages };
        (new.shadow, new.role, source.copy) = (Some(whole), Role::Copy, Some(new.id));
        {
            let (mut links, _held) = self.links.write(&mut held);
            links.adopt(new.id.index, source.id.index, whole.offset, whole.limit);
            if let Some((old, shadow)) = old.as_mut().and_then(|old| old.shadow.map(|shadow| (old, shadow))) {
                old.shadow = Some(Shadow { object: new.id, ..shadow });
                old.role = Role::Plain;
                old.blocked_at = NOWHERE; // that was about another object
                links.orphan(old.id.index);
                links.adopt(old.id.index, new.id.index, shadow.offset, shadow.limit);
                new.refs += 1; // the older copy's reference to the source is the newer one's now
            } else {
                source.refs += 1;
            }
        }
        if let Some(old) = old {
            self.ask_shadows(old, &mut held);
        }
        self.guard(&source, &mut held);
        true
    }

    /// Whoever writes to an object faults first.
    fn guard(&self, source: &State, held: &mut Held<'_, OBJECT>) {
        let (links, mut held) = self.links.read(held);
        for map in links.holders(source.id.index).filter_map(alloc::sync::Weak::upgrade) {
            let parked = map.pmap.lock(&mut held).0.park();
            self.stats.add(Event::EntryParked, parked.into());
        }
    }

    /// True if a page of an object must be pushed before it changes. The object is locked, and the copy is
    /// only looked at: if somebody has it, it may be so.
    #[cold]
    pub(crate) fn is_guarded(&self, source: &State, page: PageIndex, held: &mut Held<'_, OBJECT>) -> bool {
        let Some(copy) = source.copy.filter(|_| !self.has(Defect::NothingIsPushed)) else { return false };
        let Some(state) = self.objects.get(copy).try_read_beside(held) else { return true };
        if state.id != copy || !state.receives_from(source.id) {
            return true; // a stale name: who pushes forgets it
        }
        state.page_above(page).is_some_and(|ours| state.slots.get(ours) == super::index::Slot::Absent)
    }

    /// The heir of a copy-object takes its place, both being locked.
    pub(super) fn inherit(&self, heir: &mut State, copy: &State, held: &mut Held<'_, OBJECT>) {
        heir.role = Role::Plain;
        let Some(shadow) = heir.shadow.filter(|_| copy.role != Role::Plain) else { return };
        let (mut source, _held) = self.objects.get(shadow.object).write_below(held);
        if source.copy == Some(copy.id) {
            source.copy = Some(heir.id);
            (heir.role, heir.shadowed) = (Role::Heir, true);
        }
    }
}
