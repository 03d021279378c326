//! Ways: the objects through which a window of pages is seen, from the top down, and where two ways meet.
//!
//! Two views of the same pages differ only where an object above the meeting has something, in either way: below it
//! both see the same. Whoever compares holds a reference to every object that was come by, so that the pages stay
//! where they are meanwhile: a merge and a move take only what one reference reaches. A bypass may still pass over
//! an object that was come by, which takes nothing from what the others hold. Called by `map`.
//! Locks: one object, and what it shadows.

use alloc::vec::Vec;

use super::{ObjectId, Role, Shadow};
use crate::Vm;
use crate::VmError;
use crate::addr::PageIndex;
use crate::limits::MAX_WAY;
use crate::lock::Held;
use crate::store::Machine;

/// A way down from an object, as far as somebody went; see [`Vm::release_way`].
#[must_use = "it holds references"]
pub(crate) struct Way {
    /// Which window of each object is seen; the first page of all of them is the same address.
    seen: Vec<Shadow>,
    /// Nothing is below the last.
    ended: bool,
}

impl Way {
    /// The windows of the objects above a meeting.
    pub(crate) fn above(&self, meeting: usize) -> impl Iterator<Item = Shadow> {
        self.seen[..meeting].iter().copied()
    }
}

impl<M: Machine> Vm<M> {
    /// A way that begins at an object, which somebody keeps: so many of its pages, from `first` on.
    pub(crate) fn begin_way<const OUTER: u8>(
        &self,
        object: ObjectId,
        first: PageIndex,
        pages: u32,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Way, VmError> {
        let mut seen = Vec::new();
        seen.try_reserve_exact(MAX_WAY).map_err(|_| VmError::NoMemory)?;
        self.add_reference(object, held)?;
        seen.push(Shadow { object, offset: first, limit: pages });
        Ok(Way { seen, ended: false })
    }

    /// Gives back what a way holds.
    pub(crate) fn release_way<const OUTER: u8>(&self, way: Way, held: &mut Held<'_, OUTER>) {
        for seen in way.seen {
            self.unreference(seen.object, held);
        }
    }

    /// How many objects of either way are above their meeting. Where they do not meet: none of `theirs`, and all of
    /// `ours` if that is only one. `None` when that cannot be told: a way is too long, or somebody changes what lies
    /// below a copy-object.
    pub(crate) fn meet<const OUTER: u8>(
        &self,
        ours: &mut Way,
        theirs: &mut Way,
        held: &mut Held<'_, OUTER>,
    ) -> Option<(usize, usize)> {
        // What a guest was made of is below what it wrote, so this is usually found at once.
        let met = self.follow(ours, theirs, held);
        let met = met.or_else(|| self.follow(theirs, ours, held).map(|(theirs, ours)| (ours, theirs)));
        met.or_else(|| (ours.ended && ours.seen.len() == 1).then_some((1, 0)))
    }

    /// Goes down a way until it comes by something of the other: its place in both.
    fn follow<const OUTER: u8>(
        &self,
        way: &mut Way,
        other: &Way,
        held: &mut Held<'_, OUTER>,
    ) -> Option<(usize, usize)> {
        loop {
            let last = *way.seen.last()?;
            if let Some(place) = other.seen.iter().position(|seen| *seen == last) {
                return Some((way.seen.len() - 1, place));
            }
            if way.ended || way.seen.len() == MAX_WAY {
                return None;
            }
            let (state, mut held) = self.objects.get(last.object).read(held);
            if state.role != Role::Plain {
                return None;
            }
            let Some(next) = state.shadow.and_then(|below| last.through(below)) else {
                way.ended = true;
                return None;
            };
            let (mut below, _held) = self.objects.get(next.object).write_below(&mut held);
            below.refs = below.refs.checked_add(1)?;
            way.seen.push(next);
        }
    }
}
