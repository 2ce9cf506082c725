//! Tests that every file begins with what it is for, and that lines of comments are no wider than rustfmt makes those
//! of code.

use super::{read_files, text};

const FOLDERS: [&str; 6] = ["src", "tests", "examples", "benches", "fuzz", "tools"];

/// The lines of comments that are wider than so many columns and could be broken: what is neither the row of a table
/// nor the target of a link.
fn wide(source: &str, columns: usize) -> Vec<(usize, &str)> {
    let breakable = |line: &str| {
        let comment = line.trim_start().strip_prefix("//")?.trim_start_matches(['/', '!']).trim_start();
        Some(!(comment.starts_with('|') || comment.starts_with('[') && comment.contains("]: ")))
    };
    let numbered = source.lines().enumerate();
    let wide = numbered.filter(|(_, line)| line.chars().count() > columns && breakable(line) == Some(true));
    wide.map(|(number, line)| (number + 1, line)).collect()
}

#[test]
fn comments_keep_the_width_of_code() {
    let format = text("rustfmt.toml");
    let width = format.lines().find_map(|line| line.strip_prefix("max_width = ")).expect("rustfmt.toml sets a width");
    let width = width.trim().parse().expect("a number of columns");
    let mut found = Vec::new();
    for folder in FOLDERS {
        for (path, source) in read_files(folder, ".rs") {
            found.extend(wide(&source, width).iter().map(|(line, text)| format!("{folder}/{path}:{line}: {text}")));
        }
    }
    assert!(found.is_empty(), "comments of more than {width} columns:\n{}", found.join("\n"));
}

#[test]
fn files_begin_with_what_they_are_for() {
    let files =
        FOLDERS.into_iter().flat_map(|folder| read_files(folder, ".rs").into_iter().map(move |file| (folder, file)));
    let silent = files.filter(|(_, (_, source))| !source.starts_with("//! "));
    let silent: Vec<String> = silent.map(|(folder, (path, _))| format!("{folder}/{path}")).collect();
    assert!(silent.is_empty(), "these files do not say what they are for: {silent:?}");
}

#[test]
fn tables_and_targets_of_links_may_be_wide() {
    let source =
        "/// a long one\n//! | a | table |\n/// [a link]: of some length\nlet code = \"as long as it is\";\n// x";
    assert_eq!(wide(source, 8), [(1, "/// a long one")]);
}
