//! The wait-for graph of the ranks of a world: at whose end a wait stands that has outlasted the time-out, since ranks
//! wait for ranks that wait for others.

use super::call_log::{CallHistory, describe_missing};
use super::{Call, Operation};

/// Who waits for whom when a wait has outlasted the time-out.
pub(super) struct WaitGraph<'a> {
    /// World ranks of the group in which it was.
    pub members: &'a [usize],
    /// Whether that is the group of the whole world.
    pub whole: bool,
    /// Whom each rank of the world waits for in the calls that it is in; `None` of ranks that give no answer.
    pub waits_for: &'a [Option<Vec<usize>>],
    /// Ranks that are done with the world.
    pub finished: &'a [bool],
}

impl WaitGraph<'_> {
    /// Whom the rank that ran out of time was waiting for, in words. `late` are the ranks of its group that had not
    /// come to the call, if that is what it waited for; `said` is what is known without the others.
    pub fn describe(&self, late: Option<&[usize]>, said: String) -> String {
        let silent: Vec<usize> =
            (0..self.waits_for.len()).filter(|rank| self.waits_for[*rank].is_none() && !self.finished[*rank]).collect();
        let missing: Vec<usize> = late.unwrap_or_default().iter().map(|rank| self.members[*rank]).collect();
        let (roots, why) = match silent.len() {
            0 => (self.idle(&missing), ["is in no call", "are in no call"]),
            _ => (silent, ["gives no answer", "give no answer"]),
        };
        let in_turn: Vec<usize> = missing.iter().copied().filter(|rank| !roots.contains(rank)).collect();
        if self.whole && in_turn.is_empty() && roots == missing {
            return said;
        }
        let names = |ranks: &[usize]| format!("{} of the world", describe_missing(ranks.iter().copied()));
        let why = why[usize::from(roots.len() > 1)];
        match (roots.as_slice(), in_turn.as_slice()) {
            ([], []) => said,
            ([], in_turn) => {
                let of_world = if self.whole { String::new() } else { format!(", that is for {}", names(in_turn)) };
                format!("{said}{of_world}{}", self.ring(in_turn))
            }
            (roots, []) if late.is_some() => format!("{}, which {why}", names(roots)),
            // They had come, and something is missing of them.
            (roots, []) => format!("{}, which {why}; here for {said}", names(roots)),
            (roots, in_turn) => format!("{}, which {why}; here for {}, waiting in turn", names(roots), names(in_turn)),
        }
    }

    /// What is to be said of ranks that wait themselves, and for nobody who is in no call: they wait for each other.
    fn ring(&self, ranks: &[usize]) -> &'static str {
        let waits = |rank: &usize| self.waits_for[*rank].as_ref().is_some_and(|others| !others.is_empty());
        match ranks.iter().all(waits) {
            true => {
                "; what it waits for waits in turn in another call, so some rank may have a call that the others do not make"
            }
            false => "",
        }
    }

    /// The ranks in no call for which these wait, be it through others.
    fn idle(&self, waited_for: &[usize]) -> Vec<usize> {
        let (mut seen, mut idle) = (vec![false; self.waits_for.len()], Vec::new());
        let mut next = waited_for.to_vec();
        while let Some(rank) = next.pop() {
            if std::mem::replace(&mut seen[rank], true) {
                continue;
            }
            match &self.waits_for[rank] {
                Some(waits_for) if !waits_for.is_empty() => next.extend(waits_for),
                Some(_) if !self.finished[rank] => idle.push(rank),
                _ => {}
            }
        }
        idle.sort_unstable();
        idle
    }
}

/// The ranks of the world that a member of a group waits for in its call, if it is in one.
pub(super) fn waits_for(history: &CallHistory, members: &[usize], rank: usize) -> Vec<usize> {
    match history.current(rank) {
        None => Vec::new(),
        Some(Call {
            operation: Operation::Receive { from: other, .. } | Operation::Send { to: other, .. }, ..
        }) => members.get(other).copied().into_iter().collect(),
        Some(_) => members.iter().copied().filter(|member| *member != members[rank]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe(members: &[usize], late: Option<&[usize]>, waits: [Option<&[usize]>; 4], said: &str) -> String {
        let waits_for = waits.map(|ranks| ranks.map(<[usize]>::to_vec));
        let (whole, finished) = (members.len() == 4, [false; 4]);
        WaitGraph { members, whole, waits_for: &waits_for, finished: &finished }.describe(late, said.into())
    }

    #[test]
    fn who_gives_no_answer_comes_first() {
        // dp 2 x tp 2, of which rank 3 is stopped: rank 2 waits for it, rank 0 for rank 2.
        let waits = [Some(&[2][..]), Some(&[3]), Some(&[3]), None];
        let said = describe(&[0, 2], Some(&[1]), waits, "rank 1");
        assert_eq!(said, "rank 3 of the world, which gives no answer; here for rank 2 of the world, waiting in turn");
        assert_eq!(describe(&[1, 3], Some(&[1]), waits, "rank 1"), "rank 3 of the world, which gives no answer");
        // A ring.
        let ring = [Some(&[1][..]), Some(&[2]), None, Some(&[0])];
        let said = describe(&[0, 1, 2, 3], None, ring, "data from rank 1");
        assert_eq!(said, "rank 2 of the world, which gives no answer; here for data from rank 1");
        // The words of a world without other groups.
        let waits = [Some(&[1, 2, 3][..]), None, Some(&[0, 1, 3]), Some(&[0, 1, 2])];
        assert_eq!(describe(&[0, 1, 2, 3], Some(&[1]), waits, "rank 1"), "rank 1");
    }

    #[test]
    fn who_is_in_no_call_comes_first_otherwise() {
        let waits = [Some(&[2][..]), Some(&[3]), Some(&[3]), Some(&[])];
        let said = describe(&[0, 2], Some(&[1]), waits, "rank 1");
        assert_eq!(said, "rank 3 of the world, which is in no call; here for rank 2 of the world, waiting in turn");
        // Whoever is in no call and is not waited for has nothing to do with it.
        let waits = [Some(&[2][..]), Some(&[]), Some(&[0]), Some(&[])];
        let said = describe(&[0, 2], Some(&[1]), waits, "rank 1");
        assert!(said.starts_with("rank 1, that is for rank 2 of the world; "), "{said}");
        assert!(said.contains("a call that the others do not make"), "{said}");
        let waits = [Some(&[1, 2][..]), Some(&[]), Some(&[]), Some(&[0])];
        assert_eq!(describe(&[0, 1, 2, 3], Some(&[1, 2]), waits, "ranks 1, 2"), "ranks 1, 2");
    }
}
