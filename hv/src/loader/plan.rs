//! What is where when a guest starts: map regions, the first instruction, the tree.
//!
//! Read [`plan`]: RAM and flash are cut by *pieces*, the parts that an image supplies; what no piece
//! covers is anonymous. Three layouts, after what the image is:
//!
//! * Linux: `RAM start + text_offset | image_size | initrd | tree`; x0 holds the tree.
//! * flat, ELF: the tree at RAM's start, the program at its address, the initrd behind it.
//! * firmware: flash bank 0, entered at address 0; the tree at RAM's start.
//!
//! Sizes come from files and from people, so each is checked before it is used. Called by `guest`.
//! Calls `image`; addresses are `vmobject`'s.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use hv_abi::machine::{FLASH0, FLASH1, FLAT_OFFSET, RAM_BASE, RAM_LEAST, RAM_LIMIT, Region as Space};
use vmobject::addr::{CHUNK_SIZE, Ipa, IpaRange, PAGE_SIZE, PageIndex};
use vmobject::prot::Prot;
use vmobject::store::StoreId;

use super::fdt;
use super::image::{self, ImageError, Program};

/// The contents of a partition: the page store that has it, and its exact length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob {
    /// The store.
    pub store: StoreId,
    /// Bytes in it; the rest of its last page is zero.
    pub bytes: u64,
}

/// What a plan is made from.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Bytes of RAM.
    pub memory: u64,
    /// True when `image` is firmware for flash bank 0, false when it is a kernel or a bare program.
    pub firmware: bool,
    /// What the guest runs.
    pub image: Blob,
    /// The first page of `image`, or all of it if it is shorter.
    pub head: &'a [u8],
    /// An initial RAM disk for a kernel.
    pub initrd: Option<Blob>,
}

/// Where a region's contents come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The image object of a store, from that page on; the guest's writes go to a private copy.
    Image {
        /// The store.
        store: StoreId,
        /// The object's page at the region's start.
        first: PageIndex,
    },
    /// Zero until written.
    Anonymous,
}

/// What a region of the guest's map is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Memory.
    Ram,
    /// A flash bank: writes are for the device, which may have none.
    Flash,
}

/// One entry of the guest's map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where it is.
    pub range: IpaRange,
    /// What fills it.
    pub source: Source,
    /// What the guest may do with it.
    pub prot: Prot,
    /// What it is.
    pub role: Role,
}

/// How to make a guest's memory, and how to start it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The map's entries, by address; they do not overlap.
    pub regions: Vec<Region>,
    /// Bytes to write zeros over before the start: what an ELF file has behind a segment in its page.
    pub zero: Vec<(Ipa, u64)>,
    /// The first instruction.
    pub entry: Ipa,
    /// X0 at the first instruction.
    pub x0: u64,
    /// Where the device tree goes; there is room for [`fdt::LIMIT`] bytes.
    pub tree: Ipa,
    /// Where the initial RAM disk is: first address, and first address after it.
    pub initrd: Option<(Ipa, Ipa)>,
}

/// Why a guest cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanError {
    /// The image is not one that starts.
    Image(ImageError),
    /// RAM is not a whole number of pages between the least and the most there can be.
    Memory(u64),
    /// Something does not fit into the guest's RAM or flash.
    TooLarge {
        /// What does not fit.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Where the space for it ends.
        limit: u64,
    },
    /// Something is to lie where there is no RAM, or on something else.
    Misplaced {
        /// What is.
        what: &'static str,
        /// Where.
        at: u64,
    },
    /// A piece of the image is not page-aligned in the file as it is in memory.
    Unaligned {
        /// Where it is to be.
        at: u64,
    },
    /// The program's first instruction lies in nothing that is loaded.
    Entry(u64),
    /// The image is longer than an object can be.
    TooManyPages(u64),
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Image(error) => error.fmt(f),
            Self::Memory(bytes) => write!(
                f,
                "{bytes:#x} bytes of RAM: not whole pages, less than {RAM_LEAST:#x} or more than {RAM_LIMIT:#x}"
            ),
            Self::TooLarge { what, end, limit } => {
                write!(f, "no room for the {what}: it would end at {end:#x}, the space ends at {limit:#x}")
            }
            Self::Misplaced { what, at } => {
                write!(f, "the {what} at {at:#x} lies outside RAM or on something else")
            }
            Self::Unaligned { at } => {
                write!(f, "the part of the program at {at:#x} is not page-aligned in the file as in memory")
            }
            Self::Entry(at) => write!(f, "the program starts at {at:#x}, where nothing is loaded"),
            Self::TooManyPages(bytes) => write!(f, "{bytes:#x} bytes are more than an object can hold"),
        }
    }
}

impl From<ImageError> for PlanError {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

/// A part of memory that an image supplies.
#[derive(Clone, Copy)]
struct Piece {
    range: IpaRange,
    store: StoreId,
    first: PageIndex,
}

/// Lays a guest out.
pub fn plan(input: &Input<'_>) -> Result<Plan, PlanError> {
    let memory = input.memory;
    if !memory.is_multiple_of(PAGE_SIZE) || !(RAM_LEAST..=RAM_LIMIT).contains(&memory) {
        return Err(PlanError::Memory(memory));
    }
    let ram = Space::new(RAM_BASE, memory);
    if input.firmware {
        return firmware(input, ram);
    }
    match image::program(input.head)? {
        Program::Linux(header) => linux(input, ram, header),
        Program::Elf(elf) => executable(input, ram, &elf),
        Program::Flat => flat(input, ram),
    }
}

fn linux(input: &Input<'_>, ram: Space, header: image::LinuxHeader) -> Result<Plan, PlanError> {
    // RAM starts on a 2 MiB boundary, so its start is the lowest base that the kernel accepts.
    const { assert!(RAM_BASE.is_multiple_of(CHUNK_SIZE)) };
    let too_large = |end| PlanError::TooLarge { what: "kernel", end, limit: ram.end() };
    let start = RAM_BASE.checked_add(header.text_offset).ok_or(too_large(u64::MAX))?;
    if !start.is_multiple_of(PAGE_SIZE) {
        return Err(PlanError::Unaligned { at: start });
    }
    let end = start.checked_add(header.image_size.max(input.image.bytes)).ok_or(too_large(u64::MAX))?;
    if end > ram.end() {
        return Err(too_large(end));
    }
    let mut pieces = vec![piece("kernel", start, input.image, ram)?];
    let (initrd, next) = place_initrd(input, end, ram, &mut pieces)?;
    let tree = place_tree(next, ram)?;
    Ok(Plan {
        regions: regions(ram, pieces, Vec::new())?,
        zero: Vec::new(),
        entry: Ipa::new(start),
        x0: tree.bits(),
        tree,
        initrd,
    })
}

fn flat(input: &Input<'_>, ram: Space) -> Result<Plan, PlanError> {
    let start = RAM_BASE + FLAT_OFFSET;
    const { assert!(FLAT_OFFSET.is_multiple_of(PAGE_SIZE) && FLAT_OFFSET >= fdt::LIMIT) };
    let image = piece("image", start, input.image, ram)?;
    let mut pieces = vec![image];
    let (initrd, _) = place_initrd(input, image.range.end().bits(), ram, &mut pieces)?;
    Ok(Plan {
        regions: regions(ram, pieces, Vec::new())?,
        zero: Vec::new(),
        entry: Ipa::new(start),
        x0: RAM_BASE,
        tree: Ipa::new(RAM_BASE),
        initrd,
    })
}

fn executable(input: &Input<'_>, ram: Space, elf: &image::Elf) -> Result<Plan, PlanError> {
    let mut pieces = Vec::new();
    let mut zero = Vec::new();
    let (mut lowest, mut highest) = (u64::MAX, 0);
    for segment in &elf.segments {
        let misplaced = PlanError::Misplaced { what: "segment", at: segment.at };
        // The reader of the header has seen that the sums fit.
        let end = segment.at + segment.memory_bytes;
        if segment.at < ram.base || end > ram.end() {
            return Err(misplaced);
        }
        if segment.file_offset + segment.file_bytes > input.image.bytes {
            return Err(PlanError::Image(ImageError::SegmentTable));
        }
        (lowest, highest) = (lowest.min(segment.at), highest.max(end));
        // The rest of the file's last page belongs to the file's next part; in memory it is zero.
        let file_end = segment.at + segment.file_bytes;
        let rest = end.min(file_end.next_multiple_of(PAGE_SIZE)) - file_end;
        if rest > 0 {
            zero.push((Ipa::new(file_end), rest));
        }
        if segment.file_bytes == 0 {
            continue;
        }
        let skew = segment.at % PAGE_SIZE;
        if segment.file_offset % PAGE_SIZE != skew {
            return Err(PlanError::Unaligned { at: segment.at });
        }
        let start = segment.at - skew;
        let range = page_range(start, file_end).ok_or(misplaced)?;
        let first = page_index(segment.file_offset - skew)?;
        pieces.push(Piece { range, store: input.image.store, first });
    }
    let loaded = |at: u64| elf.segments.iter().any(|s| at >= s.at && at - s.at < s.memory_bytes);
    if !elf.entry.is_multiple_of(4) || !loaded(elf.entry) {
        return Err(PlanError::Entry(elf.entry));
    }
    let (initrd, next) = place_initrd(input, highest, ram, &mut pieces)?;
    let tree = if lowest - ram.base >= fdt::LIMIT { Ipa::new(ram.base) } else { place_tree(next, ram)? };
    Ok(Plan {
        regions: regions(ram, pieces, Vec::new())?,
        zero,
        entry: Ipa::new(elf.entry),
        x0: tree.bits(),
        tree,
        initrd,
    })
}

fn firmware(input: &Input<'_>, ram: Space) -> Result<Plan, PlanError> {
    if input.head.is_empty() {
        return Err(PlanError::Image(ImageError::Empty));
    }
    let flash = vec![piece("firmware", FLASH0.base, input.image, FLASH0)?];
    let mut pieces = Vec::new();
    let (initrd, _) = place_initrd(input, RAM_BASE + FLAT_OFFSET, ram, &mut pieces)?;
    Ok(Plan {
        regions: regions(ram, pieces, flash)?,
        zero: Vec::new(),
        entry: Ipa::new(FLASH0.base),
        x0: RAM_BASE,
        tree: Ipa::new(RAM_BASE),
        initrd,
    })
}

/// All of `blob` at `at`, if `space` has room for it.
fn piece(what: &'static str, at: u64, blob: Blob, space: Space) -> Result<Piece, PlanError> {
    let end = at.saturating_add(blob.bytes);
    if end > space.end() {
        return Err(PlanError::TooLarge { what, end, limit: space.end() });
    }
    page_index(blob.bytes)?;
    let range = page_range(at, end).ok_or(PlanError::Misplaced { what, at })?;
    Ok(Piece { range, store: blob.store, first: PageIndex::default() })
}

/// The pages from `start`, which begins one, to `end`.
fn page_range(start: u64, end: u64) -> Option<IpaRange> {
    IpaRange::new(Ipa::new(start), Ipa::new(end.checked_next_multiple_of(PAGE_SIZE)?))
}

fn page_index(bytes: u64) -> Result<PageIndex, PlanError> {
    let pages = u32::try_from(bytes / PAGE_SIZE).map_err(|_| PlanError::TooManyPages(bytes))?;
    Ok(PageIndex::new(pages))
}

type Extent = (Ipa, Ipa);

/// Puts the initrd, if there is one, on the first page from `from` on; says what follows.
fn place_initrd(
    input: &Input<'_>,
    from: u64,
    ram: Space,
    pieces: &mut Vec<Piece>,
) -> Result<(Option<Extent>, u64), PlanError> {
    let start = from.next_multiple_of(PAGE_SIZE);
    let Some(blob) = input.initrd.filter(|blob| blob.bytes > 0) else {
        return Ok((None, start));
    };
    let placed = piece("initrd", start, blob, ram)?;
    pieces.push(placed);
    let extent = (Ipa::new(start), Ipa::new(start + blob.bytes));
    Ok((Some(extent), placed.range.end().bits()))
}

/// Room for the tree from `from` on: on a page of its own, within one 2 MiB block, as Linux asks.
fn place_tree(from: u64, ram: Space) -> Result<Ipa, PlanError> {
    let first = from.next_multiple_of(PAGE_SIZE);
    let start = if first / CHUNK_SIZE == (first + (fdt::LIMIT - 1)) / CHUNK_SIZE {
        first
    } else {
        first.next_multiple_of(CHUNK_SIZE)
    };
    let end = start + fdt::LIMIT;
    if end > ram.end() {
        return Err(PlanError::TooLarge { what: "device tree", end, limit: ram.end() });
    }
    Ok(Ipa::new(start))
}

/// The map: flash, then RAM, each filled by its pieces and anonymous between them.
fn regions(ram: Space, in_ram: Vec<Piece>, in_flash: Vec<Piece>) -> Result<Vec<Region>, PlanError> {
    let mut regions = Vec::new();
    cover(FLASH0, Prot::READ_EXECUTE, Role::Flash, in_flash, &mut regions)?;
    cover(FLASH1, Prot::ALL, Role::Flash, Vec::new(), &mut regions)?;
    cover(ram, Prot::ALL, Role::Ram, in_ram, &mut regions)?;
    Ok(regions)
}

fn cover(
    space: Space,
    prot: Prot,
    role: Role,
    mut pieces: Vec<Piece>,
    regions: &mut Vec<Region>,
) -> Result<(), PlanError> {
    pieces.sort_unstable_by_key(|piece| piece.range.start());
    let mut next = Ipa::new(space.base);
    let mut add = |start: Ipa, end: Ipa, source| {
        let range = IpaRange::new(start, end)
            .ok_or(PlanError::Misplaced { what: "part of the program", at: end.bits() })?;
        if !range.is_empty() {
            regions.push(Region { range, source, prot, role });
        }
        Ok(())
    };
    for Piece { range, store, first } in pieces {
        // An inverted gap is a piece on its predecessor.
        add(next, range.start(), Source::Anonymous)?;
        add(range.start(), range.end(), Source::Image { store, first })?;
        next = range.end();
    }
    add(next, Ipa::new(space.end()), Source::Anonymous)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
