//! Ranks that meet over TCP, and whoever else comes along.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use burn_parallel::Error;
use burn_parallel::launch::{Place, Rendezvous};

/// A time-out that no test waits for.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(600);
const SECRET: &[u8] = b"nobody knows";

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

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

#[track_caller]
fn says<T: std::fmt::Debug>(result: &Result<T, Error>, words: &[&str]) {
    let message = result.as_ref().expect_err("it must fail").to_string();
    words.iter().for_each(|word| assert!(message.contains(word), "`{word}` is missing in: {message}"));
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
    says(
        &results[0],
        &["ranks 1, 3 of 4 did not come", &format!("127.0.0.1:{port}"), "600.0ms", "BURN_PARALLEL_TIMEOUT_S"],
    );
    // The one that came is told at once.
    assert_eq!(results[1].as_ref().unwrap_err(), results[0].as_ref().unwrap_err());
    says(&meet(vec![at(0, 2, free_port(), SHORT)])[0], &["rank 1 of 2 did not come"]);
    says(
        &at(1, 2, free_port(), SHORT).all_gather(&[]),
        &["rank 1 could not meet rank 0", "is rank 0 running", "BURN_PARALLEL_TIMEOUT_S"],
    );
}

#[test]
fn an_address_in_use() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let began = Instant::now();
    says(&at(0, 2, port, LONG).all_gather(&[]), &[&format!("127.0.0.1:{port} is in use"), "MASTER_PORT"]);
    assert!(began.elapsed() < LONG / 2);
    let elsewhere = Rendezvous::new(0, 2, "192.0.2.1", 1, SECRET, LONG);
    says(&elsewhere.all_gather(&[]), &["cannot listen at 192.0.2.1:1", "MASTER_ADDR"]);
}

#[test]
fn another_secret() {
    let port = free_port();
    let stranger = Rendezvous::new(1, 2, "127.0.0.1", port, b"something else", LONG);
    let results = meet(vec![at(0, 2, port, SHORT), stranger]);
    says(&results[0], &["rank 1 of 2 did not come", "had another secret: 1"]);
    says(&results[1], &["do not share a secret", "BURN_PARALLEL_SECRET"]);
    // The right one still gets in after it.
    let port = free_port();
    let zero = thread::spawn(move || at(0, 2, port, LONG).all_gather(b"zero"));
    says(&Rendezvous::new(1, 2, "127.0.0.1", port, b"wrong", LONG).all_gather(b"bad"), &["secret"]);
    assert_eq!(at(1, 2, port, LONG).all_gather(b"one").unwrap(), [b"zero".to_vec(), b"one".to_vec()]);
    assert_eq!(zero.join().unwrap().unwrap(), [b"zero".to_vec(), b"one".to_vec()]);
}

#[test]
fn ranks_that_contradict_each_other() {
    let port = free_port();
    // Rank 2 never comes, so that the second rank 1 does not come too late.
    let results = meet(vec![at(0, 3, port, LONG), at(1, 3, port, LONG), at(1, 3, port, LONG)]);
    results.iter().for_each(|result| says(result, &["two processes say that they are rank 1 of 3"]));
    let port = free_port();
    let results = meet(vec![at(0, 3, port, LONG), at(1, 2, port, LONG)]);
    results.iter().for_each(|result| says(result, &["rank 1 is of a world of 2 ranks, rank 0 of one of 3"]));
    says(&at(3, 3, port, LONG).all_gather(&[]), &["rank 3 does not exist in a world of 3"]);
    says(&at(1, 2, port, LONG).all_gather(&vec![0; (1 << 20) + 1]), &["1048577 bytes"]);
}

/// Whatever strangers send, those who belong together meet.
#[test]
fn garbage_of_strangers_does_no_harm() {
    let port = free_port();
    let zero = thread::spawn(move || at(0, 2, port, LONG).all_gather(b"zero"));
    let connect = || loop {
        if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) {
            break stream;
        }
        thread::sleep(Duration::from_millis(5));
    };
    let mut held = Vec::new();
    let claim = |len: u64| {
        let numbers = [1u64, 2, len].map(u64::to_le_bytes).concat();
        [&b"burnpar1"[..], &[7; 32], &numbers, &[9; 64]].concat()
    };
    let says = [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 5000], vec![0xff; 200], claim(32), claim(u64::MAX), vec![]];
    for bytes in says {
        let mut stream = connect();
        let _ = stream.write_all(&bytes);
        held.push(stream);
        drop(connect());
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
            let _ = stream.write_all(&[&b"burnpar1"[..], &[0; 32], &word].concat());
        }
    });
    says(&at(1, 2, port, LONG).all_gather(&[]), &["do not share a secret"]);
}

/// Run by the tests below in processes of their own.
#[test]
#[ignore = "a helper of the tests with processes"]
fn one_rank() {
    let Ok(place) = Place::from_env() else { return };
    let met = Rendezvous::at(&place, LONG).and_then(|meeting| meeting.all_gather(&blob(place.rank)));
    match met {
        Ok(blobs) => println!("<met {} of {}>", place.rank, blobs.iter().map(Vec::len).sum::<usize>()),
        Err(error) => println!("<{error}>"),
    }
}

fn one_rank_in(mut command: Command, rank: usize, size: usize, address: &str, port: u16) -> Command {
    command.args(["--exact", "rendezvous::one_rank", "--ignored", "--nocapture"]);
    command.env("RANK", rank.to_string()).env("LOCAL_RANK", "0").env("WORLD_SIZE", size.to_string());
    command.env("MASTER_ADDR", address).env("MASTER_PORT", port.to_string()).env("BURN_PARALLEL_SECRET", "s");
    command.stdout(std::process::Stdio::piped());
    command
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
