//! The costs of passes and messages in a simulation.

use super::{Action, schedule_error};
use crate::Error;

/// How long the passes of one stage take, in any unit of time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageCosts {
    /// The forward.
    pub forward: f64,
    /// The whole backward.
    pub backward: f64,
    /// The backward for the inputs.
    pub backward_input: f64,
    /// The backward for the weights.
    pub backward_weight: f64,
}

impl StageCosts {
    /// A stage whose whole backward takes as long as its two halves.
    pub fn new(forward: f64, backward_input: f64, backward_weight: f64) -> Self {
        Self { forward, backward: backward_input + backward_weight, backward_input, backward_weight }
    }
}

impl Default for StageCosts {
    /// The unit of the literature: 1 for the forward and for each half of the backward.
    fn default() -> Self {
        Self::new(1.0, 1.0, 1.0)
    }
}

/// How long everything takes, for a [simulation](super::Timetable::simulate).
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    stages: Vec<StageCosts>,
    communication: f64,
}

impl Costs {
    /// All stages alike, and communication free.
    pub fn uniform(stage: StageCosts) -> Self {
        Self { stages: vec![stage], communication: 0.0 }
    }

    /// Every stage its own, in order, and communication free.
    pub fn per_stage(stages: Vec<StageCosts>) -> Self {
        Self { stages, communication: 0.0 }
    }

    /// Sets how long tensors travel from one rank to another, while both compute. Within a rank they do not travel.
    pub fn with_communication(mut self, time: f64) -> Self {
        self.communication = time;
        self
    }

    /// How long tensors travel from one rank to another.
    pub fn communication(&self) -> f64 {
        self.communication
    }

    /// How long a rank is busy with an action. Sends and receives go on beside what it computes.
    pub fn of(&self, action: &Action) -> f64 {
        let stage = action.unit().stage;
        let Some(costs) = self.stages.get(stage).or(self.stages.first()) else { return 0.0 };
        match action {
            Action::Forward(_) => costs.forward,
            Action::Backward(_) => costs.backward,
            Action::BackwardInput(_) => costs.backward_input,
            Action::BackwardWeight(_) => costs.backward_weight,
            Action::Send(..) | Action::Receive(..) => 0.0,
        }
    }

    pub(super) fn check(&self, stages: usize) -> Result<(), Error> {
        let given = self.stages.len();
        if given != 1 && given != stages {
            return Err(schedule_error(format!("costs were given for {given} stages, and there are {stages}")));
        }
        let passes = |costs: &StageCosts| [costs.forward, costs.backward, costs.backward_input, costs.backward_weight];
        let mut all = self.stages.iter().flat_map(passes).chain([self.communication]);
        match all.find(|cost| !cost.is_finite() || *cost < 0.0) {
            Some(cost) => Err(schedule_error(format!("a cost is {cost}; costs are finite and not negative"))),
            None => Ok(()),
        }
    }
}

impl Default for Costs {
    /// [`StageCosts::default`] for all stages, and communication free.
    fn default() -> Self {
        Self::uniform(StageCosts::default())
    }
}
