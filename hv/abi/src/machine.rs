//! The machine that a guest sees: QEMU's `virt`, as far as we have it.
//!
//! Addresses are the guest's physical ones. Interrupts are numbered as the GIC numbers them (`INTID`):
//! PPIs from 16, SPIs from 32. The generated device tree says the same; guests that read no tree, and the
//! tiny test guests, take the numbers from here.

/// A region of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub base: u64,
    /// Bytes in it.
    pub size: u64,
}

impl Region {
    /// From `base`, `size` bytes.
    pub const fn new(base: u64, size: u64) -> Self {
        Self { base, size }
    }
    /// First address after the region.
    pub const fn end(self) -> u64 {
        self.base + self.size
    }
    /// True when `at` lies in it.
    pub const fn contains(self, at: u64) -> bool {
        self.base <= at && at - self.base < self.size
    }
}

/// Flash bank 0: read-only, where firmware starts.
pub const FLASH0: Region = Region::new(0, 0x0400_0000);
/// Flash bank 1: writable, where firmware keeps its variables.
pub const FLASH1: Region = Region::new(0x0400_0000, 0x0400_0000);
/// The GIC's distributor.
pub const GICD: Region = Region::new(0x0800_0000, 0x0001_0000);
/// The first redistributor; each vCPU's is [`GICR_STRIDE`] further on.
pub const GICR_BASE: u64 = 0x080a_0000;
/// Bytes of one redistributor: its two frames of 64 KiB.
pub const GICR_STRIDE: u64 = 0x0002_0000;
/// The console, a PL011.
pub const PL011: Region = Region::new(0x0900_0000, 0x1000);
/// The clock, a PL031.
pub const PL031: Region = Region::new(0x0901_0000, 0x1000);
/// The page with the generation id: 16 bytes that change when the guest has become another. It is memory, and
/// lies above all devices.
pub const VMGENID: Region = Region::new(0x3fff_0000, 0x1000);
/// The first virtio-mmio transport; the next ones are [`VIRTIO_STRIDE`] apart.
pub const VIRTIO_BASE: u64 = 0x0a00_0000;
/// Bytes of one virtio-mmio transport.
pub const VIRTIO_STRIDE: u64 = 0x200;
/// Transports there can be at most.
pub const VIRTIO_SLOTS: u32 = 32;
/// The fork page; see [`crate::forkpage`].
pub const FORK_PAGE: Region = Region::new(0x0b00_0000, 0x1000);
/// The first of many addresses where there is nothing, in QEMU's machine either.
pub const HOLE: u64 = FORK_PAGE.end();
/// Where RAM starts.
pub const RAM_BASE: u64 = 0x4000_0000;
/// RAM that a guest can have at most: up to the 256 GiB line, where QEMU puts its high devices.
pub const RAM_LIMIT: u64 = (256 << 30) - RAM_BASE;
/// RAM below which nothing boots: the flat images' offset and something behind it.
pub const RAM_LEAST: u64 = 2 << 20;
/// A flat image is entered, and starts, this far into RAM; the device tree is at RAM's start.
pub const FLAT_OFFSET: u64 = 0x8_0000;

/// vCPUs that a guest can have at most.
pub const MAX_VCPUS: usize = 64;
/// vCPUs that share the affinity levels above the lowest: what one SGI's target list can name.
pub const CLUSTER: usize = 16;

/// The affinity (MPIDR_EL1 without its flags) of vCPU `index`: Aff0 counts to sixteen, then Aff1.
pub const fn affinity(index: usize) -> u64 {
    ((index / CLUSTER) as u64) << 8 | (index % CLUSTER) as u64
}

/// The vCPU whose affinity is `affinity`, if such a number is ever given out.
pub const fn index_of(affinity: u64) -> Option<usize> {
    let [aff0, aff1, ..] = affinity.to_le_bytes();
    let index = aff1 as usize * CLUSTER + aff0 as usize;
    if affinity >> 16 == 0 && (aff0 as usize) < CLUSTER && index < MAX_VCPUS { Some(index) } else { None }
}

/// First PPI: interrupts that every vCPU has of its own.
pub const PPI_BASE: u32 = 16;
/// First SPI: interrupts that the machine has once.
pub const SPI_BASE: u32 = 32;
/// SPIs that the distributor offers, and with the SGIs and PPIs the interrupts it knows.
pub const SPIS: u32 = 256;
/// GIC maintenance. PPI 9.
pub const INTID_MAINTENANCE: u32 = 25;
/// The EL2 physical timer: in the tree because some guests count four, never raised. PPI 10.
pub const INTID_HYP_TIMER: u32 = 26;
/// The EL1 virtual timer. PPI 11.
pub const INTID_VIRTUAL_TIMER: u32 = 27;
/// The secure EL1 physical timer: never raised. PPI 13.
pub const INTID_SECURE_TIMER: u32 = 29;
/// The EL1 physical timer. PPI 14.
pub const INTID_PHYSICAL_TIMER: u32 = 30;
/// The console. SPI 1.
pub const INTID_PL011: u32 = SPI_BASE + 1;
/// The clock. SPI 2.
pub const INTID_PL031: u32 = SPI_BASE + 2;
/// Says that the generation id has changed; rising edge.
pub const INTID_VMGENID: u32 = SPI_BASE + 10;
/// The first virtio-mmio transport; the next ones follow. SPI 16.
pub const INTID_VIRTIO: u32 = SPI_BASE + 16;
/// What the PL011's and PL031's fixed clock counts at, in hertz.
pub const APB_CLOCK: u32 = 24_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_affinity_names_the_vcpu_that_has_it_and_no_other() {
        for index in 0..MAX_VCPUS {
            assert_eq!(index_of(affinity(index)), Some(index));
        }
        assert_eq!(affinity(17), 0x101);
        for wrong in [16, 0x10, 0x1_0000, 0x400, 1 << 32, u64::MAX] {
            assert_eq!(index_of(wrong), None, "{wrong:#x}");
        }
    }

    #[test]
    fn no_two_regions_of_the_machine_overlap() {
        let redistributors = Region::new(GICR_BASE, GICR_STRIDE * MAX_VCPUS as u64);
        let virtio = Region::new(VIRTIO_BASE, VIRTIO_STRIDE * u64::from(VIRTIO_SLOTS));
        let ram = Region::new(RAM_BASE, RAM_LIMIT);
        let all = [FLASH0, FLASH1, GICD, redistributors, PL011, PL031, virtio, FORK_PAGE, ram];
        for pair in all.windows(2) {
            assert!(pair[0].end() <= pair[1].base, "{pair:x?}");
        }
    }
}
