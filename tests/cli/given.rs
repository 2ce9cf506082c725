//! What ranks are given that a launcher starts: flags, files, variables.

use std::fs;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::common::ports::free_port;
use crate::train_lm::{Folder, TINY, example, send};

/// Two ranks, each with flags of its own, as torchrun starts them.
fn ranks(flags: [&[&str]; 2]) -> [Command; 2] {
    let port = free_port().to_string();
    [0, 1].map(|rank: usize| {
        let mut command = Command::new(example());
        let steps: &[&str] = if flags[rank].contains(&"--steps") { &[] } else { &["--steps", "1"] };
        command.args(TINY).args(steps).args(flags[rank]);
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string()).env("WORLD_SIZE", "2");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    })
}

/// The same, which go on by themselves.
fn started(flags: [&[&str]; 2]) -> [Child; 2] {
    ranks(flags).map(|mut command| command.spawn().unwrap())
}

/// Demands that all of these end with exit code 2 and one line, which says `what`.
#[track_caller]
fn refused(ranks: impl IntoIterator<Item = Child>, what: &str) {
    for rank in ranks {
        let Output { status, stderr, .. } = rank.wait_with_output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        let said: Vec<&str> = stderr.lines().filter(|line| line.starts_with("train_lm: ")).collect();
        assert_eq!(status.code(), Some(2), "{what}: {stderr}");
        assert!(said.len() == 1 && said[0].contains(what), "{what}: {stderr}");
    }
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
    let outcome = folder.path("outcome.json");
    let json = ["--json", &outcome];
    let cases: [([&[&str]; 2], &str); 12] = [
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
        ([&[], &json], "`--json` is given on rank 1, and rank 0 writes it: give it there"),
        ([&["--text", &one], &["--text", &other]], "`bytes of --text` is \"261 of xxh3 "),
        (
            [&["--strategy", &one_file], &["--strategy", &other_file]],
            "`strategy.data.overlap` is false on rank 1 of group `world`, and true on rank 0: give all ranks the same",
        ),
    ];
    let runs: Vec<_> = cases.iter().map(|(flags, _)| started(*flags)).collect();
    for ((_, what), run) in cases.into_iter().zip(runs) {
        refused(run, what);
    }
    // What may be another on each: where a text is, and what is told where.
    for rank in started([&["--text", &one, "--json", &outcome], &["--text", &same, "--launch", "env"]]) {
        let Output { status, stderr, .. } = rank.wait_with_output().unwrap();
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    }
}

/// A rank whose own flags, or whose text, are wrong tells the others, which would wait for it.
#[test]
fn a_rank_that_will_not_come_tells_the_others() {
    let cases: [([&[&str]; 2], &str); 3] = [
        ([&[], &["--batch", "none"]], "it must be a whole number, or `auto`"),
        ([&["--lr", "7"], &[]], "it must be greater than 0 and at most 1"),
        ([&[], &["--text", "/nowhere"]], "cannot read the text"),
    ];
    let runs: Vec<_> = cases.iter().map(|(flags, _)| started(*flags)).collect();
    for ((flags, what), run) in cases.into_iter().zip(runs) {
        let [first, second] = run;
        let (told, rank) = if flags[0].is_empty() { (first, 1) } else { (second, 0) };
        let Output { status, stderr, .. } = told.wait_with_output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        let said = format!("train_lm: rank {rank} was given what is wrong: ");
        assert!(status.code() == Some(2) && stderr.contains(&said) && stderr.contains(what), "{what}: {stderr}");
    }
}

/// A directory is the same or another wherever it is named from, and whatever its name looks like.
#[test]
fn directories_are_compared_by_where_they_are() {
    let folder = Folder::new("places");
    let dirs = ["here", "there"].map(|name| folder.path(name));
    dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let saved = |dirs: [&str; 2], names: [&str; 2]| {
        let mut ranks = ranks(names.each_ref().map(|name| ["--save", name]).each_ref().map(|flags| &flags[..]));
        ranks.iter_mut().zip(dirs).for_each(|(rank, dir)| {
            rank.current_dir(dir);
        });
        ranks.map(|mut rank| rank.spawn().unwrap())
    };
    let [here, there] = dirs.each_ref().map(String::as_str);
    refused(saved([here, here], ["7", "07"]), "here/07\" on rank 1 of group `world`, and \"");
    refused(saved([here, there], ["same", "same"]), "there/same\" on rank 1 of group `world`, and \"");
    for rank in saved([here, there], ["./to", "../here/to"]) {
        let Output { status, stderr, .. } = rank.wait_with_output().unwrap();
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    }
    assert!(folder.is_file("here/to/step-000000001/checkpoint.json"));
}

/// What the variables of ranks say of each other is found wrong when they meet.
#[test]
fn ranks_that_cannot_meet_are_refused() {
    let start = |change: &dyn Fn(usize, &mut Command)| {
        let mut ranks = ranks([&[], &[]]);
        ranks.iter_mut().enumerate().for_each(|(rank, command)| change(rank, command));
        ranks.map(|mut rank| rank.spawn().unwrap())
    };
    let sizes = start(&|rank, command| {
        command.env("WORLD_SIZE", (2 + rank).to_string());
    });
    refused(sizes, "rank 1 is of a world of 3 ranks, rank 0 of one of 2");
    let nowhere = start(&|_, command| {
        command.env_remove("MASTER_ADDR").env_remove("MASTER_PORT");
    });
    refused(nowhere, "MASTER_ADDR and MASTER_PORT are not set");
    let unknown = start(&|_, command| {
        command.env("MASTER_ADDR", "no-such-host.invalid");
    });
    refused(unknown, "to rank 0 at no-such-host.invalid:");
    if cfg!(not(feature = "mpi")) {
        let without_mpirun = start(&|rank, command| {
            for (name, own) in [("RANK", true), ("LOCAL_RANK", true), ("SIZE", false), ("LOCAL_SIZE", false)] {
                let value = if own { rank } else { 2 };
                command.env(format!("OMPI_COMM_WORLD_{name}"), value.to_string());
            }
            ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"].iter().for_each(|name| {
                command.env_remove(name);
            });
        });
        refused(without_mpirun, "MASTER_ADDR and MASTER_PORT are not set");
    }
}

/// Ranks that are started by hand, of which one is told: all save the same step, and say by their exit codes why they
/// end.
#[cfg(unix)]
#[test]
fn all_ranks_end_with_the_exit_code_of_a_signal() {
    let folder = Folder::new("by-hand");
    let saved = folder.path("saved");
    let flags = ["--save", &saved, "--save-every", "1", "--steps", "100000"];
    let ranks = started([&flags, &flags]);
    let began = Instant::now();
    while !folder.is_file("saved/step-000000002/checkpoint.json") {
        assert!(began.elapsed() < Duration::from_secs(120), "no step was saved");
        std::thread::sleep(Duration::from_millis(5));
    }
    send("-TERM", &ranks[0].id().to_string());
    for rank in ranks {
        let Output { status, stderr, .. } = rank.wait_with_output().unwrap();
        assert_eq!(status.code(), Some(143), "{}", String::from_utf8_lossy(&stderr));
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
    // That is positive: what is wrong with it is said as well.
    let (code, stderr) = run(&[("BURN_PARALLEL_TIMEOUT_S", "1e30")], &[]);
    assert!(code == Some(2) && stderr.contains("seconds, less than 1.8e19"), "{stderr}");
    // More ranks than the batch has rows are called what they come from.
    let many = [
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "100000"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "1"),
    ];
    let (code, stderr) = run(&many, &[]);
    let said =
        "--batch 2 is smaller than the replicas of the 100000 ranks that have been started: every replica needs a row";
    assert!(code == Some(2) && stderr.contains(said), "{stderr}");
    // Ranks that are threads ask nobody; and a job of Slurm has variables where `srun` has started nothing.
    for (variables, flags) in [(&all[..1], &["--launch", "threads"][..]), (&[("SLURM_NTASKS", "2")], &[])] {
        let (code, stderr) = run(variables, flags);
        assert!(code == Some(0) && stderr.contains("step 1/1: "), "{variables:?}: {stderr}");
    }
}
