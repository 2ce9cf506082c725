//! Tests with collectives and messages of all sizes, on groups that run ahead of each other.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::network::Random;
use super::operations::{GroupOperation, KINDS, perform};
use super::{Conditions, RankContext, SimulatedWorld};
use crate::Error;
use crate::comm::Communicator;
use crate::comm::message_passing::Thresholds;
use crate::comm::message_passing::message_store::MessageStore;
use crate::comm::tcp::frame::Limits;

/// Longer than anything takes, in the time of the simulation.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Most bytes of an operation, over all ranks.
const MOST: usize = 96 << 10;

/// Sizes for a schedule.
pub(super) fn conditions(random: &mut Random) -> Conditions {
    let data = random.pick(&[40, 64, 100, 256]);
    let eager = random.pick(&[16, 32, 64, 120]);
    // The capacity holds a few data frames, as a socket's buffers do; a turn is several frames, as it is in truth.
    let limits = Limits {
        eager,
        credit: eager * random.pick(&[1, 2, 4, 32]),
        data,
        turn: data * random.pick(&[1, 2, 8]),
        staging: random.pick(&[24, 40, 64, 256]),
    };
    let thresholds = Thresholds {
        window: 8 * random.pick(&[4, 16, 64]),
        broadcast: random.pick(&[16, 64, 256]),
        inline: random.pick(&[8, 32, 128]),
    };
    Conditions {
        limits,
        thresholds,
        capacity: random.pick(&[64, 300, 2000, 20_000]),
        late: random.pick(&[2, 10, 1000]),
        short: random.pick(&[2, 5, 1000]),
    }
}

/// A number of bytes at one of the thresholds, a little beside it, or anywhere.
fn bytes(random: &mut Random, conditions: &Conditions, ranks: usize) -> usize {
    let (limits, thresholds) = (conditions.limits, conditions.thresholds);
    let near = random.pick(&[
        limits.eager,
        limits.data,
        limits.staging,
        limits.turn,
        limits.credit,
        thresholds.window,
        thresholds.window * ranks,
        thresholds.broadcast,
        thresholds.inline,
        conditions.capacity,
    ]);
    let times = random.pick(&[1, 1, 1, 2, 3]);
    let bytes = match random.below(8) {
        0 => random.below(20),
        1 => random.below(4 * limits.turn),
        2 => (near * times).saturating_sub(random.below(30)),
        _ => near * times + random.below(10),
    };
    bytes.min(MOST / ranks)
}

fn steps(random: &mut Random, conditions: &Conditions, ranks: usize, count: usize) -> Vec<GroupOperation> {
    let step = |_| GroupOperation {
        kind: random.below(KINDS),
        bytes: bytes(random, conditions, ranks),
        root: random.below(ranks),
        seed: random.next(),
        slow: (random.below(2 * ranks), random.below(3_000_000) as u64),
    };
    (0..count).map(step).collect()
}

/// What the ranks of a group do, and what became of it.
type Outcomes = Rc<RefCell<Vec<(usize, Result<(), Error>)>>>;

/// Runs the schedule of this number. Returns what went wrong.
fn schedule(seed: u64, messages: bool) -> Result<(), String> {
    let mut random = Random(seed.wrapping_mul(0xd1b5_4a32_d192_ed03));
    let size = 2 + random.below(7);
    let conditions = conditions(&mut random);
    // A mesh of `rows` times the rest, whose two axes are at work at the same time or in turns.
    let divisors: Vec<usize> = (1..=size).filter(|rows| size.is_multiple_of(*rows)).collect();
    let rows = random.pick(&divisors);
    let (both, count) = (random.one_in(2), 1 + random.below(4));
    let scripts = [
        steps(&mut random, &conditions, size, count),
        steps(&mut random, &conditions, rows, count),
        steps(&mut random, &conditions, size / rows, count),
        steps(&mut random, &conditions, size, 1),
    ];
    let scripts = Rc::new(scripts);
    let mut simulation = SimulatedWorld::new(size, conditions, random);
    let outcomes = Outcomes::default();
    let store = Arc::<Mutex<MessageStore>>::default();
    for rank in 0..size {
        let (scripts, outcomes) = (scripts.clone(), outcomes.clone());
        let script = move |comm: Communicator, context: RankContext| {
            let outcome = mesh(&comm, &context, &scripts, rows, both, &outcomes);
            outcomes.borrow_mut().push((rank, outcome));
        };
        match messages {
            true => simulation.rank_of_messages(&store, rank, TIMEOUT, script),
            false => simulation.rank(rank, TIMEOUT, script),
        }
    }
    let ended = simulation.run();
    let about = || format!("{size} ranks, {rows} rows, {conditions:?}, {scripts:?}");
    let outcomes = outcomes.borrow();
    for (rank, outcome) in outcomes.iter() {
        outcome.as_ref().map_err(|error| format!("rank {rank}: {error}; {}", about()))?;
    }
    let expected = size * if both { 2 } else { 1 };
    match ended && outcomes.len() == expected {
        true => Ok(()),
        false => Err(format!("{} of {expected} threads ended; {}", outcomes.len(), about())),
    }
}

fn mesh(
    comm: &Communicator,
    context: &RankContext,
    scripts: &Rc<[Vec<GroupOperation>; 4]>,
    rows: usize,
    both: bool,
    outcomes: &Outcomes,
) -> Result<(), Error> {
    let columns = comm.size() / rows;
    for step in &scripts[0] {
        perform(comm, context, step)?;
    }
    let column = comm.split((comm.rank() % columns) as u64, 0)?;
    let row = comm.split((comm.rank() / columns) as u64, 0)?;
    if both {
        let (background, steps, outcomes) = (context.clone(), scripts.clone(), outcomes.clone());
        context.start(move || {
            let outcome = steps[1].iter().try_for_each(|step| perform(&column, &background, step));
            outcomes.borrow_mut().push((background.rank, outcome));
        });
        scripts[2].iter().try_for_each(|step| perform(&row, context, step))
    } else {
        for (one, other) in scripts[1].iter().zip(&scripts[2]) {
            perform(&column, context, one)?;
            perform(&row, context, other)?;
        }
        scripts[3].iter().try_for_each(|step| perform(comm, context, step))
    }
}

/// Runs schedules, and tells which one failed and how to run it again.
fn run(test: &str, schedules: u64, messages: bool) {
    let one = std::env::var("BURN_PARALLEL_SCHEDULE").ok().and_then(|number| number.parse().ok());
    let numbers = one.map_or(0..schedules, |number: u64| number..number + 1);
    let (began, next) = (Instant::now(), AtomicU64::new(numbers.start));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= numbers.end {
                return Ok(());
            }
            schedule(number, messages)
                .map_err(|problem| format!("BURN_PARALLEL_SCHEDULE={number} cargo test --lib {test}: {problem}"))?;
        }
    };
    let failed: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(work)).collect();
        threads.into_iter().filter_map(|thread| thread.join().expect("a schedule panicked").err()).collect()
    });
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    println!("{} schedules in {:.1?}", numbers.end - numbers.start, began.elapsed());
}

#[test]
fn all_comes_to_its_place_over_connections() {
    run("over_connections", 2000, false);
}

#[test]
fn all_comes_to_its_place_over_messages() {
    run("over_messages", 1000, true);
}
