//! Names for the addresses that the hypervisor prints.
//!
//! EL2 carries no names: a panic's backtrace is the addresses of calls, innermost first, on lines `hv: backtrace N:
//! 0x...`. It runs on an identity map, so they are those of the ELF file that was built. Here they become
//! functions, inlined ones too, with files and lines.

use addr2line::Loader;
use anyhow::{Result, anyhow};
use std::fs;
use std::path::{Path, PathBuf};

/// What every line of a backtrace has before the address.
const LINE: &str = "hv: backtrace ";
/// How the line before the first of a panic starts.
const PANIC: &str = "hv: panic on CPU ";

/// The hypervisor's own log, and the image whose addresses are in it.
#[derive(Clone, Debug)]
pub(crate) struct Log {
    /// The log.
    pub(crate) file: PathBuf,
    /// The image.
    pub(crate) elf: PathBuf,
}

impl Log {
    /// What to tell when the machine did not end well: of the panic, or else the last lines.
    pub(crate) fn told(&self) -> String {
        const LAST: usize = 8;
        if let Some(panic) = self.panic() {
            return panic;
        }
        let text = fs::read(&self.file).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let last = lines.get(lines.len().saturating_sub(LAST)..).unwrap_or_default();
        if last.is_empty() {
            return "the hypervisor said nothing".to_owned();
        }
        format!("the end of {}:\n{}", self.file.display(), last.join("\n"))
    }

    /// What follows these words in the last line of the log that has them, of those that are written to their end.
    pub(crate) fn last(&self, words: &str) -> Option<String> {
        let bytes = fs::read(&self.file).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        let whole = text.rsplit_once('\n')?.0;
        whole.lines().rev().find_map(|line| line.split_once(words)).map(|(_, rest)| rest.to_owned())
    }

    /// What the log says of a panic, with names; `None` if there was none. The whole log with names then lies
    /// beside it, as `hv.named.log`.
    pub(crate) fn panic(&self) -> Option<String> {
        let bytes = fs::read(&self.file).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        text.contains(PANIC).then(|| {
            let named = match Symbols::open(&self.elf) {
                Ok(symbols) => annotate(&text, |address| symbols.names(address)),
                Err(why) => format!("{text}no names: {why:#}\n"),
            };
            // The copy is for later; what it holds is shown now.
            let _ = fs::write(self.file.with_extension("named.log"), &named);
            let start = named.find(PANIC).unwrap_or(0);
            named.get(start..).unwrap_or_default().trim_end().to_owned()
        })
    }
}

/// An image's debug information.
pub(crate) struct Symbols(Loader);

impl Symbols {
    /// Reads an image's.
    pub(crate) fn open(elf: &Path) -> Result<Self> {
        Loader::new(elf).map(Self).map_err(|why| anyhow!("{}: {why}", elf.display()))
    }

    /// Whose an instruction is: the innermost function of ours, with its file, or else a symbol.
    pub(crate) fn owner(&self, address: u64) -> String {
        if let Ok(mut frames) = self.0.find_frames(address) {
            while let Ok(Some(frame)) = frames.next() {
                let name = frame.function.as_ref().and_then(|f| f.demangle().ok().map(|n| plain(&n)));
                let file = frame.location.as_ref().and_then(|at| at.file).map(Path::new);
                let file = file.and_then(|file| file.strip_prefix(crate::root()).ok());
                if let (Some(name), Some(file)) = (name, file) {
                    return format!("{} {}", file.display(), last(&name));
                }
            }
        }
        self.0
            .find_symbol(address)
            .map_or_else(|| format!("{address:#x}"), |name| last(&plain(name)).to_owned())
    }

    /// The functions that an instruction belongs to, innermost first: more than one where some were inlined.
    fn names(&self, address: u64) -> Vec<String> {
        let mut names = Vec::new();
        if let Ok(mut frames) = self.0.find_frames(address) {
            while let Ok(Some(frame)) = frames.next() {
                let name = frame.function.as_ref().and_then(|f| f.demangle().ok().map(|n| plain(&n)));
                let place = frame.location.as_ref().and_then(|at| Some((at.file?, at.line?)));
                match (name, place) {
                    (Some(name), Some((file, line))) => {
                        names.push(format!("{name} at {}:{line}", ours(file)));
                    }
                    (Some(name), None) => names.push(name),
                    (None, _) => {}
                }
            }
        }
        let code = self.0.get_section_range(b".text");
        if names.is_empty() && code.is_some_and(|code| (code.begin..code.end).contains(&address)) {
            // Assembly has symbols and no more.
            names.extend(self.0.find_symbol(address).map(plain));
        }
        names
    }
}

/// A function's name without the hash that the compiler puts behind it.
fn plain(name: &str) -> String {
    match name.rsplit_once("::h") {
        Some((name, hash)) if hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
            name.to_owned()
        }
        _ => name.to_owned(),
    }
}

/// A function's own name, without its path, its generics and the closure that it may be.
fn last(name: &str) -> &str {
    name.rsplit("::").find(|part| !part.starts_with(['<', '{'])).unwrap_or(name)
}

/// A file's path, from the project's folder on if it is there.
fn ours(file: &str) -> String {
    Path::new(file).strip_prefix(crate::root()).unwrap_or(Path::new(file)).display().to_string()
}

/// The log with the names that `names` has for the addresses of its backtraces; a recursion's lines become one.
fn annotate(log: &str, names: impl Fn(u64) -> Vec<String>) -> String {
    let mut text = String::new();
    let mut last = None;
    let mut again = 0;
    for line in log.lines() {
        let address = address(line);
        if address.is_some() && address == last {
            again += 1;
            continue;
        }
        if again > 0 {
            text += &format!("{LINE}   the same {again} times more\n");
            again = 0;
        }
        last = address;
        let found = address.map(&names).unwrap_or_default();
        let mut found = found.iter();
        text += line;
        if let Some(name) = found.next() {
            text += &format!(" {name}");
        }
        text += "\n";
        for name in found {
            text += &format!("{LINE}   inlined into {name}\n");
        }
    }
    if again > 0 {
        text += &format!("{LINE}   the same {again} times more\n");
    }
    text
}

/// The address on a line of a backtrace.
fn address(line: &str) -> Option<u64> {
    let (_, address) = line.strip_prefix(LINE)?.split_once(": 0x")?;
    u64::from_str_radix(address.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_get_names_inlined_ones_a_line_each_and_other_lines_stay() {
        let log = "hv: panic on CPU 0: as asked\nhv: backtrace 0: 0x0000000040200010\nhv: backtrace 1: 0x0000000000000001\n";
        let names = |address| if address == 0x4020_0010 { vec!["b".into(), "a".into()] } else { Vec::new() };
        let want = "hv: panic on CPU 0: as asked\nhv: backtrace 0: 0x0000000040200010 b\nhv: backtrace    inlined into a\nhv: backtrace 1: 0x0000000000000001\n";
        assert_eq!(annotate(log, names), want);
    }

    #[test]
    fn a_recursion_is_told_once() {
        let line = |n: u32, a: u32| format!("hv: backtrace {n}: {a:#018x}\n");
        let log = [line(0, 16), line(1, 16), line(2, 16), line(3, 32)].concat();
        let want = format!("{}hv: backtrace    the same 2 times more\n{}", line(0, 16), line(3, 32));
        assert_eq!(annotate(&log, |_| Vec::new()), want);
    }

    #[test]
    fn a_functions_own_name_is_the_last_that_is_no_closure_and_no_generic() {
        assert_eq!(last("<v::Vm<hv::mm::Metal>>::serve"), "serve");
        assert_eq!(last("<v::page::Frames>::allocate::<20>"), "allocate");
        assert_eq!(last("v::index::set::{closure#0}"), "set");
        assert_eq!(last("hv_enter"), "hv_enter");
    }

    #[test]
    fn a_name_loses_its_hash_and_nothing_else() {
        assert_eq!(plain("hv::boot::run::h0123456789abcdef"), "hv::boot::run");
        assert_eq!(plain("hv::boot::house"), "hv::boot::house");
    }
}
