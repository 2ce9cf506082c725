//! Real processes: started, named in what they say, ended together, and none left behind.
#![cfg(unix)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use burn_parallel::Error;
use burn_parallel::launch;

const LIMIT: Duration = Duration::from_secs(20);

/// What the helper below starts; the processes' script is given by this variable.
const SCRIPT: &str = "BURN_PARALLEL_TEST_SCRIPT";

/// Run by the tests in a process of its own: signals and output are the process's.
#[test]
#[ignore = "a helper of the other tests"]
fn parent() {
    let Ok(script) = std::env::var(SCRIPT) else { return };
    match launch::processes(3).program("sh", ["-c", &script]).supervise() {
        Ok(()) => println!("<all well>"),
        Err(Error::ProcessFailed { rank, size, status, said }) => println!("<{rank:?} of {size} {status}: {said:?}>"),
        Err(error) => println!("<{error}>"),
    }
}

fn start(script: &str) -> Child {
    let mut parent = Command::new(std::env::current_exe().unwrap());
    parent.args(["--exact", "launch::processes::parent", "--ignored", "--nocapture"]).env(SCRIPT, script);
    parent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn run(script: &str) -> (String, String) {
    let Output { stdout, stderr, .. } = start(script).wait_with_output().unwrap();
    (String::from_utf8_lossy(&stdout).into_owned(), String::from_utf8_lossy(&stderr).into_owned())
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("burn-parallel-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn until(what: &str, mut there: impl FnMut() -> bool) {
    let began = Instant::now();
    while !there() {
        assert!(began.elapsed() < LIMIT, "{what} did not happen");
        thread::sleep(Duration::from_millis(10));
    }
}

/// The numbers of the processes that wrote them into files of a folder.
fn pids(folder: &Path) -> Vec<u32> {
    let files = fs::read_dir(folder).unwrap().flatten();
    files.filter_map(|file| fs::read_to_string(file.path()).ok()?.trim().parse().ok()).collect()
}

fn alive(pid: u32) -> bool {
    // A zombie that nobody has waited for is dead.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn each_finds_its_place_and_is_named() {
    let (out, err) =
        run("echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR; echo careful >&2; printf 'no newline'");
    for rank in 0..3 {
        assert!(out.contains(&format!("[rank {rank}/3] {rank}/3 {rank}/3 127.0.0.1\n")), "{out}");
        assert!(out.contains(&format!("[rank {rank}/3] no newline\n")), "{out}");
        assert!(err.contains(&format!("[rank {rank}/3] careful\n")), "{err}");
    }
    assert!(out.contains("<all well>"), "{out}");
}

#[test]
fn one_that_fails_ends_all() {
    let folder = Folder::new("fails");
    // Each has a child of its own, which must not be left behind either.
    let script = format!(
        "echo $$ > {0}/$RANK; sleep 1000 & echo $! > {0}/child$RANK; \
         if [ $RANK = 1 ]; then \
         while [ $(cat {0}/* | wc -l) -lt 6 ]; do sleep 0.01; done; echo the disk is full >&2; exit 7; fi; wait",
        folder.path()
    );
    let began = Instant::now();
    let (out, _) = run(&script);
    assert!(out.contains("<Some(1) of 3 with exit status 7: [\"[rank 1/3] the disk is full\"]>"), "{out}");
    assert!(began.elapsed() < LIMIT);
    assert_eq!(pids(&folder.0).len(), 6);
    // What they have started is not waited for by anybody here.
    until("the end of all processes", || pids(&folder.0).iter().all(|pid| !alive(*pid)));
}

/// Started again until all goes well, or as often as was said.
#[test]
fn ranks_are_started_again() {
    let folder = Folder::new("restarts");
    let fails_before = |good: usize| {
        let last = "if [ $RANK = 1 ] && [ $BURN_PARALLEL_RESTART -lt";
        let script = format!(
            "echo $BURN_PARALLEL_RESTART > {}/{good}.$BURN_PARALLEL_RESTART.$RANK; {last} {good} ]; then kill -9 $$; fi",
            folder.path()
        );
        launch::processes(2).program("sh", ["-c", &script]).restarts(2).supervise()
    };
    fails_before(2).unwrap();
    assert!((0..3).all(|start| folder.0.join(format!("2.{start}.1")).exists()));
    fails_before(0).unwrap();
    assert!(!folder.0.join("0.1.0").exists());
    let error = fails_before(3).unwrap_err();
    assert!(matches!(error, Error::ProcessFailed { rank: Some(1), size: 2, .. }), "{error}");
    assert!(!folder.0.join("3.3.0").exists());
}

/// On as many as are left, if so many will do.
#[test]
fn fewer_ranks_are_started_again() {
    let folder = Folder::new("fewer");
    let run = |name: &str, sizes: &[usize]| {
        // The last rank is lost when the others have written as well: a rank that starts late would be ended before.
        let script = format!(
            "cd {}; echo > {name}.$BURN_PARALLEL_RESTART.$RANK.$WORLD_SIZE; \
             if [ $WORLD_SIZE -lt 3 ]; then exit 0; fi; if [ $RANK -lt 2 ]; then sleep 1000; fi; \
             while [ $(ls | grep -c {name}.$BURN_PARALLEL_RESTART) -lt 3 ]; do sleep 0.01; done; kill -9 $$",
            folder.path()
        );
        launch::processes(3).program("sh", ["-c", &script]).restarts(3).restart_sizes(sizes.to_vec()).supervise()
    };
    run("fits", &[1, 2, 3]).unwrap();
    let mut ran: Vec<String> =
        fs::read_dir(&folder.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    ran.sort();
    assert_eq!(ran, ["fits.0.0.3", "fits.0.1.3", "fits.0.2.3", "fits.1.0.2", "fits.1.1.2"]);
    let error = run("never", &[3]).unwrap_err();
    assert!(matches!(error, Error::ProcessFailed { rank: Some(2), size: 3, .. }), "{error}");
}

/// One that ends because it was asked to is not lost.
#[test]
fn a_run_that_was_asked_to_end_is_not_started_again() {
    let folder = Folder::new("asked");
    let script = format!("echo > {}/$BURN_PARALLEL_RESTART.$RANK; exit 143", folder.path());
    let error = launch::processes(2).program("sh", ["-c", &script]).restarts(2).supervise().unwrap_err();
    assert!(matches!(error, Error::Stopped { signal } if signal.exit_code() == 143), "{error}");
    assert!(!folder.0.join("1.0").exists());
}

/// What is certain to fail again is not tried again: wrong flags, and the same failure twice.
#[test]
fn what_would_fail_again_is_not_started_again() {
    let folder = Folder::new("certain");
    let starts_within = |limit: Option<Duration>, name: &str, ends: &str| {
        let script = format!("echo > {}/{name}.$BURN_PARALLEL_RESTART.$RANK; {ends}", folder.path());
        let processes = launch::processes(2).program("sh", ["-c", &script]).restarts(3);
        let processes = limit.into_iter().fold(processes, launch::Processes::fails_again_within);
        let error = processes.supervise().unwrap_err();
        assert!(matches!(error, Error::ProcessFailed { .. }), "{error}");
        // A rank may be ended, for another that failed, before it has written.
        let started = |start: usize| (0..2).any(|rank| folder.0.join(format!("{name}.{start}.{rank}")).exists());
        (0..4).filter(|start| started(*start)).count()
    };
    let starts = |name: &str, ends: &str| starts_within(None, name, ends);
    assert_eq!(starts("refused", "if [ $RANK = 1 ]; then exit 2; fi; sleep 1000"), 1);
    assert_eq!(starts("same", "echo no such model >&2; exit 1"), 2);
    // Whichever rank is the first to say so.
    let in_turn = "if [ $RANK != $BURN_PARALLEL_RESTART ]; then sleep 10; exit; fi; echo no such model >&2; exit 1";
    assert_eq!(starts("in_turn", in_turn), 2);
    assert_eq!(starts("other", "echo step $BURN_PARALLEL_RESTART >&2; exit 1"), 4);
    assert_eq!(starts("killed", "echo the same words >&2; kill -9 $$"), 4);
    // What ran for a while has got further, as when a network breaks now and then.
    let limit = Some(Duration::from_millis(100));
    assert_eq!(starts_within(limit, "later", "sleep 0.2; echo connection reset >&2; exit 1"), 4);
    // Only the second start fails soon: the third does so as well.
    let once = "if [ $BURN_PARALLEL_RESTART = 0 ]; then sleep 3.3; fi; echo connection reset >&2; exit 1";
    assert_eq!(starts_within(Some(Duration::from_secs(3)), "once", once), 3);
    assert_eq!(starts_within(Some(Duration::ZERO), "always", "echo no such model >&2; exit 1"), 4);
}

/// All starts of a run are told one name, and no other run is told it.
#[test]
fn a_run_has_a_name() {
    let run = |name: &str| -> Vec<String> {
        let folder = Folder::new(name);
        let script = format!("echo $BURN_PARALLEL_RUN > {}/$BURN_PARALLEL_RESTART; kill -9 $$", folder.path());
        launch::processes(1).program("sh", ["-c", &script]).restarts(2).supervise().unwrap_err();
        (0..3).map(|start| fs::read_to_string(folder.0.join(start.to_string())).unwrap()).collect()
    };
    let (one, other) = (run("one"), run("another"));
    assert!(one[0].trim().len() > 20 && one.iter().all(|name| *name == one[0]), "{one:?}");
    assert_ne!(one[0], other[0]);
}

#[test]
fn one_that_is_killed_ends_all() {
    let (out, _) = run("if [ $RANK = 2 ]; then kill -9 $$; fi; sleep 1000");
    assert!(out.contains("<Some(2) of 3 by signal 9: []>"), "{out}");
}

/// One that is stopped, and so does not hear that it is to end, is not waited for until it is killed.
#[test]
fn one_that_is_stopped_goes_on_to_end() {
    let script = "[ $RANK = 1 ] || { sleep 1; exit 3; }; kill -STOP $$; sleep 60";
    let began = Instant::now();
    let processes = launch::processes(2).program("sh", ["-c", script]).grace(Duration::from_secs(50));
    let error = processes.supervise().unwrap_err();
    assert!(matches!(error, Error::ProcessFailed { rank: Some(0), .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(40), "it was waited for");
}

#[test]
fn those_who_do_not_listen_are_ended() {
    let began = Instant::now();
    let (out, _) = run("if [ $RANK = 0 ]; then sleep 0.3; exit 1; fi; trap '' TERM; while :; do sleep 0.1; done");
    assert!(out.contains("<Some(0) of 3 with exit status 1"), "{out}");
    assert!(began.elapsed() < LIMIT);
}

/// One that has left its process group, and holds the output of a rank that has ended, well or not.
#[test]
fn a_daemon_of_a_rank_is_not_waited_for() {
    for (code, said) in [(7, "<Some(1) of 3 with exit status 7: [\"[rank 1/3] the disk is full\"]>"), (0, "<all well>")]
    {
        let folder = Folder::new(&format!("daemon-{code}"));
        let script = format!(
            "if [ $RANK = 1 ]; then setsid sleep 60 & echo $! > {}/$RANK; echo the disk is full >&2; exit {code}; fi; \
             if [ {code} = 7 ]; then sleep 1000; fi",
            folder.path()
        );
        let began = Instant::now();
        let (out, _) = run(&script);
        let (waited, daemons) = (began.elapsed(), pids(&folder.0));
        // SAFETY: no memory is involved.
        let ended = daemons.iter().all(|daemon| unsafe { libc::kill(*daemon as i32, libc::SIGKILL) } == 0);
        assert!(ended && daemons.len() == 1, "{daemons:?}");
        assert!(waited < LIMIT, "the daemon was waited for, {waited:?}");
        assert!(out.contains(said), "{out}");
    }
}

#[test]
fn signals_are_handed_on() {
    for (signal, name) in [(libc::SIGINT, "SIGINT"), (libc::SIGTERM, "SIGTERM")] {
        let folder = Folder::new(name);
        let script = format!(
            "trap 'echo told; exit 0' INT TERM; echo $$ > {}/$RANK; while :; do sleep 0.05; done",
            folder.path()
        );
        let parent = start(&script);
        until("the start", || pids(&folder.0).len() == 3);
        // SAFETY: the process is ours and has not been waited for.
        unsafe { libc::kill(parent.id() as i32, signal) };
        let out = String::from_utf8_lossy(&parent.wait_with_output().unwrap().stdout).into_owned();
        assert_eq!(out.matches("told").count(), 3, "{out}");
        assert!(out.contains(&format!("<the run was ended by {name}>")), "{out}");
        assert!(pids(&folder.0).iter().all(|pid| !alive(*pid)), "processes are left");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_parent_that_is_killed_leaves_none_behind() {
    let folder = Folder::new("killed");
    // In place of the shell: the kernel ends ranks, not what these have started.
    let mut parent = start(&format!("echo $$ > {}/$RANK; exec sleep 1000", folder.path()));
    until("the start", || pids(&folder.0).len() == 3);
    parent.kill().unwrap();
    parent.wait().unwrap();
    until("the end", || pids(&folder.0).iter().all(|pid| !alive(*pid)));
}

#[test]
fn a_program_that_does_not_exist() {
    let error = launch::processes(2).program("/no/such/program", [""; 0]).supervise().unwrap_err();
    assert!(matches!(&error, Error::Launch { rank: 0, size: 2, .. }), "{error}");
    let error = launch::processes(0).supervise().unwrap_err();
    assert!(error.to_string().contains("at least 1 rank, not 0"), "{error}");
}

#[cfg(not(feature = "mpi"))]
#[test]
fn a_transport_that_is_not_built_in() {
    let processes = launch::processes(2).transport(launch::TransportKind::Mpi);
    let error = processes.run(|process| process, |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("--features mpi"), "{error}");
}

/// Run by the test below: the processes come to this place again.
#[test]
#[ignore = "a helper of the other tests"]
fn itself() {
    let outcome = launch::processes(3).run(
        |process| process.threads(1).seed(7),
        |rank| {
            let sum = rank.all_reduce(vec![rank.rank() as u64, rank.seed()], burn_parallel::comm::ReduceOp::Sum)?;
            if std::env::args().any(|argument| argument == "fails") && rank.rank() == 2 {
                return Err(Error::user("the disk is full"));
            }
            rank.barrier()?;
            println!("<{sum:?} of {} over {} threads>", rank.size(), rank.threads());
            Ok(sum[0])
        },
    );
    match outcome {
        Ok(Some(_)) => {}
        Ok(None) => println!("<all well>"),
        Err(error) => {
            eprintln!("<{error}>");
            std::process::exit(3);
        }
    }
}

fn itself_in(arguments: &[&str]) -> Output {
    let mut parent = Command::new(std::env::current_exe().unwrap());
    // What another launcher has said to the first process is not said to the ranks.
    parent.env("OMPI_COMM_WORLD_RANK", "0").env("OMPI_COMM_WORLD_SIZE", "1").env("SLURM_PROCID", "5");
    parent.args(["--exact", "launch::processes::itself", "--ignored", "--nocapture"]).args(arguments).output().unwrap()
}

#[test]
fn ranks_of_this_program_join_without_anything_else() {
    let output = itself_in(&[]);
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{out} {}", String::from_utf8_lossy(&output.stderr));
    for rank in 0..3 {
        assert!(out.contains(&format!("[rank {rank}/3] <[3, 21] of 3 over 1 threads>")), "{out}");
    }
    assert_eq!(out.matches("<all well>").count(), 1, "{out}");
}

#[test]
fn the_error_of_a_rank_is_returned() {
    let output = itself_in(&["fails"]);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{err}");
    // By the first that ends, whichever it is; the others may be ended before they say it.
    assert!(err.contains("/3] <rank 2 failed: the disk is full"), "{err}");
    assert!(err.contains("of 3 ended with exit status 3; the last it said:"), "{err}");
}
