//! A model on any mesh, with the wrappers that it takes and no more.

use burn::module::Module;
use burn_parallel::prelude::*;

/// What is done with a model, whatever it is spread over.
pub trait Meshed<M: Module> {
    /// `dp` is the axis of the replicas, each of which has a share of the batch.
    fn run<P: ParallelModule<Model = M>>(self, model: P, dp: &Communicator) -> Result<(), Error>;
}

/// Spreads a model over the axes `dp`, `pp` and `tp` of these sizes. An axis of 1 is not wrapped, but for replicas of a
/// model that is nothing else.
pub fn on_mesh<M: Module>(
    world: &Rank,
    axes: [usize; 3],
    model: M,
    plan: &Plan,
    cut: impl Fn(usize) -> Cut,
    run: impl Meshed<M>,
) -> Result<(), Error> {
    let mesh = Mesh::new(world, [("dp", axes[0]), ("pp", axes[1]), ("tp", axes[2])])?;
    let (dp, pp, tp) = (mesh.axis("dp")?, mesh.axis("pp")?, mesh.axis("tp")?);
    // Small buckets: several in each step.
    let replicas = DataParallelConfig::new().with_bucket_bytes(4096).with_first_bucket_bytes(512);
    let pipeline = PipelineConfig::new(4).with_cut(cut(axes[1]));
    let model = model.fork(&world.device().autodiff());
    match axes.map(|size| size > 1) {
        [_, false, false] => run.run(model.data_parallel(&dp, replicas)?, &dp),
        [false, false, true] => run.run(model.tensor_parallel(&tp, plan)?, &dp),
        [false, true, false] => run.run(model.pipeline_parallel(&pp, pipeline)?, &dp),
        [false, true, true] => run.run(model.tensor_parallel(&tp, plan)?.pipeline_parallel(&pp, pipeline)?, &dp),
        [true, false, true] => run.run(model.tensor_parallel(&tp, plan)?.data_parallel(&dp, replicas)?, &dp),
        [true, true, false] => run.run(model.pipeline_parallel(&pp, pipeline)?.data_parallel(&dp, replicas)?, &dp),
        [true, true, true] => {
            let model = model.tensor_parallel(&tp, plan)?.pipeline_parallel(&pp, pipeline)?;
            run.run(model.data_parallel(&dp, replicas)?, &dp)
        }
    }
}
