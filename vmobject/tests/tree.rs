//! The objects as a tree, and whose share of them is what: each page is some map's or no map's, and nobody's twice.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use vmobject::VmError;
use vmobject::describe::{Pages, Tree};
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::prot::Prot;
use vmobject::store::StoreId;
use vmobject::testing::{Rig, TestMap, at};

fn look(rig: &Rig, maps: &[&TestMap]) -> Tree {
    let maps = maps.iter().map(|&map| (map.number(), map.clone()));
    rig.vm.object_tree(maps, &|_| (), &mut Held::root()).unwrap()
}

/// All pages of all objects.
fn all(rig: &Rig) -> Pages {
    let mut all = Pages::default();
    rig.vm.for_each_object(&mut Held::root(), |object| {
        all.resident += u64::from(object.counts.resident);
        all.swapped += u64::from(object.counts.swapped);
    });
    all
}

/// The shares in frames of all maps; with those in swap and what no map sees they are everything (T1).
fn shares(rig: &Rig, maps: &[&TestMap]) -> Vec<u64> {
    let tree = look(rig, maps);
    let mut sum = tree.unseen;
    for (_, holding) in tree.holdings() {
        sum.resident += holding.share.resident;
        sum.swapped += holding.share.swapped;
    }
    assert_eq!(sum, all(rig));
    tree.holdings().map(|(_, holding)| holding.share.resident).collect()
}

/// What is drawn: depth, and pages in frames.
fn drawn(rig: &Rig, maps: &[&TestMap], of: Option<&TestMap>) -> Vec<(usize, u32)> {
    let (mut drawn, held) = (Vec::new(), &mut Held::root());
    let tops = of.map(|map| rig.vm.tops(map, held).unwrap());
    look(rig, maps).draw(tops.as_deref(), &|_| (), held, |node, depth, _| {
        drawn.push((depth, node.info.counts.resident));
    });
    drawn
}

/// A parent that wrote twelve pages and then one, a child that wrote two, another that wrote three, and the latter's
/// child, which wrote four.
fn family(rig: &Rig) -> [TestMap; 4] {
    let parent = rig.guest(16);
    rig.fill(&parent, 0..12);
    let (child, second) = (rig.clone(&parent), rig.clone(&parent));
    rig.fill(&parent, 0..1);
    rig.fill(&child, 1..3);
    rig.fill(&second, 3..6);
    let grandchild = rig.clone(&second);
    rig.fill(&grandchild, 6..10);
    rig.settle();
    [parent, child, second, grandchild]
}

#[test]
fn a_family_divides_what_it_shares_and_each_has_its_own_alone() {
    let rig = Rig::new(128);
    let [parent, child, second, grandchild] = family(&rig);
    let maps = [&parent, &child, &second, &grandchild];
    // Twelve for four; the second child's three for itself and its child, the odd one for who comes first.
    assert_eq!(shares(&rig, &maps), [3 + 1, 3 + 2, 3 + 2, 3 + 1 + 4]);
    let tree = look(&rig, &maps);
    let all: Vec<_> = tree.holdings().map(|(_, holding)| (holding.private, holding.shared)).collect();
    assert_eq!(all, [(1, 12), (2, 12), (0, 15), (4, 15)]);
    assert_eq!(tree.unseen, Pages::default());
    let seen_by = |resident: u32| {
        let found = tree.objects().flatten().find(|node| node.info.counts.resident == resident);
        found.map(|node| (node.maps, node.names().collect::<Vec<_>>())).unwrap()
    };
    assert_eq!(seen_by(12), (4, vec![]));
    assert_eq!(seen_by(2), (1, vec![child.number()]));
    assert_eq!(seen_by(3).0, 2);
    // Whoever is named first takes what cannot be divided.
    assert_eq!(shares(&rig, &[&grandchild, &second, &child, &parent]), [3 + 2 + 4, 3 + 1, 3 + 2, 3 + 1]);
    rig.check();
}

#[test]
fn what_is_shadowed_is_drawn_once_and_above_all_that_shadow_it() {
    let rig = Rig::new(128);
    let [parent, child, second, grandchild] = family(&rig);
    let maps = [&parent, &child, &second, &grandchild];
    let mut lines = drawn(&rig, &maps, None);
    assert_eq!(lines.first(), Some(&(0, 12)), "{lines:?}");
    let place = |wanted| lines.iter().position(|&line| line == wanted).unwrap();
    assert_eq!(
        lines[place((1, 3)) + 1],
        (2, 4),
        "the grandchild's lies right under what it shadows: {lines:?}"
    );
    lines.sort_unstable();
    assert_eq!(lines, [(0, 12), (1, 1), (1, 2), (1, 3), (2, 4)]);
    assert_eq!(drawn(&rig, &maps, Some(&child)), [(0, 12), (1, 2)]);
    assert_eq!(drawn(&rig, &maps, Some(&grandchild)), [(0, 12), (1, 3), (2, 4)]);
    let mut text = String::new();
    let maps = maps.map(|map| (map.number(), map.clone()));
    rig.vm.describe_objects(maps, &mut text, &mut Held::root()).unwrap();
    assert!(text.contains("12/4") && text.contains("3/2") && text.contains("\n.."), "{text}");
}

#[test]
fn the_shares_of_relatives_that_end_go_to_those_that_live() {
    let rig = Rig::new(128);
    let [parent, child, second, grandchild] = family(&rig);
    rig.destroy(child);
    assert_eq!(shares(&rig, &[&parent, &second, &grandchild]), [4 + 1, 4 + 2, 4 + 1 + 4]);
    rig.destroy(parent);
    // Nobody but the second and its child sees the twelve now, which were merged with the three, and three were hidden.
    assert_eq!(shares(&rig, &[&second, &grandchild]), [6, 6 + 4]);
    rig.destroy(second);
    assert_eq!(shares(&rig, &[&grandchild]), [all(&rig).resident]);
    rig.destroy(grandchild);
    assert_eq!(all(&rig), Pages::default());
}

#[test]
fn what_only_a_snapshot_or_the_cache_has_is_no_maps_share() {
    let rig = Rig::new(128);
    let (guest, held) = (rig.guest(16), &mut Held::root());
    rig.fill(&guest, 0..8);
    let kept = rig.vm.snapshot(&guest, held).unwrap();
    assert_eq!(look(&rig, &[&guest]).unseen.resident, 0);
    assert!(
        look(&rig, &[&guest]).objects().flatten().all(|node| node.shared),
        "the snapshot reaches it, too"
    );
    rig.destroy(guest);
    assert_eq!(shares(&rig, &[]), []);
    assert_eq!(look(&rig, &[]).unseen.resident, 8);
    rig.vm.delete_snapshot(kept, held);
    rig.settle();
}

#[test]
fn pages_in_swap_are_divided_as_well() {
    let rig = Rig::with_swap(128, 64);
    let parent = rig.guest(16);
    rig.fill(&parent, 0..11);
    let clone = rig.clone(&parent);
    rig.page_out_all();
    let tree = look(&rig, &[&parent, &clone]);
    let swapped: Vec<_> = tree.holdings().map(|(_, holding)| (holding.swapped, holding.share)).collect();
    let part = |swapped| Pages { resident: 0, swapped };
    assert_eq!(swapped, [(11, part(6)), (11, part(5))]);
    assert_eq!(shares(&rig, &[&parent, &clone]), [0, 0]);
}

#[test]
fn a_map_with_two_ways_to_an_object_has_one_part_of_it() {
    let rig = Rig::new(128);
    rig.vm.machine().store.add(StoreId(3), vec![9; 4 << 12]);
    let (map, other, held) = (rig.map(), rig.map(), &mut Held::root());
    for (map, page) in [(&map, 0), (&map, 8), (&other, 0)] {
        let image = rig.vm.image(StoreId(3), held).unwrap();
        assert_eq!(rig.put(map, page, 4, image, 0, Prot::ALL, Share::Copy), Ok(()));
    }
    for page in 0..4 {
        rig.load(&map, at(page, 0)).unwrap();
    }
    rig.fill(&map, 8..9);
    assert_eq!(shares(&rig, &[&map, &other]), [2 + 1, 2]);
}

#[test]
fn whatever_happens_while_it_rests_the_shares_are_all_that_was_seen() {
    for moment in 0.. {
        let rig = Rig::new(256);
        let mut maps = vec![rig.guest(16)];
        for page in 0..20 {
            rig.fill(maps.last().unwrap(), page % 16..page % 16 + 1);
            maps.push(rig.clone(maps.last().unwrap()));
        }
        // Objects end, are merged, and others take their places.
        let (named, deeds) = (maps.clone(), core::cell::Cell::new(0));
        let maps = core::cell::RefCell::new(maps);
        let rest = |_: &mut Held<'_, 0>| {
            deeds.set(deeds.get() + 1);
            if deeds.get() == moment {
                let mut maps = maps.borrow_mut();
                (0..7).for_each(|_| rig.destroy(maps.remove(3)));
                rig.fill(&maps[2], 0..5);
                let clone = rig.clone(&maps[3]);
                rig.fill(&clone, 2..4);
                maps.push(clone);
            }
        };
        let named = named.into_iter().map(|map| (map.number(), map));
        let tree = rig.vm.object_tree(named, &rest, &mut Held::root()).unwrap();
        let seen: u64 = tree.objects().flatten().map(|node| u64::from(node.info.counts.resident)).sum();
        let shares: u64 = tree.holdings().map(|(_, holding)| holding.share.resident).sum();
        assert_eq!(shares + tree.unseen.resident, seen, "rest {moment}");
        rig.check();
        if deeds.get() < moment {
            break;
        }
    }
}

#[test]
fn the_caller_rests_again_and_again_while_a_long_chain_is_counted() -> Result<(), VmError> {
    let rig = Rig::new(256);
    let mut maps = vec![rig.guest(16)];
    for page in 0..40 {
        rig.fill(maps.last().unwrap(), page % 16..page % 16 + 1);
        maps.push(rig.clone(maps.last().unwrap()));
    }
    let rests = core::cell::Cell::new(0);
    let named = maps.iter().map(|map| (map.number(), map.clone()));
    let rest = |_: &mut Held<'_, 0>| rests.set(rests.get() + 1);
    let mut tree = rig.vm.object_tree(named, &rest, &mut Held::root())?;
    let steps: u64 = tree.objects().flatten().map(|node| u64::from(node.maps)).sum();
    assert!(rests.get() >= 2 * steps / 8, "{} rests in {steps} steps", rests.get());
    let mut deepest = 0;
    tree.draw(None, &rest, &mut Held::root(), |_, depth, _| deepest = deepest.max(depth));
    assert!(deepest >= 39, "{deepest}");
    assert_eq!(shares(&rig, &maps.iter().collect::<Vec<_>>()).iter().sum::<u64>(), all(&rig).resident);
    Ok(())
}
