//! Tests of the sources themselves: what files import, what they begin with, how wide comments are, whether types have
//! names of their own, configs are alike and burn's operations in one room, whether the paths that the documentation
//! names exist, and whether the gate runs every unit test.

mod comments;
mod configs;
mod features;
mod imports;
mod names;
mod operations;
mod paths;

use std::fs;
use std::path::{Path, PathBuf};

/// A path of the repository.
fn path(within: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(within)
}

fn text(file: &str) -> String {
    fs::read_to_string(path(file)).unwrap_or_else(|problem| panic!("{file}: {problem}"))
}

/// The files of a folder whose names end so, each with its text, by their paths within the folder. None if there is no
/// such folder: a published crate has not all of the repository.
fn read_files(folder: &str, ends: &str) -> Vec<(String, String)> {
    fn read(folder: &Path, within: &str, ends: &str, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let path = if within.is_empty() { name.clone() } else { format!("{within}/{name}") };
            if entry.file_type().unwrap().is_dir() {
                read(&entry.path(), &path, ends, found);
            } else if name.ends_with(ends) {
                found.push((path, fs::read_to_string(entry.path()).unwrap()));
            }
        }
    }
    let mut found = Vec::new();
    read(&path(folder), "", ends, &mut found);
    found
}
