//! How a bucket of gradients is reduced; users put compression here.

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::{FloatDType, Tensor};

use crate::Error;
use crate::comm::{Communicator, ReduceOp};

/// Gradients that are reduced together.
#[derive(Debug)]
pub struct Bucket {
    /// Number of the bucket in the step: 0 is the first that backward completes.
    pub index: usize,
    /// Paths of the parameters, as `encoder.layers.0.mha.query.weight`.
    pub paths: Vec<Arc<str>>,
    /// Their gradients, flat, on plain devices. Ranks on which a parameter was not used bring zeros.
    pub gradients: Vec<Tensor<1>>,
    /// This rank's share of the average: the result is the sum over ranks of `factor * gradient`.
    pub factor: f64,
}

/// Reduces a bucket over the group, in any way that all ranks agree on (PyTorch's DDP communication hooks).
///
/// Runs in the background while backward goes on, one bucket after the other, in the same order on every rank. Whatever
/// it does must be the same collectives on every rank.
pub trait CommHook: Debug + Send + Sync {
    /// Returns the reduced gradients, in the order, lengths and dtypes of the bucket.
    ///
    /// # Errors
    /// Any error fails the step on all ranks.
    fn reduce(&self, bucket: Bucket, group: &Communicator) -> Result<Vec<Tensor<1>>, Error>;
}

/// The plain all-reduce: one collective a bucket, in place, nothing copied together.
#[derive(Debug, Clone, Copy, Default)]
pub struct AllReduceHook;

impl CommHook for AllReduceHook {
    fn reduce(&self, bucket: Bucket, group: &Communicator) -> Result<Vec<Tensor<1>>, Error> {
        group.all_reduce_coalesced(bucket.gradients, ReduceOp::PreMulSum(bucket.factor))
    }
}

/// The all-reduce in another dtype.
#[derive(Debug, Clone, Copy)]
pub struct CastHook {
    dtype: FloatDType,
}

impl CastHook {
    /// Sends gradients in `dtype`.
    pub fn new(dtype: FloatDType) -> Self {
        Self { dtype }
    }

    /// Whether tensors of this dtype can be made on every device and travel.
    pub(super) fn can_send(dtype: FloatDType) -> bool {
        matches!(dtype, FloatDType::BF16 | FloatDType::F16 | FloatDType::F32 | FloatDType::F64)
    }
}

impl CommHook for CastHook {
    fn reduce(&self, bucket: Bucket, group: &Communicator) -> Result<Vec<Tensor<1>>, Error> {
        if !Self::can_send(self.dtype) {
            return Err(Error::UnsupportedDType { operation: "CastHook", dtype: self.dtype.into() });
        }
        let dtypes: Vec<FloatDType> = bucket.gradients.iter().map(|gradient| gradient.dtype().into()).collect();
        let narrow = bucket.gradients.into_iter().map(|gradient| gradient.cast(self.dtype)).collect();
        let reduced = group.all_reduce_coalesced(narrow, ReduceOp::PreMulSum(bucket.factor))?;
        Ok(reduced.into_iter().zip(dtypes).map(|(gradient, dtype)| gradient.cast(dtype)).collect())
    }
}
