//! A guest's balloon: virtio-balloon (virtio 1.2, 5.5), as pure logic over [`Reservoir`].
//!
//! The guest gives RAM back in two ways. We ask for so many pages ([`Balloon::set_target`]), and its driver puts as many
//! into the balloon as it can spare, and takes them out again when we ask for fewer or it runs out of memory. And
//! without being asked it reports ranges that it happens not to use, which it may use again at any time. Either way
//! the pages read as zeros afterwards, and what held them is free, but for what cannot be given back: that stays.
//!
//! One buffer is worked on at a time, from whichever queue, a piece in each [`Balloon::step`]. A piece that has to wait
//! is done again from its start: giving the same pages back twice is as good as once. A buffer of statistics is kept
//! until somebody wants newer ones: giving it back is how a device asks. Called by `guest::balloon`.

use super::queue::{Link, Segment, Walk};
use super::{Asked, Did, Fault, PART, RING_INDIRECT, Ram, Transport, low};
use serde::{Deserialize, Serialize};

/// Bytes of a page, whatever the guest's own pages are (5.5.6).
const PAGE: u64 = 4096;
/// Page numbers read in one step.
const NUMBERS: usize = 16;
/// Bytes of a statistic.
const STATISTIC: usize = 10;
/// Statistics read from a buffer: more than there are kinds.
const STATISTICS_READ: usize = 32;
/// virtio's number for balloons.
const DEVICE: u32 = 5;

const STATS_QUEUE: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;

/// Queues, by number: into the balloon, out of it, then the others that the driver wants.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The queue of statistics, where the driver wants them.
const STATISTICS_QUEUE: usize = 2;
const QUEUES: usize = 4;

/// The register, in the configuration space, that the driver writes: pages in the balloon.
const ACTUAL: u64 = 0x104;

/// What each statistic is called, by its tag (5.5.6.4).
pub const STATISTICS: [&str; 16] = [
    "swap_in_bytes",
    "swap_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "cache_bytes",
    "huge_pages",
    "huge_pages_failed",
    "oom_kills",
    "stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
];

/// RAM that can be given back.
pub trait Reservoir: Ram {
    /// Makes whole pages zero and frees what held them: at most [`PART`], and not across a boundary of that. A page that
    /// cannot be given back stays as it is, and that is no fault. How many bytes that was, from the first on: ask again for
    /// the others.
    fn give_back(&mut self, at: u64, bytes: u64) -> Result<u64, Fault<Self::Wait>>;
}

/// Memory that a buffer names, and how far we are in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Piece {
    segment: Segment,
    done: u32,
    /// Where the next one is; `None` when this is the last.
    rest: Option<Walk>,
}

/// What is done with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    /// There is none.
    Idle,
    /// The next of its descriptors is read.
    Chain(Walk),
    /// There are page numbers.
    Numbers(Piece),
    /// There is a free range.
    Range(Piece),
    /// There are statistics.
    Statistics(Segment),
    /// It goes back to the driver.
    Finish,
}

/// A balloon, as its driver sees it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Balloon {
    transport: Transport<QUEUES>,
    /// Pages that we would like to be in it, and that the driver says are.
    target: u32,
    actual: u32,
    /// Queues whose driver has notified.
    notified: [bool; QUEUES],
    waits: bool,
    phase: Phase,
    /// Of the buffer that is worked on.
    queue: usize,
    head: u16,
    /// The buffer of statistics that we keep, and whether newer ones are wanted.
    kept: Option<u16>,
    asked: bool,
    statistics: [Option<u64>; STATISTICS.len()],
    /// Pages given back so far: put into the balloon, and reported.
    inflated: u64,
    reported: u64,
}

impl Default for Balloon {
    fn default() -> Self {
        Self::new()
    }
}

impl Balloon {
    /// A balloon out of reset, with nothing in it.
    pub fn new() -> Self {
        let features = RING_INDIRECT | STATS_QUEUE | DEFLATE_ON_OOM | REPORTING;
        Self {
            transport: Transport::new(DEVICE, features),
            target: 0,
            actual: 0,
            notified: [false; QUEUES],
            waits: false,
            phase: Phase::Idle,
            queue: 0,
            head: 0,
            kept: None,
            asked: false,
            statistics: [None; STATISTICS.len()],
            inflated: 0,
            reported: 0,
        }
    }

    /// True unless no balloon could be like this: for one that was stored.
    pub fn is_sound(&self) -> bool {
        let phase = match self.phase {
            Phase::Chain(walk) => walk.is_sound(),
            Phase::Numbers(piece) | Phase::Range(piece) => {
                piece.rest.is_none_or(|walk| walk.is_sound()) && piece.done <= piece.segment.bytes
            }
            Phase::Idle | Phase::Statistics(_) | Phase::Finish => true,
        };
        // What is worked on, or kept, goes back to a queue that is there.
        let whence = self.phase == Phase::Idle || self.transport.has_ready(self.queue);
        let kept = self.kept.is_none() || self.transport.has_ready(STATISTICS_QUEUE);
        self.transport.is_like(&Self::new().transport) && phase && self.queue < QUEUES && whence && kept
    }

    /// The interrupt line.
    pub const fn line(&self) -> bool {
        self.transport.line()
    }

    /// True when a driver has it.
    pub const fn is_driven(&self) -> bool {
        self.transport.is_running()
    }

    /// Pages that are wanted in it, and that are in it as its driver says.
    pub const fn pages(&self) -> (u32, u32) {
        (self.target, self.actual)
    }

    /// Pages that were put into it, and that were reported as free, since the guest was made.
    pub const fn given_back(&self) -> (u64, u64) {
        (self.inflated, self.reported)
    }

    /// What the driver last said of its memory, with its name.
    pub fn statistics(&self) -> impl Iterator<Item = (&'static str, u64)> {
        STATISTICS.iter().zip(&self.statistics).filter_map(|(name, value)| Some((*name, (*value)?)))
    }

    /// Says how many pages are wanted in it.
    pub const fn set_target(&mut self, pages: u32) {
        self.target = pages;
        self.transport.changed();
    }

    /// Asks the driver for new statistics: there is something to do now.
    pub const fn ask(&mut self) {
        self.asked = true;
    }

    /// What was waited for may have happened.
    pub const fn wake(&mut self) {
        self.waits = false;
    }

    /// Reads `bytes` bytes of its registers.
    pub fn read(&self, offset: u64, bytes: usize) -> u64 {
        let [a, b, c, d] = self.target.to_le_bytes();
        let [e, f, g, h] = self.actual.to_le_bytes();
        self.transport.read(offset, bytes, &[a, b, c, d, e, f, g, h])
    }

    /// Writes a register; true when there may be something to do now.
    pub fn write(&mut self, offset: u64, bytes: usize, value: u64) -> bool {
        if offset == ACTUAL && bytes == 4 {
            self.actual = low(value);
            return false;
        }
        let ran = self.transport.is_running();
        match self.transport.write(offset, bytes, value) {
            // Linux offers its first buffer of statistics, and says so, before it says that it is ready.
            Asked::Nothing if self.transport.is_running() && !ran => {
                self.notified = [true; QUEUES];
                true
            }
            Asked::Nothing => false,
            Asked::Notify(queue) => {
                self.notified[queue] = true;
                true
            }
            Asked::Forget(which) => {
                self.forget(which);
                false
            }
        }
    }

    /// A queue, or all of them, is gone, and with it what came from there.
    fn forget(&mut self, which: Option<usize>) {
        let gone = |queue: usize| which.is_none_or(|which| which == queue);
        if gone(self.queue) {
            (self.phase, self.waits) = (Phase::Idle, false);
        }
        // Whatever the driver wants by now: features can change without a reset.
        if gone(STATISTICS_QUEUE) {
            (self.kept, self.asked) = (None, false);
        }
        for (queue, notified) in self.notified.iter_mut().enumerate() {
            *notified &= !gone(queue);
        }
        if which.is_none() {
            self.actual = 0;
        }
    }

    /// A driver counts only those of the queues that it wants (as Linux and QEMU agree to; 5.5.2 numbers them all).
    const fn statistics_queue(&self) -> Option<usize> {
        if self.transport.has(STATS_QUEUE) { Some(STATISTICS_QUEUE) } else { None }
    }

    /// Does one piece of work.
    pub fn step<R: Reservoir>(&mut self, ram: &mut R) -> Did<R::Wait> {
        if !self.transport.is_running() || self.waits {
            return Did::Nothing;
        }
        let done = if self.phase == Phase::Idle { self.begin(ram) } else { self.advance(ram).map(|()| true) };
        Did::of(done, &mut self.waits).unwrap_or_else(|| {
            self.transport.fail();
            (self.phase, self.kept) = (Phase::Idle, None);
            Did::Some
        })
    }

    /// Takes up a buffer, or gives the kept one back; false when there is nothing to do.
    fn begin<R: Reservoir>(&mut self, ram: &mut R) -> Result<bool, Fault<R::Wait>> {
        let statistics = self.statistics_queue();
        if let (true, Some(head), Some(queue)) = (self.asked, self.kept, statistics) {
            self.give(queue, head, ram)?;
            (self.kept, self.asked) = (None, false);
            return Ok(true);
        }
        for queue in 0..QUEUES {
            // One buffer of statistics at a time.
            let full = statistics == Some(queue) && self.kept.is_some();
            if !self.notified[queue] || full || !self.transport.runs(queue) {
                continue;
            }
            let Some(head) = self.transport.queue(queue).pop(ram)? else {
                self.notified[queue] = false;
                continue;
            };
            let walk = Walk::begin(self.transport.queue(queue), head);
            (self.queue, self.head) = (queue, head);
            // What comes out of the balloon is zeros until it is written: nobody need look what it is.
            self.phase = if queue == DEFLATE { Phase::Finish } else { Phase::Chain(walk) };
            return Ok(true);
        }
        Ok(false)
    }

    /// Gives a buffer back.
    fn give<R: Ram>(&mut self, queue: usize, head: u16, ram: &mut R) -> Result<(), Fault<R::Wait>> {
        if self.transport.queue(queue).push(ram, head, 0)? {
            self.transport.used();
        }
        Ok(())
    }

    /// Does one piece of what is to be done with a buffer.
    fn advance<R: Reservoir>(&mut self, ram: &mut R) -> Result<(), Fault<R::Wait>> {
        self.phase = match self.phase {
            Phase::Idle => Phase::Idle,
            Phase::Chain(mut walk) => {
                let link = walk.step(self.transport.has(RING_INDIRECT), ram)?;
                link.map_or(Ok(Phase::Chain(walk)), |link| self.look(link, walk))?
            }
            Phase::Numbers(piece) => self.inflate(piece, ram)?,
            Phase::Range(piece) => self.report(piece, ram)?,
            Phase::Statistics(segment) => {
                self.note(segment, ram)?;
                self.kept = Some(self.head);
                Phase::Idle
            }
            Phase::Finish => {
                self.give(self.queue, self.head, ram)?;
                Phase::Idle
            }
        };
        Ok(())
    }

    /// What is to be done with a part of a buffer.
    fn look<W>(&self, link: Link, walk: Walk) -> Result<Phase, Fault<W>> {
        let Link { segment, writable, last } = link;
        let statistics = self.statistics_queue() == Some(self.queue);
        let reported = self.queue != INFLATE && !statistics;
        if writable != reported || statistics && !last {
            return Err(Fault::Bad);
        }
        let piece = Piece { segment, done: 0, rest: if last { None } else { Some(walk) } };
        Ok(match self.queue {
            INFLATE => Phase::Numbers(piece),
            _ if statistics => Phase::Statistics(segment),
            _ => Phase::Range(piece),
        })
    }

    /// Gives back the pages with the next few numbers.
    fn inflate<R: Reservoir>(&mut self, piece: Piece, ram: &mut R) -> Result<Phase, Fault<R::Wait>> {
        let Piece { segment, done, .. } = piece;
        let mut raw = [0; NUMBERS * 4];
        let left = usize::try_from(segment.bytes - done).unwrap_or(usize::MAX).min(raw.len());
        let raw = &mut raw[..left / 4 * 4];
        if raw.is_empty() {
            return Ok(piece.next());
        }
        ram.read(segment.at.checked_add(done.into()).ok_or(Fault::Bad)?, raw)?;
        let numbers = raw.as_chunks::<4>().0;
        // What is given back already is so once more if the others are not. Neighbours go together, in either order: Linux takes them from the top.
        let mut run: Option<(u64, u64)> = None;
        for number in numbers.iter().map(|word| u64::from(u32::from_le_bytes(*word))) {
            run = Some(match run {
                Some((first, pages)) if number == first + pages && !starts_part(number) => (first, pages + 1),
                Some((first, pages)) if number + 1 == first && !starts_part(first) => (number, pages + 1),
                Some((first, pages)) => {
                    if ram.give_back(first * PAGE, pages * PAGE)? < pages * PAGE {
                        return Ok(Phase::Numbers(piece));
                    }
                    (number, 1)
                }
                None => (number, 1),
            });
        }
        if let Some((first, pages)) = run
            && ram.give_back(first * PAGE, pages * PAGE)? < pages * PAGE
        {
            return Ok(Phase::Numbers(piece));
        }
        let (count, bytes) = (numbers.len() as u64, u32::try_from(raw.len()).unwrap_or(0));
        self.inflated = self.inflated.saturating_add(count);
        Ok(Phase::Numbers(Piece { done: done + bytes, ..piece }))
    }

    /// Gives back the next [`PART`] at most of a range that the driver does not use; a page of which it has only a
    /// part stays.
    fn report<R: Reservoir>(&mut self, piece: Piece, ram: &mut R) -> Result<Phase, Fault<R::Wait>> {
        let Segment { at, bytes } = piece.segment;
        let end = at.checked_add(bytes.into()).ok_or(Fault::Bad)?;
        let from = at + u64::from(piece.done);
        let start = from.checked_next_multiple_of(PAGE).ok_or(Fault::Bad)?;
        let whole = (end / PAGE * PAGE).saturating_sub(start);
        if whole == 0 {
            return Ok(piece.next());
        }
        let part = ram.give_back(start, whole.min(PART - start % PART))?;
        self.reported = self.reported.saturating_add(part / PAGE);
        let done = u32::try_from(start + part - at).map_err(|_| Fault::Bad)?;
        Ok(Phase::Range(Piece { done, ..piece }))
    }

    /// Reads statistics; kinds that we do not know are passed over.
    fn note<R: Ram>(&mut self, segment: Segment, ram: &mut R) -> Result<(), Fault<R::Wait>> {
        let mut raw = [0; STATISTICS_READ * STATISTIC];
        let bytes = usize::try_from(segment.bytes).unwrap_or(usize::MAX).min(raw.len());
        let raw = &mut raw[..bytes / STATISTIC * STATISTIC];
        ram.read(segment.at, raw)?;
        for [a, b, value @ ..] in raw.as_chunks::<STATISTIC>().0 {
            let tag = usize::from(u16::from_le_bytes([*a, *b]));
            if let Some(statistic) = self.statistics.get_mut(tag) {
                *statistic = Some(u64::from_le_bytes(*value));
            }
        }
        Ok(())
    }
}

impl Piece {
    /// What is done after this.
    const fn next(self) -> Phase {
        match self.rest {
            Some(walk) => Phase::Chain(walk),
            None => Phase::Finish,
        }
    }
}

/// True when the page with this number begins a [`PART`].
const fn starts_part(number: u64) -> bool {
    number.is_multiple_of(PART / PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_that_would_give_back_to_a_queue_that_is_not_there_is_no_guests() {
        let set_up = |balloon: &mut Balloon, queue| {
            for (offset, value) in [(0x30, queue), (0x38, 8), (0x44, 1)] {
                balloon.write(offset, 4, value);
            }
        };
        let mut balloon = Balloon::new();
        assert!(balloon.is_sound());
        (balloon.phase, balloon.queue) = (Phase::Finish, DEFLATE);
        assert!(!balloon.is_sound(), "what it works on");
        set_up(&mut balloon, 1);
        assert!(balloon.is_sound());
        balloon.kept = Some(3);
        assert!(!balloon.is_sound(), "what it keeps");
        set_up(&mut balloon, 2);
        assert!(balloon.is_sound());
    }
}
