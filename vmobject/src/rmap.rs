//! The reverse map's structure: who shadows an object, and which maps have it (DESIGN 9).
//!
//! A frame knows its object and index; this says how to go on from there to every leaf that may reach it,
//! at no cost per mapping: shadows are a tree of siblings, entries of maps hang on their object. A walk
//! for one page skips every subtree whose window does not contain it.
//!
//! One lock guards all of it, because an eviction walks many objects at once; a fault that finds its page
//! never takes it. Whoever changes an object's shadow or an entry's object changes this too, under the
//! lock that guards those. Called by `object`, `map`, `pageout`. `H` is what holds a mapping: a map.
//!
//! # Invariants
//! R1. An object's node has the parent, offset and limit that its state's shadow has.
//! R2. Each entry of a map has one mapping, on the object that the entry names; it writes if the entry allows
//!     that and is not to be copied first.

use alloc::vec::Vec;
use core::ops::Range;

use crate::VmError;
use crate::addr::{Ipa, PageIndex};

const NIL: u32 = u32::MAX;

/// One object in the tree of shadows.
#[derive(Clone, Copy, Debug)]
struct Node {
    parent: u32,
    /// Which page of the parent our first one shadows, and how many of ours shadow anything.
    offset: u32,
    limit: u32,
    first_child: u32,
    next: u32,
    prev: u32,
    children: u32,
    first_mapping: u32,
    mappings: u32,
}

impl Node {
    const EMPTY: Self = Self {
        parent: NIL,
        offset: 0,
        limit: 0,
        first_child: NIL,
        next: NIL,
        prev: NIL,
        children: 0,
        first_mapping: NIL,
        mappings: 0,
    };
}

/// Names a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingId(u32);

/// An entry of a map, as seen from its object.
#[derive(Clone, Debug)]
pub struct Mapping<H> {
    /// Whose entry it is.
    pub holder: H,
    /// Where it starts.
    pub at: Ipa,
    /// The object's page there.
    pub first: PageIndex,
    /// How many.
    pub pages: u32,
    /// The object may be changed through it.
    pub writes: bool,
    object: u32,
    next: u32,
    prev: u32,
}

impl<H> Mapping<H> {
    /// Where a page of the object is seen, if it is.
    fn address(&self, page: PageIndex) -> Option<Ipa> {
        let inside = page.checked_sub(self.first.number()).filter(|inside| inside.number() < self.pages)?;
        self.at.checked_add(inside.byte_offset())
    }
}

/// What shows a page of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Looker {
    /// A mapping, and where its part of the object ends.
    Map {
        /// The first page behind it.
        end: PageIndex,
    },
    /// A shadow, if it has not the page itself.
    Shadow(u32),
    /// Nothing.
    Nobody,
}

/// Who shadows and who maps each object.
pub struct Links<H> {
    nodes: Vec<Node>,
    mappings: Vec<Option<Mapping<H>>>,
    vacant: Vec<u32>,
    version: u64,
    unhung: u64,
}

impl<H> Default for Links<H> {
    fn default() -> Self {
        Self::new()
    }
}

impl<H> Links<H> {
    /// Nobody.
    pub const fn new() -> Self {
        Self { nodes: Vec::new(), mappings: Vec::new(), vacant: Vec::new(), version: 0, unhung: 0 }
    }

    /// Bytes that all of it takes.
    pub fn bytes(&self) -> usize {
        let mappings = self.mappings.capacity() * size_of::<Option<Mapping<H>>>();
        let vacant = self.vacant.capacity() * size_of::<u32>();
        self.nodes.capacity() * size_of::<Node>() + mappings + vacant
    }

    /// Makes room for an object of this number.
    pub fn make_room(&mut self, object: u32) -> Result<(), VmError> {
        let wanted = object as usize + 1;
        if let Some(more) = wanted.checked_sub(self.nodes.len()) {
            self.nodes.try_reserve(more).map_err(|_| VmError::NoMemory)?;
            self.nodes.resize(wanted, Node::EMPTY);
        }
        Ok(())
    }

    fn node(&self, object: u32) -> &Node {
        &self.nodes[object as usize]
    }

    fn node_mut(&mut self, object: u32) -> &mut Node {
        &mut self.nodes[object as usize]
    }

    /// `child` shadows `parent` from now on: `limit` of its pages, from `offset` on.
    pub fn adopt(&mut self, child: u32, parent: u32, offset: PageIndex, limit: u32) {
        debug_assert_eq!(self.node(child).parent, NIL);
        let first = self.node(parent).first_child;
        let node = self.node_mut(child);
        (node.parent, node.offset, node.limit) = (parent, offset.number(), limit);
        (node.prev, node.next) = (NIL, first);
        if first != NIL {
            self.node_mut(first).prev = child;
        }
        let above = self.node_mut(parent);
        above.first_child = child;
        above.children += 1;
        self.version += 1;
    }

    /// `child` shadows nothing any more.
    pub fn orphan(&mut self, child: u32) {
        let Node { parent, prev, next, .. } = *self.node(child);
        if parent == NIL {
            return;
        }
        match prev {
            NIL => self.node_mut(parent).first_child = next,
            prev => self.node_mut(prev).next = next,
        }
        if next != NIL {
            self.node_mut(next).prev = prev;
        }
        self.node_mut(parent).children -= 1;
        self.version += 1;
        let node = self.node_mut(child);
        (node.parent, node.prev, node.next, node.offset, node.limit) = (NIL, NIL, NIL, 0, 0);
    }

    /// What an object shadows, with offset and limit.
    pub fn parent(&self, object: u32) -> Option<(u32, PageIndex, u32)> {
        let node = self.nodes.get(object as usize)?;
        (node.parent != NIL).then_some((node.parent, PageIndex::new(node.offset), node.limit))
    }

    /// The one shadow of an object that nothing else refers to by a shadow or a mapping.
    pub fn only_child(&self, object: u32) -> Option<u32> {
        let node = self.node(object);
        (node.children == 1 && node.mappings == 0).then_some(node.first_child)
    }

    /// The parts of an object that its mappings show.
    fn mapped(&self, object: u32) -> impl Iterator<Item = Range<u32>> + '_ {
        let at = |place: u32| self.mappings.get(place as usize).and_then(Option::as_ref);
        let first = self.nodes.get(object as usize).and_then(|node| at(node.first_mapping));
        core::iter::successors(first, move |mapping| at(mapping.next)).map(|mapping| {
            let first = mapping.first.number();
            first..first.saturating_add(mapping.pages)
        })
    }

    /// True if one mapping shows all of an object of so many pages.
    pub fn is_mapped_whole(&self, object: u32, pages: u32) -> bool {
        self.mapped(object).any(|window| window.start == 0 && window.end >= pages)
    }

    /// One that shows a page of an object: a mapping before a shadow.
    pub fn looker(&self, object: u32, page: PageIndex) -> Looker {
        if let Some(window) = self.mapped(object).find(|window| window.contains(&page.number())) {
            return Looker::Map { end: PageIndex::new(window.end) };
        }
        let first = self.nodes.get(object as usize).map_or(NIL, |node| node.first_child);
        self.first_in(first, page.number()).map_or(Looker::Nobody, |(child, _)| Looker::Shadow(child))
    }

    /// The shadow of the same object after this one that shows a page of it.
    pub fn next_looker(&self, child: u32, page: PageIndex) -> Option<u32> {
        self.first_in(self.node(child).next, page.number()).map(|(sibling, _)| sibling)
    }

    /// The shadows of an object.
    pub fn children(&self, object: u32) -> impl Iterator<Item = u32> + '_ {
        let first = self.nodes.get(object as usize).map_or(NIL, |node| node.first_child);
        core::iter::successors((first != NIL).then_some(first), |&child| self.next_sibling(child))
    }

    /// The shadow of the same object that comes after this one.
    pub fn next_sibling(&self, child: u32) -> Option<u32> {
        let next = self.node(child).next;
        (next != NIL).then_some(next)
    }

    /// Changes whenever any object gains or loses a shadow.
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// Changes whenever a walk that is under way could miss something: when an object gains or loses a
    /// shadow, or loses a mapping or a part of one. A mapping that is new has no leaves yet.
    pub const fn stamp(&self) -> (u64, u64) {
        (self.version, self.unhung)
    }

    /// The mapping of an object after this one, or the first, that has a page of it; the page's address.
    pub fn next_mapping(
        &self,
        object: u32,
        after: Option<MappingId>,
        page: PageIndex,
    ) -> Option<(MappingId, &Mapping<H>, Ipa)> {
        let mut place = match after {
            Some(MappingId(place)) => self.mappings.get(place as usize)?.as_ref()?.next,
            None => self.nodes.get(object as usize)?.first_mapping,
        };
        while let Some(mapping) = self.mappings.get(place as usize).and_then(Option::as_ref) {
            if let Some(at) = mapping.address(page) {
                return Some((MappingId(place), mapping, at));
            }
            place = mapping.next;
        }
        None
    }

    /// What holds the mappings of an object, one by one.
    pub fn holders(&self, object: u32) -> impl Iterator<Item = &H> + '_ {
        let at = |place: u32| self.mappings.get(place as usize).and_then(Option::as_ref);
        let first = self.nodes.get(object as usize).and_then(|node| at(node.first_mapping));
        core::iter::successors(first, move |mapping| at(mapping.next)).map(|mapping| &mapping.holder)
    }

    /// How many shadows and how many mappings an object has.
    pub fn counts(&self, object: u32) -> (u32, u32) {
        self.nodes.get(object as usize).map_or((0, 0), |node| (node.children, node.mappings))
    }

    /// Notes an entry of a map.
    pub fn attach(
        &mut self,
        holder: H,
        object: u32,
        at: Ipa,
        first: PageIndex,
        pages: u32,
        writes: bool,
    ) -> Result<MappingId, VmError> {
        let place = match self.vacant.pop() {
            Some(place) => place,
            None => {
                let place = u32::try_from(self.mappings.len()).map_err(|_| VmError::Limit("mappings"))?;
                self.mappings.try_reserve(1).map_err(|_| VmError::NoMemory)?;
                let room = (self.mappings.len() + 1).saturating_sub(self.vacant.len());
                self.vacant.try_reserve(room).map_err(|_| VmError::NoMemory)?;
                self.mappings.push(None);
                place
            }
        };
        let mapping = Mapping { holder, at, first, pages, writes, object, next: NIL, prev: NIL };
        self.mappings[place as usize] = Some(mapping);
        self.hang(place, object);
        Ok(MappingId(place))
    }

    /// An entry is cut after so many pages: what is behind them has a mapping of its own.
    pub fn cut(&mut self, id: MappingId, pages: u32) -> Result<MappingId, VmError>
    where
        H: Clone,
    {
        let Mapping { holder, at, first, pages: all, writes, object, .. } = self.mapping_mut(id.0).clone();
        let rest = all.checked_sub(pages).ok_or(VmError::Range)?;
        let (at, first) = (at.checked_add(PageIndex::new(pages).byte_offset()), first.checked_add(pages));
        let (at, first) = at.zip(first).ok_or(VmError::Range)?;
        let behind = self.attach(holder, object, at, first, rest, writes)?;
        self.mapping_mut(id.0).pages = pages;
        self.unhung += 1; // a walk may be past where the leaves are known now
        Ok(behind)
    }

    /// An entry and its object reach further by so many pages.
    pub fn grow(&mut self, mapping: MappingId, pages: u32) {
        self.mapping_mut(mapping.0).pages += pages;
    }

    fn mapping_mut(&mut self, place: u32) -> &mut Mapping<H> {
        match &mut self.mappings[place as usize] {
            Some(mapping) => mapping,
            None => unreachable!("a mapping that was given back"),
        }
    }

    fn hang(&mut self, place: u32, object: u32) {
        let first = self.node(object).first_mapping;
        let mapping = self.mapping_mut(place);
        (mapping.object, mapping.prev, mapping.next) = (object, NIL, first);
        if first != NIL {
            self.mapping_mut(first).prev = place;
        }
        let node = self.node_mut(object);
        node.first_mapping = place;
        node.mappings += 1;
    }

    fn unhang(&mut self, place: u32) {
        let mapping = self.mapping_mut(place);
        let (object, prev, next) = (mapping.object, mapping.prev, mapping.next);
        match prev {
            NIL => self.node_mut(object).first_mapping = next,
            prev => self.mapping_mut(prev).next = next,
        }
        if next != NIL {
            self.mapping_mut(next).prev = prev;
        }
        self.node_mut(object).mappings -= 1;
        self.unhung += 1;
    }

    /// The entry names another object now, from another page on.
    pub fn rehang(&mut self, id: MappingId, object: u32, first: PageIndex) {
        self.unhang(id.0);
        self.mapping_mut(id.0).first = first;
        self.hang(id.0, object);
    }

    /// The object may be changed through the entry from now on, or not any more.
    pub fn set_writes(&mut self, id: MappingId, writes: bool) {
        self.mapping_mut(id.0).writes = writes;
    }

    /// True if pages of an object may be changed through another entry than this one.
    pub fn is_written(&self, object: u32, besides: Option<MappingId>, pages: Range<u32>) -> bool {
        let at = |place: u32| self.mappings.get(place as usize)?.as_ref().map(|mapping| (place, mapping));
        let first = self.nodes.get(object as usize).and_then(|node| at(node.first_mapping));
        let mut all = core::iter::successors(first, |(_, mapping)| at(mapping.next));
        let shows = |mapping: &Mapping<H>| {
            let first = mapping.first.number();
            first < pages.end && pages.start < first.saturating_add(mapping.pages)
        };
        all.any(|(place, mapping)| mapping.writes && besides != Some(MappingId(place)) && shows(mapping))
    }

    /// The entry is gone.
    pub fn detach(&mut self, id: MappingId) {
        self.unhang(id.0);
        self.mappings[id.0 as usize] = None;
        self.vacant.push(id.0);
    }

    /// A mapping, and the number of the object that it is on.
    pub fn mapping(&self, id: MappingId) -> Option<(&Mapping<H>, u32)> {
        let mapping = self.mappings.get(id.0 as usize)?.as_ref()?;
        Some((mapping, mapping.object))
    }

    /// Shows to `each` every entry through which a page of an object may be seen, with the address: those
    /// of the object itself and of all that shadow it, however indirectly.
    pub fn walk(&self, object: u32, page: PageIndex, mut each: impl FnMut(&Mapping<H>, Ipa)) {
        let (mut here, mut at) = (object, page);
        loop {
            self.show(here, at.number(), &mut each);
            match self.next_in_walk(object, here, at, true) {
                Some(next) => (here, at) = next,
                None => return,
            }
        }
    }

    /// The object after `here` on a walk over all that shadow page `page` of `root`, and the page that it
    /// is there; `at` is the page of `here`. With `open` false the shadows of `here` are left out.
    pub fn next_in_walk(
        &self,
        root: u32,
        mut here: u32,
        at: PageIndex,
        open: bool,
    ) -> Option<(u32, PageIndex)> {
        let mut page = at.number();
        if open && let Some(child) = self.first_in(self.node(here).first_child, page) {
            return Some(child);
        }
        while here != root {
            let node = self.node(here);
            let above = page.checked_add(node.offset)?;
            if let Some(sibling) = self.first_in(node.next, above) {
                return Some(sibling);
            }
            (here, page) = (node.parent, above);
        }
        None
    }

    /// The first of a row of siblings that shadows page `page` of their parent, with its own page there.
    fn first_in(&self, mut sibling: u32, page: u32) -> Option<(u32, PageIndex)> {
        while sibling != NIL {
            let node = self.node(sibling);
            if let Some(own) = page.checked_sub(node.offset).filter(|&own| own < node.limit) {
                return Some((sibling, PageIndex::new(own)));
            }
            sibling = node.next;
        }
        None
    }

    /// Shows to `each` every part of an entry through which a page of a range of an object may be seen, with
    /// its address and how many pages it is. What an object between them hides is shown, too.
    pub fn walk_range(&self, root: u32, range: Range<u32>, mut each: impl FnMut(&Mapping<H>, Ipa, u32)) {
        // `here`'s page `n` is the root's page `n + shift`.
        let (mut here, mut shift) = (root, 0i64);
        let at = |shift: i64| {
            let back = |page: u32| u32::try_from((i64::from(page) - shift).max(0)).unwrap_or(u32::MAX);
            back(range.start)..back(range.end)
        };
        let sees = |mut sibling: u32, pages: &Range<u32>| {
            while sibling != NIL {
                let node = self.node(sibling);
                if node.offset < pages.end && pages.start < node.offset.saturating_add(node.limit) {
                    break;
                }
                sibling = node.next;
            }
            sibling
        };
        loop {
            let pages = at(shift);
            let mut place = self.node(here).first_mapping;
            while let Some(mapping) = self.mappings.get(place as usize).and_then(Option::as_ref) {
                let first = pages.start.max(mapping.first.number());
                let end = pages.end.min(mapping.first.number().saturating_add(mapping.pages));
                if first < end
                    && let Some(address) = mapping.address(PageIndex::new(first))
                {
                    each(mapping, address, end - first);
                }
                place = mapping.next;
            }
            let mut next = sees(self.node(here).first_child, &pages);
            while next == NIL {
                if here == root {
                    return;
                }
                let node = self.node(here);
                shift -= i64::from(node.offset);
                next = sees(node.next, &at(shift));
                here = node.parent;
            }
            here = next;
            shift += i64::from(self.node(here).offset);
        }
    }

    fn show(&self, object: u32, page: u32, each: &mut impl FnMut(&Mapping<H>, Ipa)) {
        let mut place = None;
        while let Some((id, mapping, at)) = self.next_mapping(object, place, PageIndex::new(page)) {
            each(mapping, at);
            place = Some(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn seen(links: &Links<u32>, object: u32, page: u32) -> Vec<(u32, u64)> {
        let mut seen = Vec::new();
        links.walk(object, PageIndex::new(page), |m, at| seen.push((m.holder, at.bits() >> 12)));
        seen.sort_unstable();
        seen
    }

    fn tree() -> Links<u32> {
        // 0 is shadowed by 1 (pages 10..20) and 2 (all); 1 by 3 (its pages 5..).
        let mut links = Links::new();
        links.make_room(3).unwrap();
        links.adopt(1, 0, PageIndex::new(10), 10);
        links.adopt(2, 0, PageIndex::new(0), 100);
        links.adopt(3, 1, PageIndex::new(5), 5);
        for (holder, object) in [(20, 2), (30, 3), (31, 3)] {
            links.attach(holder, object, Ipa::new(0x10_0000), PageIndex::new(0), 100, true).unwrap();
        }
        links
    }

    #[test]
    fn a_walk_finds_every_map_through_every_window_and_no_other() {
        let links = tree();
        assert_eq!(seen(&links, 0, 3), [(20, 0x103)]);
        assert_eq!(seen(&links, 0, 14), [(20, 0x10e)]);
        assert_eq!(seen(&links, 0, 17), [(20, 0x111), (30, 0x102), (31, 0x102)]);
        assert_eq!(seen(&links, 1, 5), [(30, 0x100), (31, 0x100)]);
        assert_eq!(seen(&links, 3, 200), []);
    }

    #[test]
    fn a_walk_over_a_range_shows_of_each_entry_the_part_that_may_see_it() {
        let links = tree();
        let parts = |object, range| {
            let mut parts = Vec::new();
            links.walk_range(object, range, |m, at, pages| parts.push((m.holder, at.bits() >> 12, pages)));
            parts.sort_unstable();
            parts
        };
        assert_eq!(parts(0, 3..5), [(20, 0x103, 2)]);
        assert_eq!(parts(0, 14..18), [(20, 0x10e, 4), (30, 0x100, 3), (31, 0x100, 3)]);
        assert_eq!(parts(1, 6..7), [(30, 0x101, 1), (31, 0x101, 1)]);
        assert_eq!(parts(2, 98..200), [(20, 0x162, 2)]);
        assert_eq!(parts(2, 100..200), []);
    }

    #[test]
    fn an_orphan_is_found_from_below_no_more_and_its_siblings_are() {
        let mut links = tree();
        links.orphan(1);
        assert_eq!(seen(&links, 0, 17), [(20, 0x111)]);
        assert_eq!(links.only_child(0), Some(2));
        assert_eq!(links.parent(1), None);
        links.orphan(2);
        assert_eq!(links.counts(0), (0, 0));
    }

    #[test]
    fn a_mapping_moves_with_its_entry_and_its_place_is_used_again() {
        let mut links: Links<u32> = Links::new();
        links.make_room(1).unwrap();
        let id = links.attach(7, 0, Ipa::new(0), PageIndex::new(4), 4, true).unwrap();
        links.rehang(id, 1, PageIndex::new(0));
        assert_eq!((links.counts(0), links.counts(1)), ((0, 0), (0, 1)));
        assert_eq!(seen(&links, 1, 3), vec![(7, 3)]);
        links.detach(id);
        assert_eq!(links.attach(8, 0, Ipa::new(0), PageIndex::new(0), 1, true).unwrap(), id);
    }
}
