//! What is in a leaf of the index, eight of its slots at a time. Called by `index` only.

use super::{ABSENT, LEAF};

/// True if eight slots are absent, all of them.
#[inline]
pub(super) fn is_nothing(octet: &[u32; 8]) -> bool {
    octet.iter().fold(0, |all, bits| all | bits) == ABSENT
}

/// The first slot of a leaf, from one on, that is not absent. Most are, and eight are seen through at a time.
#[inline]
pub(super) fn first_present(slots: &[u32; LEAF], mut from: usize) -> Option<usize> {
    let octets = slots.as_chunks::<8>().0;
    while let Some(&bits) = slots.get(from) {
        if bits != ABSENT {
            return Some(from);
        }
        from += if from.is_multiple_of(8) && is_nothing(&octets[from / 8]) { 8 } else { 1 };
    }
    None
}

/// Which slots of a leaf are not absent. Few are, where many generations share a leaf.
#[inline]
pub(super) fn present(slots: &[u32; LEAF]) -> u64 {
    let eight = |octet: &[u32; 8]| match octet.iter().fold(0, |all, bits| all | bits) {
        ABSENT => 0,
        _ => octet.iter().rev().fold(0, |mask, &bits| mask << 1 | u64::from(bits != ABSENT)),
    };
    slots.as_chunks::<8>().0.iter().rev().fold(0, |mask, octet| mask << 8 | eight(octet))
}
