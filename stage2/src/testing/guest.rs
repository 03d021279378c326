//! A guest with real tables, fake CPUs, and a plain map of what it may reach.
//!
//! Every operation goes to the tables and to the map, and is checked at once: nobody can reach what was taken
//! away, everything that ought to be there is, and a page that was written is dirty until somebody was told.
//! Failures come back as values, so that a test can also ask for one.

use super::mmu::{Access, Mmu};
use super::{Frames, walker};
use crate::Stage2;
use crate::geometry::{Features, Geometry};
use crate::table::ENTRIES;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use vmobject::addr::{CHUNK_PAGES, Ipa, IpaRange, PAGE_SIZE, Pfn};
use vmobject::pmap::{Entered, Harvest, OutOfTables, Pmap};
use vmobject::prot::Prot;

/// A fault is served at most this often for one access. A guest that faults on is stuck.
const PATIENCE: u32 = 4;

/// What an operation says that found something wrong.
pub type Checked<T> = Result<T, String>;

/// A guest.
pub struct Guest {
    /// The tables under test.
    pub tables: Stage2<Frames, Mmu>,
    geometry: Geometry,
    /// Where its tables' frames come from.
    pub frames: Frames,
    /// The CPUs that it may run on.
    pub mmu: Mmu,
    /// What it may reach.
    allowed: BTreeMap<Ipa, (Pfn, Prot)>,
    /// Pages written through a leaf since anybody was told.
    written: BTreeSet<Ipa>,
    /// What the last operation harvested.
    pub harvest: Vec<Harvest>,
    /// Table frames run out: what is mapped may be forgotten.
    forgetful: bool,
}

impl Guest {
    /// The only guest of a machine of two such CPUs, running on both under VMID 1; EL2 is on CPU 0.
    pub fn alone(features: Features) -> Self {
        let geometry = Geometry::new(features);
        let frames = Frames::new(64);
        let mmu = Mmu::new(&frames, geometry, 2);
        let Ok(mut guest) = Self::new(&frames, &mmu, geometry) else { panic!("there are frames") };
        guest.run(0, 1);
        guest.run(1, 1);
        guest
    }

    /// A guest with nothing mapped.
    pub fn new(frames: &Frames, mmu: &Mmu, geometry: Geometry) -> Result<Self, OutOfTables> {
        Ok(Self {
            tables: Stage2::new(frames.clone(), mmu.clone(), geometry)?,
            geometry,
            frames: frames.clone(),
            mmu: mmu.clone(),
            allowed: BTreeMap::new(),
            written: BTreeSet::new(),
            harvest: Vec::new(),
            forgetful: false,
        })
    }

    /// What the tables have for an address now, as the hardware would read it; `None` where it would find nothing.
    pub fn raw(&self, at: Ipa) -> Option<walker::Leaf> {
        self.mmu.leaf(self.tables.vttbr(), at)
    }

    /// From now on table frames may run out.
    pub const fn may_forget(&mut self) {
        self.forgetful = true;
    }

    /// Lets a CPU run it under a VMID.
    pub fn run(&mut self, cpu: usize, vmid: u16) {
        self.tables.set_vmid(vmid);
        self.mmu.run(cpu, self.tables.vttbr());
    }

    /// What it may do with a page, and where that is.
    pub fn allowed(&self, at: Ipa) -> Option<(Pfn, Prot)> {
        self.allowed.get(&at.page()).copied()
    }

    /// The pages that it may reach.
    pub fn pages(&self) -> impl Iterator<Item = Ipa> {
        self.allowed.keys().copied()
    }

    fn pages_in(&self, range: IpaRange) -> Vec<Ipa> {
        self.allowed.range(range.as_range()).map(|(at, _)| *at).collect()
    }

    /// Runs an operation and takes in what it harvested.
    fn edit<R>(
        &mut self,
        what: impl FnOnce(&mut Stage2<Frames, Mmu>, &mut dyn FnMut(Harvest)) -> R,
    ) -> Checked<R> {
        let mut harvest = Vec::new();
        let result = what(&mut self.tables, &mut |h| {
            // One of each page.
            let place = |n: u32| (h.at.checked_add(u64::from(n) * PAGE_SIZE), h.frame.checked_add(n));
            let pages = (0..h.pages).filter_map(|n| place(n).0.zip(place(n).1));
            harvest.extend(pages.map(|(at, frame)| Harvest { at, frame, pages: 1, ..h }));
        });
        for h in &harvest {
            match self.allowed(h.at) {
                Some((frame, _)) if frame == h.frame => {}
                was => return Err(format!("harvested {h:?}, but mapped was {was:?}")),
            }
            if h.dirty {
                self.written.remove(&h.at);
            }
        }
        self.harvest = harvest;
        Ok(result)
    }

    fn told(&self, pages: impl IntoIterator<Item = Ipa>) -> Checked<()> {
        match pages.into_iter().find(|at| self.written.contains(at)) {
            Some(at) => Err(format!("{at} was written, and nobody was told")),
            None => Ok(()),
        }
    }

    /// Enters a leaf as a guest does that faults until it is there: each time the way is opened by a table more, and all is
    /// as it was.
    fn until_there(
        &mut self,
        enter: impl Fn(&mut Stage2<Frames, Mmu>, &mut dyn FnMut(Harvest)) -> Result<Entered, OutOfTables>,
    ) -> Checked<Result<(), OutOfTables>> {
        for _ in 0..4 {
            match self.edit(&enter)? {
                Ok(Entered::Leaf) => return Ok(Ok(())),
                Ok(Entered::Part) => self.check()?,
                Err(error) => return Ok(Err(error)),
            }
        }
        Err(String::from("the way is opened again and again"))
    }

    /// [`Pmap::enter`].
    pub fn enter(&mut self, at: Ipa, frame: Pfn, prot: Prot) -> Checked<Result<(), OutOfTables>> {
        let result = self.until_there(|tables, sink| tables.enter(at, frame, prot, sink))?;
        if result.is_ok() {
            let old = self.allowed.insert(at.page(), (frame, prot));
            if old.is_some_and(|(was, had)| was != frame || !prot.allows(had)) {
                self.told([at.page()])?;
            }
        }
        self.check_page(at.page())?;
        self.mmu.audit().map(|()| result)
    }

    /// [`Pmap::enter_around`].
    pub fn enter_around(&mut self, first: Ipa, frames: &[Option<Pfn>], prot: Prot) -> Checked<u32> {
        let Ok(count) = self.edit(|tables, _| tables.enter_around(first, frames.iter().copied(), prot))?
        else {
            return Ok(0);
        };
        let mut fresh = 0;
        for (at, frame) in (0_u64..).zip(frames) {
            let at = first.checked_add(at << 12).ok_or("past the end")?;
            if let Some(frame) = *frame
                && at.chunk() == first.chunk()
                && !self.allowed.contains_key(&at)
            {
                self.allowed.insert(at, (frame, prot));
                fresh += 1;
            }
            self.check_page(at)?;
        }
        if count != fresh && !self.forgetful {
            return Err(format!("{count} pages were mapped, {fresh} ought to be"));
        }
        self.mmu.audit().map(|()| count)
    }

    /// [`Pmap::enter_block`].
    pub fn enter_block(&mut self, at: Ipa, first: Pfn, prot: Prot) -> Checked<Result<(), OutOfTables>> {
        let range = IpaRange::from_pages(at, CHUNK_PAGES).ok_or("past the end")?;
        let same = |page: &Ipa| {
            let offset = page.pages_above(at).map_or(0, |index| index.number());
            let stays = self
                .allowed(*page)
                .is_some_and(|(frame, had)| Some(frame) == first.checked_add(offset) && prot.allows(had));
            !stays
        };
        let replaced: Vec<Ipa> = self.pages_in(range).into_iter().filter(same).collect();
        let result = self.until_there(|tables, sink| tables.enter_block(at, first, prot, sink))?;
        if result.is_ok() {
            self.told(replaced)?;
            for (page, offset) in range.iter_pages().zip(0..) {
                let frame = first.checked_add(offset).ok_or("past the end")?;
                self.allowed.insert(page, (frame, prot));
            }
        }
        self.check().map(|()| result)
    }

    /// [`Pmap::remove`].
    pub fn remove(&mut self, range: IpaRange) -> Checked<()> {
        self.edit(|tables, sink| tables.remove(range, sink))?;
        let gone = self.pages_in(range);
        for at in &gone {
            self.allowed.remove(at);
            if self.tables.lookup(*at).is_some() {
                return Err(format!("{at} is still mapped"));
            }
        }
        self.told(gone)?;
        self.check()
    }

    /// [`Pmap::remove_pages`].
    pub fn remove_pages(&mut self, pages: &[Ipa]) -> Checked<()> {
        let mut left = pages.iter().copied();
        while left.len() > 0 {
            let before = left.len();
            self.edit(|tables, sink| tables.remove_pages(&mut left, sink))?;
            if left.len() == before {
                return Err("no page was asked for".into());
            }
        }
        for at in pages {
            self.allowed.remove(at);
            if self.tables.lookup(*at).is_some() {
                return Err(format!("{at} is still mapped"));
            }
        }
        self.told(pages.iter().copied())?;
        self.check()
    }

    /// A step of [`Pmap::clear`].
    pub fn clear(&mut self, budget: u32) -> Checked<bool> {
        let done = self.edit(|tables, sink| tables.clear(budget, sink))?;
        for (_, prot) in self.allowed.values_mut() {
            *prot = prot.without(Prot::WRITE);
        }
        let gone: Vec<Ipa> = self.harvest.iter().map(|h| h.at).collect();
        for at in &gone {
            self.allowed.remove(at);
        }
        self.told(gone)?;
        self.check()?;
        let most = budget as usize + 3 * ENTRIES;
        if self.harvest.len() > most {
            return Err(format!("a step of {budget} took away {} pages", self.harvest.len()));
        }
        if done && !(self.allowed.is_empty() && self.tables.tables() == self.geometry.root_tables()) {
            return Err(format!("cleared, but {} pages are there", self.allowed.len()));
        }
        Ok(done)
    }

    /// [`Pmap::protect`].
    pub fn protect(&mut self, range: IpaRange, keep: Prot) -> Checked<()> {
        self.edit(|tables, sink| tables.protect(range, keep, sink))?;
        let pages = self.pages_in(range);
        for at in &pages {
            self.allowed.entry(*at).and_modify(|(_, prot)| *prot = *prot & keep);
            if keep.is_none() {
                self.allowed.remove(at);
            }
        }
        if !keep.allows(Prot::WRITE) {
            self.told(pages)?;
        }
        self.check()
    }

    /// [`Pmap::park`].
    pub fn park(&mut self) -> Checked<()> {
        self.edit(|tables, _| tables.park())?;
        for (_, prot) in self.allowed.values_mut() {
            *prot = prot.without(Prot::WRITE);
        }
        self.check()
    }

    /// [`Pmap::age`].
    pub fn age(&mut self, range: IpaRange) -> Checked<()> {
        self.edit(|tables, sink| tables.age(range, sink))?;
        let pages = self.pages_in(range);
        self.told(pages)?;
        self.check()
    }

    /// An access on a CPU that runs this guest, faults served as the VM would. `None` when the guest may not.
    pub fn access(&mut self, cpu: usize, at: Ipa, access: Access) -> Checked<Option<Pfn>> {
        let wanted = match access {
            Access::Read => Prot::READ,
            Access::Write => Prot::WRITE,
            Access::Execute => Prot::EXECUTE,
        };
        let page = at.page();
        for _ in 0..PATIENCE {
            let allowed = self.allowed(page).filter(|(_, prot)| prot.allows(wanted));
            let fault = match (self.mmu.access(cpu, at, access), allowed) {
                (Ok(reached), Some((frame, _))) if reached == frame => {
                    if access == Access::Write {
                        self.written.insert(page);
                    }
                    return Ok(Some(frame));
                }
                (Ok(reached), _) => {
                    return Err(format!("{access:?} at {at} reached {reached}: {allowed:?}"));
                }
                (Err(walker::Fault::Malformed), _) => {
                    return Err(format!("{at}: the registers are malformed"));
                }
                (Err(_), None) => return Ok(None),
                (Err(fault), Some(_)) => fault,
            };
            self.mmu.on(cpu);
            if let Some((frame, prot)) = self.allowed(page)
                && self.enter(page, frame, prot)? == Err(OutOfTables)
            {
                return if self.forgetful { Ok(None) } else { Err(format!("{fault:?}: no tables")) };
            }
        }
        Err(format!("{access:?} at {at} faults for ever"))
    }

    /// A page is mapped as it ought to be.
    fn check_page(&mut self, at: Ipa) -> Checked<()> {
        let (leaf, allowed) = (self.tables.lookup(at), self.allowed(at));
        match (leaf, allowed) {
            (None, None) => Ok(()),
            (Some(leaf), Some((frame, prot))) if leaf.frame == frame && leaf.prot == prot => Ok(()),
            (None, Some(_)) if self.forgetful => {
                self.allowed.remove(&at);
                self.told([at])
            }
            (leaf, allowed) => Err(format!("{at} is mapped as {leaf:?}, and ought to be {allowed:?}")),
        }
    }

    /// Everything is mapped as it ought to be, and no CPU knows otherwise.
    pub fn check(&mut self) -> Checked<()> {
        for at in self.allowed.keys().copied().collect::<Vec<_>>() {
            self.check_page(at)?;
        }
        self.mmu.audit()
    }
}
