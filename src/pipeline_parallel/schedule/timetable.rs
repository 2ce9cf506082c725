//! Timetables: a schedule written out, the actions of each rank in order.

use std::collections::BTreeMap;

use super::{Action, schedule_error};
use crate::Error;

/// What each rank of a pipeline does in one step, in order.
///
/// A timetable is plain data: made by a [`Schedule`](super::Schedule), read from a text, or put together by hand. It
/// may hold computing actions alone; [`with_communication`](Self::with_communication) then adds sends and receives.
/// Nothing beyond the numbers below is promised before it is [validated](Self::validate).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Timetable {
    rows: Vec<Vec<Action>>,
    stage_ranks: Vec<usize>,
    micro_batches: usize,
}

impl Timetable {
    /// The timetable with these rows, one for each rank. A stage belongs to the first rank that has an action of it.
    ///
    /// # Errors
    /// [`Error::Schedule`] if there is no action, or a stage below the highest one has none.
    pub fn new(rows: Vec<Vec<Action>>) -> Result<Self, Error> {
        let mut homes = BTreeMap::new();
        let mut micro_batches = 0;
        for (rank, action) in
            rows.iter().enumerate().flat_map(|(rank, row)| row.iter().map(move |action| (rank, action)))
        {
            homes.entry(action.unit().stage).or_insert(rank);
            micro_batches = micro_batches.max(action.unit().micro_batch.saturating_add(1));
        }
        if let Some(missing) = (0..homes.len()).find(|stage| !homes.contains_key(stage)) {
            let highest = homes.keys().last().copied().unwrap_or_default();
            return Err(schedule_error(format!("stage {missing} has no action, and there is a stage {highest}")));
        }
        if homes.is_empty() {
            return Err(schedule_error("the timetable has no action"));
        }
        Ok(Self { rows, stage_ranks: homes.into_values().collect(), micro_batches })
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.rows.len()
    }

    /// Number of stages.
    pub fn stages(&self) -> usize {
        self.stage_ranks.len()
    }

    /// Number of micro-batches in a step.
    pub fn micro_batches(&self) -> usize {
        self.micro_batches
    }

    /// The rank that holds each stage.
    pub fn stage_ranks(&self) -> &[usize] {
        &self.stage_ranks
    }

    /// The rank that holds a stage, if there is such a stage.
    pub fn rank_of(&self, stage: usize) -> Option<usize> {
        self.stage_ranks.get(stage).copied()
    }

    /// The stages that a rank holds, in order.
    pub fn stages_of(&self, rank: usize) -> Vec<usize> {
        (0..self.stages()).filter(|stage| self.stage_ranks[*stage] == rank).collect()
    }

    /// What each rank does, in order.
    pub fn rows(&self) -> &[Vec<Action>] {
        &self.rows
    }

    /// Whether there is any backward.
    pub fn trains(&self) -> bool {
        self.actions().any(|action| matches!(action, Action::Backward(_) | Action::BackwardInput(_)))
    }

    /// Whether sends and receives are part of it.
    pub fn communicates(&self) -> bool {
        self.actions().any(|action| !action.computes())
    }

    /// The timetable without its sends and receives.
    pub fn computing(&self) -> Self {
        let rows = self.rows.iter().map(|row| row.iter().copied().filter(Action::computes).collect()).collect();
        Self { rows, ..self.clone() }
    }

    fn actions(&self) -> impl Iterator<Item = &Action> {
        self.rows.iter().flatten()
    }
}
