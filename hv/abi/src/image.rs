//! A stored guest: what lies on a disk that holds one.
//!
//! Everything is counted in pages of [`PAGE`] bytes, and all numbers are little-endian. Pages 0 and 1 are headers,
//! behind them come two halves; header `n` describes what is in half `n`. In a half come the guest's pages, in the
//! order of its regions, each at its own place (one that is all zeros has a place and is neither written nor read);
//! then a table with four bytes for each of them, 0 for zeros and else its [`sum`] under the image's key plus its
//! number; then the guest's state, as long as the header says.
//!
//! A guest is stored into the half whose header is not the newest. First that header is wiped; then the half is
//! written; then its header; then the other one is wiped. What was written is made durable after each of these four.
//! So a power cut at any point leaves the old image or the new one: of two headers that are whole the one with the
//! higher generation holds, a header that is not whole holds nothing, and a half is never written while a whole
//! header names it. A disk with no whole header and something where one would be is damaged.

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// How a header begins.
pub const MAGIC: [u8; 8] = *b"HVGUEST\0";
/// The format that this build reads and writes: to be raised whenever a header or the state of a guest changes.
pub const VERSION: u32 = 4;
/// Headers, and halves.
pub const SLOTS: usize = 2;
/// Bytes of a header's description at most: JSON, for people.
pub const TEXT_LIMIT: usize = 1024;
/// Bytes of a guest's state at most.
pub const STATE_LIMIT: u64 = 1 << 20;

/// Where the description begins in a header, and where its sum is.
const TEXT_AT: usize = 96;
const SUM_AT: usize = PAGE - 8;

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which of the two it is.
    pub slot: usize,
    /// Higher is newer; the first is 1.
    pub generation: u64,
    /// Pages in each half.
    pub half: u64,
    /// The guest's pages.
    pub pages: u64,
    /// Those of them that are not zeros.
    pub stored: u64,
    /// Bytes of the guest's state.
    pub state: u64,
    /// What sums are keyed with: a number that no other image has, as likely as not.
    pub key: u64,
    /// The sum of the table of sums, under the key.
    pub table_sum: u32,
    /// The sum of the state, under the key.
    pub state_sum: u32,
}

/// Why a header's page holds none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoHeader {
    /// It is wiped, or was never written.
    Empty,
    /// It was a header, or was to be one.
    Damaged,
    /// It is another version's.
    Version(u32),
    /// Something else is there.
    Foreign,
}

impl Header {
    /// The first page of this header's half.
    pub const fn start(&self) -> u64 {
        SLOTS as u64 + self.slot as u64 * self.half
    }

    /// Pages of the table of sums.
    pub const fn table_pages(&self) -> u64 {
        (self.pages * 4).div_ceil(PAGE as u64)
    }

    /// Pages that are used of the half.
    pub const fn used(&self) -> u64 {
        self.pages + self.table_pages() + self.state.div_ceil(PAGE as u64)
    }

    /// What the sum of a page is keyed with.
    pub const fn page_key(&self, page: u64) -> u64 {
        self.key.wrapping_add(page)
    }

    /// Writes it, with a description of at most [`TEXT_LIMIT`] bytes; more is cut off.
    pub fn encode(&self, text: &[u8], page: &mut [u8; PAGE]) {
        let text = text.get(..TEXT_LIMIT).unwrap_or(text);
        page.fill(0);
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            page[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&u32::from(self.slot == 1).to_le_bytes());
        for number in [self.generation, self.half, self.pages, self.stored, self.state, self.key] {
            put(&number.to_le_bytes());
        }
        put(&self.table_sum.to_le_bytes());
        put(&self.state_sum.to_le_bytes());
        put(&(text.len() as u64).to_le_bytes());
        page[TEXT_AT..TEXT_AT + text.len()].copy_from_slice(text);
        let sum = sum(&page[..SUM_AT], self.generation);
        page[SUM_AT..SUM_AT + 4].copy_from_slice(&sum.to_le_bytes());
    }

    /// Reads the header of a slot, and its description.
    pub fn decode(slot: usize, page: &[u8; PAGE]) -> Result<(Self, &[u8]), NoHeader> {
        let long = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&page[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&page[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        if page.iter().all(|byte| *byte == 0) {
            return Err(NoHeader::Empty);
        }
        if page[..8] != MAGIC {
            return Err(if is_half(page) { NoHeader::Damaged } else { NoHeader::Foreign });
        }
        if word(8) != VERSION {
            return Err(NoHeader::Version(word(8)));
        }
        let header = Self {
            slot,
            generation: long(16),
            half: long(24),
            pages: long(32),
            stored: long(40),
            state: long(48),
            key: long(56),
            table_sum: word(64),
            state_sum: word(68),
        };
        let text = usize::try_from(long(72)).ok().filter(|length| *length <= TEXT_LIMIT);
        let whole =
            word(12) == u32::from(slot == 1) && word(SUM_AT) == sum(&page[..SUM_AT], header.generation);
        match text {
            Some(length) if whole && header.is_sound() => Ok((header, &page[TEXT_AT..TEXT_AT + length])),
            Some(_) | None => Err(NoHeader::Damaged),
        }
    }

    /// True when its numbers fit together: no other header is one.
    pub fn is_sound(&self) -> bool {
        let most = u64::from(u32::MAX);
        (1..u64::MAX).contains(&self.generation)
            && self.pages > 0
            && self.pages <= most
            && self.half <= most
            && self.state <= STATE_LIMIT
            && self.used() <= self.half
            && self.stored <= self.pages
    }
}

/// True for what a header leaves that lacks its first sector: text, and a sum.
fn is_half(page: &[u8; PAGE]) -> bool {
    let (text, rest) = (512..TEXT_AT + TEXT_LIMIT, TEXT_AT + TEXT_LIMIT..SUM_AT);
    let zeros = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    let told = page[text].iter().all(|byte| *byte == 0 || *byte >= b' ');
    zeros(&page[..512]) && told && zeros(&page[rest]) && zeros(&page[SUM_AT + 4..])
}

/// Pages in each half of a disk of so many.
pub const fn half_of(pages: u64) -> u64 {
    pages.saturating_sub(SLOTS as u64) / 2
}

/// A sum of bytes that depends on `key`: what differs has the same one by chance only. Against a disk that is
/// mistaken, not one that means harm. A last part of eight bytes counts as if zeros followed.
#[derive(Clone, Copy, Debug)]
pub struct Sum(u64);

impl Sum {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

    /// Of nothing yet.
    pub const fn new(key: u64) -> Self {
        Self(key.wrapping_mul(Self::ODD))
    }

    /// More bytes: a multiple of eight, except the last time.
    pub fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.word(u64::from_le_bytes(*word)));
        if !rest.is_empty() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            self.word(u64::from_le_bytes(word));
        }
    }

    #[inline]
    const fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(Self::ODD);
    }

    /// The sum.
    pub const fn finish(self) -> u32 {
        let [a, b, c, d, e, f, g, h] = self.0.to_le_bytes();
        u32::from_le_bytes([a, b, c, d]) ^ u32::from_le_bytes([e, f, g, h])
    }
}

/// The [`Sum`] of some bytes.
pub fn sum(bytes: &[u8], key: u64) -> u32 {
    let mut sum = Sum::new(key);
    sum.add(bytes);
    sum.finish()
}

/// What the table says of a page with these bytes: 0 only when all of them are zero.
pub fn mark(bytes: &[u8; PAGE], key: u64) -> u32 {
    let (mut sum, mut any) = (Sum::new(key), 0);
    for word in bytes.as_chunks::<8>().0 {
        let word = u64::from_le_bytes(*word);
        any |= word;
        sum.word(word);
    }
    if any == 0 { 0 } else { sum.finish().max(1) }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    const HEADER: Header = Header {
        slot: 1,
        generation: 7,
        half: 1000,
        pages: 900,
        stored: 20,
        state: 5000,
        key: 0xfeed,
        table_sum: 1,
        state_sum: 2,
    };

    #[test]
    fn a_header_is_read_as_it_was_written_and_every_other_bit_makes_it_none() {
        let mut page = [0; PAGE];
        HEADER.encode(b"{}", &mut page);
        assert_eq!(Header::decode(1, &page), Ok((HEADER, b"{}".as_slice())));
        assert_eq!(Header::decode(0, &page), Err(NoHeader::Damaged), "it is the other slot's");
        for bit in 0..(TEXT_AT + 2) * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(1, &page).is_err(), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(Header::decode(1, &[0; PAGE]), Err(NoHeader::Empty));
        assert_eq!(Header::decode(1, &[b'x'; PAGE]), Err(NoHeader::Foreign));
    }

    #[test]
    fn half_a_header_is_damaged_and_not_empty() {
        let mut page = [0; PAGE];
        HEADER.encode(b"{\"name\": \"guest\"}", &mut page);
        for cut in (512..PAGE).step_by(512) {
            let (mut first, mut last) = (page, page);
            first[cut..].fill(0);
            last[..cut].fill(0);
            assert_eq!(Header::decode(1, &first), Err(NoHeader::Damaged), "{cut}");
            assert_eq!(Header::decode(1, &last), Err(NoHeader::Damaged), "{cut}");
        }
    }

    #[test]
    fn what_others_put_behind_an_empty_first_sector_is_foreign() {
        let with = |at: usize, bytes: &[u8]| {
            let mut page = [0; PAGE];
            page[at..at + bytes.len()].copy_from_slice(bytes);
            Header::decode(0, &page).err()
        };
        // Of a swap area, a physical volume of LVM, ext4 with blocks of 1 KiB.
        assert_eq!(with(PAGE - 10, b"SWAPSPACE2"), Some(NoHeader::Foreign));
        assert_eq!(with(512, b"LABELONE\x01\0\0\0\0\0\0\0"), Some(NoHeader::Foreign));
        assert_eq!(with(1024, b"\0\0\x01\0\0\0\x04\0"), Some(NoHeader::Foreign));
    }

    #[test]
    fn numbers_that_do_not_fit_together_are_no_header() {
        let mut page = [0; PAGE];
        for wrong in [
            Header { pages: 0, ..HEADER },
            Header { generation: 0, ..HEADER },
            Header { generation: u64::MAX, ..HEADER },
            Header { pages: 1000, ..HEADER },
            Header { state: u64::MAX, ..HEADER },
            Header { half: u64::MAX, ..HEADER },
            Header { stored: 901, ..HEADER },
        ] {
            wrong.encode(b"", &mut page);
            assert_eq!(Header::decode(1, &page), Err(NoHeader::Damaged), "{wrong:?}");
        }
    }

    #[test]
    fn a_sum_differs_with_every_bit_and_with_the_key_and_only_zeros_are_marked_as_such() {
        let mut page = [0_u8; PAGE];
        assert_eq!(mark(&page, 5), 0);
        page[100] = 1;
        let sum = mark(&page, 5);
        assert_ne!(sum, 0);
        assert_ne!(sum, mark(&page, 6));
        for bit in (0..PAGE * 8).step_by(61) {
            page[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(mark(&page, 5), sum, "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
