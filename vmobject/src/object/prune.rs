//! Freeing what nobody can see: a page of an object that no map has, where every way down from a map
//! ends above it.
//!
//! This is what keeps a family of clones from holding more than copies made at once would (DESIGN 8).
//! Pages to look at come from two sides. A guest that copied a page may have been the last to see it: that
//! page is remembered and looked at soon. And when a referrer goes, whatever all that are left hide can go
//! too: the candidates then are the pages of one way down to a map, the shadow with fewest at every turn,
//! since what is hidden is hidden there as well.
//!
//! Objects are looked at one after the other, never together. That is sound because what is hidden stays
//! hidden: a shadow keeps its slots, and when one takes another's place (collapse, bypass) it hides all
//! that the other hid. Only a shadow that came while we looked could have been missed; the reverse map
//! counts those. Called by `work`, and by a copy that may turn out to be a move.

use super::index::Slot;
use super::table::Resume;
use super::work::Progress;
use super::{Life, Pager, State};
use crate::Vm;
use crate::addr::PageIndex;
use crate::limits::MAX_SIBLINGS;
use crate::lock::{CALLER, Held, OBJECT};
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
    /// True if an object's shadows are all that refers to it.
    fn is_only_shadowed(&self, state: &State, held: &mut Held<'_, OBJECT>) -> bool {
        let (children, mappings) = self.links.read(held).0.counts(state.id.index);
        state.life == Life::Live && mappings == 0 && children > 0 && children == state.refs
    }

    /// Frees what is hidden in an object that has lost a referrer, from where the last call stopped. Each call
    /// looks at one candidate at least, however small the budget: so the look comes to its end.
    pub(super) fn prune(
        &self,
        number: u32,
        mut resume: Resume,
        left: &mut u32,
        held: &mut Held<'_, CALLER>,
    ) -> Progress {
        let Some(object) = self.objects.at(number) else { return Progress::Done };
        let below = {
            let (state, mut held) = object.read(held);
            if !self.is_only_shadowed(&state, &mut held) {
                return Progress::Done;
            }
            state.shadow
        };
        // What the referrer saw further down may be hidden now, too.
        if let (Some(below), None) = (below, resume) {
            self.objects.ask_prune(below.object.index, held);
        }
        let (mut here, mut offset, mut limit) = (number, 0, u32::MAX);
        while let Some((child, start, pages)) = self.fewest(here, left, held) {
            offset = if here == number { start } else { offset + start };
            limit = limit.min(pages);
            let mut from = match resume {
                None => PageIndex::new(0),
                Some((at, page)) if at == child => {
                    resume = None;
                    page
                }
                // All of this one's pages were looked at before.
                Some(_) => PageIndex::new(limit),
            };
            while let Some(page) = self.next_page(child, from..PageIndex::new(limit), held) {
                *left = left.saturating_sub(1);
                if let Some(theirs) = page.checked_add(offset) {
                    match self.prune_page(number, theirs, left, held) {
                        Progress::Done => {}
                        again @ (Progress::More | Progress::Blocked) => {
                            self.objects.ask_prune_from(number, child, page, held);
                            return again;
                        }
                    }
                }
                let Some(next) = page.checked_add(1) else { break };
                from = next;
                if *left == 0 {
                    self.objects.ask_prune_from(number, child, from, held);
                    return Progress::More;
                }
            }
            if self.links.read(held).0.counts(child).1 > 0 {
                break;
            }
            here = child;
        }
        if resume.is_some() {
            // The way down is another one now.
            self.objects.ask_prune(number, held);
            return Progress::More;
        }
        Progress::Done
    }

    /// The shadow of an object with the fewest slots, and its window.
    fn fewest(&self, number: u32, left: &mut u32, held: &mut Held<'_, CALLER>) -> Option<(u32, u32, u32)> {
        let mut next = self.links.read(held).0.children(number).next();
        let mut best: Option<(u32, u32)> = None;
        while let Some(child) = next {
            *left = left.saturating_sub(1);
            let present = self.objects.at(child)?.read(held).0.slots.counts().present();
            if best.is_none_or(|(fewest, _)| present < fewest) {
                best = Some((present, child));
            }
            next = self.links.read(held).0.next_sibling(child);
        }
        let (_, child) = best?;
        let (parent, offset, limit) = self.links.read(held).0.parent(child)?;
        (parent == number).then_some((child, offset.number(), limit))
    }

    fn next_page(
        &self,
        number: u32,
        range: core::ops::Range<PageIndex>,
        held: &mut Held<'_, CALLER>,
    ) -> Option<PageIndex> {
        let (state, _held) = self.objects.at(number)?.read(held);
        state.slots.next_present(range).map(|(page, _)| page)
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
        {
            let (state, mut held) = object.read(held);
            if state.slots.get(page) == Slot::Absent || !self.is_only_shadowed(&state, &mut held) {
                return Progress::Done;
            }
        }
        match self.look_above(number, page, version, left, held) {
            Sight::Seen => return Progress::Done,
            Sight::Unsure => return Progress::More,
            Sight::Hidden => {}
        }
        let (mut state, mut held) = object.write(held);
        if self.links.read(&mut held).0.version() != version {
            return Progress::More;
        }
        let slot = state.slots.get(page);
        if slot == Slot::Absent || !self.is_only_shadowed(&state, &mut held) {
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
            if open && !self.is_only_shadowed(&state, &mut held) {
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
