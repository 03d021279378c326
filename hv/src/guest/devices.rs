//! One guest's devices, under one lock, joined by their interrupt lines.
//!
//! `vdev` holds each device's logic and knows nothing of the others; here the console's and the clock's
//! lines meet the interrupt controller, and each timer its private interrupt. Functions return the vCPUs that
//! have something to look at. The list registers in this CPU are read by [`Devices::sync`] and written by
//! [`Devices::flush`]. Called by `memory`, `sysreg` and `sched`.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use super::disks::{self, Disk};
use super::forkpage::Outcome;
use super::mmio::{Effect, Target};
use super::sysreg::TimerRegister;
use super::{balloon, rng};
use crate::arch::{gich, switch};
use crate::bounded;
use crate::vdev::vgic::SgiRegister;
use crate::vdev::virtio::INTERRUPT_ACK;
use crate::vdev::virtio::balloon::Balloon;
use crate::vdev::virtio::rng::Rng;
use crate::vdev::{Kicks, Vgic, Vpl011, Vrtc, Vtimer};
use hv_abi::machine::{INTID_PHYSICAL_TIMER, INTID_PL011, INTID_PL031, MAX_VCPUS};
use hv_abi::manifest::DISKS_LIMIT;

/// How much may be typed before the guest reads it.
const TYPE_AHEAD: usize = 4096;
/// ICH_HCR_EL2: the virtual interface is on.
const ICH_HCR_EN: u32 = 1;
/// ICH_HCR_EL2.EOIcount's place.
const ICH_HCR_EOI_SHIFT: u32 = 27;

/// What a flush wants from the caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flushed {
    /// Make the virtual timer's physical interrupt inactive.
    pub release_timer: bool,
    /// Other vCPUs that have something to look at.
    pub kicks: u64,
}

/// The devices of a guest: values, so that a snapshot keeps them by copying.
#[derive(Serialize, Deserialize)]
pub struct Devices {
    /// The interrupt controller.
    pub vgic: Vgic,
    /// The console.
    pub uart: Vpl011,
    /// The clock.
    pub rtc: Vrtc,
    /// The disks.
    #[serde(deserialize_with = "bounded::list::<_, _, DISKS_LIMIT>")]
    pub disks: Vec<Disk>,
    /// What gives RAM back.
    pub balloon: Balloon,
    /// The source of entropy.
    pub rng: Rng,
    /// Each vCPU's EL1 physical timer.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_VCPUS>")]
    pub timers: Vec<Vtimer>,
    /// How the last fork through the fork page ended.
    pub outcome: Outcome,
    /// Typed, and not yet taken by the console's FIFO.
    typed: VecDeque<u8>,
}

impl Clone for Devices {
    /// By hand: with what lies on the heap done first, the rest is copied once, straight to its place.
    #[inline]
    fn clone(&self) -> Self {
        let (disks, timers, typed) = (self.disks.clone(), self.timers.clone(), self.typed.clone());
        Self { vgic: self.vgic.clone(), disks, timers, typed, ..*self }
    }
}

impl Devices {
    /// Devices out of reset, for `vcpus` vCPUs, without disks; the clock starts at `seconds`.
    pub fn new(vcpus: usize, lrs: usize, freq: u64, seconds: u32) -> Self {
        Self {
            vgic: Vgic::new(vcpus, lrs),
            uart: Vpl011::new(),
            rtc: Vrtc::new(freq, seconds),
            disks: Vec::new(),
            balloon: Balloon::new(),
            rng: Rng::new(),
            timers: (0..vcpus).map(|_| Vtimer::new()).collect(),
            outcome: Outcome::default(),
            typed: VecDeque::new(),
        }
    }

    /// Bytes that they have beside themselves.
    pub fn heap_bytes(&self) -> usize {
        let lists = self.timers.capacity() * size_of::<Vtimer>() + self.disks.capacity() * size_of::<Disk>();
        self.vgic.heap_bytes() + lists + self.typed.capacity()
    }

    /// Takes them over from where they were stored, for `vcpus` vCPUs on CPUs with `lrs` list registers and a counter
    /// of `freq` Hz; false if no guest's devices could be like this.
    pub fn adopt(&mut self, vcpus: usize, lrs: usize, freq: u64) -> bool {
        self.vgic.adopt(vcpus, lrs)
            && self.uart.is_sound()
            && self.rtc.frequency() == freq
            && self.timers.len() == vcpus
            && self.typed.len() <= TYPE_AHEAD
            && self.disks.iter().all(Disk::is_sound)
            && self.balloon.is_sound()
            && self.rng.is_sound()
    }

    /// Reads a device register of `1 << size` bytes, for the vCPU `reader`, which is on this CPU.
    #[inline]
    pub fn read(&mut self, target: Target, size: u8, reader: usize, now: u64) -> (u64, u64) {
        match target {
            Target::Uart(offset) => {
                let value = self.uart.read(offset);
                // Only taking a byte moves anything.
                let kicks = if offset & !3 == 0 { self.update_uart() } else { 0 };
                (value, kicks)
            }
            Target::Distributor(_) | Target::Redistributor(..) => {
                let value = self.read_gic(target, size);
                let stale = self.vgic.take_stale();
                if stale.is_empty() { (value, 0) } else { self.read_stale(target, size, reader, stale.0) }
            }
            Target::Rtc(offset) => {
                let value = self.rtc.read(offset, now);
                // The alarm may have come with this look at the time; then nobody is asked to look again.
                (value, self.vgic.set_spi(INTID_PL031, self.rtc.level()).0)
            }
            Target::Disk(..) | Target::Balloon(_) | Target::Rng(_) | Target::Fork(_) => {
                (self.read_virtio(target, size), 0)
            }
        }
    }

    #[cold]
    fn read_virtio(&self, target: Target, size: u8) -> u64 {
        match target {
            Target::Disk(number, offset) => {
                self.disks.get(number).map_or(0, |disk| disk.blk.read(offset, 1 << size))
            }
            Target::Balloon(offset) => self.balloon.read(offset, 1 << size),
            Target::Rng(offset) => self.rng.read(offset, 1 << size),
            // The fork page is answered by `forkpage`, and the others above.
            Target::Fork(_)
            | Target::Uart(_)
            | Target::Rtc(_)
            | Target::Distributor(_)
            | Target::Redistributor(..) => 0,
        }
    }

    #[inline]
    fn read_gic(&mut self, target: Target, size: u8) -> u64 {
        let bytes = 1usize << size;
        match target {
            Target::Distributor(offset) => self.vgic.dist_read(offset, bytes),
            Target::Redistributor(vcpu, offset) => self.vgic.redist_read(vcpu, offset, bytes),
            Target::Uart(_)
            | Target::Rtc(_)
            | Target::Disk(..)
            | Target::Balloon(_)
            | Target::Rng(_)
            | Target::Fork(_) => 0,
        }
    }

    /// The register shows what list registers hold: ours are read back, others' CPUs are asked to.
    #[cold]
    fn read_stale(&mut self, target: Target, size: u8, reader: usize, stale: u64) -> (u64, u64) {
        let mut kicks = stale;
        if stale & 1 << reader != 0 {
            kicks |= self.sync(reader);
        }
        let value = self.read_gic(target, size);
        let _ = self.vgic.take_stale();
        (value, kicks)
    }

    /// Writes a device register of `1 << size` bytes.
    pub fn write(&mut self, target: Target, size: u8, value: u64, now: u64) -> Effect {
        let bytes = 1usize << size;
        match target {
            Target::Uart(offset) => {
                let output = self.uart.write(offset, value);
                Effect { kicks: self.update_uart(), output, work: false }
            }
            Target::Distributor(offset) => Effect::of(self.vgic.dist_write(offset, bytes, value)),
            Target::Redistributor(vcpu, offset) => {
                Effect::of(self.vgic.redist_write(vcpu, offset, bytes, value))
            }
            Target::Rtc(offset) => {
                self.rtc.write(offset, value, now);
                Effect::of(self.vgic.set_spi(INTID_PL031, self.rtc.level()))
            }
            Target::Disk(number, offset) => self.write_disk(number, offset, bytes, value),
            Target::Balloon(offset) => {
                let fell = self.let_fall(balloon::INTID, offset);
                let work = self.balloon.write(offset, bytes, value);
                Effect { work, ..Effect::of(fell | balloon::signal(&self.balloon, &mut self.vgic)) }
            }
            Target::Rng(offset) => {
                let fell = self.let_fall(rng::INTID, offset);
                let work = self.rng.write(offset, bytes, value);
                Effect { work, ..Effect::of(fell | rng::signal(&self.rng, &mut self.vgic)) }
            }
            Target::Fork(_) => Effect::default(),
        }
    }

    fn write_disk(&mut self, number: usize, offset: u64, bytes: usize, value: u64) -> Effect {
        let fell = self.let_fall(disks::intid(number), offset);
        let Some(disk) = self.disks.get_mut(number) else { return Effect::default() };
        let work = disk.blk.write(offset, bytes, value);
        Effect { work, ..Effect::of(fell | disks::signal(number, &disk.blk, &mut self.vgic)) }
    }

    /// A virtio device's line falls while its driver acknowledges, and rises again if a reason is left that came after
    /// the driver had looked: to the guest only an edge is an interrupt (so says its device tree), and a line that stayed
    /// high would tell it neither of that reason nor of any later one.
    fn let_fall(&mut self, intid: u32, offset: u64) -> Kicks {
        if offset == INTERRUPT_ACK { self.vgic.set_spi(intid, false) } else { Kicks::NONE }
    }

    /// Brings typed bytes to the console, and its line to the interrupt controller.
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
    pub fn sgi(&mut self, from: usize, register: SgiRegister, value: u64) -> u64 {
        self.vgic.sgi(from, register, value).0
    }

    /// A vCPU on this CPU deactivates an interrupt by a trapped ICC_DIR_EL1.
    pub fn deactivate(&mut self, vcpu: usize, intid: u32) -> u64 {
        let kicks = self.sync(vcpu) | self.vgic.deactivate(vcpu, intid).0;
        // Its list registers are out of date now.
        kicks | 1 << vcpu
    }

    /// Reads a register of a vCPU's physical timer.
    pub fn timer_read(&mut self, vcpu: usize, register: TimerRegister, now: u64) -> u64 {
        let Some(timer) = self.timers.get(vcpu) else { return 0 };
        match register {
            TimerRegister::Value => timer.value(now),
            TimerRegister::Control => timer.control(now),
            TimerRegister::Compare => timer.compare(),
        }
    }

    /// Writes a register of a vCPU's physical timer.
    pub fn timer_write(&mut self, vcpu: usize, register: TimerRegister, value: u64, now: u64) -> u64 {
        let Some(timer) = self.timers.get_mut(vcpu) else { return 0 };
        match register {
            TimerRegister::Value => timer.set_value(value, now),
            TimerRegister::Control => timer.set_control(value),
            TimerRegister::Compare => timer.set_compare(value),
        }
        let level = timer.update(now);
        self.vgic.set_ppi(vcpu, INTID_PHYSICAL_TIMER, level).0
    }

    /// Looks at the lines that time alone moves; the vCPUs that have something to look at.
    pub fn timer_update(&mut self, vcpu: usize, now: u64) -> u64 {
        let Some(timer) = self.timers.get_mut(vcpu) else { return 0 };
        let level = timer.update(now);
        let mut kicks = self.vgic.set_ppi(vcpu, INTID_PHYSICAL_TIMER, level);
        if self.rtc.deadline().is_some_and(|at| at <= now) {
            let level = self.rtc.update(now);
            kicks |= self.vgic.set_spi(INTID_PL031, level);
        }
        kicks.0
    }

    /// When [`Self::timer_update`] has something to do for a vCPU, in the guest's time. The clock's alarm is
    /// everybody's: whoever set it may be the only one who knows, and whoever comes first raises it for all.
    pub fn timer_deadline(&self, vcpu: usize) -> Option<u64> {
        let timer = self.timers.get(vcpu)?.deadline();
        match (timer, self.rtc.deadline()) {
            (Some(timer), Some(alarm)) => Some(timer.min(alarm)),
            (timer, alarm) => timer.or(alarm),
        }
    }

    /// Takes back what this CPU's list registers hold of a vCPU.
    #[inline]
    pub fn sync(&mut self, vcpu: usize) -> u64 {
        if self.vgic.listed(vcpu) == 0 {
            return 0;
        }
        let mut kicks = self.vgic.sync(vcpu, gich::read_lr).0;
        let ended = gich::read_hcr() >> ICH_HCR_EOI_SHIFT;
        if ended != 0 {
            kicks |= self.vgic.ended_unlisted(vcpu, ended).0;
            gich::set_hcr(gich::read_hcr() & !(0x1f << ICH_HCR_EOI_SHIFT));
        }
        kicks
    }

    /// Brings this CPU's list registers up to date for a vCPU that is about to run on it.
    pub fn flush(&mut self, vcpu: usize) -> Flushed {
        let kicks = self.sync(vcpu);
        if self.vgic.timer_waits(vcpu) && !timer_is_high(switch::virtual_timer().0) {
            self.vgic.timer_dropped(vcpu);
        }
        if !self.vgic.is_dirty(vcpu) {
            return Flushed { release_timer: false, kicks };
        }
        let flushed = self.vgic.flush(vcpu, gich::write_lr);
        gich::set_hcr(ICH_HCR_EN | flushed.hcr);
        Flushed { release_timer: flushed.release_timer, kicks: kicks | flushed.kicks.0 }
    }

    /// Takes everything of a vCPU out of this CPU's list registers: it leaves.
    pub fn unlist(&mut self, vcpu: usize) -> u64 {
        let mut listed = self.vgic.listed(vcpu);
        let kicks = self.sync(vcpu) | self.vgic.unlist(vcpu).0;
        while listed != 0 {
            gich::write_lr(listed.trailing_zeros() as usize, 0);
            listed &= listed - 1;
        }
        gich::set_hcr(0);
        kicks
    }
}

/// True when a virtual timer with this control register holds its line high.
pub const fn timer_is_high(control: u64) -> bool {
    // Enabled, not masked, condition met.
    control & 0b111 == 0b101
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vdev::virtio::balloon::Reservoir;
    use crate::vdev::virtio::{Did, Fault, Ram};

    /// A driver's rings, from address 0 on, with one buffer in them.
    struct Rings;

    impl Ram for Rings {
        type Wait = ();
        fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Fault<()>> {
            out.fill(0);
            if at == 2 {
                out[0] = 1;
            }
            Ok(())
        }
        fn write(&mut self, _at: u64, _bytes: &[u8]) -> Result<(), Fault<()>> {
            Ok(())
        }
    }

    impl Reservoir for Rings {
        fn give_back(&mut self, _at: u64, bytes: u64) -> Result<u64, Fault<()>> {
            Ok(bytes)
        }
    }

    /// Takes an interrupt's pending state away, as a guest that takes it; whether it was there.
    fn take(devices: &mut Devices, intid: u32) -> bool {
        let (word, bit) = (u64::from(intid / 32 * 4), 1 << (intid % 32));
        let (pending, _) = devices.read(Target::Distributor(0x200 + word), 2, 0, 0);
        let _ = devices.write(Target::Distributor(0x280 + word), 2, bit, 0);
        pending & bit != 0
    }

    #[test]
    fn a_reason_that_comes_between_a_look_at_the_status_and_its_acknowledgement_interrupts() {
        let mut devices = Devices::new(1, 4, 1000, 100);
        let set = |devices: &mut Devices, offset, value| {
            let _ = devices.write(Target::Balloon(offset), 2, value, 0);
        };
        // Edge-triggered, as the tree says.
        let (word, place) = (u64::from(balloon::INTID / 16 * 4), balloon::INTID % 16 * 2);
        let _ = devices.write(Target::Distributor(0xc00 + word), 2, 2 << place, 0);
        // A driver with the queue of what comes out of the balloon, eight long.
        let settings =
            [(0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, 1), (0x38, 8), (0x44, 1), (0x70, 15)];
        settings.into_iter().for_each(|(offset, value)| set(&mut devices, offset, value));
        let tell = |devices: &mut Devices| balloon::signal(&devices.balloon, &mut devices.vgic);
        devices.balloon.set_target(1);
        let _ = tell(&mut devices);
        assert!(take(&mut devices, balloon::INTID));
        let (status, _) = devices.read(Target::Balloon(0x60), 2, 0, 0);
        assert_eq!(status, 2, "the configuration has changed");
        // It is about to acknowledge that, and a buffer comes back.
        set(&mut devices, 0x50, 1);
        while devices.balloon.step(&mut Rings) != Did::Nothing {}
        let _ = tell(&mut devices);
        set(&mut devices, INTERRUPT_ACK, status);
        assert_eq!(devices.read(Target::Balloon(0x60), 2, 0, 0).0, 1, "one reason is left");
        assert!(take(&mut devices, balloon::INTID), "and told");
        set(&mut devices, INTERRUPT_ACK, 1);
        assert!(!take(&mut devices, balloon::INTID), "nothing is left");
        devices.balloon.set_target(2);
        let _ = tell(&mut devices);
        assert!(take(&mut devices, balloon::INTID), "the next is an edge again");
    }

    #[test]
    fn an_alarm_that_a_look_at_the_clock_saw_first_still_interrupts() {
        const HZ: u64 = 1000;
        let mut devices = Devices::new(1, 4, HZ, 100);
        for (offset, value) in [(0x10, 1), (0x04, 105)] {
            let _ = devices.write(Target::Rtc(offset), 2, value, 0);
        }
        assert!(!take(&mut devices, INTID_PL031));
        assert_eq!(devices.read(Target::Rtc(0), 2, 0, 5 * HZ).0, 105);
        assert_eq!(devices.timer_deadline(0), None);
        assert!(take(&mut devices, INTID_PL031));
    }

    #[test]
    fn an_alarm_that_any_vcpu_set_ends_the_sleep_of_whoever_sleeps_last() {
        const HZ: u64 = 1000;
        let mut devices = Devices::new(2, 4, HZ, 100);
        for (offset, value) in [(0x10, 1), (0x04, 105)] {
            let _ = devices.write(Target::Rtc(offset), 2, value, 0);
        }
        assert_eq!([0, 1].map(|vcpu| devices.timer_deadline(vcpu)), [Some(5 * HZ); 2]);
        let _ = devices.timer_update(1, 5 * HZ);
        assert!(devices.rtc.level());
        assert_eq!([0, 1].map(|vcpu| devices.timer_deadline(vcpu)), [None; 2], "it has come, once");
    }
}
