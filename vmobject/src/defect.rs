//! Defects to be switched on, one at a time, to see that the tests find them.
//!
//! A net that never caught anything may have a hole. With the feature `defects` a [`Vm`] can be told to do one thing
//! wrong, and a simulator that then still finds nothing is blind. Without it `Vm::has` is false wherever it is
//! asked, and what it guards is not there. Each names the seed's defect that it brings back, where it is one of those.
//!
//! # What finds each
//!
//! The simulator of `stage2` (`cargo xtask sim --defects`; it switches on defects of the tables and of TLB maintenance, too) plays
//! worlds from seed 1 on until one goes wrong; after how many deeds of all worlds together, in a run of it:
//!
//! | within | found |
//! |---|---|
//! | 100 deeds | an instruction left out, one by one: VMALLS12E1IS, IPAS2E1IS, VMALLE1IS; a VMID that is not loaded; no invalidate in a clone, in an eviction, in chores; `CopyLeavesWritable`, `SlotFreedTooEarly`, `SlotGivenTwice` |
//! | 2,500, a world's life | `BypassLooksPastTheEnd`, `CollapseRefusesSwapped`, `DiscardStoresAbsent`, `DiscardIgnoresNeedsCopy`, `ResetEmptiesTop`, `ResetSeesTop`, `NothingIsPushed`, `KeepsTheHidden`, `DirtyKeepsItsSlot`, `EvictedThoughUsed`, `SeesThroughShadows` |
//! | 24,000 | `RemoveLeavesLeaves`, `PutNeverFails`, `DiscardForgetsSwap`, `ShadowOverSole`, `AsksFewShadows`, `ZeroShowsBelow`, `BlockOverOwn`, `BlockWritable` |
//! | 130,000 | `BypassForgetsCopy`; a dirty flag that hardware sets between read and write of a leaf; a block that is broken without being invalidated |
//! | 1.1 million | `StaleTrail` |
//!
//! Each of these stories is played once more without the defect, and then comes to a good end.
//!
//! Of the chores only the end of a map invalidates anything, and it is this that is left out. A collapse calls no pmap:
//! the frames of anonymous memory go from one object to the other, and every leaf stays right. What it frees besides is
//! hidden or out of reach, and no leaf leads there. So no invalidate belongs to it that could be missing. That it
//! makes no leaf wrong, `Vm::check` says (I1); that no cache knows more than the leaves, the audit after every deed.
//!
//! Another CPU has to come in between for the others. A scheduler that chooses who goes on (`tests/interleavings.rs`) finds
//! `SeesWhatFills` in its first round, `FindsTheDead` in the 6th, `EndsUnlocked` in the 7th and 127th of two stories,
//! `CountsTooEarly` in the 24th, `ReadsPastAPush` and `AroundPastAPush` in the 26th, `PrunesWhatCameDown` in the 55th,
//! `HopsBlindly` in the 86th, `ParksUnlocked` in the 123rd, `PushesUnseen` in the 302nd, `ForgetsALiveCopy` in the 1,348th. `EvictionMissesMoved` has a test of its own in
//! `tests/pageout.rs`; the exhaustive search finds the defects of the smallest worlds once more.

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

            /// Those for which another CPU has to come in between: `interleavings` finds them.
            pub const RACES: &[Self] =
                &[Self::SeesWhatFills, Self::HopsBlindly, Self::FindsTheDead, Self::ParksUnlocked,
                    Self::PrunesWhatCameDown, Self::ReadsPastAPush, Self::AroundPastAPush, Self::PushesUnseen, Self::ForgetsALiveCopy,
                    Self::EndsUnlocked, Self::CountsTooEarly];

            /// Those for which two steps have to meet at one page out of many, as they hardly ever do by chance: a test in
            /// `pageout` has them meet.
            pub const MEETINGS: &[Self] = &[Self::EvictionMissesMoved];
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
    /// A reset looks for leaves that would be wrong only among what the top object has.
    ResetSeesTop;
    /// A trail stays in use after a page came to be where it says there is none.
    StaleTrail;
    /// Half of a clone: the source's leaves stay writable.
    CopyLeavesWritable;
    /// D3: who passes over an object has its copy forgotten, whatever copy that is, and what is overwritten is lost to it.
    BypassForgetsCopy;
    /// D3 at its worst: what an object overwrites is never pushed to its copy.
    NothingIsPushed;
    /// When something that held up an object's shadows is gone, the first few are asked and the others are not.
    AsksFewShadows;
    /// When a referrer goes, nobody looks for pages that all others hide.
    KeepsTheHidden;
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
    /// A whole chunk is mapped from below over pages that an object above has there.
    BlockOverOwn;
    /// The neighbours of a page that lies far below are mapped over what objects in between have.
    SeesThroughShadows;
    /// A whole chunk is mapped as the entry allows, to be written by whoever shares it.
    BlockWritable;
    /// A page is used while a transfer is still bringing it.
    SeesWhatFills;
    /// Where a trail led is looked at although a page may have gone up past it meanwhile.
    HopsBlindly;
    /// An object is found by its store, and nobody looks again whether it is the same when it is locked.
    FindsTheDead;
    /// A copy lets the map go before the leaves are write-protected.
    ParksUnlocked;
    /// A page that was found hidden is freed, although the one that hid it has come down into its place meanwhile.
    PrunesWhatCameDown;
    /// Who looks through a copy-object does not see that its source gained the page behind him.
    ReadsPastAPush;
    /// The same where only a map shows the copy-object: that it gained the page is told to nobody.
    PushesUnseen;
    /// The neighbours of a page that was found below a copy-object are mapped although that has received one of them meanwhile.
    AroundPastAPush;
    /// A copy that was found stale is forgotten, though it has come to receive again meanwhile (D3).
    ForgetsALiveCopy;
    /// A transfer is over before its object is locked: who looks in between finds nothing that failed.
    EndsUnlocked;
    /// What is left of a machine is counted while another CPU still gives it back.
    CountsTooEarly;
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
