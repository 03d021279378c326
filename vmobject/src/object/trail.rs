//! Trails: shortcuts down a long shadow chain, for one chunk of an object at a time (DESIGN 8).
//!
//! A fault that has to pass many objects has a trail laid for its chunk of 2 MiB: one walk down the whole chain,
//! which notes for every stretch of [`TRAIL_STRIDE`] objects where it begins and which pages of the chunk any of
//! them holds. A later look hops over all stretches that do not hold its page: what nobody holds costs nothing,
//! and what one of *n* generations holds costs at most a stretch, and before it as much again to come to a
//! generation that has a trail: a bound that does not grow with *n*.
//! Stretches that hold nothing are not noted, so a trail has at most as many as the chunk has pages, and one.
//!
//! A trail is valid while no object that others shadow gains a page or comes to shadow something else: each such
//! event raises one version (`Objects::changed`). A page that went away meanwhile is looked for from where it
//! was. Called by `fault`. Locks: the object that has the trail, then those below it, hand over hand.

use alloc::vec::Vec;

use super::{Life, ObjectId, Pager, State};
use crate::addr::{CHUNK_PAGES, PageIndex};
use crate::defect::Defect;
use crate::limits::{MAX_TRAILS, TRAIL_STRIDE};
use crate::lock::Held;
use crate::stats::Event;
use crate::store::Machine;
use crate::{Vm, VmError};

const WORDS: usize = CHUNK_PAGES as usize / 64;

/// A stretch of a chain.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    /// Its first object.
    object: ObjectId,
    /// How far that one's pages are shifted.
    shift: u32,
    /// Which pages of the chunk any of its objects holds.
    holds: [u64; WORDS],
}

#[derive(Debug)]
struct Trail {
    chunk: u32,
    version: u64,
    stretches: Vec<Stretch>,
}

/// The trails of one object, by chunk; two chunks may want the same place.
#[derive(Debug, Default)]
pub(crate) struct Trails(Vec<Option<Trail>>);

/// Where a look goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    /// At this page of this object.
    To(ObjectId, PageIndex),
    /// Nowhere: nobody below has the page.
    Nothing,
}

impl Trails {
    pub(super) const fn new() -> Self {
        Self(Vec::new())
    }

    /// Where to look for a page that the object itself has not, if there is a trail of this version.
    pub(crate) fn hop(&self, page: PageIndex, version: u64) -> Option<Hop> {
        let (chunk, bit) = (page.number() / CHUNK_PAGES, page.number() % CHUNK_PAGES);
        let place = (chunk as usize).checked_rem(self.0.len())?;
        let trail = self.0[place].as_ref().filter(|t| t.chunk == chunk && t.version == version)?;
        let holds = |stretch: &&Stretch| stretch.holds[bit as usize / 64] & 1 << (bit % 64) != 0;
        let Some(stretch) = trail.stretches.iter().find(holds) else { return Some(Hop::Nothing) };
        Some(Hop::To(stretch.object, page.checked_add(stretch.shift)?))
    }

    fn put(&mut self, trail: Trail, chunks: u32) -> Result<(), VmError> {
        if self.0.is_empty() {
            let places = chunks.clamp(1, MAX_TRAILS) as usize;
            self.0.try_reserve_exact(places).map_err(|_| VmError::NoMemory)?;
            self.0.resize_with(places, || None);
        }
        let place = trail.chunk as usize % self.0.len();
        self.0[place] = Some(trail);
        Ok(())
    }

    /// Forgets them all.
    pub(super) fn clear(&mut self) {
        self.0 = Vec::new();
    }
}

impl<M: Machine> Vm<M> {
    /// The version that a trail must have to be used now.
    pub(crate) fn trails_now(&self) -> u64 {
        let version = self.objects.version();
        if self.has(Defect::StaleTrail) { version >> 6 } else { version }
    }

    /// Lays a trail for the chunk of a page of an object. It looks at every object of the chain once.
    pub(crate) fn lay_trail<const OUTER: u8>(
        &self,
        object: ObjectId,
        page: PageIndex,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let version = self.trails_now();
        let (mut state, mut held) = self.objects.get(object).write(held);
        if state.id != object || state.life != Life::Live {
            return Ok(());
        }
        let chunk = page.number() / CHUNK_PAGES;
        let base = chunk * CHUNK_PAGES;
        let mut stretches: Vec<Stretch> = Vec::new();
        let mut visible = CHUNK_PAGES.min(state.pages.saturating_sub(base));
        if let Some(shadow) = state.shadow {
            let (mut next, mut shift, mut limit) = (shadow, 0u32, shadow.limit);
            let mut chain = self.objects.get(shadow.object).descend(&mut held);
            let mut length = 0;
            loop {
                visible = visible.min(limit.saturating_sub(base.saturating_add(shift)));
                let Some(shifted) = shift.checked_add(next.offset.number()).filter(|_| visible > 0) else {
                    break;
                };
                shift = shifted;
                let here = chain.here();
                self.stats.count(Event::ChainVisited);
                length += 1;
                if length == 1 || length > TRAIL_STRIDE {
                    length = 1;
                    stretches.pop_if(|last| last.holds == [0; WORDS]);
                    stretches.try_reserve(1).map_err(|_| VmError::NoMemory)?;
                    stretches.push(Stretch { object: here.id, shift, holds: [0; WORDS] });
                }
                let Some(stretch) = stretches.last_mut() else { break };
                let first = base.saturating_add(shift);
                hold(here, first..first.saturating_add(visible), &mut stretch.holds);
                let Some(below) = here.shadow.filter(|_| here.pager == Pager::None) else { break };
                (next, limit) = (below, below.limit);
                self.objects.get(below.object).step_down(&mut chain);
            }
        }
        let chunks = state.pages.div_ceil(CHUNK_PAGES);
        state.trails.put(Trail { chunk, version, stretches }, chunks)?;
        self.stats.count(Event::TrailLaid);
        Ok(())
    }
}

/// Notes which pages of a range an object holds; one with a pager holds all.
fn hold(state: &State, range: core::ops::Range<u32>, holds: &mut [u64; WORDS]) {
    let mut present = [u64::MAX; WORDS];
    if state.pager == Pager::None {
        present = [0; WORDS];
        state.slots.present_from(PageIndex::new(range.start), &mut present);
    }
    for ((holds, present), first) in holds.iter_mut().zip(present).zip(range.clone().step_by(64)) {
        let wanted = u64::MAX >> (64 - (range.end - first).min(64));
        *holds |= present & wanted;
    }
}
