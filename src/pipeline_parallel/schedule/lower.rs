//! Adds sends and receives to a timetable of passes.

use std::collections::HashSet;

use super::{Action, Costs, Direction, Event, Routes, Timetable, Unit, events, schedule_error};
use crate::Error;

impl Timetable {
    /// The timetable with sends and receives between ranks.
    ///
    /// The actions are played through in time. As soon as a pass begins that will give tensors to other ranks, these
    /// post their receives, and the send follows the pass. So a receive is posted before the tensors are there; and
    /// since all sends and receives lie in one order, that of time, no send waits for a receive behind it: nothing can
    /// block for ever, not even if sends wait for their receivers.
    ///
    /// # Errors
    /// [`Error::Schedule`] if the timetable is not [valid](Self::validate), or has sends or receives already.
    pub fn with_communication(&self, routes: &Routes) -> Result<Self, Error> {
        if self.communicates() {
            return Err(schedule_error("the timetable has sends and receives already; take `computing()` of it"));
        }
        self.validate(routes)?;
        let events = events(self, routes, &Costs::default()).map_err(|blocked| self.deadlock(&blocked))?;
        let mut rows = vec![Vec::new(); self.ranks()];
        let mut posted = HashSet::new();
        for Event { rank, action, .. } in events {
            rows[rank].push(action);
            let Some(direction) = action.direction() else { continue };
            let taken_elsewhere = self.takers(action.unit(), direction, routes).inspect(|(taker, home)| {
                if posted.insert((direction, *taker)) {
                    rows[*home].push(Action::Receive(direction, *taker));
                }
            });
            if taken_elsewhere.count() > 0 {
                rows[rank].push(Action::Send(direction, action.unit()));
            }
        }
        Self::new(rows)
    }

    /// Those who take what a unit gives in one direction and are on other ranks, with their ranks.
    pub(super) fn takers<'a>(
        &'a self,
        unit: Unit,
        direction: Direction,
        routes: &'a Routes,
    ) -> impl Iterator<Item = (Unit, usize)> + 'a {
        let home = self.rank_of(unit.stage);
        routes.out_of_stage(unit.stage, direction).filter_map(move |edge| {
            let rank = self.rank_of(edge.to).filter(|rank| Some(*rank) != home)?;
            Some((Unit::new(edge.to, unit.micro_batch), rank))
        })
    }

    /// Whether a unit takes something in one direction from another rank.
    pub(super) fn takes_from_elsewhere(&self, unit: Unit, direction: Direction, routes: &Routes) -> bool {
        let home = self.rank_of(unit.stage);
        routes.into_stage(unit.stage, direction).any(|edge| self.rank_of(edge.from) != home)
    }
}
