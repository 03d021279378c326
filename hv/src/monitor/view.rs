//! What the monitor shows of memory, as JSON with stable keys: objects as a tree, maps, frames, counters.
//!
//! All of it is read through `vmobject`'s descriptions, one object at a time, with interrupts let in after a few: a live
//! machine is a moving picture. Called by `host`.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use serde_json::{Map as Fields, Value, json};
use vmobject::addr::PAGE_SIZE;
use vmobject::describe::{Holding, Node, Tree};
use vmobject::lock::Held;
use vmobject::map::LimitError;
use vmobject::object::Pager;
use vmobject::pager::swap::{Closed, SwapDevice};
use vmobject::pmap::Pmap as _;
use vmobject::stats::Counts;
use vmobject::store::StoreId;

use crate::guest::{Guest, table};
use crate::mm;

/// KiB in a page.
pub const PAGE_KIB: u64 = PAGE_SIZE / 1024;

/// How far a line of the tree is indented at most; its depth is a column of its own.
const MAX_INDENT: usize = 24;

/// Objects that are looked at before interrupts are let in.
const FEW: u32 = 8;

/// Lets interrupts in between short parts of long work (invariant I6).
pub type Rest<'r> = &'r dyn Fn(&mut Held<'_, 0>);

/// Every live object and what each guest sees of them. Empty when there is no memory for the picture.
pub struct Objects(Tree);

impl Objects {
    /// Looks at all objects and all guests.
    pub fn look(rest: Rest<'_>, held: &mut Held<'_, 0>) -> Self {
        let maps = table::all(held).into_iter().map(|guest| (guest.id.0, guest.map.clone()));
        Self(mm::vm().object_tree(maps, rest, held).unwrap_or_default())
    }

    /// What a guest sees, and its share of that.
    pub fn holding(&self, guest: &Guest) -> Holding {
        self.0.holdings().find(|(id, _)| *id == guest.id.0).map(|(_, holding)| holding).unwrap_or_default()
    }

    /// The objects that `guest` sees, or all: what is shadowed above what shadows it, indented by depth.
    pub fn tree(&mut self, guest: Option<&Guest>, rest: Rest<'_>, held: &mut Held<'_, 0>) -> Value {
        let mut rows = Vec::new();
        let Ok(tops) = guest.map(|guest| mm::vm().tops(&guest.map, held)).transpose() else {
            return Value::Array(rows);
        };
        if rows.try_reserve_exact(self.0.places() as usize).is_ok() {
            let mut more = true;
            self.0.draw(tops.as_deref(), rest, held, |node, depth, held| {
                if more {
                    more = add_row(&mut rows, || {
                        let mut row = row(node, depth);
                        rest(held);
                        add_sharing(&mut row, node);
                        row
                    });
                    rest(held);
                }
            });
        }
        Value::Array(rows)
    }

    /// Frames by queue and owner, and what sharing saves.
    pub fn memory(&self, rest: Rest<'_>, held: &mut Held<'_, 0>) -> Value {
        let memory = mm::vm().memory(held);
        let (mut resident, mut cached, mut shared_frames, mut index_bytes) = (0, 0, 0, 0);
        for (node, number) in self.0.objects().zip(0..) {
            if let Some(Node { info, shared, .. }) = node {
                *(if info.cached { &mut cached } else { &mut resident }) += u64::from(info.counts.resident);
                shared_frames += if *shared { u64::from(info.counts.resident) } else { 0 };
                index_bytes += info.index_bytes as u64;
            }
            pause(number, rest, held);
        }
        // What the guests would hold if each had a copy of all that it reaches.
        let (mut copies, mut guest_bytes) = (0, 0);
        for ((_, holding), step) in self.0.holdings().zip(0..) {
            copies += holding.private + holding.shared;
            pause(step, rest, held);
        }
        for guest in table::all(held) {
            guest_bytes += guest.heap_bytes(held);
            rest(held);
        }
        let frames = json!({
            "total": memory.total,
            "free": memory.queues.free,
            "active": memory.queues.active,
            "inactive": memory.queues.inactive,
            "laundry": memory.queues.laundry,
            "tables": memory.queues.tables,
            "off_queue": memory.off_queue,
            "reserve": memory.reserve,
        });
        rest(held);
        let owners = json!({
            "cached": cached,
            "guests_resident": resident,
            "guests_shared": shared_frames,
            "guests_private": resident - shared_frames,
            "if_nothing_were_shared": copies,
            "no_guests": self.0.unseen.resident,
        });
        rest(held);
        let mut value = json!({
            "frame_bytes": memory.frame_bytes,
            "guest_bytes": guest_bytes,
            "objects": memory.objects,
            "index_bytes": index_bytes,
            "transfers": memory.transfers,
            "page_bytes": vmobject::addr::PAGE_SIZE,
        });
        value["heap"] = json!({ "bytes": mm::heap_bytes(), "room": mm::has_room() });
        value["frames"] = frames;
        value["owners"] = owners;
        value
    }
}

/// Rows that there is memory for always: whoever is to make room has to see who is there.
const SPARE_ROWS: usize = 64;

/// Adds a row to an answer; or, where there is no memory for a longer one, says so and that this is the end.
pub fn add_row(rows: &mut Vec<Value>, row: impl FnOnce() -> Value) -> bool {
    let room = rows.len() < SPARE_ROWS || mm::has_room();
    rows.push(if room { row() } else { json!({ "cut": "there is no memory for a longer answer" }) });
    room
}

/// An answer of these rows, as far as there is memory for it.
pub fn all_rows(mut each: impl Iterator<Item = Value>) -> Value {
    let mut rows = Vec::new();
    while let Some(row) = each.next()
        && add_row(&mut rows, || row)
    {}
    Value::Array(rows)
}

/// Every few steps, interrupts are let in.
fn pause(step: u32, rest: Rest<'_>, held: &mut Held<'_, 0>) {
    if step.is_multiple_of(FEW) {
        rest(held);
    }
}

fn row(node: &Node, depth: usize) -> Value {
    let info = &node.info;
    let number = info.id.number();
    json!({
        "object": number,
        "tree": format!("{:.<indent$}{number}", "", indent = depth.min(MAX_INDENT)),
        "depth": depth,
        "pages": info.pages,
        "resident": info.counts.resident,
        "swapped": info.counts.swapped,
        "zero": info.counts.zero,
        "references": info.refs,
        "cached": info.cached,
        "pager": pager(info.pager),
        "shadows": info.shadow.map(|shadow| shadow.object.number()),
        "transfers": info.paging,
        "index_bytes": info.index_bytes,
    })
}

/// Adds who has an object: which guests map it, how many see it, and how many of its pages each of these has to answer for.
fn add_sharing(row: &mut Value, node: &Node) {
    row["guests"] = named(node).into();
    row["seen_by"] = node.maps.into();
    row["share_pages"] = node.info.counts.resident.checked_div(node.maps).into();
    row["shared"] = node.shared.into();
}

/// The slots of swap, each store's part of them, what pageout did, and what was promised.
pub fn swap(held: &mut Held<'_, 0>) -> Value {
    let vm = mm::vm();
    let (info, counts, charges) = (vm.swap_info(held), vm.stats(), vm.charges(held));
    let devices: Vec<Value> =
        (0..).map_while(|place| vm.swap_device(place, held)).map(|one| swap_device(&one)).collect();
    json!({
        "devices": devices,
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
        "pageout_ticks": crate::sched::ticks_of_pageout(),
        "promised": {
            "pages": charges.committed,
            "limit": charges.limit,
            "to_snapshots": charges.kept,
            "needed_by_vcpus": charges.needed,
        },
    })
}

/// Adds what an image says of itself: whoever made it wrote that, so it replaces nothing that we know, and shows as plain text.
pub fn add_told(row: &mut Value, told: Fields<String, Value>) {
    let plain = |value: &Value| match value {
        Value::String(text) => !text.contains(char::is_control),
        Value::Number(_) => true,
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => false,
    };
    for (key, value) in told.into_iter().filter(|(_, value)| plain(value)) {
        if ["guest", "memory_mib", "vcpus", "disks", "midr", "saved"].contains(&key.as_str()) {
            row[key] = value;
        }
    }
}

fn swap_device(device: &SwapDevice) -> Value {
    let &SwapDevice { store, priority, info, closed, counts } = device;
    json!({
        "name": disk(store),
        "priority": priority,
        "state": match closed {
            None => "used",
            Some(Closed::Failing) => "failing",
            Some(Closed::Gone) => "gone",
        },
        "total": info.slots,
        "in_use": info.in_use,
        "bad": info.bad,
        "read": counts.read,
        "written": counts.written,
        "read_failed": counts.read_failed,
        "write_failed": counts.write_failed,
    })
}

fn named(node: &Node) -> String {
    let mut words: Vec<String> = node.names().map(|name| name.to_string()).collect();
    if node.entered > words.len() {
        words.push(format!("+{}", node.entered - words.len()));
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
        Pager::Device(first) => format!("device at {first}"),
    }
}

/// A guest's map.
pub fn map(guest: &Arc<Guest>, rest: Rest<'_>, held: &mut Held<'_, 0>) -> Value {
    let (mut entries, mut rows) = (Vec::new(), Vec::new());
    mm::vm().for_each_entry(&guest.map, held, |entry| entries.push(*entry));
    for entry in entries {
        let row = || {
            json!({
                "start": format!("{:#x}", entry.range.start().bits()),
                "end": format!("{:#x}", entry.range.end().bits()),
                "pages": entry.range.pages(),
                "object": entry.object.number(),
                "first_page": entry.first.number(),
                "prot": format!("{:?}", entry.prot),
                "needs_copy": entry.needs_copy,
            })
        };
        if !add_row(&mut rows, row) {
            break;
        }
        rest(held);
    }
    let tables = guest.map.with_pmap(held, |pmap| pmap.tables());
    let mut value = json!({"table_frames": tables});
    value["entries"] = Value::Array(rows);
    value
}

/// Why a limit was not set, in words.
pub fn refused_limit(guest: &Guest, error: LimitError) -> String {
    match error {
        LimitError::Least(least) => format!(
            "guest {} with {} vCPUs cannot get on with less than resident={}K",
            guest.id,
            guest.vcpus.len(),
            u64::from(least) * PAGE_KIB
        ),
        LimitError::NoSwap => "there is no swap partition that its pages could go to".into(),
        LimitError::NoMemory => "the hypervisor's own memory is full".into(),
    }
}

/// How much memory a guest has for itself, and may have.
pub fn limit(guest: &Guest, held: &mut Held<'_, 0>) -> Value {
    let (vm, map) = (mm::vm(), &guest.map);
    json!({
        "guest": guest.id.0,
        "own_pages": vm.own_frames(map, held),
        "limit_pages": map.limit(),
        "least_pages": vm.least_limit(map),
    })
}

/// The memory manager's counters: of these guests' maps, and with `shared` of what belongs to no map.
pub fn faults(guests: &[Arc<Guest>], shared: bool, rest: Rest<'_>, held: &mut Held<'_, 0>) -> Value {
    let mut sums = if shared { mm::vm().stats() } else { Counts::default() }.named();
    for guest in guests {
        for ((_, sum), (_, count)) in sums.iter_mut().zip(guest.map.stats().named()) {
            *sum = sum.wrapping_add(count);
        }
        rest(held);
    }
    let mut fields = Fields::new();
    for ((name, sum), step) in sums.into_iter().zip(0..) {
        fields.insert(name.to_string(), json!(sum));
        pause(step, rest, held);
    }
    Value::Object(fields)
}
