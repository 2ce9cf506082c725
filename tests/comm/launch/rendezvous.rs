//! Ranks that meet over TCP, and whoever else comes along.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use burn_parallel::Error;
use burn_parallel::launch::{ProcessInfo, Rendezvous};

use crate::common::failing::fails;
use crate::common::ports::free_port;

/// A time-out that no test waits for.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_secs(1);
const SECRET: &[u8] = b"nobody knows";

fn at(rank: usize, size: usize, port: u16, timeout: Duration) -> Rendezvous {
    Rendezvous::new(rank, size, "127.0.0.1", port, SECRET, timeout)
}

fn blob(rank: usize) -> Vec<u8> {
    vec![rank as u8; rank * 1000]
}

/// Runs some ranks on threads of their own, the last ones first.
fn meet(ranks: Vec<Rendezvous>) -> Vec<Result<Vec<Vec<u8>>, Error>> {
    let threads: Vec<_> = (ranks.into_iter().enumerate().rev())
        .map(|(place, rank)| thread::spawn(move || rank.all_gather(&blob(place))))
        .collect();
    let mut results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    results.reverse();
    results
}

#[test]
fn everybody_gets_the_blobs_of_all() {
    for size in [1, 2, 3, 8] {
        let port = free_port();
        // Twice at the same address.
        for _ in 0..2 {
            let all: Vec<_> = (0..size).map(blob).collect();
            let results = meet((0..size).map(|rank| at(rank, size, port, LONG)).collect());
            assert!(results.into_iter().all(|result| result.unwrap() == all));
        }
    }
    let port = free_port();
    let id: Vec<_> = (0..4)
        .map(|rank| thread::spawn(move || at(rank, 4, port, LONG).broadcast(&[rank as u8; 128]).unwrap()))
        .collect();
    assert!(id.into_iter().all(|thread| thread.join().unwrap() == [0; 128]));
}

#[test]
fn the_missing_are_named() {
    let port = free_port();
    let results = meet(vec![at(0, 4, port, SHORT), at(2, 4, port, LONG)]);
    fails(
        &results[0],
        &["ranks 1, 3 of 4 did not come", &format!("127.0.0.1:{port}"), "1.0s", "BURN_PARALLEL_TIMEOUT_S"],
    );
    // The one that came is told at once.
    assert_eq!(results[1].as_ref().unwrap_err(), results[0].as_ref().unwrap_err());
    fails(&meet(vec![at(0, 2, free_port(), SHORT)])[0], &["rank 1 of 2 did not come"]);
    fails(
        &at(1, 2, free_port(), SHORT).all_gather(&[]),
        &["rank 1 could not meet rank 0", "is rank 0 running", "BURN_PARALLEL_TIMEOUT_S"],
    );
}

#[test]
fn an_address_in_use() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let began = Instant::now();
    fails(&at(0, 2, port, LONG).all_gather(&[]), &[&format!("127.0.0.1:{port} is in use"), "MASTER_PORT"]);
    assert!(began.elapsed() < LONG / 2);
    // What is free a moment later is no error.
    let zero = thread::spawn(move || at(0, 2, port, LONG).all_gather(b"zero"));
    let one = thread::spawn(move || at(1, 2, port, LONG).all_gather(b"one"));
    thread::sleep(Duration::from_millis(300));
    drop(listener);
    for rank in [zero, one] {
        assert_eq!(rank.join().unwrap().unwrap(), [b"zero".to_vec(), b"one".to_vec()]);
    }
    let elsewhere = Rendezvous::new(0, 2, "192.0.2.1", 1, SECRET, LONG);
    fails(&elsewhere.all_gather(&[]), &["cannot listen at 192.0.2.1:1", "MASTER_ADDR"]);
}

#[test]
fn another_secret() {
    let port = free_port();
    let stranger = Rendezvous::new(1, 2, "127.0.0.1", port, b"something else", LONG);
    let results = meet(vec![at(0, 2, port, SHORT), stranger]);
    fails(&results[0], &["rank 1 of 2 did not come", "had another secret: 1"]);
    fails(&results[1], &["do not share a secret", "BURN_PARALLEL_SECRET"]);
    // The right one still gets in after it.
    let port = free_port();
    let zero = thread::spawn(move || at(0, 2, port, LONG).all_gather(b"zero"));
    fails(&Rendezvous::new(1, 2, "127.0.0.1", port, b"wrong", LONG).all_gather(b"bad"), &["secret"]);
    assert_eq!(at(1, 2, port, LONG).all_gather(b"one").unwrap(), [b"zero".to_vec(), b"one".to_vec()]);
    assert_eq!(zero.join().unwrap().unwrap(), [b"zero".to_vec(), b"one".to_vec()]);
}

/// What rank 0 of 3 says, and others that do not go with it, of which each is so many of so many, and then rank 2,
/// which comes when all of these have been told.
fn contradict(others: &[(usize, usize)]) -> Vec<Result<Vec<Vec<u8>>, Error>> {
    let port = free_port();
    let come = |rank, size| thread::spawn(move || at(rank, size, port, LONG).all_gather(&blob(rank)));
    let zero = come(0, 3);
    let others: Vec<_> = others.iter().map(|(rank, size)| come(*rank, *size)).collect();
    let mut said: Vec<_> = others.into_iter().map(|other| other.join().unwrap()).collect();
    let began = Instant::now();
    said.push(come(2, 3).join().unwrap());
    assert!(began.elapsed() < LONG / 2, "who comes late is told at once");
    said.push(zero.join().unwrap());
    assert!(began.elapsed() < Duration::from_secs(8), "rank 0 waits for nobody else");
    said
}

#[test]
fn ranks_that_contradict_each_other() {
    for said in contradict(&[(1, 3), (1, 3)]) {
        fails(&said, &["two processes say that they are rank 1 of 3"]);
    }
    for said in contradict(&[(1, 2)]) {
        fails(&said, &["rank 1 is of a world of 2 ranks, rank 0 of one of 3"]);
    }
    let port = free_port();
    fails(&at(3, 3, port, LONG).all_gather(&[]), &["rank 3 does not exist in a world of 3"]);
    fails(&at(1, 2, port, LONG).all_gather(&vec![0; (1 << 20) + 1]), &["1048577 bytes"]);
}

/// A rank that has been greeted when another is refused is told as well.
#[test]
fn who_is_in_the_door_is_told_why_nobody_meets() {
    let port = free_port();
    let zero = thread::spawn(move || at(0, 3, port, LONG).all_gather(b"zero"));
    let door = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let there = door.local_addr().unwrap().port();
    let two = thread::spawn(move || at(2, 3, there, LONG).all_gather(b"two"));
    let (mut outside, mut inside, mut greeting) = (door.accept().unwrap().0, connect(port), [0; 40]);
    inside.read_exact(&mut greeting).unwrap();
    let refused = ["rank 1 is of a world of 2 ranks, rank 0 of one of 3"];
    fails(&at(1, 2, port, LONG).all_gather(b"one"), &refused);
    outside.write_all(&greeting).unwrap();
    let (mut from, mut to) = (outside.try_clone().unwrap(), inside.try_clone().unwrap());
    let says = thread::spawn(move || std::io::copy(&mut from, &mut to));
    std::io::copy(&mut inside, &mut outside).unwrap();
    fails(&two.join().unwrap(), &refused);
    fails(&zero.join().unwrap(), &refused);
    drop((outside, says.join()));
}

/// Rank 0 tells those that come late for ten seconds, and never for longer than its time-out.
#[test]
fn nobody_waits_for_ranks_that_never_come() {
    let waits = |timeout: Duration| {
        let port = free_port();
        let zero = thread::spawn(move || (Instant::now(), at(0, 3, port, timeout).all_gather(b"zero")));
        let _ = at(1, 2, port, timeout).all_gather(b"one");
        let (began, said) = zero.join().unwrap();
        assert!(said.is_err());
        began.elapsed()
    };
    let (short, long) = thread::scope(|scope| {
        let long = scope.spawn(|| waits(4 * LONG));
        (waits(2 * SHORT), long.join().unwrap())
    });
    assert!(long < LONG && short < Duration::from_secs(8), "{long:?}, {short:?}");
}

/// A connection to rank 0, which may not listen yet.
fn connect(port: u16) -> TcpStream {
    let began = Instant::now();
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(why) => assert!(began.elapsed() < LONG, "nobody listens: {why}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A stranger announces a large blob, and is told no.
fn is_turned_away(port: u16) {
    let mut stream = connect(port);
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.read_exact(&mut [0; 40]).unwrap();
    let numbers = [1u64, 2, 1 << 20].map(u64::to_le_bytes).concat();
    stream.write_all(&[&b"burnpar4"[..], &[7; 32], &numbers, &[9; 32]].concat()).unwrap();
    let mut heard = Vec::new();
    let _ = stream.read_to_end(&mut heard);
    assert_eq!(heard, [0]);
}

/// Whatever strangers send, those who belong together meet.
#[test]
fn garbage_of_strangers_does_no_harm() {
    let port = free_port();
    let zero = thread::spawn(move || at(0, 2, port, LONG).all_gather(b"zero"));
    let mut held = Vec::new();
    let claim = |len: u64| {
        let numbers = [1u64, 2, len].map(u64::to_le_bytes).concat();
        [&b"burnpar4"[..], &[7; 32], &numbers, &[9; 64]].concat()
    };
    let says = [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 5000], vec![0xff; 200], claim(32), claim(u64::MAX), vec![]];
    for bytes in says {
        let mut stream = connect(port);
        let _ = stream.write_all(&bytes);
        held.push(stream);
        drop(connect(port));
    }
    let all = [b"zero".to_vec(), b"one".to_vec()];
    assert_eq!(at(1, 2, port, LONG).all_gather(b"one").unwrap(), all);
    assert_eq!(zero.join().unwrap().unwrap(), all);
    // Nobody who did not show the secret was told anything but the greeting and a no.
    for mut stream in held {
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut heard = Vec::new();
        let _ = stream.read_to_end(&mut heard);
        assert!(heard.len() <= 41, "{} bytes", heard.len());
    }
}

/// A listener that is no rank is not believed.
#[test]
fn a_stranger_in_the_place_of_rank_0() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let word = [&[1u8][..], &9u64.to_le_bytes(), &[1], &0u64.to_le_bytes(), &[0; 32]].concat();
            let _ = stream.write_all(&[&b"burnpar4"[..], &[0; 32], &word].concat());
        }
    });
    fails(&at(1, 2, port, LONG).all_gather(&[]), &["do not share a secret"]);
}

/// Nobody waits for a rank 0 of another version to become one of this.
#[test]
fn rank_0_of_another_version() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let one = thread::spawn(move || at(1, 2, port, LONG).all_gather(&[]));
    let began = Instant::now();
    let mut stream = listener.accept().unwrap().0;
    stream.write_all(&[&b"burnpar1"[..], &[0; 32]].concat()).unwrap();
    fails(&one.join().unwrap(), &["rank 1 and rank 0", "are of two versions of burn-parallel"]);
    assert!(began.elapsed() < LONG / 2);
}

/// Nothing is read, and no memory taken, for a rank that has not shown the secret: it is told no before it has sent
/// what it announces.
#[test]
fn nothing_is_heard_of_a_stranger_but_its_name() {
    let port = free_port();
    let zero = thread::spawn(move || at(0, 2, port, LONG).all_gather(b"zero"));
    let began = Instant::now();
    (0..20).for_each(|_| is_turned_away(port));
    // Each for five seconds, if anybody did.
    assert!(began.elapsed() < LONG / 2, "nobody waits for what a stranger has announced");
    at(1, 2, port, LONG).all_gather(b"one").unwrap();
    zero.join().unwrap().unwrap();
}

/// A connection from another address of this machine than the one that tests use.
#[cfg(target_os = "linux")]
fn connect_from(last: u8, port: u16) -> std::io::Result<TcpStream> {
    use std::os::fd::{FromRawFd, OwnedFd};
    let address = |last: u8, port: u16| libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, last]) },
        sin_zero: [0; 8],
    };
    // SAFETY: a new socket, and addresses that are there for the calls.
    unsafe {
        // Processes that other tests start meanwhile do not inherit it: they would have no descriptors left.
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
        let socket = OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, kind, 0));
        let len = size_of::<libc::sockaddr_in>() as u32;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
        let (from, to) = (address(last, 0), address(1, port));
        if libc::bind(fd, (&raw const from).cast(), len) != 0 || libc::connect(fd, (&raw const to).cast(), len) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(socket.into())
    }
}

/// Whoever opens more connections than ranks may come from one address keeps nobody else out, not even until these are
/// given up, after five seconds.
#[cfg(target_os = "linux")]
#[test]
fn a_crowd_from_one_address() {
    // A machine with much else to do may be that slow, but not always.
    let waits: Vec<Duration> = (0..3).map(|_| behind_a_crowd()).take_while(|wait| wait.as_secs() >= 3).collect();
    assert!(waits.len() < 3, "{waits:?}");
}

/// For how long a rank waits that comes behind it.
#[cfg(target_os = "linux")]
fn behind_a_crowd() -> Duration {
    let port = free_port();
    let zero = thread::spawn(move || at(0, 2, port, LONG).all_gather(b"zero"));
    let mut crowd = Vec::new();
    while crowd.len() < 100 {
        match connect_from(2, port) {
            Ok(stream) => crowd.push(stream),
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
    // One rank is expected, and eight others may come from where it does.
    let mut greeted = 0;
    for stream in &mut crowd {
        stream.set_read_timeout(Some(LONG)).unwrap();
        greeted += usize::from(stream.read_exact(&mut [0; 40]).is_ok());
    }
    assert_eq!(greeted, 9);
    let began = Instant::now();
    at(1, 2, port, LONG).all_gather(b"one").unwrap();
    let waited = began.elapsed();
    zero.join().unwrap().unwrap();
    waited
}

#[test]
fn any_time_out_but_none_at_all() {
    fails(&at(0, 2, free_port(), Duration::ZERO).all_gather(&[]), &["the time-out is 0"]);
    let port = free_port();
    let results = meet(vec![at(0, 2, port, Duration::MAX), at(1, 2, port, Duration::MAX)]);
    assert!(results.iter().all(Result::is_ok));
    // Of a world that nobody could start, an error names a few.
    let huge = at(0, usize::MAX, free_port(), Duration::from_millis(50)).all_gather(&[]);
    fails(&huge, &["ranks 1, 2, 3,", "16, and 18446744073709551598 more of"]);
}

/// Run by the tests below in processes of their own.
#[test]
#[ignore = "a helper of the tests with processes"]
fn one_rank() {
    let Ok(place) = ProcessInfo::from_env() else { return };
    env_logger::init();
    let met = Rendezvous::at(&place, LONG).and_then(|meeting| meeting.all_gather(&blob(place.rank)));
    match met {
        Ok(blobs) => println!("<met {} of {}>", place.rank, blobs.iter().map(Vec::len).sum::<usize>()),
        Err(error) => println!("<{error}>"),
    }
}

fn one_rank_in(mut command: Command, rank: usize, size: usize, address: &str, port: u16) -> Command {
    command.args(["--exact", "launch::rendezvous::one_rank", "--ignored", "--nocapture"]);
    command.env("RANK", rank.to_string()).env("LOCAL_RANK", "0").env("WORLD_SIZE", size.to_string());
    command.env("MASTER_ADDR", address).env("MASTER_PORT", port.to_string()).env("BURN_PARALLEL_SECRET", "s");
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).env("RUST_LOG", "warn");
    command
}

/// What two ranks say on standard output and error that meet with these secrets, or don't.
#[cfg(unix)]
fn two_with(secrets: [Option<&[u8]>; 2], address: &str) -> [(String, String); 2] {
    use std::os::unix::ffi::OsStrExt;
    let (exe, port) = (std::env::current_exe().unwrap(), free_port());
    let start = |rank: usize| {
        let mut command = one_rank_in(Command::new(&exe), rank, 2, address, port);
        match secrets[rank] {
            Some(secret) => command.env("BURN_PARALLEL_SECRET", std::ffi::OsStr::from_bytes(secret)),
            None => command.env_remove("BURN_PARALLEL_SECRET"),
        };
        command.spawn().unwrap()
    };
    let said = |output: Output| {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (text(&output.stdout), text(&output.stderr))
    };
    let (mut zero, one) = (start(0), start(1));
    let one = said(one.wait_with_output().unwrap());
    if !one.0.contains("<met") {
        // It would wait for the other until its time-out.
        zero.kill().unwrap();
    }
    [said(zero.wait_with_output().unwrap()), one]
}

/// A secret is bytes, whatever they mean, and never taken for none.
#[cfg(unix)]
#[test]
fn secrets_of_any_bytes() {
    let odd: &[u8] = b"\xff\xfe\x80";
    let met = two_with([Some(odd), Some(odd)], "127.0.0.1");
    assert!(met.iter().all(|(said, _)| said.contains("<met")), "{met:?}");
    for other in [None, Some(&b""[..]), Some(b"\xff\xfe\x81")] {
        let met = two_with([Some(odd), other], "127.0.0.1");
        assert!(met.iter().all(|(said, _)| !said.contains("<met")), "{other:?}: {met:?}");
        assert!(met[1].0.contains("do not share a secret"), "{met:?}");
    }
}

#[cfg(unix)]
#[test]
fn a_warning_without_a_secret_where_others_may_come() {
    let warnings = |secret: Option<&[u8]>, address: &str| {
        let met = two_with([secret; 2], address);
        assert!(met.iter().all(|(said, _)| said.contains("<met")), "{met:?}");
        met.map(|(_, log)| log.matches("there is no secret").count())
    };
    assert_eq!(warnings(None, "0.0.0.0"), [1, 0]);
    assert_eq!(warnings(Some(b""), "0.0.0.0"), [1, 0]);
    assert_eq!(warnings(Some(b"s"), "0.0.0.0"), [0, 0]);
    assert_eq!(warnings(None, "127.0.0.1"), [0, 0]);
}

/// Run by a test below in processes of their own.
#[cfg(unix)]
#[test]
#[ignore = "a helper of the tests with processes"]
fn one_world() {
    use burn_parallel::comm::{ReduceOp, WorldConfig, tcp::Session};
    let Ok(place) = ProcessInfo::from_env() else { return };
    let session = Session::new();
    let world = Rendezvous::at(&place, LONG).and_then(|meeting| session.world(&meeting, WorldConfig::from_env()?));
    match world.and_then(|world| world.all_reduce(vec![1.0f32], ReduceOp::Sum)) {
        Ok(sum) => println!("<sum {sum:?}>"),
        Err(error) => println!("<{error}>"),
    }
}

/// A process that may have so many files open, and raise that so far.
#[cfg(unix)]
fn limited(soft: u64, hard: u64) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(std::env::current_exe().unwrap());
    // SAFETY: between fork and exec only this system call is made.
    unsafe {
        command.pre_exec(move || {
            let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
            if libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        });
    }
    command
}

#[cfg(unix)]
#[test]
fn file_descriptors_are_counted_before_they_run_out() {
    let in_world = |mut command: Command, rank: usize, size: usize, port: u16| {
        command.args(["--exact", "launch::rendezvous::one_world", "--ignored", "--nocapture"]);
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", "0").env("WORLD_SIZE", size.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string()).env("BURN_PARALLEL_SECRET", "s");
        command.stdout(std::process::Stdio::piped()).spawn().unwrap()
    };
    let said = |process: std::process::Child| {
        String::from_utf8_lossy(&process.wait_with_output().unwrap().stdout).into_owned()
    };
    // As far as it can be raised, it is.
    let port = free_port();
    let ranks: Vec<_> = (0..3).map(|rank| in_world(limited(9, 300), rank, 3, port)).collect();
    ranks.into_iter().for_each(|rank| assert_eq!(said(rank).matches("<sum [3.0]>").count(), 1));
    // Where it can't, nobody waits for the others.
    let began = Instant::now();
    let told = said(in_world(limited(50, 100), 0, 400, free_port()));
    for words in ["a world of 400 ranks over TCP takes 804 file descriptors", "RLIMIT_NOFILE", "100", "ulimit -n"] {
        assert!(told.contains(words), "`{words}` is missing in: {told}");
    }
    assert!(began.elapsed() < LONG / 2);
}

/// Run by the test below in a process of its own.
#[cfg(unix)]
#[test]
#[ignore = "a helper of the test with a process"]
fn rank_0_without_descriptors() {
    let Some(port) = std::env::var("MASTER_PORT").ok().and_then(|port| port.parse().ok()) else { return };
    let zero = thread::spawn(move || at(0, 2, port, LONG).all_gather(b"zero"));
    // It listens, and has nothing open of whoever came.
    is_turned_away(port);
    // For a while: what others have open for a moment would be free again.
    let mut open = Vec::new();
    for _ in 0..20 {
        while let Ok(file) = std::fs::File::open("/dev/null") {
            open.push(file);
        }
        thread::sleep(Duration::from_millis(10));
    }
    println!("<full>");
    println!("<{}>", zero.join().unwrap().unwrap_err());
}

#[cfg(unix)]
#[test]
fn a_connection_that_cannot_be_taken_is_no_rank_that_did_not_come() {
    use std::io::BufRead;
    let port = free_port();
    let mut command = limited(64, 64);
    command.args(["--exact", "launch::rendezvous::rank_0_without_descriptors", "--ignored", "--nocapture"]);
    let began = Instant::now();
    let mut zero = command.env("MASTER_PORT", port.to_string()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(zero.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("<full>")));
    let one = thread::spawn(move || at(1, 2, port, Duration::from_secs(2)).all_gather(b"one"));
    let said: Vec<String> = lines.collect();
    let told = said.join("\n");
    for words in ["file descriptors have run out", "Too many open files", "64", "ulimit -n"] {
        assert!(told.contains(words), "`{words}` is missing in: {told}");
    }
    assert!(began.elapsed() < LONG / 2);
    zero.wait().unwrap();
    assert!(one.join().unwrap().is_err());
}

#[test]
fn processes_meet() {
    let (exe, port) = (std::env::current_exe().unwrap(), free_port());
    let ranks: Vec<_> =
        (0..3).map(|rank| one_rank_in(Command::new(&exe), rank, 3, "127.0.0.1", port).spawn().unwrap()).collect();
    for (rank, process) in ranks.into_iter().enumerate() {
        let said = String::from_utf8_lossy(&process.wait_with_output().unwrap().stdout).into_owned();
        assert!(said.contains(&format!("<met {rank} of 3000>")), "{said}");
    }
}
