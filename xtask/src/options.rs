//! What options of `run` mean that are more than a number or a word, and which of them nothing can serve yet.
//!
//! Each is read in full before anything is built, so a slip costs a moment. What the hypervisor cannot do yet is
//! refused by name, never dropped.

use anyhow::{Result, ensure};
use hv_abi::manifest::{
    DISKS_LIMIT, NAME_LIMIT, PARTITION, PRIORITY_MOST, SWAP_LIMIT, SWAP_PARTITION, mebibytes,
};
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

/// `256M`, `1G`, or a plain number of MiB; in MiB.
pub(crate) fn size_mib(text: &str) -> Result<u64, String> {
    mebibytes(text).filter(|mib| *mib > 0).ok_or_else(|| "a size is written 256M or 1G".to_owned())
}

/// RAM of a guest, within what its machine has room for; in MiB.
pub(crate) fn guest_memory_mib(text: &str) -> Result<u64, String> {
    const LEAST: u64 = hv_abi::machine::RAM_LEAST >> 20;
    const MOST: u64 = hv_abi::machine::RAM_LIMIT >> 20;
    let mib = size_mib(text)?;
    if (LEAST..=MOST).contains(&mib) { Ok(mib) } else { Err(format!("a guest has from {LEAST}M to {MOST}M")) }
}

/// A file that is there.
pub(crate) fn file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match std::fs::metadata(&path) {
        Ok(found) if found.is_dir() => Err("that is a folder".to_owned()),
        Ok(_) => Ok(path),
        Err(why) => Err(why.to_string()),
    }
}

/// `NAME=FILE`, a partition's name and a file that is there.
pub(crate) fn named_image(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("another image is written NAME=FILE")?;
    if name.is_empty() || name.len() > NAME_LIMIT || name == PARTITION || name.starts_with(SWAP_PARTITION) {
        return Err(format!("no image can be called '{name}'"));
    }
    Ok((name.to_owned(), file(path)?))
}

/// A place for a socket: the kernel takes names of 107 bytes.
pub(crate) fn socket(text: &str) -> Result<PathBuf, String> {
    const MOST: usize = 107;
    match text.len() {
        0 => Err("it has no name".to_owned()),
        1..=MOST => Ok(text.into()),
        more => Err(format!("a socket's name has at most {MOST} bytes, this one {more}")),
    }
}

/// `--swap SIZE|FILE[,priority=N]`: where pages are swapped to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SwapPlace {
    /// Where.
    pub(crate) on: SwapOn,
    /// Higher ones are used first, equal ones in turn; those that have none come last, in their order.
    pub(crate) priority: Option<u16>,
}

/// Where there is room to swap to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SwapOn {
    /// So many MiB of the run's own disk.
    Own(u64),
    /// A file as a disk: all of it, or the swap partitions of its table.
    File(PathBuf),
}

/// What the slots of all places together are numbered for, in MiB.
const MOST_SWAP_MIB: u64 = 64 << 10;

/// Reads a size or a file that is there, and a priority behind it.
pub(crate) fn swap(text: &str) -> Result<SwapPlace, String> {
    let (name, priority) = match text.rsplit_once(",priority=") {
        None => (text, None),
        Some((name, number)) => {
            let known = number.parse::<u16>().ok().filter(|number| u64::from(*number) <= PRIORITY_MOST);
            (name, Some(known.ok_or_else(|| format!("a priority is a number from 0 to {PRIORITY_MOST}"))?))
        }
    };
    if let Ok(mib) = size_mib(name) {
        if mib > MOST_SWAP_MIB {
            return Err(format!("there are slots for {MOST_SWAP_MIB}M in all"));
        }
        return Ok(SwapPlace { on: SwapOn::Own(mib), priority });
    }
    let path = file(name).map_err(|why| format!("{why}; it is a size such as 1G, or a file"))?;
    let bytes = std::fs::metadata(&path).map_err(|why| why.to_string())?.len();
    if bytes == 0 || bytes % 512 != 0 {
        return Err(format!("a disk is some sectors of 512 bytes, not {bytes}"));
    }
    if bytes < 4096 {
        return Err(format!("{bytes} bytes have no room for a page of 4096"));
    }
    let mut start = [0; 1024];
    let read = std::fs::File::open(&path).and_then(|mut file| file.read_exact(&mut start));
    read.map_err(|why| why.to_string())?;
    // As the hypervisor sees it, which then leaves it alone. (A table of which only the copy at the end is left, it finds.)
    if start[510..512] == [0x55, 0xaa] && !start[512..].starts_with(b"EFI PART") {
        return Err("it has a partition table, or a boot sector, that is no GPT with sectors of 512 bytes; nothing is swapped there, \
                    so that nothing is lost. Wipe it (wipefs -a) if nothing on it is needed"
            .to_owned());
    }
    Ok(SwapPlace { on: SwapOn::File(path), priority })
}

/// A file by the one name that all its names lead to, if it is there.
fn whole(file: &Path) -> PathBuf {
    file.canonicalize().unwrap_or_else(|_| file.to_owned())
}

/// Refuses more places to swap to than there can be, one that is given twice, and a file that is given for something else
/// as well, each with its option: what is in it would be overwritten.
pub(crate) fn check_swap<'o>(
    places: &[SwapPlace],
    others: impl Iterator<Item = (&'o str, &'o Path)>,
) -> Result<()> {
    ensure!(places.len() <= SWAP_LIMIT, "--swap: {} places; there are at most {SWAP_LIMIT}", places.len());
    let files = |place: &SwapPlace| match &place.on {
        SwapOn::File(file) => Some(whole(file)),
        SwapOn::Own(_) => None,
    };
    let mut known = Vec::new();
    for file in places.iter().filter_map(files) {
        ensure!(!known.contains(&file), "--swap {}: it is given twice", file.display());
        known.push(file);
    }
    for (option, file) in others {
        let file = whole(file);
        ensure!(
            !known.contains(&file),
            "--swap {}: it is given as {option}, too, and would be overwritten; swap to another file",
            file.display()
        );
    }
    Ok(())
}

/// What becomes of a guest's writes to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writes {
    /// They go to the file.
    Persist,
    /// They are refused.
    Refused,
    /// They are the guest's own and end with it.
    Private,
}

impl Writes {
    /// The word for the manifest.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Persist => "through",
            Self::Refused => "refused",
            Self::Private => "private",
        }
    }
}

/// `--disk FILE[,ro|private]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskFile {
    /// The file.
    pub(crate) file: PathBuf,
    /// What becomes of writes.
    pub(crate) writes: Writes,
}

/// Reads `FILE[,ro|private]`; the file must be there.
pub(crate) fn disk(text: &str) -> Result<DiskFile, String> {
    let (name, writes) = match text.rsplit_once(',') {
        None => (text, Writes::Persist),
        Some((name, "ro")) => (name, Writes::Refused),
        Some((name, "private")) => (name, Writes::Private),
        // A comma may be part of the name.
        Some(_) if PathBuf::from(text).exists() => (text, Writes::Persist),
        Some((_, other)) => return Err(format!("'{other}' after the comma; it is ro or private")),
    };
    Ok(DiskFile { file: file(name)?, writes })
}

/// Refuses disks that so many guests cannot have: a file that one of them writes has no other user.
pub(crate) fn check_disks(disks: &[DiskFile], guests: u32) -> Result<()> {
    ensure!(disks.len() <= DISKS_LIMIT, "{} disks; a guest has at most {DISKS_LIMIT}", disks.len());
    for (number, disk) in disks.iter().enumerate() {
        if disk.writes == Writes::Persist {
            ensure!(
                guests == 1,
                "--disk {disk}: {guests} guests cannot all write to it; add ,private or ,ro"
            );
            let mut others = disks.iter().enumerate().filter(|(other, _)| *other != number);
            let twice = others.any(|(_, other)| whole(&other.file) == whole(&disk.file));
            ensure!(!twice, "--disk {disk}: it is given twice, and written to; add ,private or ,ro to both");
        }
        let bytes = std::fs::metadata(&disk.file)?.len();
        ensure!(
            bytes > 0 && bytes % 512 == 0,
            "--disk {disk}: a disk is some sectors of 512 bytes, not {bytes}"
        );
    }
    Ok(())
}

impl fmt::Display for DiskFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.writes {
            Writes::Persist => "",
            Writes::Refused => ",ro",
            Writes::Private => ",private",
        };
        write!(f, "{}{how}", self.file.display())
    }
}

/// `--overcommit strict|RATIO|none`: how much memory guests may be promised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Overcommit {
    /// So many hundredths of what is there.
    Percent(u32),
    /// Without bound.
    None,
}

impl Overcommit {
    /// The bound, if there is one.
    pub(crate) const fn percent(self) -> Option<u32> {
        match self {
            Self::Percent(percent) => Some(percent),
            Self::None => None,
        }
    }
}

/// Reads `strict`, `none` or a ratio such as 1.5, of two decimals at most.
pub(crate) fn overcommit(text: &str) -> Result<Overcommit, String> {
    let ratio = match text {
        "strict" => return Ok(Overcommit::Percent(100)),
        "none" => return Ok(Overcommit::None),
        ratio => ratio,
    };
    let (whole, part) = ratio.split_once('.').unwrap_or((ratio, ""));
    let part = if part.len() <= 2 { format!("{part:0<2}") } else { "too long".to_owned() };
    let percent =
        || whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(part.parse::<u8>().ok()?.into());
    match percent() {
        Some(percent @ 100..) => Ok(Overcommit::Percent(percent)),
        Some(_) => Err("a ratio is at least 1".to_owned()),
        None => Err("it is strict, none or a ratio such as 1.5".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(size_mib("256M"), Ok(256));
        assert_eq!(size_mib("2G"), Ok(2048));
        assert_eq!(size_mib("64"), Ok(64));
        for wrong in ["0", "lots", "", "M", "-1", "1.5G", "99999999999999999G"] {
            assert!(size_mib(wrong).is_err(), "{wrong}");
        }
        assert!(guest_memory_mib("1M").is_err());
        assert!(guest_memory_mib("1024G").is_err());
    }

    #[test]
    fn a_place_to_swap_to_is_a_size_or_a_file_that_is_there_and_perhaps_a_priority() {
        let own = |mib, priority| Ok(SwapPlace { on: SwapOn::Own(mib), priority });
        assert_eq!(swap("1G"), own(1024, None));
        assert_eq!(swap("256M,priority=32767"), own(256, Some(32767)));
        let name = std::env::temp_dir().join(format!("xtask-swap-{}", std::process::id()));
        std::fs::write(&name, [0; 8192]).unwrap();
        let on = SwapOn::File(name.clone());
        assert_eq!(swap(&format!("{},priority=0", name.display())), Ok(SwapPlace { on, priority: Some(0) }));
        std::fs::write(&name, [0; 1000]).unwrap();
        assert!(swap(&name.display().to_string()).is_err_and(|why| why.contains("not 1000")));
        std::fs::write(&name, [0; 3584]).unwrap();
        assert!(swap(&name.display().to_string()).is_err_and(|why| why.contains("no room for a page")));
        let mut disk = [0; 8192];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(&name, disk).unwrap();
        assert!(swap(&name.display().to_string()).is_err_and(|why| why.contains("partition table")));
        disk[512..520].copy_from_slice(b"EFI PART");
        std::fs::write(&name, disk).unwrap();
        assert!(swap(&name.display().to_string()).is_ok());
        std::fs::remove_file(&name).unwrap();
        for wrong in [
            "0",
            "",
            "/nowhere",
            "65G",
            "17592186044480M",
            "1G,priority=32768",
            "1G,priority=-1",
            "1G,priority=",
        ] {
            assert!(swap(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_disk_is_a_file_that_is_there_and_perhaps_what_becomes_of_writes() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        assert_eq!(disk(file).map(|d| d.writes), Ok(Writes::Persist));
        assert_eq!(disk(&format!("{file},ro")).map(|d| d.writes), Ok(Writes::Refused));
        assert_eq!(disk(&format!("{file},private")).map(|d| d.to_string()), Ok(format!("{file},private")));
        assert!(disk(&format!("{file},rw")).is_err_and(|why| why.contains("'rw' after the comma")));
        assert!(disk("/nowhere,ro").is_err());
    }

    #[test]
    fn a_file_to_swap_to_has_no_other_use() {
        let file = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
        let place = || SwapPlace { on: SwapOn::File(file.to_owned()), priority: None };
        let refused = |places: &[SwapPlace], others: &[(&'static str, &Path)], words: &str| {
            check_swap(places, others.iter().copied()).is_err_and(|why| why.to_string().contains(words))
        };
        assert!(check_swap(&[place()], std::iter::once(("--disk", Path::new("/nowhere")))).is_ok());
        assert!(refused(&[place(), place()], &[], "given twice"));
        assert!(refused(&[place()], &[("--kernel", Path::new("/nowhere")), ("--disk", file)], "as --disk"));
    }

    #[test]
    fn a_file_that_a_guest_writes_to_has_no_other_user() {
        let file = std::env::temp_dir().join(format!("xtask-disk-{}", std::process::id()));
        std::fs::write(&file, [0; 1024]).unwrap();
        let disks = |all: &[Writes]| -> Vec<_> {
            all.iter().map(|&writes| DiskFile { file: file.clone(), writes }).collect()
        };
        let refused = |all: &[Writes], guests, words: &str| {
            check_disks(&disks(all), guests).is_err_and(|why| why.to_string().contains(words))
        };
        assert!(check_disks(&disks(&[Writes::Persist]), 1).is_ok());
        assert!(check_disks(&disks(&[Writes::Private, Writes::Refused, Writes::Private]), 9).is_ok());
        assert!(refused(&[Writes::Persist], 2, "2 guests cannot all write"));
        assert!(refused(&[Writes::Persist, Writes::Refused], 1, "given twice"));
        assert!(refused(&[Writes::Private; 9], 1, "at most 8"));
        std::fs::write(&file, [0; 1000]).unwrap();
        assert!(refused(&[Writes::Persist], 1, "sectors of 512 bytes, not 1000"));
        std::fs::remove_file(&file).unwrap();
    }

    #[test]
    fn another_image_is_a_name_that_a_partition_can_have_and_a_file_that_is_there() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        assert_eq!(named_image(&format!("tiny={file}")), Ok(("tiny".to_owned(), file.into())));
        for wrong in ["", "manifest", "swap", "swap-1", &"n".repeat(37)] {
            assert!(named_image(&format!("{wrong}={file}")).is_err(), "{wrong}");
        }
        for wrong in [file, "tiny=/nowhere", "tiny="] {
            assert!(named_image(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_overcommit_is_a_word_or_a_ratio_of_at_least_one() {
        assert_eq!(overcommit("strict"), Ok(Overcommit::Percent(100)));
        assert_eq!(overcommit("1.5"), Ok(Overcommit::Percent(150)));
        assert_eq!(overcommit("3.25"), Ok(Overcommit::Percent(325)));
        assert_eq!(overcommit("none"), Ok(Overcommit::None));
        for wrong in ["0.5", "inf", "NaN", "loose", ""] {
            assert!(overcommit(wrong).is_err(), "{wrong}");
        }
    }
}
