//! Freeing what nobody can see: a page of an object that no map shows, where every way up to a map comes by an object
//! that hides it, or leaves it out.
//!
//! This is what keeps a family of clones from holding more than copies made at once would (DESIGN 8).
//! Pages to look at come from two sides. A guest that copied a page may have been the last to see it: that
//! page is remembered and looked at soon. And when a referrer goes, whatever all that are left hide or leave out can
//! go too: then the whole object is looked through. A page that is hidden is hidden by whatever shadow shows that
//! part of the object, so what one of those has is compared with what the object has, and only pages of both are
//! looked at closely. Each may show another part, and be seen in parts itself: that is found out page by page.
//!
//! Objects are looked at one after the other, never together. That is sound because what is hidden stays
//! hidden: a shadow keeps its slots, and when one takes another's place (collapse, bypass) it hides all
//! that the other hid. Two things can be missed. A shadow that came while we looked: the reverse map counts those. And
//! the very page that hid ours, moved down into its place by a collapse: the object counts what it gains. What a pager has is not pruned: it is a cache, or not written yet. Called by `work`, and by a copy that
//! may turn out to be a move.

use super::index::Slot;
use super::table::Resume;
use super::work::Progress;
use super::{Life, Pager, State};
use crate::Vm;
use crate::addr::PageIndex;
use crate::defect::Defect;
use crate::limits::MAX_SIBLINGS;
use crate::lock::{CALLER, Held, OBJECT};
use crate::rmap::Looker;
use crate::stats::Event;
use crate::store::Machine;

/// Whether anybody sees a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sight {
    Seen,
    Hidden,
    /// The tree of shadows changed during the look.
    Unsure,
}

impl<M: Machine> Vm<M> {
    /// True if something else than shadows shows a page of an object: a map, or whoever has its name.
    fn is_shown(&self, state: &State, page: PageIndex, held: &mut Held<'_, OBJECT>) -> bool {
        let (links, _held) = self.links.read(held);
        let (children, mappings) = links.counts(state.id.index);
        let known = children + mappings == state.refs && state.life == Life::Live;
        !known || (mappings > 0 && links.next_mapping(state.id.index, None, page).is_some())
    }

    /// True if something of an object, or of what is below it, may be hidden: shadows and maps are all that refers to it,
    /// and no map has it whole.
    pub(crate) fn may_hide(&self, state: &State, held: &mut Held<'_, OBJECT>) -> bool {
        let (links, _held) = self.links.read(held);
        let (children, mappings) = links.counts(state.id.index);
        let known = children + mappings == state.refs && state.life == Life::Live;
        known && state.pager == Pager::None && !links.is_mapped_whole(state.id.index, state.pages)
    }

    /// True if an object's shadows are all that refers to it.
    fn is_only_shadowed(&self, state: &State, held: &mut Held<'_, OBJECT>) -> bool {
        let (children, mappings) = self.links.read(held).0.counts(state.id.index);
        state.life == Life::Live && mappings == 0 && children > 0 && children == state.refs
    }

    /// Frees what is hidden in an object that has lost a referrer, from where the last call stopped. Each call
    /// looks at one page at least, however small the budget: so the look comes to its end.
    pub(super) fn prune(
        &self,
        number: u32,
        resume: Resume,
        left: &mut u32,
        held: &mut Held<'_, CALLER>,
    ) -> Progress {
        let Some(object) = self.objects.at(number) else { return Progress::Done };
        {
            let (state, mut held) = object.read(held);
            if !self.may_hide(&state, &mut held) || self.has(Defect::KeepsTheHidden) {
                return Progress::Done;
            }
            // What the referrer saw further down may be hidden now, too.
            if let (Some(below), None) = (state.shadow, resume) {
                self.objects.ask_prune(below.object.index, &mut held);
            }
        }
        let mut next = self.next_page(number, resume.unwrap_or_default(), held);
        while let Some(page) = next {
            *left = left.saturating_sub(1);
            let from = match self.seen_until(number, page, left, held) {
                Some(seen) => Some(seen),
                None => match self.prune_page(number, page, left, held) {
                    Progress::Done => page.checked_add(1),
                    again @ (Progress::More | Progress::Blocked) => {
                        self.objects.ask_prune_from(number, page, held);
                        return again;
                    }
                },
            };
            next = from.and_then(|from| self.next_page(number, from, held));
            if let (Some(page), 0) = (next, *left) {
                self.objects.ask_prune_from(number, page, held);
                return Progress::More;
            }
        }
        Progress::Done
    }

    /// If somebody sees a page of an object on the first way up that is tried: the page from which on that need not
    /// be so any more.
    fn seen_until(
        &self,
        number: u32,
        page: PageIndex,
        left: &mut u32,
        held: &mut Held<'_, CALLER>,
    ) -> Option<PageIndex> {
        // `here`'s page `n` is ours `n + shift`.
        let (mut here, mut shift, mut until) = (number, 0u32, PageIndex::new(u32::MAX));
        loop {
            *left = left.saturating_sub(1); // so that a long way up is the last of its step
            let ours = page.checked_sub(shift)?;
            let known = {
                let (state, mut held) = self.objects.at(here)?.read(held);
                let (children, mappings) = self.links.read(&mut held).0.counts(here);
                children + mappings == state.refs
            };
            if !known {
                return Some(until);
            }
            let looker = self.links.read(held).0.looker(here, ours);
            let mut child = match looker {
                Looker::Map { end } => return Some(until.min(end.checked_add(shift).unwrap_or(until))),
                Looker::Nobody => return None,
                Looker::Shadow(child) => child,
            };
            // One that has few pages is quickly compared.
            let (mut fewest, mut other) = (self.present(child, held)?, Some(child));
            for _ in 1..MAX_SIBLINGS {
                *left = left.saturating_sub(1);
                other = other.and_then(|other| self.links.read(held).0.next_looker(other, ours));
                let Some((sibling, present)) = other.and_then(|it| Some((it, self.present(it, held)?)))
                else {
                    break;
                };
                if present < fewest {
                    (fewest, child) = (present, sibling);
                }
            }
            let (parent, offset, limit) = self.links.read(held).0.parent(child)?;
            let theirs =
                ours.checked_sub(offset.number()).filter(|its| its.number() < limit && parent == here)?;
            shift = shift.checked_add(offset.number())?;
            until = until.min(PageIndex::new(shift.saturating_add(limit)));
            let has = {
                let (state, _held) = self.objects.at(child)?.read(held);
                state.slots.next_present(theirs..PageIndex::new(limit)).map(|(page, _)| page)
            };
            if has == Some(theirs) {
                return None;
            }
            until = until.min(has.and_then(|has| has.checked_add(shift)).unwrap_or(until));
            here = child;
        }
    }

    /// How many slots an object has.
    fn present(&self, number: u32, held: &mut Held<'_, CALLER>) -> Option<u32> {
        Some(self.objects.at(number)?.read(held).0.slots.counts().present())
    }

    /// The first page from `from` on that an object has.
    fn next_page(&self, number: u32, from: PageIndex, held: &mut Held<'_, CALLER>) -> Option<PageIndex> {
        let (state, _held) = self.objects.at(number)?.read(held);
        state.slots.next_present(from..PageIndex::new(state.pages)).map(|(page, _)| page)
    }

    /// Frees one page of an object if nobody sees it.
    pub(super) fn prune_page(
        &self,
        number: u32,
        page: PageIndex,
        left: &mut u32,
        held: &mut Held<'_, CALLER>,
    ) -> Progress {
        let Some(object) = self.objects.at(number) else { return Progress::Done };
        let version = self.links.read(held).0.version();
        let gains = {
            let (state, mut held) = object.read(held);
            let pruned = state.pager == Pager::None && state.slots.get(page) != Slot::Absent;
            if !pruned || self.is_shown(&state, page, &mut held) {
                return Progress::Done;
            }
            state.gains
        };
        match self.look_above(number, page, version, left, held) {
            Sight::Seen => return Progress::Done,
            Sight::Unsure => return Progress::More,
            Sight::Hidden => {}
        }
        let (mut state, mut held) = object.write(held);
        // What hid the page may have come down in its place.
        let came = state.gains != gains && !self.has(Defect::PrunesWhatCameDown);
        if came || self.links.read(&mut held).0.version() != version {
            return Progress::More;
        }
        let slot = state.slots.get(page);
        if slot == Slot::Absent || state.pager != Pager::None || self.is_shown(&state, page, &mut held) {
            return Progress::Done;
        }
        if !self.free_slot(slot, &mut held) {
            return Progress::Blocked;
        }
        if state.lose(page) {
            self.objects.chore(number, &mut held);
        }
        self.ask_shadows(&state, &mut held);
        self.stats.count(Event::Pruned);
        Progress::Done
    }

    /// Looks at all that shadow an object, however indirectly, for somebody who sees a page of it.
    fn look_above(
        &self,
        number: u32,
        page: PageIndex,
        version: u64,
        left: &mut u32,
        held: &mut Held<'_, CALLER>,
    ) -> Sight {
        let (mut here, mut at, mut open) = (number, page, true);
        loop {
            *left = left.saturating_sub(1);
            let next = {
                let (links, _held) = self.links.read(held);
                if links.version() != version {
                    return Sight::Unsure;
                }
                links.next_in_walk(number, here, at, open)
            };
            let Some((child, ours)) = next else { return Sight::Hidden };
            let Some(object) = self.objects.at(child) else { return Sight::Unsure };
            let (state, mut held) = object.read(held);
            open = state.slots.get(ours) == Slot::Absent;
            if open && self.is_shown(&state, ours, &mut held) {
                return Sight::Seen;
            }
            (here, at) = (child, ours);
        }
    }

    /// True if all other shadows of `below`, which is locked for reading beside `top`, hide a page of it:
    /// then it is the top's alone. A sibling that somebody has counts as seeing it, and so does one that
    /// hides it only through its own shadows.
    pub(crate) fn is_last_to_see(
        &self,
        top: &State,
        below: &State,
        page: PageIndex,
        held: &mut Held<'_, OBJECT>,
    ) -> bool {
        if below.refs > MAX_SIBLINGS || below.pager != Pager::None || !self.is_only_shadowed(below, held) {
            return false;
        }
        let mut next = self.links.read(held).0.children(below.id.index).next();
        while let Some(child) = next {
            let Some(object) = self.objects.at(child) else { return false };
            let (window, after) = {
                let (links, _held) = self.links.read(held);
                (links.parent(child), links.next_sibling(child))
            };
            let Some((_, offset, limit)) = window.filter(|w| w.0 == below.id.index) else { return false };
            let ours = page.checked_sub(offset.number()).filter(|ours| ours.number() < limit);
            if let (true, Some(ours)) = (child != top.id.index, ours) {
                let hidden = object.try_read_beside(held).is_some_and(|s| s.slots.get(ours) != Slot::Absent);
                if !hidden {
                    return false;
                }
            }
            next = after;
        }
        true
    }

    /// The version of the tree of shadows, if an object's shadows are all that refers to it.
    pub(crate) fn only_shadowed_at(&self, state: &State, held: &mut Held<'_, OBJECT>) -> Option<u64> {
        let version = self.links.read(held).0.version();
        self.is_only_shadowed(state, held).then_some(version)
    }
}
