//! VMIDs: more guests than the hardware has names for.
//!
//! Its owner locks a [`VmidAllocator`], and loads what [`VmidAllocator::acquire`] gave before letting it go.
//! A name belongs to a generation. When the names run out a new generation begins: one ALLE1IS, and the names
//! that CPUs are running with are kept, since their entries come back at once (DESIGN, tests 3). A guest whose
//! name is of an old generation gets a new one when it is next loaded.

use crate::tlb::{TlbOps, invalidate_all};
use alloc::vec::Vec;

/// A VMID and the generation that it was given in. The default is of no generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Vmid {
    generation: u64,
    number: u16,
}

impl Vmid {
    /// What VTTBR_EL2 holds.
    pub const fn number(self) -> u16 {
        self.number
    }
}

/// Gives out VMIDs. Its owner locks it.
pub struct VmidAllocator {
    generation: u64,
    /// One bit a VMID: taken in this generation. Number 0 is never given: it is what an idle CPU has loaded.
    taken: Vec<u64>,
    names: usize,
    next: usize,
    /// What each CPU runs with now.
    running: Vec<Vmid>,
    rollovers: u64,
}

impl VmidAllocator {
    /// For `bits`-wide VMIDs and `cpus` CPUs, of which there are fewer than names.
    pub fn new(bits: u32, cpus: usize) -> Self {
        let names = 1_usize << bits;
        let mut taken = alloc::vec![0; names.div_ceil(64)];
        if let Some(first) = taken.first_mut() {
            *first = 1;
        }
        Self {
            generation: 1,
            taken,
            names,
            next: 1,
            running: alloc::vec![Vmid::default(); cpus],
            rollovers: 0,
        }
    }

    /// The VMID for a guest that `cpu` is about to run, given the one it had. After it returns the caller loads
    /// it without letting go of the allocator's lock.
    pub fn acquire<T: TlbOps>(&mut self, cpu: usize, had: Vmid, tlb: &T) -> Vmid {
        let vmid = if had.generation == self.generation {
            had
        } else if had != Vmid::default() && self.running.contains(&had) {
            // Kept through a rollover because some CPU runs it: the whole guest keeps it, under the new
            // generation. Two names for one guest would let an invalidate miss one of them.
            let kept = Vmid { generation: self.generation, number: had.number };
            for running in self.running.iter_mut().filter(|r| **r == had) {
                *running = kept;
            }
            kept
        } else {
            self.fresh(tlb)
        };
        if let Some(slot) = self.running.get_mut(cpu) {
            *slot = vmid;
        }
        vmid
    }

    /// How often the names ran out.
    pub const fn rollovers(&self) -> u64 {
        self.rollovers
    }

    fn fresh<T: TlbOps>(&mut self, tlb: &T) -> Vmid {
        let number = self.free_from(self.next).unwrap_or_else(|| {
            self.roll_over(tlb);
            // There are more names than CPUs, so one is free.
            self.free_from(1).unwrap_or(1)
        });
        if let Some(word) = self.taken.get_mut(number / 64) {
            *word |= 1 << (number % 64);
        }
        self.next = number + 1;
        Vmid { generation: self.generation, number: u16::try_from(number).unwrap_or(0) }
    }

    fn free_from(&self, start: usize) -> Option<usize> {
        (start..self.names).find(|n| self.taken.get(n / 64).is_some_and(|w| w >> (n % 64) & 1 == 0))
    }

    fn roll_over<T: TlbOps>(&mut self, tlb: &T) {
        self.generation += 1;
        self.rollovers += 1;
        self.taken.fill(0);
        if let Some(first) = self.taken.first_mut() {
            *first = 1;
        }
        for vmid in &self.running {
            let number = usize::from(vmid.number);
            if let Some(word) = self.taken.get_mut(number / 64) {
                *word |= 1 << (number % 64);
            }
        }
        invalidate_all(tlb);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmobject::addr::Ipa;

    struct Counting(core::cell::Cell<u32>);
    impl TlbOps for Counting {
        fn dsb_ishst(&self) {}
        fn dsb_ish(&self) {}
        fn dsb_nsh(&self) {}
        fn isb(&self) {}
        fn ipas2e1is(&self, _: Ipa) {}
        fn vmalle1is(&self) {}
        fn vmalls12e1is(&self) {}
        fn vmalls12e1(&self) {}
        fn alle1is(&self) {
            self.0.set(self.0.get() + 1);
        }
        fn load_vttbr(&self, vttbr: u64) -> u64 {
            vttbr
        }
    }

    #[test]
    fn a_thousand_guests_share_eight_bits_of_names_without_meeting() {
        let tlb = Counting(core::cell::Cell::new(0));
        let mut names = VmidAllocator::new(8, 4);
        let mut guests = alloc::vec![Vmid::default(); 1000];
        let mut seed = 1_u64;
        let mut on_cpu = [usize::MAX; 4];
        for step in 0..100_000_usize {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (cpu, guest) = (step % 4, (seed >> 33) as usize % guests.len());
            guests[guest] = names.acquire(cpu, guests[guest], &tlb);
            on_cpu[cpu] = guest;
            assert_ne!(guests[guest].number(), 0);
            for other in on_cpu.into_iter().filter(|&g| g != usize::MAX && g != guest) {
                assert_ne!(guests[other].number(), guests[guest].number(), "two running guests, one name");
            }
        }
        assert!(names.rollovers() > 100);
        assert_eq!(u64::from(tlb.0.get()), names.rollovers());
    }

    #[test]
    fn a_guest_running_through_a_rollover_keeps_its_one_name() {
        let tlb = Counting(core::cell::Cell::new(0));
        let mut names = VmidAllocator::new(8, 2);
        let kept = names.acquire(1, Vmid::default(), &tlb);
        for _ in 0..300 {
            names.acquire(0, Vmid::default(), &tlb);
        }
        assert!(names.rollovers() >= 1);
        let again = names.acquire(0, kept, &tlb);
        assert_eq!(again.number(), kept.number());
        assert_eq!(names.acquire(1, again, &tlb), again);
    }
}
