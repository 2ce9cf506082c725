//! The example `strategies`, as quickly as it goes.

use std::fs;
use std::path::Path;
use std::process::Command;

#[test]
fn a_quick_run_writes_tables_and_figures() {
    let test = std::env::current_exe().unwrap();
    let example = test.parent().and_then(Path::parent).unwrap().join("examples").join("strategies");
    let folder = std::env::temp_dir().join(format!("strategies-{}", std::process::id()));
    let output = Command::new(&example)
        .args(["--quick", "--seeds", "2", "--out", folder.to_str().unwrap()])
        .output()
        .unwrap_or_else(|why| panic!("{}: {why}; `cargo build --example strategies` makes it", example.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told = String::from_utf8(output.stdout).unwrap();
    for words in ["| tensor parallelism |", "| ZeRO 3 |", "critical batch size"] {
        assert!(told.contains(words), "{words}: {told}");
    }
    for figure in ["loss-by-step", "loss-by-token", "loss-by-second", "noise-scale", "generalisation-gap"] {
        let svg = fs::read_to_string(folder.join(format!("{figure}.svg"))).unwrap();
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{figure}");
    }
    fs::remove_dir_all(folder).unwrap();
}
