//! What kind of program is this? Answered from an image's first page.
//!
//! Three kinds start a guest: the arm64 Linux `Image` with its 64-byte header, an ELF64 executable for
//! AArch64, and anything else, which is flat. Only headers are read; nothing of the program is trusted:
//! every number is checked when it is used, here or in `plan`. Called by `plan`. Calls nothing.

use alloc::vec::Vec;
use core::fmt;

/// Loadable segments that an ELF may have at most.
pub const MAX_SEGMENTS: usize = 8;
/// Bytes of an image that are looked at: its first page.
pub const HEAD: usize = 4096;

/// A program, by what its first bytes say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    /// A Linux kernel, or something that boots like one.
    Linux(LinuxHeader),
    /// An ELF executable.
    Elf(Elf),
    /// No header that we know: entered at its first byte.
    Flat,
}

/// What the header of an arm64 `Image` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinuxHeader {
    /// Bytes between a 2 MiB boundary and the image's start.
    pub text_offset: u64,
    /// Bytes that the kernel uses from its start, those behind the file included. Never zero.
    pub image_size: u64,
}

/// Where an ELF executable's parts go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// The first instruction's address.
    pub entry: u64,
    /// What is to be loaded, as the file lists it; never empty.
    pub segments: Vec<Segment>,
}

/// One loadable segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The guest physical address of its first byte.
    pub at: u64,
    /// Where it starts in the file.
    pub file_offset: u64,
    /// Bytes of it that are in the file.
    pub file_bytes: u64,
    /// Bytes of it in memory; what the file does not have is zero.
    pub memory_bytes: u64,
}

/// Why an image cannot be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageError {
    /// There is nothing in it.
    Empty,
    /// It is compressed, and nobody unpacked it.
    Compressed,
    /// The `Image` header says big-endian: the rest of the machine would not match.
    BigEndianKernel,
    /// The `Image` header is from before Linux 3.17 and does not say how much memory the kernel uses.
    KernelSizeUnknown,
    /// The `Image` header's kernel is built for pages that are not 4, 16 or 64 KiB.
    KernelFlags(u64),
    /// An ELF, but not a little-endian 64-bit executable for AArch64.
    NotForThisMachine {
        /// The byte or word that says so.
        what: &'static str,
    },
    /// The ELF's table of segments is not within the first page, or its entries are of a wrong size.
    SegmentTable,
    /// The ELF has more loadable segments than [`MAX_SEGMENTS`].
    TooManySegments,
    /// The ELF has nothing to load.
    NothingToLoad,
    /// A segment holds more in the file than in memory, or one of its ends does not fit 64 bits.
    SegmentSize {
        /// Which, counted among all entries of the table.
        index: usize,
    },
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the image is empty"),
            Self::Compressed => f.write_str("the image is compressed; unpack it first"),
            Self::BigEndianKernel => f.write_str("the kernel is big-endian"),
            Self::KernelSizeUnknown => f.write_str("the kernel's header does not say its size"),
            Self::KernelFlags(flags) => write!(f, "the kernel's header has unknown flags {flags:#x}"),
            Self::NotForThisMachine { what } => write!(f, "not an AArch64 ELF executable: {what}"),
            Self::SegmentTable => f.write_str("the ELF's program headers are not in its first page"),
            Self::TooManySegments => write!(f, "the ELF has more than {MAX_SEGMENTS} loadable segments"),
            Self::NothingToLoad => f.write_str("the ELF has nothing to load"),
            Self::SegmentSize { index } => write!(f, "the size of the ELF's segment {index} makes no sense"),
        }
    }
}

/// Tells what `head`, the first page of an image (or all of a shorter one), starts.
pub fn program(head: &[u8]) -> Result<Program, ImageError> {
    if head.is_empty() {
        return Err(ImageError::Empty);
    }
    if head.get(56..60) == Some(b"ARM\x64") {
        return linux(head).map(Program::Linux);
    }
    if head.starts_with(b"\x7fELF") {
        return elf(head).map(Program::Elf);
    }
    // gzip; xz; zstd; the "zimg" of a self-unpacking EFI kernel.
    let packed: [&[u8]; 3] = [&[0x1f, 0x8b], &[0xfd, b'7', b'z', b'X', b'Z', 0], &[0x28, 0xb5, 0x2f, 0xfd]];
    if packed.iter().any(|magic| head.starts_with(magic)) || head.get(4..8) == Some(b"zimg") {
        return Err(ImageError::Compressed);
    }
    Ok(Program::Flat)
}

fn linux(head: &[u8]) -> Result<LinuxHeader, ImageError> {
    // Documentation/arch/arm64/booting.rst: code0, code1, then these three, little-endian.
    let field = |at| word64(head, at).ok_or(ImageError::KernelSizeUnknown);
    let (text_offset, image_size, flags) = (field(8)?, field(16)?, field(24)?);
    if image_size == 0 {
        return Err(ImageError::KernelSizeUnknown);
    }
    if flags & 1 != 0 {
        return Err(ImageError::BigEndianKernel);
    }
    // Bits 1 and 2 are the page size, bit 3 says that the kernel may lie anywhere.
    if flags >> 4 != 0 {
        return Err(ImageError::KernelFlags(flags));
    }
    Ok(LinuxHeader { text_offset, image_size })
}

fn elf(head: &[u8]) -> Result<Elf, ImageError> {
    const TYPE_EXEC: u16 = 2;
    const TYPE_DYN: u16 = 3;
    const MACHINE_AARCH64: u16 = 183;
    const HEADER_BYTES: usize = 56;
    let wrong = |what| Err(ImageError::NotForThisMachine { what });
    if head.get(4) != Some(&2) {
        return wrong("not 64-bit");
    }
    if head.get(5) != Some(&1) {
        return wrong("not little-endian");
    }
    if !matches!(word16(head, 16), Some(TYPE_EXEC | TYPE_DYN)) {
        return wrong("not an executable");
    }
    if word16(head, 18) != Some(MACHINE_AARCH64) {
        return wrong("another machine");
    }
    let table = ImageError::SegmentTable;
    let entry = word64(head, 24).ok_or(table)?;
    let first = word64(head, 32).and_then(|at| usize::try_from(at).ok()).ok_or(table)?;
    if word16(head, 54).map(usize::from) != Some(HEADER_BYTES) {
        return Err(table);
    }
    let count = usize::from(word16(head, 56).ok_or(table)?);
    // At most 65,535 of 56 bytes, so the length fits.
    let end = first.checked_add(count * HEADER_BYTES).ok_or(table)?;
    let headers = head.get(first..end).ok_or(table)?;
    let mut segments = Vec::new();
    for (index, header) in headers.chunks_exact(HEADER_BYTES).enumerate() {
        if let Some(segment) = segment(header, index)? {
            if segments.len() == MAX_SEGMENTS {
                return Err(ImageError::TooManySegments);
            }
            segments.push(segment);
        }
    }
    if segments.is_empty() {
        return Err(ImageError::NothingToLoad);
    }
    Ok(Elf { entry, segments })
}

/// One program header; `None` when there is nothing to load.
fn segment(header: &[u8], index: usize) -> Result<Option<Segment>, ImageError> {
    const LOAD: u32 = 1;
    let error = ImageError::SegmentSize { index };
    let field = |at| word64(header, at).ok_or(error);
    let segment =
        Segment { at: field(24)?, file_offset: field(8)?, file_bytes: field(32)?, memory_bytes: field(40)? };
    if word32(header, 0) != Some(LOAD) || segment.memory_bytes == 0 {
        return Ok(None);
    }
    let ends = segment.at.checked_add(segment.memory_bytes).is_some()
        && segment.file_offset.checked_add(segment.file_bytes).is_some();
    if !ends || segment.file_bytes > segment.memory_bytes {
        return Err(error);
    }
    Ok(Some(segment))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn word16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use alloc::vec;

    /// The first page of a kernel with that header.
    pub(crate) fn kernel_head(text_offset: u64, image_size: u64, flags: u64) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        head[..2].copy_from_slice(b"MZ");
        head[8..16].copy_from_slice(&text_offset.to_le_bytes());
        head[16..24].copy_from_slice(&image_size.to_le_bytes());
        head[24..32].copy_from_slice(&flags.to_le_bytes());
        head[56..60].copy_from_slice(b"ARM\x64");
        head
    }

    /// The first page of an ELF with those segments.
    pub(crate) fn elf_head(entry: u64, segments: &[Segment]) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        head[..6].copy_from_slice(b"\x7fELF\x02\x01");
        head[16] = 2;
        head[18] = 183;
        head[24..32].copy_from_slice(&entry.to_le_bytes());
        head[32] = 64;
        head[54] = 56;
        head[56..58].copy_from_slice(&u16::try_from(segments.len()).unwrap().to_le_bytes());
        for (index, segment) in segments.iter().enumerate() {
            let header = &mut head[64 + index * 56..][..56];
            header[0] = 1;
            for (at, value) in [
                (8, segment.file_offset),
                (24, segment.at),
                (32, segment.file_bytes),
                (40, segment.memory_bytes),
            ] {
                header[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        head
    }

    #[test]
    fn a_kernel_says_where_it_goes_and_how_much_it_uses() {
        let found = program(&kernel_head(0, 0x1f0_0000, 0xa)).unwrap();
        assert_eq!(found, Program::Linux(LinuxHeader { text_offset: 0, image_size: 0x1f0_0000 }));
        assert_eq!(program(&kernel_head(0, 0, 0xa)), Err(ImageError::KernelSizeUnknown));
        assert_eq!(program(&kernel_head(0, 1, 0xb)), Err(ImageError::BigEndianKernel));
        assert_eq!(program(&kernel_head(0, 1, 0x1a)), Err(ImageError::KernelFlags(0x1a)));
    }

    #[test]
    fn what_has_no_header_is_flat_however_short_and_what_is_packed_is_refused() {
        assert_eq!(program(&[0]), Ok(Program::Flat));
        assert_eq!(program(&[0x14; 59]), Ok(Program::Flat));
        assert_eq!(program(&[]), Err(ImageError::Empty));
        assert_eq!(program(&[0x1f, 0x8b, 8]), Err(ImageError::Compressed));
        assert_eq!(program(b"MZ\0\0zimg"), Err(ImageError::Compressed));
    }

    #[test]
    fn an_elf_is_read_only_as_far_as_its_first_page_goes() {
        let segment =
            Segment { at: 0x4008_0000, file_offset: 0x1000, file_bytes: 0x800, memory_bytes: 0x2000 };
        let head = elf_head(0x4008_0010, &[segment; 2]);
        let Ok(Program::Elf(elf)) = program(&head) else { panic!("not an ELF") };
        assert_eq!((elf.entry, elf.segments.as_slice()), (0x4008_0010, &[segment; 2][..]));
        assert_eq!(program(&head[..100]), Err(ImageError::SegmentTable));
        assert_eq!(program(&elf_head(0, &[])), Err(ImageError::NothingToLoad));
        assert_eq!(program(&elf_head(0, &[segment; 9])), Err(ImageError::TooManySegments));
        let longer = Segment { file_bytes: 0x2001, ..segment };
        assert_eq!(program(&elf_head(0, &[segment, longer])), Err(ImageError::SegmentSize { index: 1 }));
        let high = Segment { at: u64::MAX - 4, ..segment };
        assert_eq!(program(&elf_head(0, &[high])), Err(ImageError::SegmentSize { index: 0 }));
    }

    #[test]
    fn no_head_makes_the_reader_panic() {
        let segment = Segment { at: 1 << 40, file_offset: 1, file_bytes: 1, memory_bytes: 1 };
        let heads = [kernel_head(0, 1, 0), elf_head(0, &[segment; 3])];
        // A fixed generator: what fails once fails always.
        let mut state = 1u64;
        for round in 0..20_000usize {
            let mut head = heads[round % 2].clone();
            for _ in 0..3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                head[usize::try_from(state >> 32).unwrap() % 256] = state.to_le_bytes()[2];
            }
            head.truncate(usize::try_from(state >> 52).unwrap());
            let _ = program(&head);
        }
    }
}
