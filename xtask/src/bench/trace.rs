//! A run followed instruction by instruction: where the instructions of an operation go, and for how long EL2
//! keeps interrupts masked.
//!
//! QEMU logs one line for each instruction of the hypervisor, and for each mark that the guest leaves
//! (`hv_abi::mark`), into a pipe; a thread counts while they come, so nothing is kept. Instructions are counted
//! by address, and get names at the end. Begin with `Counter::instruction`.

use crate::qemu;
use crate::symbols::Symbols;
use anyhow::{Context, Result, anyhow};
use hv_abi::machine::RAM_BASE;
use hv_abi::mark;
use object::{Object, ObjectSection, ObjectSymbol};
use rustix::fs::{CWD, Mode, mkfifoat};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// Where a flat guest is loaded in its RAM.
const GUEST_OFFSET: u64 = 0x8_0000;
/// A stretch that is longer than this is counted, but its end is not kept.
const LONGEST_KEPT: usize = 1 << 20;

/// What is known of the code before it runs.
struct Code {
    /// The hypervisor's first instruction, and all of them.
    first: u64,
    words: Vec<u32>,
    /// Where exceptions of a guest arrive.
    vectors: u64,
    /// Where the guest leaves marks, and which.
    marks: HashMap<u64, u32>,
}

impl Code {
    fn read(hypervisor: &Path, guest: &[u8]) -> Result<Self> {
        let bytes = fs::read(hypervisor)?;
        let file = object::File::parse(bytes.as_slice()).context("the hypervisor is not an ELF file")?;
        let text = file.section_by_name(".text").context("the hypervisor has no code")?;
        let vectors = file.symbols().find(|s| s.name() == Ok("hv_vectors"));
        let vectors = vectors.context("the hypervisor has no symbol hv_vectors")?.address();
        let mut marks = HashMap::new();
        for (at, word) in (RAM_BASE + GUEST_OFFSET..).step_by(4).zip(words(guest)) {
            if let Some(which) =
                [mark::BEGIN, mark::END, mark::REPORT].iter().find(|m| mark::hint(**m) == word)
            {
                marks.insert(at, *which);
            }
        }
        Ok(Self { first: text.address(), words: words(text.data()?), vectors, marks })
    }

    fn word(&self, at: u64) -> Option<u32> {
        self.words.get(self.place(at)?).copied()
    }

    /// Which of the hypervisor's instructions is at an address.
    fn place(&self, at: u64) -> Option<usize> {
        usize::try_from(at.checked_sub(self.first)? / 4).ok().filter(|place| *place < self.words.len())
    }

    /// A lower exception level has come to EL2 here.
    fn is_arrival(&self, at: u64) -> bool {
        let vector = at.wrapping_sub(self.vectors);
        (0x400..0x800).contains(&vector) && vector.is_multiple_of(0x80)
    }

    /// An instruction of a lower exception level, not an interrupt, has brought it to EL2 here.
    fn is_exit(&self, at: u64) -> bool {
        at.wrapping_sub(self.vectors) == 0x400
    }

    /// Interrupts are not kept waiting across this: WFI, MSR DAIFClr with the interrupts' bit, or MRS of ICC_IAR1_EL1,
    /// which takes the one that is pending as an exception would.
    fn lets_interrupts_in(&self, at: u64) -> bool {
        self.word(at).is_some_and(|word| {
            word == 0xd503_207f || word & 0xffff_f2ff == 0xd503_42ff || word & !0x1f == 0xd538_cc00
        })
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}

/// The operations of one figure.
#[derive(Clone, Default)]
pub(crate) struct Operations {
    /// How many.
    count: u64,
    /// Instructions of all of them together, by place.
    instructions: BTreeMap<u64, u64>,
}

/// What one CPU does at EL2 since interrupts were last possible.
#[derive(Default)]
struct Masked {
    /// False before the first guest.
    counts: bool,
    length: u64,
    at: Vec<u64>,
}

/// What a run's instructions came to.
pub(crate) struct Counter {
    code: Code,
    cpus: BTreeMap<u64, Masked>,
    measuring: bool,
    now: Vec<u64>,
    operations: u64,
    /// For each figure, in the order of their lines.
    figures: Vec<Operations>,
    /// The most in a row with interrupts masked, and where they were.
    longest: (u64, Vec<u64>),
    /// Since an operation began that has not ended: instructions, and exits.
    open: Option<(u64, u64)>,
    /// Instructions from the beginning of an operation to the exit after its own, where that came first: a call that
    /// another guest goes on from.
    until_next_exit: Vec<u64>,
}

impl Counter {
    fn new(code: Code) -> Self {
        let now = vec![0; code.words.len()];
        Self {
            code,
            cpus: BTreeMap::new(),
            measuring: false,
            now,
            operations: 0,
            figures: Vec::new(),
            longest: (0, Vec::new()),
            open: None,
            until_next_exit: Vec::new(),
        }
    }

    /// A CPU executes what is at an address.
    fn instruction(&mut self, cpu: u64, at: u64) {
        if let Some(which) = self.code.marks.get(&at) {
            match *which {
                mark::BEGIN => {
                    self.measuring = true;
                    self.open = Some((0, 0));
                }
                mark::END => {
                    self.measuring = false;
                    self.open = None;
                    self.operations += 1;
                }
                _ => self.report(),
            }
            return;
        }
        let Some(place) = self.code.place(at) else { return };
        if self.measuring
            && let Some(count) = self.now.get_mut(place)
        {
            *count += 1;
        }
        self.follow_open(at);
        let arrives = self.code.is_arrival(at);
        let masked = self.cpus.entry(cpu).or_default();
        if arrives || self.code.lets_interrupts_in(at) {
            if masked.length > self.longest.0 {
                self.longest = (masked.length, masked.at.clone());
            }
            masked.length = 0;
            masked.at.clear();
            masked.counts |= arrives;
        }
        if masked.counts {
            masked.length += 1;
            if masked.at.len() < LONGEST_KEPT {
                masked.at.push(at);
            }
        }
    }

    /// Counts an instruction of EL2 for the operation that has not ended.
    fn follow_open(&mut self, at: u64) {
        let Some((instructions, exits)) = &mut self.open else { return };
        *exits += u64::from(self.code.is_exit(at));
        if *exits == 2 {
            self.until_next_exit.push(*instructions);
            self.open = None;
        } else {
            *instructions += 1;
        }
    }

    /// A figure is printed: what was counted since the last one is its own.
    fn report(&mut self) {
        let mut instructions = BTreeMap::new();
        for (at, count) in (self.code.first..).step_by(4).zip(&mut self.now) {
            if *count > 0 {
                instructions.insert(at, std::mem::take(count));
            }
        }
        self.figures.push(Operations { count: std::mem::take(&mut self.operations), instructions });
    }

    /// The most instructions in a row at EL2 with interrupts masked.
    pub(crate) fn longest(&self) -> u64 {
        self.longest.0
    }

    /// Where the longest stretch spent its instructions, as one operation.
    pub(crate) fn longest_operation(&self) -> Operations {
        let mut instructions = BTreeMap::new();
        for at in &self.longest.1 {
            *instructions.entry(*at).or_default() += 1;
        }
        Operations { count: 1, instructions }
    }

    /// Instructions of EL2 from each operation's beginning to the exit after its own.
    pub(crate) fn until_next_exit(&self) -> &[u64] {
        &self.until_next_exit
    }

    /// The operations of every figure, in the order of their lines.
    pub(crate) fn figures(&self) -> &[Operations] {
        &self.figures
    }
}

impl Operations {
    /// True for a second figure of the same operations.
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many there were.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Instructions of one operation that are of no file whose name starts so.
    pub(crate) fn beyond(&self, files: &[&str], symbols: &Symbols) -> u64 {
        let of_others = |at: u64| !files.iter().any(|file| symbols.owner(at).starts_with(file));
        let all = self.instructions.iter().filter(|(at, _)| of_others(**at)).map(|(_, count)| count);
        all.sum::<u64>() / self.count.max(1)
    }

    /// A table: instructions of one operation, and whose they are.
    pub(crate) fn table(&self, symbols: &Symbols) -> String {
        /// Rows that are worth a line.
        const ROWS: usize = 32;
        let mut owners: HashMap<String, u64> = HashMap::new();
        for (at, count) in &self.instructions {
            *owners.entry(symbols.owner(*at)).or_default() += count;
        }
        let mut rows: Vec<(String, u64)> = owners.into_iter().collect();
        rows.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let total: u64 = rows.iter().map(|row| row.1).sum();
        let rest: u64 = rows.iter().skip(ROWS).map(|row| row.1).sum();
        let others = rows.len().saturating_sub(ROWS);
        rows.truncate(ROWS);
        if rest > 0 {
            rows.push((format!("{others} others"), rest));
        }
        rows.push((format!("at EL2, mean of {}", self.count), total));
        let each = |count: u64| {
            let tenths = count * 10 / self.count.max(1);
            format!("{}.{}", tenths / 10, tenths % 10)
        };
        rows.iter().map(|(owner, count)| format!("{:>10}  {owner}\n", each(*count))).collect()
    }
}

/// A run that is being followed.
pub(crate) struct Follower {
    pipe: PathBuf,
    /// Keeps the pipe open until the run has ended, whether or not QEMU ever opens it.
    writer: File,
    thread: JoinHandle<Result<Counter>>,
}

impl Follower {
    /// Follows the run that is started next, of this hypervisor and this guest; `pipe` is made here. Gives what
    /// QEMU is to log.
    pub(crate) fn start(hypervisor: &Path, guest: &[u8], pipe: PathBuf) -> Result<(Self, qemu::Trace)> {
        let mut counter = Counter::new(Code::read(hypervisor, guest)?);
        let code = &counter.code;
        let mut of = vec![(code.first, 4 * code.words.len() as u64)];
        of.extend(code.marks.keys().map(|at| (*at, 4)));
        // One of an earlier run may lie there.
        let _ = fs::remove_file(&pipe);
        mkfifoat(CWD, &pipe, Mode::RUSR | Mode::WUSR)
            .with_context(|| format!("making {}", pipe.display()))?;
        let writer = File::options().read(true).write(true).open(&pipe)?;
        let reader = File::open(&pipe)?;
        let thread = std::thread::spawn(move || {
            let mut lines = BufReader::with_capacity(1 << 20, reader);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line)? > 0 {
                if let Some((cpu, at)) = parse(&line) {
                    counter.instruction(cpu, at);
                }
                line.clear();
            }
            Ok(counter)
        });
        Ok((Self { pipe: pipe.clone(), writer, thread }, qemu::Trace { pipe, of }))
    }

    /// The run has ended: what its instructions came to.
    pub(crate) fn finish(self) -> Result<Counter> {
        drop(self.writer);
        let counter = self.thread.join().map_err(|_| anyhow!("counting instructions failed"))?;
        // It holds nothing any more.
        let _ = fs::remove_file(&self.pipe);
        counter
    }
}

/// CPU and address of a line `Trace 0: 0x7f.. [cs_base/pc/flags/cflags] symbol`.
fn parse(line: &[u8]) -> Option<(u64, u64)> {
    let rest = line.strip_prefix(b"Trace ")?;
    let cpu = std::str::from_utf8(rest.split(|byte| *byte == b':').next()?).ok()?.parse().ok()?;
    let at = std::str::from_utf8(rest.split(|byte| *byte == b'/').nth(1)?).ok()?;
    Some((cpu, u64::from_str_radix(at, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WFI: u32 = 0xd503_207f;
    const NOP: u32 = 0xd503_201f;

    /// Code from 0x1000 on, its vectors at its start: after them a WFI and NOPs.
    fn counter() -> Counter {
        let mut words = vec![NOP; 0x280];
        words[0x200] = WFI;
        let marks = HashMap::from([(1, mark::BEGIN), (2, mark::END), (3, mark::REPORT)]);
        Counter::new(Code { first: 0x1000, words, vectors: 0x1000, marks })
    }

    #[test]
    fn a_line_of_qemus_log_is_a_cpu_and_an_address() {
        let line = b"Trace 1: 0x7f32c4000100 [00000000/0000000040200c00/00000112/ff000200] hv_vectors\n";
        assert_eq!(parse(line), Some((1, 0x4020_0c00)));
        assert_eq!(parse(b"something else\n"), None);
    }

    #[test]
    fn instructions_between_two_marks_belong_to_the_next_report() {
        let mut counter = counter();
        for at in [0x1400, 1, 0x1400, 0x1404, 2, 0x1408, 1, 0x1400, 2, 3, 1, 2, 3] {
            counter.instruction(0, at);
        }
        let [first, second] = counter.figures() else { panic!("two figures") };
        assert_eq!((first.count, second.count), (2, 1));
        assert_eq!(first.instructions, BTreeMap::from([(0x1400, 2), (0x1404, 1)]));
        assert!(second.instructions.is_empty());
    }

    #[test]
    fn an_operation_that_another_guest_goes_on_from_lasts_until_that_ones_first_exit() {
        let mut counter = counter();
        // An interrupt in the other is none of its own; an operation that ends by itself does not count.
        for at in [1, 0x1400, 0x1404, 0x1480, 0x1484, 0x1400, 0x1404, 2, 1, 0x1400, 2, 0x1400] {
            counter.instruction(0, at);
        }
        assert_eq!(counter.until_next_exit(), [4]);
    }

    #[test]
    fn a_stretch_starts_with_a_guests_exception_and_ends_where_interrupts_come_in() {
        let mut counter = counter();
        // Before the first guest nothing counts, and each CPU is for itself.
        for (cpu, at) in [(0, 0x1900), (0, 0x1904), (0, 0x1400), (1, 0x1900), (0, 0x1900), (0, 0x1400)] {
            counter.instruction(cpu, at);
        }
        assert_eq!(counter.longest(), 2);
        for at in [0x1900, 0x1904, 0x1800, 0x1900, 0x1480] {
            counter.instruction(0, at);
        }
        assert_eq!(counter.longest(), 3, "up to the WFI, and the rest is shorter");
        assert_eq!(counter.longest_operation().instructions.len(), 3);
    }
}
