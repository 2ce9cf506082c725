//! Tests that no file imports in a circle with a file of another folder: what two files need goes to a third, below
//! both; and that a module imports only those below it in docs/architecture.md.
//!
//! Reads the `use` lines and the paths of the sources. A name that a `mod.rs` hands on counts for the file that it
//! comes from.

use std::collections::{HashMap, VecDeque};

use super::{read_files, text};

/// The path of a module, or of what is in one, from the crate on.
type Segments = Vec<String>;

/// What a file says.
#[derive(Default)]
struct File {
    /// Its path, and that of its folder.
    path: String,
    folder: String,
    imports: Vec<Segments>,
    /// What it hands on: by name, where it comes from.
    exports: HashMap<String, Segments>,
}

/// The words and signs of a source, without comments and texts.
fn tokens(source: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = source;
    while let Some(next) = rest.chars().next() {
        let skip = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("'\"'") {
            3
        } else if next == '"' {
            let mut escaped = false;
            let end = rest[1..].find(|c| {
                let end = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                end
            });
            end.map_or(rest.len(), |end| end + 2)
        } else {
            let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            let len = if rest.starts_with("::") { 2 } else { word.max(next.len_utf8()) };
            if !next.is_whitespace() {
                tokens.push(rest[..len].to_owned());
            }
            len
        };
        rest = &rest[skip..];
    }
    tokens
}

/// The paths of a `use`, each with the name that it gets. `place` is behind the word; afterwards it is behind the tree.
fn tree(tokens: &[String], place: &mut usize, before: &[String], found: &mut Vec<(Segments, String)>) {
    let mut path = before.to_vec();
    let mut name = None;
    while let Some(token) = tokens.get(*place) {
        *place += 1;
        match token.as_str() {
            "::" => {}
            "{" => {
                while tokens.get(*place).is_some_and(|token| token != "}") {
                    tree(tokens, place, &path, found);
                    if tokens.get(*place).is_some_and(|token| token == ",") {
                        *place += 1;
                    }
                }
                *place += 1;
                return;
            }
            "as" => {
                name = tokens.get(*place).cloned();
                *place += 1;
            }
            "," | "}" | ";" => {
                *place -= 1;
                break;
            }
            word => path.push(word.to_owned()),
        }
    }
    if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
        path.pop();
    }
    let name = name.or_else(|| path.last().cloned()).unwrap_or_default();
    found.push((path, name));
}

/// Reads a file.
fn read(path: &str, source: &str) -> File {
    let (source, _) = source.split_once("#[cfg(test)]\nmod tests {").unwrap_or((source, ""));
    let tokens = tokens(source);
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned();
    let mut file = File { path: path.to_owned(), folder, ..File::default() };
    let (mut place, mut depth) = (0, 0);
    let before = |place: usize, back: usize| place.checked_sub(back).map(|place| tokens[place].as_str());
    while place < tokens.len() {
        match tokens[place].as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            "use" if tokens.get(place + 1).is_some_and(|next| next != "<") => {
                let public = matches!(before(place, 1), Some("pub" | ")"));
                let mut found = Vec::new();
                place += 1;
                tree(&tokens, &mut place, &[], &mut found);
                match public {
                    true if depth == 0 => file.exports.extend(found.into_iter().map(|(path, name)| (name, path))),
                    true => {}
                    false => file.imports.extend(found.into_iter().map(|(path, _)| path)),
                }
                continue;
            }
            "crate" | "super" | "self" if !matches!(before(place, 1), Some("::" | "$" | "in")) => {
                let mut path = vec![tokens[place].clone()];
                while tokens.get(place + 1).is_some_and(|token| token == "::") && place + 2 < tokens.len() {
                    path.push(tokens[place + 2].clone());
                    place += 2;
                }
                if path.len() > 1 {
                    file.imports.push(path);
                }
            }
            _ => {}
        }
        place += 1;
    }
    file
}

/// All files, by the paths of their modules.
struct Files(HashMap<Segments, File>);

impl Files {
    fn new(sources: &[(String, String)]) -> Self {
        let module = |path: &str| {
            let mut names: Segments = path.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
            if names.last().is_some_and(|last| last == "mod" || last == "lib") {
                names.pop();
            }
            names
        };
        Self(sources.iter().map(|(path, source)| (module(path), read(path, source))).collect())
    }

    /// A path from the crate on, as the module `at` writes it. `None` for one of another crate.
    fn absolute(&self, at: &Segments, path: &[String]) -> Option<Segments> {
        let (first, rest) = path.split_first()?;
        Some(match first.as_str() {
            "crate" => rest.to_vec(),
            "self" => [at.as_slice(), rest].concat(),
            "super" => {
                let up = path.iter().take_while(|name| *name == "super").count();
                [&at[..at.len().checked_sub(up)?], &path[up..]].concat()
            }
            _ => {
                let child = [at.as_slice(), path].concat();
                self.0.contains_key(&child[..at.len() + 1]).then_some(child)?
            }
        })
    }

    /// The module that something comes from; `None` for a module itself.
    fn origin(&self, path: &Segments, hops: usize) -> Option<Segments> {
        // What has the name of a module as well is handed on beside that.
        let handed_on = |depth: usize| {
            let name = path.get(depth).filter(|_| depth + 1 == path.len());
            name.is_some_and(|name| self.0[&path[..depth]].exports.contains_key(name))
        };
        let known = (0..=path.len()).take_while(|depth| self.0.contains_key(&path[..*depth]));
        let depth = known.clone().find(|depth| handed_on(*depth)).or_else(|| known.last())?;
        let (module, rest) = path.split_at(depth);
        let (module, name) = (module.to_vec(), rest.first()?);
        match self.0[&module].exports.get(name) {
            Some(from) if hops > 0 => {
                let from = self.absolute(&module, from)?;
                self.origin(&[from.as_slice(), &rest[1..]].concat(), hops - 1)
            }
            _ => Some(module),
        }
    }

    /// The modules that what a module imports comes from.
    fn imported(&self, module: &Segments) -> Vec<Segments> {
        let paths = self.0[module].imports.iter().filter_map(|path| self.absolute(module, path));
        paths.filter_map(|path| self.origin(&path, 8)).collect()
    }

    /// What imports a module of a row below its own, of modules in rows from the ground up. Tests may, and every module
    /// returns an `Error`.
    fn upward(&self, rows: &HashMap<String, usize>) -> Vec<String> {
        let row = |module: &Segments| rows.get(module.first()?).copied();
        let mut found = Vec::new();
        for (module, file) in self.0.iter().filter(|(_, file)| !file.path.contains("tests")) {
            let upward = |to: &Segments| {
                to.first().is_some_and(|first| first != "error")
                    && row(module).zip(row(to)).is_some_and(|(from, to)| to > from)
            };
            found.extend(
                self.imported(module)
                    .iter()
                    .filter(|to| upward(to))
                    .map(|to| format!("{} imports {}", file.path, to.join("::"))),
            );
        }
        found.sort();
        found
    }

    /// The circles in which a file imports one of another folder.
    fn circles(&self) -> Vec<String> {
        // The root hands on names only.
        let mut modules: Vec<&Segments> = self.0.keys().filter(|module| !module.is_empty()).collect();
        modules.sort();
        let place: HashMap<&Segments, usize> =
            modules.iter().enumerate().map(|(place, module)| (*module, place)).collect();
        let imported = |module: &&Segments| {
            let mut places: Vec<usize> =
                self.imported(module).iter().filter_map(|origin| place.get(origin).copied()).collect();
            places.sort_unstable();
            places.dedup();
            places
        };
        let edges: Vec<Vec<usize>> = modules.iter().map(imported).collect();
        let file = |place: usize| &self.0[modules[place]];
        let mut found = Vec::new();
        for (from, to) in edges.iter().enumerate().flat_map(|(from, to)| to.iter().map(move |to| (from, *to))) {
            if file(from).folder == file(to).folder {
                continue;
            }
            if let Some(back) = way(&edges, to, from) {
                let paths: Vec<&str> = [from].iter().chain(&back).map(|place| file(*place).path.as_str()).collect();
                found.push(paths.join(" -> "));
            }
        }
        found
    }
}

/// The shortest way from one to another.
fn way(edges: &[Vec<usize>], from: usize, to: usize) -> Option<Vec<usize>> {
    let mut before = vec![None; edges.len()];
    let mut open = VecDeque::from([from]);
    while let Some(place) = open.pop_front() {
        if place == to {
            let mut way = vec![to];
            while let Some(last) = way.last().copied().filter(|last| *last != from) {
                way.push(before[last]?);
            }
            way.reverse();
            return Some(way);
        }
        for next in &edges[place] {
            if *next != from && before[*next].is_none() {
                before[*next] = Some(place);
                open.push_back(*next);
            }
        }
    }
    None
}

#[test]
fn no_file_imports_in_a_circle_with_one_of_another_folder() {
    let files = Files::new(&read_files("src", ".rs"));
    assert!(files.0.len() > 400, "the sources are read");
    let circles = files.circles();
    assert!(circles.is_empty(), "what both need goes to a file below both:\n{}", circles.join("\n"));
}

/// The modules of the table in `docs/architecture.md`, with the number of their row.
fn rows(architecture: &str) -> HashMap<String, usize> {
    let rows = architecture.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    let modules = |(row, cell): (usize, &str)| {
        let names = cell.split(", ").map(|name| name.trim_matches('`'));
        let names = names.map(|name| name.trim_end_matches('/').trim_end_matches(".rs"));
        names.map(|name| (name.to_owned(), row)).collect::<Vec<_>>()
    };
    rows.enumerate().flat_map(modules).collect()
}

#[test]
fn modules_import_modules_below_them() {
    let files = Files::new(&read_files("src", ".rs"));
    let rows = rows(&text("docs/architecture.md"));
    for module in files.0.keys().filter(|module| module.len() == 1 && module[0] != "sources") {
        assert!(rows.contains_key(&module[0]), "docs/architecture.md does not name `{}`", module[0]);
    }
    let upward = files.upward(&rows);
    assert!(upward.is_empty(), "docs/architecture.md has these in another order:\n{}", upward.join("\n"));
}

#[test]
fn circles_are_found_through_what_is_handed_on() {
    let circles = |sources: &[(&str, &str)]| {
        let all = sources.iter().chain(&[("lib.rs", "")]);
        let sources: Vec<_> = all.map(|(path, source)| ((*path).to_owned(), (*source).to_owned())).collect();
        Files::new(&sources).circles()
    };
    let a = ("a/mod.rs", "mod low;\npub use self::low::{Low, other as Other};\n// use crate::b::Far;\n");
    let low = ("a/low.rs", "use std::fmt;\nfn f() { crate::b::far(\"use crate::x;\") }\n");
    let b = ("b/mod.rs", "pub(crate) use far::far;\n");
    assert_eq!(circles(&[a, low, b, ("b/far.rs", "use crate::a::{Low};")]).len(), 2);
    assert_eq!(circles(&[a, low, b, ("b/far.rs", "use super::super::a::{self, Other};")]).len(), 2);
    assert!(circles(&[a, low, b, ("b/far.rs", "#[cfg(test)]\nmod tests {\n use crate::a::Low;\n}")]).is_empty());
    assert!(circles(&[a, low, b, ("b/far.rs", "use crate::b::far; use std::a::Low;")]).is_empty());
    // Within a folder they may.
    assert!(circles(&[("a/x.rs", "use super::y::Y;"), ("a/y.rs", "use super::x::X;"), ("a/mod.rs", "")]).is_empty());
}
