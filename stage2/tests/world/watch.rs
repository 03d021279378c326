//! What everybody would read now, compared with what they wrote, and next to nothing changed by it.
//!
//! A page that a guest has mapped is looked at where it is. Any other one EL2 reads, down the chain as a fault does,
//! while the store takes nothing: what is in swap stays there, and is compared with what the store has. Who reads zeros
//! so is given a page of them, and that would fill the memory in no time: of these it is one at a time that is read. In
//! a snapshot everything is looked at, for its reader is given nothing. Called after every deed in worlds that are
//! watched closely, and in all of them before somebody dies.

use super::whole::{BALLAST_BYTES, ballast};
use super::{ALL, World, address};
use vmobject::addr::Ipa;
use vmobject::fault::{Copied, FaultError, Looked, WaitFor};
use vmobject::lock::Held;
use vmobject::map::Snapshot;
use vmobject::pmap::{Leaf, Pmap as _};
use vmobject::store::{Direction, LostPage, PhysMemory as _, StoreError};

/// One world in so many is watched closely: a number that has nothing in common with those of the other kinds.
pub(super) const OF: u64 = 7;

/// Of a whole chunk, one page in so many is compared after a deed.
const STRIDE: usize = 16;
/// Parts that the way to a page may be laid in.
const PARTS: u32 = 100;

/// What is at a page.
enum Seen {
    Bytes([u8; 2]),
    /// It is on its way from these places in the store, or would be: one of them is its.
    Stored(Vec<[u8; 2]>),
    /// Nobody could say: no frame is free, or the store has failed.
    Nothing,
}

impl World {
    /// Everybody's memory is as it ought to be, and so are the books.
    pub(super) fn watch(&mut self) -> Result<(), String> {
        self.check()?;
        for guest in 0..self.guests.len() {
            self.compare(guest)?;
            self.compare_ballast(guest, STRIDE)?;
        }
        self.read_a_zero()?;
        for which in 0..self.kept.len() {
            let there = (0..ALL).filter(|&page| self.kept[which].1.has(page)).collect();
            self.compare_kept(which, false, there)?;
        }
        for which in 0..self.parts.len() {
            self.compare_kept(which, true, self.parts[which].1.clone().collect())?;
        }
        Ok(())
    }

    /// A guest has what it wrote.
    pub(super) fn compare(&mut self, guest: usize) -> Result<(), String> {
        for page in 0..ALL {
            let known = self.guests[guest].contents.of(page);
            let at = self.bytes_at(guest, page);
            let mapped = self.mapped(guest, at);
            if !self.guests[guest].contents.has(page) {
                if mapped.is_some() {
                    return Err(format!("page {page} is mapped, which guest {guest} does not have"));
                }
                continue;
            }
            let seen = match mapped {
                Some(bytes) => Seen::Bytes(bytes),
                None if known == [0; 2] => continue,
                None => self.look_through(guest, at)?,
            };
            self.is_as_known(&seen, known, || format!("page {page} of guest {guest}"))?;
        }
        Ok(())
    }

    /// It has what it was born with, too: one page in so many is looked at.
    pub(super) fn compare_ballast(&mut self, guest: usize, stride: usize) -> Result<(), String> {
        let (pages, hole) = (self.guests[guest].contents.ballast, self.guests[guest].contents.hole);
        let first = self.random.below(stride);
        for page in (0..pages).skip(first).step_by(stride).filter(|&page| hole != Some(page)) {
            let seen = match self.mapped(guest, ballast(page)) {
                Some(bytes) => Seen::Bytes(bytes),
                None => self.look_through(guest, ballast(page))?,
            };
            self.is_as_known(&seen, BALLAST_BYTES, || format!("page {page} of the chunk of guest {guest}"))?;
        }
        Ok(())
    }

    /// One page of one guest where there is to be nothing: it gets a frame.
    fn read_a_zero(&mut self) -> Result<(), String> {
        let guest = self.random.below(self.guests.len());
        let page = self.random.small(ALL);
        let contents = &mut self.guests[guest].contents;
        if contents.of(page) != [0; 2] || !contents.has(page) {
            return Ok(());
        }
        contents.touched |= 1 << page;
        let at = self.bytes_at(guest, page);
        let seen = self.look_through(guest, at)?;
        self.is_as_known(&seen, [0; 2], || format!("page {page} of guest {guest}"))
    }

    /// A snapshot, or a copied range, has what it had.
    fn compare_kept(&mut self, which: usize, part: bool, pages: Vec<u32>) -> Result<(), String> {
        for page in pages {
            let (snapshot, what) = match part {
                true => (&self.parts[which].0, &self.parts[which].2),
                false => (&self.kept[which].0, &self.kept[which].1),
            };
            let at = Ipa::new(address(page).bits() + what.offset(page) as u64);
            let (seen, known) = (self.look_into_copy(snapshot, at)?, what.of(page));
            self.is_as_known(&seen, known, || format!("page {page} of snapshot {which}"))?;
        }
        Ok(())
    }

    /// The same of a copy that is made for this only, all pages of it, of a guest that is not needed as it is.
    pub(super) fn compare_copy(&mut self, guest: usize) -> Result<(), String> {
        let map = self.guests[guest].map.clone();
        let Ok(snapshot) = self.vm.snapshot(&map, &mut Held::root()) else { return Ok(()) };
        self.absorb();
        let mut all = Vec::new();
        for page in (0..ALL).filter(|&page| self.guests[guest].contents.has(page)) {
            let seen = self.look_into_copy(&snapshot, self.bytes_at(guest, page))?;
            all.push((page, seen));
        }
        self.vm.delete_snapshot(snapshot, &mut Held::root());
        for (page, seen) in all {
            let known = self.guests[guest].contents.of(page);
            self.is_as_known(&seen, known, || format!("page {page} of a copy of guest {guest}"))?;
        }
        Ok(())
    }

    fn bytes_at(&self, guest: usize, page: u32) -> Ipa {
        Ipa::new(address(page).bits() + self.guests[guest].contents.offset(page) as u64)
    }

    fn is_as_known(&mut self, seen: &Seen, known: [u8; 2], what: impl Fn() -> String) -> Result<(), String> {
        match seen {
            Seen::Bytes(bytes) if *bytes == known => self.saw("pages compared"),
            Seen::Stored(all) if all.contains(&known) => self.saw("pages compared in the store"),
            Seen::Nothing => self.saw("pages that could not be compared"),
            Seen::Bytes(bytes) => return Err(format!("{} has {bytes:?} and not {known:?}", what())),
            Seen::Stored(all) => return Err(format!("{} is one of {all:?} and not {known:?}", what())),
        }
        Ok(())
    }

    /// What a guest has where its tables say; that it is what they ought to say the audit finds.
    fn mapped(&self, guest: usize, at: Ipa) -> Option<[u8; 2]> {
        let frame = self.leaf(guest, at)?.frame;
        let mut bytes = [0; 2];
        self.vm.machine().memory.read(frame, at.offset_in_page(), &mut bytes);
        Some(bytes)
    }

    /// What its tables say, found out while nobody writes.
    pub(super) fn leaf(&self, guest: usize, at: Ipa) -> Option<Leaf> {
        self.source.quiet(true);
        let leaf = self.guests[guest].map.with_pmap(&mut Held::root(), |tables| tables.lookup(at.page()));
        self.source.quiet(false);
        leaf
    }

    fn look_through(&self, guest: usize, at: Ipa) -> Result<Seen, String> {
        let mut bytes = [0; 2];
        let (store, map) = (&self.vm.machine().store, &self.guests[guest].map);
        let (read, asked) = store.while_it_refuses(|| self.vm.read(map, at, &mut bytes, &mut Held::root()));
        match read {
            Ok(Copied::Done) => Ok(Seen::Bytes(bytes)),
            Ok(Copied::Wait(wait)) => Ok(self.under_way(wait, at)),
            Err(error) => self.refused(error, asked, at),
        }
    }

    fn look_into_copy(&self, snapshot: &Snapshot, at: Ipa) -> Result<Seen, String> {
        let mut bytes = [0; 2];
        let store = &self.vm.machine().store;
        for _ in 0..PARTS {
            let (read, asked) =
                store.while_it_refuses(|| self.vm.read_snapshot(snapshot, at, &mut bytes, &mut Held::root()));
            return match read {
                Ok(Looked::Done) => Ok(Seen::Bytes(bytes)),
                Ok(Looked::Wait(wait)) => Ok(self.under_way(wait, at)),
                Ok(Looked::Again) => continue,
                Err(error) => self.refused(error, asked, at),
            };
        }
        Err(format!("{at:?} in a snapshot is never there"))
    }

    /// The page that a transfer brings.
    fn under_way(&self, wait: WaitFor, at: Ipa) -> Seen {
        let WaitFor::Io(token) = wait else { return Seen::Nothing };
        let store = &self.vm.machine().store;
        let request = store.requests().into_iter().find(|request| request.token == token);
        let brings = request.filter(|request| request.direction == Direction::In);
        brings.map_or(Seen::Nothing, |request| {
            let pages = request.first..request.first + request.frames.len() as u64;
            self.stored((request.store, pages), at)
        })
    }

    /// The page that the store was asked for.
    fn refused(&self, error: FaultError, asked: Option<super::host::Asked>, at: Ipa) -> Result<Seen, String> {
        match (error, asked) {
            (FaultError::Lost(LostPage { error: StoreError::Refused, .. }), Some(asked)) => {
                Ok(self.stored(asked, at))
            }
            (FaultError::Lost(LostPage { error: StoreError::Io, .. }), None) if self.failing > 0 => {
                Ok(Seen::Nothing)
            }
            (error, _) => Err(format!("EL2 reads {at}: {error:?}")),
        }
    }

    /// What the store has in some pages, where others use other bytes of theirs.
    fn stored(&self, (store, pages): super::host::Asked, at: Ipa) -> Seen {
        let bytes = |page| {
            let all = self.vm.machine().store.page(store, page);
            [0, 1].map(|byte| all[at.offset_in_page() + byte])
        };
        Seen::Stored(pages.map(bytes).collect())
    }
}
