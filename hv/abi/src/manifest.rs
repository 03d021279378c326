//! What xtask tells the hypervisor at boot: names on the disk, and the shape of the manifest.
//!
//! The boot disk has a GPT. One partition, [`PARTITION`], holds the manifest: JSON text, zero bytes behind
//! it. The other partitions hold one image each, page-aligned, zero bytes behind; the manifest names them.
//!
//! ```json
//! {"version": 1, "batch": false,
//!  "images": [{"partition": "linux", "bytes": 31461376}],
//!  "guests": [{"name": "one", "kernel": "linux", "initrd": "initrd", "append": "quiet",
//!              "memory_mib": 256, "vcpus": 1}]}
//! ```
//!
//! `version` must be [`VERSION`] when it is there. `images` gives exact lengths; an image that it leaves
//! out counts as long as its partition. `overcommit_percent`, 100 or more, bounds how much memory is promised
//! to guests, in hundredths of frames and swap together; without it there is no bound. A guest has a `kernel`
//! or a `bios`; `initrd`, `append`, `memory_mib` (256), `vcpus` (1), `grant_fork` (0) and `disks` may be left out.
//! Any other key is an error.
//!
//! A disk of a guest is a whole disk of the host, whatever is on it: one that calls itself [`DISK_ID`] and a number.
//! `"disks": [{"disk": 0, "writes": "through"}]` gives it to a guest; `writes` is `through` (they go to the disk),
//! `private` (they are the guest's own and end with it) or `refused`.
//!
//! A disk for a stored guest ([`crate::image`]) calls itself [`IMAGE_DISK_ID`] and a number. `"stored": [{"disk": 0,
//! "name": "golden", "resume": true}]` gives it a name, by which the monitor's `save` and `create` know it; with
//! `resume` (false) the guest stored there goes on at once.
//!
//! Pages are swapped to partitions of the boot disk, and to disks that call themselves [`SWAP_DISK_ID`] and a number:
//! all of such a disk, or if it has a table its partitions for swap. `"swap": [{"partition": "swap", "priority": 5},
//! {"disk": 0}]` gives each a priority, from 0 to [`PRIORITY_MOST`], higher ones first; those without one come after all that have
//! one, in the order of the list. Without a list it is the partition [`SWAP_PARTITION`], if there is one.

/// The partition that holds the manifest.
pub const PARTITION: &str = "manifest";
/// The partition that pages are swapped to.
pub const SWAP_PARTITION: &str = "swap";
/// What a disk to swap to calls itself, before its number.
pub const SWAP_DISK_ID: &str = "swap-disk-";
/// Places to swap to at most.
pub const SWAP_LIMIT: usize = 8;
/// The highest priority of one.
pub const PRIORITY_MOST: u64 = 32767;
/// What a disk for guests calls itself (VIRTIO_BLK_T_GET_ID), before its number.
pub const DISK_ID: &str = "guest-disk-";
/// What a disk for a stored guest calls itself, before its number.
pub const IMAGE_DISK_ID: &str = "stored-guest-";
/// Disks for stored guests at most.
pub const STORED_LIMIT: usize = 8;
/// The longest that somebody may want a silent disk to be waited for, in seconds.
pub const DISK_PATIENCE_LIMIT: u64 = 86_400;
/// Disks of one guest at most.
pub const DISKS_LIMIT: usize = 8;
/// The format that this build reads and writes.
pub const VERSION: u64 = 1;
/// Bytes that a manifest can have at most.
pub const LIMIT: usize = 64 * 1024;
/// Characters of a partition's name at most: GPT holds 36 units of UTF-16.
pub const NAME_LIMIT: usize = 36;
/// Bytes of a kernel command line at most: Linux on arm64 takes 2048 with the ending zero.
pub const APPEND_LIMIT: usize = 2047;
/// Guests that a manifest can start at most.
pub const GUESTS_LIMIT: usize = 64;
/// RAM of a guest whose entry does not say.
pub const DEFAULT_MEMORY_MIB: u64 = 256;
/// Children that a guest can be granted to fork at most.
pub const FORK_LIMIT: u32 = 1024;

/// Bytes of a line at the control port at most, where a running hypervisor is told more.
pub const CONTROL_LIMIT: usize = 2048;

/// Reads a size as people write it, with `K` as well; in KiB.
pub fn kibibytes(text: &str) -> Option<u64> {
    match text.strip_suffix(['K', 'k']) {
        Some(digits) => digits.parse().ok(),
        None => mebibytes(text)?.checked_mul(1024),
    }
}

/// Reads a size as people write it, `256M`, `1G` or a plain number of MiB; in MiB.
pub fn mebibytes(text: &str) -> Option<u64> {
    let (digits, unit) = match text.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}
