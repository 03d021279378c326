//! Putting a vCPU on this CPU, and taking it off.
//!
//! An exit stores general registers only. The rest stays in the hardware until another vCPU comes
//! (DESIGN 15), also while its vCPU waits: then a wake-up finds everything in place. FP registers come
//! with the first FP instruction and leave with the vCPU. Nothing of one vCPU is left for the next
//! (invariant I18): all that a guest can write is in what [`Cpu::load`] replaces.

use core::sync::atomic::Ordering;

use crate::arch::{self, fpsimd, gich, switch, timer, tlb};
use crate::guest::Guest;
use crate::guest::rank;
use crate::guest::vcpu::{Context, NOWHERE, Power, State, Vcpu, VcpuRef, count};
use vmobject::lock::Held;

use super::Outside;
use super::wait::Sleepers;

/// ICH_HCR_EL2: the virtual interface is on.
const ICH_HCR_EN: u32 = 1;

/// What this CPU's main loop knows.
pub struct Cpu {
    /// Its number.
    pub id: usize,
    /// The vCPU whose registers are in the hardware.
    pub loaded: Option<VcpuRef>,
    /// The FP registers in the hardware are its.
    pub fp_live: bool,
    /// The list registers must be written from the virtual interrupt controller before entry.
    pub flush: bool,
    /// When the running vCPU's turn ends.
    pub slice_end: u64,
    /// When the host's timer is to fire while it runs.
    pub armed: u64,
    /// Ticks of that turn in which it stood still, and waited for a disk.
    pub stood: u64,
    /// Before this, chores have had their share of a busy CPU.
    pub chores_due: u64,
    /// How many ends of guests it has heard of.
    pub ended: u64,
    /// vCPUs that wait for a time.
    pub sleepers: Sleepers<VcpuRef>,
}

impl Cpu {
    /// A CPU with nothing loaded.
    pub fn new(id: usize) -> Self {
        let sleepers = Sleepers::new();
        Self {
            id,
            loaded: None,
            fp_live: false,
            flush: false,
            slice_end: 0,
            armed: u64::MAX,
            stood: 0,
            chores_due: 0,
            ended: 0,
            sleepers,
        }
    }

    /// True when a vCPU's registers are in this CPU.
    pub fn has_loaded(&self, vcpu: &VcpuRef) -> bool {
        self.loaded.as_ref().is_some_and(|loaded| loaded == vcpu)
    }

    /// Puts a vCPU's registers into the hardware. Nothing is loaded before.
    pub fn load(
        &mut self,
        entry: &VcpuRef,
        context: &mut Context,
        outside: &dyn Outside,
        held: &mut Held<'_, { rank::VCPU }>,
    ) {
        let (guest, vcpu) = (&*entry.guest, entry.vcpu());
        count(&vcpu.counts.loads);
        guest.load_tables(self.id, held);
        // Two vCPUs of one guest share the VMID, but may use one ASID for different tables.
        if guest.last_ran[self.id].swap(vcpu.index, Ordering::Relaxed) != vcpu.index {
            tlb::local_flush_vmid();
        }
        switch::set_cntvoff(guest.offset());
        switch::load_el1(&context.el1);
        arch::debug::load(&context.debug);
        arch::el2::set_virtual_serror(context.serror);
        gich::write_vmcr(context.vgic.vmcr);
        gich::write_aprs(&context.vgic.ap0r, &context.vgic.ap1r);
        gich::set_hcr(ICH_HCR_EN);
        {
            let (devices, _held) = guest.devices.lock(held);
            outside.set_timer_active(devices.vgic.timer_is_live(vcpu.index));
        }
        fpsimd::trap(true);
        self.fp_live = false;
        self.flush = true;
        vcpu.loaded_on.store(self.id, Ordering::SeqCst);
        self.loaded = Some(entry.clone());
    }

    /// Takes whatever is loaded off this CPU.
    pub fn unload(&mut self, outside: &dyn Outside, held: &mut Held<'_, 0>) {
        let Some(entry) = self.loaded.take() else { return };
        let (guest, vcpu) = (&*entry.guest, entry.vcpu());
        let kicks;
        {
            let (mut context, mut held) = vcpu.context.lock(held);
            kicks = guest.devices.lock(&mut held).0.unlist(vcpu.index);
            switch::save_el1(&mut context.el1);
            if self.fp_live {
                fpsimd::save(&mut context.fp);
            }
            context.serror = arch::el2::virtual_serror();
            context.vgic.vmcr = gich::read_vmcr();
            let vgic = &mut context.vgic;
            gich::read_aprs(&mut vgic.ap0r, &mut vgic.ap1r);
        }
        arch::el2::set_virtual_serror(false);
        // Its timer must not fire into whoever comes next, and its interrupt's active state goes with it.
        switch::stop_virtual_timer();
        outside.set_timer_active(false);
        fpsimd::trap(true);
        self.fp_live = false;
        // What it has asked of caches and TLBs is to be done before it goes on elsewhere, where no barrier would wait for it.
        arch::cache::finish();
        vcpu.loaded_on.store(NOWHERE, Ordering::SeqCst);
        if vcpu.state() == State::Ready {
            // Until now no other CPU could have it.
            super::rouse();
        }
        super::wake_many(&entry.guest, kicks & !(1 << vcpu.index), held);
    }

    /// Before this CPU does something that takes long: who waits for it, with registers here, may go elsewhere.
    pub fn make_way(&mut self, outside: &dyn Outside, held: &mut Held<'_, 0>) {
        if self.loaded.as_ref().is_some_and(|loaded| loaded.vcpu().state() == State::Ready) {
            self.unload(outside, held);
        }
    }

    /// Brings the list registers up to date before an entry; the other vCPUs that have something to look at.
    pub fn flush(
        &mut self,
        guest: &Guest,
        vcpu: &Vcpu,
        outside: &dyn Outside,
        held: &mut Held<'_, { rank::VCPU }>,
    ) -> u64 {
        self.flush = false;
        let flushed = guest.devices.lock(held).0.flush(vcpu.index);
        if flushed.release_timer {
            outside.set_timer_active(false);
        }
        flushed.kicks
    }

    /// True when PSCI has switched a vCPU on and it has not run since.
    pub fn is_starting<const R: u8>(vcpu: &Vcpu, held: &mut Held<'_, R>) -> bool {
        const { assert!(R < rank::POWER) };
        matches!(*vcpu.power.lock(held).0, Power::OnPending { .. })
    }

    /// Starts a vCPU that PSCI has switched on, before it is loaded.
    pub fn start(vcpu: &Vcpu, context: &mut Context, held: &mut Held<'_, { rank::VCPU }>) {
        let (mut power, _held) = vcpu.power.lock(held);
        if let Power::OnPending { entry, context: x0 } = *power {
            context.start(vcpu.mpidr, entry, x0);
            *power = Power::On;
        }
    }
}

/// Ticks in `ms` milliseconds.
pub fn ticks(ms: u64) -> u64 {
    timer::freq().saturating_mul(ms) / 1000
}
