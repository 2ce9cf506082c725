//! In which order groups are gathered again in a backward.
//!
//! What burn asks for again depends on what has a gradient, and on how layers multiply: the ranks may detach different
//! things, or have a loss that counts for nothing, and `Linear` goes by the number of rows. They would gather different
//! groups. So all of them come to every group that the forward used, in the reverse of the order
//! in which it used them last, and gather it there, whoever needs it, unless none does
//! ([`is_needed`](super::Gatherer::is_needed)). The forward uses the same on all ranks. A group that it used several
//! times, with others between, may be asked for as often on some ranks: all gather it, and keep it to the end of the
//! backward.

use std::collections::{HashSet, VecDeque};

/// The groups of a forward, and of its backward.
#[derive(Debug, Default)]
pub(super) struct BackwardOrder {
    /// Those that forwards have used since the last backward, the last one last.
    used: Vec<usize>,
    /// Those of them that were used again after others.
    several: HashSet<usize>,
    /// Those that the backward under way has not come to.
    left: VecDeque<usize>,
    under_way: bool,
}

impl BackwardOrder {
    /// A forward uses a group.
    pub fn used(&mut self, group: usize) {
        if self.used.last() != Some(&group) {
            if self.used.contains(&group) {
                self.several.insert(group);
            }
            self.used.retain(|used| *used != group);
            self.used.push(group);
        }
    }

    /// A backward begins.
    pub fn begin(&mut self) {
        self.left = std::mem::take(&mut self.used).into_iter().rev().collect();
        self.under_way = true;
    }

    pub fn is_under_way(&self) -> bool {
        self.under_way
    }

    /// Whether the backward under way is still to come to a group.
    pub fn comes_to(&self, group: usize) -> bool {
        self.under_way && self.left.contains(&group)
    }

    /// Whether a group is gathered in the backward under way and stays whole to its end, as forward used it several
    /// times.
    pub fn keeps(&self, group: usize) -> bool {
        self.under_way && self.several.contains(&group)
    }

    /// Whether the backward under way has come to a group before.
    pub fn has_passed(&self, group: usize) -> bool {
        self.under_way && !self.left.contains(&group)
    }

    /// The backward needs a group. Returns those that others may have needed before it, to be gathered first.
    pub fn until(&mut self, group: usize) -> Vec<usize> {
        match self.left.iter().position(|left| *left == group) {
            None => Vec::new(),
            Some(place) => {
                let before = self.left.drain(..place).collect();
                self.left.pop_front();
                before
            }
        }
    }

    /// This rank needs no more. Returns those that others may need still.
    pub fn rest(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.left).into()
    }

    /// The backward is over.
    pub fn end(&mut self) {
        self.under_way = false;
        self.several.clear();
    }

    /// Nobody knows what comes next.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::BackwardOrder;

    /// What one rank needs of each other's gathers in a backward: together they are the same, whoever needs what.
    #[test]
    fn all_ranks_come_to_all_groups() {
        let gathered = |needed: &[usize]| {
            let mut order = BackwardOrder::default();
            [0, 1, 1, 2, 3, 0].into_iter().for_each(|group| order.used(group));
            order.begin();
            let mut all = Vec::new();
            for group in needed {
                all.extend(order.until(*group));
                all.push(*group);
            }
            all.extend(order.rest());
            assert!(order.rest().is_empty() && order.until(2).is_empty());
            all
        };
        for needed in [&[][..], &[0, 3, 2, 1], &[3, 1], &[2], &[0], &[1]] {
            assert_eq!(gathered(needed), [0, 3, 2, 1], "{needed:?}");
        }
        // What is needed a second time comes on top, unless it is whole still.
        assert_eq!(gathered(&[3, 2, 3]), [0, 3, 2, 3, 1]);
    }

    /// Only a group that was used again after others stays, from the begin of the backward to its end.
    #[test]
    fn what_several_uses_share_is_kept() {
        let mut order = BackwardOrder::default();
        [0, 1, 1, 2, 0, 3].into_iter().for_each(|group| order.used(group));
        assert!(!order.keeps(0) && !order.has_passed(3));
        order.begin();
        assert_eq!([0, 1, 2, 3].map(|group| order.keeps(group)), [true, false, false, false]);
        assert!(order.until(0) == [3] && order.has_passed(0) && order.has_passed(3) && !order.has_passed(2));
        assert_eq!(order.rest(), [2, 1]);
        assert!(order.keeps(0) && !order.keeps(1));
        order.end();
        assert!(!order.keeps(0) && !order.has_passed(0));
    }
}
