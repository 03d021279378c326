//! Everything that has a bound, by name (STYLE 9).
//!
//! A guest can reach every one of these; what happens then is an error at a call or a wait, never a
//! panic. Neighbours: every module.

/// Objects that may exist at one time.
pub const MAX_OBJECTS: u32 = 1 << 18;
/// Objects that are allocated together, when the first of them is needed.
pub const OBJECT_BLOCK: u32 = 256;
/// Frames are numbered below this: 4 TiB of memory. A slot keeps two bits for itself.
pub const MAX_FRAME: u32 = 1 << 30;
/// Entries of one map.
pub const MAX_ENTRIES: usize = 4096;
/// Objects of one stretch of a trail, and objects that a look passes before it wants a trail.
pub const TRAIL_STRIDE: u32 = 4;
/// Objects that a fault looks at for a trail before its vCPU is sent back to try its instruction once more.
pub const TRAIL_PART: u32 = 12;
/// Trails of one object; each is for 2 MiB.
pub const CHUNK_TRAILS: u32 = 128;
/// Trails of all objects; each takes 1.3 KiB, and a few more where many generations have pages of its chunk.
pub const MAX_TRAILS: usize = 2048;
/// Pages of one transfer.
pub const CLUSTER_PAGES: u32 = 16;
/// Neighbours that are looked at when a fault is served from a page that is there already.
pub const AROUND_PAGES: u32 = 64;
/// Transfers in flight.
pub const MAX_IO: u32 = 256;
/// Transfers out in flight to one swap store, or from one object to its own: one that hangs holds up no other.
pub const PUTS_OF_ONE: u32 = 8;
/// How often a swap store that has as many may be asked for more before one of lower priority is: it may never answer.
pub const PUTS_PATIENCE: u32 = 64;
/// Transfers out in flight to swap: as many as all stores may have.
pub const MAX_SWAP_PUTS: u32 = 64;
const _: () = assert!(MAX_SWAP_PUTS as usize == PUTS_OF_ONE as usize * MAX_SWAP_STORES);
/// Transfers out in flight to all other stores together.
pub const MAX_DISK_PUTS: u32 = 96;
/// Steps of pageout in which nothing is written, after a store took nothing.
pub const BLOCKED_STEPS: u32 = 16;
/// Pages of all swap stores that are used: 64 GiB.
pub const MAX_SWAP: u32 = 1 << 24;
/// Swap stores.
pub const MAX_SWAP_STORES: usize = 8;
/// Writes that a swap store fails in a row before it gets no more of them.
pub const MAX_FAILED_PUTS: u32 = 64;
/// How often one fault starts again before its vCPU is sent back to try its instruction once more.
pub const MAX_RESTARTS: u32 = 64;
/// Free frames that guests' pages leave to tables and pagers: a 256th of memory, within these bounds.
pub const MIN_RESERVE: u32 = 16;
/// See [`MIN_RESERVE`].
pub const MAX_RESERVE: u32 = 2048;
/// Pages that one instruction can need: itself and two operands, each with five levels of the guest's tables.
pub const NEED_PAGES: usize = 18;
/// Shadows of one object that a write looks at to find out that it is the last to see a page.
pub const MAX_SIBLINGS: u32 = 8;
/// Copied pages that are remembered to see whether they were the last.
pub const MAX_COPIED: usize = 256;
/// Objects that a reset passes on the way to where a guest and its snapshot meet.
pub const MAX_WAY: usize = 8;
/// Pages whose leaves are taken away in one step: of a reset, where one that does not follow the last counts for two, and of
/// what empties a map, where a table that is looked through and a block are a step each.
pub const UNMAP_PAGES: u32 = 64;
/// How often the walk to a page's leaves begins again before the page is left alone.
pub const MAX_SWEEPS: u32 = 4;
