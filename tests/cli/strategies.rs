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

/// The first number in each cell of the row of this name.
fn row(told: &str, name: &str) -> Vec<f64> {
    let row = told.lines().find_map(|line| line.strip_prefix(&format!("| {name} | ")));
    let cells = row.unwrap_or_else(|| panic!("{name}: {told}")).trim_end_matches('|').split('|');
    cells.map(|cell| cell.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(f64::NAN)).collect()
}

/// Bytes are those that the formulas of docs/strategies.md have, of parameters `P`, on two ranks.
fn what_ranks_hold_and_send(told: &str) {
    const SENT: usize = 5;
    let whole = row(told, "two that do not talk");
    let p = whole[0];
    assert!(p > 0.0 && whole[SENT..SENT + 3] == [0.0, 0.0, 1.0], "{told}");
    for (name, held, sent) in [
        ("two that do not talk", [1.0, 1.0, 2.0], 0.0),
        ("data parallelism", [1.0, 1.0, 2.0], 1.0),
        ("the same, with the norm", [1.0, 1.0, 2.0], 1.0),
        ("the same, with norm and noise", [1.0, 1.0, 2.0], 1.0),
        ("data parallelism, captured", [1.0, 1.0, 2.0], 1.0),
        ("ZeRO 1", [1.0, 0.5, 1.0], 1.0),
        ("ZeRO 2", [1.0, 0.5, 1.0], 1.0),
        ("ZeRO 3, captured", [0.5, 0.5, 1.0], 1.5),
    ] {
        let found = row(told, name);
        assert_eq!(found[..3], held.map(|share| share * p), "{name}: {told}");
        assert!((found[SENT] - sent * p).abs() < 0.02 * p, "{name}: {told}");
    }
    assert_eq!(row(told, "the same, with norm and noise")[SENT] - row(told, "the same, with the norm")[SENT], 32.0);
    for name in ["tensor parallelism, captured", "pipeline, 1F1B, 4 micro-batches, captured"] {
        let found = row(told, name);
        assert!(found[0] < p && found[1] == found[0] && found[2] == 2.0 * found[0] && found[SENT] > 0.0, "{told}");
        assert_eq!(found[8].is_nan(), name.starts_with("tensor"), "a pipeline alone is idle: {told}");
    }
}

/// The same rows for every size, and the gap between the losses.
fn what_curves_end_with(told: &str) {
    for (rows, steps) in [(2, 8.0), (4, 4.0)] {
        let found = row(told, &rows.to_string());
        let [steps_of, _, learned, held_out, gap, noise] = found[..] else { panic!("{told}") };
        assert!(steps_of == steps && (held_out - learned - gap).abs() < 0.0021 && noise > 0.0, "{told}");
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
    what_ranks_hold_and_send(&told);
    what_curves_end_with(&told);
    assert!(told.contains("the critical batch size is ") && told.contains("on the mean of 2 seeds"), "{told}");
    // A line for each seed, and one in the legend, in the colour of each of two sizes.
    let lines = |svg: &str, colour: &str| svg.matches(&format!("stroke=\"{colour}\"")).count();
    for (figure, x, y) in [
        ("loss-by-step", "step", "loss, nats per byte"),
        ("loss-by-token", "token", "loss, nats per byte"),
        ("loss-by-second", "second", "loss, nats per byte"),
        ("noise-scale", "tokens", "noise scale, rows"),
        ("generalisation-gap", "rows of a step", "gap, nats per byte"),
    ] {
        let svg = fs::read_to_string(folder.join(format!("{figure}.svg"))).unwrap();
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{figure}");
        assert!([x, y].iter().all(|axis| svg.lines().any(|line| line == *axis)), "{figure}: {x}, {y}");
        match figure {
            "generalisation-gap" => assert_eq!(svg.matches("<circle").count(), 4),
            _ => assert_eq!(["#005AB5", "#DC3220"].map(|colour| lines(&svg, colour)), [3, 3], "{figure}"),
        }
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
