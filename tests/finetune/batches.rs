//! How large its batch is: what fits, what is measured, what grows.

use std::process::Command;

use crate::program::{command, finetune, numbers, outcome, prepared, same, trained};

/// A run that measures noise, as `trained` makes it.
const NOISY: [&str; 11] =
    ["--data", "in:data.jsonl", "--seq", "64", "--lr", "1e-3", "--batch", "4", "--steps", "6", "--noise-scale"];

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
    let told = finetune(&directory, &[&NOISY[..], &["--dp", "2"]].concat());
    let helps = match two / 4.0 {
        ratio if ratio > 4.0 => "a larger batch would take fewer steps",
        ratio if ratio < 0.25 => "a smaller batch would take less data for the same loss",
        _ => "the batch suits it",
    };
    let (told, words) = (String::from_utf8_lossy(&told.stdout), format!("{two:.0} rows; with 4 rows a step: {helps}"));
    assert!(told.contains(&words), "{words}: {told}");
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

#[test]
fn the_summary_says_what_batch_was_used_and_what_would_help() {
    let directory = prepared();
    let said = |flags: &[&str]| {
        let usual = ["--data", "in:data.jsonl", "--seq", "64", "--steps", "2"];
        let output = finetune(&directory, &[&usual[..], flags].concat());
        assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for (flags, words) in [
        (
            &["--batch", "5", "--dp", "2", "--micro-batch", "2"][..],
            &["5 rows = 2 replicas x 2 micro-batches of at most 2 rows", "--noise-scale says whether a larger batch"][..],
        ),
        (
            &["--batch", "8", "--pp", "2", "--micro-batch", "2"],
            &["8 rows = 1 replica x 1 run x 4 micro-batches of at most 2 rows"],
        ),
        (&["--batch-tokens", "200", "--dp", "2"], &["2 replicas, at most 1 row at once"]),
        (&["--batch", "4", "--noise-scale"], &["take two smaller micro-batches"]),
        (&["--batch", "4", "--noise-scale", "--pp", "2"], &["with `pp` take two replicas (`dp`)"]),
        (&["--batch", "4", "--noise-scale", "--dp", "2"], &["4 rows = 2 replicas x 1 micro-batch of at most 2 rows"]),
        (
            &["--batch", "4", "--eval", "in:eval.jsonl", "--generate", "why?", "--generate-tokens", "2"],
            &["The model writes:", "loss, last steps", "loss, held-out data", "held by the first rank", " tokens/s"],
        ),
    ] {
        let said = said(flags);
        words.iter().for_each(|words| assert!(said.contains(words), "{flags:?}: {words}: {said}"));
    }
}

/// What a file says of replicas is not read where there is one, and that is told.
#[test]
fn keys_that_one_replica_does_not_read_are_named() {
    let directory = prepared();
    directory.write("one.toml", b"engine = 'captured'\n[data]\nbucket_bytes = 1000\noverlap = false\n");
    let flags = ["--data", "in:data.jsonl", "--seq", "64", "--batch", "4", "--steps", "1", "--strategy", "in:one.toml"];
    let told = |more: &[&str]| {
        let output = finetune(&directory, &[&flags[..], more].concat());
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{told}");
        told.matches("nothing reads `data.bucket_bytes`, `data.overlap`: there is one replica").count()
    };
    assert_eq!((told(&[]), told(&["--ranks", "2"])), (1, 0));
}

/// In children with a limit on their memory: less memory, fewer rows.
#[cfg(target_os = "linux")]
#[test]
fn the_batch_that_fits_is_found() {
    let directory = prepared();
    // More than any trial takes.
    directory.write("large.txt", "what fits is found out by trying\n".repeat(4000).as_bytes());
    let limited = |kilobytes: &str, dp: &str, more: &[&str]| {
        let flags = ["--data", "in:large.txt", "--seq", "64", "--batch", "auto", "--dp", dp, "--steps", "1"];
        let program = command(&directory, &[&flags[..], &["--json", "in:outcome.json"], more].concat());
        let script = format!("ulimit -d {kilobytes} && exec \"$0\" \"$@\"");
        let mut limited = Command::new("sh");
        limited.args(["-c", &script]).arg(program.get_program()).args(program.get_args()).output().unwrap()
    };
    let rows = |kilobytes: &str| {
        let output = limited(kilobytes, "2", &[]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && told.contains("rows at once fit on a rank"), "{told}");
        // It takes a while: each trial is told, and what came of it.
        let count = |words: &str| told.lines().filter(|line| line.contains(words)).count();
        let most = "--batch auto: at most 128 rows at once are looked for (8192 tokens on a replica)";
        assert!(count("--batch auto: tries ") >= 1 && count(most) == 1, "{told}");
        assert!(count(" rows do not fit: ") < count("--batch auto: tries "), "{told}");
        outcome(&directory)["rows"].as_u64().unwrap()
    };
    let (little, more) = (rows("64000"), rows("100000"));
    assert!(2 <= little && little < more && more < 256, "{little}, {more}");
    // So many models that none is made, also where it is not known what a step needs.
    for more in [&[][..], &["--recompute"]] {
        let output = limited("60000", "1000", more);
        let told = String::from_utf8_lossy(&output.stderr);
        let last = told.lines().last().unwrap();
        assert!(output.status.code() == Some(2) && !told.contains("tries"), "{told}");
        let what =
            ["finetune: --batch auto: not even one row fits into the ", " bytes of RLIMIT_DATA: give shorter rows"];
        assert!(last.starts_with(what[0]) && last.contains(what[1]), "{told}");
    }
}

/// A trial takes steps, also for a run that takes none.
#[test]
fn a_dry_run_tries_batches_in_earnest() {
    let directory = prepared();
    let flags = ["--data", "in:data.jsonl", "--seq", "64", "--engine", "auto", "--batch", "auto", "--dry-run"];
    let output = command(&directory, &flags).env("BURN_PARALLEL_TRIAL_ROWS", "2").output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("step 2/2: "), "{told}");
}

/// A batch is no more than an epoch, whatever would fit, and the rest of the flags are to suit it.
#[cfg(target_os = "linux")]
#[test]
fn no_more_rows_are_tried_than_the_data_gives() {
    let directory = prepared();
    directory.write("few.jsonl", "{\"text\": \"a few words, and some more of them\"}\n".repeat(11).as_bytes());
    let auto = |more: &[&str]| {
        let flags = ["--data", "in:few.jsonl", "--seq", "64", "--unpacked", "--batch", "auto", "--dp", "2"];
        let output = finetune(&directory, &[&flags[..], more].concat());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, told) = auto(&["--json", "in:outcome.json"]);
    let most = "at most 5 rows at once are looked for (an epoch of --data has 11 rows, for 2 micro-batches)";
    assert!(code == Some(0) && told.contains(most) && !told.contains("tries 6 rows"), "{told}");
    let outcome = outcome(&directory);
    assert_eq!((outcome["rows"].as_u64(), numbers(&outcome, "losses").len()), (Some(10), 2));
    // Two steps of the batch that is found.
    let (code, told) = auto(&["--warmup", "3"]);
    assert!(code == Some(2) && told.contains("--warmup 3 is more than the 2 steps of the whole run"), "{told}");
    let (code, told) = auto(&["--steps", "2", "--grow-batch", "8"]);
    assert!(code == Some(2) && told.contains("--grow-batch 8 is smaller than the 10 rows that --batch auto"), "{told}");
}
