//! What ranks are given that a launcher starts: flags, files, variables.

use std::fs;
use std::process::{Command, Output, Stdio};

use crate::common::ports::free_port;
use crate::train_lm::{Folder, TINY, example};

/// Two ranks, each with flags of its own, as torchrun starts them; which go on by themselves.
fn started(flags: [&[&str]; 2]) -> [std::process::Child; 2] {
    let port = free_port().to_string();
    [0, 1].map(|rank: usize| {
        let mut command = Command::new(example());
        command.args(TINY).args(["--steps", "1"]).args(flags[rank]);
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string()).env("WORLD_SIZE", "2");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    })
}

/// Ranks with other flags would train on with other numbers, or wait for each other.
#[test]
fn ranks_that_are_given_other_flags_are_refused() {
    let folder = Folder::new("other-flags");
    let (one, same, other, saved) = (folder.path("one"), folder.path("same"), folder.path("other"), folder.path("to"));
    fs::write(&one, "what both ranks learn from\n".repeat(9)).unwrap();
    fs::copy(&one, &same).unwrap();
    fs::write(&other, "what one of them learns from\n".repeat(9)).unwrap();
    fs::write(folder.path("one.toml"), "dp = 2\n").unwrap();
    fs::write(folder.path("other.toml"), "dp = 2\n[data]\noverlap = false\n").unwrap();
    let (one_file, other_file) = (folder.path("one.toml"), folder.path("other.toml"));
    let save = ["--save", &saved];
    let cases: [([&[&str]; 2], &str); 11] = [
        (
            [&["--clip", "1"], &["--clip", "2"]],
            "`--clip` is 2 on rank 1 of group `world`, and 1 on rank 0: give all ranks the same",
        ),
        ([&["--clip", "1"], &[]], "`--clip` is not given on rank 1 of group `world`, and 1 on rank 0"),
        ([&[], &["--batch", "8"]], "`--batch` is 8 on rank 1 of group `world`, and 16 on rank 0"),
        ([&["--heads", "2"], &[]], "`--heads` is 4 on rank 1"),
        ([&["--seed", "1"], &[]], "`--seed` is 0 on rank 1"),
        ([&["--micro-batch", "2"], &["--micro-batch", "4"]], "`--micro-batch` is 4 on rank 1"),
        ([&["--zero", "3"], &[]], "`--zero` is not given on rank 1"),
        ([&save, &[]], "`--save` is not given on rank 1"),
        ([&save, &["--save", &saved, "--keep", "1"]], "`--keep` is 1 on rank 1 of group `world`, and 3 on"),
        ([&["--text", &one], &["--text", &other]], "`bytes of --text` is \"261 of xxh3 "),
        (
            [&["--strategy", &one_file], &["--strategy", &other_file]],
            "`strategy.data.overlap` is false on rank 1 of group `world`, and true on rank 0: give all ranks the same",
        ),
    ];
    let runs: Vec<_> = cases.iter().map(|(flags, _)| started(*flags)).collect();
    for ((flags, what), run) in cases.into_iter().zip(runs) {
        for rank in run {
            let Output { status, stderr, .. } = rank.wait_with_output().unwrap();
            let stderr = String::from_utf8(stderr).unwrap();
            let said: Vec<&str> = stderr.lines().filter(|line| line.starts_with("train_lm: ")).collect();
            assert_eq!(status.code(), Some(2), "{flags:?}: {stderr}");
            assert!(said.len() == 1 && said[0].contains(what), "{flags:?}: {stderr}");
        }
    }
    // What may be another on each: where a text is, and what is told where.
    let outcome = folder.path("outcome.json");
    for rank in started([&["--text", &one, "--json", &outcome], &["--text", &same, "--launch", "env"]]) {
        let Output { status, stderr, .. } = rank.wait_with_output().unwrap();
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    }
}

/// A process that a launcher has started does not train alone because a variable is missing or wrong.
#[test]
fn variables_that_make_no_sense_are_refused() {
    let run = |variables: &[(&str, &str)], flags: &[&str]| {
        let mut command = Command::new(example());
        command.args(TINY).args(["--steps", "1", "--batch", "2"]).args(flags);
        let output = command.envs(variables.iter().copied()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let all = [("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "127.0.0.1")];
    for (variables, what) in [
        (&all[..1], "WORLD_SIZE is missing"),
        (&all[1..2], "RANK is missing"),
        (&all[..2], "LOCAL_RANK is missing"),
        (&[("RANK", "2"), all[1], all[2]], "RANK=2 does not exist in WORLD_SIZE=2"),
        (&[("RANK", "first"), all[1], all[2]], "RANK=\"first\" is not a whole number"),
        (&[all[0], all[1], all[2], all[3], ("MASTER_PORT", "http")], "MASTER_PORT=\"http\" is not a port"),
        (&[("OMPI_COMM_WORLD_RANK", "0")], "OMPI_COMM_WORLD_SIZE is missing"),
    ] {
        let (code, stderr) = run(variables, &[]);
        assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{variables:?}: {stderr}");
        assert!(stderr.contains(what) && stderr.contains("or give --launch threads"), "{variables:?}: {stderr}");
    }
    let (code, stderr) = run(&[("BURN_PARALLEL_TIMEOUT_S", "soon")], &[]);
    assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{stderr}");
    assert!(stderr.contains("BURN_PARALLEL_TIMEOUT_S=\"soon\" is not a positive number"), "{stderr}");
    // Ranks that are threads ask nobody; and a job of Slurm has variables where `srun` has started nothing.
    for (variables, flags) in [(&all[..1], &["--launch", "threads"][..]), (&[("SLURM_NTASKS", "2")], &[])] {
        let (code, stderr) = run(variables, flags);
        assert!(code == Some(0) && stderr.contains("step 1/1: "), "{variables:?}: {stderr}");
    }
}
