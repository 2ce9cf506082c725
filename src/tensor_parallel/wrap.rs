//! The trait that wraps a model.

use burn::module::Module;

use super::{Sharded, TensorParallelConfig};
use crate::Error;
use crate::comm::Communicator;
use crate::mesh::Mesh;
use crate::plan::DEFAULT_AXIS;

/// Splits any burn module over a group. Implemented for every [`Module`].
pub trait TensorParallel: Module + Sized {
    /// Leaves this rank its parts of the parameters, by a [`Plan`](crate::plan::Plan) or a [`TensorParallelConfig`]
    /// with one. All parameters get the values and ids that rank 0 brings.
    ///
    /// Collective: every rank of `group` brings the same model structure and the same plan. Values that rank 0 has are
    /// distributed one by one; the other ranks drop theirs unread. A parameter that is lazy on rank 0 stays lazy: it
    /// gets its value from [`ParallelModule::load`](crate::train::ParallelModule::load), of which each rank reads its
    /// part, or else at the first step, where rank 0 makes a piece of it at a time and sends each rank its part of
    /// that. No rank ever holds the whole of a split parameter, unless its model came with it, or the initialiser makes
    /// no piece without the rest (an orthogonal one).
    ///
    /// # Errors
    /// [`Error::Nesting`] if the module is wrapped already; [`Error::Plan`] as
    /// [`Plan::table`](crate::plan::Plan::table); [`Error::ModelMismatch`] if the ranks bring different models or
    /// plans; those of [`Communicator`].
    fn tensor_parallel(
        self,
        group: &Communicator,
        config: impl Into<TensorParallelConfig>,
    ) -> Result<Sharded<Self>, Error> {
        Sharded::new(self, &[(DEFAULT_AXIS, group)], config.into())
    }

    /// As [`tensor_parallel`](Self::tensor_parallel), over several axes of a mesh: the plan describes the first one
    /// named here, and of the others by [`Plan::on`](crate::plan::Plan::on). All ranks of these axes pass the same
    /// whole inputs.
    ///
    /// ```
    /// # use burn::{nn::{Linear, LinearConfig}, prelude::*};
    /// # use burn_parallel::prelude::*;
    /// # launch::threads(4).run(|world| {
    /// # let device = world.device().autodiff();
    /// # let model: Linear = LinearConfig::new(4, 6).init(&device);
    /// let mesh = Mesh::new(&world, [("dp", 2), ("tp", 2)])?;
    /// // Columns over `tp`, the rows of the batch over `dp`.
    /// let plan = Plan::new().shard("weight", 1).shard("bias", 0).on("dp", Plan::new().shard_input("", 0));
    /// let mut model = model.tensor_parallel_over(&mesh, &["tp", "dp"], &plan)?;
    /// let x = Tensor::<2>::ones([6, 4], &device);
    /// let step = model.step(x, |model, x| model.forward(x).powi_scalar(2).mean())?;
    /// # Ok(()) })?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`tensor_parallel`](Self::tensor_parallel); [`Error::Mesh`] if the mesh has no axis of such a name;
    /// [`Error::Plan`] if none is named.
    fn tensor_parallel_over(
        self,
        mesh: &Mesh,
        axes: &[&str],
        config: impl Into<TensorParallelConfig>,
    ) -> Result<Sharded<Self>, Error> {
        if axes.is_empty() {
            return Err(Error::Plan { problem: "name at least one axis of the mesh to split the model over".into() });
        }
        let groups = axes.iter().map(|name| mesh.axis(name)).collect::<Result<Vec<_>, _>>()?;
        Sharded::new(self, &axes.iter().copied().zip(&groups).collect::<Vec<_>>(), config.into())
    }
}

impl<M: Module> TensorParallel for M {}
