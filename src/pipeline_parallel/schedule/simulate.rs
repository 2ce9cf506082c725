//! What a timetable costs: length, bubble and peak of activations, by simulation.

use super::{Costs, Event, Routes, Timetable, events};
use crate::Error;

/// A step as it would go if every action took as long as its [`Costs`] say.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulation {
    /// From the first action to the end of the last.
    pub makespan: f64,
    /// How long each rank computes.
    pub busy: Vec<f64>,
    /// The computing actions, in the order in which they begin.
    pub events: Vec<Event>,
}

impl Simulation {
    /// The share of the time, over all ranks, in which a rank has nothing to do: the bubble.
    pub fn idle_share(&self) -> f64 {
        let total = self.makespan * self.busy.len() as f64;
        if total > 0.0 { 1.0 - self.busy.iter().sum::<f64>() / total } else { 0.0 }
    }
}

impl Timetable {
    /// Simulates a step. Tensors travel while ranks compute, as long as the costs say, whatever the order of sends and
    /// receives in the timetable.
    ///
    /// # Errors
    /// [`Error::Schedule`] if the timetable is not [valid](Self::validate), or the costs are for another number of
    /// stages or are negative.
    pub fn simulate(&self, routes: &Routes, costs: &Costs) -> Result<Simulation, Error> {
        costs.check(self.stages())?;
        self.validate(routes)?;
        let computing = self.computing();
        let events = events(&computing, routes, costs).map_err(|blocked| computing.deadlock(&blocked))?;
        let mut busy = vec![0.0; self.ranks()];
        for event in &events {
            busy[event.rank] += event.end - event.start;
        }
        let makespan = events.iter().map(|event| event.end).fold(0.0, f64::max);
        Ok(Simulation { makespan, busy, events })
    }
}
