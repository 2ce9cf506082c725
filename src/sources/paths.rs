//! Tests that the files and folders that documentation and comments name exist.

use std::collections::HashSet;

use super::{path, read_files, text};

/// Folders whose paths are written from the root of the repository on.
const ROOTS: [&str; 7] = ["src/", "tests/", "examples/", "benches/", "docs/", "scripts/", "tools/"];

/// What stands between single backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.contains("```")).flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// The paths from the root on among what is quoted, without what stands for several (`{a,b}`, `*`).
fn from_root(text: &str) -> impl Iterator<Item = &str> {
    let plain = |word: &&str| word.chars().all(|c| c.is_alphanumeric() || "/._-".contains(c));
    quoted(text).filter(plain).filter(|word| ROOTS.iter().any(|root| word.starts_with(root)))
}

/// The targets of Markdown's links that are files of the repository, without the part of the page.
fn targets(text: &str) -> impl Iterator<Item = &str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    targets.filter(|target| !target.is_empty() && !target.contains("://") && !target.contains([' ', '\n', '`']))
}

/// Pages, with the folder that they are in.
fn pages() -> Vec<(&'static str, String, String)> {
    let root = ["README.md", "CONTRIBUTING.md"].map(|page| ("", page.to_owned(), text(page)));
    let docs = read_files("docs", ".md").into_iter().map(|(page, text)| ("docs/", page, text));
    root.into_iter().chain(docs).collect()
}

#[test]
fn paths_exist() {
    let mut missing = Vec::new();
    for (folder, page, text) in pages() {
        let named = from_root(&text).map(str::to_owned).chain(targets(&text).map(|target| format!("{folder}{target}")));
        missing.extend(named.filter(|name| !path(name).exists()).map(|name| format!("{folder}{page}: {name}")));
    }
    for folder in ["src", "tests", "examples", "benches"] {
        for (file, source) in read_files(folder, ".rs") {
            let comments: Vec<&str> = source.lines().filter(|line| line.trim_start().starts_with("//")).collect();
            let comments = comments.join("\n");
            let named = from_root(&comments).filter(|name| !path(name).exists());
            missing.extend(named.map(|name| format!("{folder}/{file}: {name}")));
        }
    }
    assert!(missing.is_empty(), "there are no such files:\n{}", missing.join("\n"));
}

#[test]
fn the_architecture_names_files_that_exist() {
    // There, paths begin where the room of the row or of the step is clear.
    let mut known = HashSet::new();
    for (file, _) in read_files("src", ".rs") {
        let parts: Vec<&str> = file.split('/').collect();
        for end in 1..=parts.len() {
            for begin in 0..end {
                let part = parts[begin..end].join("/");
                known.insert(if end < parts.len() { format!("{part}/") } else { part });
            }
        }
    }
    let page = text("docs/architecture.md");
    let within = quoted(&page).filter(|word| word.ends_with('/') || word.ends_with(".rs"));
    let within = within.filter(|word| !ROOTS.iter().any(|root| word.starts_with(root)));
    let missing: Vec<&str> = within.filter(|word| !known.contains(*word)).collect();
    assert!(missing.is_empty(), "docs/architecture.md names what is not in src/: {missing:?}");
}

#[test]
fn paths_and_targets_are_found() {
    let page = "See `src/comm/mod.rs`, `tests/{a,b}`, [docs](docs/gpu.md#here), [b](https://burn.dev), `other/x`.";
    assert_eq!(from_root(page).collect::<Vec<_>>(), ["src/comm/mod.rs"]);
    assert_eq!(targets(page).collect::<Vec<_>>(), ["docs/gpu.md"]);
}
