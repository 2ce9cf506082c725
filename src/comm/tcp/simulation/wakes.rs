//! Tests that a thread which waits is woken when another thread of its rank receives what it waits for.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use super::network::Random;
use super::scripts::conditions;
use super::{RankContext, SimulatedWorld};
use crate::Error;
use crate::comm::Communicator;

const TIMEOUT: Duration = Duration::from_secs(3);
const MILLISECOND: u64 = 1_000_000;

/// What a thread waits for.
#[derive(Debug, Clone, Copy)]
enum Awaited {
    Collective,
    Message,
}

impl Awaited {
    fn on(self, comm: &Communicator) -> Result<(), Error> {
        match (self, comm.rank()) {
            (Self::Collective, _) => comm.barrier(),
            (Self::Message, 0) => comm.recv::<Vec<u8>>(1, 7).map(drop),
            (Self::Message, _) => comm.send(vec![1u8; 3], 0, 7),
        }
    }
}

/// Two threads of rank 0 wait for rank 1, each on a group of its own. Returns how long after rank 1 the first came
/// back.
fn delay(seed: u64, awaited: Awaited) -> u64 {
    let mut random = Random(seed);
    let mut conditions = conditions(&mut random);
    (conditions.limits.eager, conditions.limits.credit, conditions.capacity) = (16 << 10, 256 << 10, 1 << 20);
    (conditions.late, conditions.short) = (1000, 1000);
    let mut simulation = SimulatedWorld::new(2, conditions, random);
    let (sent, came) = <(Rc<Cell<u64>>, Rc<Cell<u64>>)>::default();
    for rank in 0..2 {
        let (sent, came) = (sent.clone(), came.clone());
        simulation.rank(rank, TIMEOUT, move |comm, context| {
            let time = if rank == 0 { came } else { sent };
            meet(&comm, &context, awaited, &time).unwrap_or_else(|error| panic!("rank {rank}: {error}"));
        });
    }
    assert!(simulation.run(), "seed {seed}: it does not end");
    came.get().saturating_sub(sent.get())
}

fn meet(comm: &Communicator, context: &RankContext, awaited: Awaited, time: &Cell<u64>) -> Result<(), Error> {
    let (first, second) = (comm.split(0, 0)?, comm.split(0, 0)?);
    if comm.rank() == 0 {
        context.start(move || awaited.on(&second).unwrap_or_else(|error| panic!("the second thread: {error}")));
        awaited.on(&first)?;
        time.set(context.now());
    } else {
        context.compute(20 * MILLISECOND);
        time.set(context.now());
        awaited.on(&first)?;
        context.compute(20 * MILLISECOND);
        awaited.on(&second)?;
    }
    Ok(())
}

/// Parks end by themselves after a millisecond: of two threads the wrong one finds what comes about every other time.
#[test]
fn what_one_thread_receives_wakes_the_other() {
    const SEEDS: u64 = 200;
    let late = [Awaited::Collective, Awaited::Message].map(|awaited| {
        let late = (0..SEEDS).filter(|seed| delay(*seed, awaited) > MILLISECOND / 2).count();
        (awaited, late)
    });
    assert!(
        late.iter().all(|(_, late)| *late < SEEDS as usize / 4),
        "of {SEEDS} wait for the end of their park: {late:?}"
    );
}
