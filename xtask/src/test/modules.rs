//! The tree of modules as the sources declare it: what no crate root reaches, and who uses whom.
//!
//! Sources are read as tokens, so that comments and strings say nothing. [`Tree::of`] walks from one crate root
//! through every `mod`; [`unreached`] and [`against_order`] judge what it found. What is for tests only may use
//! whatever it likes. Everything works on a map from file name to text, so the judges are tested on made-up ones.

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

/// Every source by its name, from the project's folder on, with `/` between.
pub(super) type Sources = BTreeMap<String, String>;

/// What the lead of a crate root says before the list of its modules.
const LIST: &str = "only those before it";

/// A module of the top level that another one uses.
#[derive(Debug, PartialEq, Eq)]
struct Use {
    file: String,
    line: usize,
    from: String,
    to: String,
}

/// What one crate root reaches.
#[derive(Debug, Default)]
pub(super) struct Tree {
    root: String,
    files: BTreeSet<String>,
    /// The modules of the top level, tests left out.
    top: BTreeSet<String>,
    uses: Vec<Use>,
    errors: Vec<String>,
}

/// Where a walk is.
#[derive(Clone)]
struct Place {
    file: String,
    /// Where files of modules declared here are looked for.
    dir: String,
    /// The module's path; empty for the root.
    path: Vec<String>,
    test: bool,
}

impl Tree {
    /// Walks from `root`.
    pub(super) fn of(sources: &Sources, root: &str) -> Self {
        let mut tree = Self { root: root.to_owned(), ..Self::default() };
        let place = Place { file: root.to_owned(), dir: folder(root), path: Vec::new(), test: false };
        tree.open(sources, &place);
        tree
    }

    fn open(&mut self, sources: &Sources, place: &Place) {
        self.files.insert(place.file.clone());
        match TokenStream::from_str(sources.get(&place.file).map_or("", String::as_str)) {
            Ok(tokens) => self.scan(sources, tokens, place),
            Err(why) => self.errors.push(format!("{}: {why}", place.file)),
        }
    }

    fn scan(&mut self, sources: &Sources, tokens: TokenStream, place: &Place) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        // What attributes say of the item that comes.
        let (mut test, mut moved) = (false, None);
        while let Some(token) = tokens.get(at) {
            let rest = tokens.get(at..).unwrap_or_default();
            match token {
                TokenTree::Punct(mark) if mark.as_char() == '#' => {
                    if let [_, TokenTree::Group(attribute), ..] = rest {
                        let text = attribute.stream().to_string().replace(' ', "");
                        test |= text.starts_with("cfg(test") || text.starts_with("cfg(all(test");
                        if let Some(file) = text.strip_prefix("path=") {
                            moved = Some(file.trim_matches('"').to_owned());
                        }
                        at += 1;
                    }
                }
                TokenTree::Punct(mark) if mark.as_char() == ';' => (test, moved) = (false, None),
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
                TokenTree::Group(group) => {
                    self.scan(sources, group.stream(), &Place { test: place.test || test, ..place.clone() });
                    if group.delimiter() == Delimiter::Brace {
                        (test, moved) = (false, None);
                    }
                }
                TokenTree::Ident(word) if word == "mod" => {
                    if let [_, TokenTree::Ident(name), body, ..] = rest {
                        let mut path = place.path.clone();
                        path.push(name.to_string());
                        let test = place.test || std::mem::take(&mut test);
                        if path.len() == 1 && !test {
                            self.top.insert(name.to_string());
                        }
                        self.module(sources, place, path, test, body, moved.take());
                        at += 2;
                    }
                }
                TokenTree::Ident(word) if word.to_string().starts_with("include") => {
                    if let [_, TokenTree::Punct(_), TokenTree::Group(file), ..] = rest {
                        let file = file.stream().to_string();
                        self.files.insert(join(&folder(&place.file), file.trim_matches('"')));
                    }
                }
                TokenTree::Ident(_) if !place.test && !test => self.path(rest, place),
                TokenTree::Ident(_) => {}
            }
            at += 1;
        }
    }

    /// A module declared at `place`: its own block, or a file.
    fn module(
        &mut self,
        sources: &Sources,
        place: &Place,
        path: Vec<String>,
        test: bool,
        body: &TokenTree,
        moved: Option<String>,
    ) {
        let name = path.last().cloned().unwrap_or_default();
        let inner = join(&place.dir, &name);
        match body {
            TokenTree::Group(block) => {
                let place = Place { file: place.file.clone(), dir: inner, path, test };
                self.scan(sources, block.stream(), &place);
            }
            TokenTree::Punct(_) | TokenTree::Ident(_) | TokenTree::Literal(_) => {
                let candidates = match moved {
                    Some(file) => vec![(join(&folder(&place.file), &file), inner)],
                    None => vec![(format!("{inner}.rs"), inner.clone()), (format!("{inner}/mod.rs"), inner)],
                };
                match candidates.into_iter().find(|(file, _)| sources.contains_key(file)) {
                    Some((file, dir)) => self.open(sources, &Place { file, dir, path, test }),
                    None => self.errors.push(format!("{}: no file for module {name}", place.file)),
                }
            }
        }
    }

    /// Notes what `crate::...` or `super::...`, if tokens start so, names at the crate's top level.
    fn path(&mut self, tokens: &[TokenTree], place: &Place) {
        let Some(from) = place.path.first() else { return };
        let mut rest = tokens;
        let mut up = 0;
        let separated = |rest: &[TokenTree]| matches!(rest, [_, TokenTree::Punct(a), TokenTree::Punct(b), ..] if a.as_char() == ':' && b.as_char() == ':');
        match rest.first() {
            Some(TokenTree::Ident(word)) if word == "crate" && separated(rest) => {
                rest = rest.get(3..).unwrap_or_default();
            }
            Some(TokenTree::Ident(word)) if word == "super" => {
                while let Some(TokenTree::Ident(word)) = rest.first() {
                    if word != "super" || !separated(rest) {
                        break;
                    }
                    up += 1;
                    rest = rest.get(3..).unwrap_or_default();
                }
                if up != place.path.len() {
                    return;
                }
            }
            _ => return,
        }
        let names: Vec<TokenTree> = match rest.first() {
            Some(TokenTree::Group(group)) => {
                let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
                tokens
                    .split(|t| matches!(t, TokenTree::Punct(mark) if mark.as_char() == ','))
                    .filter_map(|part| part.first().cloned())
                    .collect()
            }
            first => first.cloned().into_iter().collect(),
        };
        for name in names {
            if let TokenTree::Ident(to) = name {
                let line = to.span().start().line;
                let (from, to) = (from.clone(), to.to_string());
                self.uses.push(Use { file: place.file.clone(), line, from, to });
            }
        }
    }
}

/// The folder that a file lies in.
fn folder(file: &str) -> String {
    file.rsplit_once('/').map_or_else(String::new, |(folder, _)| folder.to_owned())
}

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

/// True for a file that cargo starts from.
pub(super) fn is_root(file: &str) -> bool {
    let (folder, name) = file.rsplit_once('/').unwrap_or(("", file));
    let ends = |with: &str| folder.rsplit('/').next() == Some(with);
    name == "build.rs"
        || ends("src") && (name == "lib.rs" || name == "main.rs")
        || folder.ends_with("src/bin")
        || ends("tests") && !folder.contains("/src/")
}

/// Files that no root reaches, and modules that have none.
pub(super) fn unreached(sources: &Sources) -> Vec<String> {
    let trees: Vec<Tree> =
        sources.keys().filter(|f| is_root(f)).map(|root| Tree::of(sources, root)).collect();
    let lost = sources.keys().filter(|file| !trees.iter().any(|tree| tree.files.contains(*file)));
    let lost = lost.map(|file| format!("{file} belongs to no crate: no `mod` and no `include` leads there"));
    lost.chain(trees.iter().flat_map(|tree| tree.errors.clone())).collect()
}

/// The order of modules that a crate root tells: of an item, what stands before the dash; elsewhere
/// every name.
fn order(root: &str, known: &BTreeSet<String>) -> Option<Vec<String>> {
    let lead = root.lines().map_while(|line| line.strip_prefix("//!")).map(str::trim);
    let lead: Vec<&str> = lead.skip_while(|line| !line.contains(LIST)).collect();
    let mut found: Vec<String> = Vec::new();
    for line in &lead {
        let names = if line.starts_with("* ") { line.split(" - ").next().unwrap_or(line) } else { line };
        for name in names.split('`').skip(1).step_by(2).filter(|name| known.contains(*name)) {
            if !found.iter().any(|have| have == name) {
                found.push(name.to_owned());
            }
        }
    }
    (!lead.is_empty()).then_some(found)
}

/// Rule 2 of the layout: every module of a crate's top level that uses one after it, or that the list at the top of
/// the root leaves out.
pub(super) fn against_order(sources: &Sources, root: &str) -> Vec<String> {
    let tree = Tree::of(sources, root);
    let text = sources.get(root).map_or("", String::as_str);
    let Some(order) = order(text, &tree.top) else {
        return vec![format!("{root} does not open with a list of modules, each using {LIST}")];
    };
    let mut found = tree.errors.clone();
    let missing = tree.top.iter().filter(|module| !order.contains(module));
    found.extend(missing.map(|module| format!("{root}: the list at its top leaves out `{module}`")));
    let place = |name: &String| order.iter().position(|n| n == name);
    for Use { file, line, from, to } in &tree.uses {
        if let (Some(own), Some(other)) = (place(from), place(to))
            && other > own
        {
            found.push(format!("{file}:{line}: `{from}` uses `{to}`, which comes after it in {}", tree.root));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(files: &[(&str, &str)]) -> Sources {
        files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    const ROOT: &str = "//! Each module uses only those before it:\n//! * [`low`] - for `high`.\n//! * [`high`] - up.\nmod high;\nmod low;";

    #[test]
    fn a_file_that_nothing_declares_is_found_and_a_declared_or_included_one_is_not() {
        let mut files = sources(&[
            ("a/src/lib.rs", "mod x; mod y { mod z; } #[path = \"odd/name.rs\"] mod w; // mod lost;\n"),
            (
                "a/src/x.rs",
                "core::arch::global_asm!(include_str!(\"x.S\")); mod deep; #[cfg(test)] mod tests;",
            ),
            ("a/src/x.S", ""),
            ("a/src/x/deep.rs", ""),
            ("a/src/x/tests/mod.rs", "mod more;"),
            ("a/src/x/tests/more.rs", ""),
            ("a/src/y/z.rs", ""),
            ("a/src/odd/name.rs", ""),
            ("a/tests/whole.rs", ""),
            ("a/build.rs", ""),
        ]);
        assert_eq!(unreached(&files), Vec::<String>::new());
        files.insert("a/src/lost.rs".into(), String::new());
        files.insert("a/src/x/lost.S".into(), String::new());
        assert_eq!(unreached(&files).len(), 2);
        files.remove("a/src/y/z.rs");
        assert_eq!(unreached(&files).len(), 3);
    }

    #[test]
    fn a_use_of_a_later_module_is_found_however_it_is_written() {
        for way in [
            "use crate::high::Thing;",
            "use crate::{low, high::{self}};",
            "fn f() { crate::high::g(); }",
            "use super::high;",
            "mod inner { fn f() { super::super::high::g() } }",
            "m!(crate::high);",
            "#[cfg(test)] mod tests {} use crate::high;",
            "#[cfg(not(test))] use crate::high;",
        ] {
            let found = against_order(
                &sources(&[("c/src/lib.rs", ROOT), ("c/src/low.rs", way), ("c/src/high.rs", "")]),
                "c/src/lib.rs",
            );
            assert_eq!(found.len(), 1, "{way}: {found:?}");
            assert!(found[0].starts_with("c/src/low.rs:1: `low` uses `high`"), "{found:?}");
        }
    }

    #[test]
    fn tests_comments_strings_and_earlier_modules_are_free() {
        let low = "//! [`crate::high`]\n#[cfg(test)] mod tests { use crate::high; }\nfn f() { \"crate::high\"; crate::low::f() }\nmod inner { use super::high; }\n#[cfg(test)] use crate::high;";
        let files = [("c/src/lib.rs", ROOT), ("c/src/low.rs", low), ("c/src/high.rs", "use crate::low;")];
        assert_eq!(against_order(&sources(&files), "c/src/lib.rs"), Vec::<String>::new());
    }

    #[test]
    fn a_module_that_the_list_leaves_out_is_found_and_so_is_a_missing_list() {
        let root = ROOT.replace("//! * [`low`] - for `high`.\n", "");
        let files = [("c/src/lib.rs", root.as_str()), ("c/src/low.rs", ""), ("c/src/high.rs", "")];
        assert_eq!(against_order(&sources(&files), "c/src/lib.rs").len(), 1);
        let files = [("c/src/lib.rs", "//! Nothing.\nmod low;"), ("c/src/low.rs", "")];
        assert!(against_order(&sources(&files), "c/src/lib.rs")[0].contains("does not open with a list"));
    }
}
