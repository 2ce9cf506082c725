//! Which positions of which rank each chunk of a collective product holds.

use std::ops::Range;

use super::ProductCall;
use super::schedule::ChunkSchedule;
use crate::Error;
use crate::comm::{check_part, part};

/// The positions of all ranks, of which each must have its part.
pub(super) fn total_positions(own: usize, call: &ProductCall) -> Result<usize, Error> {
    if call.even {
        return Ok(own * call.comm.size());
    }
    let all = call.comm.all_gather(vec![own as u64])?;
    let total = all.iter().sum::<u64>() as usize;
    all.iter().enumerate().try_for_each(|(rank, brought)| check_positions(rank, *brought as usize, total, call))?;
    Ok(total)
}

/// Demands that what a rank brought is its part of the whole. The world fails if not.
pub(super) fn check_positions(rank: usize, brought: usize, total: usize, call: &ProductCall) -> Result<(), Error> {
    check_part(call.name, &call.comm, rank, (brought, total), "the sequence")
}

/// Which positions of which rank are in which chunk: of each rank's part the same stretch, as far as the part goes.
pub(super) struct ChunkPlan {
    parts: Vec<Range<usize>>,
    rank: usize,
    chunks: Vec<Range<usize>>,
}

impl ChunkPlan {
    pub fn new(positions: usize, size: usize, rank: usize, schedule: ChunkSchedule) -> Self {
        let parts: Vec<_> = (0..size).map(|rank| part(positions, size, rank)).collect();
        let longest = parts.iter().map(Range::len).max().unwrap_or(0);
        Self { rank, chunks: schedule.cut(longest).collect(), parts }
    }

    /// Positions of this rank.
    pub fn own(&self) -> usize {
        self.parts[self.rank].len()
    }

    fn of(&self, part: &Range<usize>, chunk: usize) -> Range<usize> {
        let at = |place: usize| part.end.min(part.start + place);
        at(self.chunks[chunk].start)..at(self.chunks[chunk].end)
    }

    pub fn of_own(&self, chunk: usize) -> Range<usize> {
        self.of(&self.parts[self.rank], chunk)
    }

    /// The positions of this rank, counted from its first.
    pub fn within_own(&self, chunk: usize) -> Range<usize> {
        let (own, start) = (self.of_own(chunk), self.parts[self.rank].start);
        own.start - start..own.end - start
    }

    pub fn of_all(&self, chunk: usize) -> impl Iterator<Item = Range<usize>> {
        self.parts.iter().map(move |part| self.of(part, chunk))
    }

    /// Positions of a chunk, over all ranks. `part` divides them as they are divided here: parts differ by one at most,
    /// so a chunk is even unless it is the last, in which the first ranks have one more.
    pub fn total(&self, chunk: usize) -> usize {
        self.of_all(chunk).map(|positions| positions.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_divided_as_parts_are() {
        for size in 1..9 {
            for positions in 0..40 {
                for chunks in 1..6 {
                    let schedule = ChunkSchedule { chunks, background: false };
                    let mut had = vec![0; size];
                    for chunk in 0..chunks {
                        let plan = |rank| ChunkPlan::new(positions, size, rank, schedule);
                        let plans: Vec<ChunkPlan> = (0..size).map(plan).collect();
                        let total = plans[0].total(chunk);
                        for (rank, plan) in plans.iter().enumerate() {
                            let own = plan.of_own(chunk);
                            assert_eq!(own.len(), part(total, size, rank).len(), "{size} {positions} {chunks} {chunk}");
                            assert_eq!(own.start, part(positions, size, rank).start + had[rank]);
                            had[rank] += own.len();
                        }
                    }
                    assert_eq!(had.iter().sum::<usize>(), positions);
                }
            }
        }
    }
}
