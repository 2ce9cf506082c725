//! What `optimize` was given on each rank: the ranks that train one model find out in their next step if it was not the
//! same.
//!
//! Each rank makes one number of all its updates so far, which goes with what the ranks of a step tell each other in
//! any case. Only where the numbers differ do they tell each other the updates themselves.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::Error;
use crate::comm::Communicator;
use crate::lock::lock;

/// So many updates are kept to be told: more than lie between two comparisons where inputs are on devices.
const KEPT: usize = 128;

/// By how much optimizers of equal settings may differ in what they make of the same numbers, on processors that round
/// differently.
const ROUNDING: f32 = 1e-4;

/// One call of `optimize`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// The learning rate.
    pub rate: f64,
    /// What is known of the optimizer, if it was not the one of an earlier call.
    pub new: Option<NewOptimizer>,
}

/// What tells one optimizer from another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NewOptimizer {
    /// What it makes of a few numbers, the same for all.
    pub made: [f32; NewOptimizer::NUMBERS],
    /// A number for its moments of what this rank holds; 0 if there are none, or no other rank has the same.
    pub moments: u64,
}

impl NewOptimizer {
    pub const NUMBERS: usize = 4;
}

/// Which ranks compare their updates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compared {
    /// Those that hold different parts of a model, with different moments.
    Parts,
    /// Replicas of the same parts.
    Replicas,
}

/// The updates that a model has had on this rank.
#[derive(Debug, Clone, Default)]
pub struct Updates(Arc<Mutex<History>>);

#[derive(Debug, Default)]
struct History {
    /// How many there were.
    count: u64,
    /// A number for all of them, without and with the moments.
    digests: [u64; 2],
    /// The last ones.
    last: VecDeque<Update>,
}

impl Updates {
    pub fn record(&self, update: Update) {
        let mut history = lock(&self.0);
        let words = update.words();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let without_moments = bytes.len() - size_of::<u64>();
        history.digests = [
            xxh3_64_with_seed(&bytes[..without_moments], history.digests[0]),
            xxh3_64_with_seed(&bytes, history.digests[1]),
        ];
        history.count += 1;
        if history.last.len() == KEPT {
            history.last.pop_front();
        }
        history.last.push_back(update);
    }

    /// A number for all updates, by which ranks compare them.
    pub fn digest(&self, compared: Compared) -> u64 {
        lock(&self.0).digests[compared as usize]
    }

    /// Demands the same updates of all ranks of a group whose numbers differ: finds out by what. Collective.
    ///
    /// # Errors
    /// [`Error::Optimizer`], the same on all ranks; those of [`Communicator`].
    pub fn explain(&self, compared: Compared, group: &Communicator) -> Result<(), Error> {
        let mine = lock(&self.0).told(group.world_rank(), compared);
        let told = Told::read(&group.all_gather(mine)?);
        match difference(&told, compared) {
            Some(problem) => {
                let error = Error::Optimizer { problem };
                group.fail(error.clone());
                Err(error)
            }
            None => {
                // From here on all go by what the first has rounded.
                let digest = told.first().map(|told| told.digest);
                digest.into_iter().for_each(|digest| lock(&self.0).digests[compared as usize] = digest);
                Ok(())
            }
        }
    }
}

impl Update {
    const WORDS: usize = 5;

    fn words(&self) -> [u64; Self::WORDS] {
        let pair = |one: f32, other: f32| u64::from(one.to_bits()) << 32 | u64::from(other.to_bits());
        let (is_new, [a, b, c, d], moments) = match self.new {
            Some(NewOptimizer { made, moments }) => (1, made, moments),
            None => (0, [0.0; NewOptimizer::NUMBERS], 0),
        };
        [self.rate.to_bits(), is_new, pair(a, b), pair(c, d), moments]
    }

    fn of_words(words: &[u64]) -> Option<Self> {
        let &[rate, is_new, first, second, moments] = words else { return None };
        let pair = |word: u64| [f32::from_bits((word >> 32) as u32), f32::from_bits(word as u32)];
        let ([a, b], [c, d]) = (pair(first), pair(second));
        let new = (is_new != 0).then_some(NewOptimizer { made: [a, b, c, d], moments });
        Some(Self { rate: f64::from_bits(rate), new })
    }
}

impl History {
    /// What this rank tells the others.
    fn told(&self, world_rank: usize, compared: Compared) -> Vec<u64> {
        let head = [world_rank as u64, self.digests[compared as usize], self.count, self.last.len() as u64];
        head.into_iter().chain(self.last.iter().flat_map(Update::words)).collect()
    }
}

/// What a rank has told.
struct Told {
    world_rank: u64,
    digest: u64,
    count: u64,
    last: Vec<Update>,
}

impl Told {
    /// That of all ranks, one behind the other.
    fn read(mut words: &[u64]) -> Vec<Self> {
        let mut all = Vec::new();
        while let [world_rank, digest, count, len, rest @ ..] = words {
            let (updates, others) = rest.split_at((*len as usize).saturating_mul(Update::WORDS).min(rest.len()));
            let last = updates.chunks_exact(Update::WORDS).filter_map(Update::of_words).collect();
            all.push(Self { world_rank: *world_rank, digest: *digest, count: *count, last });
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

/// In what the ranks differ, in the first update in which they do; `None` if it is rounding only.
fn difference(told: &[Told], compared: Compared) -> Option<String> {
    let first = told.iter().map(Told::first).max().unwrap_or(0);
    let [least, most] = [told.iter().map(|told| told.count).min(), told.iter().map(|told| told.count).max()]
        .map(Option::unwrap_or_default);
    let mut rounded = false;
    for number in first..least {
        let updates: Vec<(u64, &Update)> =
            told.iter().filter_map(|told| Some((told.world_rank, told.update(number)?))).collect();
        if let Some(problem) = difference_of(&updates, compared) {
            return Some(format!("in update number {} of the model {problem}", number + 1));
        }
        rounded |= updates.iter().any(|(_, update)| update.words() != updates[0].1.words());
    }
    if least != most {
        let counts: Vec<(u64, String)> = told.iter().map(|told| (told.world_rank, told.count.to_string())).collect();
        return Some(format!(
            "not all ranks that train one model have called `optimize` equally often since it was wrapped: {} times: call \
             it after every step on all of them, or on none",
            by_value(&counts)
        ));
    }
    (!rounded).then(|| {
        format!(
            "the ranks that train one model have not updated it alike, more than {KEPT} updates ago: give `optimize` the \
             same learning rate and optimizer on all of them; with `check_inputs_every` they compare more often"
        )
    })
}

/// In what the ranks differ in one update.
fn difference_of(updates: &[(u64, &Update)], compared: Compared) -> Option<String> {
    let first = updates.first()?.1;
    if updates.iter().any(|(_, update)| update.rate.to_bits() != first.rate.to_bits()) {
        let rates: Vec<(u64, String)> = updates.iter().map(|(rank, update)| (*rank, update.rate.to_string())).collect();
        return Some(format!(
            "`optimize` was given different learning rates: {}: all ranks that train one model take the same (rates of \
             their own are for groups of parameters, by a `ModuleLrScheduler`)",
            by_value(&rates)
        ));
    }
    if updates.iter().any(|(_, update)| update.new.is_some() != first.new.is_some()) {
        let said = |new: bool| if new { "a new one, or one with a state that was loaded" } else { "the one of before" };
        let kinds: Vec<(u64, String)> =
            updates.iter().map(|(rank, update)| (*rank, said(update.new.is_some()).into())).collect();
        return Some(format!(
            "`optimize` was given another optimizer on some ranks only: {}: all ranks that train one model put a new one in \
             the place of the old, or load a state into it, after the same step",
            by_value(&kinds)
        ));
    }
    let (made, moments) =
        (|update: &Update| update.new.map(|new| new.made), |update: &Update| update.new.map(|new| new.moments));
    let differ =
        |update: &Update| !made(update).into_iter().flatten().zip(made(first).into_iter().flatten()).all(alike);
    if let Some((rank, _)) = updates.iter().find(|(_, update)| differ(update)) {
        return Some(format!(
            "the optimizer of rank {rank} of the world is of another kind than that of rank {}, or has other settings (it \
             updates the same numbers in another way): make the same on all ranks that train one model",
            updates[0].0
        ));
    }
    let other = updates.iter().find(|(_, update)| moments(update) != moments(first));
    let (rank, _) = other.filter(|_| compared == Compared::Replicas)?;
    Some(format!(
        "the optimizers of rank {rank} of the world and of rank {} came with different moments of the same parameters: \
         replicas load the same state, or all restore a checkpoint",
        updates[0].0
    ))
}

fn alike((one, other): (f32, f32)) -> bool {
    one.to_bits() == other.to_bits() || (one - other).abs() <= ROUNDING * one.abs().max(other.abs())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch;

    fn new(made: f32, moments: u64) -> Option<NewOptimizer> {
        Some(NewOptimizer { made: [made, 0.5, -1.0, f32::NAN], moments })
    }

    /// What comes of two ranks that have made these updates.
    fn compared(compared: Compared, updates: [&[Update]; 2]) -> Result<(), Error> {
        let ran = launch::threads(2).run(|rank| {
            let mine = Updates::default();
            updates[rank.rank()].iter().for_each(|update| mine.record(*update));
            let all = rank.all_gather(vec![mine.digest(compared)])?;
            if all[0] == all[1] {
                return Ok(());
            }
            mine.explain(compared, &rank)?;
            let all = rank.all_gather(vec![mine.digest(compared)])?;
            assert_eq!(all[0], all[1]);
            Ok(())
        });
        ran.map(drop)
    }

    #[test]
    fn what_differs_is_told_with_the_ranks() {
        let known = |rate| Update { rate, new: None };
        let first = |new| Update { rate: 0.1, new };
        let many = vec![known(0.1); 2 * KEPT];
        let late = [&many[..], &[known(0.2)]].concat();
        for (one, other, words) in [
            (&[known(0.1), known(0.1)][..], &[known(0.1), known(0.25)][..], "update number 2 of the model"),
            (&[known(0.1)], &[known(0.25)], "0.1 on rank 0; 0.25 on rank 1"),
            (&[first(None)], &[first(new(1.0, 0))], "the one of before on rank 0; a new one"),
            (&[first(new(1.0, 0))], &[first(new(1.1, 0))], "rank 1 of the world is of another kind"),
            (&[first(new(1.0, 0))], &[first(new(1.0, 3))], "different moments"),
            (&[first(None)], &[first(None), first(None)], "1 on rank 0; 2 on rank 1 times"),
            (&[&many[..], &[known(0.1)]].concat(), &late, "update number 257 of the model"),
            (&[&[known(0.2)][..], &many].concat(), &[&[known(0.1)][..], &many].concat(), "more than 128 updates ago"),
        ] {
            let error = compared(Compared::Replicas, [one, other]).expect_err(words).to_string();
            assert!(error.contains(words), "`{words}` is missing in: {error}");
        }
        let [one, other] = [0, 3].map(|moments| [first(new(1.0, moments))]);
        compared(Compared::Parts, [&one, &other]).unwrap();
    }

    /// What is rounded differently is no other optimizer, and not told a second time.
    #[test]
    fn rounding_is_no_difference() {
        let [one, other] = [1.0, 1.0 + 1e-6].map(|made| [Update { rate: 0.1, new: new(made, 7) }]);
        for ranks in [Compared::Parts, Compared::Replicas] {
            compared(ranks, [&one, &other]).unwrap();
        }
    }
}
