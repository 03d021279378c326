//! Which objects a family of copies should have at rest, from what they are for alone.
//!
//! Every member holds an object. An object knows some pages and shadows at most one other. At rest there is no
//! object that nobody needs: one that a single other shadows is part of that one; one all of whose pages are hidden
//! is passed over; a page that nobody sees is not there. Written as rules that are applied until none applies.

use std::collections::BTreeMap;

/// What an object should know of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cell {
    Absent,
    Zero,
    Data,
}

pub(crate) const PAGES: usize = 6;

#[derive(Clone, Debug)]
struct Node {
    below: Option<u32>,
    cells: [Cell; PAGES],
}

/// A family.
#[derive(Clone, Debug, Default)]
pub(crate) struct Family {
    nodes: BTreeMap<u32, Node>,
    /// For each member: its object, and whether that must be shadowed before it changes.
    members: BTreeMap<usize, (u32, bool)>,
    next: u32,
}

impl Family {
    fn make(&mut self, below: Option<u32>) -> u32 {
        self.next += 1;
        self.nodes.insert(self.next, Node { below, cells: [Cell::Absent; PAGES] });
        self.next
    }

    /// A member with memory of its own.
    pub(crate) fn found(&mut self, member: usize) {
        let node = self.make(None);
        self.members.insert(member, (node, false));
    }

    /// A member that has what another one has.
    pub(crate) fn copy(&mut self, from: usize, member: usize) {
        let of = self.members.get_mut(&from).expect("a member");
        of.1 = true;
        let node = of.0;
        self.members.insert(member, (node, true));
    }

    /// A member changes a page: a discarded one is a mark if there is something to hide.
    pub(crate) fn change(&mut self, member: usize, page: usize, discard: bool) {
        let (mut node, needs_copy) = self.members[&member];
        if needs_copy && self.referrers(node) > 1 {
            node = self.make(Some(node));
        }
        self.members.insert(member, (node, false));
        let node = self.nodes.get_mut(&node).expect("an object");
        node.cells[page] = match (discard, node.below) {
            (false, _) => Cell::Data,
            (true, Some(_)) => Cell::Zero,
            (true, None) => Cell::Absent,
        };
    }

    /// A member ends.
    pub(crate) fn end(&mut self, member: usize) {
        self.members.remove(&member);
    }

    fn referrers(&self, node: u32) -> usize {
        let members = self.members.values().filter(|(held, _)| *held == node).count();
        members + self.children(node).count()
    }

    fn children(&self, node: u32) -> impl Iterator<Item = u32> + '_ {
        self.nodes.iter().filter(move |(_, other)| other.below == Some(node)).map(|(&child, _)| child)
    }

    fn is_seen(&self, node: u32, page: usize) -> bool {
        let held = self.members.values().any(|(held, _)| *held == node);
        let open = |child: &u32| self.nodes[child].cells[page] == Cell::Absent;
        held || self.children(node).filter(open).any(|child| self.is_seen(child, page))
    }

    /// Nothing is left to do.
    pub(crate) fn rest(&mut self) {
        while self.step() {}
    }

    fn step(&mut self) -> bool {
        for number in self.nodes.keys().copied().collect::<Vec<_>>() {
            if self.referrers(number) == 0 {
                self.nodes.remove(&number);
                return true;
            }
            let hidden = |page: &usize| {
                self.nodes[&number].cells[*page] != Cell::Absent && !self.is_seen(number, *page)
            };
            if let Some(page) = (0..PAGES).find(hidden) {
                self.nodes.get_mut(&number).expect("an object").cells[page] = Cell::Absent;
                return true;
            }
            let Some(below) = self.nodes[&number].below else { continue };
            let theirs = self.nodes[&below].clone();
            let alone = self.referrers(below) == 1;
            let ours = self.nodes.get_mut(&number).expect("an object");
            if alone {
                for (cell, from) in ours.cells.iter_mut().zip(theirs.cells) {
                    *cell = if *cell == Cell::Absent { from } else { *cell };
                }
            }
            let shows = |(ours, theirs): (&Cell, &Cell)| *ours == Cell::Absent && *theirs != Cell::Absent;
            if alone || !ours.cells.iter().zip(&theirs.cells).any(shows) {
                ours.below = theirs.below.filter(|_| alone || ours.cells.contains(&Cell::Absent));
                if ours.below.is_none() {
                    // Nothing is left for a mark to hide.
                    ours.cells.iter_mut().filter(|cell| **cell == Cell::Zero).for_each(|c| *c = Cell::Absent);
                }
                return true;
            }
        }
        false
    }

    /// How many objects there are, and pages in all of them.
    pub(crate) fn size(&self) -> (usize, usize) {
        (self.nodes.len(), self.nodes.values().map(pages).sum())
    }

    /// How many objects a member looks through, and pages in its own.
    pub(crate) fn of(&self, member: usize) -> (usize, usize) {
        let own = self.members[&member].0;
        let depth = std::iter::successors(Some(own), |node| self.nodes[node].below).count();
        (depth, pages(&self.nodes[&own]))
    }
}

fn pages(node: &Node) -> usize {
    node.cells.iter().filter(|cell| **cell == Cell::Data).count()
}
