//! One guest's devices, under one lock, joined by their interrupt lines.
//!
//! `vdev` holds each device's logic and knows nothing of the others; here the console's line meets the
//! interrupt controller, and each timer its private interrupt. Every function returns the vCPUs that have
//! something to look at. Called by `mmio`'s callers, `sysreg` and `sched`.

use super::mmio::{Effect, Target};
use super::sysreg::TimerRegister;
use crate::vdev::{Vgic, Vpl011, Vrtc, Vtimer};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use hv_abi::machine::{INTID_PHYSICAL_TIMER, INTID_PL011, INTID_VIRTUAL_TIMER};

/// How much may be typed before the guest reads it.
const TYPE_AHEAD: usize = 4096;

/// The devices of a guest.
pub struct Devices {
    /// The interrupt controller.
    pub vgic: Vgic,
    /// The console.
    pub uart: Vpl011,
    /// The clock.
    pub rtc: Vrtc,
    /// Each vCPU's EL1 physical timer.
    pub timers: Vec<Vtimer>,
    /// Typed, and not yet taken by the console's FIFO.
    typed: VecDeque<u8>,
}

impl Devices {
    /// Devices out of reset, for `vcpus` vCPUs.
    pub fn new(vcpus: usize, lrs: usize, freq: u64) -> Self {
        Self {
            vgic: Vgic::new(vcpus, lrs),
            uart: Vpl011::new(),
            rtc: Vrtc::new(freq),
            timers: (0..vcpus).map(|_| Vtimer::new()).collect(),
            typed: VecDeque::new(),
        }
    }

    /// Reads a device register of `1 << size` bytes.
    #[inline]
    pub fn read(&mut self, target: Target, size: u8, now: u64) -> (u64, u64) {
        let bytes = 1usize << size;
        match target {
            Target::Uart(offset) => {
                let value = self.uart.read(offset);
                (value, self.update_uart())
            }
            Target::Distributor(offset) => (self.vgic.dist_read(offset, bytes), 0),
            Target::Redistributor(vcpu, offset) => (self.vgic.redist_read(vcpu, offset, bytes), 0),
            Target::Rtc(offset) => (self.rtc.read(offset, now), 0),
        }
    }

    /// Writes a device register of `1 << size` bytes.
    pub fn write(&mut self, target: Target, size: u8, value: u64, now: u64) -> Effect {
        let bytes = 1usize << size;
        match target {
            Target::Uart(offset) => {
                let output = self.uart.write(offset, value);
                Effect { kicks: self.update_uart(), output }
            }
            Target::Distributor(offset) => Effect::of(self.vgic.dist_write(offset, bytes, value)),
            Target::Redistributor(vcpu, offset) => {
                Effect::of(self.vgic.redist_write(vcpu, offset, bytes, value))
            }
            Target::Rtc(offset) => {
                self.rtc.write(offset, value, now);
                Effect::default()
            }
        }
    }

    /// Brings the console's line to the interrupt controller, and typed bytes to the console.
    fn update_uart(&mut self) -> u64 {
        while let Some(&byte) = self.typed.front() {
            if !self.uart.push(byte) {
                break;
            }
            self.typed.pop_front();
        }
        self.vgic.set_spi(INTID_PL011, self.uart.level()).0
    }

    /// Types bytes; what does not fit in the type-ahead is lost, as on a wire.
    pub fn type_in(&mut self, bytes: &[u8]) -> u64 {
        let room = TYPE_AHEAD.saturating_sub(self.typed.len()).min(bytes.len());
        if self.typed.try_reserve(room).is_err() {
            return 0;
        }
        self.typed.extend(bytes.iter().take(room));
        self.update_uart()
    }

    /// A vCPU sends software interrupts.
    pub fn sgi(&mut self, from: usize, value: u64) -> u64 {
        self.vgic.sgi1r(from, value).0
    }

    /// Reads a register of a vCPU's physical timer.
    pub fn timer_read(&mut self, vcpu: usize, register: TimerRegister, now: u64) -> u64 {
        let Some(timer) = self.timers.get(vcpu) else { return 0 };
        match register {
            TimerRegister::Value => timer.tval(now),
            TimerRegister::Control => timer.ctl(now),
            TimerRegister::Compare => timer.cval(),
        }
    }

    /// Writes a register of a vCPU's physical timer.
    pub fn timer_write(&mut self, vcpu: usize, register: TimerRegister, value: u64, now: u64) -> u64 {
        let Some(timer) = self.timers.get_mut(vcpu) else { return 0 };
        match register {
            TimerRegister::Value => timer.set_tval(value, now),
            TimerRegister::Control => timer.set_ctl(value),
            TimerRegister::Compare => timer.set_cval(value),
        }
        let level = timer.level(now);
        self.vgic.set_ppi(vcpu, INTID_PHYSICAL_TIMER, level).0
    }

    /// Looks at a vCPU's physical timer; true when its line changed something for the vCPU.
    pub fn timer_update(&mut self, vcpu: usize, now: u64) -> bool {
        let Some(timer) = self.timers.get(vcpu) else { return false };
        let level = timer.level(now);
        self.vgic.set_ppi(vcpu, INTID_PHYSICAL_TIMER, level).0 != 0
    }

    /// When a vCPU's physical timer fires, in the guest's time; `None` when it does not or already did.
    pub fn timer_deadline(&self, vcpu: usize) -> Option<u64> {
        self.timers.get(vcpu)?.deadline()
    }

    /// The virtual timer's physical interrupt was taken for a vCPU.
    pub fn timer_fired(&mut self, vcpu: usize) {
        // The kick would be for the vCPU that the caller has at hand.
        let _ = self.vgic.set_ppi(vcpu, INTID_VIRTUAL_TIMER, true);
    }

    /// True while the virtual timer's interrupt is pending or active in the guest: then the physical one
    /// is active, and the guest's end of interrupt ends both.
    pub fn timer_interrupt_is_live(&self, vcpu: usize) -> bool {
        self.vgic.is_live(vcpu, INTID_VIRTUAL_TIMER)
    }

    /// Takes back what the list registers hold.
    pub fn vgic_sync(&mut self, vcpu: usize, lrs: &[u64]) {
        self.vgic.sync(vcpu, lrs);
    }

    /// Fills the list registers; the answer is what else the interface's control register needs.
    pub fn vgic_flush(&mut self, vcpu: usize, lrs: &mut [u64]) -> u32 {
        self.vgic.flush(vcpu, lrs)
    }

    /// True when an interrupt would be signalled to a vCPU that has `vmcr`, its own masks aside.
    pub fn vgic_pending(&self, vcpu: usize, vmcr: u64) -> bool {
        self.vgic.has_pending(vcpu, vmcr)
    }
}
