//! The Mach virtual memory system, for guests of a hypervisor.
//!
//! Stage 2 is a cache of the map. The map is made of objects. An object is a cache of its pager. Any
//! layer may forget and ask the one below again.
//!
//! Everything is reached through one [`Vm`], which lives as long as the machine. All of it works through
//! `&self`; the locks are inside, and a [`Held`] proves that they are taken in order.
//!
//! Modules, each using only those before it (a method of `Vm` lives in the module of its subject):
//! `limits` `addr` `prot` `point` `lock` `pmap` `store` `stats` `defect` `page` `rmap` `object` `pager` `charge` `map` `fault`
//! `pageout` `describe` `check` `testing`.
//!
//! # The seed, row by row
//!
//! What `vm_object.c` of 4.4BSD and the system around it do, what does it here, and a test of it: a file of `tests/`
//! and a name in it, or all of it. Guests reach each row through `hv` by the calls named here.
//!
//! | seed | here | test |
//! |---|---|---|
//! | vm_object_init | [`Vm::new`]; [`object::Objects`], one table of all objects | `fault::memory_in_two_ranges_is_used_and_what_lies_between_is_not` |
//! | vm_object_allocate | [`Vm::anonymous`] | `fault::untouched_memory_reads_as_zero_and_costs_one_frame_a_page` |
//! | vm_object_reference, deallocate | [`Vm::reference`], [`Vm::release`] | `clone`, all; `fault::a_destroyed_guest_leaves_no_frame_no_object_and_no_leaf` |
//! | vm_object_terminate | [`Vm::step`]: cleans, then frees, in steps (`object/work.rs`) | `disk::an_object_that_ends_is_cleaned_first_and_whoever_opens_it_meanwhile_finds_it_d26` |
//! | vm_object_page_clean | [`Vm::page_clean`], [`Vm::clean_step`] | `disk::a_page_that_the_store_does_not_take_stays_and_the_pass_goes_on_and_ends_d13` |
//! | vm_object_deactivate_pages | an object's pages as it enters the cache (`object/cache.rs`) | `disk::the_next_guest_of_an_image_needs_no_disk_while_the_cache_keeps_it` |
//! | the object cache, cache_trim, cache_clear, pager_cache | [`Vm::set_cache_limit`], [`Vm::cache_clear`]; bounded in frames | `disk::the_cache_is_bounded_in_frames_and_the_longest_unused_goes_first_d20` |
//! | vm_object_lookup, enter, remove | [`Vm::image`], [`Vm::disk`] | `disk::one_store_has_one_object_d27` |
//! | vm_object_shutdown | [`Vm::shutdown_step`] | `disk::a_shutdown_cleans_what_is_in_use_releases_and_proves_that_nothing_is_left_d25` |
//! | vm_object_pmap_copy | [`pmap::Pmap::park`] for a map, [`pmap::Pmap::protect`] for a range (`object/pages.rs`) | `disk::only_what_is_being_written_is_protected_d24`, `defects::d15_a_copy_costs_the_maps_entries_and_not_its_pages` |
//! | vm_object_pmap_remove | [`pmap::Pmap::remove`] for a range (`object/pages.rs`), and for a page (`pageout/sweep.rs`) | `defects::d8_no_frame_is_free_while_a_leaf_reaches_it` |
//! | vm_object_copy, symmetric | [`Vm::copy_map`], [`Vm::snapshot`], [`Vm::map_snapshot`], [`Vm::reset_map`] | `clone`, `reset`, `model` and `exhaustive`, all |
//! | vm_object_copy, asymmetric | [`Vm::freeze`], [`Vm::read_snapshot`], [`object::Role`] | `copy`, all |
//! | a copy of part of an object | [`Vm::insert`] with [`Share::Copy`] and a first page | `coalesce::a_part_of_an_image_is_copied_with_its_offset_and_shows_nothing_around_it` |
//! | vm_object_shadow | the first write to an entry that is to be copied (`map/insert.rs`), [`object::Shadow`] | `fault::a_sole_reference_to_anonymous_memory_gets_no_layer_d16` |
//! | vm_object_setpager | the first page-out of a page gives it a slot of [`Vm::add_swap`]; an image has its pager from [`Vm::image`] on | `swap::a_page_that_was_paged_out_comes_back_as_it_was` |
//! | vm_object_collapse | [`Vm::step`] (`object/collapse.rs`, `object/prune.rs`) | `clone`, all; `defects::d9_the_side_with_fewer_pages_moves`; `swap::a_chain_of_swapped_generations_becomes_one_without_io_d2_d4` |
//! | vm_object_page_remove | [`Vm::discard`] | `discard`, all |
//! | vm_object_coalesce | [`Vm::insert`] of new memory behind memory | `coalesce::memory_that_is_put_behind_memory_becomes_part_of_it_and_is_used_like_it` |
//! | vm_object_print | [`Vm::describe_objects`], a tree with each map's share; [`Vm::object_tree`] is the value (`describe/tree.rs`) | `tree`, all; `fault::the_books_can_be_printed` |
//! | vm_map_copyin, copyout: part of a map | [`Vm::copy_in`], [`Vm::copy_out`] | `range::a_copy_of_a_range_has_what_was_there_and_sees_nothing_that_is_written_later`; `range`, all |
//! | vm_map_protect, clipping | [`Vm::protect`] (`map/part.rs`) | `range::a_range_that_may_not_be_written_is_read_and_not_written_until_it_may`; `exhaustive` and the simulator |
//! | vm_map, `needs_copy` | [`map::Map`], [`map::Entry::needs_copy`] | `fault::entries_that_overlap_or_lie_outside_their_object_are_refused_and_leave_nothing_behind` |
//! | vm_fault | [`Vm::fault`], [`Vm::read`], [`Vm::write`], [`Vm::wire`] | `fault`, all; `cost::generations_that_hold_nothing_of_a_chunk_are_passed_once_and_then_cost_what_one_costs` |
//! | vm_page, the queues | [`page::Frames`], [`page::Queue`] | `pageout::a_page_that_is_used_stays_and_one_that_is_not_goes` |
//! | vm_pageout | [`Vm::pageout`] | `pageout`, all |
//! | vm_pager | [`store::PageStore`], [`Vm::complete`] | `swap` and `disk`, all |
//! | the device pager | [`Vm::device`] (`fault/device.rs`); `hv` gives guests none yet | `device`, all |
//! | pmap | [`pmap::Pmap`] | `stage2`'s own, and its simulator |
//!
//! What of the seed is not here, and why:
//!
//! * vm_map_inherit, vm_map_simplify: a clone has what its parent has; entries that were cut stay cut, which costs a
//!   place of [`limits::MAX_ENTRIES`] and nothing else.
//! * Coalescing over objects that shadow, are shadowed, or have a pager: their size is in others' books, and no
//!   loader lays such side by side. They stay two entries.
//!
//! # The seed's defects
//!
//! `tests/defects.rs` says which file has the test of each, D1 to D28; their names end in the number.
//!
//! # Long runs
//!
//! What CI has no time for, with checks of contents as in the short runs:
//!
//! * `cargo xtask sim --seed 110001`: 224,839,064 accesses in 1,840 worlds, on this state of the objects. Before, seed 80647
//!   was the first in a quarter of a billion to go wrong, with an audit that took a page which had come back from swap
//!   without a slot for one whose write nobody remembers.
//! * `cargo xtask sim --exhaustive`: 10,000,024 states of three guests with four pages, in trouble and with transfers that
//!   take time, 40.2 million steps, on this state: up to 8 operations, chains of up to 5 objects; 1,150 page-ins and 91,665
//!   page-outs failed.

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
pub mod point;
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
use map::{Limited, Map};
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
    /// The range is empty, too large, lies outside the object, or has a hole.
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
    /// A device's memory cannot be copied.
    Device,
    /// The object's pager takes no writes, or the range was never to be used so.
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
    limited: Limited<M>,
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
            limited: Limited::new(),
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

    /// A new object of frames that are none of the VM's, with one reference: the caller's. Every map that has it, and
    /// every clone's, reaches the same frames; nothing in them is copied, kept or paged, and EL2 does not touch them for
    /// a guest. The caller sees to it that they stay what they are while the object lives.
    pub fn device<const OUTER: u8>(
        &self,
        frames: Range<Pfn>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<ObjectId, VmError> {
        let pages = frames.end.number().saturating_sub(frames.start.number());
        if pages == 0 || self.frames.has_any(&frames) {
            return Err(VmError::Range);
        }
        self.make_object(pages, Pager::Device(frames.start), None, held)
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
