//! Shortening chains: merging an object with the only one that shadows it, and passing over one that is
//! hidden (`vm_object_collapse`).
//!
//! Both work on an object, the *top*, and what it shadows, the *backing*, with both locked, and neither
//! walks the chain: every pair that becomes ripe is put on the list by what made it so (a reference that
//! went, a page that came), so one pair that cannot move does not hold up another (D5).
//!
//! *Collapse*, when the top is the backing's only referrer: pages that the top hides are freed, the others
//! come together in one index, whichever side has fewer moving (D9), and the backing ends. After every
//! slot the chain says the same as before. Resident, swapped and zero slots are all alike (D4).
//!
//! *Bypass*, when others refer to the backing too: if the top hides all that the backing has, it shadows
//! what the backing shadows instead. The first page that is not hidden is remembered; until the top gains
//! that page, refusing costs one look (D7).

use super::index::Slot;
use super::work::Progress;
use super::{NOWHERE, Pager, Role, Shadow, State};
use crate::Vm;
use crate::addr::PageIndex;
use crate::defect::Defect;
use crate::limits::MAX_SIBLINGS;
use crate::lock::{Held, OBJECT};
use crate::stats::Event;
use crate::store::Machine;

/// The page after one that is present.
fn after(page: PageIndex) -> PageIndex {
    page.checked_add(1).unwrap_or(page)
}

impl<M: Machine> Vm<M> {
    /// Shortens the chain below a live object as far as it can be.
    pub(super) fn collapse(&self, top: &mut State, left: &mut u32, held: &mut Held<'_, OBJECT>) -> Progress {
        loop {
            let Some(shadow) = top.shadow else { return Progress::Done };
            let (mut backing, mut held) = self.objects.get(shadow.object).write_below(held);
            debug_assert_eq!(backing.id, shadow.object, "a shadow keeps what it shadows (O2)");
            let swapped = top.slots.counts().swapped + backing.slots.counts().swapped > 0;
            if self.has(Defect::CollapseRefusesSwapped) && swapped {
                return Progress::Done;
            }
            let step = if backing.is_sole_anonymous() {
                self.merge(top, &mut backing, shadow, left, &mut held)
            } else {
                self.bypass(top, &mut backing, shadow, left, &mut held)
            };
            match step {
                // The chain is shorter: perhaps what comes next is ripe, too.
                Some(Progress::Done) => {}
                Some(progress) => return progress,
                None => return Progress::Done,
            }
        }
    }

    /// One step of a collapse; `Done` when the backing is gone.
    fn merge(
        &self,
        top: &mut State,
        backing: &mut State,
        shadow: Shadow,
        left: &mut u32,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Progress> {
        // Moving down puts the top's pages where the backing's window is: all of them must fit there. Until it is
        // done they are mapped writable below the top, so nobody else may come to shadow the backing: another
        // that shadows the top could, by passing over it.
        let down = top.slots.counts().present() < backing.slots.counts().present()
            && shadow.limit == top.pages
            && top.paging == 0
            && top.refs == 1;
        let moved = if down {
            self.lower(top, backing, shadow, left, held)
        } else {
            self.raise(top, backing, shadow, left, held)
        };
        if let Some(progress) = moved {
            return Some(progress);
        }
        self.limited.has_grown();
        self.splice(top, backing, shadow, held);
        self.stats.count(Event::Collapsed);
        Some(Progress::Done)
    }

    /// Moves what the backing has in the top's window, and the top has not, up to the top. `None` when
    /// nothing is left there.
    fn raise(
        &self,
        top: &mut State,
        backing: &mut State,
        shadow: Shadow,
        left: &mut u32,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Progress> {
        let bottom = backing.shadow.is_none();
        let end = shadow.offset.checked_add(shadow.limit).unwrap_or(PageIndex::new(u32::MAX));
        let (mut from, mut blocked) = (shadow.offset, false);
        while let Some((page, slot)) = backing.slots.next_present(from..end) {
            from = after(page);
            if *left == 0 {
                return Some(Progress::More);
            }
            *left -= 1;
            self.stats.count(Event::SlotVisited);
            if self.is_busy(slot) {
                blocked = true;
                continue;
            }
            let Some(ours) = page.checked_sub(shadow.offset.number()) else { continue };
            if top.slots.get(ours) != Slot::Absent {
                self.free_slot(slot, held);
                self.stats.count(Event::CollapseFreed);
            } else if slot != Slot::Zero || !bottom {
                if self.objects.gain(top, ours, slot, held).is_err() {
                    return Some(Progress::Blocked);
                }
                self.rename(top, ours, slot);
                self.count_moved(slot);
            }
            backing.lose(page);
        }
        blocked.then_some(Progress::Blocked)
    }

    /// Moves the top's pages down into the backing, over what they hide there, and exchanges the two.
    /// `None` when that is done.
    fn lower(
        &self,
        top: &mut State,
        backing: &mut State,
        shadow: Shadow,
        left: &mut u32,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Progress> {
        let mut blocked = self.trim(backing, shadow, left, held);
        if *left == 0 {
            return Some(Progress::More);
        }
        let bottom = backing.shadow.is_none();
        let mut from = PageIndex::new(0);
        while let Some((page, slot)) = top.slots.next_present(from..PageIndex::new(top.pages)) {
            from = after(page);
            if *left == 0 {
                return Some(Progress::More);
            }
            *left -= 1;
            self.stats.count(Event::SlotVisited);
            let Some(theirs) = shadow.offset.checked_add(page.number()) else { continue };
            let hidden = backing.slots.get(theirs);
            if self.is_busy(slot) || self.is_busy(hidden) {
                blocked = true;
                continue;
            }
            let to = if slot == Slot::Zero && bottom { Slot::Absent } else { slot };
            if self.objects.gain(backing, theirs, to, held).is_err() {
                return Some(Progress::Blocked);
            }
            if hidden != Slot::Absent {
                self.free_slot(hidden, held);
                self.stats.count(Event::CollapseFreed);
            }
            self.rename(backing, theirs, slot);
            top.lose(page);
            self.count_moved(slot);
        }
        // A transfer finds its pages by the object's name.
        let transfers = top.paging > 0 || backing.paging > 0;
        if blocked || transfers || !self.objects.exchange(top, backing, shadow.offset) {
            return Some(Progress::Blocked);
        }
        self.stats.count(Event::CollapseExchanged);
        None
    }

    /// Frees what the backing has outside the top's window, which nobody can reach. True if a transfer
    /// was in the way.
    fn trim(&self, backing: &mut State, shadow: Shadow, left: &mut u32, held: &mut Held<'_, OBJECT>) -> bool {
        let end = shadow.offset.checked_add(shadow.limit).unwrap_or(PageIndex::new(u32::MAX));
        let mut blocked = false;
        for range in [PageIndex::new(0)..shadow.offset, end..PageIndex::new(u32::MAX)] {
            let mut from = range.start;
            while let Some((page, slot)) = backing.slots.next_present(from..range.end) {
                if *left == 0 {
                    return blocked;
                }
                *left -= 1;
                self.stats.count(Event::SlotVisited);
                from = after(page);
                if self.free_slot(slot, held) {
                    backing.lose(page);
                    self.stats.count(Event::CollapseFreed);
                } else {
                    blocked = true;
                }
            }
        }
        blocked
    }

    /// The backing is empty where it matters: the top shadows what it shadowed, and it ends.
    fn splice(&self, top: &mut State, backing: &mut State, shadow: Shadow, held: &mut Held<'_, OBJECT>) {
        self.relink(top, shadow, backing.shadow, held);
        self.inherit(top, backing, held);
        // Our reference to the backing goes; its reference to what is below is ours now, if we need it.
        if top.shadow.is_some() {
            backing.shadow = None;
            self.links.write(held).0.orphan(backing.id.index);
        }
        backing.refs -= 1;
        self.end(backing, held);
        self.ask_shadows(top, held); // its marks for zeros may have gone
        // The referrer that went may have been the last to see what has come up, or what lies below.
        if self.may_hide(top, held) {
            self.objects.ask_prune(top.id.index, held);
        }
        if let Some(below) = top.shadow {
            let (state, mut held) = self.objects.get(below.object).write_below(held);
            if self.may_hide(&state, &mut held) {
                self.objects.ask_prune(below.object.index, &mut held);
            }
        }
    }

    /// The top shadows `below` as seen through `shadow`, from now on; the reverse map with it.
    fn relink(&self, top: &mut State, shadow: Shadow, below: Option<Shadow>, held: &mut Held<'_, OBJECT>) {
        top.shadow = below.and_then(|below| shadow.through(below));
        top.blocked_at = NOWHERE;
        top.trails.clear();
        if top.shadowed {
            self.objects.changed();
        }
        let (mut links, _held) = self.links.write(held);
        links.orphan(top.id.index);
        if let Some(Shadow { object, offset, limit }) = top.shadow {
            links.adopt(top.id.index, object.number(), offset, limit);
        }
    }

    /// Passes over the backing if the top hides all of it. `None`: it does not.
    fn bypass(
        &self,
        top: &mut State,
        backing: &mut State,
        shadow: Shadow,
        left: &mut u32,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Progress> {
        let full = top.slots.counts().present() >= top.pages;
        // What is pushed there is for us, too; what is absent there may be in its store.
        let holds_all = backing.role != Role::Plain || backing.pager != Pager::None;
        if holds_all && !full {
            return self.stop_at_absent(top, left);
        }
        if !full {
            let limit = shadow.limit + u32::from(self.has(Defect::BypassLooksPastTheEnd));
            let end = shadow.offset.checked_add(limit).unwrap_or(PageIndex::new(u32::MAX));
            // What was seen before counts only if nothing came to be there since.
            let known = top.blocked_at != NOWHERE && !top.blocked_all && top.blocked_since == backing.gains;
            let seen = if known { top.blocked_at } else { 0 };
            (top.blocked_since, top.blocked_all) = (backing.gains, false);
            let mut from = shadow.offset.checked_add(seen)?;
            while let Some((page, _)) = backing.slots.next_present(from..end) {
                let ours = page.checked_sub(shadow.offset.number())?;
                if *left == 0 {
                    top.blocked_at = ours.number();
                    return Some(Progress::More);
                }
                *left -= 1;
                self.stats.count(Event::SlotVisited);
                if top.slots.get(ours) == Slot::Absent {
                    top.blocked_at = ours.number();
                    self.stats.count(Event::BypassRefused);
                    return None;
                }
                from = after(page);
            }
        }
        let below = if full { None } else { backing.shadow };
        match below.filter(|&below| shadow.through(below).is_some()) {
            Some(lower) => {
                let (mut lower, mut held) = self.objects.get(lower.object).write_below(held);
                if lower.refs == 1 {
                    // It was to be merged, which would have freed what is hidden.
                    self.objects.ask_prune(lower.id.index, &mut held);
                }
                lower.refs = lower.refs.checked_add(1)?;
                // With its lock: who counts references and shadows finds them equal.
                self.relink(top, shadow, below, &mut held);
            }
            None => self.relink(top, shadow, below, held),
        }
        if backing.copy == Some(top.id) || self.has(Defect::BypassForgetsCopy) {
            backing.copy = None; // another copy of it still receives (D3)
        }
        if top.role != Role::Plain {
            top.role = Role::Plain;
            self.ask_shadows(top, held);
        }
        self.drop_reference(backing, held);
        self.stats.count(Event::Bypassed);
        Some(Progress::Done)
    }

    /// Remembers the first page that an object has not: one below that holds all is not passed over before that comes.
    fn stop_at_absent(&self, top: &mut State, left: &mut u32) -> Option<Progress> {
        let absent = |top: &State, page| top.slots.get(PageIndex::new(page)) == Slot::Absent;
        if top.blocked_at != NOWHERE && absent(top, top.blocked_at) {
            return None;
        }
        let known = top.blocked_at != NOWHERE && top.blocked_all;
        let mut page = if known { top.blocked_at } else { 0 };
        top.blocked_all = true;
        while page < top.pages {
            top.blocked_at = page;
            if *left == 0 {
                return Some(Progress::More);
            }
            *left -= 1;
            self.stats.count(Event::SlotVisited);
            match top.slots.held_from(PageIndex::new(page)) {
                0 => break,
                held => page += held,
            }
        }
        self.stats.count(Event::BypassRefused);
        None
    }

    /// Something that held up those who shadow an object is gone from it, a page or its role: they are looked at
    /// again, a few of them now and the others by and by.
    pub(crate) fn ask_shadows(&self, state: &State, held: &mut Held<'_, OBJECT>) {
        let first = self.links.read(held).0.children(state.id.index).next();
        self.ask_some(state.id.index, first, &mut { MAX_SIBLINGS }, held);
    }

    /// Goes on with that at a shadow, or again at the first one if that shadows something else by now.
    pub(super) fn go_on_asking(
        &self,
        state: &State,
        from: u32,
        left: &mut u32,
        held: &mut Held<'_, OBJECT>,
    ) -> Progress {
        let number = state.id.index;
        let next = {
            let (links, _held) = self.links.read(held);
            let still = links.parent(from).is_some_and(|(parent, ..)| parent == number);
            if still { Some(from) } else { links.children(number).next() }
        };
        if self.ask_some(number, next, left, held) { Progress::Done } else { Progress::More }
    }

    /// Asks a shadow and those after it; false if there are more than `left`, which are asked later.
    fn ask_some(
        &self,
        number: u32,
        mut next: Option<u32>,
        left: &mut u32,
        held: &mut Held<'_, OBJECT>,
    ) -> bool {
        while let Some(child) = next {
            if *left == 0 && self.has(Defect::AsksFewShadows) {
                return true;
            }
            if *left == 0 {
                self.objects.ask_from(number, child, held);
                return false;
            }
            *left -= 1;
            self.objects.chore(child, held);
            next = self.links.read(held).0.next_sibling(child);
        }
        true
    }

    fn count_moved(&self, slot: Slot) {
        self.stats.count(Event::CollapseMoved);
        if matches!(slot, Slot::Swapped(_)) {
            self.stats.count(Event::CollapseSwapped);
        }
    }

    fn is_busy(&self, slot: Slot) -> bool {
        matches!(slot, Slot::Resident(frame) if self.frames.page(frame).is_busy())
    }
}
