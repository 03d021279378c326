//! Counters: what happened how often. Counts repeat exactly, so tests and benches compare them.
//!
//! Called by everybody; calls nobody.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! events {
    ($($(#[$doc:meta])* $variant:ident $field:ident;)*) => {
        /// Something that is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Event { $($(#[$doc])* $variant,)* }

        /// How often each event happened.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counts { $($(#[$doc])* pub $field: u64,)* }

        impl Counts {
            /// Every count with its name, for printing.
            pub fn named(&self) -> [(&'static str, u64); EVENTS] {
                [$((stringify!($field), self.$field),)*]
            }
        }

        const EVENTS: usize = [$(Event::$variant,)*].len();

        impl Stats {
            /// The counts now.
            pub fn counts(&self) -> Counts {
                Counts { $($field: self.0[Event::$variant as usize].load(Relaxed),)* }
            }
        }
    };
}

events! {
    /// Faults served by a page of zeros.
    FaultZero fault_zero;
    /// Faults served by a page that was in the top object.
    FaultResident fault_resident;
    /// Faults served by a page of an object below, shared and read-only.
    FaultShared fault_shared;
    /// Faults served by a device's frame.
    FaultDevice fault_device;
    /// Faults that copied a page into the top object.
    FaultCopy fault_copy;
    /// Faults that moved the last reference to a page into the top object.
    FaultMove fault_move;
    /// Objects that looks down chains, and the laying of trails, came by.
    ChainVisited chain_visited;
    /// Trails laid.
    TrailLaid trail_laid;
    /// Faults that ended in a wait.
    FaultWait fault_wait;
    /// Faults that waited because their guest had as many frames as it may.
    FaultHeld fault_held;
    /// Faults where nothing is mapped.
    FaultHole fault_hole;
    /// Faults that the entry does not allow.
    FaultDenied fault_denied;
    /// Faults that failed because the store did.
    FaultLost fault_lost;
    /// Neighbours that were mapped along.
    Around around;
    /// Blocks that were mapped: 512 pages by one fault.
    BlockMapped block_mapped;
    /// Blocks that pageout took away, to see which of their pages are used.
    BlockTaken block_taken;
    /// Shadows made.
    ShadowMade shadow_made;
    /// Shadows not made, because the memory was nobody else's.
    ShadowSpared shadow_spared;
    /// Maps copied: clones and snapshots.
    MapCopied map_copied;
    /// Maps that got the memory of a snapshot again.
    MapReset map_reset;
    /// Those of them that were unmapped whole.
    MapCleared map_cleared;
    /// Top-level entries of tables that a copy of their map parked.
    EntryParked entry_parked;
    /// Copy-objects made.
    CopyMade copy_made;
    /// Copy-objects that were empty and handed out again.
    CopyShared copy_shared;
    /// Pages pushed to a copy-object before they changed.
    Pushed pushed;
    /// Objects merged into their only shadow.
    Collapsed collapsed;
    /// Slots that a collapse moved.
    CollapseMoved collapse_moved;
    /// Those of them that were in swap.
    CollapseSwapped collapse_swapped;
    /// Slots that a collapse freed because they were hidden or out of reach.
    CollapseFreed collapse_freed;
    /// Collapses that moved the top's pages and then exchanged the indexes.
    CollapseExchanged collapse_exchanged;
    /// Objects passed over because they were hidden.
    Bypassed bypassed;
    /// Bypasses that found a page not hidden.
    BypassRefused bypass_refused;
    /// Slots freed because every shadow hid them.
    Pruned pruned;
    /// Transfers started to bring pages in.
    PageIn page_in;
    /// Pages that came from their store.
    PageRead page_read;
    /// Transfers that failed.
    PageInFailed page_in_failed;
    /// Pages that came in as something else than was written.
    PageInCorrupt page_in_corrupt;
    /// Transfers started to write pages to swap.
    PageOut page_out;
    /// Those that failed; their pages stay.
    PageOutFailed page_out_failed;
    /// Pages that were written and are in their store now.
    PageWritten page_written;
    /// Passes that cleaned an object.
    Cleaned cleaned;
    /// Pages that their store did not take while their object ended: they are gone.
    PageLost page_lost;
    /// Objects that were found in the cache.
    CacheHit cache_hit;
    /// Frames taken from pages that a store has.
    Evicted evicted;
    /// Pages found to be zero when they were to be written.
    EvictedZero evicted_zero;
    /// Pages that were looked at for use since the last look.
    Aged aged;
    /// Pages that were to go and turned out to be in use.
    Reactivated reactivated;
    /// Pages that had to stay because there was no swap slot for them.
    SwapFull swap_full;
    /// Frames and swap slots that a discard gave back.
    Discarded discarded;
    /// Slots that discard, collapse and bypass looked at.
    SlotVisited slot_visited;
    /// Leaves that were found and visited, to age or to remove them.
    LeafVisited leaf_visited;
    /// Swap slots that are not used any more because they failed.
    SlotSpoiled slot_spoiled;
    /// Completions for transfers that are not in flight.
    StaleCompletion stale_completion;
}

/// The counters themselves.
#[derive(Debug)]
pub struct Stats([AtomicU64; EVENTS]);

impl Stats {
    /// All zero.
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; EVENTS])
    }

    /// Counts one.
    #[inline]
    pub fn count(&self, event: Event) {
        self.add(event, 1);
    }

    /// Counts several.
    #[inline]
    pub fn add(&self, event: Event, by: u64) {
        self.0[event as usize].fetch_add(by, Relaxed);
    }
}

impl Default for Stats {
    fn default() -> Self {
        Self::new()
    }
}
