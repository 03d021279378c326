//! Answers in bounded parts: text that grows by pieces, JSON that is written and values that are given up with
//! interrupts let in between (invariant I6).
//!
//! An answer may be thousands of rows, or all that a guest printed. What is called `rest` here is done after each small
//! part. Called by `cmd` and `desk`.

use alloc::collections::VecDeque;
use alloc::string::String;
use core::fmt::{self, Write};
use serde_json::Value;

use crate::mm;

/// Bytes of a piece.
pub const PIECE: usize = 512;
/// Pieces that there is memory for always: lists end early where there is no room, and what else is answered is not longer.
const SPARE: usize = 512;

/// Text in pieces: what is there is not moved when more comes.
#[derive(Debug, Default)]
pub struct Pieces {
    pieces: VecDeque<String>,
    cut: bool,
}

impl Pieces {
    /// None yet.
    pub const fn new() -> Self {
        Self { pieces: VecDeque::new(), cut: false }
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// True when there was no memory for all of it: the end is missing.
    pub const fn is_cut(&self) -> bool {
        self.cut
    }

    /// The first.
    pub fn first(&self) -> Option<&str> {
        self.pieces.front().map(String::as_str)
    }

    /// Takes the first away.
    pub fn pop(&mut self) -> Option<String> {
        self.pieces.pop_front()
    }

    /// Puts one behind the others.
    pub fn push(&mut self, piece: String) {
        self.pieces.push_back(piece);
    }

    /// Adds text of any length.
    pub fn add(&mut self, text: &str, rest: &mut dyn FnMut()) {
        for part in parts(text, PIECE) {
            self.append(part);
            rest();
        }
    }

    /// Fills the last piece, and begins new ones as long as there is memory: what came after a gap would be taken for what
    /// was there.
    fn append(&mut self, mut part: &str) {
        while !part.is_empty() && !self.cut {
            let room = self.pieces.back().map_or(0, |last| PIECE.saturating_sub(last.len()));
            let (now, after) = part.split_at(part.floor_char_boundary(room));
            let spare = self.pieces.len() < SPARE;
            match self.pieces.back_mut().filter(|_| !now.is_empty()) {
                Some(last) => {
                    last.push_str(now);
                    part = after;
                }
                None if spare || mm::has_room() => {
                    self.pieces.push_back(String::with_capacity(PIECE));
                }
                None => self.cut = true,
            }
        }
    }
}

impl Write for Pieces {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        parts(text, PIECE).for_each(|part| self.append(part));
        Ok(())
    }
}

/// Text in parts of at most so many bytes, each of whole characters.
pub fn parts(text: &str, most: usize) -> impl Iterator<Item = &str> {
    let mut left = text;
    core::iter::from_fn(move || {
        let (part, after) = left.split_at(left.floor_char_boundary(most));
        left = after;
        (!part.is_empty()).then_some(part)
    })
}

/// Writes a value as JSON.
pub fn write_json(value: &Value, out: &mut Pieces, rest: &mut dyn FnMut()) {
    match value {
        Value::Array(rows) => {
            out.append("[");
            for (number, row) in rows.iter().enumerate() {
                out.append(if number == 0 { "" } else { "," });
                write_json(row, out, rest);
                rest();
            }
            out.append("]");
        }
        Value::Object(fields) => {
            out.append("{");
            for (number, (key, value)) in fields.iter().enumerate() {
                out.append(if number == 0 { "\"" } else { ",\"" });
                write_part(key, out, rest);
                out.append("\":");
                write_json(value, out, rest);
                rest();
            }
            out.append("}");
        }
        Value::String(text) => {
            out.append("\"");
            write_part(text, out, rest);
            out.append("\"");
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {
            // Pieces take everything.
            let _ = write!(out, "{value}");
        }
    }
}

/// Writes a part of a JSON string, without the quotes.
pub fn write_part(text: &str, out: &mut Pieces, rest: &mut dyn FnMut()) {
    for part in parts(text, PIECE) {
        let quoted = serde_json::to_string(part).unwrap_or_default();
        let escaped = quoted.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or_default();
        // Pieces take everything.
        let _ = out.write_str(escaped);
        if text.len() > PIECE {
            rest();
        }
    }
}

/// Gives a value's memory back.
pub fn discard(value: Value, rest: &mut dyn FnMut()) {
    match value {
        Value::Array(rows) => rows.into_iter().for_each(|row| discard(row, rest)),
        Value::Object(fields) => {
            for (_, value) in fields {
                discard(value, rest);
                rest();
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Adds bytes as text, what is none as the character for that; a character that is not complete yet stays, unless these
/// are the `last`. How many bytes were used.
pub fn add_text(text: &mut String, bytes: &[u8], last: bool) -> usize {
    let mut used = 0;
    loop {
        let left = bytes.get(used..).unwrap_or_default();
        match core::str::from_utf8(left) {
            Ok(good) => {
                text.push_str(good);
                return bytes.len();
            }
            Err(error) => {
                let (good, bad) = left.split_at(error.valid_up_to());
                text.push_str(core::str::from_utf8(good).unwrap_or_default());
                used += good.len();
                let wrong = error.error_len().or(last.then_some(bad.len()));
                let Some(wrong) = wrong else { return used };
                text.push(char::REPLACEMENT_CHARACTER);
                used += wrong;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use serde_json::json;

    fn whole(mut pieces: Pieces) -> String {
        core::iter::from_fn(|| pieces.pop()).inspect(|piece| assert!(piece.len() <= PIECE)).collect()
    }

    #[test]
    fn json_in_pieces_is_the_same_value() {
        let long = "ä\"\n\u{1}".repeat(1000);
        let value = json!({"a": [1, null, true, {"b": long}], "c\"": {}, "d": [], "e": -1.5, "f": "short"});
        let (mut out, mut rests) = (Pieces::new(), 0);
        write_json(&value, &mut out, &mut || rests += 1);
        assert!(rests > 10, "interrupts come in between");
        assert_eq!(serde_json::from_str::<Value>(&whole(out)).unwrap(), value);
    }

    #[test]
    fn text_is_the_same_in_pieces_and_no_part_cuts_a_character() {
        let text = "aäöü€".repeat(300);
        let mut out = Pieces::new();
        out.add(&text, &mut || {});
        write!(out, "{text}{}", 7).unwrap();
        assert_eq!(whole(out), format!("{text}{text}7"));
        assert_eq!(parts(&text, 4).collect::<String>(), text);
    }

    #[test]
    fn a_log_in_parts_reads_as_the_whole() {
        let bytes = "aä€\u{1f600}".as_bytes();
        let whole = [bytes, &[0xff, 0xe2, 0x82]].concat();
        for cut in 0..whole.len() {
            let (mut text, mut left) = (String::new(), whole[..cut].to_vec());
            let used = add_text(&mut text, &left, false);
            left.drain(..used);
            left.extend(&whole[cut..]);
            assert_eq!(add_text(&mut text, &left, true), left.len());
            assert_eq!(text, String::from_utf8_lossy(&whole), "cut at {cut}");
        }
    }
}
