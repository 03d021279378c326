//! Guests with a whole chunk of memory, which may be mapped as one block.
//!
//! Before the pages that all guests have, such a one has a chunk that is full. It is written when the first guest is born,
//! and always with the same: so whoever reads it knows what there must be, while its pages are copied, one is given up and
//! written again, go to swap and come back, and now and then all of it lies side by side and is mapped whole.

use super::{Contents, Guest, PAGES, RAM, World, address};
use stage2::testing::Access;
use stage2::vmid::Vmid;
use vmobject::addr::{CHUNK_PAGES, CHUNK_SIZE, Ipa, IpaRange, PAGE_SIZE, PageIndex};
use vmobject::fault::Copied;
use vmobject::lock::Held;
use vmobject::map::{Discarded, Share};
use vmobject::pmap::Pmap as _;
use vmobject::prot::Prot;
use vmobject::store::PhysMemory as _;

/// One world in so many has such guests.
pub(super) const OF: u64 = 4;
/// Pages of the chunk, and a little more than room for them and what copies of them take.
const BALLAST: u32 = CHUNK_PAGES;
pub(super) const FRAMES: u32 = BALLAST + 96;
const BYTE: u8 = 0xba;
/// The first bytes of a page.
pub(super) const BALLAST_BYTES: [u8; 2] = [BYTE, 0];

/// A page, counted from the chunk's start.
pub(super) fn ballast(page: u32) -> Ipa {
    Ipa::new(RAM - CHUNK_SIZE + u64::from(page) * PAGE_SIZE)
}

impl World {
    /// A guest of its own that has written a chunk of memory.
    pub(super) fn birth_of_a_whole_chunk(&mut self) {
        let held = &mut Held::root();
        let map = self.vm.create_map(self.tables().expect("there are frames"), held).expect("a map");
        let pages = address(PAGES).pages_above(ballast(0)).expect("behind it").number();
        let object = self.vm.anonymous(pages, held).expect("an object");
        let range = IpaRange::from_pages(ballast(0), pages).expect("in order");
        let put = self.vm.insert(&map, range, object, PageIndex::new(0), Prot::ALL, Share::Shared, held);
        put.expect("there is room");
        for page in 0..BALLAST {
            assert_eq!(self.vm.write(&map, ballast(page), &[BYTE], held), Ok(Copied::Done), "page {page}");
        }
        let contents = Contents { ballast: BALLAST, ..Contents::default() };
        self.guests.push(Guest { map, vmid: Vmid::default(), name: 0, contents, parked: false });
        self.keep(0, false);
        self.golden = 1;
    }

    /// How many blocks a guest has mapped.
    pub(super) fn blocks(&self, guest: usize) -> u32 {
        self.source.quiet(true);
        let blocks = self.guests[guest].map.with_pmap(&mut Held::root(), |tables| tables.blocks());
        self.source.quiet(false);
        blocks
    }

    /// After something was done to a guest that had so many.
    pub(super) fn saw_blocks(&mut self, guest: usize, before: u32, what: &'static str) {
        if self.blocks(guest) < before {
            self.saw(what);
            if self.guests[guest].parked {
                self.saw("blocks broken that were parked");
            }
        }
    }

    /// The guest that a CPU runs reads all of its chunk, while there is memory.
    pub(super) fn read_ballast(&mut self, cpu: usize) -> Result<(), String> {
        let Some(guest) = self.running[cpu] else { return Ok(()) };
        let pages = self.guests[guest].contents.ballast;
        if pages == 0 {
            return Ok(());
        }
        self.vm.set_free_target(0, 0);
        self.vm.pageout(1, &mut Held::root());
        // Or only one: then pageout may have others in hand, and transfers, too.
        let all = if self.random.below(3) > 0 { pages } else { 0 };
        for page in 0..all {
            let Some(()) = self.use_ballast(cpu, guest, page, Access::Read)? else { return Ok(()) };
        }
        // Tables may forget at any time; what is written there is what was there.
        if let Some(all) = IpaRange::from_pages(ballast(0), pages).filter(|_| self.blocks(guest) == 0) {
            let map = &self.guests[guest].map;
            map.with_pmap(&mut Held::root(), |tables| tables.remove(all, &mut |_| {}));
            let page = self.random.small(pages);
            let Some(()) = self.use_ballast(cpu, guest, page, Access::Read)? else { return Ok(()) };
            for _ in 0..self.blocks(guest) {
                self.saw("blocks mapped");
            }
        }
        self.audit_scribbles()
    }

    /// It writes to a page of it what is there, or gives it up unless it has given up one.
    pub(super) fn write_ballast(&mut self, cpu: usize, page: u32, discards: bool) -> Result<(), String> {
        let Some(guest) = self.running[cpu] else { return Ok(()) };
        let (page, before) = (page * 331 % BALLAST, self.blocks(guest));
        let Contents { ballast: pages, hole, .. } = self.guests[guest].contents;
        if page >= pages {
            return Ok(());
        }
        if discards && hole.is_none() {
            let range = IpaRange::from_pages(ballast(page), 1).expect("in order");
            if !matches!(
                self.vm.discard(&self.guests[guest].map, range, &mut Held::root()),
                Ok(Discarded::Done(_))
            ) {
                return Ok(());
            }
            self.guests[guest].contents.hole = Some(page);
            self.saw_blocks(guest, before, "blocks broken by a discard");
            return Ok(());
        }
        if let Some(()) = self.use_ballast(cpu, guest, page, Access::Write)? {
            self.saw_blocks(guest, before, "blocks broken by a write");
        }
        self.audit_scribbles()
    }

    fn use_ballast(
        &mut self,
        cpu: usize,
        guest: usize,
        page: u32,
        access: Access,
    ) -> Result<Option<()>, String> {
        let Some(frame) = self.access_at(cpu, guest, ballast(page), (false, true), access)? else {
            return Ok(None);
        };
        self.absorb();
        let mut byte = [0];
        self.vm.machine().memory.read(frame, 0, &mut byte);
        let contents = &mut self.guests[guest].contents;
        let known = if contents.hole == Some(page) { 0 } else { BYTE };
        if byte != [known] {
            return Err(format!("page {page} of the chunk of guest {guest} has {byte:?}"));
        }
        if access == Access::Write {
            self.vm.machine().memory.write(frame, 0, &[BYTE]);
            contents.hole = contents.hole.filter(|&hole| hole != page);
        }
        Ok(Some(()))
    }
}
