//! Who gets what is typed at the console: the attached guest, or the monitor behind Ctrl-T.
//!
//! Pure: bytes in, a [`Routed`] out. The caller owns the wire, the guest and the [`super::cmd::Host`].

use alloc::string::String;
use core::fmt::Write;

use super::line::{LineEditor, Typed};

/// Ctrl-T: opens the monitor; pressed again at an empty prompt it types a Ctrl-T into the guest.
pub const ESCAPE: u8 = 0x14;

/// Where a byte went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Routed {
    /// Taken by the line editor; its echo is written.
    Taken,
    /// For the attached guest.
    Guest(u8),
    /// A line for the monitor to run; call [`Console::prompt`] after its answer.
    Command(String),
}

/// The console's state.
pub struct Console {
    editor: LineEditor,
    open: bool,
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Console {
    /// A console connected to the guest.
    pub const fn new() -> Self {
        Self { editor: LineEditor::new("hv> "), open: false }
    }

    /// True while the monitor has the console; guest output is then kept back.
    pub const fn is_open(&self) -> bool {
        self.open
    }

    /// Leaves the monitor: what is typed goes to the guest again.
    pub fn close(&mut self, out: &mut dyn Write) {
        if self.open {
            self.open = false;
            let _ = out.write_str("\r\n");
        }
    }

    /// Shows the prompt, if the monitor is still open.
    pub fn prompt(&self, out: &mut dyn Write) {
        if self.open {
            self.editor.redraw(out);
        }
    }

    /// Takes one typed byte.
    pub fn feed(&mut self, byte: u8, out: &mut dyn Write) -> Routed {
        if !self.open {
            if byte != ESCAPE {
                return Routed::Guest(byte);
            }
            self.open = true;
            let _ = out.write_str("\r\nmonitor; 'help' lists commands, Ctrl-D goes back to the guest\r\n");
            self.prompt(out);
            return Routed::Taken;
        }
        if byte == ESCAPE {
            self.close(out);
            return Routed::Guest(byte);
        }
        match self.editor.feed(byte, out) {
            Typed::More => Routed::Taken,
            Typed::Leave => {
                self.close(out);
                Routed::Taken
            }
            Typed::Line(line) if line.trim().is_empty() => {
                self.prompt(out);
                Routed::Taken
            }
            Typed::Line(line) => Routed::Command(line),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn what_is_typed_reaches_the_guest_until_control_t() {
        let mut console = Console::new();
        let mut out = String::new();
        let routed: Vec<_> = b"a\x14map 1\r\x04b".iter().map(|&b| console.feed(b, &mut out)).collect();
        let kept: Vec<_> = routed.into_iter().filter(|r| *r != Routed::Taken).collect();
        assert_eq!(kept, [Routed::Guest(b'a'), Routed::Command("map 1".into()), Routed::Guest(b'b')]);
    }

    #[test]
    fn control_t_twice_types_one_into_the_guest() {
        let mut console = Console::new();
        let mut out = String::new();
        assert_eq!(console.feed(ESCAPE, &mut out), Routed::Taken);
        assert!(console.is_open());
        assert_eq!(console.feed(ESCAPE, &mut out), Routed::Guest(ESCAPE));
        assert!(!console.is_open());
    }
}
