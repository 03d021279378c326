//! Parts of a map: clipping entries, and what a guest may do with a range (`vm_map_clip_start`, `vm_map_protect`).
//!
//! What is said of a range is said of whole entries, so those that stick out of it are cut there first, one entry
//! becoming two over the same object. Nothing that a guest sees depends on where entries are cut. Called by `copy`, and
//! by whoever changes what a guest may do. Calls `rmap`, the pmap.

use core::ops::Range;

use super::{Entries, Map};
use crate::addr::{Ipa, IpaRange};
use crate::limits::MAX_ENTRIES;
use crate::lock::{Held, MAP};
use crate::pmap::Pmap as _;
use crate::prot::Prot;
use crate::store::Machine;
use crate::{Vm, VmError};

impl Entries {
    /// The places of the entries that together are a range, which may stick out of the first and the last.
    /// [`VmError::Range`] if there is a hole, or nothing to be.
    fn cover(&self, range: IpaRange) -> Result<Range<usize>, VmError> {
        let from = self.place(range.start()).map_err(|_| VmError::Range)?;
        let (mut end, mut to) = (range.start(), from);
        while end < range.end() {
            let next = self.list.get(to).filter(|entry| entry.range.start() <= end);
            end = next.ok_or(VmError::Range)?.range.end();
            to += 1;
        }
        if from == to { Err(VmError::Range) } else { Ok(from..to) }
    }
}

impl<M: Machine> Vm<M> {
    /// Lets a guest do what `prot` says with a range, and nothing else: at most what it was ever to be allowed. All
    /// of the range must be mapped.
    pub fn protect<const OUTER: u8>(
        &self,
        map: &Map<M>,
        range: IpaRange,
        prot: Prot,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let (mut entries, mut held) = map.entries.write(held);
        let part = entries.cover(range)?;
        if entries.list[part].iter().any(|entry| !entry.most.allows(prot)) {
            return Err(VmError::ReadOnly);
        }
        let part = self.clip(&mut entries, range, &mut held)?;
        for entry in &mut entries.list[part] {
            entry.prot = prot;
        }
        map.pmap.lock(&mut held).0.protect(range, prot, &mut |harvest| self.frames.note(harvest));
        Ok(())
    }

    /// Cuts entries where a range begins and ends: the places of those that are the range then.
    pub(super) fn clip(
        &self,
        entries: &mut Entries,
        range: IpaRange,
        held: &mut Held<'_, MAP>,
    ) -> Result<Range<usize>, VmError> {
        entries.cover(range)?;
        self.clip_at(entries, range.start(), held)?;
        self.clip_at(entries, range.end(), held)?;
        entries.cover(range)
    }

    /// Cuts the entry of an address there, if it does not begin there.
    fn clip_at(&self, entries: &mut Entries, at: Ipa, held: &mut Held<'_, MAP>) -> Result<(), VmError> {
        let Ok(place) = entries.place(at) else { return Ok(()) };
        let whole = entries.list[place];
        let cut = (IpaRange::new(whole.range.start(), at), IpaRange::new(at, whole.range.end()));
        let ((Some(before), Some(after)), Some(first)) = (cut, whole.page_at(at)) else { return Ok(()) };
        if before.is_empty() {
            return Ok(());
        }
        if entries.list.len() >= MAX_ENTRIES {
            return Err(VmError::Limit("map entries"));
        }
        entries.list.try_reserve(1).map_err(|_| VmError::NoMemory)?;
        let (mut front, mut back) = (whole, whole);
        (front.range, back.range, back.first) = (before, after, first);
        let more = (front.charge() + back.charge()).saturating_sub(whole.charge());
        self.commit(more, held)?;
        let pages = u32::try_from(before.pages()).map_err(|_| VmError::Range);
        let cut = pages
            .and_then(|pages| self.refer_by(whole.object, held, |links, _| links.cut(whole.link, pages)));
        back.link = cut.inspect_err(|_| self.uncommit(more, held))?;
        entries.list[place] = front;
        entries.list.insert(place + 1, back);
        Ok(())
    }
}
