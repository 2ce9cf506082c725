//! Data that does not fit into memory.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::process::Command;

use crate::program::{command, numbers, outcome, prepared};

/// A file of more bytes than the program may have of memory: it holds places of documents, and reads them when they are
/// needed.
#[test]
fn a_file_larger_than_memory_is_trained_on() {
    const MOST: usize = 80 << 20;
    let directory = prepared();
    let file = directory.write("large.jsonl", b"");
    // Fields that nobody reads make long lines of few tokens.
    let note = "x".repeat(128 << 10);
    let lines = MOST / note.len() * 3 / 2;
    let mut large = BufWriter::new(File::create(&file).unwrap());
    for number in 0..lines {
        writeln!(large, r#"{{"note": "{note}", "text": "number {number}"}}"#).unwrap();
    }
    large.into_inner().unwrap();
    assert!(file.metadata().unwrap().len() > MOST as u64);
    let flags =
        ["--data", "in:large.jsonl", "--seq", "64", "--batch", "4", "--steps", "3", "--json", "in:outcome.json"];
    let program = command(&directory, &flags);
    let script = format!("ulimit -d {} && exec \"$0\" \"$@\"", MOST >> 10);
    let mut limited = Command::new("sh");
    let output = limited.args(["-c", &script]).arg(program.get_program()).args(program.get_args()).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains(&format!("{lines} documents")), "{told}");
    assert_eq!(numbers(&outcome(&directory), "losses").len(), 3);
}
