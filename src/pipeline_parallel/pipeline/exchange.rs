//! Sends and receives the messages between stages.
//!
//! Between stages of one rank a message changes hands as it is. Between ranks its tensors travel one by one, in order,
//! under a tag of their own for each edge and micro-batch; each brings its shape and dtype along. A gradient that does
//! not exist travels as an empty tensor of bytes, which no gradient is.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use burn::tensor::DType;

use crate::Error;
use crate::comm::{Communicator, Pending};
use crate::pipeline_parallel::schedule::{Direction, Edge, Routes, Timetable, Unit};
use crate::pipeline_parallel::{StageMessage, stage_error};
use crate::tensor::PlainTensor;

/// An edge and a micro-batch.
type MessageKey = (usize, usize, usize);

/// The messages that one rank sends and receives in one run.
pub(super) struct MessageExchange<'a> {
    comm: &'a Communicator,
    timetable: &'a Timetable,
    routes: &'a Routes,
    /// Given, and not yet taken or sent.
    here: HashMap<MessageKey, StageMessage>,
    posted: HashMap<MessageKey, Vec<Pending<PlainTensor>>>,
    /// Time spent waiting for tensors.
    pub waited: Duration,
}

impl<'a> MessageExchange<'a> {
    pub fn new(comm: &'a Communicator, timetable: &'a Timetable, routes: &'a Routes) -> Self {
        Self { comm, timetable, routes, here: HashMap::new(), posted: HashMap::new(), waited: Duration::ZERO }
    }

    /// Takes what a stage has given: exactly one message for each of its edges in this direction.
    pub fn give(&mut self, unit: Unit, direction: Direction, messages: Vec<StageMessage>) -> Result<(), Error> {
        let mut missing: Vec<Edge> = self.routes.out_of_stage(unit.stage, direction).collect();
        for message in messages {
            let StageMessage { from, to, ref tensors } = message;
            let fits = |edge: &Edge| (edge.from, edge.to, edge.tensors) == (from, to, tensors.len());
            let Some(place) = missing.iter().position(fits) else {
                let number = tensors.len();
                return Err(stage_error(format!(
                    "stage {} gave a message of {number} tensors from stage {from} to stage {to}, which none of its edges is \
                     for: {missing:?}",
                    unit.stage
                )));
            };
            missing.swap_remove(place);
            self.here.insert((from, to, unit.micro_batch), message);
        }
        match missing.first() {
            None => Ok(()),
            Some(Edge { from, to, tensors }) => {
                Err(stage_error(format!("stage {from} gave no message of {tensors} tensors to stage {to}")))
            }
        }
    }

    /// Sends to other ranks what a stage has given.
    pub fn send(&mut self, unit: Unit, direction: Direction) -> Result<(), Error> {
        for edge in self.routes.out_of_stage(unit.stage, direction) {
            let Some(to) = self.elsewhere(edge.to) else { continue };
            let key = (edge.from, edge.to, unit.micro_batch);
            let Some(message) = self.here.remove(&key) else { return Err(lost(key)) };
            for tensor in message.tensors {
                match tensor {
                    Some(tensor) => self.comm.send(tensor, to, self.tag(key))?,
                    None => self.comm.send(Vec::<u8>::new(), to, self.tag(key))?,
                }
            }
        }
        Ok(())
    }

    /// Posts the receives of what a stage needs from other ranks, unless they are posted.
    pub fn post(&mut self, unit: Unit, direction: Direction) {
        for edge in self.routes.into_stage(unit.stage, direction) {
            let Some(from) = self.elsewhere(edge.from) else { continue };
            let key = (edge.from, edge.to, unit.micro_batch);
            let tag = self.tag(key);
            let receive = |_| self.comm.start_recv::<PlainTensor>(from, tag);
            self.posted.entry(key).or_insert_with(|| (0..edge.tensors).map(receive).collect());
        }
    }

    /// Takes what a stage needs, and waits for what has not come yet.
    pub fn take(&mut self, unit: Unit, direction: Direction) -> Result<Vec<StageMessage>, Error> {
        let mut messages = Vec::new();
        for edge in self.routes.into_stage(unit.stage, direction) {
            let key = (edge.from, edge.to, unit.micro_batch);
            messages.push(match self.elsewhere(edge.from) {
                None => self.here.remove(&key).ok_or_else(|| lost(key))?,
                Some(_) => {
                    let pending = self.posted.remove(&key).ok_or_else(|| lost(key))?;
                    let began = Instant::now();
                    let tensors: Result<Vec<PlainTensor>, Error> = pending.into_iter().map(Pending::wait).collect();
                    self.waited += began.elapsed();
                    let exists = |tensor: PlainTensor| match direction {
                        Direction::Backward if is_absent(&tensor) => None,
                        _ => Some(tensor),
                    };
                    StageMessage { from: edge.from, to: edge.to, tensors: tensors?.into_iter().map(exists).collect() }
                }
            });
        }
        Ok(messages)
    }

    /// The rank of a stage, if it is not this one.
    fn elsewhere(&self, stage: usize) -> Option<usize> {
        self.timetable.rank_of(stage).filter(|rank| *rank != self.comm.rank())
    }

    fn tag(&self, (from, to, micro_batch): MessageKey) -> u64 {
        let edge = from as u64 * self.timetable.stages() as u64 + to as u64;
        edge * self.timetable.micro_batches() as u64 + micro_batch as u64
    }
}

fn is_absent(tensor: &PlainTensor) -> bool {
    tensor.dtype() == DType::U8 && tensor.elements() == 0
}

fn lost((from, to, micro_batch): MessageKey) -> Error {
    stage_error(format!("there is no message from stage {from} to stage {to} of micro-batch {micro_batch}"))
}
