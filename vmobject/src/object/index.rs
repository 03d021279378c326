//! The slot index of one object: for each page absent, zero, resident or swapped (DESIGN 4).
//!
//! A three-level radix: a root that grows to the highest page present, regions of 64 leaves, leaves of 64
//! slots of four bytes. What is not there costs nothing: a region that was never touched is no box,
//! and a leaf whose pages are all zero has no slots. Which slots are not absent is a word for each leaf, and which leaves
//! have any a word for each region: range operations go from bit to bit, so their cost
//! follows what is present in the range (D10). Of each 2 MiB it is known where in memory they lie, or would if their
//! frames were side by side (`run`). Called by `object`, `fault`, `pager`.

mod counts;
mod run;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;

use crate::VmError;
use crate::addr::{CHUNK_PAGES, PageIndex, Pfn};
pub use counts::SlotCounts;
use run::Home;

/// What an object knows of one of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Nothing: ask the pager, then the object below.
    Absent,
    /// All zero, whatever is below.
    Zero,
    /// In this frame.
    Resident(Pfn),
    /// In this slot of the swap store, and nowhere else.
    Swapped(u32),
}

const ABSENT: u32 = 0;
const ZERO: u32 = 1;
const RESIDENT: u32 = 1 << 30;
const SWAPPED: u32 = 1 << 31;
const PAYLOAD: u32 = RESIDENT - 1;

impl Slot {
    #[inline]
    const fn encode(self) -> u32 {
        match self {
            Self::Absent => ABSENT,
            Self::Zero => ZERO,
            Self::Resident(frame) => RESIDENT | frame.number() & PAYLOAD,
            Self::Swapped(slot) => SWAPPED | slot & PAYLOAD,
        }
    }

    #[inline]
    const fn decode(bits: u32) -> Self {
        if bits & RESIDENT != 0 {
            Self::Resident(Pfn::new(bits & PAYLOAD))
        } else if bits & SWAPPED != 0 {
            Self::Swapped(bits & PAYLOAD)
        } else if bits == ZERO {
            Self::Zero
        } else {
            Self::Absent
        }
    }
}

const LEAF_SHIFT: u32 = 6;
const LEAF: usize = 1 << LEAF_SHIFT;
const REGION_SHIFT: u32 = 12;
const LEAVES: usize = 1 << (REGION_SHIFT - LEAF_SHIFT);
/// Chunks of a region.
const CHUNKS: usize = (1 << REGION_SHIFT) / CHUNK_PAGES as usize;

/// The slots of a leaf. Most of what a [`crate::Vm`] takes from the heap is these, so it may be worth a place of their own
/// there: nothing else has both their size and their alignment.
#[repr(align(64))]
pub struct Leaf([u32; LEAF]);

struct Region {
    /// A bit for each leaf that has anything.
    held: u64,
    /// A bit for each of them that has no slots, because all its pages are zero.
    zero: u64,
    /// For each leaf a bit for each slot that is not absent.
    present: [u64; LEAVES],
    /// For each chunk.
    homes: [Home; CHUNKS],
    leaves: [Option<Box<[Leaf; 1]>>; LEAVES],
}

impl Region {
    const fn nothing() -> Self {
        Self {
            held: 0,
            zero: 0,
            present: [0; LEAVES],
            homes: [const { Home::unknown() }; CHUNKS],
            leaves: [const { None }; LEAVES],
        }
    }

    #[inline]
    fn get(&self, leaf: usize, slot: usize) -> Slot {
        match &self.leaves[leaf] {
            Some(slots) => Slot::decode(slots[0].0[slot]),
            None if self.zero & 1 << leaf != 0 => Slot::Zero,
            None => Slot::Absent,
        }
    }

    /// The first slot from one on that is not absent, and its leaf.
    #[inline]
    fn next_present(&self, leaf: usize, slot: usize) -> Option<(usize, usize)> {
        let here = self.present[leaf] >> slot;
        if here != 0 {
            return Some((leaf, slot + here.trailing_zeros() as usize));
        }
        let later = self.held & (u64::MAX << leaf) << 1;
        let leaf = later.trailing_zeros() as usize;
        (later != 0).then(|| (leaf, self.present[leaf].trailing_zeros() as usize))
    }

    /// Nothing is in a leaf any more.
    fn drop_leaf(&mut self, leaf: usize) {
        self.leaves[leaf] = None;
        self.present[leaf] = 0;
        self.held &= !(1 << leaf);
        self.zero &= !(1 << leaf);
    }
}

/// Where each page of one object is.
#[derive(Default)]
pub struct Index {
    root: Vec<Option<Box<[Region; 1]>>>,
    counts: SlotCounts,
}

/// Slots that follow one another.
pub struct Run<'i>(&'i [u32]);

impl Run<'_> {
    /// None.
    pub const EMPTY: Self = Self(&[]);

    /// Each of them.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = Slot> {
        self.0.iter().map(|&bits| Slot::decode(bits))
    }
}

const fn split(page: PageIndex) -> (usize, usize, usize) {
    let number = page.number() as usize;
    (number >> REGION_SHIFT, (number >> LEAF_SHIFT) & (LEAVES - 1), number & (LEAF - 1))
}

/// So many values in a box, or the refusal of the heap.
fn boxed<T, const N: usize>(value: impl Fn() -> T) -> Result<Box<[T; N]>, VmError> {
    let mut values = Vec::new();
    values.try_reserve_exact(N).map_err(|_| VmError::NoMemory)?;
    values.resize_with(N, value);
    values.try_into().map_err(|_| VmError::NoMemory)
}

impl Index {
    /// One where everything is absent.
    pub const fn new() -> Self {
        Self { root: Vec::new(), counts: SlotCounts::NONE }
    }

    /// How many slots of each kind there are.
    pub const fn counts(&self) -> SlotCounts {
        self.counts
    }

    #[inline]
    fn region(&self, region: usize) -> Option<&Region> {
        let [region] = &**self.root.get(region)?.as_ref()?;
        Some(region)
    }

    /// What is known of a page.
    #[inline]
    pub fn get(&self, page: PageIndex) -> Slot {
        let (region, leaf, slot) = split(page);
        self.region(region).map_or(Slot::Absent, |region| region.get(leaf, slot))
    }

    /// True if a page can have a slot without more memory.
    pub fn has_leaf(&self, page: PageIndex) -> bool {
        let (region, leaf, _) = split(page);
        self.region(region).is_some_and(|home| home.leaves[leaf].is_some())
    }

    /// True if a whole leaf can be made zero without more memory.
    pub fn has_region(&self, page: PageIndex) -> bool {
        self.region(split(page).0).is_some()
    }

    /// What is known of the pages from `first` to the end of its leaf.
    #[inline]
    pub fn rest_of_leaf(&self, first: PageIndex) -> Run<'_> {
        static ABSENT_LEAF: [u32; LEAF] = [ABSENT; LEAF];
        static ZERO_LEAF: [u32; LEAF] = [ZERO; LEAF];
        let (region, leaf, slot) = split(first);
        let slots = match self.region(region).map(|home| (&home.leaves[leaf], home.zero & 1 << leaf != 0)) {
            Some((Some(slots), _)) => &slots[0].0,
            Some((None, true)) => &ZERO_LEAF,
            Some((None, false)) | None => &ABSENT_LEAF,
        };
        Run(&slots[slot..])
    }

    /// Sets a slot and gives back what was there. Fails only for want of memory, and then changes
    /// nothing. A slot that was present can always be set.
    pub fn set(&mut self, page: PageIndex, to: Slot) -> Result<Slot, VmError> {
        if let Some(before) = self.replace(page, to) {
            return Ok(before);
        }
        let (region, leaf, _) = split(page);
        if to == Slot::Absent && self.get(page) == Slot::Absent {
            return Ok(Slot::Absent);
        }
        self.grow(region, leaf)?;
        self.set(page, to)
    }

    /// The same where its leaf is there; `None`, and nothing done, where it is not.
    #[inline]
    pub fn replace(&mut self, page: PageIndex, to: Slot) -> Option<Slot> {
        let (region, leaf, slot) = split(page);
        let [home] = &mut **self.root.get_mut(region)?.as_mut()?;
        let [Leaf(slots)] = &mut **home.leaves[leaf].as_mut()?;
        let before = Slot::decode(core::mem::replace(&mut slots[slot], to.encode()));
        self.counts.sub(before);
        self.counts.add(to, 1);
        if to == Slot::Absent {
            home.present[leaf] &= !(1 << slot);
            if home.present[leaf] == 0 {
                self.shrink(region, leaf);
            }
        } else {
            home.present[leaf] |= 1 << slot;
        }
        Some(before)
    }

    /// A leaf where nothing is goes, and with the last one its region.
    #[cold]
    fn shrink(&mut self, region: usize, leaf: usize) {
        if let Some(Some(home)) = self.root.get_mut(region) {
            home[0].drop_leaf(leaf);
            if home[0].held == 0 {
                self.root[region] = None;
            }
        }
    }

    /// Makes the region there.
    #[cold]
    fn reach(&mut self, region: usize) -> Result<&mut Region, VmError> {
        if self.root.len() <= region {
            let more = region + 1 - self.root.len();
            self.root.try_reserve_exact(more).map_err(|_| VmError::NoMemory)?;
            self.root.resize_with(region + 1, || None);
        }
        let home = &mut self.root[region];
        if home.is_none() {
            *home = Some(boxed(Region::nothing)?);
        }
        let [home] = &mut **home.as_mut().ok_or(VmError::NoMemory)?;
        Ok(home)
    }

    /// Makes the leaf there.
    #[cold]
    fn grow(&mut self, region: usize, leaf: usize) -> Result<(), VmError> {
        let home = self.reach(region)?;
        let zero = home.zero & 1 << leaf != 0;
        home.leaves[leaf] = Some(boxed(|| Leaf([if zero { ZERO } else { ABSENT }; LEAF]))?);
        home.zero &= !(1 << leaf);
        home.held |= 1 << leaf;
        Ok(())
    }

    /// Makes every page of a leaf zero, without a slot for each. What the slots there own must have been
    /// given up. `first` is a multiple of [`Self::LEAF_PAGES`]. Fails only for want of memory, and then
    /// changes nothing; a leaf where anything was present can always be made zero.
    pub fn zero_leaf(&mut self, first: PageIndex) -> Result<(), VmError> {
        let (region, leaf, slot) = split(first);
        debug_assert_eq!(slot, 0);
        let home = self.reach(region)?;
        if home.zero & 1 << leaf != 0 {
            return Ok(());
        }
        let before = core::mem::take(&mut home.leaves[leaf]);
        home.present[leaf] = u64::MAX;
        home.held |= 1 << leaf;
        home.zero |= 1 << leaf;
        before
            .iter()
            .flat_map(|slots| slots[0].0.iter())
            .for_each(|&bits| self.counts.sub(Slot::decode(bits)));
        self.counts.zero += Self::LEAF_PAGES;
        Ok(())
    }

    /// Pages of a leaf.
    pub const LEAF_PAGES: u32 = 1 << LEAF_SHIFT;

    /// The first page in a range that is not absent, and what it is. Walking with it visits what is
    /// present, plus one look for every region of the range. With nothing present it is over at once.
    pub fn next_present(&self, range: Range<PageIndex>) -> Option<(PageIndex, Slot)> {
        let (page, home, leaf, slot) = self.find_present(range)?;
        Some((page, home.get(leaf, slot)))
    }

    /// The first page in a range that is not absent, and how many from it on are not, one after the other, as far as its
    /// leaf goes.
    #[inline]
    pub fn next_run(&self, range: Range<PageIndex>) -> Option<(PageIndex, u32)> {
        let (page, home, leaf, slot) = self.find_present(range)?;
        Some((page, (home.present[leaf] >> slot).trailing_ones()))
    }

    /// The first page in a range that is not absent, and where in which region that is.
    #[inline]
    fn find_present(&self, range: Range<PageIndex>) -> Option<(PageIndex, &Region, usize, usize)> {
        let mut page = range.start;
        while page < range.end && !self.counts.is_empty() {
            let (number, leaf, slot) = split(page);
            if number >= self.root.len() {
                return None;
            }
            let found = self.region(number).and_then(|home| Some((home, home.next_present(leaf, slot)?)));
            let Some((home, (leaf, slot))) = found else {
                page = next_region(page)?;
                continue;
            };
            let page = u32::try_from(number << REGION_SHIFT | leaf << LEAF_SHIFT | slot).ok()?;
            let page = PageIndex::new(page);
            return (page < range.end).then_some((page, home, leaf, slot));
        }
        None
    }

    /// How many pages from one on are not absent, one after the other, as far as its leaf goes.
    #[inline]
    pub fn held_from(&self, page: PageIndex) -> u32 {
        let (region, leaf, slot) = split(page);
        self.region(region).map_or(0, |region| (region.present[leaf] >> slot).trailing_ones())
    }

    /// Makes every page absent. `give_up` sees what each slot has, or once that a whole leaf is zero, and says whether that
    /// is given up; if not, that is the end for now. What is highest goes first, 4096 pages at a time. True when
    /// nothing is left.
    pub fn drain(&mut self, mut give_up: impl FnMut(Slot) -> bool) -> bool {
        while let Some(region) = self.root.last_mut() {
            while let Some([home]) = region.as_deref_mut().filter(|home| home[0].held != 0) {
                let leaf = home.held.trailing_zeros() as usize;
                if let Some([Leaf(slots)]) = home.leaves[leaf].as_deref_mut() {
                    let present = &mut home.present[leaf];
                    if !drain_leaf(slots, present, &mut self.counts, &mut give_up) {
                        return false;
                    }
                } else {
                    if !give_up(Slot::Zero) {
                        return false;
                    }
                    self.counts.zero -= Self::LEAF_PAGES;
                }
                home.drop_leaf(leaf);
            }
            self.root.pop();
        }
        true
    }

    /// Which of the 64 pages from `first` on are not absent: a bit for each, that of `first` lowest.
    pub fn present_of_64(&self, first: PageIndex) -> u64 {
        let mut word = [0];
        self.present_from(first, &mut word);
        word[0]
    }

    /// The same for 64 pages a word.
    #[inline]
    pub fn present_from(&self, first: PageIndex, words: &mut [u64]) {
        let (mut leaf, skip) = (first.number() >> LEAF_SHIFT, first.number() % Self::LEAF_PAGES);
        if skip == 0 {
            for (word, leaf) in words.iter_mut().zip(leaf..) {
                *word = self.present_of_leaf(leaf);
            }
            return;
        }
        let mut here = self.present_of_leaf(leaf);
        for word in words {
            leaf += 1;
            let next = self.present_of_leaf(leaf);
            *word = here >> skip | next << (Self::LEAF_PAGES - skip);
            here = next;
        }
    }

    /// Of a leaf, counted from the object's beginning.
    #[inline]
    fn present_of_leaf(&self, leaf: u32) -> u64 {
        let (region, leaf) = (leaf as usize / LEAVES, leaf as usize % LEAVES);
        self.region(region).map_or(0, |region| region.present[leaf])
    }

    /// Every page that is not absent, in order.
    pub fn iter(&self) -> impl Iterator<Item = (PageIndex, Slot)> + '_ {
        let mut from = PageIndex::new(0);
        core::iter::from_fn(move || {
            let (page, slot) = self.next_present(from..PageIndex::new(u32::MAX))?;
            from = page.checked_add(1)?;
            Some((page, slot))
        })
    }

    /// Bytes that the index itself takes.
    pub fn bytes(&self) -> usize {
        let regions = self.root.iter().flatten();
        let leaves: usize = regions
            .map(|home| size_of_val(&**home) + home[0].leaves.iter().flatten().count() * size_of::<Leaf>())
            .sum();
        self.root.capacity() * size_of::<Option<Box<[Region; 1]>>>() + leaves
    }
}

/// Makes every page of a leaf absent, as far as what it has is given up; true when nothing is left.
#[inline]
fn drain_leaf(
    slots: &mut [u32; LEAF],
    present: &mut u64,
    counts: &mut SlotCounts,
    give_up: &mut impl FnMut(Slot) -> bool,
) -> bool {
    let (mut left, mut resident) = (*present, 0);
    while left != 0 {
        let slot = &mut slots[left.trailing_zeros() as usize];
        let what = Slot::decode(*slot);
        if !give_up(what) {
            break;
        }
        *slot = ABSENT;
        left &= left - 1;
        match what {
            Slot::Resident(_) => resident += 1,
            Slot::Absent | Slot::Zero | Slot::Swapped(_) => counts.sub(what),
        }
    }
    debug_assert!(resident <= counts.resident);
    counts.resident = counts.resident.wrapping_sub(resident);
    *present = left;
    left == 0
}

/// The first page of the next region.
const fn next_region(page: PageIndex) -> Option<PageIndex> {
    match ((page.number() >> REGION_SHIFT) + 1).checked_mul(1 << REGION_SHIFT) {
        Some(next) => Some(PageIndex::new(next)),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: fn(u32) -> PageIndex = PageIndex::new;

    #[test]
    fn a_page_never_set_is_absent_and_a_page_set_is_what_it_was_set_to() {
        let mut index = Index::new();
        assert_eq!(index.get(P(70_000)), Slot::Absent);
        assert_eq!(index.set(P(70_000), Slot::Resident(Pfn::new(7))).unwrap(), Slot::Absent);
        assert_eq!(index.get(P(70_000)), Slot::Resident(Pfn::new(7)));
        assert_eq!(index.get(P(69_999)), Slot::Absent);
        assert_eq!(index.set(P(70_000), Slot::Swapped(9)).unwrap(), Slot::Resident(Pfn::new(7)));
        assert_eq!(index.counts(), SlotCounts { resident: 0, swapped: 1, zero: 0 });
    }

    #[test]
    fn what_holds_nothing_any_more_costs_nothing() {
        let mut index = Index::new();
        index.set(P(5), Slot::Zero).unwrap();
        let one = index.bytes();
        index.set(P(64), Slot::Zero).unwrap();
        index.set(P(64), Slot::Absent).unwrap();
        assert_eq!(index.bytes(), one);
        index.set(P(5), Slot::Absent).unwrap();
        assert!(index.bytes() <= size_of::<usize>(), "{} bytes", index.bytes());
        assert_eq!(index.counts().present(), 0);
        assert_eq!(index.get(P(5)), Slot::Absent);
        index.zero_leaf(P(0)).unwrap();
        assert_eq!(index.get(P(5)), Slot::Zero);
    }

    #[test]
    fn what_is_drained_is_shown_once_and_costs_nothing_from_then_on() {
        let mut index = Index::new();
        let pages = [3, 64, 65, 4096, 9000, 1 << 20];
        for page in pages {
            index.set(P(page), Slot::Swapped(page)).unwrap();
        }
        index.zero_leaf(P(128)).unwrap();
        let mut seen = Vec::new();
        for step in 0..7 {
            let mut left = 1;
            let done = index.drain(|slot| {
                let more = left > 0;
                left -= 1;
                seen.extend(more.then_some(slot));
                more
            });
            assert_eq!(done, step == 6, "step {step}");
            assert_eq!(index.counts(), {
                let mut counts = SlotCounts::default();
                index.iter().for_each(|(_, slot)| counts.add(slot, 1));
                counts
            });
        }
        let expected = [1 << 20, 9000, 4096, 3, 64, 65].map(Slot::Swapped).into_iter().chain([Slot::Zero]);
        assert!(seen.into_iter().eq(expected));
        assert_eq!(index.counts().present(), 0);
        assert!(index.root.iter().all(Option::is_none));
    }

    #[test]
    fn a_zero_leaf_reads_as_zero_and_opens_when_one_page_changes() {
        let mut index = Index::new();
        index.set(P(65), Slot::Zero).unwrap();
        let with_slots = index.bytes();
        index.zero_leaf(P(64)).unwrap();
        index.zero_leaf(P(64)).unwrap();
        assert!(index.bytes() < with_slots, "a leaf of zeros has no slots");
        assert_eq!(index.get(P(64)), Slot::Zero);
        assert_eq!(index.get(P(127)), Slot::Zero);
        assert_eq!(index.get(P(128)), Slot::Absent);
        index.set(P(70), Slot::Resident(Pfn::new(1))).unwrap();
        assert_eq!(index.get(P(71)), Slot::Zero);
        assert_eq!(index.counts(), SlotCounts { resident: 1, swapped: 0, zero: 63 });
        index.set(P(70), Slot::Absent).unwrap();
        assert_eq!(index.get(P(70)), Slot::Absent);
        assert_eq!(index.counts().present(), 63);
    }

    #[test]
    fn sixty_four_pages_are_asked_for_at_once_from_any_page_on() {
        let mut index = Index::new();
        for page in [70, 100, 127, 130] {
            index.set(P(page), Slot::Resident(Pfn::new(page))).unwrap();
        }
        index.zero_leaf(P(192)).unwrap();
        for first in [0, 6, 7, 64, 70, 71, 100, 128, 131, 190, 192, 200, 4090] {
            let each = (0..64).filter(|bit| index.get(P(first + bit)) != Slot::Absent);
            assert_eq!(index.present_of_64(P(first)), each.fold(0, |mask, bit| mask | 1 << bit), "{first}");
            let mut words = [1; 9];
            index.present_from(P(first), &mut words);
            let each = (0..9).map(|word| index.present_of_64(P(first + word * 64)));
            assert!(words.into_iter().eq(each), "{first}");
            let rest: Vec<Slot> = index.rest_of_leaf(P(first)).iter().collect();
            assert_eq!(rest.len(), 64 - first as usize % 64);
            assert!((first..).zip(rest).all(|(page, slot)| slot == index.get(P(page))), "{first}");
        }
    }

    #[test]
    fn a_run_is_what_follows_in_its_leaf() {
        let mut index = Index::new();
        assert_eq!(index.next_run(P(0)..P(u32::MAX)), None);
        for page in [3, 4, 5, 63, 64, 9000] {
            index.set(P(page), Slot::Swapped(page)).unwrap();
        }
        index.zero_leaf(P(128)).unwrap();
        let (end, mut from, mut runs) = (P(u32::MAX), P(0), Vec::new());
        while let Some((first, pages)) = index.next_run(from..end) {
            runs.push((first.number(), pages));
            from = P(first.number() + pages);
        }
        assert_eq!(runs, [(3, 3), (63, 1), (64, 1), (128, 64), (9000, 1)]);
        // From its middle, and in a range that ends before: what a caller must not look at is the caller's to know.
        assert_eq!(index.next_run(P(4)..P(5)), Some((P(4), 2)));
        assert_eq!(index.next_run(P(170)..end), Some((P(170), 22)));
        assert_eq!((index.next_run(P(6)..P(63)), index.next_run(P(5)..P(5))), (None, None));
    }

    #[test]
    fn a_walk_visits_what_is_present_in_order_and_nothing_else() {
        let mut index = Index::new();
        for page in [3, 64, 65, 4096, 1 << 20, u32::MAX - 1] {
            index.set(P(page), Slot::Zero).unwrap();
        }
        let seen: Vec<u32> = index.iter().map(|(page, _)| page.number()).collect();
        assert_eq!(seen, [3, 64, 65, 4096, 1 << 20, u32::MAX - 1]);
        assert_eq!(index.next_present(P(4)..P(64)), None);
    }
}
