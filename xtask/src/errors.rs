//! Errors of a disk: at which places of the swap room QEMU's blkdebug fails, and whether once or for ever.
//!
//! A place is one sector; a request fails that comes by it. The places are the same in every run.

use anyhow::{Context, Result, ensure};
use std::fmt::Write as _;
use std::path::Path;

/// How many places fail, by how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    /// The first read there.
    read_once: u64,
    /// The first write there.
    write_once: u64,
    /// Every read there.
    read: u64,
    /// Every write there.
    write: u64,
}

const SECTOR: u64 = 512;
const PAGE: u64 = 4096;

impl Places {
    /// Four numbers with commas between them.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let numbers: Option<Vec<u64>> = text.split(',').map(|number| number.parse().ok()).collect();
        match numbers.as_deref() {
            Some(&[read_once, write_once, read, write]) => Ok(Self { read_once, write_once, read, write }),
            _ => {
                Err("four numbers: reads and writes that fail once, reads and writes that always fail".into())
            }
        }
    }

    /// Writes the rules for a room that begins at a byte of the disk and has so many.
    pub(crate) fn write(self, path: &Path, (start, bytes): (u64, u64)) -> Result<()> {
        std::fs::write(path, self.rules(start, bytes)?).with_context(|| format!("writing {}", path.display()))
    }

    fn rules(self, start: u64, bytes: u64) -> Result<String> {
        let all = self.read_once + self.write_once + self.read + self.write;
        let pages = bytes / PAGE;
        ensure!(all <= pages, "{all} places do not fit on {pages} pages");
        let mut rules = String::new();
        let mut order = Order::new(pages);
        let kinds = [
            (self.read_once, "read", "on"),
            (self.write_once, "write", "on"),
            (self.read, "read", "off"),
            (self.write, "write", "off"),
        ];
        for (count, io, once) in kinds {
            for page in order.by_ref().take(usize::try_from(count)?) {
                let sector = (start + page * PAGE) / SECTOR + page % (PAGE / SECTOR);
                writeln!(
                    rules,
                    "[inject-error]\nevent = \"none\"\niotype = \"{io}\"\nerrno = \"5\"\nsector = \"{sector}\"\nonce = \"{once}\""
                )?;
            }
        }
        Ok(rules)
    }
}

/// Every number below a limit once, in no order to speak of: multiples of a prime that does not divide it.
struct Order {
    limit: u64,
    step: u64,
    next: u64,
}

impl Order {
    const PRIMES: [u64; 2] = [1_000_003, 999_983];

    fn new(limit: u64) -> Self {
        let step = if limit.is_multiple_of(Self::PRIMES[0]) { Self::PRIMES[1] } else { Self::PRIMES[0] };
        Self { limit, step, next: 0 }
    }
}

impl Iterator for Order {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let now = self.next;
        self.next = (now + self.step) % self.limit;
        Some(now)
    }
}

/// How many requests QEMU's log says failed.
pub(crate) fn failed(log: &Path) -> Result<u64> {
    let text = std::fs::read_to_string(log).with_context(|| format!("reading {}", log.display()))?;
    Ok(text
        .lines()
        .filter(|line| line.contains("virtio_blk_req_complete") && line.ends_with("status 1"))
        .count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_another_page_of_the_room() {
        let places = Places::parse("30,20,10,4").unwrap();
        let rules = places.rules(1 << 20, 64 * PAGE).unwrap();
        let mut pages: Vec<u64> = rules
            .lines()
            .filter_map(|line| line.strip_prefix("sector = \"")?.strip_suffix('"')?.parse::<u64>().ok())
            .map(|sector| (sector * SECTOR - (1 << 20)) / PAGE)
            .collect();
        pages.sort_unstable();
        assert_eq!(pages, (0..64).collect::<Vec<_>>());
        assert_eq!(rules.matches("iotype = \"read\"").count(), 40);
        assert_eq!(rules.matches("once = \"off\"").count(), 14);
        assert!(places.rules(0, 63 * PAGE).is_err());
    }
}
