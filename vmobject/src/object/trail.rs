//! Trails: shortcuts down a long shadow chain, for one chunk of an object at a time (DESIGN 8).
//!
//! A fault that has to pass many objects has a trail laid for its chunk of 2 MiB: a walk down the chain, which notes
//! for each page of the chunk in which stretch of [`TRAIL_STRIDE`] objects it is found first. A later look goes there at
//! once: what nobody holds costs nothing, and what one of *n* generations holds costs at most a stretch, and before it
//! as much again to come to a generation that has a trail: a bound that does not grow with *n*. A walk that comes
//! to an object with a trail for the same chunk takes over what that one knows: so in a history that grows by a few pages a
//! generation, each object is walked by for a chunk about once, however long the history.
//!
//! A walk is done in parts, with guests and interrupts in between (invariant I6): until it is done a look that needs
//! the rest asks for the next part.
//!
//! A trail is valid while no object that others shadow gains a page or comes to shadow something else: each such
//! event raises one version (`Objects::changed`). A page that went away meanwhile is looked for from where it
//! was. Trails are a cache: [`MAX_TRAILS`] are kept, and the one that was laid first goes first. Called by `fault`.
//! Locks: the object that has the trail, then those below it, hand over hand; the registry.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::{Life, ObjectId, Pager, Role, Shadow, State};
use crate::addr::{CHUNK_PAGES, PageIndex};
use crate::defect::Defect;
use crate::limits::{CHUNK_TRAILS, TRAIL_PART, TRAIL_STRIDE};
use crate::lock::Held;
use crate::stats::Event;
use crate::store::Machine;
use crate::{Vm, VmError};

const PAGES: usize = CHUNK_PAGES as usize;
const WORDS: usize = PAGES / 64;

/// A stretch of a chain.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    /// Its first object.
    object: ObjectId,
    /// How far that one's pages are shifted.
    shift: u32,
}

/// What a walk has still before it.
#[derive(Clone, Copy, Debug)]
struct Rest {
    /// The next object, and how far its pages are shifted.
    at: Stretch,
    /// How many pages of the chunk can be seen there.
    visible: u32,
}

impl Rest {
    /// What lies below an object at which the chunk whose first page is `first` is shifted by `shift`.
    fn below(shadow: Shadow, first: i64, shift: u32, visible: u32) -> Option<Self> {
        let visible = visible.min(before(shadow.limit, first + i64::from(shift)));
        let shift = shift.checked_add(shadow.offset.number())?;
        (visible > 0).then_some(Self { at: Stretch { object: shadow.object, shift }, visible })
    }
}

/// Where the pages of a chunk are.
#[derive(Debug)]
struct Trail {
    /// Of the index of slots, so that the chunk is one of the guest's addresses too.
    chunk: u32,
    /// The object's page at the chunk's first place; less than none if the object begins later.
    first: i64,
    version: u64,
    /// The pages that are known to be somewhere.
    known: [u64; WORDS],
    /// In which stretch each of them is found first.
    of: Vec<u16>,
    /// Each has a page that none before it has; so there are at most as many as the chunk has pages.
    stretches: Vec<Stretch>,
    /// Where the walk goes on, if it is not done.
    rest: Option<Rest>,
    /// It leads by a copy-object, below which somebody may be writing.
    by_copy: bool,
}

/// The trails of one object, by chunk, one or none in each place; two chunks may want the same.
#[derive(Debug, Default)]
pub(crate) struct Trails(Vec<Box<[Trail]>>);

/// Where a look goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    /// At this page of this object; true if that is past a copy-object.
    To(ObjectId, PageIndex, bool),
    /// Nowhere: nobody below has the page.
    Nothing,
    /// That is not known yet.
    Unlaid,
}

/// Which neighbours of a page are where a hop from it leads.
pub(crate) struct Beside {
    /// How far the page is into the 64 that this is about.
    pub(crate) into_window: u32,
    /// A bit for each of them, that of the first lowest.
    pub(crate) pages: u64,
    /// Every page of the chunk is there, and is seen from here.
    pub(crate) all: bool,
}

impl Trail {
    /// A walk that begins.
    fn begin(chunk: u32, version: u64, state: &State) -> Result<Self, VmError> {
        let mut of = Vec::new();
        of.try_reserve_exact(PAGES).map_err(|_| VmError::NoMemory)?;
        of.resize(PAGES, 0);
        let first = i64::from(chunk) * i64::from(CHUNK_PAGES) - i64::from(state.slots.base());
        let visible = CHUNK_PAGES.min(before(state.pages, first));
        let rest = state.shadow.and_then(|shadow| Rest::below(shadow, first, 0, visible));
        Ok(Self {
            chunk,
            first,
            version,
            known: [0; WORDS],
            of,
            stretches: Vec::new(),
            rest,
            by_copy: state.role != Role::Plain,
        })
    }

    /// The page of an object at the chunk's first place.
    fn first_at(&self, there: Stretch) -> i64 {
        self.first + i64::from(there.shift)
    }

    /// Notes that a stretch has these pages; those that are known already it does not show.
    fn note(&mut self, word: usize, pages: u64, stretch: u16) {
        let mut new = pages & !self.known[word];
        self.known[word] |= new;
        while new != 0 {
            let page = word * 64 + new.trailing_zeros() as usize;
            new &= new - 1;
            self.of[page] = stretch;
        }
    }

    /// The number of a stretch that has pages of its own.
    fn add(&mut self, stretch: Stretch) -> Result<u16, VmError> {
        let number = u16::try_from(self.stretches.len()).map_err(|_| VmError::NoMemory)?;
        self.stretches.try_reserve(1).map_err(|_| VmError::NoMemory)?;
        self.stretches.push(stretch);
        Ok(number)
    }

    /// Comes by an object, which is part of the stretch that begins at `start` and has that number, if it has one.
    fn pass(
        &mut self,
        here: &State,
        rest: Rest,
        start: Stretch,
        number: &mut Option<u16>,
    ) -> Result<(), VmError> {
        // One with a pager holds all.
        let present =
            if here.pager == Pager::None { present(here, self.first_at(rest.at)) } else { [u64::MAX; WORDS] };
        if present.iter().fold(0, |all, word| all | word) == 0 {
            return Ok(()); // most of a history; an array's `==` looks at it byte by byte
        }
        for (word, present) in present.into_iter().enumerate() {
            let pages = present & seen(word, rest.visible);
            if pages & !self.known[word] != 0 {
                let number = match *number {
                    Some(number) => number,
                    None => *number.insert(self.add(start)?),
                };
                self.note(word, pages, number);
            }
        }
        Ok(())
    }

    /// Takes over what the trail of the object that it came by knows of what lies below.
    fn inherit(&mut self, other: &Self, rest: Rest) -> Result<(), VmError> {
        // One more than the number that a stretch of the other has here.
        let mut numbers = [0; PAGES];
        for word in 0..WORDS {
            let mut new = other.known[word] & !self.known[word] & seen(word, rest.visible);
            self.known[word] |= new;
            while new != 0 {
                let page = word * 64 + new.trailing_zeros() as usize;
                new &= new - 1;
                let theirs = usize::from(other.of[page]);
                if numbers[theirs] == 0 {
                    let Stretch { object, shift } = other.stretches[theirs];
                    let shift = shift.checked_add(rest.at.shift).ok_or(VmError::Range)?;
                    numbers[theirs] = self.add(Stretch { object, shift })? + 1;
                }
                self.of[page] = numbers[theirs] - 1;
            }
        }
        self.by_copy |= other.by_copy;
        self.rest = other.rest.and_then(|theirs| {
            let shift = theirs.at.shift.checked_add(rest.at.shift)?;
            let at = Stretch { object: theirs.at.object, shift };
            Some(Rest { at, visible: theirs.visible.min(rest.visible) })
        });
        Ok(())
    }
}

/// How many pages there are from one on, which may be less than none, to the end.
fn before(end: u32, from: i64) -> u32 {
    u32::try_from((i64::from(end) - from).max(0)).unwrap_or(u32::MAX)
}

/// Which pages of a chunk an object has whose page at the chunk's first place is `first`.
fn present(here: &State, first: i64) -> [u64; WORDS] {
    let mut present = [0; WORDS];
    match u32::try_from(first) {
        Ok(first) => here.slots.present_from(PageIndex::new(first), &mut present),
        // The object begins so many places later.
        Err(_) => {
            let later = usize::try_from(first.unsigned_abs()).unwrap_or(PAGES);
            let mut found = [0; WORDS];
            here.slots.present_from(PageIndex::new(0), &mut found);
            let (words, bits) = (later / 64, later % 64);
            for (word, present) in present.iter_mut().skip(words).enumerate() {
                *present = found[word] << bits;
                if bits > 0 && word > 0 {
                    *present |= found[word - 1] >> (64 - bits);
                }
            }
        }
    }
    present
}

/// Those pages of a word of the chunk that are among the first `visible`.
const fn seen(word: usize, visible: u32) -> u64 {
    match (visible as usize).checked_sub(word * 64) {
        None | Some(0) => 0,
        Some(pages @ 1..64) => (1 << pages) - 1,
        Some(_) => u64::MAX,
    }
}

impl Trails {
    pub(super) const fn new() -> Self {
        Self(Vec::new())
    }

    fn of_chunk(&self, chunk: u32, version: u64) -> Option<&Trail> {
        let place = (chunk as usize).checked_rem(self.0.len())?;
        self.0[place].first().filter(|trail| trail.chunk == chunk && trail.version == version)
    }

    fn hop(&self, page: PageIndex, place: PageIndex, version: u64) -> Option<Hop> {
        let trail = self.of_chunk(place.number() / CHUNK_PAGES, version)?;
        let page_of = (place.number() % CHUNK_PAGES) as usize;
        if trail.known[page_of / 64] & 1 << (page_of % 64) == 0 {
            return Some(if trail.rest.is_some() { Hop::Unlaid } else { Hop::Nothing });
        }
        let stretch = trail.stretches.get(usize::from(trail.of[page_of]))?;
        Some(Hop::To(stretch.object, page.checked_add(stretch.shift)?, trail.by_copy))
    }

    fn beside(&self, place: PageIndex, version: u64) -> Option<Beside> {
        let trail = self.of_chunk(place.number() / CHUNK_PAGES, version)?;
        let page_of = (place.number() % CHUNK_PAGES) as usize;
        let (word, stretch) = (page_of / 64, trail.of[page_of]);
        let there = trail.of[word * 64..][..64].iter().rev();
        let there = there.fold(0, |pages, &of| pages << 1 | u64::from(of == stretch));
        Some(Beside {
            into_window: place.number() % 64,
            pages: there & trail.known[word],
            all: trail.stretches.len() == 1 && trail.known == [u64::MAX; WORDS],
        })
    }

    /// Takes the trail of a chunk away, whatever its version.
    fn take(&mut self, chunk: u32) -> Option<Trail> {
        let place = (chunk as usize).checked_rem(self.0.len())?;
        self.0[place].first().filter(|trail| trail.chunk == chunk)?;
        core::mem::take(&mut self.0[place]).into_vec().pop()
    }

    /// True if where the trail of a chunk belongs another of this version is being laid.
    fn has_half_laid(&self, chunk: u32, version: u64) -> bool {
        let place = (chunk as usize).checked_rem(self.0.len());
        let there = place.and_then(|place| self.0[place].first());
        there.is_some_and(|other| other.version == version && other.rest.is_some())
    }

    fn put(&mut self, trail: Trail, chunks: u32) -> Result<(), VmError> {
        if self.0.is_empty() {
            let places = chunks.clamp(1, CHUNK_TRAILS) as usize;
            self.0.try_reserve_exact(places).map_err(|_| VmError::NoMemory)?;
            self.0.resize_with(places, Box::default);
        }
        let mut one = Vec::new();
        one.try_reserve_exact(1).map_err(|_| VmError::NoMemory)?;
        let place = trail.chunk as usize % self.0.len();
        one.push(trail);
        self.0[place] = one.into_boxed_slice();
        Ok(())
    }

    /// Forgets the trail of a chunk, and with the last one the places for them.
    fn forget(&mut self, chunk: u32) {
        drop(self.take(chunk));
        if self.0.iter().all(|place| place.is_empty()) {
            self.clear();
        }
    }

    /// Forgets them all.
    pub(crate) fn clear(&mut self) {
        self.0 = Vec::new();
    }
}

impl State {
    /// Where to look for a page that the object itself has not, if there is a trail of this version.
    pub(crate) fn hop(&self, page: PageIndex, version: u64) -> Option<Hop> {
        if self.trails.0.is_empty() { None } else { self.trails.hop(page, self.slots.place(page)?, version) }
    }

    /// Which neighbours of a page a hop from it leads to as well.
    pub(crate) fn beside(&self, page: PageIndex, version: u64) -> Option<Beside> {
        self.trails.beside(self.slots.place(page)?, version)
    }
}

impl<M: Machine> Vm<M> {
    /// The version that a trail must have to be used now.
    pub(crate) fn trails_now(&self) -> u64 {
        let version = self.objects.version();
        if self.has(Defect::StaleTrail) { version >> 6 } else { version }
    }

    /// True if an object, locked now, is still the one that a trail of this version led to, and what the trail left out
    /// has gained nothing: it was not locked on the way, so a page may have gone up past us. If the object is another
    /// one, all trails are given up.
    pub(crate) fn has_hopped(&self, here: &State, object: ObjectId, version: u64) -> bool {
        let same = here.id() == object && here.life == Life::Live;
        if !same {
            self.objects.changed();
        }
        same && (self.trails_now() == version || self.has(Defect::HopsBlindly))
    }

    /// Lays a part of a trail for the chunk of a page of an object: the next few objects. True if nobody has changed
    /// the chain since a trail was last laid here: then the look may wait for interrupts, without its vCPU never coming
    /// to its page.
    pub(crate) fn lay_trail<const OUTER: u8>(
        &self,
        object: ObjectId,
        page: PageIndex,
        held: &mut Held<'_, OUTER>,
    ) -> Result<bool, VmError> {
        let version = self.trails_now();
        let (oldest, calm) = {
            let (mut state, mut held) = self.objects.get(object).write(held);
            if state.id != object || state.life != Life::Live {
                return Ok(false);
            }
            let chunk = state.slots.place(page).ok_or(VmError::Range)?.number() / CHUNK_PAGES;
            let taken = state.trails.take(chunk);
            // One that takes another's place needs no more than that had.
            if taken.is_none() && !self.machine.has_room() {
                return Err(VmError::NoMemory);
            }
            let (known, calm, unfinished) = match taken {
                Some(trail) if trail.version == version => (Some(trail), true, false),
                Some(trail) => (None, false, trail.rest.is_some()),
                // Two that want the same place, each a part at a time, would take it from each other for ever.
                None if state.trails.has_half_laid(chunk, version) => (None, false, true),
                None => (None, true, false),
            };
            let begins = known.is_none();
            let mut trail = match known {
                Some(trail) => trail,
                None => {
                    self.stats.count(Event::TrailLaid);
                    Trail::begin(chunk, version, &state)?
                }
            };
            // Whoever keeps changing the chain would keep one that has to begin again from ever being done.
            let left = if !unfinished { TRAIL_PART } else { u32::MAX };
            self.walk(&mut trail, left, &mut held)?;
            let chunks = state.pages.saturating_add(state.slots.base() % CHUNK_PAGES).div_ceil(CHUNK_PAGES);
            state.trails.put(trail, chunks)?;
            let oldest = if begins { self.objects.note_trail(object.index, chunk, &mut held) } else { None };
            (oldest, calm)
        };
        if let Some((number, chunk)) = oldest
            && let Some(object) = self.objects.at(number)
        {
            object.write(held).0.trails.forget(chunk);
        }
        Ok(calm)
    }

    /// Goes on down the chain, past so many objects at most.
    fn walk<const OUTER: u8>(
        &self,
        trail: &mut Trail,
        mut left: u32,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let Some(mut rest) = trail.rest.take() else { return Ok(()) };
        let still = || self.trails_now() == trail.version;
        let Some(mut chain) = self.objects.get(rest.at.object).descend_while(still, held) else {
            return Ok(());
        };
        if !self.has_hopped(chain.here(), rest.at.object, trail.version) {
            return Ok(());
        }
        let (mut length, mut start, mut number) = (0, rest.at, None);
        loop {
            if left == 0 {
                trail.rest = Some(rest);
                return Ok(());
            }
            left -= 1;
            if length == TRAIL_STRIDE {
                (length, start, number) = (0, rest.at, None);
            }
            length += 1;
            let here = chain.here();
            self.stats.count(Event::ChainVisited);
            trail.by_copy |= here.role != Role::Plain;
            trail.pass(here, rest, start, &mut number)?;
            let first = trail.first_at(rest.at);
            let chunk = u32::try_from(first + i64::from(here.slots.base())).ok();
            let chunk =
                chunk.filter(|place| place.is_multiple_of(CHUNK_PAGES)).map(|place| place / CHUNK_PAGES);
            if let Some(known) = chunk.and_then(|chunk| here.trails.of_chunk(chunk, trail.version)) {
                return trail.inherit(known, rest);
            }
            let below = here.shadow.filter(|_| here.pager == Pager::None);
            let below = below.and_then(|below| Rest::below(below, trail.first, rest.at.shift, rest.visible));
            let Some(below) = below else { return Ok(()) };
            rest = below;
            self.objects.get(rest.at.object).step_down(&mut chain);
        }
    }
}
