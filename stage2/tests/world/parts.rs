//! What a world does with parts of guests: copies of ranges are taken, kept and put elsewhere, ranges may not be written
//! for a while, and guests may not have more than so many frames of their own.

use super::story::Step;
use super::{ALL, PAGES, World, address};
use vmobject::VmError;
use vmobject::addr::IpaRange;
use vmobject::lock::Held;
use vmobject::map::LimitError;
use vmobject::prot::Prot;

/// A bit for each page of a range.
fn bits(pages: std::ops::Range<u32>) -> u64 {
    pages.fold(0, |bits, page| bits | 1 << page)
}

impl World {
    /// Lets a guest do with some pages what is said, and no more.
    pub(super) fn protect(&mut self, guest: usize, first: u32, pages: u32, prot: Prot) {
        let range = IpaRange::from_pages(address(first), pages).expect("in order");
        if self.vm.protect(&self.guests[guest].map, range, prot, &mut Held::root()).is_err() {
            return self.saw("refusals");
        }
        self.absorb();
        let sealed = &mut self.guests[guest].contents.sealed;
        let these = bits(first..first + pages);
        *sealed = if prot.allows(Prot::WRITE) { *sealed & !these } else { *sealed | these };
        self.saw("ranges protected");
    }

    /// Keeps a copy of some pages of a guest.
    pub(super) fn copy_in(&mut self, guest: usize, first: u32, pages: u32) -> Result<(), String> {
        let end = (first + pages).min(if first < PAGES { PAGES } else { ALL });
        let there = (first..end).all(|page| self.guests[guest].contents.has(page));
        let range = IpaRange::from_pages(address(first), end - first).expect("in order");
        let map = self.guests[guest].map.clone();
        let kept =
            self.with(super::Fault::DeafClone, |world| world.vm.copy_in(&map, range, &mut Held::root()));
        self.absorb();
        match kept {
            Ok(part) if there => {
                self.parts.push((part, first..end, self.guests[guest].contents.clone()));
                self.saw("ranges copied");
                Ok(())
            }
            Err(VmError::Range) if !there => {
                self.saw("ranges with nothing in them refused");
                Ok(())
            }
            Err(VmError::Overcommit { .. }) => {
                self.saw("refusals");
                Ok(())
            }
            other => Err(format!("a copy of {first}..{end} of guest {guest}: {:?}", other.map(drop))),
        }
    }

    /// Puts a copy of some pages in a guest's attic.
    pub(super) fn copy_out(&mut self, guest: usize, step: Step) -> Result<(), String> {
        let which = step.page as usize % self.parts.len();
        let (part, from, what) = &self.parts[which];
        let most = ALL - PAGES - (from.end - from.start);
        let to = PAGES + self.random.small(most + 1);
        let pages = to..to + (from.end - from.start);
        let guest = &mut self.guests[guest];
        let free = guest.contents.there & bits(pages.clone()) == 0;
        let contents = &mut guest.contents;
        match self.vm.copy_out(part, &guest.map, address(to), &mut Held::root()) {
            Ok(()) if free => {
                for (page, from) in pages.clone().zip(from.clone()) {
                    contents.bytes[page as usize] = what.of(from);
                    contents.was[page as usize] = what.was[from as usize];
                    let bit = |bits: u64| (bits >> from & 1) << page;
                    contents.touched |= bit(what.touched);
                    contents.sealed = contents.sealed & !(1 << page) | bit(what.sealed);
                }
                contents.there |= bits(pages);
                self.saw("ranges put elsewhere");
            }
            Err(VmError::Overlap) if !free => self.saw("ranges that overlap refused"),
            Err(VmError::Overcommit { .. }) if free => self.saw("refusals"),
            other => return Err(format!("{from:?} to {to} of guest {}: {other:?}", guest.name)),
        }
        Ok(())
    }

    pub(super) fn forget_part(&mut self, which: usize) {
        let (part, ..) = self.parts.swap_remove(which);
        self.vm.delete_snapshot(part, &mut Held::root());
        self.saw("copied ranges deleted");
    }

    /// Says how many frames a guest may have of its own, if that is limited.
    pub(super) fn limit(&mut self, guest: usize, frames: Option<u32>) -> Result<(), String> {
        let map = &self.guests[guest].map;
        let least = self.vm.least_limit(map);
        match self.vm.set_limit(map, frames, &mut Held::root()) {
            Err(LimitError::Least(told)) if told == least && frames.is_some_and(|frames| frames < least) => {
                self.saw("limits refused");
            }
            Ok(()) if frames.is_none_or(|frames| frames >= least) => self.saw("limits set"),
            other => return Err(format!("a limit of {frames:?} for guest {guest}: {other:?}")),
        }
        Ok(())
    }
}
