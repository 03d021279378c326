//! What is left of a world when names are forgotten: its normal form.
//!
//! Two worlds are taken for the same if a renaming of guests, of objects and of pages makes them the same in this:
//! which of those who hold memory see the same bytes of a page; each guest's leaves; each object's role, size of
//! the family that refers to it, place in the tree, copy, and what it knows of each page; the transfers that are due;
//! what there is no more of. Frames, swap slots, queues and the daemon's and the chains' hints are not in it.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::{Eager, World};
use vmobject::lock::Held;
use vmobject::object::{ObjectId, Role};
use vmobject::pmap::Pmap as _;
use vmobject::prot::Prot;
use vmobject::testing::{Mark, TestMap, at};

/// Of a page: what each holder sees there, how each guest maps it, what each object knows.
#[derive(PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Column {
    seen: Vec<u8>,
    leaves: Vec<u8>,
    marks: Vec<Mark>,
}

/// Of an object, all by names that begin with 1.
#[derive(PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Node {
    role: u8,
    refs: u32,
    below: u32,
    copy: u32,
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Form {
    /// For each guest, then for the snapshot: its object, whether it is to be shadowed, whether it may be written.
    roots: Vec<(u32, bool, bool)>,
    kept: bool,
    nodes: Vec<Node>,
    columns: Vec<Column>,
}

struct Holder<'w> {
    object: ObjectId,
    needs_copy: bool,
    eager: &'w Eager,
    map: Option<&'w TestMap>,
}

struct Known {
    id: ObjectId,
    refs: u32,
    role: u8,
    below: Option<ObjectId>,
    copy: Option<ObjectId>,
}

/// The fingerprint of a world's normal form, and one page of each kind that there is.
pub(crate) fn fingerprint(world: &World) -> (u64, Vec<u8>) {
    let held = &mut Held::root();
    let mut guests = Vec::new();
    for (map, eager) in world.guests.iter().flatten() {
        world.rig.vm.for_each_entry(map, held, |entry| {
            let (object, needs_copy) = (entry.object, entry.needs_copy);
            guests.push(Holder { object, needs_copy, eager, map: Some(map) });
        });
    }
    let kept = world.kept.as_ref().map(|(snapshot, eager)| {
        let entry = snapshot.iter().next().expect("an entry");
        Holder { object: entry.object, needs_copy: entry.needs_copy, eager, map: None }
    });
    let mut objects = Vec::new();
    world.rig.vm.for_each_object(held, |info| {
        let role = match info.role {
            Role::Plain => 0,
            Role::Copy => 1,
            Role::Heir => 2,
        };
        if info.refs == 0 && info.paging == 0 {
            return; // only its end is left to come
        }
        let below = info.shadow.map(|shadow| shadow.object);
        objects.push(Known { id: info.id, refs: info.refs, role, below, copy: info.copy });
    });
    let mut least: Option<Form> = None;
    let mut kinds = Vec::new();
    for order in orders(guests.len()) {
        let holders: Vec<_> = order.iter().map(|&guest| &guests[guest]).chain(&kept).collect();
        let mut form = form(world, &holders, &objects);
        if least.is_none() {
            let pages = (0..world.scope.pages).zip(&form.columns).enumerate();
            let new = pages.filter(|(n, (_, column))| !form.columns[..*n].contains(column));
            kinds = new.map(|(_, (page, _))| page).collect();
        }
        form.columns.sort_unstable();
        if least.as_ref().is_none_or(|least| form < *least) {
            least = Some(form);
        }
    }
    let due = world.rig.vm.machine().store.requests();
    let due: Vec<_> = due.iter().map(|request| (request.direction as u8, request.frames.len())).collect();
    let mut hasher = DefaultHasher::new();
    let short = (world.starved, world.tableless);
    (least, due, world.rig.vm.has_chores(held), short, world.asymmetric).hash(&mut hasher);
    (hasher.finish(), kinds)
}

fn form(world: &World, holders: &[&Holder<'_>], objects: &[Known]) -> Form {
    // Objects are named as they are met from the holders down; those that nobody holds come last.
    let mut names: BTreeMap<ObjectId, u32> = BTreeMap::new();
    let mut named = Vec::new();
    let starts = holders.iter().map(|holder| holder.object).chain(objects.iter().map(|object| object.id));
    for start in starts {
        let mut next = Some(start);
        while let Some(object) = next.and_then(|id| objects.iter().find(|object| object.id == id)) {
            if names.contains_key(&object.id) {
                break;
            }
            named.push(object);
            names.insert(object.id, u32::try_from(named.len()).expect("few"));
            next = object.below;
        }
    }
    let name = |id: Option<ObjectId>| id.and_then(|id| names.get(&id)).copied().unwrap_or(0);
    let nodes = named.iter().map(|object| {
        // A name for a copy may be stale.
        let receives = |other: &Known| other.role != 0 && other.below == Some(object.id);
        let copy = objects.iter().find(|other| Some(other.id) == object.copy).filter(|copy| receives(copy));
        let (below, copy) = (name(object.below), name(copy.map(|copy| copy.id)));
        Node { role: object.role, refs: object.refs, below, copy }
    });
    Form {
        roots: holders
            .iter()
            .map(|holder| (name(Some(holder.object)), holder.needs_copy, holder.eager.sealed))
            .collect(),
        kept: world.kept.is_some(),
        nodes: nodes.collect(),
        columns: (0..world.scope.pages).map(|page| column(world, holders, &named, page)).collect(),
    }
}

fn column(world: &World, holders: &[&Holder<'_>], named: &[&Known], page: u8) -> Column {
    let mut different = vec![0];
    let seen = holders.iter().map(|holder| {
        let byte = holder.eager.bytes[usize::from(page)];
        let known = different.iter().position(|&other| other == byte);
        let place = known.unwrap_or_else(|| {
            different.push(byte);
            different.len() - 1
        });
        u8::try_from(place).expect("few")
    });
    let seen = seen.collect();
    let leaves = holders.iter().filter_map(|holder| {
        let leaf = holder.map?.with_pmap(&mut Held::root(), |pmap| pmap.lookup(at(page.into(), 0)));
        Some(leaf.map_or(0, |leaf| 1 + u8::from(leaf.prot.allows(Prot::WRITE))))
    });
    let marks = named.iter().map(|object| world.rig.mark(object.id, page.into()));
    Column { seen, leaves: leaves.collect(), marks: marks.collect() }
}

/// Every order of so many guests; the first one is theirs.
fn orders(count: usize) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for _ in 0..count {
        all = all
            .iter()
            .flat_map(|order: &Vec<usize>| {
                let free = (0..count).filter(|guest| !order.contains(guest));
                free.map(|guest| order.iter().copied().chain([guest]).collect())
            })
            .collect();
    }
    all
}
