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
use vmobject::describe::ObjectInfo;
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

/// How many guests are named beside an object that they map.
const MAX_NAMED: usize = 4;

/// How far a line of the tree is indented at most; its depth is a column of its own.
const MAX_INDENT: usize = 24;

/// Objects that are looked at before interrupts are let in.
const FEW: u32 = 8;

/// Lets interrupts in between short parts of long work (invariant I6).
pub type Rest<'r> = &'r dyn Fn(&mut Held<'_, 0>);

/// An object, and who has it.
struct Seen {
    info: ObjectInfo,
    /// Guests that map it: how many, and the first of them.
    guests: usize,
    named: [u32; MAX_NAMED],
    /// More than one reference leads to it, by itself or by what shadows it.
    shared: bool,
}

/// Every live object, in the place of its number. Empty when there is no memory for the list.
pub struct Objects(Vec<Option<Seen>>);

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
    pub fn look(rest: Rest<'_>, held: &mut Held<'_, 0>) -> Self {
        let mut objects = Self(Vec::new());
        let places = mm::vm().object_places(held);
        if objects.0.try_reserve_exact(places as usize).is_err() {
            return objects;
        }
        for number in 0..places {
            let seen = |info| Seen { info, guests: 0, named: [0; MAX_NAMED], shared: false };
            objects.0.push(mm::vm().object(number, held).map(seen));
            pause(number, rest, held);
        }
        for guest in table::all(held) {
            mm::vm()
                .for_each_entry(&guest.map, held, |entry| objects.name(entry.object.number(), guest.id.0));
            rest(held);
        }
        for number in 0..places {
            let twice = |seen: &&mut Seen| seen.info.refs > 1;
            let mut next = objects.get_mut(number).filter(twice).map(|_| number);
            while let Some(seen) = next.and_then(|number| objects.get_mut(number)).filter(|seen| !seen.shared)
            {
                seen.shared = true;
                next = below(&seen.info);
                pause(next.unwrap_or_default(), rest, held);
            }
            pause(number, rest, held);
        }
        objects
    }

    fn get(&self, number: u32) -> Option<&Seen> {
        self.0.get(number as usize)?.as_ref()
    }

    fn get_mut(&mut self, number: u32) -> Option<&mut Seen> {
        self.0.get_mut(number as usize)?.as_mut()
    }

    /// Notes that a guest maps an object; all entries of a guest are noted together.
    fn name(&mut self, number: u32, guest: u32) {
        let Some(seen) = self.get_mut(number) else { return };
        let last = seen.guests.checked_sub(1).and_then(|last| seen.named.get(last));
        if last == Some(&guest) {
            return;
        }
        if let Some(place) = seen.named.get_mut(seen.guests) {
            *place = guest;
        }
        seen.guests += 1;
    }

    /// Shows each object that a guest reaches to `each`, once.
    fn reached(
        &self,
        guest: &Guest,
        rest: Rest<'_>,
        held: &mut Held<'_, 0>,
        mut each: impl FnMut(u32, &Seen),
    ) {
        let (mut tops, mut known) = (Vec::new(), Vec::new());
        if known.try_reserve_exact(self.0.len()).is_err() {
            return;
        }
        known.resize(self.0.len(), false);
        mm::vm().for_each_entry(&guest.map, held, |entry| tops.push(entry.object.number()));
        for top in tops {
            let mut next = Some(top);
            while let Some((number, seen)) = next.and_then(|number| Some((number, self.get(number)?))) {
                let Some(known) = known.get_mut(number as usize).filter(|known| !**known) else { break };
                *known = true;
                each(number, seen);
                next = below(&seen.info);
                pause(number, rest, held);
            }
        }
    }

    /// Whose the pages are that a guest reaches.
    pub fn holding(&self, guest: &Guest, rest: Rest<'_>, held: &mut Held<'_, 0>) -> Holding {
        let mut holding = Holding::default();
        self.reached(guest, rest, held, |_, seen| {
            let resident = u64::from(seen.info.counts.resident);
            *(if seen.shared { &mut holding.shared } else { &mut holding.private }) += resident;
            holding.swapped += u64::from(seen.info.counts.swapped);
        });
        holding
    }

    /// The objects that `guest` reaches, or all: what is shadowed above what shadows it, indented by depth.
    pub fn tree(&self, guest: Option<&Guest>, rest: Rest<'_>, held: &mut Held<'_, 0>) -> Value {
        let places = self.0.len();
        // The first that shadows each object, and the next that shadows the same; behind all, those that shadow nothing.
        let (mut first, mut next, mut shown) = (Vec::new(), Vec::new(), Vec::new());
        let mut rows = Vec::new();
        let room = [first.try_reserve_exact(places + 1), next.try_reserve_exact(places)];
        if room.iter().any(Result::is_err)
            || shown.try_reserve_exact(places).is_err()
            || rows.try_reserve_exact(places + 1).is_err()
        {
            return Value::Array(rows);
        }
        first.resize(places + 1, None);
        next.resize(places, None);
        shown.resize(places, guest.is_none());
        if let Some(guest) = guest {
            self.reached(guest, rest, held, |number, _| shown[number as usize] = true);
        }
        for number in (0..u32::try_from(places).unwrap_or(u32::MAX)).rev() {
            let place = number as usize;
            if let Some(seen) = self.get(number).filter(|_| shown[place]) {
                let above = below(&seen.info).map(|below| below as usize);
                let above = above.filter(|above| shown.get(*above) == Some(&true)).unwrap_or(places);
                next[place] = first[above].replace(number);
            }
            pause(number, rest, held);
        }
        // Depth first without recursion: a chain may be thousands long.
        let mut open: Vec<(u32, usize)> = first[places].iter().map(|&number| (number, 0)).collect();
        while let Some((number, depth)) = open.pop() {
            open.extend(next[number as usize].map(|next| (next, depth)));
            open.extend(first[number as usize].map(|first| (first, depth + 1)));
            if let Some(seen) = self.get(number)
                && !add_row(&mut rows, || row(seen, depth))
            {
                break;
            }
            rest(held);
        }
        Value::Array(rows)
    }

    /// Frames by queue and owner, and what sharing saves.
    pub fn memory(&self, rest: Rest<'_>, held: &mut Held<'_, 0>) -> Value {
        let memory = mm::vm().memory(held);
        let (mut resident, mut cached, mut shared_frames, mut index_bytes) = (0, 0, 0, 0);
        for (seen, number) in self.0.iter().zip(0..) {
            if let Some(Seen { info, shared, .. }) = seen {
                *(if info.cached { &mut cached } else { &mut resident }) += u64::from(info.counts.resident);
                shared_frames += if *shared { u64::from(info.counts.resident) } else { 0 };
                index_bytes += info.index_bytes as u64;
            }
            pause(number, rest, held);
        }
        // What the guests would hold if each had a copy of all that it reaches.
        let (mut copies, mut guest_bytes) = (0, 0);
        for guest in table::all(held) {
            let holding = self.holding(&guest, rest, held);
            copies += holding.private + holding.shared;
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
        let (bytes, free) = mm::heap_bytes();
        value["heap"] = json!({ "bytes": bytes, "free": free, "room": mm::has_room() });
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

/// What an object shadows.
fn below(info: &ObjectInfo) -> Option<u32> {
    info.shadow.map(|shadow| shadow.object.number())
}

fn row(seen: &Seen, depth: usize) -> Value {
    let info = &seen.info;
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
        "shadows": below(info),
        "transfers": info.paging,
        "index_bytes": info.index_bytes,
        "guests": named(seen),
    })
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

fn named(seen: &Seen) -> String {
    let mut words: Vec<String> = seen.named.iter().take(seen.guests).map(ToString::to_string).collect();
    if seen.guests > MAX_NAMED {
        words.push(format!("+{}", seen.guests - MAX_NAMED));
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
