//! Combines the norms of the gradients that each rank holds.

use super::{Clip, Norm};
use crate::Error;
use crate::comm::{Communicator, StepPart};
use crate::tensor::PartialNorm;

/// The first gradient that is not finite: its place among the parameters of the model, and the rank that brought it.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub(super) struct NonFiniteGradient {
    pub place: usize,
    pub rank: usize,
}

/// What a rank, or several together, know.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NormReport {
    pub size: PartialNorm,
    /// What micro-batches have measured of their gradients, to be summed up as well.
    pub squares: f64,
    pub non_finite: Option<NonFiniteGradient>,
}

/// What a rank sends: the numbers of its [`NormReport`], and its options.
const NUMBERS: usize = 7;

impl NormReport {
    fn to_numbers(self, clip: &Clip) -> Vec<f64> {
        let (place, rank) = self
            .non_finite
            .map_or((f64::INFINITY, 0.0), |non_finite| (non_finite.place as f64, non_finite.rank as f64));
        vec![self.size.unit, self.size.sum, place, rank, self.squares, clip.max, clip.number()]
    }

    fn of_numbers(numbers: &[f64]) -> Self {
        let non_finite =
            numbers[2].is_finite().then(|| NonFiniteGradient { place: numbers[2] as usize, rank: numbers[3] as usize });
        Self { size: PartialNorm { unit: numbers[0], sum: numbers[1] }, squares: numbers[4], non_finite }
    }

    fn with(self, other: Self, norm: Norm) -> Self {
        let non_finite = match (self.non_finite, other.non_finite) {
            (Some(one), Some(two)) => Some(if two < one { two } else { one }),
            (one, two) => one.or(two),
        };
        Self { size: self.size.with(other.size, norm), squares: self.squares + other.squares, non_finite }
    }

    /// What all ranks know together, bit for bit the same on each: one collective of a few numbers over each group. A
    /// rank is in one group along each axis, so that after the last every rank knows of all. `step` is the number of
    /// the step that the gradient is of.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], the same on all ranks, if they were asked for different things; those of
    /// [`Communicator`].
    pub fn over(self, groups: &[Communicator], clip: &Clip, step: u64) -> Result<Self, Error> {
        let mut known = self;
        for group in groups.iter().filter(|group| group.size() > 1) {
            let all = group.all_gather_agreed(known.to_numbers(clip), StepPart::Norm.of(step))?;
            let mut all = all.chunks_exact(NUMBERS);
            let first = all.next().unwrap_or_default();
            known = Self::of_numbers(first);
            for (place, numbers) in all.enumerate() {
                if numbers[5..] != first[5..] {
                    let error = disagreement(group, place + 1, [first, numbers]);
                    group.fail(error.clone());
                    return Err(error);
                }
                known = known.with(Self::of_numbers(numbers), clip.norm);
            }
        }
        Ok(known)
    }
}

fn disagreement(group: &Communicator, rank: usize, asked: [&[f64]; 2]) -> Error {
    let [first, other] = asked.map(|numbers| Clip::of_numbers(numbers[5], numbers[6]));
    Error::invalid(
        "clip_grad_norm",
        format!(
            "rank {rank} of group `{}` was asked for {other:?}, rank 0 for {first:?}: clip alike on all ranks",
            group.group()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch;
    use crate::mesh::Mesh;

    fn known(sum: f64, non_finite: Option<(usize, usize)>) -> NormReport {
        NormReport {
            size: PartialNorm { unit: 1.0, sum },
            squares: sum,
            non_finite: non_finite.map(|(place, rank)| NonFiniteGradient { place, rank }),
        }
    }

    #[test]
    fn all_ranks_know_the_same_after_one_collective_for_each_axis() {
        for [outer, inner] in [[1, 1], [2, 1], [1, 3], [2, 2], [3, 2], [2, 4], [4, 2]] {
            let all = launch::threads(outer * inner)
                .run(|world| {
                    let mesh = Mesh::new(&world, [("pp", outer), ("tp", inner)])?;
                    let groups = [mesh.axis("tp")?, mesh.axis("pp")?];
                    let before = groups.each_ref().map(|group| group.counters().of("all_gather").calls);
                    let rank = world.rank();
                    // Of several bad ones the first parameter counts, then the first rank.
                    let non_finite = (rank >= 1).then_some((if rank == 1 { 7 } else { 5 }, rank));
                    let mine = known(0.1 + rank as f64, non_finite);
                    let known = mine.over(&groups, &Clip::at(1.0), 1)?;
                    for (group, before) in groups.iter().zip(before) {
                        let calls = group.counters().of("all_gather").calls - before;
                        assert_eq!(calls, u64::from(group.size() > 1));
                    }
                    Ok(known)
                })
                .unwrap();
            let ranks = outer * inner;
            assert!(all.iter().all(|known| *known == all[0]));
            let sum: f64 = (0..ranks).map(|rank| 0.1 + rank as f64).sum();
            assert!((all[0].size.sum - sum).abs() < 1e-12 * sum && all[0].squares == all[0].size.sum);
            let non_finite = match ranks {
                1 => None,
                2 => Some(NonFiniteGradient { place: 7, rank: 1 }),
                _ => Some(NonFiniteGradient { place: 5, rank: 2 }),
            };
            assert_eq!(all[0].non_finite, non_finite);
        }
    }

    #[test]
    fn ranks_that_clip_at_different_norms_are_told_so() {
        let other = |rank: usize| match rank {
            2 => Clip::at(2.0),
            _ => Clip::at(1.0),
        };
        let problem =
            launch::threads(3).run(|world| known(1.0, None).over(&[(*world).clone()], &other(world.rank()), 1));
        let problem = problem.unwrap_err().to_string();
        assert!(problem.contains("rank 2") && problem.contains("clip alike"), "{problem}");
    }
}
