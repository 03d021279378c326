//! What the monitor shows of memory, as JSON with stable keys: objects as a tree, maps, frames, counters.
//!
//! All of it is read through `vmobject`'s descriptions, one object at a time: a live machine is a moving
//! picture. Called by `host`.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use serde_json::{Map as Fields, Value, json};
use vmobject::describe::ObjectInfo;
use vmobject::lock::Held;
use vmobject::object::Pager;
use vmobject::pmap::Pmap as _;
use vmobject::store::StoreId;

use crate::guest::{Guest, table};
use crate::mm;

/// How many guests are named beside an object that they map.
const MAX_NAMED: usize = 4;

/// How far a line of the tree is indented at most; its depth is a column of its own.
const MAX_INDENT: usize = 24;

/// Every live object by number, and which guests map it.
pub struct Objects {
    infos: BTreeMap<u32, ObjectInfo>,
    mapped_by: BTreeMap<u32, BTreeSet<u32>>,
    /// Those that more than one reference leads to, by themselves or by what shadows them.
    shared: BTreeSet<u32>,
}

/// Pages that a guest can reach without asking a pager, by whose they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// Resident in objects that nobody else can reach.
    pub private: u64,
    /// Resident in objects that others reach too.
    pub shared: u64,
    /// Swapped out, its own or shared.
    pub swapped: u64,
}

impl Objects {
    /// Looks at all objects and all guests.
    pub fn look(held: &mut Held<'_, 0>) -> Self {
        let mut infos = BTreeMap::new();
        mm::vm().for_each_object(held, |info| {
            infos.insert(info.id.number(), info);
        });
        let mut mapped_by: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for guest in table::all(held) {
            mm::vm().for_each_entry(&guest.map, held, |entry| {
                mapped_by.entry(entry.object.number()).or_default().insert(guest.id.0);
            });
        }
        let mut objects = Self { infos, mapped_by, shared: BTreeSet::new() };
        let twice: Vec<u32> =
            objects.infos.values().filter(|info| info.refs > 1).map(|info| info.id.number()).collect();
        for number in twice {
            let mut next = Some(number);
            while let Some(number) = next.filter(|number| objects.shared.insert(*number)) {
                next = objects.below(number);
            }
        }
        objects
    }

    /// Every object that a guest reaches, each once.
    fn reached(&self, guest: &Guest, held: &mut Held<'_, 0>) -> BTreeSet<u32> {
        let mut reached = BTreeSet::new();
        mm::vm().for_each_entry(&guest.map, held, |entry| {
            let mut next = Some(entry.object.number());
            while let Some(number) = next.filter(|number| reached.insert(*number)) {
                next = self.below(number);
            }
        });
        reached
    }

    fn below(&self, number: u32) -> Option<u32> {
        self.infos.get(&number)?.shadow.map(|shadow| shadow.object.number())
    }

    /// Whose the pages are that a guest reaches.
    pub fn holding(&self, guest: &Guest, held: &mut Held<'_, 0>) -> Holding {
        let mut holding = Holding::default();
        for number in self.reached(guest, held) {
            let Some(info) = self.infos.get(&number) else { continue };
            let resident = u64::from(info.counts.resident);
            *(if self.shared.contains(&number) { &mut holding.shared } else { &mut holding.private }) +=
                resident;
            holding.swapped += u64::from(info.counts.swapped);
        }
        holding
    }

    /// The objects that `guest` reaches, or all: what is shadowed above what shadows it, indented by depth.
    pub fn tree(&self, guest: Option<&Guest>, held: &mut Held<'_, 0>) -> Value {
        let wanted = guest.map(|guest| self.reached(guest, held));
        let shown = |number: &u32| wanted.as_ref().is_none_or(|wanted| wanted.contains(number));
        let mut children: BTreeMap<Option<u32>, Vec<u32>> = BTreeMap::new();
        for number in self.infos.keys().copied().filter(shown) {
            children.entry(self.below(number).filter(shown)).or_default().push(number);
        }
        let mut rows = Vec::new();
        // Depth first without recursion: a chain may be thousands long.
        let mut open: Vec<(u32, usize)> = roots(&children, None, 0);
        while let Some((number, depth)) = open.pop() {
            rows.push(self.row(number, depth));
            open.extend(roots(&children, Some(number), depth + 1));
        }
        Value::Array(rows)
    }

    fn row(&self, number: u32, depth: usize) -> Value {
        let Some(info) = self.infos.get(&number) else { return json!({"object": number}) };
        let guests = self.mapped_by.get(&number);
        json!({
            "object": number,
            "tree": format!("{:.<indent$}{number}", "", indent = depth.min(MAX_INDENT)),
            "depth": depth,
            "pages": info.pages,
            "resident": info.counts.resident,
            "swapped": info.counts.swapped,
            "zero": info.counts.zero,
            "references": info.refs,
            "pager": pager(info.pager),
            "shadows": self.below(number),
            "transfers": info.paging,
            "index_bytes": info.index_bytes,
            "guests": guests.map(named).unwrap_or_default(),
        })
    }

    /// Frames by queue and owner, and what sharing saves.
    pub fn memory(&self, held: &mut Held<'_, 0>) -> Value {
        let memory = mm::vm().memory(held);
        let sum = |of: &dyn Fn(&ObjectInfo) -> u64| self.infos.values().map(of).sum::<u64>();
        let shared_frames = sum(&|info| {
            if self.shared.contains(&info.id.number()) { info.counts.resident.into() } else { 0 }
        });
        let resident = sum(&|info| info.counts.resident.into());
        let guests = table::all(held);
        // What the guests would hold if each had a copy of all that it reaches.
        let copies: u64 = guests
            .iter()
            .map(|guest| {
                let holding = self.holding(guest, held);
                holding.private + holding.shared
            })
            .sum();
        let guest_bytes: usize = guests.iter().map(|guest| guest.heap_bytes(held)).sum();
        json!({
            "frames": {
                "total": memory.total,
                "free": memory.queues.free,
                "active": memory.queues.active,
                "inactive": memory.queues.inactive,
                "laundry": memory.queues.laundry,
                "tables": memory.queues.tables,
                "off_queue": memory.off_queue,
                "reserve": memory.reserve,
            },
            "owners": {
                "guests_resident": resident,
                "guests_shared": shared_frames,
                "guests_private": resident - shared_frames,
                "if_nothing_were_shared": copies,
            },
            "frame_bytes": memory.frame_bytes,
            "guest_bytes": guest_bytes,
            "objects": memory.objects,
            "index_bytes": sum(&|info| info.index_bytes as u64),
            "transfers": memory.transfers,
            "page_bytes": vmobject::addr::PAGE_SIZE,
        })
    }
}

/// The swap store's slots, what pageout did, and what was promised.
pub fn swap(held: &mut Held<'_, 0>) -> Value {
    let vm = mm::vm();
    let (info, counts, charges) = (vm.swap_info(held), vm.stats(), vm.charges(held));
    json!({
        "slots": {
            "total": info.slots,
            "in_use": info.in_use,
            "free": info.free(),
            "bad": info.bad,
        },
        "transfers": {
            "in": counts.page_in,
            "in_failed": counts.page_in_failed,
            "in_corrupt": counts.page_in_corrupt,
            "out": counts.page_out,
            "out_failed": counts.page_out_failed,
        },
        "pages": {
            "written": counts.page_written,
            "looked_at": counts.aged,
            "evicted": counts.evicted,
            "evicted_zero": counts.evicted_zero,
            "reactivated": counts.reactivated,
            "without_a_slot": counts.swap_full,
        },
        "promised": {
            "pages": charges.committed,
            "limit": charges.limit,
            "to_snapshots": charges.kept,
            "needed_by_vcpus": charges.needed,
        },
    })
}

fn roots(children: &BTreeMap<Option<u32>, Vec<u32>>, of: Option<u32>, depth: usize) -> Vec<(u32, usize)> {
    children.get(&of).into_iter().flatten().rev().map(|&number| (number, depth)).collect()
}

fn named(guests: &BTreeSet<u32>) -> String {
    let mut words: Vec<String> = guests.iter().take(MAX_NAMED).map(ToString::to_string).collect();
    if guests.len() > MAX_NAMED {
        words.push(format!("+{}", guests.len() - MAX_NAMED));
    }
    words.join(" ")
}

fn disk(store: StoreId) -> &'static str {
    mm::disks().name(store).unwrap_or("?")
}

fn pager(pager: Pager) -> String {
    match pager {
        Pager::None => "none".into(),
        Pager::Image(store) => format!("image {}", disk(store)),
        Pager::Disk(store) => format!("disk {}", disk(store)),
    }
}

/// A guest's map.
pub fn map(guest: &Arc<Guest>, held: &mut Held<'_, 0>) -> Value {
    let mut rows = Vec::new();
    mm::vm().for_each_entry(&guest.map, held, |entry| {
        rows.push(json!({
            "start": format!("{:#x}", entry.range.start().bits()),
            "end": format!("{:#x}", entry.range.end().bits()),
            "pages": entry.range.pages(),
            "object": entry.object.number(),
            "first_page": entry.first.number(),
            "prot": format!("{:?}", entry.prot),
            "needs_copy": entry.needs_copy,
        }));
    });
    let tables = guest.map.with_pmap(held, |pmap| pmap.tables());
    json!({"entries": rows, "table_frames": tables})
}

/// The memory manager's counters: of these guests' maps, and with `shared` of what belongs to no map.
pub fn faults(guests: &[Arc<Guest>], shared: bool) -> Value {
    let mut sums = Fields::new();
    let all = guests.iter().map(|guest| guest.map.stats()).chain(shared.then(|| mm::vm().stats()));
    for (name, count) in all.flat_map(|counts| counts.named()) {
        let sum = sums.get(name).and_then(Value::as_u64).unwrap_or(0);
        sums.insert(name.to_string(), json!(sum.wrapping_add(count)));
    }
    Value::Object(sums)
}
