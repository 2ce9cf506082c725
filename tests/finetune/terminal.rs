//! What a terminal shows of a run.

use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::process::Stdio;

use crate::program::{command, prepared};

/// A terminal of so many columns: what is read from it, and what a program writes to.
fn terminal(columns: u16) -> (File, File) {
    let (mut seen, mut written) = (-1, -1);
    let size = libc::winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let (name, settings) = (std::ptr::null_mut(), std::ptr::null());
    // SAFETY: the call fills both numbers, and reads `size`.
    let code = unsafe { libc::openpty(&mut seen, &mut written, name, settings, &size) };
    assert_eq!(code, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: both were opened by the call above, and belong to nobody else.
    unsafe { (File::from_raw_fd(seen), File::from_raw_fd(written)) }
}

#[test]
fn a_bar_says_how_the_training_goes() {
    let directory = prepared();
    let flags = ["--data", "in:data.jsonl", "--seq", "64", "--batch", "4", "--steps", "3", "--eval", "in:eval.jsonl"];
    let (mut seen, written) = terminal(80);
    let mut program = command(&directory, &flags);
    program.env("TERM", "xterm").stdout(Stdio::null()).stderr(written);
    let mut run = program.spawn().unwrap();
    // The last that could write to the terminal is then the program.
    drop(program);
    let mut shown = Vec::new();
    // It ends with an error when nobody can write any more.
    let _ = seen.read_to_end(&mut shown);
    let shown = String::from_utf8_lossy(&shown);
    assert!(run.wait().unwrap().success(), "{shown}");
    // The last that was drawn: what is behind the end of a line would be missing.
    let last = &shown[shown.rfind("3/3 steps").unwrap_or_else(|| panic!("{shown}"))..];
    let mut rest = last;
    let memory: &[&str] = if cfg!(target_os = "linux") { &[" MiB"] } else { &[] };
    let words = [" left", "loss ", ", held-out ", ", lr ", ", norm ", " tokens/s, ", " GFLOP/s, ", " % busy"];
    for word in words.iter().chain(memory) {
        rest = rest.split_once(word).unwrap_or_else(|| panic!("{word}: {last:?}")).1;
    }
}
