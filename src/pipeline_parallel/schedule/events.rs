//! Simulates a timetable: when each action begins, or which ranks are deadlocked.
//!
//! Every rank takes its actions in order. An action begins when the rank is free and what it needs has come:
//!
//! - a pass needs the passes of other stages that give it tensors, and of its own stage, the pass before it. If the
//!   timetable communicates, what comes from another rank must have been sent, and its receive posted;
//! - a send is a rendezvous: it begins when its receives are posted. A transport that buffers is more patient, so what
//!   plays through here plays through there;
//! - a receive is posted, and does not hold up the rank.

use std::collections::HashMap;

use super::{Action, Costs, Direction, Routes, Timetable, Unit};

/// An action, when and where it ran.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Event {
    /// The rank.
    pub rank: usize,
    /// What it did.
    pub action: Action,
    /// When it began.
    pub start: f64,
    /// When it was done.
    pub end: f64,
}

/// What a rank waits for, for ever.
pub(super) struct BlockedRank {
    pub rank: usize,
    /// Place of the action in the row of the rank.
    pub place: usize,
    pub waits_for: Action,
}

/// Plays through all actions, in the order in which they begin; ranks that begin at the same time in rank order.
///
/// # Errors
/// The ranks that never get to their end, should there be any.
pub(super) fn events(timetable: &Timetable, routes: &Routes, costs: &Costs) -> Result<Vec<Event>, Vec<BlockedRank>> {
    let mut simulation =
        EventSimulation { timetable, routes, costs, communicates: timetable.communicates(), ended: HashMap::new() };
    let rows = timetable.rows();
    let mut next = vec![0; rows.len()];
    let mut free = vec![0.0f64; rows.len()];
    // When the next action of a rank has what it needs, as soon as that is known: it does not change any more.
    let mut ready: Vec<Option<f64>> = vec![None; rows.len()];
    let mut events = Vec::with_capacity(rows.iter().map(Vec::len).sum());
    loop {
        let mut first: Option<(usize, f64)> = None;
        for (rank, row) in rows.iter().enumerate() {
            let Some(action) = row.get(next[rank]) else { continue };
            if ready[rank].is_none() {
                ready[rank] = simulation.ready(action, rank).ok();
            }
            if let Some(start) = ready[rank].map(|ready| ready.max(free[rank]))
                && first.is_none_or(|(_, earliest)| start < earliest)
            {
                first = Some((rank, start));
            }
        }
        let Some((rank, start)) = first else { break };
        let action = rows[rank][next[rank]];
        let end = start + costs.of(&action);
        events.push(Event { rank, action, start, end });
        simulation.ended.insert(action, end);
        free[rank] = end;
        next[rank] += 1;
        ready[rank] = None;
    }
    let blocked = |(rank, row): (usize, &Vec<Action>)| {
        let waits_for = simulation.ready(row.get(next[rank])?, rank).err()?;
        Some(BlockedRank { rank, place: next[rank], waits_for })
    };
    let blocked: Vec<BlockedRank> = rows.iter().enumerate().filter_map(blocked).collect();
    if blocked.is_empty() { Ok(events) } else { Err(blocked) }
}

struct EventSimulation<'a> {
    timetable: &'a Timetable,
    routes: &'a Routes,
    costs: &'a Costs,
    communicates: bool,
    /// When the actions so far ended.
    ended: HashMap<Action, f64>,
}

impl EventSimulation<'_> {
    /// When an action has all that it needs, or something that it still waits for.
    fn ready(&self, action: &Action, rank: usize) -> Result<f64, Action> {
        let unit = action.unit();
        match action {
            Action::Forward(_) => self.received(Direction::Forward, unit, rank),
            Action::Backward(_) | Action::BackwardInput(_) => {
                let forward = self.end(Action::Forward(unit))?;
                Ok(forward.max(self.received(Direction::Backward, unit, rank)?))
            }
            Action::BackwardWeight(_) => self.end(Action::BackwardInput(unit)),
            Action::Send(direction, _) => {
                let mut ready = self.given(*direction, unit)?;
                for edge in self.routes.out_of_stage(unit.stage, *direction) {
                    if self.timetable.rank_of(edge.to) != Some(rank) {
                        let taker = Unit::new(edge.to, unit.micro_batch);
                        ready = ready.max(self.end(Action::Receive(*direction, taker))?);
                    }
                }
                Ok(ready)
            }
            Action::Receive(..) => Ok(0.0),
        }
    }

    /// When everything that a stage needs for its pass in this direction has arrived.
    fn received(&self, direction: Direction, unit: Unit, rank: usize) -> Result<f64, Action> {
        let mut ready = 0.0f64;
        for edge in self.routes.into_stage(unit.stage, direction) {
            let giver = Unit::new(edge.from, unit.micro_batch);
            let given = self.given(direction, giver)?;
            let arrived = if self.timetable.rank_of(edge.from) == Some(rank) {
                given
            } else if self.communicates {
                self.end(Action::Receive(direction, unit))?;
                self.end(Action::Send(direction, giver))? + self.costs.communication()
            } else {
                given + self.costs.communication()
            };
            ready = ready.max(arrived);
        }
        Ok(ready)
    }

    /// When a stage has given what its pass in this direction gives.
    fn given(&self, direction: Direction, unit: Unit) -> Result<f64, Action> {
        match direction {
            Direction::Forward => self.end(Action::Forward(unit)),
            // Either of the two is in the timetable.
            Direction::Backward => self.end(Action::BackwardInput(unit)).or_else(|_| self.end(Action::Backward(unit))),
        }
    }

    fn end(&self, action: Action) -> Result<f64, Action> {
        self.ended.get(&action).copied().ok_or(action)
    }
}
