//! What must be so in a world: after a deed, at rest, and when all is over.

use super::host::Scribble;
use super::whole::{BALLAST_BYTES, ballast};
use super::{ALL, Contents, ENOUGH, PAGES, SWAP, World, address, offset};
use stage2::testing::Access;
use std::ops::Range;
use vmobject::addr::{Ipa, Pfn};
use vmobject::fault::{FaultError, Looked};
use vmobject::lock::Held;
use vmobject::map::Snapshot;
use vmobject::page::Owner;
use vmobject::prot::Prot;
use vmobject::store::{LostPage, PhysMemory as _, StoreError};

impl World {
    /// A write in the middle of an edit is remembered in the leaf, or it was harvested (I14).
    pub(super) fn audit_scribbles(&mut self) -> Result<(), String> {
        for Scribble { who, page, byte, frame } in core::mem::take(&mut self.scribbled) {
            let Some(guest) = self.guests.iter().find(|guest| guest.name == who) else { continue };
            let at = address(page);
            self.source.quiet(true);
            let leaf = guest.map.with_pmap(&mut Held::root(), |tables| tables.remembers_write(at));
            self.source.quiet(false);
            let mut there = [0];
            self.vm.machine().memory.read(frame, offset(page) + 1, &mut there);
            // Else it is another page's by now.
            let same = there == [byte] && matches!(self.vm.owner(frame), Owner::Object(..));
            // Or it was written out since, and stayed.
            let stored = self.vm.clean_slot(frame).is_some_and(|slot| {
                self.vm.machine().store.page(SWAP, slot.into())[offset(page) + 1] == byte
            });
            // Or it came back from there while slots were few, and has none: then it is written again, whatever it says.
            let swap = self.vm.swap_info(&mut Held::root());
            let came_back = self.vm.clean_slot(frame).is_none() && swap.free() < swap.slots / 2;
            if same && !leaf && !self.vm.is_dirty(frame) {
                if stored || came_back {
                    self.saw("writes in the middle of an edit, stored meanwhile");
                    continue;
                }
                return Err(format!("nothing remembers a write to {at}"));
            }
        }
        Ok(())
    }

    pub(super) fn check(&self) -> Result<(), String> {
        self.vm.check(&mut Held::root()).map(drop).map_err(|violation| format!("{violation:?}"))
    }

    /// Lets everything come to its end that is under way. Then no page is there that a copy made at once would not
    /// have, no chain is longer than it must be, and snapshots are what they were.
    pub(super) fn rest(&mut self) -> Result<(), String> {
        self.settle()?;
        self.absorb();
        self.count_what_is_written()?;
        let mut pages = 0;
        self.vm.for_each_object(&mut Held::root(), |object| {
            pages += (object.counts.resident + object.counts.swapped) as usize;
        });
        let all =
            self.guests.iter().map(|guest| &guest.contents).chain(self.kept.iter().map(|(_, kept)| kept));
        let touched = |contents: &Contents| (contents.touched.count_ones() + contents.ballast) as usize;
        let eager: usize = all.map(touched).sum();
        let of_part = |(_, pages, what): &(_, Range<u32>, Contents)| {
            pages.clone().filter(|page| what.touched & 1 << page != 0).count()
        };
        let eager = eager + self.parts.iter().map(of_part).sum::<usize>();
        // A page that was given up and is only read since is counted all the same.
        // What an object comes to have after an asymmetric copy is seen by the copy, too, be it only zeros.
        if pages > eager && self.vm.stats().copy_made == 0 {
            let objects = self.objects();
            return Err(format!(
                "at rest: {pages} pages, and copies made at once would have {eager}\n{objects}"
            ));
        }
        let (kept, parts) = (core::mem::take(&mut self.kept), core::mem::take(&mut self.parts));
        let looked = kept.iter().try_for_each(|(snapshot, what)| self.look_into(snapshot, what, 0..ALL));
        let looked = looked.and_then(|()| {
            parts.iter().try_for_each(|(part, pages, what)| self.look_into(part, what, pages.clone()))
        });
        (self.kept, self.parts) = (kept, parts);
        looked?;
        self.look_into_guests()
    }

    /// At rest there are no more frames and slots with something else than zeros in them than holders of memory see, each
    /// for itself; however they were copied.
    fn count_what_is_written(&self) -> Result<(), String> {
        let mut pages = 0;
        self.vm.for_each_object(&mut Held::root(), |object| pages += object.counts.swapped as usize);
        let frames = self.frames.clone().map(Pfn::new);
        let used = frames.filter(|&frame| matches!(self.vm.owner(frame), Owner::Object(..)));
        pages += used.filter(|&frame| !self.vm.machine().memory.is_zero(frame)).count();
        let written = |what: &Contents, page: u32| what.of(page) != [0; 2];
        let all =
            self.guests.iter().map(|guest| &guest.contents).chain(self.kept.iter().map(|(_, kept)| kept));
        let ballast = |what: &Contents| what.ballast as usize - usize::from(what.hole.is_some());
        let whole = |what: &Contents| (0..ALL).filter(|&page| written(what, page)).count() + ballast(what);
        let whole: usize = all.map(whole).sum();
        let parts = self.parts.iter();
        let parts: usize =
            parts.map(|(_, pages, what)| pages.clone().filter(|&page| written(what, page)).count()).sum();
        let eager = whole + parts;
        if pages > eager {
            return Err(format!(
                "at rest: {pages} pages are not zero, and copies made at once would have {eager}"
            ));
        }
        Ok(())
    }

    /// Lets all chores and transfers come to their end. Then the books are right, and no chain is longer than it must be.
    fn settle(&mut self) -> Result<(), String> {
        let mut rounds = 0;
        while self.vm.step(1000, &mut Held::root()) | self.deliver_one() {
            rounds += 1;
            if rounds > 1000 {
                return Err("it never comes to rest".into());
            }
        }
        self.check()?;
        let rests = self.vm.check_at_rest(&mut Held::root());
        rests.map_err(|violation| format!("at rest: {violation:?}\n{}", self.objects()))
    }

    fn objects(&self) -> String {
        let mut objects = String::new();
        let maps = self.guests.iter().map(|guest| (guest.name, guest.map.clone()));
        let _ = self.vm.describe_objects(maps, &mut objects, &mut Held::root());
        objects
    }

    /// Each guest has what it wrote and nothing else, on every page; whoever reads a copy is given no pages of zeros.
    /// When the copies are gone all is as it was before.
    fn look_into_guests(&mut self) -> Result<(), String> {
        for guest in 0..self.guests.len() {
            let map = self.guests[guest].map.clone();
            let Ok(snapshot) = self.vm.snapshot(&map, &mut Held::root()) else { continue };
            self.absorb();
            let what = self.guests[guest].contents.clone();
            let looked = self.look_into(&snapshot, &what, 0..ALL);
            self.vm.delete_snapshot(snapshot, &mut Held::root());
            looked.map_err(|why| format!("guest {guest} as a copy: {why}"))?;
            self.saw("guests compared at rest");
        }
        self.settle()
    }

    /// Reads pages of a snapshot, or of a copied range, and what there is of a whole chunk.
    fn look_into(&mut self, snapshot: &Snapshot, what: &Contents, pages: Range<u32>) -> Result<(), String> {
        for page in pages.clone().filter(|&page| what.has(page)) {
            let at = Ipa::new(address(page).bits() + what.offset(page) as u64);
            self.look_at(snapshot, at, what.of(page), page)?;
        }
        let ballast_there = if pages.end == ALL && pages.start == 0 { what.ballast } else { 0 };
        for page in 0..ballast_there {
            let known = if what.hole == Some(page) { [0; 2] } else { BALLAST_BYTES };
            self.look_at(snapshot, ballast(page), known, page)?;
        }
        Ok(())
    }

    fn look_at(&mut self, snapshot: &Snapshot, at: Ipa, known: [u8; 2], page: u32) -> Result<(), String> {
        let mut bytes = [0; 2];
        let copied = loop {
            match self.vm.read_snapshot(snapshot, at, &mut bytes, &mut Held::root()) {
                Ok(Looked::Again) => {}
                Ok(Looked::Wait(_)) if self.deliver_one() || self.page_out(ENOUGH) > 0 => {}
                other => break other,
            }
        };
        match copied {
            Ok(Looked::Done) if bytes == known => {}
            Ok(Looked::Done) => {
                return Err(format!("page {page} at {at} of a snapshot has {bytes:?} and not {known:?}"));
            }
            Ok(Looked::Wait(_) | Looked::Again) => self.saw("snapshots that found no memory"),
            Err(FaultError::Lost(LostPage { error: StoreError::Io, .. })) if self.failing > 0 => {}
            Err(error) => return Err(format!("page {page} at {at} of a snapshot: {error:?}")),
        }
        Ok(())
    }

    /// Everybody dies but one, which then has its memory to itself, and dies: then every frame is free and every
    /// swap slot.
    pub(crate) fn end(&mut self) -> Result<(), String> {
        self.failing = 0;
        while !self.parts.is_empty() {
            self.forget_part(0);
        }
        while self.guests.len() > 1 || !self.kept.is_empty() {
            if self.kept.is_empty() || (self.guests.len() > 1 && self.random.below(2) == 0) {
                let of = self.random.below(self.guests.len());
                self.death(of)?;
            } else {
                let of = self.random.below(self.kept.len());
                self.forget(of);
            }
        }
        self.rest()?;
        self.be_alone()?;
        self.death(0)?;
        self.rest_of_nobody()
    }

    /// The last guest writes to what it has, and nobody else can see that: it takes no layer (D16).
    fn be_alone(&mut self) -> Result<(), String> {
        self.protect(0, 0, PAGES, Prot::ALL);
        self.limit(0, None)?;
        let mut single = 0;
        let held = &mut Held::root();
        let own = &self.guests[0].map;
        self.vm.for_each_entry(own, held, |_| single += 1);
        if single > 1 {
            return Ok(());
        }
        let made = self.vm.stats().shadow_made;
        self.switch(0, 0);
        for page in 0..PAGES {
            self.use_memory(0, page, Access::Write)?;
        }
        let more = self.vm.stats().shadow_made - made;
        if more > 0 { Err(format!("a guest that is alone makes {more} shadows")) } else { self.rest() }
    }

    fn rest_of_nobody(&mut self) -> Result<(), String> {
        self.rest()?;
        let held = &mut Held::root();
        let memory = self.vm.memory(held);
        let frames = memory.total - memory.queues.free;
        let left = (frames, self.source.frames.in_use(), self.vm.swap_info(held).in_use);
        if left != (0, 0, 0) {
            return Err(format!("at the end: {left:?} frames, tables and slots are in use"));
        }
        let charges = self.vm.charges(held);
        let owed = (memory.objects, memory.transfers, charges.committed, charges.kept, charges.needed);
        if owed != (0, 0, 0, 0, 0) {
            return Err(format!("at the end: {owed:?} objects, transfers and promises are left"));
        }
        Ok(())
    }
}
