//! Named partitions on the disk: reading a GUID partition table.
//!
//! A table is believed only when both its checksums are right and what it says lies on the disk; the copy at the
//! disk's end is tried when the first is not. Runs once, at boot, through a reader that waits; takes no memory
//! but one sector. `hv::mm::store` makes a backing store of each partition it gets from here.

use crate::virtio::blk::{Blk, BlkError, SECTOR};
use arrayvec::ArrayString;
use crc32fast::Hasher;
use virtio_drivers::transport::Transport;

/// Bytes that a name may take: 36 code units of UTF-16, each at most three bytes of UTF-8.
pub const MAX_NAME: usize = 108;
/// Entries that a table may have; the usual number is 128.
pub const MAX_ENTRIES: u32 = 1024;

/// The type of a partition to swap to, as stored: 0657FD6D-A4AB-43C4-84E5-0933C84B4F4F.
pub const LINUX_SWAP: [u8; 16] =
    [0x6d, 0xfd, 0x57, 0x06, 0xab, 0xa4, 0xc4, 0x43, 0x84, 0xe5, 0x09, 0x33, 0xc8, 0x4b, 0x4f, 0x4f];

const SIGNATURE: &[u8; 8] = b"EFI PART";
/// What the first sector of a disk with a table ends with, whatever its kind; a GPT's protective one too (UEFI 2.10, 5.2).
const BOOT_SIGNATURE: [u8; 2] = [0x55, 0xaa];
const HEADER_BYTES: usize = 92;
const ENTRY_BYTES: usize = 128;
/// [`SECTOR`], as the length of a buffer.
const BUFFER: usize = 512;

/// A partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its name; what is no Unicode in it is replaced.
    pub name: ArrayString<MAX_NAME>,
    /// Its type's identifier, as stored.
    pub kind: [u8; 16],
    /// Its own identifier, as stored.
    pub unique: [u8; 16],
    /// Its first sector of 512 bytes.
    pub first_sector: u64,
    /// Its length in sectors of 512 bytes.
    pub sectors: u64,
}

/// Why there are no partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GptError {
    /// The disk failed.
    Disk(BlkError),
    /// There is no table.
    Missing,
    /// There is one, and no copy of it is whole.
    Damaged,
    /// There is none, but something else that begins as a disk with a table does: one of another kind, or for blocks of
    /// another size, or what is left of one.
    Foreign,
}

/// Where a table's entries are.
#[derive(Clone, Copy, Debug)]
struct Header {
    first_sector: u64,
    count: u32,
    entry_bytes: usize,
    checksum: u32,
}

/// The reader of a disk: fills a sector's buffer from a sector.
type Read<'a> = dyn FnMut(u64, &mut [u8; BUFFER]) -> Result<(), BlkError> + 'a;

/// Reads the partitions of a disk that has nothing in flight, in the order of their entries.
pub fn read<T: Transport>(disk: &mut Blk<T>, each: &mut dyn FnMut(Partition)) -> Result<(), GptError> {
    let (sectors, block_bytes) = (disk.sectors(), disk.block_bytes());
    read_from(&mut |sector, out| disk.read_now(sector, out), sectors, block_bytes, each)
}

/// Reads the partitions through `read`; the disk has `sectors` sectors and blocks of `block_bytes`.
fn read_from(
    read: &mut Read<'_>,
    sectors: u64,
    block_bytes: u32,
    each: &mut dyn FnMut(Partition),
) -> Result<(), GptError> {
    let per_block = u64::from(block_bytes) / SECTOR;
    if per_block == 0 || !u64::from(block_bytes).is_multiple_of(SECTOR) {
        return Err(GptError::Missing);
    }
    let last_block = (sectors / per_block).checked_sub(1).ok_or(GptError::Missing)?;
    let mut outcome = GptError::Missing;
    for block in [1, last_block] {
        match check(read, block, per_block, sectors) {
            Ok(header) => return entries(read, header, per_block, sectors, each),
            // A missing copy does not make a damaged one look missing.
            Err(GptError::Missing) => {}
            Err(error) => outcome = error,
        }
    }
    if outcome == GptError::Missing {
        let mut buffer = [0; BUFFER];
        read(0, &mut buffer).map_err(GptError::Disk)?;
        if buffer.ends_with(&BOOT_SIGNATURE) {
            return Err(GptError::Foreign);
        }
    }
    Err(outcome)
}

/// Reads the header in `block`, and both checksums.
fn check(read: &mut Read<'_>, block: u64, per_block: u64, sectors: u64) -> Result<Header, GptError> {
    let mut buffer = [0; BUFFER];
    let at = block.checked_mul(per_block).filter(|at| *at < sectors).ok_or(GptError::Missing)?;
    read(at, &mut buffer).map_err(GptError::Disk)?;
    let header = parse_header(&buffer, block, per_block)?;
    let mut left = u64::from(header.count) * header.entry_bytes as u64;
    let mut checksum = Hasher::new();
    let mut sector = header.first_sector;
    while left > 0 {
        if sector >= sectors {
            return Err(GptError::Damaged);
        }
        read(sector, &mut buffer).map_err(GptError::Disk)?;
        let part = usize::try_from(left).map_or(BUFFER, |left| left.min(BUFFER));
        checksum.update(&buffer[..part]);
        left -= part as u64;
        sector += 1;
    }
    if checksum.finalize() == header.checksum { Ok(header) } else { Err(GptError::Damaged) }
}

fn parse_header(buffer: &[u8; BUFFER], block: u64, per_block: u64) -> Result<Header, GptError> {
    if buffer.first_chunk() != Some(SIGNATURE) {
        return Err(GptError::Missing);
    }
    let size = usize::try_from(word(buffer, 12)).map_err(|_| GptError::Damaged)?;
    if !(HEADER_BYTES..=BUFFER).contains(&size) || long(buffer, 24) != block {
        return Err(GptError::Damaged);
    }
    let mut checksum = Hasher::new();
    checksum.update(&buffer[..16]);
    checksum.update(&[0; 4]);
    checksum.update(&buffer[20..size]);
    let count = word(buffer, 80);
    let entry_bytes = usize::try_from(word(buffer, 84)).map_err(|_| GptError::Damaged)?;
    let entry_fits = (ENTRY_BYTES..=BUFFER).contains(&entry_bytes) && entry_bytes.is_power_of_two();
    if checksum.finalize() != word(buffer, 16) || count > MAX_ENTRIES || !entry_fits {
        return Err(GptError::Damaged);
    }
    let first_sector = long(buffer, 72).checked_mul(per_block).ok_or(GptError::Damaged)?;
    Ok(Header { first_sector, count, entry_bytes, checksum: word(buffer, 88) })
}

fn entries(
    read: &mut Read<'_>,
    header: Header,
    per_block: u64,
    sectors: u64,
    each: &mut dyn FnMut(Partition),
) -> Result<(), GptError> {
    let mut buffer = [0; BUFFER];
    let mut left = usize::try_from(header.count).map_err(|_| GptError::Damaged)?;
    let mut sector = header.first_sector;
    while left > 0 {
        read(sector, &mut buffer).map_err(GptError::Disk)?;
        for entry in buffer.chunks_exact(header.entry_bytes).take(left) {
            if let Some(partition) = parse_entry(entry, per_block, sectors)? {
                each(partition);
            }
        }
        left = left.saturating_sub(BUFFER / header.entry_bytes);
        sector += 1;
    }
    Ok(())
}

/// The partition in an entry, if it is used.
fn parse_entry(entry: &[u8], per_block: u64, sectors: u64) -> Result<Option<Partition>, GptError> {
    let id = |at: usize| entry.get(at..at + 16).and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; 16]);
    let kind: [u8; 16] = id(0);
    if kind == [0; 16] {
        return Ok(None);
    }
    let first = long(entry, 32).checked_mul(per_block).ok_or(GptError::Damaged)?;
    let end = long(entry, 40).checked_add(1).and_then(|end| end.checked_mul(per_block));
    let end = end.filter(|end| *end <= sectors && first < *end).ok_or(GptError::Damaged)?;
    let units = entry.get(56..128).unwrap_or_default().chunks_exact(2);
    let units = units.map(|pair| u16::from_le_bytes([pair[0], pair[1]])).take_while(|unit| *unit != 0);
    let mut name = ArrayString::new();
    for letter in char::decode_utf16(units) {
        // 36 units always fit: see MAX_NAME.
        let _ = name.try_push(letter.unwrap_or(char::REPLACEMENT_CHARACTER));
    }
    Ok(Some(Partition { name, kind, unique: id(16), first_sector: first, sectors: end - first }))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::{String, ToString};
    use std::vec;
    use std::vec::Vec;

    const BLOCKS: usize = 256;

    /// A disk of 256 blocks with these partitions, a table at its start and one at its end.
    fn disk(partitions: &[(&str, u64, u64)], block: usize) -> Vec<u8> {
        let mut disk = vec![0; BLOCKS * block];
        let mut entries = vec![0; 128 * ENTRY_BYTES];
        for (index, (name, first, last)) in partitions.iter().enumerate() {
            let entry = &mut entries[index * ENTRY_BYTES..][..ENTRY_BYTES];
            entry[..16].fill(0x11);
            entry[16..32].fill(u8::try_from(index).unwrap());
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
            for (at, unit) in name.encode_utf16().enumerate() {
                entry[56 + at * 2..][..2].copy_from_slice(&unit.to_le_bytes());
            }
        }
        let blocks_of_entries = entries.len().div_ceil(block);
        let last = BLOCKS - 1;
        for (own, first_entry) in [(1, 2), (last, last - blocks_of_entries)] {
            let mut header = [0_u8; HEADER_BYTES];
            header[..8].copy_from_slice(SIGNATURE);
            header[8..12].copy_from_slice(&0x1_0000_u32.to_le_bytes());
            header[12..16].copy_from_slice(&92_u32.to_le_bytes());
            header[24..32].copy_from_slice(&(own as u64).to_le_bytes());
            header[72..80].copy_from_slice(&(first_entry as u64).to_le_bytes());
            header[80..84].copy_from_slice(&128_u32.to_le_bytes());
            header[84..88].copy_from_slice(&128_u32.to_le_bytes());
            header[88..].copy_from_slice(&crc32fast::hash(&entries).to_le_bytes());
            let checksum = crc32fast::hash(&header);
            header[16..20].copy_from_slice(&checksum.to_le_bytes());
            disk[own * block..][..HEADER_BYTES].copy_from_slice(&header);
            disk[first_entry * block..][..entries.len()].copy_from_slice(&entries);
        }
        disk
    }

    fn partitions(disk: &[u8], block: u32) -> Result<Vec<(String, u64, u64)>, GptError> {
        let mut found = Vec::new();
        let mut read = |sector: u64, out: &mut [u8; BUFFER]| {
            let at = usize::try_from(sector).unwrap() * BUFFER;
            out.copy_from_slice(disk.get(at..at + BUFFER).ok_or(BlkError::Refused)?);
            Ok(())
        };
        read_from(&mut read, (disk.len() / BUFFER) as u64, block, &mut |partition| {
            found.push((partition.name.to_string(), partition.first_sector, partition.sectors));
        })?;
        Ok(found)
    }

    #[test]
    fn partitions_come_with_their_names_in_the_order_of_the_table() {
        let disk = disk(&[("kernel", 64, 71), ("Größe 𝄞", 72, 72)], 512);
        let expected = [("kernel".to_string(), 64, 8), ("Größe 𝄞".to_string(), 72, 1)];
        assert_eq!(partitions(&disk, 512).unwrap(), expected);
    }

    #[test]
    fn a_disk_of_large_blocks_counts_in_them() {
        let disk = disk(&[("a", 10, 11)], 4096);
        assert_eq!(partitions(&disk, 4096).unwrap(), [("a".to_string(), 80, 16)]);
    }

    #[test]
    fn a_damaged_table_is_replaced_by_its_copy_and_two_damaged_ones_by_an_error() {
        let mut disk = disk(&[("a", 64, 64)], 512);
        disk[512 + 72] ^= 1; // the first header
        assert_eq!(partitions(&disk, 512).unwrap().len(), 1);
        let last = disk.len() - 512;
        disk[last - 32 * 512 + 40] ^= 1; // an entry of the copy
        assert_eq!(partitions(&disk, 512).unwrap_err(), GptError::Damaged);
    }

    #[test]
    fn a_partition_that_leaves_the_disk_is_refused() {
        let disk = disk(&[("a", 64, 256)], 512);
        assert_eq!(partitions(&disk, 512).unwrap_err(), GptError::Damaged);
    }

    #[test]
    fn what_begins_as_a_disk_with_a_table_and_has_none_of_ours_is_foreign() {
        let mut old = vec![0; 64 * 512];
        old[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(partitions(&old, 512).unwrap_err(), GptError::Foreign);
        // Made for blocks of 4096 bytes, and seen with blocks of 512.
        let mut other = disk(&[("a", 16, 32)], 4096);
        other[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(partitions(&other, 512).unwrap_err(), GptError::Foreign);
    }

    #[test]
    fn a_disk_without_a_table_says_so() {
        assert_eq!(partitions(&vec![0; 64 * 512], 512).unwrap_err(), GptError::Missing);
        assert_eq!(partitions(&[], 512).unwrap_err(), GptError::Missing);
    }
}
