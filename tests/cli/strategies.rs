//! The example `strategies`, as quickly as it goes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn example() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("examples").join("strategies")
}

#[test]
fn what_makes_no_sense_is_one_line() {
    for (flags, what) in [
        (["--seeds", "0"], "--seeds"),
        (["--colour", "red"], "--colour"),
        (["--text", "/nowhere/at/all.txt"], "cannot read the text"),
        (["--out", "/dev/null/here"], "--out /dev/null/here"),
        (["--only", "curve"], "possible values: strategies, curves, critical"),
    ] {
        let output = Command::new(example()).arg("--quick").args(flags).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{flags:?}: {stderr}");
        assert!(stderr.starts_with("strategies: ") && stderr.contains(what), "{flags:?}: {stderr}");
    }
}

#[test]
fn a_quick_run_writes_tables_and_figures() {
    let example = example();
    let folder = std::env::temp_dir().join(format!("strategies-{}", std::process::id()));
    let output = Command::new(&example)
        .args(["--quick", "--seeds", "2", "--out", folder.to_str().unwrap()])
        .output()
        .unwrap_or_else(|why| panic!("{}: {why}; `cargo build --example strategies` makes it", example.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told = String::from_utf8(output.stdout).unwrap();
    for words in [
        "| data parallelism, captured |",
        "| ZeRO 3, captured |",
        "| tensor parallelism, captured |",
        "critical batch size",
    ] {
        assert!(told.contains(words), "{words}: {told}");
    }
    for figure in ["loss-by-step", "loss-by-token", "loss-by-second", "noise-scale", "generalisation-gap"] {
        let svg = fs::read_to_string(folder.join(format!("{figure}.svg"))).unwrap();
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{figure}");
    }
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_part_alone_is_measured() {
    let folder = std::env::temp_dir().join(format!("strategies-part-{}", std::process::id()));
    let flags = ["--quick", "--seeds", "2", "--only", "critical", "--out", folder.to_str().unwrap()];
    let output = Command::new(example()).args(flags).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<&str> = told.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 5, "a head, two seeds and their mean: {told}");
    assert!(rows[0].ends_with("| 4 rows | 8 rows | 16 rows | 32 rows |") && rows[4].starts_with("| mean |"), "{told}");
    assert!(told.contains("on the mean of 2 seeds") && !told.contains("pipeline"), "{told}");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "no figure is drawn");
    fs::remove_dir_all(folder).unwrap();
}
