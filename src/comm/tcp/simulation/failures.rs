//! Tests with processes that are stopped, killed, or do not end.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use super::network::Random;
use super::schedule::ProcessEvent;
use super::scripts::conditions;
use super::{RankContext, SimulatedWorld};
use crate::Error;
use crate::comm::{Communicator, ReduceOp};

const TIMEOUT: Duration = Duration::from_secs(5);
const SECOND: u64 = 1_000_000_000;
/// Schedules of each test. More of them find no more, as far as was tried.
const SEEDS: u64 = 60;

/// What a rank returned, and when.
type Outcomes = Rc<RefCell<Vec<(usize, Option<Error>, u64)>>>;

/// A world in which all ranks go from collective to collective until one fails. If it is `full`, connections take less
/// than what a collective puts into them.
fn busy(size: usize, random: &mut Random, full: bool) -> (SimulatedWorld, Outcomes) {
    let mut conditions = conditions(random);
    // Control messages are eager, as they are in truth: a rank that has gone can answer no CTS.
    (conditions.limits.eager, conditions.limits.credit) = (16 << 10, 256 << 10);
    conditions.capacity = if full { random.pick(&[300, 600, 1500]) } else { 1 << 20 };
    let bytes = if full { size * (5000 + random.below(3000)) } else { random.below(4 * conditions.limits.turn) };
    let (simulation, outcomes) = (SimulatedWorld::new(size, conditions, random.clone()), Outcomes::default());
    for rank in 0..size {
        let outcomes = outcomes.clone();
        simulation.rank(rank, TIMEOUT, move |comm, context| {
            let error = until_it_fails(&comm, &context, bytes).err();
            outcomes.borrow_mut().push((rank, error, context.now()));
        });
    }
    (simulation, outcomes)
}

fn until_it_fails(comm: &Communicator, context: &RankContext, bytes: usize) -> Result<(), Error> {
    let half = comm.split_named("half", comm.rank() as u64 % 2, 0)?;
    loop {
        comm.all_reduce(vec![1u8; bytes], ReduceOp::Max)?;
        half.all_gather(vec![1u8; bytes])?;
        context.compute(100_000);
    }
}

/// All of these return the same error, by then.
#[track_caller]
fn same_error(outcomes: &Outcomes, ranks: &[usize], by: u64, about: &str) -> Error {
    let outcomes = outcomes.borrow();
    let first = outcomes.iter().find(|(rank, ..)| *rank == ranks[0]).unwrap_or_else(|| panic!("{about}: no outcome"));
    let first = first.1.clone().unwrap_or_else(|| panic!("{about}: no error"));
    for rank in ranks {
        let (_, error, at) = outcomes.iter().find(|(other, ..)| other == rank).expect("an outcome of every rank");
        assert_eq!(error.as_ref(), Some(&first), "{about}: ranks {} and {rank}", ranks[0]);
        assert!(*at <= by, "{about}: rank {rank} came back after {:.1} s", *at as f64 / SECOND as f64);
    }
    first
}

/// Whether a text names a rank by its number in the world, whatever the group.
fn names(text: &str, rank: usize) -> bool {
    text.split(|c: char| !c.is_ascii_digit()).any(|number| number == rank.to_string())
}

/// A busy world in which something has happened to one rank, and which has ended.
struct Disturbed {
    culprit: usize,
    others: Vec<usize>,
    /// When it happened.
    at: u64,
    simulation: SimulatedWorld,
    outcomes: Outcomes,
    about: String,
}

impl Disturbed {
    fn run(seed: u64, full: bool, event: impl FnOnce(usize, u64) -> ProcessEvent) -> Self {
        let mut random = Random(seed);
        let size = 2 + random.below(7);
        // Rank 0 is group root and coordinator: it is the one that matters most.
        let culprit = if random.one_in(2) { 0 } else { random.below(size) };
        let (mut simulation, outcomes) = busy(size, &mut random, full);
        // It takes a moment until connections are full.
        let at = if full { 10_000_000 } else { 1_000_000 } + random.below(40_000_000) as u64;
        simulation.at(at, event(culprit, at));
        let about = format!("seed {seed}, rank {culprit} of {size}");
        assert!(simulation.run(), "{about}: it does not end");
        let others = (0..size).filter(|rank| *rank != culprit).collect();
        Self { culprit, others, at, simulation, outcomes, about }
    }

    /// The error that these ranks return, all the same, so many nanoseconds after it happened at most.
    #[track_caller]
    fn error(&self, ranks: &[usize], within: u64) -> Error {
        same_error(&self.outcomes, ranks, self.at + within, &self.about)
    }
}

/// For how long a rank is stopped: long enough for the others to give it up.
const STOPPED: u64 = 15 * SECOND;
/// When the others have given it up: after one and a half time-outs.
const GIVEN_UP: u64 = 15 * SECOND / 2;

fn stop(culprit: usize, at: u64) -> ProcessEvent {
    ProcessEvent::Stop(culprit, at + STOPPED)
}

#[test]
fn a_rank_that_is_stopped_is_named_in_time_and_blames_nobody() {
    for seed in 0..SEEDS {
        let world = Disturbed::run(seed, false, stop);
        let Disturbed { culprit, about, others, .. } = &world;
        let error = world.error(others, GIVEN_UP);
        let Error::Timeout { group, missing, log, .. } = &error else { panic!("{about}: {error}") };
        assert!(
            names(missing, *culprit) && (group.as_ref() == "world" || missing.contains("of the world")),
            "{about}: {error}"
        );
        let in_group = if group.as_ref() == "world" { *culprit } else { culprit / 2 };
        assert!(
            log.lines().iter().any(|line| line.ends_with(&format!("rank {culprit}: no answer")))
                || log.lines().iter().any(|line| line.contains(&format!("rank {in_group}: no answer"))),
            "{about}: {error}"
        );
        // It learns what happened to the others, and returns the same error.
        world.error(&[others[0], *culprit], STOPPED + SECOND);
        // All have left by then, too.
        let mut ends = world.simulation.ends().into_iter();
        let late = ends.find(|(rank, end)| rank != culprit && *end > world.at + GIVEN_UP);
        assert!(late.is_none(), "{about}: {late:?}");
    }
}

/// The others' words cannot reach a rank whose connections were full when it was stopped.
#[test]
fn a_rank_that_is_stopped_behind_full_connections_names_itself() {
    for seed in 0..SEEDS / 3 {
        let world = Disturbed::run(seed, true, stop);
        let Disturbed { culprit, about, .. } = &world;
        let error = world.error(&world.others, GIVEN_UP);
        assert!(matches!(&error, Error::Timeout { missing, .. } if names(missing, *culprit)), "{about}: {error}");
        let own = world.error(&[*culprit], STOPPED + SECOND);
        assert!(matches!(&own, Error::Timeout { missing, .. } if names(missing, *culprit)), "{about}: {own}");
    }
}

#[test]
fn a_rank_that_is_killed_is_named_at_once() {
    for seed in 0..SEEDS {
        let world = Disturbed::run(seed, false, |culprit, _| ProcessEvent::Kill(culprit));
        let error = world.error(&world.others, 3 * SECOND);
        assert!(matches!(&error, Error::RankLost { rank, .. } if *rank == world.culprit), "{}: {error}", world.about);
    }
}

/// A rank that computes for ever keeps no other from ending.
#[test]
fn a_world_is_over_when_one_rank_never_ends() {
    for seed in 0..50u64 {
        let mut random = Random(seed);
        let size = 2 + random.below(7);
        let endless = random.below(size);
        let conditions = conditions(&mut random);
        let mut simulation = SimulatedWorld::new(size, conditions, random);
        let outcomes = Outcomes::default();
        for rank in 0..size {
            let outcomes = outcomes.clone();
            simulation.rank(rank, TIMEOUT, move |comm, context| {
                let error = comm.barrier().err();
                if rank == endless {
                    context.compute(60 * SECOND);
                }
                outcomes.borrow_mut().push((rank, error, context.now()));
            });
        }
        assert!(simulation.run(), "seed {seed}: it does not end");
        assert!(outcomes.borrow().iter().all(|(_, error, _)| error.is_none()), "seed {seed}: {:?}", outcomes.borrow());
        for (rank, end) in simulation.ends() {
            let most = if rank == endless { 61 * SECOND } else { 6 * SECOND };
            assert!(end <= most, "seed {seed}: rank {rank} of {size} ended after {:.1} s", end as f64 / SECOND as f64);
        }
    }
}

/// Rank 0 has left for good when the others fail: another rank coordinates.
#[test]
fn another_rank_coordinates_after_rank_0_has_left() {
    for seed in 0..20u64 {
        let mut random = Random(seed);
        let size = 3 + random.below(6);
        let conditions = conditions(&mut random);
        let mut simulation = SimulatedWorld::new(size, conditions, random);
        let outcomes = Outcomes::default();
        for rank in 0..size {
            let outcomes = outcomes.clone();
            simulation.rank(rank, TIMEOUT, move |comm, context| {
                let late = rank == size - 1;
                let error = without_rank_0(&comm, &context, late).err();
                outcomes.borrow_mut().push((rank, error, context.now()));
            });
        }
        assert!(simulation.run(), "seed {seed}: it does not end");
        let (about, waiting) = (format!("seed {seed}, {size} ranks"), (1..size - 1).collect::<Vec<_>>());
        let error = same_error(&outcomes, &waiting, 12 * SECOND + 15 * SECOND / 2, &about);
        let Error::Timeout { missing, .. } = &error else { panic!("{about}: {error}") };
        assert_eq!(*missing, format!("rank {} of the world, which is in no call", size - 1), "{about}");
        same_error(&outcomes, &[1, size - 1], 41 * SECOND, &about);
        assert!(simulation.ends().iter().any(|(rank, end)| *rank == 0 && *end < 6 * SECOND), "{about}");
    }
}

fn without_rank_0(comm: &Communicator, context: &RankContext, late: bool) -> Result<(), Error> {
    let part = comm.split(u64::from(comm.rank() == 0), 0)?;
    if comm.rank() == 0 {
        return Ok(());
    }
    for _ in 0..11 {
        context.compute(SECOND);
        part.barrier()?;
    }
    if late {
        context.compute(25 * SECOND);
    }
    part.barrier()
}
