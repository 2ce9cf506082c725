//! A stage that computes nothing, for what the executor itself does.

use burn::tensor::Tensor;
use burn_parallel::Error;
use burn_parallel::pipeline_parallel::schedule::{Action, Direction, Edge, Routes, Unit};
use burn_parallel::pipeline_parallel::{Forwarded, LossSum, MicroBatch, Stage, StageMessage};
use burn_parallel::tensor::PlainTensor;

/// Elements of each tensor that travels.
pub const ELEMENTS: usize = 6;

pub fn tensor() -> PlainTensor {
    Tensor::<1>::ones([ELEMENTS], &burn::tensor::Device::flex()).into()
}

/// Sends what its edges say, and does in `disturb` whatever a test wants at an action.
pub struct Probe<F> {
    pub index: usize,
    pub routes: Routes,
    pub loss: bool,
    pub live: usize,
    /// What it was asked to do, in order.
    pub log: Vec<Action>,
    pub disturb: F,
}

pub fn calm(_: Action) -> Result<(), Error> {
    Ok(())
}

impl<F: FnMut(Action) -> Result<(), Error>> Probe<F> {
    pub fn new(index: usize, routes: &Routes, stages: usize, disturb: F) -> Self {
        Self { index, routes: routes.clone(), loss: index + 1 == stages, live: 0, log: Vec::new(), disturb }
    }

    fn note(&mut self, action: Action) -> Result<(), Error> {
        self.log.push(action);
        (self.disturb)(action)
    }

    fn check(&self, received: &[StageMessage], direction: Direction) {
        let expected: Vec<(usize, usize, usize)> =
            self.routes.into_stage(self.index, direction).map(|edge| (edge.from, edge.to, edge.tensors)).collect();
        let found: Vec<(usize, usize, usize)> =
            received.iter().map(|message| (message.from, message.to, message.tensors.len())).collect();
        assert_eq!(found, expected);
    }

    fn give(&self, direction: Direction) -> Vec<StageMessage> {
        let edges = self.routes.out_of_stage(self.index, direction);
        edges.map(|edge| StageMessage::new(edge.from, edge.to, (0..edge.tensors).map(|_| tensor()))).collect()
    }
}

impl<F: FnMut(Action) -> Result<(), Error>> Stage<f64> for Probe<F> {
    fn index(&self) -> usize {
        self.index
    }

    fn edges(&self) -> Vec<Edge> {
        self.routes.edges().filter(|edge| edge.from == self.index || edge.to == self.index).collect()
    }

    fn forward(&mut self, micro_batch: MicroBatch<'_, f64>, received: Vec<StageMessage>) -> Result<Forwarded, Error> {
        self.check(&received, Direction::Forward);
        self.live += usize::from(micro_batch.trains);
        self.note(Action::Forward(Unit::new(self.index, micro_batch.index)))?;
        let loss = self.loss.then_some(LossSum { sum: *micro_batch.input, weight: 2.0 });
        Ok(Forwarded { messages: self.give(Direction::Forward), loss, outputs: vec![tensor()] })
    }

    fn backward(
        &mut self,
        micro_batch: MicroBatch<'_, f64>,
        received: Vec<StageMessage>,
    ) -> Result<Vec<StageMessage>, Error> {
        self.check(&received, Direction::Backward);
        self.live -= 1;
        self.note(Action::Backward(Unit::new(self.index, micro_batch.index)))?;
        Ok(self.give(Direction::Backward))
    }

    fn backward_input(
        &mut self,
        micro_batch: MicroBatch<'_, f64>,
        received: Vec<StageMessage>,
    ) -> Result<Vec<StageMessage>, Error> {
        self.check(&received, Direction::Backward);
        self.note(Action::BackwardInput(Unit::new(self.index, micro_batch.index)))?;
        Ok(self.give(Direction::Backward))
    }

    fn backward_weight(&mut self, micro_batch: MicroBatch<'_, f64>) -> Result<(), Error> {
        self.live -= 1;
        self.note(Action::BackwardWeight(Unit::new(self.index, micro_batch.index)))
    }

    fn live(&self) -> usize {
        self.live
    }

    fn discard(&mut self) {
        self.live = 0;
    }
}
