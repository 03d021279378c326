//! The Mach virtual memory system, for guests of a hypervisor.
//!
//! Stage 2 is a cache of the map. The map is made of objects. An object is a cache of its pager. Any
//! layer may forget and ask the one below again.
//!
//! Everything is reached through one [`Vm`], which lives as long as the machine. All of it works through
//! `&self`; the locks are inside, and a [`Held`] proves that they are taken in order.
//!
//! Modules, each using only those before it (a method of `Vm` lives in the module of its subject):
//! `limits` `addr` `prot` `lock` `pmap` `store` `stats` `defect` `page` `rmap` `object` `pager` `charge` `map` `fault`
//! `pageout` `describe` `check` `testing`.
//!
//! # The seed, row by row
//!
//! What `vm_object.c` of 4.4BSD does, what does it here, and the test (a file of `tests/` and a name in it).
//!
//! | seed | here | test |
//! |---|---|---|
//! | vm_object_init | [`Vm::new`]; one table of all objects | `fault::memory_in_two_ranges_is_used_and_what_lies_between_is_not` |
//! | vm_object_allocate | [`Vm::anonymous`] | `fault::untouched_memory_reads_as_zero_and_costs_one_frame_a_page` |
//! | vm_object_reference, deallocate | [`Vm::reference`], [`Vm::release`] | `defects::d6_..`, `fault::a_destroyed_guest_leaves_no_frame_no_object_and_no_leaf` |
//! | vm_object_terminate | `object::work`: cleans, then frees, in steps | `disk::an_object_that_ends_is_cleaned_first_and_whoever_opens_it_meanwhile_finds_it_d26` |
//! | vm_object_page_clean | [`Vm::page_clean`], [`Vm::clean_step`] | `disk::a_page_that_the_store_does_not_take_stays_and_the_pass_goes_on_and_ends_d13` |
//! | vm_object_deactivate_pages | `object::cache`: an object's pages as it enters the cache | `disk::the_next_guest_of_an_image_needs_no_disk_while_the_cache_keeps_it` |
//! | the object cache, cache_trim, cache_clear | [`Vm::set_cache_limit`], [`Vm::cache_clear`] | `disk::the_cache_is_bounded_in_frames_and_the_longest_unused_goes_first_d20` |
//! | vm_object_lookup, enter, remove | [`Vm::image`], [`Vm::disk`] | `disk::one_store_has_one_object_d27` |
//! | vm_object_shutdown | [`Vm::shutdown_step`] | `disk::a_shutdown_cleans_what_is_in_use_releases_and_proves_that_nothing_is_left_d25` |
//! | vm_object_pmap_copy | [`pmap::Pmap::park`] for a map; `object::pages` for a range | `disk::only_what_is_being_written_is_protected_d24`, `defects::d15_..` |
//! | vm_object_pmap_remove | `object::pages`; `pageout::sweep` for one page | `defects::d8_no_frame_is_free_while_a_leaf_reaches_it` |
//! | vm_object_copy, symmetric | [`Vm::copy_map`], [`Vm::snapshot`], [`Vm::map_snapshot`] | `model`, the whole |
//! | vm_object_copy, asymmetric | [`Vm::freeze`], [`Vm::read_snapshot`]; `object::copy`, `fault::push` | `copy`, the whole |
//! | vm_object_shadow | `map::insert`: a shadow on the first write | `fault::a_sole_reference_to_anonymous_memory_gets_no_layer_d16` |
//! | vm_object_setpager | the first page-out of a page gives it a slot; [`Vm::add_swap`] | `swap::a_page_that_was_paged_out_comes_back_as_it_was` |
//! | vm_object_collapse | [`Vm::step`]; `object::collapse`, `object::prune` | `defects::d5_..`, `d7_..`, `d9_..`; `swap::a_chain_of_swapped_generations_becomes_one_without_io_d2_d4` |
//! | vm_object_page_remove | [`Vm::discard`] | `discard`, the whole |
//! | vm_object_coalesce | not yet | none |
//! | vm_object_print | [`Vm::describe_objects`], [`Vm::for_each_object`] | `fault::the_books_can_be_printed` |

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod addr;
pub mod charge;
pub mod check;
pub mod defect;
pub mod describe;
pub mod fault;
pub mod limits;
pub mod lock;
pub mod map;
pub mod object;
pub mod page;
pub mod pageout;
pub mod pager;
pub mod pmap;
pub mod prot;
pub mod rmap;
pub mod stats;
pub mod store;
pub mod testing;

use alloc::collections::VecDeque;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::ops::Range;

use addr::{Ipa, Pfn};
use charge::Charges;
use defect::Seeded;
use lock::{Held, LINKS, REGISTRY, Ranked, RankedRw};
use map::Map;
use object::{ObjectId, Objects, Pager};
use page::Frames;
use pageout::Pageout;
use pager::Transfers;
use pager::swap::Swap;
use rmap::Links;
use stats::{Counts, Stats};
use store::{Machine, PageStore as _, PhysMemory as _, StoreId};

pub use map::Share;

/// Why a call to build something was refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmError {
    /// The heap has no room for the books.
    NoMemory,
    /// There are no frames at all.
    NoFrames,
    /// The range is empty, too large, or lies outside the object.
    Range,
    /// The range ends above what the guest's tables can translate: a fault there could never be served.
    Reach {
        /// Where the range ends.
        end: Ipa,
        /// Where the tables do.
        limit: Ipa,
    },
    /// Something is mapped there already.
    Overlap,
    /// The object's pager takes no writes.
    ReadOnly,
    /// There is no room for the promise of so many pages, only for so many.
    Overcommit {
        /// Pages that were to be promised, tables among them.
        wanted: u64,
        /// Pages that still could be.
        left: u64,
    },
    /// A limit of [`limits`] is reached: this one.
    Limit(&'static str),
}

/// Slots' worth of chores that a call which frees something does at once.
const PROMPT: u32 = 12;

struct Maps<M: Machine> {
    list: Vec<Weak<Map<M>>>,
    next: u32,
    /// Those that are being taken apart.
    ending: VecDeque<Arc<Map<M>>>,
}

/// The whole memory system.
pub struct Vm<M: Machine> {
    machine: M,
    frames: Frames,
    objects: Objects,
    links: RankedRw<LINKS, Links<Weak<Map<M>>>>,
    transfers: Transfers,
    swap: Swap,
    charges: Charges,
    pageout: Pageout,
    maps: Ranked<REGISTRY, Maps<M>>,
    stats: Stats,
    seeded: Seeded,
}

impl<M: Machine> Vm<M> {
    /// Takes over these frames.
    pub fn new(machine: M, frames: &[Range<Pfn>]) -> Result<Self, VmError> {
        let frames = Frames::new(frames)?;
        Ok(Self {
            machine,
            pageout: Pageout::new(frames.total(), frames.reserve()),
            frames,
            objects: Objects::new()?,
            links: RankedRw::new(Links::new()),
            transfers: Transfers::new()?,
            swap: Swap::new(),
            charges: Charges::new(),
            maps: Ranked::new(Maps { list: Vec::new(), next: 0, ending: VecDeque::new() }),
            stats: Stats::new(),
            seeded: Seeded::default(),
        })
    }

    /// The machine it runs on.
    pub const fn machine(&self) -> &M {
        &self.machine
    }

    /// The object of a store that is only read: the same one for everybody who asks while it lives. The
    /// caller has a reference to it now.
    pub fn image<const OUTER: u8>(
        &self,
        store: StoreId,
        held: &mut Held<'_, OUTER>,
    ) -> Result<ObjectId, VmError> {
        self.store_object(store, Pager::Image(store), held)
    }

    /// The object of a store that is written: the same one for everybody. What is written to its pages goes
    /// to the store when it is cleaned. Refused while the store is open as one that is only read.
    pub fn disk<const OUTER: u8>(
        &self,
        store: StoreId,
        held: &mut Held<'_, OUTER>,
    ) -> Result<ObjectId, VmError> {
        self.store_object(store, Pager::Disk(store), held)
    }

    /// The object of all of a store.
    fn store_object<const OUTER: u8>(
        &self,
        store: StoreId,
        pager: Pager,
        held: &mut Held<'_, OUTER>,
    ) -> Result<ObjectId, VmError> {
        let pages = u32::try_from(self.machine.store().pages(store)).map_err(|_| VmError::Range)?;
        if pages == 0 {
            return Err(VmError::Range);
        }
        self.image_object(store, pager, pages, held)
    }

    /// A new object of this many zero pages, with one reference: the caller's.
    pub fn anonymous<const OUTER: u8>(
        &self,
        pages: u32,
        held: &mut Held<'_, OUTER>,
    ) -> Result<ObjectId, VmError> {
        if pages == 0 {
            return Err(VmError::Range);
        }
        self.make_object(pages, Pager::None, None, held)
    }

    /// Gives a reference back.
    pub fn release<const OUTER: u8>(&self, object: ObjectId, held: &mut Held<'_, OUTER>) {
        self.unreference(object, held);
        self.step(PROMPT, held);
    }

    /// One more reference.
    pub fn reference<const OUTER: u8>(
        &self,
        object: ObjectId,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        self.add_reference(object, held)
    }

    /// A frame of zeros for a translation table. Only a pmap may ask: it is called under its lock.
    pub fn alloc_table_frame(&self) -> Option<Pfn> {
        let frame = self.frames.allocate_table(&mut Held::under_pmap())?;
        self.machine.memory().zero(frame);
        Some(frame)
    }

    /// Gives a table's frame back. No walker may reach it any more.
    pub fn free_table_frame(&self, frame: Pfn) {
        self.frames.free_table(frame, &mut Held::under_pmap());
    }

    /// What happened since the start, in all maps that live and in what they share.
    pub fn stats(&self) -> Counts {
        self.stats.counts()
    }
}
