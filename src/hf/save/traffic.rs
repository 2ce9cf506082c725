//! What ranks have sent each other since they last met: a function of the rounds, which each of them computes alike.

use super::plan::SavePlan;
use super::rounds::ScheduledPiece;

/// The bytes that each rank sends, and that come to each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Traffic {
    sent: Vec<usize>,
    coming: Vec<usize>,
}

impl Traffic {
    pub(super) fn none(ranks: usize) -> Self {
        Self { sent: vec![0; ranks], coming: vec![0; ranks] }
    }

    /// That of a round.
    pub(super) fn of_round(round: &[ScheduledPiece], plan: &SavePlan, ranks: usize) -> Self {
        let mut traffic = Self::none(ranks);
        for turn in round {
            let size = plan.tensors[turn.tensor].dtype.size();
            for given in turn.given.iter().filter(|given| given.from != turn.writer) {
                let bytes = given.block.elements() * size;
                traffic.sent[given.from] += bytes;
                traffic.coming[turn.writer] += bytes;
            }
        }
        traffic
    }

    /// Whether with what a round adds no rank sends or gets more than `most`; a rank that does nothing yet may.
    pub(super) fn has_room_for(&self, round: &Self, most: usize) -> bool {
        let fits = |(before, more): (&usize, &usize)| *before == 0 || *more == 0 || before + more <= most;
        self.sent.iter().zip(&round.sent).all(fits) && self.coming.iter().zip(&round.coming).all(fits)
    }

    pub(super) fn add(&mut self, round: &Self) {
        self.sent.iter_mut().zip(&round.sent).for_each(|(before, more)| *before += more);
        self.coming.iter_mut().zip(&round.coming).for_each(|(before, more)| *before += more);
    }

    /// What a rank may hold of it at most: messages that nobody has taken yet, its own and those to it.
    pub(super) fn held_by(&self, rank: usize) -> usize {
        self.sent[rank] + self.coming[rank]
    }
}

#[cfg(test)]
mod tests {
    use super::Traffic;

    #[test]
    fn room() {
        let of = |sent: [usize; 2], coming: [usize; 2]| Traffic { sent: sent.into(), coming: coming.into() };
        let mut before = Traffic::none(2);
        assert!(before.has_room_for(&of([9, 0], [0, 9]), 4), "a single message may be large");
        before.add(&of([3, 0], [0, 3]));
        assert!(before.has_room_for(&of([1, 9], [9, 1]), 4));
        assert!(!before.has_room_for(&of([2, 0], [0, 0]), 4));
        assert!(!before.has_room_for(&of([0, 0], [0, 2]), 4));
        assert_eq!((before.held_by(0), before.held_by(1)), (3, 3));
    }
}
