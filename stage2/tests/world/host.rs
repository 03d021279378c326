//! What the VM of a world stands on: frames in memory, tables among them, a store that finishes when it is told to, and
//! other CPUs' guests that write at the worst moment.

use super::story::Random;
use super::{PAGES, address, offset};
use stage2::Stage2;
use stage2::table::{Table, TableSource};
use stage2::testing::{Access, Frames, Mmu};
use std::ops::{Deref, Range};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use vmobject::Vm;
use vmobject::addr::Pfn;
use vmobject::store::{
    Direction, Expected, IoToken, Machine, PageStore, PhysMemory as _, StoreError, StoreId,
};
use vmobject::testing::{FakeMemory, FakeStore};

#[derive(Default)]
pub(crate) struct Host {
    pub(crate) memory: FakeMemory,
    pub(crate) store: Store,
}

/// Pages of a store.
pub(crate) type Asked = (StoreId, Range<u64>);

/// A store that can be told to take nothing, and to say what it was asked for: so it is found out where a page is, and
/// it stays there.
#[derive(Default)]
pub(crate) struct Store {
    real: FakeStore,
    refuses: Mutex<Option<Vec<Asked>>>,
}

impl Store {
    fn refuses(&self) -> MutexGuard<'_, Option<Vec<Asked>>> {
        self.refuses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something while nothing is taken, and says what was asked for last.
    pub(crate) fn while_it_refuses<R>(&self, what: impl FnOnce() -> R) -> (R, Option<Asked>) {
        *self.refuses() = Some(Vec::new());
        let done = what();
        (done, self.refuses().take().and_then(|mut asked| asked.pop()))
    }
}

impl Deref for Store {
    type Target = FakeStore;
    fn deref(&self) -> &FakeStore {
        &self.real
    }
}

impl PageStore for Store {
    fn start(
        &self,
        store: StoreId,
        direction: Direction,
        first: u64,
        frames: &[Pfn],
        token: IoToken,
    ) -> Result<(), StoreError> {
        if let Some(asked) = self.refuses().as_mut() {
            asked.push((store, first..first + frames.len() as u64));
            return Err(StoreError::Refused);
        }
        self.real.start(store, direction, first, frames, token)
    }
    fn start_flush(&self, store: StoreId, token: IoToken) -> Result<(), StoreError> {
        self.real.start_flush(store, token)
    }
    fn discard(&self, store: StoreId, first: u64, pages: u64) {
        self.real.discard(store, first, pages);
    }
    fn pages(&self, store: StoreId) -> u64 {
        PageStore::pages(&self.real, store)
    }
    fn whole_pages(&self, store: StoreId) -> u64 {
        self.real.whole_pages(store)
    }
    fn expects(&self, store: StoreId, page: u64) -> Expected {
        self.real.expects(store, page)
    }
}

impl Machine for Host {
    type Pmap = Stage2<Source, Mmu>;
    type Memory = FakeMemory;
    type Store = Store;
    fn memory(&self) -> &FakeMemory {
        &self.memory
    }
    fn store(&self) -> &Store {
        &self.store
    }
}

/// A write of a guest on its own CPU, while another one executed what is under test.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scribble {
    /// The name of the guest.
    pub(crate) who: u32,
    pub(crate) page: u32,
    pub(crate) byte: u8,
    /// Where it went.
    pub(crate) frame: Pfn,
}

/// Guests that write while something is done.
#[derive(Default)]
pub(crate) struct Meanwhile {
    who: Vec<(usize, u32)>,
    /// The CPU that executes what is under test: its guest waits.
    at_work: usize,
    /// Nothing is under test.
    quiet: bool,
    but: Option<u32>,
    gap: u32,
    random: Random,
    looks: u32,
    done: Vec<Scribble>,
}

impl Meanwhile {
    /// These, by CPU and name, write whenever so many looks at tables were done; to all pages but this one.
    pub(crate) fn new(
        who: Vec<(usize, u32)>,
        at_work: usize,
        but: Option<u32>,
        gap: u32,
        random: Random,
    ) -> Self {
        Self { who, at_work, but, gap, random, ..Self::default() }
    }
}

/// Frames of the VM's as tables: it counts and charges them.
#[derive(Clone)]
pub(crate) struct Source {
    pub(crate) frames: Frames,
    pub(crate) vm: Arc<OnceLock<Weak<Vm<Host>>>>,
    mmu: Mmu,
    meanwhile: Arc<Mutex<Meanwhile>>,
}

impl Source {
    pub(crate) fn new(frames: Frames, mmu: Mmu) -> Self {
        Self { frames, vm: Arc::default(), mmu, meanwhile: Arc::default() }
    }

    fn meanwhile(&self) -> MutexGuard<'_, Meanwhile> {
        self.meanwhile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on guests write meanwhile, if their tables let them.
    pub(crate) fn let_write(&self, meanwhile: Meanwhile) {
        *self.meanwhile() = meanwhile;
    }

    /// From now on it is this CPU that executes what is under test.
    pub(crate) fn on(&self, cpu: usize) {
        self.mmu.on(cpu);
        self.meanwhile().at_work = cpu;
    }

    /// From now on none does any more.
    pub(crate) fn let_nobody_write(&self) {
        self.meanwhile().who.clear();
    }

    /// What is done next is not under test, and no guest writes while it is; or again it is.
    pub(crate) fn quiet(&self, quiet: bool) {
        self.meanwhile().quiet = quiet;
    }

    /// What was written since the last call.
    pub(crate) fn take_scribbles(&self) -> Vec<Scribble> {
        core::mem::take(&mut self.meanwhile().done)
    }

    fn go_on(&self) {
        let mut meanwhile = self.meanwhile();
        if meanwhile.quiet {
            return;
        }
        meanwhile.looks += 1;
        if meanwhile.who.is_empty() || !meanwhile.looks.is_multiple_of(meanwhile.gap) {
            return;
        }
        let among = meanwhile.who.len();
        let one = meanwhile.random.below(among);
        let (cpu, who) = meanwhile.who[one];
        let (page, byte) =
            (meanwhile.random.small(PAGES), 1 + u8::try_from(meanwhile.random.small(255)).expect("a byte"));
        if meanwhile.but == Some(page) || cpu == meanwhile.at_work {
            return;
        }
        if let (Ok(frame), Some(vm)) =
            (self.mmu.access(cpu, address(page), Access::Write), self.vm.get().and_then(Weak::upgrade))
        {
            vm.machine().memory.write(frame, offset(page) + 1, &[byte]);
            meanwhile.done.push(Scribble { who, page, byte, frame });
        }
    }
}

impl TableSource for Source {
    fn alloc(&self) -> Option<Pfn> {
        let frame = self.vm.get()?.upgrade()?.alloc_table_frame()?;
        self.frames.claim(frame);
        Some(frame)
    }
    fn free(&self, frame: Pfn) {
        self.frames.release(frame);
        if let Some(vm) = self.vm.get().and_then(Weak::upgrade) {
            vm.free_table_frame(frame);
        }
    }
    fn table(&self, frame: Pfn) -> &Table {
        self.go_on();
        self.frames.table(frame)
    }
}
