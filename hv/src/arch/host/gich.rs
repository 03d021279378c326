//! The virtual interface of the interrupt controller: list registers and their neighbours.

use std::cell::RefCell;

/// The most list registers that the architecture allows.
pub const MAX_LRS: usize = 16;

/// What the interface holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// ICH_LRn_EL2.
    pub lr: [u64; MAX_LRS],
    /// ICH_VMCR_EL2.
    pub vmcr: u64,
    /// ICH_AP0Rn_EL2.
    pub ap0r: [u32; 4],
    /// ICH_AP1Rn_EL2.
    pub ap1r: [u32; 4],
    /// ICH_HCR_EL2.
    pub hcr: u32,
    /// ICH_MISR_EL2.
    pub misr: u32,
    /// ICH_EISR_EL2.
    pub eisr: u32,
    /// ICH_ELRSR_EL2.
    pub elrsr: u32,
}

std::thread_local! {
    static STATE: RefCell<Registers> = RefCell::default();
}

/// Shows or changes this thread's registers.
pub fn with<R>(look: impl FnOnce(&mut Registers) -> R) -> R {
    STATE.with_borrow_mut(look)
}

/// List registers that the CPU has.
pub fn nr_lrs() -> usize {
    4
}
/// Active priority registers of each group that the CPU has: 1, 2 or 4.
pub fn nr_aprs() -> usize {
    1
}
/// Writes list register `n`.
pub fn write_lr(n: usize, value: u64) {
    with(|state| state.lr.get_mut(n).map(|lr| *lr = value));
}
/// Reads list register `n`.
pub fn read_lr(n: usize) -> u64 {
    with(|state| state.lr.get(n).copied().unwrap_or(0))
}
/// Writes ICH_VMCR_EL2.
pub fn write_vmcr(value: u64) {
    with(|state| state.vmcr = value);
}
/// Reads ICH_VMCR_EL2.
pub fn read_vmcr() -> u64 {
    with(|state| state.vmcr)
}
/// Writes the active priorities of both groups.
pub fn write_aprs(group0: &[u32; 4], group1: &[u32; 4]) {
    with(|state| (state.ap0r, state.ap1r) = (*group0, *group1));
}
/// Reads the active priorities of both groups.
pub fn read_aprs(group0: &mut [u32; 4], group1: &mut [u32; 4]) {
    with(|state| (*group0, *group1) = (state.ap0r, state.ap1r));
}
/// Writes ICH_HCR_EL2.
pub fn set_hcr(value: u32) {
    with(|state| state.hcr = value);
}
/// Reads ICH_HCR_EL2, whose EOI count the hardware keeps.
pub fn read_hcr() -> u32 {
    with(|state| state.hcr)
}
/// Why the maintenance interrupt is asserted.
pub fn misr() -> u32 {
    with(|state| state.misr)
}
/// List registers whose guest asked to hear of the end of interrupt.
pub fn eisr() -> u32 {
    with(|state| state.eisr)
}
/// List registers that are empty.
pub fn elrsr() -> u32 {
    with(|state| state.elrsr)
}
