//! The device tree of the machine that a guest sees.
//!
//! [`build`] reads like the tree's source: a node a function, in the order of addresses. Below it a
//! writer of the flattened format that checks the one thing that can go wrong, the size. Own code rather
//! than a crate's model of a tree because this one is written once, front to back, into one buffer.
//! The numbers are `hv_abi::machine`'s. Called by `guest` when a guest starts or is reset.

use alloc::vec::Vec;
use core::fmt::{self, Write};

use arrayvec::ArrayString;
use hv_abi::call::psci;
use hv_abi::forkpage;
use hv_abi::machine::{
    APB_CLOCK, FLASH0, FLASH1, FORK_PAGE, GICD, GICR_BASE, GICR_STRIDE, INTID_HYP_TIMER, INTID_MAINTENANCE,
    INTID_PHYSICAL_TIMER, INTID_PL011, INTID_PL031, INTID_SECURE_TIMER, INTID_VIRTIO, INTID_VIRTUAL_TIMER,
    INTID_VMGENID, MAX_VCPUS, PL011, PL031, PPI_BASE, RAM_BASE, SPI_BASE, VIRTIO_BASE, VIRTIO_SLOTS,
    VIRTIO_STRIDE, VMGENID, affinity,
};

/// Bytes that a tree has at most; `plan` keeps that much room.
pub const LIMIT: u64 = 0x1_0000;

/// What differs between one guest's tree and another's.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// Bytes of RAM.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: usize,
    /// The kernel's command line.
    pub append: &'a str,
    /// First address of the initial RAM disk, and first address after it.
    pub initrd: Option<(u64, u64)>,
    /// virtio-mmio transports that have a device, a bit each.
    pub virtio: u32,
    /// Random bytes for the kernel's generator; this guest's alone.
    pub rng_seed: [u8; 64],
    /// Random bits for where the kernel puts itself; this guest's alone.
    pub kaslr_seed: u64,
}

/// Why there is no tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeError {
    /// It would be longer than [`LIMIT`].
    TooLarge,
    /// More vCPUs or transports than the machine can have.
    TooMany,
    /// The command line has a zero byte in it.
    Append,
    /// The heap has no room.
    OutOfMemory,
}

impl fmt::Display for TreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLarge => "the device tree is longer than 64 KiB",
            Self::TooMany => "more vCPUs than the machine can have",
            Self::Append => "the command line has a zero byte in it",
            Self::OutOfMemory => "no memory for the device tree",
        })
    }
}

const PHANDLE_GIC: u32 = 1;
const PHANDLE_CLOCK: u32 = 2;
/// Kinds of interrupt in the GIC's binding.
const SPI: u32 = 0;
const PPI: u32 = 1;
/// Triggers in the same.
const RISING: u32 = 1;
const HIGH: u32 = 4;

/// Writes the tree.
pub fn build(machine: &Machine<'_>) -> Result<Vec<u8>, TreeError> {
    if machine.vcpus > MAX_VCPUS {
        return Err(TreeError::TooMany);
    }
    if machine.append.contains('\0') {
        return Err(TreeError::Append);
    }
    let mut tree = Writer::new()?;
    tree.begin("");
    tree.string("compatible", "linux,dummy-virt");
    tree.string("model", "linux,dummy-virt");
    tree.cells("#address-cells", &[2]);
    tree.cells("#size-cells", &[2]);
    tree.cells("interrupt-parent", &[PHANDLE_GIC]);
    tree.property("dma-coherent", &[]);
    chosen(&mut tree, machine);
    psci_node(&mut tree);
    cpus(&mut tree, machine.vcpus);
    timer(&mut tree);
    clock(&mut tree);
    flash(&mut tree);
    intc(&mut tree, machine.vcpus);
    pl011(&mut tree);
    pl031(&mut tree);
    vmgenid(&mut tree);
    fork_page(&mut tree);
    for slot in (0..VIRTIO_SLOTS).filter(|slot| machine.virtio & 1 << slot != 0) {
        virtio(&mut tree, slot);
    }
    tree.begin_at("memory", RAM_BASE);
    tree.string("device_type", "memory");
    tree.wide("reg", &[RAM_BASE, machine.memory]);
    tree.end();
    tree.end();
    tree.finish()
}

fn chosen(tree: &mut Writer, machine: &Machine<'_>) {
    tree.begin("chosen");
    tree.string("bootargs", machine.append);
    tree.string("stdout-path", "/pl011@9000000");
    if let Some((start, end)) = machine.initrd {
        tree.wide("linux,initrd-start", &[start]);
        tree.wide("linux,initrd-end", &[end]);
    }
    tree.property("rng-seed", &machine.rng_seed);
    tree.wide("kaslr-seed", &[machine.kaslr_seed]);
    tree.end();
}

fn psci_node(tree: &mut Writer) {
    tree.begin("psci");
    tree.property("compatible", b"arm,psci-1.0\0arm,psci-0.2\0arm,psci\0");
    tree.string("method", "hvc");
    tree.cells("cpu_suspend", &[psci::CPU_SUSPEND]);
    tree.cells("cpu_off", &[psci::CPU_OFF]);
    tree.cells("cpu_on", &[psci::CPU_ON]);
    tree.cells("migrate", &[psci::MIGRATE]);
    tree.end();
}

fn cpus(tree: &mut Writer, vcpus: usize) {
    tree.begin("cpus");
    tree.cells("#address-cells", &[1]);
    tree.cells("#size-cells", &[0]);
    for index in 0..vcpus {
        let affinity = affinity(index);
        tree.begin_at("cpu", affinity);
        tree.string("device_type", "cpu");
        tree.string("compatible", "arm,armv8");
        tree.string("enable-method", "psci");
        // Sixty-four vCPUs need eleven bits.
        tree.cells("reg", &[u32::try_from(affinity).unwrap_or(u32::MAX)]);
        tree.end();
    }
    tree.end();
}

fn timer(tree: &mut Writer) {
    tree.begin("timer");
    tree.property("compatible", b"arm,armv8-timer\0arm,armv7-timer\0");
    let [a, b, c, d] = [INTID_SECURE_TIMER, INTID_PHYSICAL_TIMER, INTID_VIRTUAL_TIMER, INTID_HYP_TIMER]
        .map(|intid| intid - PPI_BASE);
    tree.cells("interrupts", &[PPI, a, HIGH, PPI, b, HIGH, PPI, c, HIGH, PPI, d, HIGH]);
    tree.property("always-on", &[]);
    tree.end();
}

fn clock(tree: &mut Writer) {
    tree.begin("apb-pclk");
    tree.string("compatible", "fixed-clock");
    tree.cells("#clock-cells", &[0]);
    tree.cells("clock-frequency", &[APB_CLOCK]);
    tree.string("clock-output-names", "clk24mhz");
    tree.cells("phandle", &[PHANDLE_CLOCK]);
    tree.end();
}

fn flash(tree: &mut Writer) {
    tree.begin_at("flash", FLASH0.base);
    tree.string("compatible", "cfi-flash");
    tree.wide("reg", &[FLASH0.base, FLASH0.size, FLASH1.base, FLASH1.size]);
    tree.cells("bank-width", &[4]);
    tree.end();
}

fn intc(tree: &mut Writer, vcpus: usize) {
    tree.begin_at("intc", GICD.base);
    tree.string("compatible", "arm,gic-v3");
    tree.property("interrupt-controller", &[]);
    tree.cells("#interrupt-cells", &[3]);
    tree.cells("#address-cells", &[2]);
    tree.cells("#size-cells", &[2]);
    tree.property("ranges", &[]);
    tree.cells("#redistributor-regions", &[1]);
    tree.wide("reg", &[GICD.base, GICD.size, GICR_BASE, GICR_STRIDE * vcpus as u64]);
    tree.cells("interrupts", &[PPI, INTID_MAINTENANCE - PPI_BASE, HIGH]);
    tree.cells("phandle", &[PHANDLE_GIC]);
    tree.end();
}

fn pl011(tree: &mut Writer) {
    tree.begin_at("pl011", PL011.base);
    tree.property("compatible", b"arm,pl011\0arm,primecell\0");
    tree.wide("reg", &[PL011.base, PL011.size]);
    tree.cells("interrupts", &[SPI, INTID_PL011 - SPI_BASE, HIGH]);
    tree.cells("clocks", &[PHANDLE_CLOCK, PHANDLE_CLOCK]);
    tree.property("clock-names", b"uartclk\0apb_pclk\0");
    tree.end();
}

fn pl031(tree: &mut Writer) {
    tree.begin_at("pl031", PL031.base);
    tree.property("compatible", b"arm,pl031\0arm,primecell\0");
    tree.wide("reg", &[PL031.base, PL031.size]);
    tree.cells("interrupts", &[SPI, INTID_PL031 - SPI_BASE, HIGH]);
    tree.cells("clocks", &[PHANDLE_CLOCK]);
    tree.string("clock-names", "apb_pclk");
    tree.end();
}

fn vmgenid(tree: &mut Writer) {
    tree.begin_at("rng", VMGENID.base);
    tree.string("compatible", "microsoft,vmgenid");
    tree.wide("reg", &[VMGENID.base, VMGENID.size]);
    tree.cells("interrupts", &[SPI, INTID_VMGENID - SPI_BASE, RISING]);
    tree.end();
}

fn fork_page(tree: &mut Writer) {
    tree.begin_at("fork", FORK_PAGE.base);
    tree.string("compatible", forkpage::COMPATIBLE);
    tree.wide("reg", &[FORK_PAGE.base, FORK_PAGE.size]);
    tree.end();
}

fn virtio(tree: &mut Writer, slot: u32) {
    let base = VIRTIO_BASE + VIRTIO_STRIDE * u64::from(slot);
    tree.begin_at("virtio_mmio", base);
    tree.string("compatible", "virtio,mmio");
    tree.wide("reg", &[base, VIRTIO_STRIDE]);
    tree.cells("interrupts", &[SPI, INTID_VIRTIO - SPI_BASE + slot, RISING]);
    tree.property("dma-coherent", &[]);
    tree.end();
}

/// Bytes before the structure block: the header, and an empty memory reservation block.
const HEADER: usize = 40;
const RESERVATIONS: usize = 16;

/// Writes the flattened format, version 17. An error is kept until [`Writer::finish`].
struct Writer {
    /// Header, reservations and structure.
    bytes: Vec<u8>,
    /// The names of properties, each once, each with its zero.
    names: Vec<u8>,
    error: Option<TreeError>,
}

impl Writer {
    const BEGIN_NODE: u32 = 1;
    const END_NODE: u32 = 2;
    const PROP: u32 = 3;
    const END: u32 = 9;

    fn new() -> Result<Self, TreeError> {
        let mut writer = Self { bytes: Vec::new(), names: Vec::new(), error: None };
        let fits = writer.bytes.try_reserve(8192).and_then(|()| writer.names.try_reserve(1024));
        fits.map_err(|_| TreeError::OutOfMemory)?;
        writer.raw(&[0; HEADER + RESERVATIONS]);
        Ok(writer)
    }

    fn raw(&mut self, bytes: &[u8]) {
        // The header counts in 32 bits; what fits the limit fits them.
        if self.error.is_none() && (self.bytes.len() + self.names.len() + bytes.len()) as u64 > LIMIT {
            self.error = Some(TreeError::TooLarge);
        }
        if self.error.is_none() && self.bytes.try_reserve(bytes.len()).is_err() {
            self.error = Some(TreeError::OutOfMemory);
        }
        if self.error.is_none() {
            self.bytes.extend_from_slice(bytes);
        }
    }

    fn word(&mut self, word: u32) {
        self.raw(&word.to_be_bytes());
    }

    fn size(&mut self, size: usize) {
        match u32::try_from(size) {
            Ok(size) => self.word(size),
            Err(_) => self.error = Some(TreeError::TooLarge),
        }
    }

    fn pad(&mut self) {
        let missing = self.bytes.len().next_multiple_of(4) - self.bytes.len();
        self.raw(&[0; 4][..missing]);
    }

    fn begin(&mut self, name: &str) {
        self.word(Self::BEGIN_NODE);
        self.raw(name.as_bytes());
        self.raw(&[0]);
        self.pad();
    }

    fn begin_at(&mut self, name: &str, address: u64) {
        let mut full = ArrayString::<64>::new();
        if write!(full, "{name}@{address:x}").is_err() {
            self.error = Some(TreeError::TooLarge);
        }
        self.begin(&full);
    }

    fn end(&mut self) {
        self.word(Self::END_NODE);
    }

    fn property(&mut self, name: &str, value: &[u8]) {
        let name = self.name(name);
        self.word(Self::PROP);
        self.size(value.len());
        self.size(name);
        self.raw(value);
        self.pad();
    }

    fn string(&mut self, name: &str, value: &str) {
        let offset = self.name(name);
        self.word(Self::PROP);
        self.size(value.len() + 1);
        self.size(offset);
        self.raw(value.as_bytes());
        self.raw(&[0]);
        self.pad();
    }

    fn cells(&mut self, name: &str, values: &[u32]) {
        let offset = self.name(name);
        self.word(Self::PROP);
        self.size(values.len() * 4);
        self.size(offset);
        for value in values {
            self.word(*value);
        }
    }

    /// Values of two cells each.
    fn wide(&mut self, name: &str, values: &[u64]) {
        let offset = self.name(name);
        self.word(Self::PROP);
        self.size(values.len() * 8);
        self.size(offset);
        for value in values {
            self.raw(&value.to_be_bytes());
        }
    }

    /// Where `name` is among the names; it joins them if it is new.
    fn name(&mut self, name: &str) -> usize {
        let mut at = 0;
        for known in self.names.split_inclusive(|&byte| byte == 0) {
            if known.strip_suffix(&[0]) == Some(name.as_bytes()) {
                return at;
            }
            at += known.len();
        }
        if self.names.try_reserve(name.len() + 1).is_err() {
            self.error = Some(TreeError::OutOfMemory);
            return at;
        }
        self.names.extend_from_slice(name.as_bytes());
        self.names.push(0);
        at
    }

    fn finish(mut self) -> Result<Vec<u8>, TreeError> {
        self.word(Self::END);
        let structure = HEADER + RESERVATIONS;
        let structure_size = self.bytes.len() - structure;
        let names = core::mem::take(&mut self.names);
        let (names_at, names_size) = (self.bytes.len(), names.len());
        self.raw(&names);
        let total = self.bytes.len();
        let header = [
            0xd00d_feed,
            total,
            structure,
            names_at,
            HEADER,
            17, // version
            16, // the oldest that it is compatible with
            0,  // the boot CPU's `reg`
            names_size,
            structure_size,
        ];
        if let Some(error) = self.error {
            return Err(error);
        }
        for (field, value) in self.bytes.chunks_exact_mut(4).zip(header) {
            let value = u32::try_from(value).map_err(|_| TreeError::TooLarge)?;
            field.copy_from_slice(&value.to_be_bytes());
        }
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use dtoolkit::fdt::{Fdt, FdtNode};
    use dtoolkit::{Node, Property};

    fn machine() -> Machine<'static> {
        Machine {
            memory: 256 << 20,
            vcpus: 4,
            append: "console=ttyAMA0 quiet",
            initrd: Some((0x4200_0000, 0x4212_3457)),
            virtio: 1 << 31 | 0b11,
            rng_seed: [7; 64],
            kaslr_seed: 0x0123_4567_89ab_cdef,
        }
    }

    fn words(node: &FdtNode<'_>, name: &str) -> Vec<u32> {
        let property = node.property(name).unwrap();
        property.value().chunks_exact(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect()
    }

    fn text(fdt: &Fdt<'_>, path: &str, name: &str) -> String {
        let node = fdt.find_node(path).unwrap();
        let property = node.property(name).unwrap();
        String::from_utf8(property.value().strip_suffix(&[0]).unwrap().to_vec()).unwrap()
    }

    #[test]
    fn another_reader_finds_the_machine_that_was_written() {
        let bytes = build(&machine()).unwrap();
        let fdt = Fdt::new(&bytes).unwrap();
        assert_eq!(text(&fdt, "/chosen", "bootargs"), "console=ttyAMA0 quiet");
        assert!(fdt.find_node(&text(&fdt, "/chosen", "stdout-path")).is_some());
        let chosen = fdt.find_node("/chosen").unwrap();
        assert_eq!(words(&chosen, "linux,initrd-start"), [0, 0x4200_0000]);
        assert_eq!(words(&chosen, "linux,initrd-end"), [0, 0x4212_3457]);
        assert_eq!(chosen.property("rng-seed").unwrap().value(), [7; 64]);
        assert_eq!(words(&chosen, "kaslr-seed"), [0x0123_4567, 0x89ab_cdef]);
        let memory = fdt.find_node("/memory@40000000").unwrap();
        assert_eq!(words(&memory, "reg"), [0, 0x4000_0000, 0, 0x1000_0000]);
        let timer = fdt.find_node("/timer").unwrap();
        assert_eq!(words(&timer, "interrupts"), [1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4]);
        let intc = fdt.find_node("/intc@8000000").unwrap();
        assert_eq!(words(&intc, "reg"), [0, 0x0800_0000, 0, 0x1_0000, 0, 0x080a_0000, 0, 0x8_0000]);
        assert_eq!(words(&fdt.find_node("/virtio_mmio@a000200").unwrap(), "interrupts"), [0, 17, 1]);
        assert_eq!(words(&fdt.find_node("/virtio_mmio@a003e00").unwrap(), "interrupts"), [0, 47, 1]);
        assert!(fdt.find_node("/virtio_mmio@a000400").is_none());
        assert_eq!(words(&fdt.find_node("/flash@0").unwrap(), "reg").len(), 8);
        for (path, interrupt) in [("/pl011@9000000", 1), ("/pl031@9010000", 2)] {
            assert_eq!(words(&fdt.find_node(path).unwrap(), "interrupts"), [0, interrupt, 4]);
        }
        assert_eq!(words(&fdt.find_node("/rng@3fff0000").unwrap(), "interrupts"), [0, 10, 1]);
        let parent = words(&fdt.find_node("/").unwrap(), "interrupt-parent");
        assert_eq!(parent, words(&intc, "phandle"));
    }

    #[test]
    fn every_cpu_has_a_node_that_bears_its_affinity() {
        let bytes = build(&Machine { vcpus: MAX_VCPUS, ..machine() }).unwrap();
        let fdt = Fdt::new(&bytes).unwrap();
        let cpus = fdt.find_node("/cpus").unwrap();
        assert_eq!(cpus.children().count(), MAX_VCPUS);
        for (index, cpu) in cpus.children().enumerate() {
            assert_eq!(u64::from(words(&cpu, "reg")[0]), affinity(index));
            assert_eq!(cpu.property("enable-method").unwrap().value(), b"psci\0");
        }
        assert!(fdt.find_node("/cpus/cpu@101").is_some());
    }

    #[test]
    fn a_guest_without_an_initrd_has_none_in_its_tree() {
        let bytes = build(&Machine { initrd: None, virtio: 0, append: "", ..machine() }).unwrap();
        let fdt = Fdt::new(&bytes).unwrap();
        let chosen = fdt.find_node("/chosen").unwrap();
        assert!(chosen.property("linux,initrd-start").is_none());
        assert_eq!(text(&fdt, "/chosen", "bootargs"), "");
    }

    #[test]
    fn the_largest_machine_fits_and_a_longer_command_line_than_the_room_is_refused() {
        let append: String = core::iter::repeat_n('a', hv_abi::manifest::APPEND_LIMIT).collect();
        let largest = Machine { vcpus: MAX_VCPUS, virtio: u32::MAX, append: &append, ..machine() };
        assert!((build(&largest).unwrap().len() as u64) < LIMIT / 2);
        let append: String = core::iter::repeat_n('a', 0x1_0000).collect();
        assert_eq!(build(&Machine { append: &append, ..machine() }), Err(TreeError::TooLarge));
        assert_eq!(build(&Machine { vcpus: MAX_VCPUS + 1, ..machine() }), Err(TreeError::TooMany));
        assert_eq!(build(&Machine { append: "a\0b", ..machine() }), Err(TreeError::Append));
    }
}
