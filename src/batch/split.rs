//! Divides a global batch over replicas and micro-batches.

use std::fmt;
use std::ops::Range;

use crate::Error;
use crate::comm::part;
use crate::train::Strategy;

/// How the rows of a global batch are divided: each replica takes consecutive rows, as equal as can be, and takes them
/// in micro-batches. A replica that has a row less may have a micro-batch less.
///
/// Nothing is dropped or repeated where something does not divide: replicas differ by a row at most, and so do the
/// micro-batches of a replica (10 rows, at most 4 at once, are 4 + 3 + 3, not 4 + 4 + 2: the memory that a step needs
/// is used evenly, and captured steps see two shapes at most). A step averages over rows, so unequal shares train as
/// one device does.
///
/// ```
/// use burn_parallel::batch::BatchSplit;
/// use burn_parallel::prelude::*;
///
/// // 21 rows on a world of 8 ranks of which 2 hold a replica, at most 3 rows at once
/// let split = BatchSplit::of(&Strategy::new().with_tp(2, Plan::megatron()), 8, 21, Some(3))?;
/// assert_eq!((split.replicas(), split.accumulation(), split.micro_batch()), (4, 2, 3));
/// assert_eq!(split.micro_batches(0), [0..3, 3..6]);
/// assert_eq!(split.micro_batches(3), [16..19, 19..21]);
/// assert_eq!(split.to_string(), "21 rows = 4 replicas x 2 micro-batches of at most 3 rows");
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchSplit {
    rows: usize,
    replicas: usize,
    runs: usize,
    pieces: usize,
}

impl BatchSplit {
    /// Divides `rows` over so many replicas, each of which takes at most `micro_batch` rows at once; all that it has
    /// without a number.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a replica would have no row, or a number is 0.
    pub fn new(rows: usize, replicas: usize, micro_batch: Option<usize>) -> Result<Self, Error> {
        Self::divide(rows, replicas, 1, micro_batch)
    }

    /// Divides the rows as a strategy does that many ranks share. In a pipeline `micro_batch` bounds the rows of one of
    /// *its* micro-batches, of which [`PipelineConfig::micro_batches`](crate::pipeline_parallel::PipelineConfig) go
    /// through it in one run; accumulation is over runs.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), also if a run would have fewer rows than the pipeline has micro-batches; those of
    /// [`Strategy::axes`].
    pub fn of(strategy: &Strategy, ranks: usize, rows: usize, micro_batch: Option<usize>) -> Result<Self, Error> {
        let [dp, pp, _] = strategy.axes(ranks)?;
        let pieces = strategy.pipeline.as_ref().filter(|_| pp > 1).map_or(1, |pipeline| pipeline.micro_batches);
        Self::divide(rows, dp, pieces, micro_batch)
    }

    fn divide(rows: usize, replicas: usize, pieces: usize, micro_batch: Option<usize>) -> Result<Self, Error> {
        let wrong = |problem: String| Err(Error::invalid("BatchSplit", problem));
        if replicas == 0 || pieces == 0 || micro_batch == Some(0) {
            return wrong(format!(
                "{rows} rows over {replicas} replicas, in {pieces} pieces of at most {micro_batch:?} rows: none of these can be 0"
            ));
        }
        if rows < replicas {
            return wrong(format!(
                "a batch of {rows} rows leaves some of the {replicas} replicas without any: take at least {replicas}"
            ));
        }
        let (most, fewest) = (rows.div_ceil(replicas), rows / replicas);
        let at_once = micro_batch.map_or(most, |micro_batch| micro_batch.saturating_mul(pieces));
        // The replica with fewest rows needs one for each piece of each run.
        let runs = most.div_ceil(at_once);
        if pieces > 1 && fewest < runs * pieces {
            return wrong(format!(
                "{rows} rows on {replicas} replicas are {fewest} on the one with fewest, and do not fill {runs} runs of {pieces} \
                 micro-batches: take at least {} rows, or allow more rows at once",
                runs * pieces * replicas
            ));
        }
        Ok(Self { rows, replicas, runs, pieces })
    }

    /// The rows of the global batch.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many replicas share it: `dp`.
    pub fn replicas(&self) -> usize {
        self.replicas
    }

    /// How many micro-batches a replica gives, at most, to
    /// [`step_micro_batches`](crate::train::ParallelModule::step_micro_batches): runs of the pipeline, if there is one.
    pub fn accumulation(&self) -> usize {
        self.runs
    }

    /// The most rows that go through a layer at once.
    pub fn micro_batch(&self) -> usize {
        self.rows.div_ceil(self.replicas).div_ceil(self.runs).div_ceil(self.pieces)
    }

    /// The rows of a replica. A replica that is not among them has none.
    pub fn replica(&self, replica: usize) -> Range<usize> {
        part(self.rows, self.replicas, replica)
    }

    /// The rows of each micro-batch of a replica, by their places in the global batch.
    pub fn micro_batches(&self, replica: usize) -> Vec<Range<usize>> {
        let Range { start, end } = self.replica(replica);
        let runs = self.runs.min(end - start);
        (0..runs)
            .map(|run| {
                let rows = part(end - start, runs, run);
                start + rows.start..start + rows.end
            })
            .collect()
    }
}

impl fmt::Display for BatchSplit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, replicas, runs, pieces } = self;
        let count = |number: usize, one: &str| format!("{number} {one}{}", if number == 1 { "" } else { "s" });
        write!(f, "{} = {} x ", count(*rows, "row"), count(*replicas, "replica"))?;
        if *pieces > 1 {
            write!(f, "{} x ", count(*runs, "run"))?;
        }
        let micro_batches =
            count(if *pieces > 1 { *pieces } else { *runs }, "micro-batch").replace("batchs", "batches");
        write!(f, "{micro_batches} of at most {}", count(self.micro_batch(), "row"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline_parallel::PipelineConfig;

    #[test]
    fn every_row_is_taken_once_whatever_divides() {
        for rows in 1..40 {
            for replicas in 1..=rows.min(8) {
                for micro_batch in [None, Some(1), Some(2), Some(3), Some(7), Some(64)] {
                    let split = BatchSplit::new(rows, replicas, micro_batch).unwrap();
                    let all: Vec<Vec<Range<usize>>> =
                        (0..replicas).map(|replica| split.micro_batches(replica)).collect();
                    assert_eq!(all.iter().map(Vec::len).max(), Some(split.accumulation()));
                    let taken: Vec<usize> = all.iter().flatten().cloned().flatten().collect();
                    assert_eq!(taken, (0..rows).collect::<Vec<_>>());
                    let most = all.iter().flatten().map(ExactSizeIterator::len).max().unwrap();
                    assert_eq!(most, split.micro_batch());
                    assert!(micro_batch.is_none_or(|micro_batch| most <= micro_batch));
                    for runs in &all {
                        let lens: Vec<usize> = runs.iter().map(ExactSizeIterator::len).collect();
                        assert!(lens.iter().max().unwrap() - lens.iter().min().unwrap() <= 1, "{lens:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_pipeline_divides_each_run() {
        let strategy = Strategy::new().with_pp(2, PipelineConfig::new(4));
        let split = BatchSplit::of(&strategy, 4, 32, Some(2)).unwrap();
        assert_eq!((split.replicas(), split.accumulation(), split.micro_batch()), (2, 2, 2));
        assert_eq!(split.micro_batches(1), [16..24, 24..32]);
        assert_eq!(split.to_string(), "32 rows = 2 replicas x 2 runs x 4 micro-batches of at most 2 rows");
        let problem = BatchSplit::of(&strategy, 4, 7, None).unwrap_err().to_string();
        assert!(problem.contains("take at least 8 rows"), "{problem}");
    }

    #[test]
    fn what_cannot_be_divided_is_told() {
        let problem = BatchSplit::new(3, 4, None).unwrap_err().to_string();
        assert!(problem.contains("some of the 4 replicas without any: take at least 4"), "{problem}");
        assert!(BatchSplit::new(3, 0, None).is_err() && BatchSplit::new(3, 1, Some(0)).is_err());
        assert!(BatchSplit::of(&Strategy::new().with_dp(3), 4, 8, None).is_err());
        assert_eq!(BatchSplit::new(usize::MAX, 2, Some(usize::MAX)).unwrap().accumulation(), 1);
    }
}
