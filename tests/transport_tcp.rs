//! The transport suite on processes over TCP, and what becomes of ranks that die and connections that break: on this
//! machine, and on hosts in network namespaces where the machine lets us make them; else these are reported as ignored.
#![cfg(unix)]

mod common {
    pub mod failing;
    pub mod ports;
}
#[path = "common/transport_suite/mod.rs"]
mod transport_suite;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use burn_parallel::Error;
use burn_parallel::comm::WorldConfig;
use burn_parallel::comm::tcp::{Rendezvous, Session};
use burn_parallel::comm::{Communicator, ReduceOp};
use burn_parallel::launch::{self, ProcessInfo, Rank};
use burn_parallel::mesh::Mesh;
use libtest_mimic::{Arguments, Failed, Trial};

use crate::common::failing::hide_panics_on_purpose;
use crate::common::ports::free_port;
use crate::transport_suite::{WorldFactory, checks, short_of_memory};

/// A process with this as its first argument is a rank, and the second says what it does.
const RANK: &str = "as-a-rank";
/// How long any scenario may last.
const LIMIT: Duration = Duration::from_secs(60);
/// Begins the line on which a rank says how long its last call took, in milliseconds.
const LASTED: &str = "the last call took ";

fn main() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(RANK) {
        return match arguments.next().as_deref() {
            Some("suite") => suite(),
            Some("kept") => kept(),
            Some("under-way") => under_way(),
            role => one_rank(role.unwrap_or_default()),
        };
    }
    let mut trials = Vec::new();
    let mut trial = |name: String, runs: bool, test: Box<dyn FnOnce() -> Result<(), Failed> + Send>| {
        trials.push(Trial::test(name, test).with_ignored_flag(!runs));
    };
    for size in 1..=4 {
        trial(format!("the_suite_on_{size}_ranks"), true, Box::new(move || the_suite(size)));
    }
    for role in ["error", "panic", "unread"] {
        let words = match role {
            "error" => "<rank 1 failed: the disk is full",
            "panic" => "<rank 1 panicked: on purpose",
            _ => "<well>",
        };
        trial(format!("a_rank_that_ends_{role}"), true, Box::new(move || all_say(role, words)));
    }
    for culprit in 0..3 {
        for (role, name) in [("short", "has_no_memory"), ("short-of-little", "has_no_memory_for_little")] {
            let test = move || all_say(&format!("{role} {culprit}"), "<well>");
            trial(format!("rank_{culprit}_{name}"), cfg!(target_os = "linux"), Box::new(test));
        }
        for role in ["waited-for", "moving", "computing"] {
            let test = move || survivors_say(role, culprit);
            trial(format!("rank_{culprit}_is_killed_{role}"), true, Box::new(test));
        }
    }
    trial("a_communicator_outlives_its_session".into(), true, Box::new(|| all_say("kept", "<ended in time>")));
    trial(
        "a_session_ends_after_what_is_under_way".into(),
        true,
        Box::new(|| all_say("under-way", "<came to its end>")),
    );
    trial("a_rank_that_never_ends".into(), true, Box::new(a_rank_that_never_ends));
    trial("broken_connections".into(), true, Box::new(broken_connections));
    let hosts = Hosts::possible();
    if !hosts {
        println!(
            "what needs hosts is ignored: this machine does not let us make network namespaces (root and iproute2)"
        );
    }
    trial("ranks_on_hosts".into(), hosts, Box::new(ranks_on_hosts));
    trial("hosts_that_are_cut_off".into(), hosts, Box::new(hosts_that_are_cut_off));
    // Their processes wait more than they compute.
    let arguments = Arguments::from_args();
    let arguments = Arguments { test_threads: arguments.test_threads.or(Some(4)), ..arguments };
    let conclusion = libtest_mimic::run(&arguments, trials);
    // These measure how long an error takes, so nothing runs beside them that computes all the time.
    let timed = (0..3).flat_map(|culprit| ["stopped", "stopped-moving"].map(|role| (culprit, role)));
    let timed = timed.map(|(culprit, role)| {
        Trial::test(format!("rank_{culprit}_is_{role}"), move || all_name_the_stopped(role, culprit))
    });
    let of_four = [("mesh-stopped", 0), ("mesh-stopped", 3), ("stopped-moving", 1), ("mesh-computing", 2)];
    let of_four = of_four.map(|(role, culprit)| {
        Trial::test(format!("rank_{culprit}_of_4_is_{role}"), move || all_name_the_root(role, culprit))
    });
    let timed = libtest_mimic::run(&arguments, timed.chain(of_four).collect());
    conclusion.exit_if_failed();
    timed.exit();
}

struct Tcp(Session, ProcessInfo);

impl WorldFactory for Tcp {
    fn world(&self, timeout: Duration) -> Communicator {
        let meeting = Rendezvous::at(&self.1, LIMIT).unwrap();
        self.0.world(&meeting, WorldConfig::from_env().unwrap().with_timeout(timeout)).unwrap()
    }
}

/// One rank of the suite.
fn suite() {
    hide_panics_on_purpose();
    let factory = Tcp(Session::new(), ProcessInfo::from_env().unwrap());
    let count = transport_suite::run(&factory, &|name| eprintln!("{name}"));
    println!("<{count} checks>");
}

fn kill_itself() {
    // SAFETY: no memory is involved.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
}

fn stop_itself() {
    // SAFETY: no memory is involved.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// Drops its session while something still holds a communicator.
fn kept() {
    let factory = Tcp(Session::new(), ProcessInfo::from_env().unwrap());
    let world = factory.world(LIMIT);
    world.barrier().unwrap();
    let kept = world.clone();
    drop(world);
    let began = Instant::now();
    drop(factory);
    let error = kept.all_reduce(vec![1.0f32], ReduceOp::Sum).unwrap_err().to_string();
    assert!(error.contains("the session of rank"), "{error}");
    if began.elapsed() < Duration::from_secs(10) {
        println!("<ended in time>");
    }
}

/// Drops its session while a collective is under way in the background, for which the others come late.
fn under_way() {
    let factory = Tcp(Session::new(), ProcessInfo::from_env().unwrap());
    let world = factory.world(LIMIT);
    thread::sleep(Duration::from_millis(300 * world.rank() as u64));
    let sum = world.start(|comm| comm.all_reduce(vec![1.0f32; 100_000], ReduceOp::Sum));
    drop(world);
    let sum = thread::spawn(move || sum.wait());
    thread::sleep(Duration::from_millis(20));
    drop(factory);
    assert_eq!(sum.join().unwrap().unwrap(), [3.0; 100_000]);
    println!("<came to its end>");
}

/// Ends all connections of this process, as a network that breaks would.
fn cut_itself_off() {
    for fd in 0..1024 {
        // SAFETY: what is not an open socket is refused.
        unsafe { libc::shutdown(fd, libc::SHUT_RDWR) };
    }
}

/// One rank of a world in which something happens to the rank that the role names.
fn one_rank(role: &str) {
    let (role, culprit) = role.split_once(' ').map_or((role, 1), |(role, rank)| (role, rank.parse().unwrap()));
    let outcome = launch::from_env().unwrap().run(|rank| {
        rank.barrier()?;
        match role {
            "short" => return short_of_memory::for_large(&rank, culprit),
            "short-of-little" => return short_of_memory::for_little(&rank, culprit),
            _ => {}
        }
        if role.starts_with("mesh-") {
            return in_turn(&rank, culprit, role);
        }
        let part = rank.split_named("part", 0, 0)?;
        part.all_reduce(vec![1.0f32; 7], ReduceOp::Sum)?;
        if role == "computing" {
            // The others may still be in the collective that the culprit is done with.
            match rank.rank() == culprit {
                true => (0..rank.size())
                    .filter(|other| *other != culprit)
                    .try_for_each(|other| rank.recv::<Vec<u8>>(other, 6).map(drop))?,
                false => rank.send(vec![1u8], culprit, 6)?,
            }
        }
        let culprit = rank.rank() == culprit;
        match (role, culprit) {
            ("error", true) => return Err(Error::user("the disk is full")),
            ("panic", true) => panic!("on purpose"),
            ("waited-for", true) => {
                thread::sleep(Duration::from_millis(50));
                kill_itself();
            }
            ("moving", true) => {
                thread::spawn(|| {
                    thread::sleep(Duration::from_millis(300));
                    kill_itself();
                });
            }
            ("computing", true) => {
                // Or in the call that told it.
                thread::sleep(Duration::from_millis(200));
                kill_itself();
            }
            ("stopped", true) => stop_itself(),
            ("stopped-moving", true) => {
                thread::spawn(|| {
                    thread::sleep(Duration::from_millis(300));
                    stop_itself();
                });
            }
            ("endless", true) => loop {
                thread::sleep(Duration::from_secs(1));
            },
            ("endless", false) => return Ok(()),
            ("broken", true) => cut_itself_off(),
            // Nobody receives it, and nobody waits for it.
            ("unread", true) => rank.send(vec![0u8; 1 << 22], 0, 5)?,
            // Its machine is cut off meanwhile.
            ("cut", _) => println!("<ready>"),
            _ => {}
        }
        match role {
            "unread" => rank.barrier(),
            "hosts" => {
                checks::sums_that_everybody_knows(&rank)?;
                checks::tags_are_independent_and_in_order(&rank)?;
                checks::large(&rank)?;
                checks::groups_of_groups(&rank)
            }
            "moving" | "cut" | "stopped-moving" => loop {
                timed(|| rank.all_reduce(vec![1.0f32; 2_000_000], ReduceOp::Sum))?;
            },
            "stopped" => {
                timed(|| rank.all_reduce(vec![1.0f32; 1000], ReduceOp::Sum))?;
                // The one that was stopped may find all of it there that it needs, and the reason why the others ended
                // behind it: then its next call says so.
                rank.barrier()
            }
            "computing" => {
                let began = Instant::now();
                while rank.failure().is_none() && began.elapsed() < LIMIT {
                    thread::sleep(Duration::from_millis(1));
                }
                rank.barrier()
            }
            _ => rank.all_reduce(vec![1.0f32; 1000], ReduceOp::Sum).map(drop),
        }
    });
    println!("<{}>", outcome.map_or_else(|error| error.to_string(), |()| "well".into()).replace("\n ", " "));
}

/// Says how long a call takes that fails.
fn timed<T>(call: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let began = Instant::now();
    call().inspect_err(|_| println!("{LASTED}{}", began.elapsed().as_millis()))
}

/// Ranks of a mesh meet along one axis, then along the other, so that they wait for ranks that wait themselves.
fn in_turn(world: &Rank, culprit: usize, role: &str) -> Result<(), Error> {
    let mesh = Mesh::new(world, [("dp", 2), ("tp", 2)])?;
    for round in 0..1000 {
        match (role, world.rank() == culprit && round == 3) {
            ("mesh-stopped", true) => stop_itself(),
            ("mesh-computing", true) => thread::sleep(Duration::from_secs(8)),
            _ => {}
        }
        for axis in ["tp", "dp"] {
            let axis = mesh.axis(axis)?;
            timed(|| axis.all_reduce(vec![1.0f32; 100], ReduceOp::Sum))?;
        }
    }
    Ok(())
}

/// A process, and what it has said that was read.
struct OneRank {
    child: Child,
    stdout: BufReader<ChildStdout>,
    said: String,
}

/// Processes that are ended if the test fails.
struct Ranks(Vec<OneRank>);

impl Drop for Ranks {
    fn drop(&mut self) {
        self.0.iter_mut().for_each(|rank| {
            let _ = rank.child.kill().and_then(|()| rank.child.wait().map(drop));
        });
    }
}

/// What a rank says of its end, and in how many milliseconds its last call failed.
fn end_and_time(said: &str) -> (String, Option<u64>) {
    let (times, rest): (Vec<&str>, Vec<&str>) = said.lines().partition(|line| line.starts_with(LASTED));
    (rest.join("\n"), times.last().and_then(|line| line[LASTED.len()..].parse().ok()))
}

impl Ranks {
    /// Starts ranks with what `wrap` puts before the program, and the rank's number on its machine.
    fn start(
        role: &str,
        size: usize,
        at: (&str, u16),
        timeout: &str,
        wrap: impl Fn(usize) -> (Command, usize),
    ) -> Self {
        let start = |rank: usize| {
            let (mut command, local_rank) = wrap(rank);
            command.args([RANK, role]);
            command.env("RANK", rank.to_string()).env("WORLD_SIZE", size.to_string());
            let local_size = if at.0 == "127.0.0.1" { size } else { size / 2 };
            command.env("LOCAL_RANK", local_rank.to_string()).env("LOCAL_WORLD_SIZE", local_size.to_string());
            command.env("BURN_PARALLEL_SECRET", "nobody knows");
            command.env("MASTER_ADDR", at.0).env("MASTER_PORT", at.1.to_string());
            command.env("BURN_PARALLEL_TIMEOUT_S", timeout).stdout(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let stdout = BufReader::new(child.stdout.take().unwrap());
            OneRank { child, stdout, said: String::new() }
        };
        Self((0..size).map(start).collect())
    }

    fn here(role: &str, size: usize) -> Self {
        Self::here_within(role, size, "60")
    }

    fn here_within(role: &str, size: usize, timeout: &str) -> Self {
        let port = free_port();
        let exe = std::env::current_exe().unwrap();
        Self::start(role, size, ("127.0.0.1", port), timeout, |rank| (Command::new(&exe), rank))
    }

    /// What each said in the end. All must end in time.
    fn end(mut self) -> Result<Vec<String>, Failed> {
        self.await_others(self.0.len())?;
        let said = |rank: &mut OneRank| {
            let mut bytes = Vec::new();
            rank.stdout.read_to_end(&mut bytes).unwrap();
            std::mem::take(&mut rank.said) + &String::from_utf8_lossy(&bytes)
        };
        Ok(self.0.iter_mut().map(said).collect())
    }

    /// Waits until all say this.
    fn await_words(&mut self, words: &str) -> Result<(), Failed> {
        for rank in &mut self.0 {
            while !rank.said.contains(words) {
                if rank.stdout.read_line(&mut rank.said)? == 0 {
                    return Err(format!("`{words}` does not come: {}", rank.said).into());
                }
            }
        }
        Ok(())
    }

    /// Waits until all but one have ended.
    fn await_others(&mut self, one: usize) -> Result<(), Failed> {
        let began = Instant::now();
        while self.0.iter_mut().enumerate().any(|(rank, it)| rank != one && it.child.try_wait().unwrap().is_none()) {
            // Far beyond every time-out of the ranks: a busy machine takes some minutes for the suite.
            if began.elapsed() > 10 * LIMIT {
                return Err("ranks did not end".into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

fn the_suite(size: usize) -> Result<(), Failed> {
    counted(Ranks::here("suite", size).end()?, size)
}

fn counted(said: Vec<String>, size: usize) -> Result<(), Failed> {
    let count = if size == 1 { "<13 checks>" } else { "<21 checks>" };
    match said.iter().all(|said| said.contains(count)) {
        true => Ok(()),
        false => Err(format!("{said:?}").into()),
    }
}

fn all_say(role: &str, words: &str) -> Result<(), Failed> {
    let said = Ranks::here(role, 3).end()?;
    match said.iter().all(|said| said.contains(words)) {
        true => Ok(()),
        false => Err(format!("{said:?}").into()),
    }
}

/// A rank is killed: at once the others return the same error, which names it.
fn survivors_say(role: &str, culprit: usize) -> Result<(), Failed> {
    let began = Instant::now();
    let said = Ranks::here(&format!("{role} {culprit}"), 3).end()?;
    let said: Vec<String> = said.iter().map(|said| end_and_time(said).0).collect();
    let survivors: Vec<&String> =
        said.iter().enumerate().filter(|(rank, _)| *rank != culprit).map(|(_, said)| said).collect();
    let words = match role {
        // Only the watchdogs notice.
        "computing" => {
            format!("<rank {culprit} left group `world` while nobody was waiting for it: its process has ended")
        }
        _ => format!("<rank {culprit} left group `world` while "),
    };
    // Where the ranks were at work, not only where groups were made.
    let part = "in `world/part0` rank ";
    let good = said[culprit].is_empty()
        && survivors.iter().all(|said| said.contains(&words) && *said == survivors[0])
        && survivors[0].contains(&format!("rank {culprit}: no answer"))
        && (role != "computing" || survivors[0].contains(part) && survivors[0].contains("all_reduce(Sum) of F32 [7]"))
        && began.elapsed() < Duration::from_secs(20);
    if good { Ok(()) } else { Err(format!("after {:?}: {said:#?}", began.elapsed()).into()) }
}

/// A rank is stopped: the others name it within half the time-out beyond the time-out, all in the same words.
/// Continued, it says what they say; where its connections were full of data, their words may not have come through
/// before they ended, and it says so in words of its own, with itself as the culprit.
fn all_name_the_stopped(role: &str, culprit: usize) -> Result<(), Failed> {
    let (said, took) = when_stopped(role, culprit, 3)?;
    let others: Vec<&String> =
        said.iter().enumerate().filter(|(rank, _)| *rank != culprit).map(|(_, text)| text).collect();
    let itself = format!(" for itself: the process of rank {culprit} of the world did not run for that long");
    let cut_off = role == "stopped-moving" && said[culprit].contains(&itself);
    let good = others.iter().all(|text| *text == others[0])
        && (said[culprit] == *others[0] || cut_off)
        && said.iter().all(|text| text.contains("<time-out in group `world`"))
        && said.iter().all(|text| text.contains(&format!("rank {culprit}")))
        && others[0].contains(&format!("rank {culprit}: no answer"))
        // A busy machine takes a while for all of that.
        && took < Duration::from_secs(6 + 2);
    if good { Ok(()) } else { Err(format!("after {took:?}: {said:#?}").into()) }
}

/// What all ranks say in the end when this happens to one of them, whose process goes on when the others have ended;
/// and in what time their last calls have failed.
fn when_stopped(role: &str, culprit: usize, size: usize) -> Result<(Vec<String>, Duration), Failed> {
    let mut ranks = Ranks::here_within(&format!("{role} {culprit}"), size, "4");
    ranks.await_others(culprit)?;
    // SAFETY: no memory is involved. The process is a child that has not been waited for.
    unsafe { libc::kill(ranks.0[culprit].child.id() as i32, libc::SIGCONT) };
    let (said, times): (Vec<String>, Vec<Option<u64>>) = ranks.end()?.iter().map(|said| end_and_time(said)).unzip();
    let others = times.iter().enumerate().filter(|(rank, _)| *rank != culprit);
    let slowest =
        others.map(|(_, time)| time.ok_or("a rank's last call did not fail")).collect::<Result<Vec<_>, _>>()?;
    Ok((said, Duration::from_millis(slowest.into_iter().max().unwrap_or(0))))
}

/// A rank is stopped, or computes for too long, and the others wait for each other behind it: they name it before any
/// other, by its number in the world.
fn all_name_the_root(role: &str, culprit: usize) -> Result<(), Failed> {
    let (said, took) = when_stopped(role, culprit, 4)?;
    let others: Vec<&String> =
        said.iter().enumerate().filter(|(rank, _)| *rank != culprit).map(|(_, text)| text).collect();
    let why = if role == "mesh-computing" { "is in no call" } else { "gives no answer" };
    let named = format!(" for rank {culprit} of the world, which {why}");
    let headline = others[0].split("; raise").next().unwrap_or_default();
    let good = others.iter().all(|text| *text == others[0] && text.contains("<time-out in group `world"))
        && (headline.contains(&named)
            || role == "stopped-moving" && headline.ends_with(&format!(" for rank {culprit}")))
        && took < Duration::from_secs(6 + 3);
    if good { Ok(()) } else { Err(format!("after {took:?}: {said:#?}").into()) }
}

/// The others end after the time-out at the latest, and nobody misses them.
fn a_rank_that_never_ends() -> Result<(), Failed> {
    let mut ranks = Ranks::here_within("endless", 3, "3");
    let began = Instant::now();
    ranks.await_others(1)?;
    let took = began.elapsed();
    ranks.0[1].child.kill()?;
    let said = ranks.end()?;
    let good = said[0].contains("<well>") && said[2].contains("<well>") && took < Duration::from_secs(10);
    if good { Ok(()) } else { Err(format!("after {took:?}: {said:#?}").into()) }
}

/// Rank 1's connections break: it misses the others, and they miss it.
fn broken_connections() -> Result<(), Failed> {
    let said = Ranks::here("broken", 3).end()?;
    let good = said[1].contains("<rank 0 left group") || said[1].contains("<rank 2 left group");
    let good = good && said[0].contains("<rank 1 left group `world`") && said[0] == said[2];
    if good { Ok(()) } else { Err(format!("{said:#?}").into()) }
}

/// Two hosts, joined by a cable, gone when the test ends. One pair at a time.
struct Hosts(u32, #[expect(dead_code, reason = "held")] MutexGuard<'static, ()>);

impl Hosts {
    fn possible() -> bool {
        Self::new().is_some()
    }

    fn new() -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let hosts = Self(std::process::id() % 100_000, turn);
        let id = hosts.0;
        for host in 0..2 {
            ip(&format!("netns add bp{id}-{host}"))?;
            ip(&format!("-n bp{id}-{host} link set lo up"))?;
        }
        ip(&format!("-n bp{id}-0 link add eth0 type veth peer name eth0 netns bp{id}-1"))?;
        for host in 0..2 {
            ip(&format!("-n bp{id}-{host} addr add 10.213.8.{}/24 dev eth0", host + 1))?;
            ip(&format!("-n bp{id}-{host} link set eth0 up"))?;
        }
        Some(hosts)
    }

    /// Four ranks, two on each host.
    fn start(&self, role: &str, timeout: &str) -> Ranks {
        let exe = std::env::current_exe().unwrap();
        Ranks::start(role, 4, ("10.213.8.1", 29_511), timeout, |rank| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &format!("bp{}-{}", self.0, rank / 2)]).arg(&exe);
            (command, rank % 2)
        })
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        (0..2).for_each(|host| {
            ip(&format!("netns del bp{}-{host}", self.0));
        });
    }
}

fn ip(arguments: &str) -> Option<()> {
    let done = Command::new("ip").args(arguments.split(' ')).stderr(Stdio::null()).status().ok()?;
    done.success().then_some(())
}

fn ranks_on_hosts() -> Result<(), Failed> {
    let hosts = Hosts::new().ok_or("no hosts")?;
    let said = hosts.start("hosts", "60").end()?;
    if said.iter().all(|said| said.contains("<well>")) { Ok(()) } else { Err(format!("{said:#?}").into()) }
}

/// The cable is pulled while data moves: on both sides all return an error, in time.
fn hosts_that_are_cut_off() -> Result<(), Failed> {
    let hosts = Hosts::new().ok_or("no hosts")?;
    let mut ranks = hosts.start("cut", "3");
    ranks.await_words("<ready>")?;
    thread::sleep(Duration::from_millis(300));
    ip(&format!("-n bp{}-1 link set eth0 down", hosts.0)).ok_or("the cable can't be pulled")?;
    let said = ranks.end()?;
    let good = said.iter().all(|said| {
        said.contains("<ready>") && (said.contains("<time-out in group") || said.contains("left group `world`"))
    });
    if good { Ok(()) } else { Err(format!("{said:#?}").into()) }
}
