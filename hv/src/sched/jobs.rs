//! Work that goes on behind the guests' backs: storing one on a disk while it runs.
//!
//! A job is driven by whichever CPU goes round, a page at a time, so many in each turn, and by an idle one for as
//! long as there is something to do; interrupts come in between (invariant I6). The guest stands still only while what
//! it is gets kept, as for a clone; what it writes afterwards is pushed to that copy first. Nothing waits: a disk that
//! is busy, a page that has to come from the swap, memory that is short and the rate that was asked for only
//! mean that the job is looked at again later. A disk that says nothing for half a minute has failed the job, and
//! nobody waits for it any more (invariant I12); what the disk may still write to stays allocated until it gives it back.
//! Called by `monitor` and by the main loop.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use arrayvec::ArrayVec;
use hv_abi::image::PAGE;
use spin::mutex::SpinMutex;
use vmobject::addr::{Pfn, PhysAddr};
use vmobject::fault::{FaultError, Looked, WaitFor};
use vmobject::lock::{Held, Ranked};
use vmobject::store::{Direction, IoToken, PageStore as _, StoreError, StoreId};

use super::load::{Cpu, ticks};
use super::still::while_still;
use super::{Outside, call_daemon, call_daemon_here, slice, take_interrupts};
use crate::arch::timer;
use crate::guest::snapshot::{self, Keep, Snapshot, SnapshotError};
use crate::guest::stored::state::{Region, place};
use crate::guest::stored::{self, Begun};
use crate::guest::{Guest, GuestId, rank};
use crate::mm;
use crate::stored::open::Opened;
use crate::stored::write::{Lacks, Page, Sink, Source, Step, WriteError, Writer};

/// Jobs that run at one time.
const MAX_RUNNING: usize = 4;
/// Jobs that are over and still shown.
const MAX_OVER: usize = 16;
/// Pieces of work in one turn of a CPU.
const STEPS: usize = 64;
/// How long a disk may say nothing, in seconds.
const PATIENCE_S: u64 = 30;
/// How much of the time between two looks at a job counts, in milliseconds: in more than that, the whole machine may have
/// stood still.
const LOOK_MS: u64 = 100;
/// Completions that nobody has looked at yet: more than all jobs can have started.
const MAX_ARRIVED: usize = 64;
/// What a job's transfers have and the memory manager's have not.
const MINE: u64 = 1 << 63;

/// How a job is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Under way.
    Running,
    /// Everything is durable.
    Done,
    /// It was cancelled; what was stored before is still there.
    Cancelled,
    /// It did not work, for this reason; what was stored before is still there.
    Failed(String),
}

/// What is shown of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Its number.
    pub id: u32,
    /// The guest that is stored.
    pub guest: GuestId,
    /// Under which name.
    pub image: String,
    /// How it is.
    pub state: State,
    /// Pages looked at, and all.
    pub progress: (u64, u64),
    /// Pages that were not zeros.
    pub stored: u64,
    /// Milliseconds since it began, until it was over.
    pub ms: u64,
}

struct Running {
    writer: Writer,
    snapshot: Box<Snapshot>,
    store: StoreId,
    regions: Vec<Region>,
    /// Bytes a second at most.
    rate: Option<u64>,
    /// A page of the guest is on its way.
    awaited: Option<IoToken>,
    /// When it was looked at last.
    looked: u64,
    /// For how long it has been looked at in vain.
    silence: u64,
}

/// What is said besides of a job that failed while its header was on its way.
const DOUBT: &str = "; the next run shows whether the old guest or the new one is there";

/// What a look at a job came to.
enum Came {
    /// Something; there is more.
    More,
    /// Nothing yet, and that is as it should be.
    Later,
    /// Nothing: there is no memory.
    Starved,
    /// Nothing: a disk has to say something first.
    Silence,
    /// It is over.
    Over(State),
}

impl Running {
    /// Does a piece of it, which began so many ticks ago.
    fn advance(&mut self, id: u32, ran: u64, held: &mut Held<'_, { rank::GUESTS }>) -> Came {
        self.awaited = self.awaited.filter(|&token| mm::vm().in_flight(token));
        if self.awaited.is_some() && !self.writer.has_stopped() {
            return Came::Silence;
        }
        let idle = if self.writer.is_awaited() { Came::Silence } else { Came::Later };
        if let Some(rate) = self.rate {
            let earned = u128::from(ran) * u128::from(rate) / u128::from(timer::freq().max(1));
            if u128::from(self.writer.stored()) * PAGE as u128 > earned {
                return idle;
            }
        }
        let mut sink = Out { store: self.store, id };
        let mut source = Pages { snapshot: &self.snapshot, regions: &self.regions, held };
        match self.writer.step(&mut source, &mut sink) {
            Step::More => Came::More,
            Step::Idle => Came::Silence,
            Step::Wait(WaitFor::Memory) => Came::Starved,
            Step::Wait(WaitFor::Turn) => Came::More,
            Step::Wait(WaitFor::Io(token)) => {
                self.awaited = Some(token);
                Came::Silence
            }
            Step::Done => Came::Over(State::Done),
            Step::Failed(WriteError::Cancelled) => Came::Over(State::Cancelled),
            Step::Failed(error) => Came::Over(State::Failed(told(error))),
        }
    }
}

struct Job {
    info: Info,
    began: u64,
    /// Until it is over and no disk has anything of it any more.
    running: Option<Running>,
    /// What it stored is just being put into the list of images.
    settling: bool,
}

impl Job {
    fn is_running(&self) -> bool {
        self.info.state == State::Running
    }

    /// What is told of it: that it is done when what it stored can be seen, unless a disk that is silent has that.
    fn told(&self) -> Info {
        let settles = self.settling || self.running.as_ref().is_some_and(|job| !job.writer.is_awaited());
        let mut info = self.info.clone();
        if info.state == State::Done && settles {
            info.state = State::Running;
        }
        info
    }

    /// It is over.
    fn end(&mut self, state: State) {
        let Info { id, guest, image, progress, stored, ms, .. } = &self.info;
        match &state {
            State::Done => {
                log::info!(
                    "guest {guest}: stored as \"{image}\", {stored} of {} pages, in {ms} ms",
                    progress.1
                );
            }
            State::Failed(why) => log::error!("job {id}: guest {guest}: not stored as \"{image}\": {why}"),
            State::Cancelled | State::Running => {}
        }
        self.info.state = state;
    }
}

static JOBS: Ranked<{ rank::GUESTS }, Vec<Job>> = Ranked::new(Vec::new());
static NEXT_ID: AtomicU32 = AtomicU32::new(1);
/// Some job is not over.
static RUNNING: AtomicBool = AtomicBool::new(false);
/// The same, or a disk still has something of one that is.
static ACTIVE: AtomicBool = AtomicBool::new(false);
/// A CPU works on jobs.
static CLAIMED: AtomicBool = AtomicBool::new(false);
/// Completions of jobs' transfers. A leaf: nothing is locked under it.
static ARRIVED: SpinMutex<ArrayVec<(IoToken, Result<(), StoreError>), MAX_ARRIVED>> =
    SpinMutex::new(ArrayVec::new_const());

/// True when a completion is a job's: then it is noted, and the memory manager is not to be told.
pub fn arrived(token: IoToken, result: Result<(), StoreError>) -> bool {
    let mine = token.0 & MINE != 0;
    if mine {
        // There is room for all that could have been started.
        let _ = ARRIVED.lock().try_push((token, result));
    }
    mine
}

/// Begins to store a guest as it is now under a name, at so many bytes a second at most; the job's number.
pub fn save(
    guest: &Arc<Guest>,
    image: &str,
    rate: Option<u64>,
    cpu: &mut Cpu,
    outside: &dyn Outside,
    held: &mut Held<'_, 0>,
) -> Result<u32, String> {
    let refused = |error: stored::StoredError| format!("{image}: {error}");
    stored::is_free(image, held).map_err(refused)?;
    if JOBS.lock(held).0.iter().filter(|job| job.running.is_some()).count() >= MAX_RUNNING {
        return Err(format!("{MAX_RUNNING} jobs run already"));
    }
    let not_kept = |error: SnapshotError| format!("guest {}: {error}", guest.id);
    let mut draft = snapshot::draft(guest, held).map_err(not_kept)?;
    let key = draft.random.words()[0];
    take_interrupts(cpu, outside, held);
    let take = |_: &Cpu, held: &mut Held<'_, 0>| snapshot::take(guest, draft, Keep::Pushed, held);
    let (moment, pause) = while_still(guest, cpu, outside, held, take)
        .map_err(|restless| format!("guest {}: {restless}", guest.id))?;
    let moment = moment.map_err(not_kept)?;
    take_interrupts(cpu, outside, held);
    let Begun { writer, store, regions } = match stored::begin(image, &moment, key, held) {
        Ok(begun) => begun,
        Err(error) => {
            snapshot::delete(moment, held);
            return Err(refused(error));
        }
    };
    let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    let progress = writer.progress();
    let began = timer::now();
    let running =
        Running { writer, snapshot: moment, store, regions, rate, awaited: None, looked: began, silence: 0 };
    let info = Info {
        id,
        guest: guest.id,
        image: image.to_string(),
        state: State::Running,
        progress,
        stored: 0,
        ms: 0,
    };
    log::info!("guest {}: being stored as \"{image}\", still for {pause} ticks", guest.id);
    let mut jobs = JOBS.lock(held).0;
    if jobs.iter().filter(|job| job.running.is_none()).count() >= MAX_OVER
        && let Some(oldest) = jobs.iter().position(|job| job.running.is_none())
    {
        jobs.remove(oldest);
    }
    jobs.push(Job { info, began, running: Some(running), settling: false });
    RUNNING.store(true, Ordering::SeqCst);
    ACTIVE.store(true, Ordering::SeqCst);
    call_daemon();
    Ok(id)
}

/// All jobs that run, and the last that did.
pub fn all(held: &mut Held<'_, 0>) -> Vec<Info> {
    JOBS.lock(held).0.iter().map(Job::told).collect()
}

/// True while any job runs.
pub fn are_running() -> bool {
    RUNNING.load(Ordering::SeqCst)
}

/// True when none runs any more, and a disk has not given back what one had.
pub fn are_stuck() -> bool {
    ACTIVE.load(Ordering::SeqCst) && !are_running()
}

/// Cancels a job; false when none of that number runs, or it is as good as done. It is over a little later.
pub fn cancel(id: u32, held: &mut Held<'_, 0>) -> bool {
    let mut jobs = JOBS.lock(held).0;
    let mut found = jobs.iter_mut().filter(|job| job.info.id == id && job.is_running());
    let job = found.find_map(|job| job.running.as_mut());
    let Some(running) = job else { return false };
    let cancelled = running.writer.cancel();
    if cancelled {
        // It is to end at once, however slowly it was to go.
        running.rate = None;
        call_daemon();
    }
    cancelled
}

/// Cancels all.
pub fn cancel_all(held: &mut Held<'_, 0>) {
    for info in all(held) {
        cancel(info.id, held);
    }
}

/// Works on jobs for a while; true when there is more to do at once.
pub(super) fn work(cpu: &mut Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) -> bool {
    if !ACTIVE.load(Ordering::Relaxed) || CLAIMED.swap(true, Ordering::SeqCst) {
        return false;
    }
    let mut more = true;
    for _ in 0..STEPS {
        more = step_all(held);
        slice::idle_interrupts(cpu, outside, held);
        if !more {
            break;
        }
    }
    let ended = bury(held);
    CLAIMED.store(false, Ordering::SeqCst);
    if ended {
        outside.job_ended();
    }
    if are_running() {
        // A CPU that runs a guest comes round again for it; and what it waits for need not come as an interrupt here.
        call_daemon_here();
    }
    more
}

/// Does a piece of every job; false when none of them can go on now.
fn step_all(held: &mut Held<'_, 0>) -> bool {
    let (mut jobs, mut held) = JOBS.lock(held);
    loop {
        let Some((token, result)) = ARRIVED.lock().pop() else { break };
        let [tag, ..] = token.0.to_le_bytes();
        let job = jobs.iter_mut().find(|job| u64::from(job.info.id) == (token.0 & !MINE) >> 8);
        if let Some(running) = job.and_then(|job| job.running.as_mut()) {
            running.writer.completed(tag, result);
            running.silence = 0;
        }
    }
    let mut any = false;
    for job in jobs.iter_mut() {
        any |= step(job, &mut held);
    }
    any
}

/// Does a piece of a job; false when it cannot go on now, or is over.
fn step(job: &mut Job, held: &mut Held<'_, { rank::GUESTS }>) -> bool {
    let Some(running) = job.running.as_mut().filter(|_| job.info.state == State::Running) else {
        return false;
    };
    let now = timer::now();
    let ran = now.saturating_sub(job.began);
    let since = now.saturating_sub(running.looked).min(ticks(LOOK_MS));
    let came = running.advance(job.info.id, ran, held);
    running.looked = now;
    let in_vain = matches!(came, Came::Silence | Came::Starved);
    running.silence = if in_vain { running.silence + since } else { 0 };
    let silent = running.silence > ticks(PATIENCE_S * 1000);
    let holds = running.writer.holds();
    let doubt = if running.writer.is_doubtful() { DOUBT } else { "" };
    job.info.ms = ran / ticks(1).max(1);
    (job.info.progress, job.info.stored) = (running.writer.progress(), running.writer.stored());
    match came {
        Came::More => return true,
        Came::Silence if silent && holds => job.end(State::Done),
        Came::Silence if silent => {
            job.end(State::Failed(format!("a disk has said nothing for {PATIENCE_S} seconds{doubt}")));
        }
        // The guest may wait for what it takes to write a page that is not stored yet: without the job it needs none.
        Came::Starved if silent => {
            job.end(State::Failed(format!(
                "there has been no memory to read its pages for {PATIENCE_S} seconds"
            )));
        }
        Came::Later | Came::Silence | Came::Starved => {}
        Came::Over(State::Failed(why)) => job.end(State::Failed(format!("{why}{doubt}"))),
        Came::Over(state) => job.end(state),
    }
    false
}

fn told(error: WriteError) -> String {
    match error {
        WriteError::Disk(error) => format!("the disk does not take it: {error}"),
        WriteError::Lost(page, lost) => {
            format!("page {page} of the guest cannot be read: {}", mm::disks().told(lost))
        }
        WriteError::Hole(page) => format!("the guest has no page {page}"),
        WriteError::Small { .. }
        | WriteError::State
        | WriteError::LastGeneration
        | WriteError::NoMemory
        | WriteError::Cancelled => {
            format!("{error:?}")
        }
    }
}

/// Gives back what jobs had that are over, as far as no disk has it; true if one was over.
fn bury(held: &mut Held<'_, 0>) -> bool {
    let mut any = false;
    loop {
        let over = {
            let mut jobs = JOBS.lock(held).0;
            let lies = |job: &Running| !job.writer.is_awaited();
            let over =
                jobs.iter_mut().find(|job| !job.is_running() && job.running.as_ref().is_some_and(lies));
            let over = over.and_then(|job| {
                job.settling = true;
                Some((job.info.clone(), job.running.take()?))
            });
            if over.is_none() {
                let running = jobs.iter().any(Job::is_running);
                any |= RUNNING.swap(running, Ordering::SeqCst) != running;
                ACTIVE.store(jobs.iter().any(|job| job.running.is_some()), Ordering::SeqCst);
            }
            over
        };
        let Some((info, Running { writer, snapshot, .. })) = over else { return any };
        any = true;
        let stored: Option<Opened> = (info.state == State::Done).then(|| writer.finish());
        stored::end(&info.image, stored, held);
        {
            let mut jobs = JOBS.lock(held).0;
            jobs.iter_mut().filter(|job| job.info.id == info.id).for_each(|job| job.settling = false);
        }
        snapshot::delete(snapshot, held);
    }
}

/// The disk that a job writes to.
struct Out {
    store: StoreId,
    id: u32,
}

impl Out {
    fn token(&self, tag: u8) -> IoToken {
        IoToken(MINE | u64::from(self.id) << 8 | u64::from(tag))
    }
}

impl Sink for Out {
    fn write(&mut self, first: u64, pages: &[Page], tag: u8) -> Result<(), StoreError> {
        // The heap is RAM on an identity map, and a batch is in one piece.
        let mut frames = ArrayVec::<Pfn, 64>::new();
        for page in pages {
            let frame = PhysAddr::new(core::ptr::from_ref(page).expose_provenance() as u64).frame();
            frames.try_push(frame.ok_or(StoreError::Refused)?).map_err(|_| StoreError::Refused)?;
        }
        mm::disks().start(self.store, Direction::Out, first, &frames, self.token(tag))
    }

    fn flush(&mut self, tag: u8) -> Result<(), StoreError> {
        mm::disks().start_flush(self.store, self.token(tag))
    }
}

/// A guest's pages as they were.
struct Pages<'p, 'h> {
    snapshot: &'p Snapshot,
    regions: &'p [Region],
    held: &'p mut Held<'h, { rank::GUESTS }>,
}

impl Source for Pages<'_, '_> {
    type Wait = WaitFor;

    fn page(&mut self, number: u64, out: &mut [u8; PAGE]) -> Result<(), Lacks<WaitFor>> {
        let at = place(self.regions, number).ok_or(Lacks::Hole)?;
        match mm::vm().read_snapshot(self.snapshot.memory(), at, out, self.held) {
            Ok(Looked::Done) => Ok(()),
            Ok(Looked::Wait(what)) => Err(Lacks::Wait(what)),
            Ok(Looked::Again) => Err(Lacks::Part),
            Err(FaultError::Lost(lost)) => Err(Lacks::Lost(lost)),
            Err(FaultError::Hole(_) | FaultError::Denied { .. }) => Err(Lacks::Hole),
        }
    }
}
