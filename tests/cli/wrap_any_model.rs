//! The example `wrap_any_model`: every wrapped model loses what it loses on one device, and learns.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The example beside this test. A plain `cargo test` builds it; with `--test cli` alone, build it first.
fn example() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("examples").join("wrap_any_model")
}

#[test]
fn wrapped_models_lose_what_one_device_loses() {
    let example = example();
    let output = Command::new(&example)
        .output()
        .unwrap_or_else(|why| panic!("{}: {why}; `cargo build --example wrap_any_model` makes it", example.display()));
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{stderr}");

    // The rows of all tables: step, one device, ranks.
    let rows: Vec<[f64; 3]> = stdout
        .lines()
        .filter_map(|line| {
            line.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>().ok()?.try_into().ok()
        })
        .collect();
    assert_eq!(rows.len(), 3 * 2 * 12, "{stdout}");
    for [step, alone, together] in &rows {
        assert!((alone - together).abs() <= 1e-3 * alone, "step {step}: {alone} {together}\n{stdout}");
    }
    for run in rows.chunks(12) {
        assert!(run[11][1] < 0.9 * run[0][1], "nothing was learned: {stdout}");
    }

    // Most of each model is split.
    let parts: Vec<(f64, f64, f64)> = stdout
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split(": ").nth(1)?.split(' ').collect();
            Some((words.first()?.parse().ok()?, words.get(2)?.parse().ok()?, words.get(9)?.parse().ok()?))
        })
        .collect();
    assert_eq!(parts.len(), 6, "{stdout}");
    for (part, whole, ranks) in parts {
        assert!(part < 1.3 * whole / ranks, "{part} of {whole} on each of {ranks}");
    }
}
