//! Running a timetable.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::schedule::{Action, Direction, Timetable, Unit};
use super::{LossSum, MicroBatch, Parcel, Stage, stage_error};
use crate::Error;
use crate::comm::{Communicator, ReduceOp};
use crate::graph::GraphTensor;

/// What a run of a timetable gave.
#[derive(Debug, Default)]
pub struct Executed {
    /// Over all ranks.
    pub loss: LossSum,
    /// By stage and micro-batch.
    pub outputs: BTreeMap<(usize, usize), Vec<GraphTensor>>,
    /// The most micro-batches that this rank kept something of at once.
    pub peak_live: usize,
    /// Time in passes.
    pub busy: Duration,
    /// Time from first to last action.
    pub elapsed: Duration,
}

pub(super) fn run<I, S: Stage<I>>(
    timetable: &Timetable,
    stages: &mut [S],
    inputs: &[I],
    group: &Communicator,
) -> Result<Executed, Error> {
    let rank = group.rank();
    let trains = timetable.trains();
    let mut here: BTreeMap<(usize, usize, usize), Parcel> = BTreeMap::new();
    let mut done = Executed::default();
    let began = Instant::now();
    let tag = |from: usize, to: usize, micro_batch: usize| {
        ((from * timetable.stages() + to) * timetable.micro_batches() + micro_batch) as u64
    };
    for action in &timetable.rows()[rank] {
        let Unit { stage: index, micro_batch } = action.unit();
        let Some(place) = stages.iter().position(|stage| stage.index() == index) else {
            return Err(stage_error(format!("rank {rank} does not hold stage {index}")));
        };
        let direction = match action {
            Action::Forward(_) => Direction::Forward,
            Action::Backward(_) | Action::BackwardInput(_) => Direction::Backward,
            Action::BackwardWeight(_) => Direction::Backward,
            _ => continue,
        };
        let mut received = Vec::new();
        if !matches!(action, Action::BackwardWeight(_)) {
            let mut edges = stages[place].edges();
            edges.retain(|edge| edge.to == index && edge.direction() == direction);
            edges.sort();
            for edge in edges {
                let parcel = match timetable.rank_of(edge.from) {
                    Some(from) if from != rank => {
                        let mut tensors = Vec::new();
                        for _ in 0..edge.tensors {
                            tensors.push(group.recv::<GraphTensor>(from, tag(edge.from, index, micro_batch))?);
                        }
                        Parcel::new(edge.from, index, tensors)
                    }
                    _ => here
                        .remove(&(edge.from, index, micro_batch))
                        .ok_or_else(|| stage_error(format!("{action} runs before its parcels are there")))?,
                };
                received.push(parcel);
            }
        }
        let input = MicroBatch {
            index: micro_batch,
            count: timetable.micro_batches(),
            input: &inputs[micro_batch],
            trains,
            scale: 1.0,
        };
        let started = Instant::now();
        let parcels = match action {
            Action::Forward(_) => {
                let given = stages[place].forward(input, received)?;
                if let Some(LossSum { sum, weight }) = given.loss {
                    done.loss.sum += sum;
                    done.loss.weight += weight;
                }
                done.outputs.insert((index, micro_batch), given.outputs);
                given.parcels
            }
            Action::Backward(_) => stages[place].backward(input, received)?,
            Action::BackwardInput(_) => stages[place].backward_input(input, received)?,
            _ => {
                stages[place].backward_weight(input)?;
                Vec::new()
            }
        };
        done.busy += started.elapsed();
        done.peak_live = done.peak_live.max(stages.iter().map(|stage| stage.live()).sum());
        for parcel in parcels {
            match timetable.rank_of(parcel.to) {
                Some(to) if to != rank => {
                    let tag = tag(parcel.from, parcel.to, micro_batch);
                    for tensor in parcel.into_tensors()? {
                        group.send(tensor, to, tag)?;
                    }
                }
                _ => drop(here.insert((parcel.from, parcel.to, micro_batch), parcel)),
            }
        }
    }
    done.elapsed = began.elapsed();
    let sums = group.all_reduce(vec![done.loss.sum, done.loss.weight], ReduceOp::Sum)?;
    done.loss = LossSum { sum: sums[0], weight: sums[1] };
    Ok(done)
}
