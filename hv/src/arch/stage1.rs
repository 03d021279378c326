//! EL2's own map, built in memory: identity, W^X, with holes where nothing may be touched.
//!
//! [`Map::set`] may be called again for a part of what an earlier call set: it splits blocks as it must, so
//! the caller goes from coarse to fine (all RAM, then the image's parts, then guard pages). Built before the
//! MMU uses it, so no break-before-make. `boot` is the caller; the MMU is turned on in `aarch64::mmu`.

/// One table, in any level.
pub type Table = [u64; 512];

/// What a range is for; decides what EL2 may do there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Code: read and execute.
    Text,
    /// Constants: read.
    ReadOnly,
    /// Everything that is written: never executed.
    Data,
    /// Device registers.
    Device,
    /// Nothing: an access faults.
    Nothing,
}

/// The tables that were given are used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfTables;

/// Bits of virtual address: four levels.
pub const VA_BITS: u32 = 48;
const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 2;
/// MAIR index of device memory; normal memory is 0.
const DEVICE_INDEX: u64 = 1 << 2;
/// AP[1], which is one in a map with one privilege level.
const AP_RES1: u64 = 1 << 6;
const AP_READ_ONLY: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 3 << 8;
const ACCESSED: u64 = 1 << 10;
const EXECUTE_NEVER: u64 = 1 << 54;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// A block descriptor's bits for early boot: normal memory, everything allowed.
pub const EARLY_BLOCK: u64 = VALID | AP_RES1 | INNER_SHAREABLE | ACCESSED;
/// MAIR_EL2: 0 is normal write-back memory, 1 is device memory without gathering or reordering.
pub const MAIR: u64 = 0x04ff;
/// TCR_EL2 but for PS: 48 bits, 4 KiB granule, walks cached and inner shareable.
pub const TCR: u64 = (64 - VA_BITS as u64) | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 1 << 31;

impl Use {
    /// Descriptor bits but for the address and the type; zero for nothing.
    const fn bits(self) -> u64 {
        let common = VALID | AP_RES1 | ACCESSED;
        match self {
            Self::Text => common | INNER_SHAREABLE | AP_READ_ONLY,
            Self::ReadOnly => common | INNER_SHAREABLE | AP_READ_ONLY | EXECUTE_NEVER,
            Self::Data => common | INNER_SHAREABLE | EXECUTE_NEVER,
            Self::Device => common | DEVICE_INDEX | EXECUTE_NEVER,
            Self::Nothing => 0,
        }
    }
}

/// A map under construction.
pub struct Map<'a> {
    tables: &'a mut [Table],
    base: u64,
    used: usize,
}

impl<'a> Map<'a> {
    /// An empty map in `tables`, the first of which lies at physical address `base`; `None` without tables.
    pub fn new(tables: &'a mut [Table], base: u64) -> Option<Self> {
        tables.first_mut()?.fill(0);
        Some(Self { tables, base, used: 1 })
    }

    /// The physical address of the root.
    pub fn root(&self) -> u64 {
        self.base
    }

    /// Tables used.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Maps the pages that `start..end` touches, each at its own address.
    pub fn set(&mut self, start: u64, end: u64, what: Use) -> Result<(), OutOfTables> {
        let (start, end) = (start & ADDRESS, end.saturating_add(0xfff) & ADDRESS);
        self.set_in(0, 0, 0, (start, end), what.bits())
    }

    /// What an address is mapped as: the descriptor, for tests and for the self test at boot.
    pub fn lookup(&self, address: u64) -> Option<u64> {
        let mut table = 0;
        for level in 0..4 {
            let entry = *self.tables.get(table)?.get(index(address, level))?;
            match (entry & VALID != 0, entry & TABLE_OR_PAGE != 0 && level < 3) {
                (false, _) => return None,
                (true, true) => table = self.table_of(entry)?,
                (true, false) => return Some(entry),
            }
        }
        None
    }

    fn set_in(
        &mut self,
        table: usize,
        level: u32,
        base: u64,
        (start, end): (u64, u64),
        bits: u64,
    ) -> Result<(), OutOfTables> {
        let size = 1_u64 << shift(level);
        for slot in 0..512_u64 {
            let first = base + slot * size;
            let (lo, hi) = (start.max(first), end.min(first + size));
            if lo >= hi {
                continue;
            }
            let at = usize::try_from(slot).map_err(|_| OutOfTables)?;
            if hi - lo == size && level > 0 {
                let kind = if level == 3 { TABLE_OR_PAGE } else { 0 };
                self.tables[table][at] = if bits == 0 { 0 } else { first | bits | kind };
            } else {
                let below = self.descend(table, at, level)?;
                self.set_in(below, level + 1, first, (lo, hi), bits)?;
            }
        }
        Ok(())
    }

    /// The table below an entry, made if need be: empty, or with the entry's block in smaller pieces.
    fn descend(&mut self, table: usize, at: usize, level: u32) -> Result<usize, OutOfTables> {
        let entry = self.tables[table][at];
        if entry & (VALID | TABLE_OR_PAGE) == VALID | TABLE_OR_PAGE {
            return self.table_of(entry).ok_or(OutOfTables);
        }
        let new = self.used;
        let fresh = self.tables.get_mut(new).ok_or(OutOfTables)?;
        self.used += 1;
        fresh.fill(0);
        if entry & VALID != 0 {
            let kind = if level == 2 { TABLE_OR_PAGE } else { 0 };
            for (n, piece) in (0..).zip(fresh.iter_mut()) {
                *piece = (entry + (n << shift(level + 1))) | kind;
            }
        }
        let offset = u64::try_from(new * size_of::<Table>()).map_err(|_| OutOfTables)?;
        self.tables[table][at] = (self.base + offset) | VALID | TABLE_OR_PAGE;
        Ok(new)
    }

    fn table_of(&self, entry: u64) -> Option<usize> {
        let offset = usize::try_from((entry & ADDRESS).checked_sub(self.base)?).ok()?;
        Some(offset / size_of::<Table>())
    }
}

/// log2 of what one entry of a level covers.
const fn shift(level: u32) -> u32 {
    39 - 9 * level
}

/// An address's entry in a table of a level.
const fn index(address: u64, level: u32) -> usize {
    // Nine bits: fits any usize.
    ((address >> shift(level)) & 0x1ff) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x4100_0000;

    #[test]
    fn what_is_code_is_never_writable_and_what_is_writable_is_never_executed() {
        let mut tables = [[0; 512]; 8];
        let mut map = Map::new(&mut tables, BASE).unwrap();
        map.set(0x4000_0000, 0x8000_0000, Use::Data).unwrap();
        map.set(0x4020_0000, 0x4023_4000, Use::Text).unwrap();
        map.set(0x4023_4000, 0x4024_0000, Use::ReadOnly).unwrap();
        let text = map.lookup(0x4020_1000).unwrap();
        assert_eq!((text & AP_READ_ONLY, text & EXECUTE_NEVER), (AP_READ_ONLY, 0));
        let constants = map.lookup(0x4023_4000).unwrap();
        assert_eq!((constants & AP_READ_ONLY, constants & EXECUTE_NEVER), (AP_READ_ONLY, EXECUTE_NEVER));
        for data in [0x4000_0000, 0x401f_f000, 0x4024_0000, 0x7fff_f000] {
            let data = map.lookup(data).unwrap();
            assert_eq!((data & AP_READ_ONLY, data & EXECUTE_NEVER), (0, EXECUTE_NEVER));
        }
        assert_eq!(map.lookup(0x8000_0000), None);
    }

    #[test]
    fn splitting_a_block_leaves_every_other_page_where_it_was() {
        let mut tables = [[0; 512]; 8];
        let mut map = Map::new(&mut tables, BASE).unwrap();
        map.set(0x4000_0000, 0x1_0000_0000, Use::Data).unwrap();
        map.set(0x5000_3000, 0x5000_4000, Use::Nothing).unwrap();
        assert_eq!(map.lookup(0x5000_3000), None);
        for page in [0x5000_2000, 0x5000_4000, 0x5040_0000_u64] {
            let entry = map.lookup(page).unwrap();
            let below = if entry & TABLE_OR_PAGE != 0 { 0xfff } else { 0x1f_ffff };
            assert_eq!((entry & ADDRESS) | (page & below), page);
        }
    }

    #[test]
    fn running_out_of_tables_is_an_error() {
        let mut tables = [[0; 512]; 2];
        let mut map = Map::new(&mut tables, BASE).unwrap();
        assert_eq!(map.set(0x1000, 0x2000, Use::Device), Err(OutOfTables));
    }
}
