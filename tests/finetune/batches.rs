//! How large its batch is: what fits, what is measured, what grows.

use std::process::Command;

use crate::program::{command, numbers, outcome, prepared, same, trained};

/// Accumulation and replicas see the same noise, and a batch that has grown goes on where the run was saved.
#[test]
fn noise_is_measured_and_the_batch_grows() {
    let directory = prepared();
    let noise = |more: &[&str]| {
        let outcome = trained(&directory, &[&["--batch", "4", "--steps", "6", "--noise-scale"], more].concat());
        assert_eq!(outcome["rows"], 4);
        outcome["noise_scale_rows"].as_f64()
    };
    let two = noise(&["--dp", "2"]).unwrap();
    let accumulated = noise(&["--micro-batch", "2"]).unwrap();
    assert!(two > 0.0 && (accumulated / two - 1.0).abs() < 0.05, "{accumulated}, {two}");
    assert_eq!(noise(&[]), None, "one micro-batch on one replica");
    // A batch of tokens is measured too.
    let tokens = trained(&directory, &["--batch-tokens", "300", "--steps", "3", "--noise-scale", "--dp", "2"]);
    assert!(tokens["noise_scale_rows"].as_f64().is_some() && tokens["rows"].as_u64() > Some(1), "{tokens}");

    // Of what is random there is little to learn, and rows differ.
    let mut state = 7u64;
    let mut letter = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        b"abcdefghijklmnopqrstuvwxyz \n"[(state >> 33) as usize % 28]
    };
    directory.write("random.txt", &(0..3000).map(|_| letter()).collect::<Vec<_>>());
    let rows = ["--data", "in:random.txt", "--seq", "16", "--batch", "2", "--grow-batch", "4", "--micro-batch", "1"];
    let grows = [&rows[..], &["--steps", "14", "--scheduler", "constant"]].concat();
    let whole = trained(&directory, &grows);
    assert_eq!(whole["rows"], 4, "{whole}");
    let half: Vec<&str> = grows.iter().map(|flag| if *flag == "14" { "12" } else { flag }).collect();
    trained(&directory, &[&half[..], &["--save", "in:half"]].concat());
    let again = trained(&directory, &[&grows[..], &["--resume", "in:half", "--dp", "2"]].concat());
    assert_eq!(again["rows"], 4);
    same(&numbers(&whole, "losses"), &numbers(&again, "losses"), 1e-4, &"resumed");
}

/// In children with a limit on their memory: less memory, fewer rows.
#[cfg(target_os = "linux")]
#[test]
fn the_batch_that_fits_is_found() {
    let directory = prepared();
    let rows = |kilobytes: &str| {
        let flags = ["--data", "in:data.jsonl", "--seq", "64", "--batch", "auto", "--dp", "2", "--steps", "1"];
        let program = command(&directory, &[&flags[..], &["--json", "in:outcome.json"]].concat());
        let script = format!("ulimit -d {kilobytes} && exec \"$0\" \"$@\"");
        let mut limited = Command::new("sh");
        let output =
            limited.args(["-c", &script]).arg(program.get_program()).args(program.get_args()).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && told.contains("rows at once fit on a rank"), "{told}");
        outcome(&directory)["rows"].as_u64().unwrap()
    };
    let (little, more) = (rows("60000"), rows("100000"));
    assert!(2 <= little && little < more && more < 256, "{little}, {more}");
}
