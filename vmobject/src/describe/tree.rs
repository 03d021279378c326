//! The objects as a tree, who shares each of them, and what of it is whose (`vm_object_print`).
//!
//! A picture is taken first, of one object or one map at a time, and counted afterwards: whatever the machine does
//! meanwhile, the shares add up to what the picture has. Every part is short, and the caller rests between them with
//! none of our locks. Called by `describe` and by the monitor. Locks: one object, one map.
//!
//! # Shares
//! A map *sees* an object if the chain below one of its entries goes through it, however much of it that entry shows and
//! the objects above it hide. An object's frames are divided among the maps that see it, and so are its pages in swap:
//! each of `n` maps has an `n`th, in whole pages, and what is left over goes to the maps that come first, a page each. So
//!
//! T1. the shares of all maps, and what no map sees, are together exactly the pages of all objects;
//! T2. of an object that one map sees, this map has all; and two maps' parts of one object differ by a page at most.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::ObjectInfo;
use crate::lock::Held;
use crate::map::Map;
use crate::object::ObjectId;
use crate::store::Machine;
use crate::{Vm, VmError};

/// Steps between two rests.
const FEW: u32 = 8;

/// How many maps are named beside an object of which they have entries.
const NAMED: usize = 4;

/// What is done between short parts of long work, with no lock but the caller's.
pub type Rest<'r, const OUTER: u8> = &'r dyn Fn(&mut Held<'_, OUTER>);

/// Pages of objects, by where they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// In frames.
    pub resident: u64,
    /// In swap.
    pub swapped: u64,
}

/// What a map sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// Pages in frames, of objects to which one reference leads.
    pub private: u64,
    /// Pages in frames, of objects that others reach too.
    pub shared: u64,
    /// Pages in swap, its own or shared.
    pub swapped: u64,
    /// Its part of all of these.
    pub share: Pages,
}

impl Holding {
    /// Counts an object that the map sees, and takes the map's part of it.
    fn add(&mut self, node: &mut Node) {
        let (counts, part) = (node.info.counts, node.give());
        *(if node.shared { &mut self.shared } else { &mut self.private }) += u64::from(counts.resident);
        self.swapped += u64::from(counts.swapped);
        self.share.resident += part.resident;
        self.share.swapped += part.swapped;
    }
}

/// An object, and who has it.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    /// What it is.
    pub info: ObjectInfo,
    /// More than one reference leads to it, by itself or by what shadows it.
    pub shared: bool,
    /// How many maps see it.
    pub maps: u32,
    /// How many maps have entries of it, and the names of the first and the last.
    pub entered: usize,
    names: [u32; NAMED],
    last: u32,
    /// The first that shadows it, and the next that shadows the same.
    first: Option<u32>,
    next: Option<u32>,
    /// The last walk that came by, and how many maps have got their part.
    walk: u32,
    given: u32,
}

impl Node {
    const fn new(info: ObjectInfo) -> Self {
        Self {
            info,
            shared: false,
            maps: 0,
            entered: 0,
            names: [0; NAMED],
            last: 0,
            first: None,
            next: None,
            walk: 0,
            given: 0,
        }
    }

    /// The names of the first maps that have entries of it.
    pub fn names(&self) -> impl Iterator<Item = u32> + '_ {
        self.names.iter().copied().take(self.entered)
    }

    /// Notes that a map has an entry of it; all entries of one map are noted together.
    fn enter(&mut self, name: u32) {
        if self.entered == 0 || self.last != name {
            if let Some(place) = self.names.get_mut(self.entered) {
                *place = name;
            }
            (self.entered, self.last) = (self.entered + 1, name);
        }
    }

    fn shadows(&self) -> Option<ObjectId> {
        self.info.shadow.map(|shadow| shadow.object)
    }

    /// The next map's part of the object.
    fn give(&mut self) -> Pages {
        let part = |pages: u32| u64::from(pages / self.maps + u32::from(self.given < pages % self.maps));
        let counts = self.info.counts;
        let part = Pages { resident: part(counts.resident), swapped: part(counts.swapped) };
        self.given += 1;
        part
    }
}

/// The objects of a picture, each in the place of its number.
#[derive(Default)]
struct Nodes(Vec<Option<Node>>);

impl Nodes {
    fn at(&mut self, number: u32) -> Option<&mut Node> {
        self.0.get_mut(number as usize)?.as_mut()
    }

    /// The very one: what had the place when somebody else was looked at may be gone by now.
    fn find(&mut self, id: ObjectId) -> Option<&mut Node> {
        self.at(id.number()).filter(|node| node.info.id == id)
    }

    /// Shows what lies below some objects and themselves to `each`, once.
    fn walk<const OUTER: u8>(
        &mut self,
        walk: u32,
        tops: &[ObjectId],
        pace: &mut Pace<'_, OUTER>,
        held: &mut Held<'_, OUTER>,
        mut each: impl FnMut(&mut Node),
    ) {
        for &top in tops {
            let mut next = Some(top);
            while let Some(node) = next.and_then(|id| self.find(id)).filter(|node| node.walk != walk) {
                node.walk = walk;
                each(node);
                next = node.shadows();
                pace.step(held);
            }
            pace.step(held);
        }
    }
}

/// All objects as they were found, with the maps that see them.
#[derive(Default)]
pub struct Tree {
    nodes: Nodes,
    holdings: Vec<(u32, Holding)>,
    /// The first of those that shadow nothing.
    first: Option<u32>,
    walks: u32,
    /// What no map sees: the cache's, snapshots', what is about to go.
    pub unseen: Pages,
}

/// Rests after every few steps.
struct Pace<'r, const OUTER: u8>(Rest<'r, OUTER>, u32);

impl<const OUTER: u8> Pace<'_, OUTER> {
    fn step(&mut self, held: &mut Held<'_, OUTER>) {
        self.1 += 1;
        if self.1 == FEW {
            self.1 = 0;
            (self.0)(held);
        }
    }
}

impl<M: Machine> Vm<M> {
    /// Looks at all objects, and at these maps: each has a name, which is the caller's.
    pub fn object_tree<const OUTER: u8>(
        &self,
        maps: impl IntoIterator<Item = (u32, Arc<Map<M>>)>,
        rest: Rest<'_, OUTER>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Tree, VmError> {
        let (mut tree, pace) = (Tree::default(), &mut Pace(rest, 0));
        let (maps, mut views) = (maps.into_iter(), Vec::new());
        let mut room = maps.size_hint().0.max(1);
        for (name, map) in maps {
            tree.holdings.try_reserve(room).map_err(|_| VmError::NoMemory)?;
            views.try_reserve(room).map_err(|_| VmError::NoMemory)?;
            room = 1;
            tree.holdings.push((name, Holding::default()));
            views.push(self.tops(&map, held)?);
            rest(held);
        }
        // After the maps: what comes to lie above a map's first object meanwhile hides little of it.
        let places = self.object_places(held);
        tree.nodes.0.try_reserve_exact(places as usize).map_err(|_| VmError::NoMemory)?;
        for number in 0..places {
            tree.nodes.0.push(self.object(number, held).map(Node::new));
            rest(held); // to weigh a large index takes thousands of instructions
        }
        tree.link(pace, held);
        tree.count(views, pace, held);
        Ok(tree)
    }

    /// The objects of a map's entries; see [`Tree::draw`].
    pub fn tops<const OUTER: u8>(
        &self,
        map: &Map<M>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Vec<ObjectId>, VmError> {
        let (mut tops, mut result) = (Vec::new(), Ok(()));
        self.for_each_entry(map, held, |entry| {
            if tops.last() != Some(&entry.object) {
                match tops.try_reserve(1) {
                    Ok(()) => tops.push(entry.object),
                    Err(_) => result = Err(VmError::NoMemory),
                }
            }
        });
        result.map(|()| tops)
    }
}

impl Tree {
    /// Every object has a number below this.
    pub fn places(&self) -> u32 {
        u32::try_from(self.nodes.0.len()).unwrap_or(u32::MAX)
    }

    /// Hangs each object on what it shadows, and finds what is shared.
    fn link<const OUTER: u8>(&mut self, pace: &mut Pace<'_, OUTER>, held: &mut Held<'_, OUTER>) {
        for number in (0..self.places()).rev() {
            pace.step(held);
            let Some(shadows) = self.nodes.at(number).map(|node| node.shadows()) else { continue };
            let below = shadows.and_then(|id| self.nodes.find(id));
            let next = below.map_or(&mut self.first, |below| &mut below.first).replace(number);
            if let Some(node) = self.nodes.at(number) {
                node.next = next;
            }
        }
        for number in 0..self.places() {
            pace.step(held);
            let mut next = self.nodes.at(number).filter(|node| node.info.refs > 1).map(|node| node.info.id);
            while let Some(node) = next.and_then(|id| self.nodes.find(id)).filter(|node| !node.shared) {
                node.shared = true;
                next = node.shadows();
                pace.step(held);
            }
        }
    }

    /// Counts the maps that see each object, then gives each its part.
    fn count<const OUTER: u8>(
        &mut self,
        views: Vec<Vec<ObjectId>>,
        pace: &mut Pace<'_, OUTER>,
        held: &mut Held<'_, OUTER>,
    ) {
        let Self { nodes, holdings, walks, unseen, .. } = self;
        for (tops, &(name, _)) in views.iter().zip(&*holdings) {
            *walks += 1;
            nodes.walk(*walks, tops, pace, held, |node| node.maps += 1);
            for &top in tops {
                nodes.find(top).into_iter().for_each(|node| node.enter(name));
                pace.step(held);
            }
        }
        // Each list is given up as soon as it is done with: thousands at once would take long.
        for (tops, (_, holding)) in views.into_iter().zip(holdings) {
            *walks += 1;
            nodes.walk(*walks, &tops, pace, held, |node| holding.add(node));
        }
        for node in &nodes.0 {
            if let Some(node) = node.as_ref().filter(|node| node.maps == 0) {
                unseen.resident += u64::from(node.info.counts.resident);
                unseen.swapped += u64::from(node.info.counts.swapped);
            }
            pace.step(held);
        }
    }

    /// The object with each number, if there is one.
    pub fn objects(&self) -> impl Iterator<Item = Option<&Node>> {
        self.nodes.0.iter().map(Option::as_ref)
    }

    /// What each map sees, by its name, in the order in which they were given.
    pub fn holdings(&self) -> impl Iterator<Item = (u32, Holding)> {
        self.holdings.iter().copied()
    }

    /// Shows each object to `each`, or each that a map sees which has entries of these, and how deep in the tree it is:
    /// what is shadowed before what shadows it, and otherwise in the order of their numbers.
    pub fn draw<const OUTER: u8>(
        &mut self,
        tops: Option<&[ObjectId]>,
        rest: Rest<'_, OUTER>,
        held: &mut Held<'_, OUTER>,
        mut each: impl FnMut(&Node, usize, &mut Held<'_, OUTER>),
    ) {
        let pace = &mut Pace(rest, 0);
        self.walks += 1;
        self.nodes.walk(self.walks, tops.unwrap_or_default(), pace, held, |_| ());
        // Down, or else on, or else up and on: without a stack, for a chain may be thousands long.
        let (mut at, mut depth, mut risen) = (self.first, 0, false);
        while let Some(node) = at.and_then(|number| self.nodes.at(number)).copied() {
            let enters = !risen && (tops.is_none() || node.walk == self.walks);
            if enters {
                each(&node, depth, held);
            }
            (at, depth, risen) = match node.first.filter(|_| enters) {
                first @ Some(_) => (first, depth + 1, false),
                None if node.next.is_some() => (node.next, depth, false),
                None => (
                    node.shadows().filter(|_| depth > 0).map(ObjectId::number),
                    depth.saturating_sub(1),
                    true,
                ),
            };
            pace.step(held);
        }
    }
}
