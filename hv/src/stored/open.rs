//! Opening a disk for stored guests: which header holds, and whether what it names is whole.
//!
//! The guest's own pages are not read: their sums are, and are compared when a guest touches them. Called at boot.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use hv_abi::image::{Header, NoHeader, PAGE, SLOTS, Sum};
use vmobject::store::StoreError;

/// A stored guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The header that holds.
    pub header: Header,
    /// What it says for people: JSON.
    pub text: String,
    /// What is known of each of its pages.
    pub sums: Vec<u32>,
    /// Its state.
    pub state: Vec<u8>,
}

/// Why a disk's guest cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// Something else is on the disk.
    Foreign,
    /// It is of another version of the format.
    Version(u32),
    /// This part of it is not what was written, in the page of this number.
    Damaged(&'static str, u64),
    /// The disk has fewer pages than the image.
    Short {
        /// Pages on the disk.
        has: u64,
        /// Pages that there should be.
        needs: u64,
    },
    /// The disk did not give this page.
    Disk(u64, StoreError),
    /// There is no memory for its sums.
    NoMemory,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("what is on the disk is no stored guest"),
            Self::Version(version) => {
                let ours = hv_abi::image::VERSION;
                write!(f, "it is stored in version {version} of the format; this hypervisor reads {ours}")
            }
            Self::Damaged(what, page) => {
                write!(f, "{what} is damaged, at byte {:#x} of the disk", page * PAGE as u64)
            }
            Self::Short { has, needs } => write!(f, "the disk has {has} pages, and the image {needs}"),
            Self::Disk(page, error) => {
                write!(f, "the disk does not give byte {:#x}: {error:?}", page * PAGE as u64)
            }
            Self::NoMemory => f.write_str("there is no memory for its table of sums"),
        }
    }
}

/// Reads whole pages of a disk, from one on.
pub type Read<'a> = dyn FnMut(u64, &mut [u8]) -> Result<(), StoreError> + 'a;

/// What is stored on a disk of so many pages; `None` when nothing ever was.
pub fn open(read: &mut Read<'_>, pages: u64) -> Result<Option<Opened>, OpenError> {
    let Some((header, text)) = newest(read, pages)? else { return Ok(None) };
    let needs = SLOTS as u64 + SLOTS as u64 * header.half;
    if needs > pages {
        return Err(OpenError::Short { has: pages, needs });
    }
    let table = header.start() + header.pages;
    let bytes = part(read, table, header.pages * 4, (header.key, header.table_sum), "its table of sums")?;
    let mut sums = Vec::new();
    sums.try_reserve_exact(bytes.len() / 4).map_err(|_| OpenError::NoMemory)?;
    sums.extend(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)));
    drop(bytes);
    let place = table + header.table_pages();
    let state = part(read, place, header.state, (header.key, header.state_sum), "the guest's state")?;
    Ok(Some(Opened { header, text, sums, state }))
}

/// The header that holds, and its text; whether what it names is whole is [`open`]'s business.
pub fn newest(read: &mut Read<'_>, pages: u64) -> Result<Option<(Header, String)>, OpenError> {
    if pages < SLOTS as u64 {
        return Ok(None);
    }
    let (mut newest, mut wrong) = (None::<(Header, String)>, None);
    for slot in 0..SLOTS {
        let mut page = [0; PAGE];
        read(slot as u64, &mut page).map_err(|error| OpenError::Disk(slot as u64, error))?;
        match Header::decode(slot, &page) {
            Ok((header, text)) => {
                if newest.as_ref().is_none_or(|(other, _)| header.generation > other.generation) {
                    newest = Some((header, String::from_utf8_lossy(text).into_owned()));
                }
            }
            Err(NoHeader::Empty) => {}
            Err(NoHeader::Damaged) => wrong = wrong.or(Some(OpenError::Damaged("its header", slot as u64))),
            // Neither says anything of the other slot; but nobody else's is to be overlooked.
            Err(NoHeader::Version(version)) => wrong = Some(OpenError::Version(version)),
            Err(NoHeader::Foreign) => wrong = Some(OpenError::Foreign),
        }
    }
    match (newest, wrong) {
        // A header that was being written when the power went.
        (Some(newest), None | Some(OpenError::Damaged(..))) => Ok(Some(newest)),
        (_, Some(wrong)) => Err(wrong),
        (None, None) => Ok(None),
    }
}

/// Reads so many bytes from a page on, which have this sum under this key.
fn part(
    read: &mut Read<'_>,
    first: u64,
    bytes: u64,
    (key, expected): (u64, u32),
    what: &'static str,
) -> Result<Vec<u8>, OpenError> {
    let length = usize::try_from(bytes).map_err(|_| OpenError::NoMemory)?;
    let whole = length.next_multiple_of(PAGE);
    let mut all = Vec::new();
    all.try_reserve_exact(whole).map_err(|_| OpenError::NoMemory)?;
    all.resize(whole, 0);
    let mut sum = Sum::new(key);
    for (page, out) in (first..).zip(all.chunks_exact_mut(PAGE)) {
        read(page, out).map_err(|error| OpenError::Disk(page, error))?;
        sum.add(out);
    }
    if sum.finish() != expected {
        return Err(OpenError::Damaged(what, first));
    }
    all.truncate(length);
    Ok(all)
}
