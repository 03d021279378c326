//! What must be so at rest: when no transfer is under way and [`Vm::step`] has nothing more to do.
//!
//! Between two steps a chain may be longer than it has to be, and a page may be kept that nobody sees. Once all
//! chores are done neither may be (DESIGN 8): else memory would leak away with every generation of clones.

use super::{Violation, broken};
use crate::Vm;
use crate::addr::PageIndex;
use crate::lock::Held;
use crate::object::index::Slot;
use crate::object::{Life, Pager, Role, Shadow};
use crate::store::Machine;

impl<M: Machine> Vm<M> {
    /// Looks at every link between two objects, and at every page of anonymous memory.
    ///
    /// R3. No anonymous object has a shadow for its only referrer: the two would be one.
    /// R4. No object shadows an anonymous one all of whose pages it hides: it would shadow what is below that. Neither
    ///     may take part in an asymmetric copy: there pages are still to come.
    /// R5. No object is dead.
    /// R6. Somebody sees each page that anonymous memory has in a frame or in swap: a map shows it, or shadows do not
    ///     all hide it. (A mark for zeros that nobody sees any more may stay; it has neither.)
    pub fn check_at_rest<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> Result<(), Violation> {
        for number in 0..self.objects.used(held) {
            let Some(object) = self.objects.at(number) else { continue };
            if let Some(page) = self.unseen_page(number, held) {
                return broken("R6", "a page is kept that nobody sees", number, page.number());
            }
            let (top, mut held) = object.read(held);
            if top.life == Life::Dying {
                return broken("R5", "an object is dead and still there", number, 0u32);
            }
            let Some(shadow) = top.shadow.filter(|_| top.life == Life::Live) else { continue };
            let Some(below) = self.objects.get(shadow.object).try_read_beside(&mut held) else { continue };
            if below.is_sole_anonymous() {
                return broken("R3", "what one object shadows alone is not part of it", number, below.refs);
            }
            let Shadow { offset, limit, .. } = shadow;
            let end = offset.checked_add(limit).unwrap_or(PageIndex::new(u32::MAX));
            let mut pages = core::iter::successors(below.slots.next_present(offset..end), |(page, _)| {
                below.slots.next_present(page.checked_add(1)?..end)
            });
            let shows = pages.any(|(page, _)| {
                let ours = page.checked_sub(offset.number());
                ours.is_some_and(|ours| top.slots.get(ours) == Slot::Absent)
            });
            let plain = top.role == Role::Plain && below.role == Role::Plain;
            if !shows && plain && below.pager == Pager::None {
                return broken("R4", "an object shadows one that it hides", number, shadow.object.number());
            }
        }
        Ok(())
    }

    /// The first page of an object that nobody sees.
    fn unseen_page<const OUTER: u8>(&self, number: u32, held: &mut Held<'_, OUTER>) -> Option<PageIndex> {
        let mut from = PageIndex::new(0);
        loop {
            let (page, slot) = {
                let (state, _held) = self.objects.at(number)?.read(held);
                let anonymous = state.pager == Pager::None && state.life == Life::Live;
                state.slots.next_present(from..PageIndex::new(state.pages)).filter(|_| anonymous)?
            };
            if slot != Slot::Zero && !self.is_seen(number, page, held) {
                return Some(page);
            }
            from = page.checked_add(1)?;
        }
    }
}
