//! How guests use memory: a CPU's access, its faults served until it is done, and every byte compared.

use super::story::Step;
use super::{ALL, CPUS, ENOUGH, TOGETHER, World, address};
use stage2::testing::Access;
use vmobject::addr::{Ipa, Pfn};
use vmobject::fault::{FaultError, Faulted};
use vmobject::lock::Held;
use vmobject::prot::Prot;
use vmobject::store::{LostPage, PhysMemory as _, StoreError};

impl World {
    /// An access of the guest that a CPU runs, with faults served until it is done. `None` when memory is out.
    pub(super) fn access(
        &mut self,
        cpu: usize,
        guest: usize,
        page: u32,
        access: Access,
    ) -> Result<Option<Pfn>, String> {
        let contents = &self.guests[guest].contents;
        let (at, sealed, there) = (address(page), contents.sealed & 1 << page != 0, contents.has(page));
        self.access_at(cpu, guest, at, (sealed, there), access)
    }

    /// The same, wherever it is.
    pub(super) fn access_at(
        &mut self,
        cpu: usize,
        guest: usize,
        at: Ipa,
        (sealed, there): (bool, bool),
        access: Access,
    ) -> Result<Option<Pfn>, String> {
        let wanted = if access == Access::Write { Prot::WRITE } else { Prot::READ };
        let mut short = 0;
        for _ in 0..200 {
            if let Ok(frame) = self.mmu.access(cpu, at, access) {
                if !there {
                    return Err(format!("{access:?} of {at}, which guest {guest} does not have"));
                }
                if sealed && access == Access::Write {
                    return Err(format!("a write to {at}, which guest {guest} may not write"));
                }
                self.accesses += 1;
                return Ok(Some(frame));
            }
            self.source.on(cpu);
            let pushed = self.vm.stats().pushed;
            let served = self.vm.fault(&self.guests[guest].map, at, wanted, &mut Held::root());
            self.note_fault(guest, at, pushed, served);
            match served {
                Ok(Faulted::Mapped) => {}
                Ok(Faulted::Wait(_)) if self.deliver_one() => {}
                Ok(Faulted::Wait(_)) if self.page_out(ENOUGH) > 0 => short += 1,
                Ok(Faulted::Wait(_)) => {
                    self.saw("accesses that found no memory");
                    return Ok(None);
                }
                Err(FaultError::Lost(LostPage { error: StoreError::Io, .. })) if self.failing > 0 => {
                    self.saw("accesses that a failed read ended");
                    return Ok(None);
                }
                Err(FaultError::Hole(_)) if !there => {
                    self.saw("accesses to nothing");
                    return Ok(None);
                }
                Err(FaultError::Denied { wanted: Prot::WRITE, .. }) if sealed => {
                    self.saw("writes denied");
                    return Ok(None);
                }
                Err(error) => return Err(format!("{access:?} at {at}: {error:?}")),
            }
        }
        // Nobody promised these guests what an instruction needs to get on (I15): what comes may go again at once.
        if short > 20 {
            return Ok(None);
        }
        Err(format!("{access:?} at {at} faults for ever"))
    }

    pub(super) fn use_memory(&mut self, cpu: usize, page: u32, access: Access) -> Result<(), String> {
        let Some(guest) = self.running[cpu] else { return Ok(()) };
        let Some(frame) = self.access(cpu, guest, page, access)? else { return Ok(()) };
        self.absorb();
        let memory = &self.vm.machine().memory;
        let contents = &mut self.guests[guest].contents;
        let at = contents.offset(page);
        contents.touched |= 1 << page;
        let known = contents.of(page);
        let mut bytes = [0; 2];
        memory.read(frame, at, &mut bytes);
        if bytes != known {
            return Err(format!("page {page} of guest {guest} has {bytes:?} and not {known:?}"));
        }
        if access == Access::Write {
            let byte =
                known[0].wrapping_add(1 + u8::try_from(self.random.small(200)).expect("a byte")).max(1);
            memory.write(frame, at, &[byte]);
            contents.bytes[page as usize][0] = byte;
        }
        self.audit_scribbles()
    }

    /// The guest that a CPU runs uses a page; then all that run go on with some pages that they have, and now and then
    /// with one that may be new.
    pub(super) fn use_memories(&mut self, step: Step, access: Access) -> Result<(), String> {
        self.use_memory(step.cpu, step.page, access)?;
        let first = self.random.small(ALL);
        for _ in 1..step.uses {
            let cpu = self.random.below(CPUS);
            let Some(guest) = self.running[cpu] else { continue };
            let page = (first + self.random.small(TOGETHER)) % ALL;
            let page = match self.guests[guest].contents.touched_from(page) {
                Some(touched) if self.random.below(self.calm) > 0 => touched,
                Some(_) | None => page,
            };
            let access = if self.random.below(self.calm) == 0 { Access::Write } else { Access::Read };
            self.use_memory(cpu, page, access)?;
        }
        Ok(())
    }
}
