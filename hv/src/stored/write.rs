//! Writing a guest to a disk, in small steps that never wait.
//!
//! A [`Writer`] goes through four stages, each made durable before the next begins: the header that will name the new
//! image is wiped, the half is written, the header is written, the old one is wiped. It collects pages into batches
//! and has several of them on their way; each [`Writer::step`] handles a page or starts a transfer. Whoever drives it
//! tells it of completions by [`Writer::completed`]. A disk that fails fails the whole, and what was there before is
//! still there. Driven by `sched`'s jobs.

use alloc::string::String;
use alloc::vec::Vec;

use hv_abi::image::{Header, PAGE, SLOTS, STATE_LIMIT, Sum, half_of, mark};
use vmobject::store::{LostPage, StoreError};

use super::open::Opened;

/// Pages of a batch.
const BATCH: usize = 16;
/// Batches on their way at one time.
const BATCHES: usize = 4;
/// What a flush is called in completions; batches have their numbers.
pub const FLUSH: u8 = 4;
const _: () = assert!(FLUSH as usize == BATCHES, "a flush is no batch");

/// A page's bytes, where a disk can reach them.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Page(pub [u8; PAGE]);

/// Where a guest's pages come from.
pub trait Source {
    /// What reading may have to wait for.
    type Wait;

    /// Reads the page of this number; the error says that it has to be asked again when something has happened.
    fn page(&mut self, number: u64, out: &mut [u8; PAGE]) -> Result<(), Lacks<Self::Wait>>;
}

/// Why there is no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lacks<W> {
    /// Not yet.
    Wait(W),
    /// Not yet, and something was done about it: ask again after the interrupts.
    Part,
    /// It is lost: its own store does not give it.
    Lost(LostPage),
    /// The guest has no such page.
    Hole,
}

/// The disk that is written to. Each call starts something of which [`Writer::completed`] is told, or fails.
pub trait Sink {
    /// Starts to write pages from page `first` of the disk on; their bytes stay until that is done.
    fn write(&mut self, first: u64, pages: &[Page], tag: u8) -> Result<(), StoreError>;
    /// Starts to make durable what was written.
    fn flush(&mut self, tag: u8) -> Result<(), StoreError>;
}

/// Why a guest cannot be, or was not, written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteError {
    /// Half of the disk has so many pages, and so many are needed.
    Small {
        /// What there is.
        has: u64,
        /// What is needed.
        needs: u64,
    },
    /// The state is larger than any should be.
    State,
    /// What is stored there says that it is the last generation.
    LastGeneration,
    /// There is no memory for the table of sums.
    NoMemory,
    /// Whoever asked for it has given it up.
    Cancelled,
    /// The disk failed.
    Disk(StoreError),
    /// This page of the guest could not be had.
    Lost(u64, LostPage),
    /// The guest does not have this page.
    Hole(u64),
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<W> {
    /// Something; there is more.
    More,
    /// Nothing until a completion comes, or the disk has room again.
    Idle,
    /// Nothing until this has happened.
    Wait(W),
    /// Everything is durable.
    Done,
    /// It did not work, and nothing is on its way any more.
    Failed(WriteError),
}

/// What is made durable in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Wipe,
    Contents,
    Commit,
    Retire,
}

/// Where in a stage it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Writes are being started.
    Sending,
    /// All have been; then the flush.
    Draining,
    /// The flush is on its way.
    Flushing,
}

struct Batch {
    pages: Vec<Page>,
    used: usize,
    first: u64,
    /// The disk has it.
    sent: bool,
}

impl Batch {
    fn new() -> Result<Self, WriteError> {
        let mut pages = Vec::new();
        pages.try_reserve_exact(BATCH).map_err(|_| WriteError::NoMemory)?;
        pages.resize(BATCH, Page([0; PAGE]));
        Ok(Self { pages, used: 0, first: 0, sent: false })
    }
}

/// What is to be stored.
pub struct Contents {
    /// The guest's pages.
    pub pages: u64,
    /// Its state.
    pub state: Vec<u8>,
    /// What the header says of it for people: JSON.
    pub text: String,
    /// What no other image is keyed with.
    pub key: u64,
}

/// A guest being stored.
pub struct Writer {
    header: Header,
    text: String,
    state: Vec<u8>,
    sums: Vec<u32>,
    table_sum: Sum,
    state_sum: Sum,
    stage: Stage,
    part: Part,
    /// The next page of the half.
    next: u64,
    batches: [Batch; BATCHES],
    /// The one that is being filled.
    filling: usize,
    /// It is to be sent as it is.
    ready: bool,
    pending: usize,
    failed: Option<WriteError>,
}

impl Writer {
    /// Begins to store something on a disk of so many pages, where the newest header is this.
    pub fn new(contents: Contents, newest: Option<&Header>, pages: u64) -> Result<Self, WriteError> {
        let half = newest.map_or(half_of(pages), |newest| newest.half);
        let state = contents.state.len() as u64;
        if state > STATE_LIMIT {
            return Err(WriteError::State);
        }
        let header = Header {
            slot: newest.map_or(0, |newest| (newest.slot + 1) % SLOTS),
            generation: newest.map_or(1, |newest| newest.generation.saturating_add(1)),
            half,
            pages: contents.pages,
            stored: 0,
            state,
            key: contents.key,
            table_sum: 0,
            state_sum: 0,
        };
        if header.used() > half || half.saturating_mul(2) + SLOTS as u64 > pages {
            return Err(WriteError::Small { has: half, needs: header.used() });
        }
        if !header.is_sound() {
            return Err(WriteError::LastGeneration);
        }
        let mut sums = Vec::new();
        let count = usize::try_from(contents.pages).map_err(|_| WriteError::NoMemory)?;
        sums.try_reserve_exact(count).map_err(|_| WriteError::NoMemory)?;
        let batch = Batch::new;
        Ok(Self {
            header,
            text: contents.text,
            state: contents.state,
            sums,
            table_sum: Sum::new(contents.key),
            state_sum: Sum::new(contents.key),
            stage: Stage::Wipe,
            part: Part::Sending,
            next: 0,
            batches: [batch()?, batch()?, batch()?, batch()?],
            filling: 0,
            ready: false,
            pending: 0,
            failed: None,
        })
    }

    /// Which half is written.
    pub const fn slot(&self) -> usize {
        self.header.slot
    }

    /// Pages looked at, and how many there are in all.
    pub const fn progress(&self) -> (u64, u64) {
        (self.next, self.header.used())
    }

    /// The guest's pages that were not zeros so far.
    pub const fn stored(&self) -> u64 {
        self.header.stored
    }

    /// Gives up: nothing new is started, and a step says soon that it failed. False when it has failed already, or when it
    /// is too late for that: the new image may hold already.
    pub fn cancel(&mut self) -> bool {
        let early = self.failed.is_none() && matches!(self.stage, Stage::Wipe | Stage::Contents);
        if early {
            self.stop(WriteError::Cancelled);
        }
        early
    }

    fn stop(&mut self, why: WriteError) {
        self.failed.get_or_insert(why);
    }

    /// What was stored, as if it had just been opened; after [`Step::Done`].
    pub fn finish(self) -> Opened {
        Opened { header: self.header, text: self.text, sums: self.sums, state: self.state }
    }

    /// True once it has failed or was given up; what it started before that may still be on its way.
    pub const fn has_stopped(&self) -> bool {
        self.failed.is_some()
    }

    /// True once the new image is durable and the newest, whatever becomes of the old one's header.
    pub const fn holds(&self) -> bool {
        matches!(self.stage, Stage::Retire)
    }

    /// True while the new image may be durable or not: who fails now cannot tell.
    pub const fn is_doubtful(&self) -> bool {
        matches!(self.stage, Stage::Commit)
    }

    /// True while the disk has something of it.
    pub const fn is_awaited(&self) -> bool {
        self.pending > 0
    }

    /// Something that was started is over.
    pub fn completed(&mut self, tag: u8, result: Result<(), StoreError>) {
        self.pending = self.pending.saturating_sub(1);
        if let Some(batch) = self.batches.get_mut(usize::from(tag)) {
            (batch.sent, batch.used) = (false, 0);
        }
        if let Err(error) = result {
            self.stop(WriteError::Disk(error));
        }
    }

    /// Does one piece of work: looks at a page, or starts a transfer.
    pub fn step<S: Source>(&mut self, source: &mut S, sink: &mut dyn Sink) -> Step<S::Wait> {
        match self.failed {
            Some(_) if self.pending > 0 => return Step::Idle,
            // That the old header could not be wiped changes nothing.
            Some(_) if self.holds() => return Step::Done,
            Some(error) => return Step::Failed(error),
            None => {}
        }
        match self.part {
            Part::Sending if self.ready => self.send(sink),
            Part::Sending => self.fill(source),
            Part::Draining if self.pending > 0 => Step::Idle,
            Part::Draining => match sink.flush(FLUSH) {
                Ok(()) => {
                    (self.part, self.pending) = (Part::Flushing, 1);
                    Step::More
                }
                Err(error) => self.refused(error),
            },
            Part::Flushing if self.pending > 0 => Step::Idle,
            Part::Flushing => {
                let next = match self.stage {
                    Stage::Wipe => Stage::Contents,
                    Stage::Contents => Stage::Commit,
                    Stage::Commit => Stage::Retire,
                    Stage::Retire => return Step::Done,
                };
                (self.stage, self.part) = (next, Part::Sending);
                Step::More
            }
        }
    }

    fn refused<W>(&mut self, error: StoreError) -> Step<W> {
        match error {
            StoreError::Busy => Step::Idle,
            StoreError::Io | StoreError::Refused | StoreError::Gone | StoreError::Corrupt => {
                self.stop(WriteError::Disk(error));
                Step::More
            }
        }
    }

    /// Starts to write the batch at hand.
    fn send<W>(&mut self, sink: &mut dyn Sink) -> Step<W> {
        let batch = &mut self.batches[self.filling];
        // There are four of them: see `FLUSH`.
        let tag = u8::try_from(self.filling).unwrap_or(FLUSH);
        match sink.write(batch.first, &batch.pages[..batch.used], tag) {
            Ok(()) => {
                batch.sent = true;
                self.pending += 1;
                self.filling = (self.filling + 1) % BATCHES;
                self.ready = false;
                if self.stage != Stage::Contents || self.next == self.header.used() {
                    self.part = Part::Draining;
                }
                Step::More
            }
            Err(error) => self.refused(error),
        }
    }

    /// Puts one more page into the batch at hand.
    fn fill<S: Source>(&mut self, source: &mut S) -> Step<S::Wait> {
        if self.batches[self.filling].sent {
            return Step::Idle;
        }
        match self.stage {
            Stage::Wipe => self.header_page(self.header.slot, false),
            Stage::Commit => self.header_page(self.header.slot, true),
            Stage::Retire => self.header_page((self.header.slot + 1) % SLOTS, false),
            Stage::Contents => return self.content(source),
        }
        Step::More
    }

    /// A batch of a header, written or wiped.
    fn header_page(&mut self, slot: usize, written: bool) {
        let batch = &mut self.batches[self.filling];
        let page = &mut batch.pages[0].0;
        if written {
            self.header.encode(self.text.as_bytes(), page);
        } else {
            page.fill(0);
        }
        (batch.first, batch.used, self.ready) = (slot as u64, 1, true);
    }

    fn content<S: Source>(&mut self, source: &mut S) -> Step<S::Wait> {
        let (number, end) = (self.next, self.header.used());
        let batch = &mut self.batches[self.filling];
        if batch.used == 0 {
            batch.first = self.header.start() + number;
        }
        let out = &mut batch.pages[batch.used].0;
        let mut wanted = true;
        if number < self.header.pages {
            match source.page(number, out) {
                Ok(()) => {}
                Err(Lacks::Wait(what)) => return Step::Wait(what),
                Err(Lacks::Part) => return Step::More,
                Err(Lacks::Lost(lost)) => {
                    self.stop(WriteError::Lost(number, lost));
                    return Step::More;
                }
                Err(Lacks::Hole) => {
                    self.stop(WriteError::Hole(number));
                    return Step::More;
                }
            }
            let sum = mark(out, self.header.page_key(number));
            self.sums.push(sum);
            wanted = sum != 0;
            self.header.stored += u64::from(wanted);
        } else if number < self.header.pages + self.header.table_pages() {
            table_page(&self.sums, number - self.header.pages, out);
            self.table_sum.add(out);
            self.header.table_sum = self.table_sum.finish();
        } else {
            state_page(&self.state, number - self.header.pages - self.header.table_pages(), out);
            self.state_sum.add(out);
            self.header.state_sum = self.state_sum.finish();
        }
        batch.used += usize::from(wanted);
        self.next += 1;
        let last = self.next == end;
        self.ready = batch.used > 0 && (last || !wanted || batch.used == BATCH);
        Step::More
    }
}

/// One page of the table of sums.
fn table_page(sums: &[u32], page: u64, out: &mut [u8; PAGE]) {
    out.fill(0);
    let first = usize::try_from(page).unwrap_or(usize::MAX).saturating_mul(PAGE / 4);
    for (to, sum) in out.as_chunks_mut::<4>().0.iter_mut().zip(sums.iter().skip(first)) {
        *to = sum.to_le_bytes();
    }
}

/// One page of the state, zeros behind it.
fn state_page(state: &[u8], page: u64, out: &mut [u8; PAGE]) {
    out.fill(0);
    let first = usize::try_from(page).unwrap_or(usize::MAX).saturating_mul(PAGE);
    let bytes = state.get(first..).unwrap_or_default();
    let bytes = bytes.get(..PAGE).unwrap_or(bytes);
    out[..bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
