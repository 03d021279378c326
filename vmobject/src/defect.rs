//! Defects to be switched on, one at a time, to see that the tests find them.
//!
//! A net that never caught anything may have a hole. With the feature `defects` a [`Vm`] can be told to do one thing
//! wrong, and a simulator that then still finds nothing is blind. Without it `Vm::has` is false wherever it is
//! asked, and what it guards is not there. Each names the seed's defect that it brings back, where it is one of those.

use crate::Vm;
use crate::store::Machine;

macro_rules! defects {
    ($($(#[$doc:meta])* $variant:ident;)*) => {
        /// Something that is done wrong.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Defect { $($(#[$doc])* $variant,)* }

        impl Defect {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];
        }
    };
}

defects! {
    /// D1: a page right behind the window holds up a bypass.
    BypassLooksPastTheEnd;
    /// D4: a chain is not shortened once it has swapped pages.
    CollapseRefusesSwapped;
    /// D8: pages are taken away from an object, and their leaves stay.
    RemoveLeavesLeaves;
    /// D8 again: an eviction believes that an object hides a page because the page itself is there now.
    EvictionMissesMoved;
    /// D12: a discard does not free swapped pages, and they come back.
    DiscardForgetsSwap;
    /// D13: what became of a put is not looked at.
    PutNeverFails;
    /// D16: a layer is added even over what nobody else has.
    ShadowOverSole;
    /// A discard makes pages of a shadow absent, and what is below shows.
    DiscardStoresAbsent;
    /// A discard in an entry that is to be copied first goes to the shared object.
    DiscardIgnoresNeedsCopy;
    /// A reset empties the top object and keeps it, whatever it shadows by now.
    ResetEmptiesTop;
    /// A trail stays in use after a page came to be where it says there is none.
    StaleTrail;
    /// Half of a clone: the source's leaves stay writable.
    CopyLeavesWritable;
    /// D3: what an object overwrites is not pushed to its copy.
    NothingIsPushed;
    /// A swap slot is given back when its page has been written there.
    SlotFreedTooEarly;
    /// A slot that is taken is given to somebody else as well.
    SlotGivenTwice;
    /// A page that is written keeps the slot with what it was.
    DirtyKeepsItsSlot;
    /// A page that was used again while it was written leaves all the same.
    EvictedThoughUsed;
    /// A page of zeros is dropped, and what is below shows.
    ZeroShowsBelow;
}

/// Which defect there is, if any.
#[derive(Debug, Default)]
pub(crate) struct Seeded(#[cfg(feature = "defects")] core::sync::atomic::AtomicU8);

#[cfg(feature = "defects")]
impl Seeded {
    fn is(&self, defect: Defect) -> bool {
        self.0.load(core::sync::atomic::Ordering::Relaxed) == defect as u8 + 1
    }
}

#[cfg(not(feature = "defects"))]
impl Seeded {
    #[expect(clippy::unused_self, reason = "as with the feature")]
    const fn is(&self, _defect: Defect) -> bool {
        false
    }
}

impl<M: Machine> Vm<M> {
    /// From now on there is a defect, or again none.
    #[cfg(feature = "defects")]
    pub fn seed(&self, defect: Option<Defect>) {
        let number = defect.map_or(0, |defect| defect as u8 + 1);
        self.seeded.0.store(number, core::sync::atomic::Ordering::Relaxed);
    }

    /// True if this is to be done wrong: never, without the feature.
    #[inline]
    pub(crate) fn has(&self, defect: Defect) -> bool {
        self.seeded.is(defect)
    }
}
