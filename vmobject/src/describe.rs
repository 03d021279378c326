//! Saying what there is: objects, maps, memory, for the monitor and for people.
//!
//! Each answer is a value first ([`ObjectInfo`], [`MemoryInfo`]) and text second, so that a program can
//! have the same. Locks are taken for one object at a time: a live machine is a moving picture. `tree` says how the
//! objects hang together, and what of them is whose share.

mod tree;

use alloc::sync::Arc;
use core::fmt::{self, Write};

use crate::Vm;
use crate::lock::Held;
use crate::map::{Entry, Map};
use crate::object::index::SlotCounts;
use crate::object::{Life, ObjectId, Pager, Role, Shadow};
use crate::page::{Owner, QueueLengths};
use crate::store::Machine;

pub use tree::{Holding, Node, Pages, Rest, Tree};

/// How far a line of the tree is indented at most.
const MAX_INDENT: usize = 8;

/// One object.
#[derive(Clone, Copy, Debug)]
pub struct ObjectInfo {
    /// Its name.
    pub id: ObjectId,
    /// Its size in pages.
    pub pages: u32,
    /// References.
    pub refs: u32,
    /// True when it is kept although nobody refers to it.
    pub cached: bool,
    /// Its pages, by where they are.
    pub counts: SlotCounts,
    /// What it shadows.
    pub shadow: Option<Shadow>,
    /// Whether it receives what changes in what it shadows.
    pub role: Role,
    /// Its newest asymmetric copy, perhaps a stale name.
    pub copy: Option<ObjectId>,
    /// Its pager.
    pub pager: Pager,
    /// Transfers in flight.
    pub paging: u32,
    /// Bytes of its index.
    pub index_bytes: usize,
}

/// All frames, by owner and queue.
#[derive(Clone, Copy, Debug)]
pub struct MemoryInfo {
    /// Frames that the VM has.
    pub total: u32,
    /// Bytes of the array that says whose they are.
    pub frame_bytes: usize,
    /// Bytes of the reverse map.
    pub link_bytes: usize,
    /// Frames that guests' pages leave alone.
    pub reserve: u32,
    /// By queue.
    pub queues: QueueLengths,
    /// Frames of objects that are on no queue.
    pub off_queue: u32,
    /// Objects alive.
    pub objects: u32,
    /// Transfers in flight.
    pub transfers: usize,
}

impl<M: Machine> Vm<M> {
    /// Shows each live object to `each`.
    pub fn for_each_object<const OUTER: u8>(
        &self,
        held: &mut Held<'_, OUTER>,
        mut each: impl FnMut(ObjectInfo),
    ) {
        for number in 0..self.object_places(held) {
            if let Some(info) = self.object(number, held) {
                each(info);
            }
        }
    }

    /// Every live object has a number below this.
    pub fn object_places<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> u32 {
        self.objects.used(held)
    }

    /// The live object with a number.
    pub fn object<const OUTER: u8>(&self, number: u32, held: &mut Held<'_, OUTER>) -> Option<ObjectInfo> {
        let (state, _held) = self.objects.at(number)?.read(held);
        (state.life != Life::Vacant).then(|| ObjectInfo {
            id: state.id(),
            pages: state.pages,
            refs: state.refs,
            cached: state.life == Life::Live && state.refs == 0,
            counts: state.slots.counts(),
            shadow: state.shadow,
            role: state.role,
            copy: state.copy,
            pager: state.pager,
            paging: state.paging,
            index_bytes: state.slots.bytes(),
        })
    }

    /// Shows each entry of a map to `each`, in order.
    pub fn for_each_entry<const OUTER: u8>(
        &self,
        map: &Map<M>,
        held: &mut Held<'_, OUTER>,
        each: impl FnMut(&Entry),
    ) {
        map.entries.read(held).0.iter().for_each(each);
    }

    /// Frames by owner and queue.
    pub fn memory<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> MemoryInfo {
        let queues = self.frames.lengths(held);
        let link_bytes = self.links.read(held).0.bytes();
        let queued = queues.free + queues.active + queues.inactive + queues.laundry + queues.tables;
        MemoryInfo {
            total: self.frames.total(),
            frame_bytes: self.frames.bytes(),
            link_bytes,
            reserve: self.frames.reserve(),
            queues,
            off_queue: self.frames.total() - queued,
            objects: self.objects.live(held),
            transfers: self.transfers.count(held),
        }
    }

    /// Writes the objects as a tree, a line for each, what is shadowed above what shadows it; then what each of these maps
    /// holds of them. A share of `9/2` is nine pages for two maps.
    pub fn describe_objects<const OUTER: u8>(
        &self,
        maps: impl IntoIterator<Item = (u32, Arc<Map<M>>)>,
        out: &mut dyn Write,
        held: &mut Held<'_, OUTER>,
    ) -> fmt::Result {
        let Ok(mut tree) = self.object_tree(maps, &|_| (), held) else {
            return writeln!(out, "no memory to draw the objects in");
        };
        writeln!(out, "object       pages    resident swapped  zero     refs share      pager")?;
        let mut result = Ok(());
        tree.draw(None, &|_| (), held, |node, depth, _| {
            if result.is_ok() {
                result = line(out, node, depth);
            }
        });
        result?;
        for (name, Holding { private, shared, swapped, share }) in tree.holdings() {
            write!(out, "map {name}: {private} private, {shared} shared, {swapped} swapped; ")?;
            writeln!(out, "its share {} and {} swapped", share.resident, share.swapped)?;
        }
        writeln!(out, "no map: {} and {} swapped", tree.unseen.resident, tree.unseen.swapped)
    }

    /// Writes a line for each entry of a map.
    pub fn describe_map<const OUTER: u8>(
        &self,
        map: &Map<M>,
        out: &mut dyn Write,
        held: &mut Held<'_, OUTER>,
    ) -> fmt::Result {
        let mut result = Ok(());
        self.for_each_entry(map, held, |entry| {
            if result.is_ok() {
                let copy = if entry.needs_copy { " needs-copy" } else { "" };
                let (range, first) = (entry.range, entry.first.number());
                let (prot, object) = (entry.prot, entry.object.number());
                result = writeln!(out, "{range:?} {prot:?} object {object} from page {first}{copy}");
            }
        });
        let tables = map.with_pmap(held, |pmap| crate::pmap::Pmap::tables(pmap));
        result?;
        writeln!(out, "{tables} table frames")
    }

    /// Writes where the frames are.
    pub fn describe_memory<const OUTER: u8>(
        &self,
        out: &mut dyn Write,
        held: &mut Held<'_, OUTER>,
    ) -> fmt::Result {
        let info = self.memory(held);
        let lines = [
            ("frames", info.total),
            ("free", info.queues.free),
            ("reserve", info.reserve),
            ("active", info.queues.active),
            ("inactive", info.queues.inactive),
            ("laundry", info.queues.laundry),
            ("tables", info.queues.tables),
            ("off queue", info.off_queue),
            ("objects", info.objects),
        ];
        lines.iter().try_for_each(|(name, count)| writeln!(out, "{name:10} {count:10}"))
    }

    /// True if what leaves remembered says that a frame was written.
    pub fn is_dirty(&self, frame: crate::addr::Pfn) -> bool {
        self.frames.find(frame).is_some_and(crate::page::VmPage::is_dirty)
    }

    /// The swap slot that holds what a frame holds, if one does.
    pub fn clean_slot(&self, frame: crate::addr::Pfn) -> Option<u32> {
        self.frames.find(frame)?.clean_slot()
    }

    /// How many aligned 2 MiB of frames are free whole. Walks their list.
    pub fn whole_runs<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> u32 {
        self.frames.whole_runs(held)
    }

    /// Whose a frame is.
    pub fn owner(&self, frame: crate::addr::Pfn) -> Owner {
        self.frames.find(frame).map_or(Owner::Absent, crate::page::VmPage::owner)
    }
}

fn line(out: &mut dyn Write, node: &Node, depth: usize) -> fmt::Result {
    let (info, counts, indent) = (&node.info, node.info.counts, depth.min(MAX_INDENT));
    let number = info.id.number();
    write!(out, "{:.<indent$}{number:<width$} ", "", width = 12 - indent)?;
    write!(out, "{:<8} {:<8} {:<8} {:<8} ", info.pages, counts.resident, counts.swapped, counts.zero)?;
    write!(out, "{:<4} {:>4}/{:<5} ", info.refs, counts.resident, node.maps)?;
    match info.pager {
        Pager::None => writeln!(out, "-"),
        Pager::Image(store) => writeln!(out, "image {}", store.0),
        Pager::Disk(store) => writeln!(out, "disk {}", store.0),
        Pager::Device(first) => writeln!(out, "at {first}"),
    }
}
