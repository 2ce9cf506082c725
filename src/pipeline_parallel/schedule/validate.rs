//! Validates timetables: every pass once, sends and receives matched, no deadlock.

use std::collections::HashMap;

use super::events::BlockedRank;
use super::{Action, Costs, Direction, Routes, Timetable, Unit, events, grid, schedule_error};
use crate::Error;

/// For how many micro-batches activations are alive at most: from their forward to their backward, or if that is split,
/// to the half for the weights. Without any backward nothing is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeakActivations {
    /// In each stage.
    pub per_stage: Vec<usize>,
    /// On each rank, over all its stages at once.
    pub per_rank: Vec<usize>,
}

/// Where an action is: rank, and place in its row.
type ActionIndex = (usize, usize);

impl Timetable {
    /// Proves that the timetable can run over these edges, and says how many activations it keeps alive.
    ///
    /// That is: every stage is on one rank; every stage runs each micro-batch's forward once, and if there is any
    /// backward at all, its backward once, whole or in halves, in this order; if the timetable communicates, everything
    /// that crosses ranks is sent once, after it was computed, and received once, before it is needed, and nothing else
    /// is; and no rank waits for ever, even if sends wait until their receives are posted.
    ///
    /// # Errors
    /// [`Error::Schedule`] that names the first wrong action and shows it in the timetable.
    pub fn validate(&self, routes: &Routes) -> Result<PeakActivations, Error> {
        let stages = self.stages();
        if let Some(edge) = routes.edges().find(|edge| edge.from.max(edge.to) >= stages) {
            let (from, to) = (edge.from, edge.to);
            return Err(schedule_error(format!(
                "tensors go from stage {from} to stage {to}, and the timetable has {stages} stages"
            )));
        }
        let places = self.in_order(routes)?;
        self.complete(&places, routes)?;
        events(self, routes, &Costs::default()).map_err(|blocked| self.deadlock(&blocked))?;
        Ok(self.peak_activations())
    }

    /// Looks at each action in the light of those before it in its row.
    fn in_order(&self, routes: &Routes) -> Result<HashMap<Action, ActionIndex>, Error> {
        let mut places: HashMap<Action, ActionIndex> = HashMap::new();
        for (rank, row) in self.rows().iter().enumerate() {
            for (place, action) in row.iter().enumerate() {
                if let Some(problem) = self.problem(action, rank, &places, routes) {
                    return Err(self.wrong(rank, place, &problem));
                }
                places.insert(*action, (rank, place));
            }
        }
        Ok(places)
    }

    fn problem(
        &self,
        action: &Action,
        rank: usize,
        before: &HashMap<Action, ActionIndex>,
        routes: &Routes,
    ) -> Option<String> {
        let unit = action.unit();
        let seen = |action: Action| before.contains_key(&action);
        if let Some(home) = self.rank_of(unit.stage).filter(|home| *home != rank) {
            return Some(format!("stage {} is on rank {home}", unit.stage));
        }
        if seen(*action) {
            return Some("it is there twice".into());
        }
        let after = |needed: Action| (!seen(needed)).then(|| format!("it comes without {needed} before it"));
        let instead = |other: Action| seen(other).then(|| format!("{other} is there as well, which does the same"));
        match action {
            Action::Forward(_) => None,
            Action::Backward(_) => after(Action::Forward(unit)).or_else(|| instead(Action::BackwardInput(unit))),
            Action::BackwardInput(_) => after(Action::Forward(unit)).or_else(|| instead(Action::Backward(unit))),
            Action::BackwardWeight(_) => after(Action::BackwardInput(unit)),
            Action::Send(direction, _) => {
                let nobody = self.takers(unit, *direction, routes).next().is_none();
                let computed = passes(*direction, unit).into_iter().any(seen);
                let untimely = || {
                    let [first, ..] = passes(*direction, unit);
                    (!computed).then(|| format!("it comes without {first} before it"))
                };
                nobody.then(|| "no other rank takes what it sends".to_owned()).or_else(untimely)
            }
            Action::Receive(direction, _) => {
                let nobody = !self.takes_from_elsewhere(unit, *direction, routes);
                let late = passes(*direction, unit).into_iter().find(|pass| seen(*pass));
                let untimely = || late.map(|pass| format!("it comes after {pass}, which needs it"));
                nobody.then(|| "no other rank gives anything to it".to_owned()).or_else(untimely)
            }
        }
    }

    /// Looks for what is missing.
    fn complete(&self, places: &HashMap<Action, ActionIndex>, routes: &Routes) -> Result<(), Error> {
        let (trains, communicates) = (self.trains(), self.communicates());
        let units = (0..self.micro_batches()).flat_map(|m| (0..self.stages()).map(move |s| Unit::new(s, m)));
        for unit in units {
            let mut needed = vec![Action::Forward(unit)];
            if trains && places.contains_key(&Action::BackwardInput(unit)) {
                needed.push(Action::BackwardWeight(unit));
            } else if trains {
                needed.push(Action::Backward(unit));
            }
            let directions =
                if trains { &[Direction::Forward, Direction::Backward][..] } else { &[Direction::Forward] };
            for direction in directions.iter().filter(|_| communicates) {
                if self.takers(unit, *direction, routes).next().is_some() {
                    needed.push(Action::Send(*direction, unit));
                }
                if self.takes_from_elsewhere(unit, *direction, routes) {
                    needed.push(Action::Receive(*direction, unit));
                }
            }
            if let Some(missing) = needed.into_iter().find(|action| !places.contains_key(action)) {
                let rank = self.stage_ranks()[unit.stage];
                let of_stage = |action: &Action| action.unit().stage == unit.stage;
                let first = self.rows()[rank].iter().position(of_stage).unwrap_or_default();
                let grid = grid::marked(self, rank, first, false);
                return Err(schedule_error(format!("{missing} is missing on rank {rank}\n{grid}")));
            }
        }
        Ok(())
    }

    fn peak_activations(&self) -> PeakActivations {
        let mut peak = PeakActivations { per_stage: vec![0; self.stages()], per_rank: vec![0; self.ranks()] };
        if !self.trains() {
            return peak;
        }
        for (rank, row) in self.rows().iter().enumerate() {
            let (mut live, mut total) = (vec![0usize; self.stages()], 0usize);
            for action in row {
                let stage = action.unit().stage;
                match action {
                    Action::Forward(_) => {
                        live[stage] += 1;
                        total += 1;
                    }
                    Action::Backward(_) | Action::BackwardWeight(_) => {
                        live[stage] -= 1;
                        total -= 1;
                    }
                    Action::BackwardInput(_) | Action::Send(..) | Action::Receive(..) => {}
                }
                peak.per_stage[stage] = peak.per_stage[stage].max(live[stage]);
                peak.per_rank[rank] = peak.per_rank[rank].max(total);
            }
        }
        peak
    }

    fn wrong(&self, rank: usize, place: usize, problem: &str) -> Error {
        let action = self.rows()[rank][place];
        let grid = grid::marked(self, rank, place, true);
        schedule_error(format!("{action} on rank {rank} is wrong: {problem}\n{grid}"))
    }

    /// The error for ranks that wait for ever.
    pub(super) fn deadlock(&self, blocked: &[BlockedRank]) -> Error {
        let waits = |blocked: &BlockedRank| {
            let action = self.rows()[blocked.rank][blocked.place];
            format!("{action} on rank {} waits for {}", blocked.rank, blocked.waits_for)
        };
        let all: Vec<String> = blocked.iter().map(waits).collect();
        let (rank, place) = blocked.first().map_or((0, 0), |first| (first.rank, first.place));
        let grid = grid::marked(self, rank, place, true);
        schedule_error(format!("the ranks wait for each other for ever: {}\n{grid}", all.join(", ")))
    }
}

/// The passes that take and give tensors in a direction: one of them is in the timetable.
fn passes(direction: Direction, unit: Unit) -> [Action; 2] {
    match direction {
        Direction::Forward => [Action::Forward(unit); 2],
        Direction::Backward => [Action::Backward(unit), Action::BackwardInput(unit)],
    }
}
