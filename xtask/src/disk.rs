//! The image disk: a GPT with one named partition per image, and the manifest that says what to boot.

use crate::options::{SwapOn, SwapPlace};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// One guest, as the manifest describes it. Images are named by partition.
#[derive(Clone, Debug, Default)]
pub(crate) struct Guest {
    /// Its name.
    pub(crate) name: String,
    /// A kernel or flat program.
    pub(crate) kernel: Option<String>,
    /// An initial RAM disk.
    pub(crate) initrd: Option<String>,
    /// A program for flash bank 0, entered at 0.
    pub(crate) bios: Option<String>,
    /// The command line.
    pub(crate) append: String,
    /// RAM in MiB.
    pub(crate) memory_mib: u64,
    /// vCPUs.
    pub(crate) vcpus: u32,
    /// Children that it may fork.
    pub(crate) grant_fork: u32,
    /// For each disk, what becomes of writes.
    pub(crate) disks: Vec<&'static str>,
}

/// What goes onto the disk.
#[derive(Default)]
pub(crate) struct Disk {
    images: Vec<(String, Vec<u8>)>,
    /// Where pages are swapped to.
    pub(crate) swap: Vec<SwapPlace>,
    /// How much memory may be promised, in hundredths of what there is.
    pub(crate) overcommit: Option<u32>,
    /// Seconds that a disk may be silent.
    pub(crate) patience: Option<u64>,
    /// Disks for stored guests by their names, and whether the guest there goes on.
    pub(crate) stored: Vec<(String, bool)>,
    /// The guests to start.
    pub(crate) guests: Vec<Guest>,
    /// The machine stays when its last guest has ended, until the monitor is told `shutdown`.
    pub(crate) stays: bool,
}

impl Disk {
    /// True when there is an image of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.images.iter().any(|(have, _)| have == name)
    }

    /// Adds an image; its partition's name comes back. The same name is added once.
    pub(crate) fn add(&mut self, name: &str, bytes: Vec<u8>) -> String {
        if !self.has(name) {
            self.images.push((name.to_owned(), bytes));
        }
        name.to_owned()
    }

    fn manifest(&self) -> String {
        let guests: Vec<Value> = self
            .guests
            .iter()
            .map(|guest| {
                let disks: Vec<Value> = guest
                    .disks
                    .iter()
                    .enumerate()
                    .map(|(number, writes)| json!({"disk": number, "writes": writes}))
                    .collect();
                let mut value = json!({
                    "name": guest.name, "append": guest.append,
                    "memory_mib": guest.memory_mib, "vcpus": guest.vcpus,
                    "grant_fork": guest.grant_fork, "disks": disks,
                });
                let named = [("kernel", &guest.kernel), ("initrd", &guest.initrd), ("bios", &guest.bios)];
                for (key, image) in named {
                    if let Some(image) = image {
                        value[key] = json!(image);
                    }
                }
                value
            })
            .collect();
        let images: Vec<Value> =
            self.images.iter().map(|(name, b)| json!({"partition": name, "bytes": b.len()})).collect();
        let stored: Vec<Value> = self
            .stored
            .iter()
            .enumerate()
            .map(|(number, (name, resume))| json!({"disk": number, "name": name, "resume": resume}))
            .collect();
        let mut manifest = json!({
            "version": 1, "batch": !self.stays, "images": images, "stored": stored, "guests": guests,
            "swap": self.places_to_swap(),
        });
        if let Some(percent) = self.overcommit {
            manifest["overcommit_percent"] = json!(percent);
        }
        if let Some(seconds) = self.patience {
            manifest["disk_patience_s"] = json!(seconds);
        }
        manifest.to_string()
    }

    fn places_to_swap(&self) -> Vec<Value> {
        let (mut own, mut files) = (0, 0);
        let mut list = Vec::new();
        for place in &self.swap {
            let mut value = match place.on {
                SwapOn::Own(_) => {
                    own += 1;
                    json!({"partition": swap_partition(own - 1)})
                }
                SwapOn::File(_) => {
                    files += 1;
                    json!({"disk": files - 1})
                }
            };
            if let Some(priority) = place.priority {
                value["priority"] = json!(priority);
            }
            list.push(value);
        }
        list
    }

    /// Writes the disk. Where on it there is room to swap: first byte and bytes.
    pub(crate) fn write(&self, path: &Path) -> Result<Option<(u64, u64)>> {
        let manifest = self.manifest().into_bytes();
        let sizes = self.swap.iter().filter_map(|place| match place.on {
            SwapOn::Own(mib) => Some(mib << 20),
            SwapOn::File(_) => None,
        });
        let swap: Vec<(String, u64)> =
            sizes.enumerate().map(|(number, size)| (swap_partition(number), size)).collect();
        let parts: Vec<(&str, &[u8], u64)> =
            std::iter::once((hv_abi::manifest::PARTITION, manifest.as_slice()))
                .chain(self.images.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())))
                .map(|(name, bytes)| (name, bytes, (bytes.len() as u64).next_multiple_of(4096).max(4096)))
                .chain(swap.iter().map(|(name, size)| (name.as_str(), [].as_slice(), *size)))
                .collect();
        let room: u64 = parts.iter().map(|(_, _, size)| size.next_multiple_of(ALIGN) + ALIGN).sum();
        let size = room + 4 * ALIGN;
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .with_context(|| format!("creating {}", path.display()))?;
        file.set_len(size)?;
        let sectors = u32::try_from(size / 512 - 1).unwrap_or(u32::MAX);
        gpt::mbr::ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut file)?;
        let mut table = gpt::GptConfig::new()
            .writable(true)
            .logical_block_size(gpt::disk::LogicalBlockSize::Lb512)
            .create_from_device(file, None)?;
        table.update_partitions(BTreeMap::new())?;
        let mut places = Vec::new();
        for (name, bytes, size) in &parts {
            let id = table
                .add_partition(name, *size, gpt::partition_types::LINUX_FS, 0, Some(ALIGN / 512))
                .with_context(|| format!("no place for {name} on {}", path.display()))?;
            let start = table.partitions().get(&id).map(|p| p.first_lba * 512);
            places.push((start.context("a partition just made is not there")?, bytes));
        }
        let mut file = table.write()?;
        // The first of them, if there is any.
        let first = places.len() - swap.len();
        let place = swap.first().and_then(|(_, size)| Some((places.get(first)?.0, *size)));
        for (start, bytes) in places {
            file.seek(SeekFrom::Start(start))?;
            file.write_all(bytes)?;
        }
        Ok(place)
    }
}

/// What a partition to swap to is called.
fn swap_partition(number: usize) -> String {
    let stem = hv_abi::manifest::SWAP_PARTITION;
    if number == 0 { stem.to_owned() } else { format!("{stem}-{number}") }
}

/// Partitions start at whole MiB.
const ALIGN: u64 = 1 << 20;
