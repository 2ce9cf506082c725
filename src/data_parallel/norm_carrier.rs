//! Has the norm of a gradient whose rows replicas divide go with what they sum up at the end of a step anyway.
//!
//! Each of them has a place of its own in the sum, so the sizes are put together in one order on all ranks, as an
//! all-gather of them would be.

use std::collections::{HashMap, HashSet};

use burn::module::ParamId;

use crate::graph::StepEngine;
use crate::sharding::ShardComms;
use crate::step::{AskedNorm, CarriedNorm};
use crate::tensor::{PartialNorm, PlainTensor, sizes};

/// Measures the rows of this rank, if the norm is likely to be asked for.
pub(super) struct NormCarrier {
    expected: AskedNorm,
    comms: ShardComms,
    /// The parameters that another rank counts.
    pub elsewhere: HashSet<ParamId>,
}

/// How many numbers a size is.
const NUMBERS: usize = 2;

impl NormCarrier {
    /// For a step, on all ranks or on none: they expect what follows from the updates that they compare in it.
    pub fn of<E: StepEngine>(engine: &E, comms: Option<&ShardComms>) -> Option<Self> {
        let comms = comms?.clone();
        let expected = engine.checked_optimizers().updates().expected_norm()?;
        Some(Self { expected, comms, elsewhere: engine.gradient_layout().elsewhere })
    }

    /// What this rank adds to the sums over all replicas, of gradients of which each counts here or elsewhere. Where
    /// one is not finite, or cannot be read, all ranks find no size, and look closer when the norm is asked for.
    pub fn numbers(&self, gradients: &[(&PlainTensor, bool)]) -> Vec<f64> {
        let mut numbers = vec![0.0; NUMBERS * self.comms.ranks()];
        // Of those that hold the same rows one is enough.
        if self.comms.copies().is_some_and(|copies| copies.rank() > 0) {
            return numbers;
        }
        let (norm, values) = (self.expected.norm, gradients.iter().map(|(value, _)| *value).collect::<Vec<_>>());
        let found = sizes(&values, norm).ok().filter(|sizes| sizes.iter().all(|size| size.is_finite()));
        let size = match found {
            None => PartialNorm { unit: f64::NAN, sum: f64::NAN },
            Some(sizes) => {
                let counted = sizes.into_iter().zip(gradients).filter(|(_, (_, counts))| *counts);
                counted.fold(PartialNorm::nothing(norm), |sum, (size, _)| sum.with(size, norm))
            }
        };
        let place = NUMBERS * self.comms.rank();
        numbers[place..place + NUMBERS].copy_from_slice(&[size.unit, size.sum]);
        numbers
    }

    /// The norm by the sums over all replicas, of gradients that are multiplied by `factor` since they were measured,
    /// and go to the parameters of these ids.
    pub fn of_sums(self, sums: &[f64], factor: f64, gradients: HashMap<ParamId, PlainTensor>) -> Option<CarriedNorm> {
        let norm = self.expected.norm;
        let sizes = sums.chunks_exact(NUMBERS).map(|numbers| PartialNorm { unit: numbers[0], sum: numbers[1] });
        let whole = sizes.reduce(|all, size| all.with(size, norm))?;
        let size = PartialNorm { unit: whole.unit * factor.abs(), ..whole };
        size.is_finite().then(|| CarriedNorm { asked: self.expected, size, comms: self.comms, gradients })
    }
}
