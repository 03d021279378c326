//! Line editing for the monitor's prompt: bytes of a terminal in, lines and echo out.
//!
//! A small state machine without a terminal of its own, so that it is tested as a person would type.
//! Understands left, right, home, end, up, down, backspace, delete, Ctrl-A, -C, -D, -E, -K, -L, -U, -W.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

/// Longest line that is kept; what is typed beyond it rings the bell.
pub const MAX_LINE: usize = 1024;
/// Lines remembered for the up arrow.
pub const MAX_HISTORY: usize = 32;

/// What a byte led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Typed {
    /// Nothing to do yet.
    More,
    /// Return was pressed on this line (which may be empty).
    Line(String),
    /// Ctrl-C, or Ctrl-D on an empty line: the person wants out.
    Leave,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Escape {
    None,
    Seen,
    Bracket,
    Number(u8),
}

/// The state of one line being typed.
pub struct LineEditor {
    prompt: &'static str,
    line: Vec<u8>,
    cursor: usize,
    history: VecDeque<Vec<u8>>,
    /// How far back in the history we are; 0 is the line being typed.
    back: usize,
    escape: Escape,
}

impl LineEditor {
    /// An empty line behind `prompt`.
    pub const fn new(prompt: &'static str) -> Self {
        Self { prompt, line: Vec::new(), cursor: 0, history: VecDeque::new(), back: 0, escape: Escape::None }
    }

    /// Draws the prompt and the line anew, cursor in its place.
    pub fn redraw(&self, out: &mut dyn Write) {
        let text = core::str::from_utf8(&self.line).unwrap_or("");
        // A console that fails has nobody to tell.
        let _ = write!(out, "\r\x1b[K{}{}", self.prompt, text);
        let behind = self.line.len() - self.cursor;
        if behind > 0 {
            let _ = write!(out, "\x1b[{behind}D");
        }
    }

    /// Takes one byte from the terminal; echo goes to `out`.
    pub fn feed(&mut self, byte: u8, out: &mut dyn Write) -> Typed {
        match (self.escape, byte) {
            (Escape::None, _) => return self.plain(byte, out),
            (Escape::Seen, b'[' | b'O') => self.escape = Escape::Bracket,
            (Escape::Bracket, b'0'..=b'9') => self.escape = Escape::Number(byte),
            (Escape::Bracket, key) => {
                self.escape = Escape::None;
                self.arrow(key);
                self.redraw(out);
            }
            (Escape::Number(number), b'~') => {
                self.escape = Escape::None;
                match number {
                    b'1' | b'7' => self.cursor = 0,
                    b'4' | b'8' => self.cursor = self.line.len(),
                    b'3' if self.cursor < self.line.len() => {
                        self.line.remove(self.cursor);
                    }
                    _ => {}
                }
                self.redraw(out);
            }
            (Escape::Seen | Escape::Number(_), _) => self.escape = Escape::None,
        }
        Typed::More
    }

    fn arrow(&mut self, key: u8) {
        match key {
            b'A' if self.back < self.history.len() => self.recall(self.back + 1),
            b'B' if self.back > 0 => self.recall(self.back - 1),
            b'C' if self.cursor < self.line.len() => self.cursor += 1,
            b'D' if self.cursor > 0 => self.cursor -= 1,
            b'H' => self.cursor = 0,
            b'F' => self.cursor = self.line.len(),
            _ => {}
        }
    }

    fn recall(&mut self, back: usize) {
        self.back = back;
        self.line = match back.checked_sub(1) {
            Some(index) => self.history.get(index).cloned().unwrap_or_default(),
            None => Vec::new(),
        };
        self.cursor = self.line.len();
    }

    fn plain(&mut self, byte: u8, out: &mut dyn Write) -> Typed {
        match byte {
            b'\r' | b'\n' => {
                let _ = out.write_str("\r\n");
                let line = core::mem::take(&mut self.line);
                (self.cursor, self.back) = (0, 0);
                if !line.is_empty() && self.history.front() != Some(&line) {
                    self.history.push_front(line.clone());
                    self.history.truncate(MAX_HISTORY);
                }
                return Typed::Line(String::from_utf8_lossy(&line).into_owned());
            }
            0x03 => return Typed::Leave,
            0x04 if self.line.is_empty() => return Typed::Leave,
            0x01 => self.cursor = 0,
            0x05 => self.cursor = self.line.len(),
            0x0b => self.line.truncate(self.cursor),
            0x15 => {
                self.line.drain(..self.cursor);
                self.cursor = 0;
            }
            0x17 => {
                let start = self.word_start();
                self.line.drain(start..self.cursor);
                self.cursor = start;
            }
            0x0c => {
                let _ = out.write_str("\x1b[2J\x1b[H");
            }
            0x1b => {
                self.escape = Escape::Seen;
                return Typed::More;
            }
            0x08 | 0x7f => {
                if self.cursor > 0 {
                    self.cursor -= 1;
                    self.line.remove(self.cursor);
                }
            }
            // Printable ASCII only: a cursor column is then a byte.
            0x20..=0x7e if self.line.len() < MAX_LINE => {
                self.line.insert(self.cursor, byte);
                self.cursor += 1;
                if self.cursor == self.line.len() {
                    let _ = out.write_char(char::from(byte));
                    return Typed::More;
                }
            }
            _ => {
                let _ = out.write_char('\x07');
                return Typed::More;
            }
        }
        self.redraw(out);
        Typed::More
    }

    fn word_start(&self) -> usize {
        let before = self.line.get(..self.cursor).unwrap_or_default();
        let end = before.iter().rposition(|&b| b != b' ').map_or(0, |at| at + 1);
        before.get(..end).unwrap_or_default().iter().rposition(|&b| b == b' ').map_or(0, |at| at + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn type_all(editor: &mut LineEditor, bytes: &[u8]) -> Vec<Typed> {
        let mut out = String::new();
        bytes.iter().map(|&b| editor.feed(b, &mut out)).filter(|t| *t != Typed::More).collect()
    }

    #[test]
    fn a_line_comes_out_as_it_was_edited() {
        let mut editor = LineEditor::new("> ");
        let lines = type_all(&mut editor, b"guets\x08\x08s\x1b[Dx\x7f\x1b[Cts\r");
        assert_eq!(lines, [Typed::Line("guests".into())]);
    }

    #[test]
    fn the_up_arrow_brings_the_last_line_back() {
        let mut editor = LineEditor::new("> ");
        type_all(&mut editor, b"memory\r");
        assert_eq!(type_all(&mut editor, b"x\x1b[A\r"), [Typed::Line("memory".into())]);
        assert_eq!(type_all(&mut editor, b"\x1b[A\x1b[B\r"), [Typed::Line("".into())]);
    }

    #[test]
    fn control_w_takes_one_word_and_control_u_the_rest() {
        let mut editor = LineEditor::new("> ");
        assert_eq!(type_all(&mut editor, b"kill one two \x17x\r"), [Typed::Line("kill one x".into())]);
        assert_eq!(type_all(&mut editor, b"kill one\x15x\r"), [Typed::Line("x".into())]);
    }

    #[test]
    fn a_line_without_end_stays_bounded() {
        let mut editor = LineEditor::new("> ");
        type_all(&mut editor, &[b'a'; 5000]);
        assert_eq!(editor.line.len(), MAX_LINE);
        assert_eq!(type_all(&mut editor, &[3]), [Typed::Leave]);
    }
}
