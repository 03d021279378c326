//! Frames for translation tables, lent to `stage2` as what they are: atomics that the walker writes too.
#![expect(unsafe_code, reason = "a frame becomes a table by pointer")]

use super::direct::Direct;
use super::machine::vm;
use stage2::table::{Table, TableSource};
use vmobject::addr::Pfn;
use vmobject::store::Machine;

/// Frames of the VM's: charged, counted and zeroed there.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    memory: Direct,
}

impl Tables {
    /// Those of the machine's VM. Panics before there is one.
    pub fn of_machine() -> Self {
        Self { memory: *vm().machine().memory() }
    }
}

impl TableSource for Tables {
    fn alloc(&self) -> Option<Pfn> {
        vm().alloc_table_frame()
    }

    fn free(&self, frame: Pfn) {
        vm().free_table_frame(frame);
    }

    fn table(&self, frame: Pfn) -> &Table {
        let at: *const Table = self.memory.pointer(frame).cast();
        // SAFETY: the frame came from `alloc` and is not freed while stage 2 has it, the direct map covers it
        // and it is aligned; whoever else writes it is a walker, atomically, as the type says.
        unsafe { &*at }
    }
}
