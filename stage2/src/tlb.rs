//! What the tables need of the translation caches: instructions by name, and the sequences built of them.
//!
//! The trait is at the level of instructions on purpose: a fake that stays stale until the *right* one comes,
//! in the right order, with the right VMID loaded, finds a missing half that no emulator shows. The sequences
//! follow the Arm ARM, D8.17 "TLB maintenance": invalidates by IPA reach stage-2 entries only, so what
//! combines both stages needs the second half, VMALLE1IS, and only once the first is complete: it could be
//! made again of a stale stage-2 entry. Used by `edit` through [`Batch`], and by `vmid`.

use crate::geometry::{Features, Geometry, LAST};
use vmobject::addr::{Ipa, IpaRange, PAGE_SHIFT, PAGE_SIZE, PhysAddr};

/// Up to this many scattered pages are invalidated one by one; for more, a range or the whole VMID is cheaper.
pub const MAX_SINGLE: usize = 16;

/// Up to this many pages one or two range invalidates are used where the CPU has them.
const MAX_RANGE: u64 = 1 << 16;

/// The instructions.
pub trait TlbOps: Send {
    /// DSB ISHST: table writes before are seen by every walker.
    fn dsb_ishst(&self);
    /// DSB ISH: invalidates before are complete on every CPU.
    fn dsb_ish(&self);
    /// DSB NSH: invalidates before are complete on this CPU.
    fn dsb_nsh(&self);
    /// ISB.
    fn isb(&self);
    /// TLBI IPAS2E1IS: stage-2 entries of one page, all levels, of the loaded VMID.
    fn ipas2e1is(&self, at: Ipa);
    /// TLBI RIPAS2E1IS: the same for a range. Used only where [`Features::range_invalidate`] says so, and
    /// otherwise as good as its pages one by one.
    fn ripas2e1is(&self, range: RangeOperand) {
        for page in range.pages() {
            self.ipas2e1is(page);
        }
    }
    /// TLBI VMALLE1IS: stage-1 and combined entries of the loaded VMID.
    fn vmalle1is(&self);
    /// TLBI VMALLS12E1IS: everything of the loaded VMID.
    fn vmalls12e1is(&self);
    /// TLBI VMALLS12E1: everything of the loaded VMID, on this CPU only.
    fn vmalls12e1(&self);
    /// TLBI ALLE1IS: everything of every VMID.
    fn alle1is(&self);
    /// Loads VTTBR_EL2 and synchronises; returns what was loaded. Invalidates act on the loaded VMID.
    fn load_vttbr(&self, vttbr: u64) -> u64;
}

/// The operand of a range invalidate: (NUM + 1) << (5 * SCALE + 1) pages from an address on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeOperand(u64);

impl RangeOperand {
    /// Pages that one unit of NUM stands for, by SCALE.
    const fn unit(scale: u64) -> u64 {
        1 << (5 * scale + 1)
    }

    /// The smallest one that covers `pages` pages from `at` on; `None` beyond 2^21 pages.
    pub fn covering(at: Ipa, pages: u64) -> Option<Self> {
        let scale = (0..4).find(|&scale| pages <= 32 * Self::unit(scale))?;
        let num = pages.div_ceil(Self::unit(scale)).max(1) - 1;
        let base = (at.bits() >> PAGE_SHIFT) & ((1 << 37) - 1);
        Some(Self(base | num << 39 | scale << 44 | 1 << 46)) // TG: 4 KiB
    }
    /// The operand as the instruction takes it.
    pub const fn bits(self) -> u64 {
        self.0
    }
    /// What it covers.
    pub fn pages(self) -> impl Iterator<Item = Ipa> {
        let (num, scale) = ((self.0 >> 39) & 0x1f, (self.0 >> 44) & 0x3);
        let base = (self.0 & ((1 << 37) - 1)) << PAGE_SHIFT;
        (0..(num + 1) * Self::unit(scale)).map(move |page| Ipa::new(base + page * PAGE_SIZE))
    }
}

/// The value of VTTBR_EL2 for a root and a VMID.
pub const fn vttbr(root: PhysAddr, vmid: u16) -> u64 {
    (vmid as u64) << 48 | root.bits()
}

/// With `vttbr` loaded, does `work`, then loads what was there before.
fn under<T: TlbOps>(tlb: &T, vttbr: u64, work: impl FnOnce()) {
    let before = tlb.load_vttbr(vttbr);
    work();
    if before != vttbr {
        tlb.load_vttbr(before);
    }
}

/// Edits that have yet to reach the caches. Nothing counts as taken away before [`Batch::flush`].
#[derive(Debug)]
#[must_use = "what was edited is still in the caches"]
pub struct Batch {
    singles: [Ipa; MAX_SINGLE],
    pages: usize,
    first: Ipa,
    last: Ipa,
    everything: bool,
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

impl Batch {
    /// Nothing yet.
    pub const fn new() -> Self {
        let none = Ipa::new(0);
        Self {
            singles: [none; MAX_SINGLE],
            pages: 0,
            first: Ipa::new(u64::MAX),
            last: none,
            everything: false,
        }
    }
    /// The leaf of a page changed. A block counts as its first page: one address reaches all of it.
    pub fn page(&mut self, at: Ipa) {
        if let Some(single) = self.singles.get_mut(self.pages) {
            *single = at;
        }
        self.pages += 1;
        self.first = self.first.min(at);
        self.last = self.last.max(at);
    }
    /// A table was unlinked, or so much changed that it is not worth a list.
    pub const fn everything(&mut self) {
        self.everything = true;
    }
    /// True when the caches hold nothing that must go.
    pub const fn is_empty(&self) -> bool {
        self.pages == 0 && !self.everything
    }

    /// Makes it so: on return no CPU uses what was there. The VMID need not be loaded.
    pub fn flush<T: TlbOps>(self, tlb: &T, vttbr: u64, features: Features) {
        if self.is_empty() {
            return;
        }
        under(tlb, vttbr, || {
            tlb.dsb_ishst();
            if self.by_page(tlb, features) {
                tlb.dsb_ish();
                tlb.vmalle1is();
            } else {
                tlb.vmalls12e1is();
            }
            tlb.dsb_ish();
            tlb.isb();
        });
    }

    /// The first half, by address; false when the whole VMID is better.
    fn by_page<T: TlbOps>(&self, tlb: &T, features: Features) -> bool {
        if self.everything {
            return false;
        }
        if let Some(singles) = self.singles.get(..self.pages) {
            for &page in singles {
                tlb.ipas2e1is(page);
            }
            return true;
        }
        // The last entry may be a block, whose other pages need no mention: see `page`.
        let range = IpaRange::new(self.first, Geometry::next_entry(self.last, LAST));
        let Some(range) = range.filter(|r| features.range_invalidate && r.pages() <= MAX_RANGE) else {
            return false;
        };
        let Some(operand) = RangeOperand::covering(range.start(), range.pages()) else {
            return false;
        };
        tlb.ripas2e1is(operand);
        true
    }
}

/// Every entry of a VMID on every CPU.
pub fn invalidate_guest<T: TlbOps>(tlb: &T, vttbr: u64) {
    under(tlb, vttbr, || {
        tlb.dsb_ishst();
        tlb.vmalls12e1is();
        tlb.dsb_ish();
        tlb.isb();
    });
}

/// This CPU's entries of the VMID: for a fault that the tables do not explain, and for a leaf that came to
/// allow more. Another CPU that still has the old one faults, and comes here too.
pub fn invalidate_local<T: TlbOps>(tlb: &T, vttbr: u64) {
    under(tlb, vttbr, || {
        tlb.dsb_ishst();
        tlb.vmalls12e1();
        tlb.dsb_nsh();
        tlb.isb();
    });
}

/// Everything of every VMID: at a rollover of VMIDs, or for a frame with very many sharers.
pub fn invalidate_all<T: TlbOps>(tlb: &T) {
    tlb.dsb_ishst();
    tlb.alle1is();
    tlb.dsb_ish();
    tlb.isb();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_operand_covers_what_was_asked_and_starts_there() {
        for pages in [1, 2, 3, 64, 65, 512, 2048, 2049, 70_000, 1 << 21] {
            let at = Ipa::new(0x4000_3000);
            let operand = RangeOperand::covering(at, pages).expect("it fits");
            let covered: u64 = operand.pages().count() as u64;
            assert!(covered >= pages, "{pages}");
            assert!(covered <= 2 * pages, "{pages}: {covered} is far too much");
            assert_eq!(operand.pages().next(), Some(at));
        }
        assert_eq!(RangeOperand::covering(Ipa::new(0), (1 << 21) + 1), None);
    }

    #[test]
    fn a_range_operand_is_the_architecture_s() {
        // RIPAS2E1IS of 512 pages: SCALE 1 (units of 64), NUM 7, TG 4 KiB.
        let operand = RangeOperand::covering(Ipa::new(0x4020_0000), 512).expect("it fits");
        assert_eq!(operand.bits(), 0x40200 | 7 << 39 | 1 << 44 | 1 << 46);
    }
}
