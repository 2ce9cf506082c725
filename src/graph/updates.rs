//! What `optimize` was given on each rank: the ranks that train one model find out in their next step if it was not the
//! same.
//!
//! Each rank makes one number of all its updates so far, which goes with what the ranks of a step tell each other in
//! any case. Only where the numbers differ do they tell each other the updates themselves.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::different_updates::{ToldUpdates, difference};
use crate::Error;
use crate::comm::Communicator;
use crate::lock::lock;
use crate::step::AskedNorm;

/// So many updates are kept to be told: more than lie between two comparisons where inputs are on devices.
pub(super) const KEPT: usize = 128;

/// One call of `optimize`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// The learning rate.
    pub rate: f64,
    /// How the norm of the gradient was asked for.
    pub asked: Option<AskedNorm>,
    /// If the optimizer was not the one of an earlier call: a number for the moments that it came with, of what this
    /// rank holds; 0 if there are none, or no other rank has the same.
    pub new_moments: Option<u64>,
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

#[derive(Debug, Clone, Default)]
struct History {
    /// How many there were.
    count: u64,
    /// A number for all of them, without and with the moments.
    digests: [u64; 2],
    /// The last ones.
    last: VecDeque<Update>,
}

impl Updates {
    /// These as they are now, to which none are added: a clone gets all that the original does.
    pub fn copied(&self) -> Self {
        Self(Arc::new(Mutex::new(lock(&self.0).clone())))
    }

    pub fn record(&self, update: Update) {
        let mut history = lock(&self.0);
        let [max, options] = AskedNorm::words(update.asked);
        let words = [u64::from(update.compared_rate()), max, options, u64::from(update.is_new()), update.moments()];
        let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        history.digests = [
            xxh3_64_with_seed(&bytes(&words[..words.len() - 1]), history.digests[0]),
            xxh3_64_with_seed(&bytes(&words), history.digests[1]),
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

    /// The norm that is likely to be asked for of the next step: as that of the last two, so that no step measures what
    /// is asked for now and then, or in another way each time. Ranks with the same number expect the same.
    pub fn expected_norm(&self) -> Option<AskedNorm> {
        let history = lock(&self.0);
        let mut last = history.last.iter().rev().map(|update| update.asked);
        let (one, other) = (last.next()?, last.next()?);
        one.filter(|_| one == other)
    }

    /// What differs between the updates of the ranks of a group, whose numbers do. Collective.
    ///
    /// # Errors
    /// [`Error::Optimizer`] in any case, the same on all ranks; those of [`Communicator`].
    pub fn explain(&self, compared: Compared, group: &Communicator) -> Result<(), Error> {
        let mine = lock(&self.0).told(group.world_rank());
        let told = ToldUpdates::read(&group.all_gather(mine)?);
        let error = Error::Optimizer { problem: difference(&told, compared) };
        group.fail(error.clone());
        Err(error)
    }
}

impl Update {
    pub(super) const WORDS: usize = 3 + AskedNorm::WORDS;

    /// The rate as ranks compare it: in 32 bits, since schedules that are computed on different processors may differ
    /// in the last bit of 64; and there is one that is no number.
    pub(super) fn compared_rate(&self) -> u32 {
        if self.rate.is_nan() { f32::NAN.to_bits() } else { (self.rate as f32).to_bits() }
    }

    pub(super) fn is_new(&self) -> bool {
        self.new_moments.is_some()
    }

    pub(super) fn moments(&self) -> u64 {
        self.new_moments.unwrap_or(0)
    }

    fn words(&self) -> [u64; Self::WORDS] {
        let [max, options] = AskedNorm::words(self.asked);
        [self.rate.to_bits(), max, options, u64::from(self.is_new()), self.moments()]
    }

    pub(super) fn of_words(words: &[u64]) -> Option<Self> {
        let &[rate, max, options, is_new, moments] = words else { return None };
        let asked = AskedNorm::of_words([max, options]);
        Some(Self { rate: f64::from_bits(rate), asked, new_moments: (is_new != 0).then_some(moments) })
    }
}

impl History {
    /// What this rank tells the others.
    fn told(&self, world_rank: usize) -> Vec<u64> {
        let head = [world_rank as u64, self.count, self.last.len() as u64];
        head.into_iter().chain(self.last.iter().flat_map(Update::words)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch;
    use crate::tensor::Norm;

    /// What comes of two ranks that have made these updates.
    fn compared(compared: Compared, updates: [&[Update]; 2]) -> Result<(), Error> {
        let ran = launch::threads(2).run(|rank| {
            let mine = Updates::default();
            updates[rank.rank()].iter().for_each(|update| mine.record(*update));
            let all = rank.all_gather(vec![mine.digest(compared)])?;
            if all[0] == all[1] {
                return Ok(());
            }
            mine.explain(compared, &rank)
        });
        ran.map(drop)
    }

    #[test]
    fn what_differs_is_told_with_the_ranks() {
        let known = |rate| Update { rate, asked: None, new_moments: None };
        let new = |moments| Update { rate: 0.1, asked: None, new_moments: Some(moments) };
        let clipped = |max, norm, skips| Update { asked: Some(AskedNorm { norm, max, skips }), ..known(0.1) };
        let many = vec![known(0.1); 2 * KEPT];
        let late = [&many[..], &[known(0.2)]].concat();
        for (one, other, words) in [
            (&[known(0.1), known(0.1)][..], &[known(0.1), known(0.25)][..], "update number 2 of the model"),
            (&[known(0.1)], &[known(0.25)], "0.1 on rank 0; 0.25 on rank 1"),
            (&[known(f64::NAN)], &[known(0.1)], "NaN on rank 0; 0.1 on rank 1"),
            (&[known(0.1)], &[clipped(1.0, Norm::L2, false)], "not at all on rank 0; to the L2 norm 1 on rank 1"),
            (&[clipped(1.0, Norm::L2, false)], &[clipped(2.0, Norm::L2, false)], "L2 norm 2 on rank 1: all ranks"),
            (&[clipped(1.0, Norm::L2, false)], &[clipped(1.0, Norm::Infinity, true)], "Infinity norm 1, skipping"),
            (&[known(0.1)], &[new(0)], "the one of before on rank 0; a new one"),
            (&[new(0)], &[new(3)], "different moments"),
            (&[known(0.1)], &[known(0.1), known(0.1)], "1 on rank 0; 2 on rank 1 times"),
            (&[&many[..], &[known(0.1)]].concat(), &late, "update number 257 of the model"),
            (&[&[known(0.2)][..], &many].concat(), &[&[known(0.1)][..], &many].concat(), "more than 128 updates ago"),
        ] {
            let error = compared(Compared::Replicas, [one, other]).expect_err(words).to_string();
            assert!(error.contains(words), "`{words}` is missing in: {error}");
        }
        compared(Compared::Parts, [&[new(0)], &[new(3)]]).unwrap();
    }

    /// A save in the background tells what there was when it began, while training goes on.
    #[test]
    fn a_copy_is_of_the_updates_up_to_it() {
        let (updates, update) = (Updates::default(), Update { rate: 0.1, asked: None, new_moments: None });
        updates.record(update);
        let (copy, clone) = (updates.copied(), updates.clone());
        updates.record(update);
        let told = |updates: &Updates| lock(&updates.0).told(0);
        assert!(told(&copy)[1] == 1 && told(&clone)[1] == 2);
        assert_ne!(copy.digest(Compared::Parts), updates.digest(Compared::Parts));
    }

    /// What comes now and then, or in another way each time, is not expected.
    #[test]
    fn a_norm_is_expected_that_was_asked_for_twice() {
        let (updates, asked) = (Updates::default(), |max| Some(AskedNorm { norm: Norm::L2, max, skips: false }));
        for (now, expected) in [
            (asked(1.0), None),
            (asked(1.0), asked(1.0)),
            (asked(2.0), None),
            (asked(1.0), None),
            (None, None),
            (None, None),
            (asked(1.0), None),
            (asked(1.0), asked(1.0)),
        ] {
            updates.record(Update { rate: 0.1, asked: now, new_moments: None });
            assert_eq!(updates.expected_norm(), expected);
        }
    }

    /// Schedules may round in another way on another processor, and numbers that are none have many forms.
    #[test]
    fn last_bits_are_no_difference() {
        let known = |rate| [Update { rate, asked: None, new_moments: None }];
        for (one, other) in [(0.1, 0.1f64.next_up()), (f64::NAN, -f64::NAN)] {
            compared(Compared::Replicas, [&known(one), &known(other)]).unwrap();
        }
    }
}
