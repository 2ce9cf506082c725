//! In what updates of a model differ, in words.

use super::updates::{Compared, KEPT, Update};
use crate::step::AskedNorm;

/// What a rank has told.
pub(super) struct ToldUpdates {
    world_rank: u64,
    count: u64,
    last: Vec<Update>,
}

impl ToldUpdates {
    /// That of all ranks, one behind the other.
    pub fn read(mut words: &[u64]) -> Vec<Self> {
        let mut all = Vec::new();
        while let [world_rank, count, len, rest @ ..] = words {
            let (updates, others) = rest.split_at((*len as usize).saturating_mul(Update::WORDS).min(rest.len()));
            let last = updates.chunks_exact(Update::WORDS).filter_map(Update::of_words).collect();
            all.push(Self { world_rank: *world_rank, count: *count, last });
            words = others;
        }
        all
    }

    /// The number of the first update that was told.
    fn first(&self) -> u64 {
        self.count.saturating_sub(self.last.len() as u64)
    }

    fn update(&self, number: u64) -> Option<&Update> {
        number.checked_sub(self.first()).and_then(|place| self.last.get(place as usize))
    }
}

/// In what the ranks differ, in the first update in which they do.
pub(super) fn difference(told: &[ToldUpdates], compared: Compared) -> String {
    let first = told.iter().map(ToldUpdates::first).max().unwrap_or(0);
    let [least, most] = [told.iter().map(|told| told.count).min(), told.iter().map(|told| told.count).max()]
        .map(Option::unwrap_or_default);
    for number in first..least {
        let updates: Vec<(u64, &Update)> =
            told.iter().filter_map(|told| Some((told.world_rank, told.update(number)?))).collect();
        if let Some(problem) = difference_of(&updates, compared) {
            return format!("in update number {} of the model {problem}", number + 1);
        }
    }
    if least != most {
        let counts: Vec<(u64, String)> = told.iter().map(|told| (told.world_rank, told.count.to_string())).collect();
        return format!(
            "not all ranks that train one model have called `optimize` equally often since it was wrapped: {} times: call \
             it after every step on all of them, or on none",
            by_value(&counts)
        );
    }
    format!(
        "the ranks that train one model have not updated it alike, more than {KEPT} updates ago: give `optimize` the same \
         learning rate and optimizer on all of them; with `check_inputs_every` they compare more often"
    )
}

/// In what the ranks differ in one update.
fn difference_of(updates: &[(u64, &Update)], compared: Compared) -> Option<String> {
    let first = updates.first()?.1;
    if updates.iter().any(|(_, update)| update.compared_rate() != first.compared_rate()) {
        let rates: Vec<(u64, String)> = updates.iter().map(|(rank, update)| (*rank, update.rate.to_string())).collect();
        return Some(format!(
            "`optimize` was given different learning rates: {}: all ranks that train one model take the same (rates of \
             their own are for groups of parameters, by a `ModuleLrScheduler`)",
            by_value(&rates)
        ));
    }
    if updates.iter().any(|(_, update)| update.asked != first.asked) {
        let said = |asked: Option<AskedNorm>| asked.map_or("not at all".into(), |asked| asked.to_string());
        let clipped: Vec<(u64, String)> = updates.iter().map(|(rank, update)| (*rank, said(update.asked))).collect();
        return Some(format!(
            "the gradient was clipped differently: {}: all ranks that train one model call `clip_grad_norm` alike, or none",
            by_value(&clipped)
        ));
    }
    if updates.iter().any(|(_, update)| update.is_new() != first.is_new()) {
        let said = |new: bool| if new { "a new one, or one with a state that was loaded" } else { "the one of before" };
        let kinds: Vec<(u64, String)> =
            updates.iter().map(|(rank, update)| (*rank, said(update.is_new()).into())).collect();
        return Some(format!(
            "`optimize` was given another optimizer on some ranks only: {}: all ranks that train one model put a new one in \
             the place of the old, or load a state into it, after the same step",
            by_value(&kinds)
        ));
    }
    let other = updates.iter().find(|(_, update)| update.moments() != first.moments());
    let (rank, _) = other.filter(|_| compared == Compared::Replicas)?;
    Some(format!(
        "the optimizers of rank {rank} of the world and of rank {} came with different moments of the same parameters: \
         replicas load the same state, or all restore a checkpoint",
        updates[0].0
    ))
}

/// Each value, in words, with the ranks of the world that have it.
fn by_value(values: &[(u64, String)]) -> String {
    /// So many ranks are listed.
    const LISTED: usize = 8;
    let mut known: Vec<(&str, Vec<u64>)> = Vec::new();
    for (rank, value) in values {
        match known.iter_mut().find(|(known, _)| known == value) {
            Some((_, ranks)) => ranks.push(*rank),
            None => known.push((value, vec![*rank])),
        }
    }
    let said = |(value, ranks): &(&str, Vec<u64>)| {
        let listed: Vec<String> = ranks.iter().take(LISTED).map(u64::to_string).collect();
        let more = ranks.len().saturating_sub(LISTED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("{value} on rank{} {}{more}", if ranks.len() == 1 { "" } else { "s" }, listed.join(", "))
    };
    known.iter().map(said).collect::<Vec<_>>().join("; ")
}
