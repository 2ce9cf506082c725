//! Parameters that are gathered, or whose gradients are reduced, in one collective.

use std::sync::Arc;

use burn::tensor::FloatDType;

use crate::Error;
use crate::comm::{Communicator, ReduceOp};
use crate::sharding::Pack;
use crate::tensor::{PlainTensor, Pool};

/// Parameters that are exchanged together.
pub(super) struct Bundle {
    pub pack: Pack,
    /// By which ranks make sure that they exchange the same: groups of one size are told apart by nothing else.
    pub number: u64,
    pub reduce_dtype: Option<FloatDType>,
    /// The memory in which parameters are gathered that are dropped soon.
    pub gathered: Option<Arc<Pool>>,
    /// That in which this rank's rows of gradients are made.
    pub sums: Arc<Pool>,
}

impl Bundle {
    pub fn gather(&self, shards: Vec<PlainTensor>, comm: &Communicator) -> Result<Vec<PlainTensor>, Error> {
        self.pack.gather_in(self.gathered.as_ref(), shards, comm, self.number)
    }

    /// This rank's rows of the sum of gradients, over the ranks that divide them and then over those that hold the same
    /// rows.
    pub fn reduce(
        &self,
        gradients: Vec<PlainTensor>,
        factor: f64,
        (comm, copies): (&Communicator, Option<&Communicator>),
    ) -> Result<Vec<PlainTensor>, Error> {
        let own: Vec<FloatDType> = gradients.iter().map(|gradient| gradient.dtype().into()).collect();
        let sent = match self.reduce_dtype {
            Some(dtype) => gradients.into_iter().map(|gradient| gradient.cast(dtype)).collect(),
            None => gradients,
        };
        let op = ReduceOp::PreMulSum(factor);
        let mut sums = self.pack.reduce_scatter_in(Some(&self.sums), sent, op, comm, self.number)?;
        if let Some(copies) = copies {
            sums = copies.all_reduce_coalesced(sums, ReduceOp::Sum)?;
        }
        Ok(match self.reduce_dtype {
            Some(_) => sums.into_iter().zip(own).map(|(sum, dtype)| sum.cast(dtype)).collect(),
            None => sums,
        })
    }
}
