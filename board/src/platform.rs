//! What the host's device tree says of the machine, as plain data.
//!
//! [`Platform::parse`] walks the tree once, at boot, and keeps what the hypervisor uses; the tree's memory is
//! not needed afterwards but for [`Platform::bootargs`], which is copied too. Everything has a bound by name;
//! what a machine has beyond a bound is left unused, and [`Platform::truncated`] says so. Called by
//! `hv::boot`; the drivers beside this file are built from what it returns.

use arrayvec::{ArrayString, ArrayVec};
use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::standard::{NodeStandard, Status};
use dtoolkit::{Node, Property};
use vmobject::addr::PhysAddr;

/// Ranges of RAM that are used.
pub const MAX_MEMORY: usize = 8;
/// Reserved ranges that are honoured; a machine with more does not boot.
pub const MAX_RESERVED: usize = 32;
/// CPUs that are used.
pub const MAX_CPUS: usize = 64;
/// Regions of redistributors that are used.
pub const MAX_REDIST_REGIONS: usize = 8;
/// Serial ports that are used.
pub const MAX_UARTS: usize = 4;
/// virtio-mmio slots that are looked at.
pub const MAX_VIRTIO: usize = 64;
/// Words of the loader's random seed that are kept.
pub const MAX_SEED: usize = 8;
/// Bytes of kernel command line that are kept.
pub const MAX_BOOTARGS: usize = 1024;

/// A range of the physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub base: PhysAddr,
    /// Bytes; `base + size` does not wrap.
    pub size: u64,
}

impl Region {
    /// A region, unless it is empty or wraps.
    pub fn new(base: u64, size: u64) -> Option<Self> {
        base.checked_add(size)?;
        (size > 0).then_some(Self { base: PhysAddr::new(base), size })
    }

    /// The first byte after it.
    pub const fn end(self) -> PhysAddr {
        PhysAddr::new(self.base.bits() + self.size)
    }
}

/// An interrupt as the GIC numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// The number: PPIs from 16, SPIs from 32.
    pub intid: u32,
    /// Edge-triggered, else level.
    pub edge: bool,
}

/// A device with one register region and one interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its registers.
    pub region: Region,
    /// Its interrupt.
    pub interrupt: Interrupt,
}

/// A serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uart {
    /// Registers and interrupt.
    pub device: Device,
    /// The rate of its clock, where the tree says one.
    pub clock_hz: Option<u32>,
}

/// The interrupt controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GicRegions {
    /// The distributor.
    pub distributor: Region,
    /// The redistributors' regions, each holding frames of several CPUs.
    pub redistributors: ArrayVec<Region, MAX_REDIST_REGIONS>,
    /// The maintenance interrupt of its virtual CPU interface.
    pub maintenance: Option<Interrupt>,
}

/// The generic timer's interrupts, as seen by the non-secure world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timer {
    /// EL1's physical timer.
    pub physical: Interrupt,
    /// EL1's virtual timer.
    pub virt: Interrupt,
    /// EL2's physical timer.
    pub hypervisor: Interrupt,
}

/// The instruction that PSCI calls are made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduit {
    /// Secure monitor call: what EL2 uses.
    Smc,
    /// Hypervisor call: somebody below us is the hypervisor.
    Hvc,
}

/// The machine.
#[derive(Clone, Debug)]
pub struct Platform {
    /// RAM, in the tree's order.
    pub memory: ArrayVec<Region, MAX_MEMORY>,
    /// What of the RAM is not ours: reservations of the tree. Not the tree itself, and not us.
    pub reserved: ArrayVec<Region, MAX_RESERVED>,
    /// The affinity (MPIDR's Aff fields) of every usable CPU.
    pub cpus: ArrayVec<u64, MAX_CPUS>,
    /// The interrupt controller.
    pub gic: GicRegions,
    /// The timer's interrupts.
    pub timer: Timer,
    /// How to call the firmware, if it speaks PSCI.
    pub psci: Option<Conduit>,
    /// Serial ports, the one `stdout-path` names first, then by address.
    pub uarts: ArrayVec<Uart, MAX_UARTS>,
    /// virtio-mmio slots by address, most of them empty. Only those that snoop our caches.
    pub virtio: ArrayVec<Device, MAX_VIRTIO>,
    /// The clock, a PL031.
    pub clock: Option<Region>,
    /// What the loader drew for us (`rng-seed`): secret, for whoever seeds a generator to take out.
    pub rng_seed: ArrayVec<u64, MAX_SEED>,
    /// The initial ramdisk that `chosen` names.
    pub initrd: Option<Region>,
    /// The command line.
    pub bootargs: ArrayString<MAX_BOOTARGS>,
    /// Something of the machine did not fit in a bound above and is left unused.
    pub truncated: bool,
}

/// Why a tree cannot be used: what is missing or wrong in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlatformError {
    /// Not a device tree, or damaged.
    NotATree,
    /// No RAM.
    NoMemory,
    /// No usable CPU.
    NoCpus,
    /// No GICv3.
    NoGic,
    /// No Armv8 generic timer with the four usual interrupts.
    NoTimer,
    /// A property of the named kind of node cannot be understood.
    Malformed(&'static str),
    /// More reserved ranges than [`MAX_RESERVED`]: to leave one out would be to use it.
    TooManyReserved,
}

impl Platform {
    /// Reads the tree in `blob`, which may be longer than the tree.
    pub fn parse(blob: &[u8]) -> Result<Self, PlatformError> {
        let fdt = Fdt::new(blob).map_err(|_| PlatformError::NotATree)?;
        let root = fdt.root();
        let mut truncated = false;

        let (gic, timer) = (find_gic(root)?, find_timer(root)?);
        let mut memory = ArrayVec::new();
        let mut uarts = ArrayVec::<Uart, MAX_UARTS>::new();
        let mut virtio = ArrayVec::<Device, MAX_VIRTIO>::new();
        let (mut psci, mut clock) = (None, None);
        for node in root.children().filter(|node| is_usable(*node)) {
            if string(node, "device_type") == Some("memory") {
                for region in regions(node, "memory")? {
                    truncated |= memory.try_push(region).is_err();
                }
            } else if node.is_compatible("arm,pl011") {
                let uart = Uart { device: device(node, "pl011")?, clock_hz: clock_of(root, node) };
                truncated |= uarts.try_push(uart).is_err();
            } else if node.is_compatible("arm,pl031") {
                clock = regions(node, "pl031")?.next();
            } else if node.is_compatible("virtio,mmio") && node.dma_coherent() {
                truncated |= virtio.try_push(device(node, "virtio,mmio")?).is_err();
            } else if ["arm,psci", "arm,psci-0.2", "arm,psci-1.0"].iter().any(|name| node.is_compatible(name))
            {
                psci = match string(node, "method") {
                    Some("smc") => Some(Conduit::Smc),
                    Some("hvc") => Some(Conduit::Hvc),
                    Some(_) | None => return Err(PlatformError::Malformed("psci")),
                };
            }
        }
        let stdout = stdout_base(fdt);
        uarts.sort_unstable_by_key(|uart| {
            let base = uart.device.region.base.bits();
            (Some(base) != stdout, base)
        });
        virtio.sort_unstable_by_key(|slot| slot.region.base.bits());
        if memory.is_empty() {
            return Err(PlatformError::NoMemory);
        }

        let chosen = fdt.find_node("/chosen");
        let mut bootargs = ArrayString::new();
        if let Some(text) = chosen.and_then(|node| string(node, "bootargs")) {
            truncated |= bootargs.try_push_str(text).is_err();
        }
        let (cpus, cpus_cut) = find_cpus(fdt)?;
        Ok(Self {
            memory,
            reserved: find_reserved(fdt)?,
            cpus,
            gic,
            timer,
            psci,
            uarts,
            virtio,
            clock,
            rng_seed: chosen.map(find_seed).unwrap_or_default(),
            initrd: chosen.and_then(find_initrd),
            bootargs,
            truncated: truncated || cpus_cut,
        })
    }
}

/// Bytes of the tree that starts at the beginning of `head`, of which at least 8 bytes are needed, if one does.
pub fn tree_size(head: &[u8]) -> Option<usize> {
    const MAGIC: [u8; 4] = 0xd00d_feed_u32.to_be_bytes();
    let size = head.get(4..8)?.try_into().ok().map(u32::from_be_bytes)?;
    (head[..4] == MAGIC).then_some(size)?.try_into().ok()
}

fn is_usable(node: FdtNode<'_>) -> bool {
    matches!(node.status(), Ok(Status::Okay))
}

fn string<'a>(node: FdtNode<'a>, name: &str) -> Option<&'a str> {
    node.properties().find(|property| property.name() == name)?.value_as::<&str>().ok()
}

/// A number of one or two cells.
fn number(node: FdtNode<'_>, name: &str) -> Option<u64> {
    let property = node.property(name)?;
    property.value_as::<u32>().ok().map(u64::from).or_else(|| property.value_as::<u64>().ok())
}

/// The node's register regions. Only nodes at the root are asked, so no bus translates.
fn regions<'a>(
    node: FdtNode<'a>,
    what: &'static str,
) -> Result<impl Iterator<Item = Region> + 'a, PlatformError> {
    let wrong = PlatformError::Malformed(what);
    let list = node.reg().map_err(|_| wrong)?.ok_or(wrong)?;
    Ok(list.filter_map(|reg| Region::new(reg.address::<u64>().ok()?, reg.size::<u64>().ok()?)))
}

/// The GIC's three cells: kind, number, flags.
fn interrupts(node: FdtNode<'_>) -> impl Iterator<Item = Interrupt> + '_ {
    let property = node.properties().find(|property| property.name() == "interrupts");
    let value = property.and_then(|property| property.value_as::<&[u8]>().ok());
    value.unwrap_or_default().chunks_exact(12).filter_map(|bytes| {
        let cell = |at: usize| bytes.get(at * 4..at * 4 + 4)?.try_into().ok().map(u32::from_be_bytes);
        let base = match cell(0)? {
            0 => 32,
            1 => 16,
            _ => return None,
        };
        let edge = cell(2)? & 0xf <= 2;
        Some(Interrupt { intid: cell(1)?.checked_add(base).filter(|intid| *intid < 1020)?, edge })
    })
}

fn device(node: FdtNode<'_>, what: &'static str) -> Result<Device, PlatformError> {
    let wrong = PlatformError::Malformed(what);
    let region = regions(node, what)?.next().ok_or(wrong)?;
    Ok(Device { region, interrupt: interrupts(node).next().ok_or(wrong)? })
}

fn find_gic(root: FdtNode<'_>) -> Result<GicRegions, PlatformError> {
    let wrong = PlatformError::Malformed("gic");
    let node = root.children().find(|node| is_usable(*node) && node.is_compatible("arm,gic-v3"));
    let node = node.ok_or(PlatformError::NoGic)?;
    if number(node, "#interrupt-cells").is_none_or(|cells| cells != 3) {
        return Err(wrong);
    }
    let count = match number(node, "#redistributor-regions") {
        Some(count) => usize::try_from(count).map_err(|_| wrong)?,
        None => 1,
    };
    let mut list = regions(node, "gic")?;
    let distributor = list.next().ok_or(wrong)?;
    let redistributors: ArrayVec<_, MAX_REDIST_REGIONS> = list.take(count.min(MAX_REDIST_REGIONS)).collect();
    if redistributors.is_empty() {
        return Err(wrong);
    }
    Ok(GicRegions { distributor, redistributors, maintenance: interrupts(node).next() })
}

fn find_timer(root: FdtNode<'_>) -> Result<Timer, PlatformError> {
    let node = root.children().find(|node| is_usable(*node) && node.is_compatible("arm,armv8-timer"));
    // The binding's order: secure physical, physical, virtual, hypervisor.
    let list: ArrayVec<Interrupt, 5> =
        node.map(|node| interrupts(node).take(5).collect()).ok_or(PlatformError::NoTimer)?;
    match *list.as_slice() {
        [_, physical, virt, hypervisor, ..] => Ok(Timer { physical, virt, hypervisor }),
        _ => Err(PlatformError::NoTimer),
    }
}

fn find_cpus(fdt: Fdt<'_>) -> Result<(ArrayVec<u64, MAX_CPUS>, bool), PlatformError> {
    let node = fdt.find_node("/cpus").ok_or(PlatformError::NoCpus)?;
    let (mut cpus, mut truncated) = (ArrayVec::new(), false);
    for cpu in node.children().filter(|cpu| string(*cpu, "device_type") == Some("cpu") && is_usable(*cpu)) {
        // `reg` here is one or two cells without a size, which `number` reads.
        let affinity = number(cpu, "reg").ok_or(PlatformError::Malformed("cpu"))?;
        truncated |= cpus.try_push(affinity).is_err();
    }
    if cpus.is_empty() { Err(PlatformError::NoCpus) } else { Ok((cpus, truncated)) }
}

fn find_reserved(fdt: Fdt<'_>) -> Result<ArrayVec<Region, MAX_RESERVED>, PlatformError> {
    let mut reserved = ArrayVec::new();
    let mut keep = |region| reserved.try_push(region).map_err(|_| PlatformError::TooManyReserved);
    for entry in fdt.memory_reservations() {
        if let Some(region) = Region::new(entry.address(), entry.size()) {
            keep(region)?;
        }
    }
    if let Some(parent) = fdt.find_node("/reserved-memory") {
        // A node without `reg` asks for a range of the user's choice: nothing is reserved by it yet.
        for node in parent.children().filter(|node| node.property("reg").is_some()) {
            for region in regions(node, "reserved-memory")? {
                keep(region)?;
            }
        }
    }
    Ok(reserved)
}

/// The loader's random bytes, whole words of them.
fn find_seed(chosen: FdtNode<'_>) -> ArrayVec<u64, MAX_SEED> {
    let Some(property) = chosen.property("rng-seed") else { return ArrayVec::new() };
    property.value().as_chunks().0.iter().take(MAX_SEED).map(|word| u64::from_le_bytes(*word)).collect()
}

fn find_initrd(chosen: FdtNode<'_>) -> Option<Region> {
    let start = number(chosen, "linux,initrd-start")?;
    Region::new(start, number(chosen, "linux,initrd-end")?.checked_sub(start)?)
}

/// The base of the port that `stdout-path` names, by path or alias.
fn stdout_base(fdt: Fdt<'_>) -> Option<u64> {
    let path = string(fdt.find_node("/chosen")?, "stdout-path")?;
    let path = path.split(':').next().unwrap_or(path);
    let node = if path.starts_with('/') {
        fdt.find_node(path)?
    } else {
        fdt.find_node(string(fdt.find_node("/aliases")?, path)?)?
    };
    Some(regions(node, "stdout-path").ok()?.next()?.base.bits())
}

/// The rate of a node's first clock, if that is a fixed one.
fn clock_of(root: FdtNode<'_>, node: FdtNode<'_>) -> Option<u32> {
    let property = node.property("clocks")?;
    let wanted = property.value().first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes))?;
    let clock = root
        .children()
        .find(|other| other.is_compatible("fixed-clock") && other.phandle() == Ok(Some(wanted)))?;
    u32::try_from(number(clock, "clock-frequency")?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// QEMU 10, `-M virt,virtualization=on,gic-version=3 -cpu neoverse-n1 -m 1G -smp 4`, two serial ports; the
    /// blob is cut behind its last string.
    const VIRT: &[u8] = include_bytes!("../tests/virt.dtb");

    fn spi(number: u32, edge: bool) -> Interrupt {
        Interrupt { intid: 32 + number, edge }
    }

    #[test]
    fn qemus_tree_is_read_whole() {
        let platform = Platform::parse(VIRT).unwrap();
        assert_eq!(platform.memory.as_slice(), [Region::new(0x4000_0000, 1 << 30).unwrap()]);
        assert_eq!(platform.cpus.as_slice(), [0, 1, 2, 3]);
        assert_eq!(platform.gic.distributor, Region::new(0x0800_0000, 0x1_0000).unwrap());
        assert_eq!(platform.gic.redistributors[0], Region::new(0x080a_0000, 0xf6_0000).unwrap());
        assert_eq!(platform.gic.maintenance.unwrap().intid, 25);
        assert_eq!(platform.psci, Some(Conduit::Smc));
        let timer = platform.timer;
        assert_eq!([timer.physical.intid, timer.virt.intid, timer.hypervisor.intid], [30, 27, 26]);
        assert!(!timer.virt.edge);
        assert!(!platform.truncated);
    }

    #[test]
    fn the_port_that_stdout_names_comes_first() {
        let uarts = Platform::parse(VIRT).unwrap().uarts;
        assert_eq!(uarts.len(), 2);
        assert_eq!(uarts[0].device.region.base, PhysAddr::new(0x0900_0000));
        assert_eq!(uarts[0].device.interrupt, spi(1, false));
        assert_eq!(uarts[0].clock_hz, Some(24_000_000));
        assert_eq!(uarts[1].device.region.base, PhysAddr::new(0x0904_0000));
        assert_eq!(uarts[1].device.interrupt, spi(8, false));
    }

    #[test]
    fn all_virtio_slots_are_found_in_the_order_of_their_addresses() {
        let slots = Platform::parse(VIRT).unwrap().virtio;
        assert_eq!(slots.len(), 32);
        assert_eq!(slots[0].region, Region::new(0x0a00_0000, 0x200).unwrap());
        assert_eq!(slots[0].interrupt, spi(16, true));
        assert_eq!(slots[31].region, Region::new(0x0a00_3e00, 0x200).unwrap());
    }

    #[test]
    fn the_clock_and_the_loaders_random_seed_are_found() {
        let platform = Platform::parse(VIRT).unwrap();
        assert_eq!(platform.clock, Region::new(0x0901_0000, 0x1000));
        // 32 bytes, of which none are alike.
        assert_eq!(platform.rng_seed.len(), 4);
        assert!((1..4).all(|at| !platform.rng_seed[..at].contains(&platform.rng_seed[at])));
    }

    #[test]
    fn a_damaged_tree_is_refused_and_never_panics() {
        assert_eq!(Platform::parse(&[]).unwrap_err(), PlatformError::NotATree);
        assert_eq!(Platform::parse(&VIRT[..VIRT.len() / 2]).unwrap_err(), PlatformError::NotATree);
        // Every byte of the structure, turned over: any answer will do, as long as there is one.
        for at in (0..VIRT.len()).step_by(3) {
            let mut damaged = VIRT.to_vec();
            damaged[at] ^= 0xff;
            let _ = Platform::parse(&damaged);
        }
    }

    #[test]
    fn a_tree_tells_its_size_and_other_bytes_do_not() {
        assert_eq!(tree_size(VIRT), Some(VIRT.len()));
        assert_eq!(tree_size(&[0; 64]), None);
        assert_eq!(tree_size(&VIRT[..6]), None);
    }

    #[test]
    fn a_region_that_wraps_or_is_empty_cannot_be_made() {
        assert_eq!(Region::new(u64::MAX, 2), None);
        assert_eq!(Region::new(0, 0), None);
    }
}
