//! The trait that wraps a model.

use burn::module::Module;

use super::Sharded;
use crate::Error;
use crate::comm::Communicator;
use crate::plan::Plan;

/// Splits any burn module over a group. Implemented for every [`Module`].
pub trait TensorParallel: Module + Sized {
    /// Leaves this rank its parts of the parameters, by `plan`. All parameters get the values that rank 0 brings.
    ///
    /// Collective: every rank of `group` brings the same model structure and the same plan. Parameters are distributed one
    /// by one, and a lazy one is made only for that moment, so that no more than one whole split parameter of this model
    /// exists on a rank at a time, beside what was made before.
    ///
    /// # Errors
    /// [`Error::Plan`] as [`Plan::table`]; [`Error::ModelMismatch`] if the ranks bring different models or plans; those of
    /// [`Communicator`].
    fn tensor_parallel(self, group: &Communicator, plan: &Plan) -> Result<Sharded<Self>, Error> {
        Sharded::new(self, group, plan)
    }
}

impl<M: Module> TensorParallel for M {}
