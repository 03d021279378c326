//! The physical interrupt controller, a GICv3, as EL2 uses it.
//!
//! The distributor and the redistributors are driven through `arm-gic`; redistributors are found by affinity,
//! never by index, since their order in memory is the implementer's choice. One [`Gic`] exists, locked by its
//! owner; what a CPU does on its own hot path needs no lock: [`Private`] writes set- and clear-registers of that
//! CPU's redistributor, and acknowledging is `hv::arch::irq`'s, by system register.
//!
//! All interrupts are group 1, one priority, so nothing preempts anything. EOImode is 1: ending an interrupt
//! drops the priority, deactivating it is a second step, which a guest does for a timer that is linked to it.
#![expect(unsafe_code, reason = "the registers' addresses come from the device tree, as numbers")]

use crate::platform::{GicRegions, Interrupt, MAX_CPUS};
use arm_gic::gicv3::registers::{Gicd, GicrSgi};
use arm_gic::gicv3::{GicDistributor, GicRedistributor};
use arm_gic::{IntId, Trigger, UniqueMmioPointer};
use arrayvec::ArrayVec;
use core::ptr::NonNull;
use safe_mmio::field;
use safe_mmio::fields::ReadPureWrite;

/// The Aff fields of an MPIDR.
const AFFINITY: u64 = 0xff_00ff_ffff;
/// Bytes of one redistributor: its control frame and its SGI frame.
const FRAME_BYTES: u64 = 0x2_0000;

/// Why an interrupt controller cannot be used, or a call is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GicError {
    /// A region of the tree is null, or too small for what must be in it.
    BadRegion,
    /// No redistributor has the CPU's affinity.
    NoRedistributor(u64),
    /// The number is not of the kind that the call is about, or the controller lacks it.
    BadInterrupt(u32),
}

/// The controller: the distributor, and where each CPU's redistributor is.
pub struct Gic {
    distributor: GicDistributor<'static>,
    redistributors: ArrayVec<Private, MAX_CPUS>,
}

/// One CPU's redistributor, for what needs no lock: every register written here takes ones only.
#[derive(Clone, Copy, Debug)]
pub struct Private {
    affinity: u64,
    frames: NonNull<GicrSgi>,
}

// SAFETY: a redistributor's registers may be written from any CPU; `Private` has no state of its own.
unsafe impl Send for Private {}
// SAFETY: as above; its writes set or clear single bits and read nothing first, so they do not race.
unsafe impl Sync for Private {}

impl Gic {
    /// Finds every redistributor and sets the distributor up: group 1 on, all SPIs disabled.
    ///
    /// # Safety
    /// `regions` are those of this machine's GICv3, mapped as device memory at their physical addresses, and
    /// nobody else configures the controller as long as the value lives.
    pub unsafe fn new(regions: &GicRegions) -> Result<Self, GicError> {
        let distributor = pointer::<Gicd>(regions.distributor.base.bits())?;
        // SAFETY: the caller says that this is a mapped distributor, and ours.
        let mut distributor = GicDistributor::new(unsafe { UniqueMmioPointer::new(distributor) });
        let mut redistributors = ArrayVec::new();
        for region in &regions.redistributors {
            let mut at = region.base.bits();
            // Bounded by the region and by the list.
            while at.checked_add(FRAME_BYTES).is_some_and(|end| end <= region.end().bits()) {
                let frames = pointer::<GicrSgi>(at)?;
                // SAFETY: the frame lies in the region, which the caller says is mapped and ours.
                let typer = GicRedistributor::new(unsafe { UniqueMmioPointer::new(frames) }).typer();
                let private = Private { affinity: typer.core_mpidr() & AFFINITY, frames };
                if redistributors.try_push(private).is_err() || typer.last_redistributor() {
                    break;
                }
                // With virtual LPIs (GICv4) two more frames follow.
                at += if typer.virtual_lpis_supported() { 2 * FRAME_BYTES } else { FRAME_BYTES };
            }
        }
        distributor.enable_all_interrupts(false);
        distributor.configure_default_settings();
        Ok(Self { distributor, redistributors })
    }

    /// The redistributor of the CPU with this MPIDR.
    pub fn private(&self, mpidr: u64) -> Result<Private, GicError> {
        let affinity = mpidr & AFFINITY;
        let found = self.redistributors.iter().find(|private| private.affinity == affinity);
        found.copied().ok_or(GicError::NoRedistributor(affinity))
    }

    /// Wakes a CPU's redistributor and sets it up: all SGIs and PPIs disabled, group 1.
    pub fn init_private(&mut self, mpidr: u64) -> Result<Private, GicError> {
        let private = self.private(mpidr)?;
        let mut redistributor = private.redistributor();
        // The error says that it is awake already, which is as well.
        let _ = redistributor.mark_core_awake();
        redistributor.configure_default_settings();
        Ok(private)
    }

    /// Sets a CPU's SGI or PPI up and enables it.
    pub fn enable_private(&mut self, mpidr: u64, interrupt: Interrupt) -> Result<(), GicError> {
        let bad = |_| GicError::BadInterrupt(interrupt.intid);
        let (intid, trigger) = (private_id(interrupt.intid)?, trigger(interrupt));
        let mut redistributor = self.private(mpidr)?.redistributor();
        if !intid.is_sgi() {
            redistributor.set_trigger(intid, trigger).map_err(bad)?;
        }
        redistributor.enable_interrupt(intid, true).map_err(bad)
    }

    /// Sets an SPI up, routes it to the CPU with this MPIDR, and enables it.
    pub fn enable_shared(&mut self, interrupt: Interrupt, mpidr: u64) -> Result<(), GicError> {
        let bad = |_| GicError::BadInterrupt(interrupt.intid);
        let intid = self.shared_id(interrupt.intid)?;
        self.distributor.set_trigger(intid, trigger(interrupt)).map_err(bad)?;
        self.distributor.set_routing(intid, Some(mpidr & AFFINITY)).map_err(bad)?;
        self.distributor.enable_interrupt(intid, true).map_err(bad)
    }

    /// Disables an SPI.
    pub fn disable_shared(&mut self, intid: u32) -> Result<(), GicError> {
        let id = self.shared_id(intid)?;
        self.distributor.enable_interrupt(id, false).map_err(|_| GicError::BadInterrupt(intid))
    }

    /// SPIs that the controller has; they are numbered from 32.
    pub fn shared_count(&self) -> u32 {
        self.distributor.typer().num_spis()
    }

    fn shared_id(&self, intid: u32) -> Result<IntId, GicError> {
        let index = intid.checked_sub(32).filter(|index| *index < self.shared_count());
        index.map(IntId::spi).ok_or(GicError::BadInterrupt(intid))
    }
}

impl Private {
    /// Sets or clears the active state of one of this CPU's interrupts: for a timer whose interrupt is linked
    /// to a guest's, when another vCPU comes.
    pub fn set_active(self, intid: u32, active: bool) -> Result<(), GicError> {
        let bit = private_bit(intid)?;
        let mut registers = self.registers();
        let mut sgi = field!(registers, sgi);
        let list = if active { field!(sgi, isactiver) } else { field!(sgi, icactiver) };
        write_first(list, bit);
        Ok(())
    }

    /// Makes one of this CPU's interrupts pending, or takes that back. A level that is up stays pending.
    pub fn set_pending(self, intid: u32, pending: bool) -> Result<(), GicError> {
        let bit = private_bit(intid)?;
        let mut registers = self.registers();
        let mut sgi = field!(registers, sgi);
        let list = if pending { field!(sgi, ispendr) } else { field!(sgi, icpendr) };
        write_first(list, bit);
        Ok(())
    }

    /// Enables or disables one of this CPU's interrupts.
    pub fn set_enabled(self, intid: u32, enabled: bool) -> Result<(), GicError> {
        let id = private_id(intid)?;
        self.redistributor().enable_interrupt(id, enabled).map_err(|_| GicError::BadInterrupt(intid))
    }

    fn redistributor(self) -> GicRedistributor<'static> {
        GicRedistributor::new(self.registers())
    }

    fn registers(self) -> UniqueMmioPointer<'static, GicrSgi> {
        // SAFETY: `Gic::new` was told that the frames are mapped and its alone. Two of these may exist for one
        // CPU at a time; each access is a volatile one of its own, and configuring, which reads first, happens
        // under the lock of the one `Gic`.
        unsafe { UniqueMmioPointer::new(self.frames) }
    }
}

/// Sets up this CPU's own interface: interrupts of group 1 reach it, whatever their priority, and ending one is
/// two steps (EOImode 1).
#[cfg(target_arch = "aarch64")]
pub fn init_cpu_interface() {
    use aarch64_cpu::asm::barrier;
    use arm_gic::gicv3::GicCpuInterface;
    use arm_sysregs::el1::accessors::write_icc_ctlr_el1;
    use arm_sysregs::el1::registers::IccCtlrEl1;

    GicCpuInterface::enable_system_register_el2(true);
    // The interface's other registers exist only once the write above is seen.
    barrier::isb(barrier::SY);
    write_icc_ctlr_el1(IccCtlrEl1::EOIMODE);
    GicCpuInterface::set_priority_mask(0xff);
    GicCpuInterface::enable_group1(true);
    barrier::isb(barrier::SY);
}

/// Sends an SGI to the CPU with this MPIDR; false if no SGI can name that CPU.
#[cfg(target_arch = "aarch64")]
pub fn send_sgi(mpidr: u64, sgi: u32) -> bool {
    use arm_gic::gicv3::{GicCpuInterface, SgiTarget, SgiTargetGroup};

    let [aff0, affinity1, affinity2, _, affinity3, ..] = mpidr.to_le_bytes();
    // Without the range selector an SGI reaches the first 16 CPUs of a cluster.
    if sgi >= 16 || aff0 >= 16 {
        return false;
    }
    let target = SgiTarget::List { affinity3, affinity2, affinity1, target_list: 1 << aff0 };
    GicCpuInterface::send_sgi(IntId::sgi(sgi), target, SgiTargetGroup::CurrentGroup1).is_ok()
}

fn pointer<T>(address: u64) -> Result<NonNull<T>, GicError> {
    let address = usize::try_from(address).map_err(|_| GicError::BadRegion)?;
    if !address.is_multiple_of(align_of::<T>()) {
        return Err(GicError::BadRegion);
    }
    NonNull::new(core::ptr::with_exposed_provenance_mut(address)).ok_or(GicError::BadRegion)
}

fn write_first(mut list: UniqueMmioPointer<'_, [ReadPureWrite<u32>; 3]>, bits: u32) {
    if let Some(mut register) = list.get(0) {
        register.write(bits);
    }
}

fn private_id(intid: u32) -> Result<IntId, GicError> {
    match intid {
        0..16 => Ok(IntId::sgi(intid)),
        16..32 => Ok(IntId::ppi(intid - 16)),
        _ => Err(GicError::BadInterrupt(intid)),
    }
}

fn private_bit(intid: u32) -> Result<u32, GicError> {
    1_u32.checked_shl(intid).ok_or(GicError::BadInterrupt(intid))
}

const fn trigger(interrupt: Interrupt) -> Trigger {
    if interrupt.edge { Trigger::Edge } else { Trigger::Level }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::Region;
    use std::vec;
    use std::vec::Vec;

    const WORDS: usize = 0x1_0000 / 4;

    /// A controller in memory: a distributor and one redistributor for each affinity.
    struct Fake {
        distributor: *mut u32,
        redistributors: *mut u32,
        regions: GicRegions,
    }

    impl Fake {
        fn new(affinities: &[u32]) -> Self {
            let mut distributor = vec![0_u32; WORDS + 2];
            distributor[1] = 2; // TYPER: 96 interrupts, so 64 SPIs
            let mut frames = vec![0_u32; WORDS * 2 * affinities.len() + 2];
            for (index, affinity) in affinities.iter().enumerate() {
                let typer = index * 2 * WORDS + 2;
                frames[typer] = u32::from(index + 1 == affinities.len()) << 4;
                frames[typer + 1] = *affinity;
            }
            let (distributor, redistributors) = (leak(distributor), leak(frames));
            let region = |at: *mut u32, size| Region::new(at.expose_provenance() as u64, size).unwrap();
            let regions = GicRegions {
                distributor: region(distributor, 0x1_0000),
                redistributors: [region(redistributors, FRAME_BYTES * affinities.len() as u64)]
                    .into_iter()
                    .collect(),
                maintenance: None,
            };
            Self { distributor, redistributors, regions }
        }

        fn gic(&self) -> Gic {
            // SAFETY: the regions are memory of ours, as large as they say.
            unsafe { Gic::new(&self.regions) }.unwrap()
        }

        fn distributor(&self, offset: usize) -> u32 {
            // SAFETY: inside the leaked memory.
            unsafe { self.distributor.wrapping_byte_add(offset).read_volatile() }
        }

        fn private(&self, index: usize, offset: usize) -> u32 {
            // SAFETY: inside the leaked memory.
            unsafe {
                self.redistributors.wrapping_byte_add(index * 0x2_0000 + 0x1_0000 + offset).read_volatile()
            }
        }
    }

    /// Leaks words, aligned as registers of 64 bits need.
    fn leak(words: Vec<u32>) -> *mut u32 {
        let start = words.leak().as_mut_ptr();
        if start.addr().is_multiple_of(8) { start } else { start.wrapping_add(1) }
    }

    #[test]
    fn a_cpu_is_found_by_its_affinity_whatever_the_order_in_memory() {
        let fake = Fake::new(&[0x0000_0100, 0x0000_0001, 0x0100_0000]);
        let mut gic = fake.gic();
        let interrupt = Interrupt { intid: 26, edge: false };
        gic.enable_private(0x8000_0001, interrupt).unwrap();
        gic.enable_private(0x01_8000_0000, interrupt).unwrap();
        let enabled: Vec<u32> = (0..3).map(|index| fake.private(index, 0x100)).collect();
        assert_eq!(enabled, [0, 1 << 26, 1 << 26]);
        assert_eq!(gic.private(7).unwrap_err(), GicError::NoRedistributor(7));
    }

    #[test]
    fn a_shared_interrupt_gets_its_trigger_and_its_route_before_it_is_enabled() {
        let fake = Fake::new(&[0]);
        let mut gic = fake.gic();
        gic.enable_shared(Interrupt { intid: 48, edge: true }, 0x8000_0203).unwrap();
        assert_eq!(fake.distributor(0x104), 1 << 16);
        assert_eq!(fake.distributor(0xc0c), 2);
        assert_eq!(fake.distributor(0x6000 + 48 * 8), 0x203);
        assert_eq!(
            gic.enable_shared(Interrupt { intid: 96, edge: true }, 0),
            Err(GicError::BadInterrupt(96)),
            "one more than the controller has"
        );
    }

    #[test]
    fn an_active_state_is_set_and_cleared_by_writing_one_bit() {
        let fake = Fake::new(&[0]);
        let private = fake.gic().private(0).unwrap();
        private.set_active(27, true).unwrap();
        assert_eq!(fake.private(0, 0x300), 1 << 27);
        private.set_active(27, false).unwrap();
        assert_eq!(fake.private(0, 0x380), 1 << 27);
        assert_eq!(private.set_active(32, true), Err(GicError::BadInterrupt(32)));
    }
}
