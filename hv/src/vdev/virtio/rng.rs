//! A guest's source of entropy: virtio-rng (virtio 1.2, 5.4), as pure logic over [`Source`].
//!
//! The driver offers buffers, and each is filled to its end. One is worked on at a time, a piece in each
//! [`Rng::step`]; a piece that has to wait is done again from its start, with other bytes. Nothing drawn is kept here:
//! so a copy of the device has none of its twin's bytes but those that lie in the buffer at hand, and [`Rng::renew`]
//! has it fill that one anew. Called by `guest::rng`.

use super::queue::{Link, Segment, Walk};
use super::{Asked, Did, Fault, RING_INDIRECT, Ram, Transport};
use serde::{Deserialize, Serialize};

/// Bytes drawn in one step, and never across a multiple of that, so of one page: what Linux asks for at a time.
/// Drawing a whole page would keep interrupts waiting for twelve times the 10,000 instructions that they may (I6).
const PIECE: u64 = 64;
const PIECE_BYTES: usize = 64;
/// virtio's number for sources of entropy.
const DEVICE: u32 = 4;
/// The only queue.
const REQUESTS: usize = 0;

/// Where random bytes come from, and the RAM that they go to.
pub trait Source: Ram {
    /// Bytes that nobody else gets.
    fn draw(&mut self, out: &mut [u8]);
}

/// What is done with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    /// There is none.
    Idle,
    /// The next of its descriptors is read.
    Chain(Walk),
    /// A part of it is filled: so many bytes are. `rest` is where the next part is; `None` when this is the last.
    Fill { segment: Segment, done: u32, rest: Option<Walk> },
    /// It goes back to the driver.
    Finish,
}

/// A source of entropy, as its driver sees it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Rng {
    transport: Transport<{ REQUESTS + 1 }>,
    /// The driver has notified.
    notified: bool,
    waits: bool,
    phase: Phase,
    /// Of the buffer that is worked on: its chain, and the bytes of the parts that were looked at.
    head: u16,
    bytes: u32,
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl Rng {
    /// One out of reset.
    pub fn new() -> Self {
        Self {
            transport: Transport::new(DEVICE, RING_INDIRECT),
            notified: false,
            waits: false,
            phase: Phase::Idle,
            head: 0,
            bytes: 0,
        }
    }

    /// True unless no source of entropy could be like this: for one that was stored.
    pub fn is_sound(&self) -> bool {
        let phase = match self.phase {
            Phase::Chain(walk) => walk.is_sound(),
            Phase::Fill { segment, done, rest } => {
                rest.is_none_or(|walk| walk.is_sound()) && done <= segment.bytes
            }
            Phase::Idle | Phase::Finish => true,
        };
        // What is worked on goes back to a queue that is there.
        let whence = self.phase == Phase::Idle || self.transport.has_ready(REQUESTS);
        self.transport.is_like(&Self::new().transport) && phase && whence
    }

    /// The interrupt line.
    pub const fn line(&self) -> bool {
        self.transport.line()
    }

    /// What was waited for may have happened.
    pub const fn wake(&mut self) {
        self.waits = false;
    }

    /// The guest has become another: the buffer at hand is filled from its start, for what it holds is its twin's too.
    pub fn renew(&mut self) {
        if self.phase != Phase::Idle {
            self.begin_chain(self.head);
        }
    }

    /// Reads `bytes` bytes of its registers.
    pub fn read(&self, offset: u64, bytes: usize) -> u64 {
        self.transport.read(offset, bytes, &[])
    }

    /// Writes a register; true when there may be something to do now.
    pub fn write(&mut self, offset: u64, bytes: usize, value: u64) -> bool {
        match self.transport.write(offset, bytes, value) {
            Asked::Nothing => false,
            Asked::Notify(_) => {
                self.notified = true;
                true
            }
            Asked::Forget(_) => {
                (self.phase, self.notified, self.waits) = (Phase::Idle, false, false);
                false
            }
        }
    }

    /// Does one piece of work.
    pub fn step<S: Source>(&mut self, source: &mut S) -> Did<S::Wait> {
        if !self.transport.runs(REQUESTS) || self.waits {
            return Did::Nothing;
        }
        let done =
            if self.phase == Phase::Idle { self.begin(source) } else { self.advance(source).map(|()| true) };
        Did::of(done, &mut self.waits).unwrap_or_else(|| {
            self.transport.fail();
            self.phase = Phase::Idle;
            Did::Some
        })
    }

    /// Takes up a buffer; false when there is none.
    fn begin<S: Source>(&mut self, source: &mut S) -> Result<bool, Fault<S::Wait>> {
        if !self.notified {
            return Ok(false);
        }
        let head = self.transport.queue(REQUESTS).pop(source)?;
        match head {
            Some(head) => self.begin_chain(head),
            None => self.notified = false,
        }
        Ok(head.is_some())
    }

    fn begin_chain(&mut self, head: u16) {
        let walk = Walk::begin(self.transport.queue(REQUESTS), head);
        (self.phase, self.head, self.bytes) = (Phase::Chain(walk), head, 0);
    }

    /// Does one piece of what is to be done with a buffer.
    fn advance<S: Source>(&mut self, source: &mut S) -> Result<(), Fault<S::Wait>> {
        self.phase = match self.phase {
            Phase::Idle => Phase::Idle,
            Phase::Chain(mut walk) => {
                let link = walk.step(self.transport.has(RING_INDIRECT), source)?;
                link.map_or(Ok(Phase::Chain(walk)), |link| self.look(link, walk))?
            }
            Phase::Fill { segment, done, rest } if done < segment.bytes => {
                let done = fill(segment, done, source)?;
                Phase::Fill { segment, done, rest }
            }
            Phase::Fill { rest, .. } => rest.map_or(Phase::Finish, Phase::Chain),
            Phase::Finish => {
                if self.transport.queue(REQUESTS).push(source, self.head, self.bytes)? {
                    self.transport.used();
                }
                Phase::Idle
            }
        };
        Ok(())
    }

    /// What is to be done with a part of a buffer. The device reads none (5.4.6.1), and a chain has no more bytes than
    /// its length has room for (2.7.4.2).
    fn look<W>(&mut self, link: Link, walk: Walk) -> Result<Phase, Fault<W>> {
        let Link { segment, writable, last } = link;
        let bytes = self.bytes.checked_add(segment.bytes).filter(|_| writable).ok_or(Fault::Bad)?;
        self.bytes = bytes;
        Ok(Phase::Fill { segment, done: 0, rest: if last { None } else { Some(walk) } })
    }
}

/// Fills the next few bytes of a part; how many of it are filled now.
fn fill<S: Source>(segment: Segment, done: u32, source: &mut S) -> Result<u32, Fault<S::Wait>> {
    let at = segment.at.checked_add(done.into()).ok_or(Fault::Bad)?;
    let bytes = (PIECE - at % PIECE).min((segment.bytes - done).into());
    let mut drawn = [0; PIECE_BYTES];
    let drawn = &mut drawn[..usize::try_from(bytes).unwrap_or(PIECE_BYTES)];
    source.draw(drawn);
    source.write(at, drawn)?;
    Ok(done + u32::try_from(bytes).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_would_give_back_to_a_queue_that_is_not_there_or_filled_too_much_is_no_guests() {
        let mut rng = Rng::new();
        assert!(rng.is_sound());
        rng.phase = Phase::Finish;
        assert!(!rng.is_sound());
        for (offset, value) in [(0x38, 8), (0x44, 1)] {
            rng.write(offset, 4, value);
        }
        rng.phase = Phase::Finish;
        assert!(rng.is_sound());
        let filled = |done| Phase::Fill { segment: Segment { at: 0, bytes: 8 }, done, rest: None };
        rng.phase = filled(8);
        assert!(rng.is_sound());
        rng.phase = filled(9);
        assert!(!rng.is_sound());
    }
}
