//! Discarding: a guest says that it does not need what is in a range (balloon, free page report, TRIM).
//!
//! It is as if the guest wrote zeros: what others see does not change, so a range that is to be copied before
//! it is written gets its shadow first, and what lies below or in a store is hidden by marks (D12). The
//! guest's own frames and swap slots go back. Called by whoever serves guests. Calls `object`.

use super::{Entry, Map};
use crate::addr::{CHUNK_PAGES, Ipa, IpaRange, PAGE_SIZE};
use crate::defect::Defect;
use crate::lock::{Held, MAP};
use crate::object::Kept;
use crate::pager::{Pushed, WaitFor};
use crate::point;
use crate::prot::Prot;
use crate::stats::Event;
use crate::store::{LostPage, Machine};
use crate::{Vm, VmError};

/// How a discard went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discarded {
    /// Everything in the range reads as zero; so many frames and swap slots came back.
    Done(u32),
    /// A transfer has a page, or there is no memory for what others are to keep: do it again after this.
    Wait(WaitFor),
    /// So many pages, from the start of the range, read as zero, perhaps none; others had to get what they keep of them, and
    /// that took long enough (I6).
    Part(u64),
}

/// Why a discard was refused; part of the range may have been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotDiscarded {
    /// Nothing is mapped there.
    Hole(Ipa),
    /// The guest may not write there, or it is a device.
    Denied(Ipa),
    /// There is no memory for the marks.
    Refused(VmError),
    /// What others are to keep cannot be read.
    Lost(LostPage),
}

/// Pages that others get in one discard.
const MAX_PUSHES: u32 = 4;

impl<M: Machine> Vm<M> {
    /// Makes a range of a guest's memory zero. Locks are let go after each 2 MiB.
    pub fn discard<const OUTER: u8>(
        &self,
        map: &Map<M>,
        range: IpaRange,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Discarded, NotDiscarded> {
        let (mut from, mut given) = (range.start(), 0);
        // Up to where the last page was that somebody had to get first: what comes before needs no second look.
        let (mut until, mut pushes) = (range.end(), 0);
        while from < range.end() {
            let chunk = IpaRange::from_pages(from.chunk(), CHUNK_PAGES);
            let rest = IpaRange::new(from, until);
            let part = rest.and_then(|rest| rest.intersection(chunk.unwrap_or(rest)));
            let part = part.ok_or(NotDiscarded::Hole(from))?;
            let (mut entries, mut held) = map.entries.write(held);
            let entry = entries.find_mut(from).ok_or(NotDiscarded::Hole(from))?;
            if !entry.prot.allows(Prot::WRITE) || entry.device {
                return Err(NotDiscarded::Denied(from));
            }
            let part = part.intersection(entry.range).unwrap_or(part);
            match self.discard_part(entry, part, &mut held) {
                Ok(more) => given += more,
                Err(Kept::Guarded(page)) => {
                    let (object, behind) =
                        (entry.object, entry.place_of(page).and_then(|at| at.checked_add(PAGE_SIZE)));
                    if pushes == MAX_PUSHES {
                        self.stats.add(Event::Discarded, given.into());
                        return Ok(Discarded::Part((from.bits() - range.start().bits()) / PAGE_SIZE));
                    }
                    pushes += 1;
                    match self.push(object, page, &mut held) {
                        Ok(Pushed::Again | Pushed::Part) => {
                            until = behind.unwrap_or(until).min(range.end());
                            continue;
                        }
                        Ok(Pushed::Wait(wait)) => return Ok(Discarded::Wait(wait)),
                        Err(error) => return Err(NotDiscarded::Lost(error)),
                    }
                }
                Err(Kept::Busy(token)) => {
                    point::here();
                    return Ok(Discarded::Wait(WaitFor::Io(token)));
                }
                Err(Kept::Refused(error)) => return Err(NotDiscarded::Refused(error)),
            }
            (from, until) = (part.end(), range.end());
        }
        self.stats.add(Event::Discarded, given.into());
        Ok(Discarded::Done(given))
    }

    /// The same within one entry and one chunk.
    fn discard_part(&self, entry: &mut Entry, part: IpaRange, held: &mut Held<'_, MAP>) -> Result<u32, Kept> {
        if entry.needs_copy && !self.has(Defect::DiscardIgnoresNeedsCopy) {
            self.shadow_entry(entry, held).map_err(Kept::Refused)?;
        }
        let (Some(first), Ok(pages)) = (entry.page_at(part.start()), u32::try_from(part.pages())) else {
            return Err(Kept::Refused(VmError::Range));
        };
        let (mut state, mut held) = self.objects.get(entry.object).write(held);
        self.page_remove(&mut state, first.number()..first.number() + pages, &mut held)
    }
}
