//! What a checkpoint is made of, and who writes it: each rank computes that alike, from what all of them hold.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use burn::tensor::DType;
use serde::{Deserialize, Serialize};

use super::agree::exchange;
use super::assign::Held;
use super::checkpoint_error;
use super::contents::{Contents, ParamScalars, SavedUpdates};
use crate::Error;
use crate::comm::Communicator;
use crate::graph::Compared;
use crate::params::is_statistic;
use crate::tensor_file::name_of;

/// Which tensor of a checkpoint it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(super) enum TensorKey {
    Param(String),
    Moment { optimizer: String, path: String, moment: String },
}

impl TensorKey {
    pub(super) fn param(path: impl Into<String>) -> Self {
        Self::Param(path.into())
    }

    pub(super) fn moment(optimizer: &str, path: &str, moment: impl Into<String>) -> Self {
        Self::Moment { optimizer: optimizer.into(), path: path.into(), moment: moment.into() }
    }

    /// The optimizer and the parameter, if it is a moment.
    pub(super) fn moments_of(&self) -> Option<(&str, &str)> {
        match self {
            Self::Param(_) => None,
            Self::Moment { optimizer, path, .. } => Some((optimizer, path)),
        }
    }

    /// Whether replicas may differ in it.
    pub(super) fn differs(&self) -> bool {
        matches!(self, Self::Param(path) if is_statistic(path))
    }

    /// The name of a slice in its file.
    pub(super) fn name(&self, ranges: &[Range<usize>]) -> String {
        let ranges: Vec<String> = ranges.iter().map(|range| format!("{}:{}", range.start, range.end)).collect();
        format!("{self}[{}]", ranges.join(","))
    }
}

impl fmt::Display for TensorKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Param(path) => write!(f, "model/{path}"),
            Self::Moment { optimizer, path, moment } => write!(f, "optimizers/{optimizer}/{path}/{moment}"),
        }
    }
}

/// What a rank tells of what it has.
#[derive(Serialize, Deserialize)]
struct ToldContents {
    slices: Vec<ToldSlice>,
    scalars: ParamScalars,
    /// A number for all updates so far.
    updates: u64,
}

/// A part of a tensor that a rank holds.
#[derive(Serialize, Deserialize)]
pub(super) struct ToldSlice {
    pub(super) key: TensorKey,
    /// Of the whole.
    pub(super) dims: Vec<usize>,
    pub(super) dtype: String,
    pub(super) ranges: Vec<Range<usize>>,
}

/// A tensor of the checkpoint.
pub(super) struct PlannedTensor {
    pub(super) dims: Vec<usize>,
    pub(super) dtype: DType,
    /// Its slices, each with the rank that writes it.
    pub(super) slices: Vec<(Vec<Range<usize>>, usize)>,
}

/// All tensors of the checkpoint, and those numbers of optimizers that are known before they are read out.
pub(super) struct WritePlan {
    pub(super) tensors: BTreeMap<TensorKey, PlannedTensor>,
    pub(super) scalars: ParamScalars,
}

impl WritePlan {
    /// Collective. No rank fails alone, but for what is wrong with what it brings.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the ranks hold different models; [`Error::Optimizer`] if they have not updated it
    /// alike; those of the group.
    pub(super) fn new(own: &Contents, group: &Communicator) -> Result<Self, Error> {
        let slices = own.slices.iter().map(|slice| ToldSlice {
            key: slice.key.clone(),
            dims: slice.dims.clone(),
            dtype: name_of(slice.value.dtype()).unwrap_or_default().into(),
            ranges: slice.ranges.clone(),
        });
        let SavedUpdates { digest, history } = &own.updates;
        let told = ToldContents { slices: slices.collect(), scalars: own.scalars.clone(), updates: *digest };
        let told = serde_json::to_vec(&told).map_err(|why| checkpoint_error(why.to_string()))?;
        let shared = exchange(told, group)?;
        let read = |told| serde_json::from_slice(told).map_err(|why| checkpoint_error(why.to_string()));
        let told = shared.distinct().map(|(rank, told)| Ok((rank, read(told)?)));
        let told: Vec<(usize, ToldContents)> = told.collect::<Result<_, Error>>()?;
        if told.iter().any(|(_, told)| told.updates != *digest) {
            history.explain(Compared::Parts, group)?;
        }
        let mut held = Held::default();
        let mut scalars = ParamScalars::new();
        for (rank, told) in told {
            let holders = shared.same_as(rank);
            for slice in told.slices {
                held.add(slice, rank, &holders)?;
            }
            add_scalars(&mut scalars, told.scalars, rank)?;
        }
        Ok(Self { tensors: held.assigned(group.size())?, scalars })
    }

    /// What a rank writes, in order.
    pub(super) fn of_rank(&self, rank: usize) -> impl Iterator<Item = (&TensorKey, &PlannedTensor, &[Range<usize>])> {
        self.tensors.iter().flat_map(move |(key, tensor)| {
            let own = tensor.slices.iter().filter(move |(_, writer)| *writer == rank);
            own.map(move |(ranges, _)| (key, tensor, ranges.as_slice()))
        })
    }
}

/// Adds the numbers that a rank tells.
///
/// # Errors
/// [`Error::Checkpoint`] if another rank has told others of the same parameter.
pub(super) fn add_scalars(all: &mut ParamScalars, told: ParamScalars, rank: usize) -> Result<(), Error> {
    for (optimizer, params) in told {
        let all = all.entry(optimizer.clone()).or_default();
        for (path, numbers) in params {
            if all.get(&path).is_some_and(|known| *known != numbers) {
                let problem = format!(
                    "rank {rank} has other numbers of `{path}` in optimizer `{optimizer}` than another rank, as if they had made \
                     different numbers of steps"
                );
                return Err(checkpoint_error(problem));
            }
            all.insert(path, numbers);
        }
    }
    Ok(())
}
