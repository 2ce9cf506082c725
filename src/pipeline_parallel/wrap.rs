//! The trait that wraps a model.

use burn::module::Module;

use super::{PipelineConfig, Pipelined};
use crate::Error;
use crate::comm::Communicator;
use crate::nesting;

/// Cuts any burn module into the stages of a pipeline. Implemented for every [`Module`].
pub trait PipelineParallel: Module + Sized {
    /// Leaves this rank the parameters of its stages. Each has the value that this rank brings; a parameter that
    /// several stages use has that of the first.
    ///
    /// Collective: every rank of `group` brings the same model structure and the same configuration. The parameters of
    /// other ranks' stages are dropped, and never made if they are lazy: now, if the cut goes by paths, or with
    /// [`Pipelined::prepare`] or the first step, if it needs the step to count what operations cost.
    ///
    /// # Errors
    /// [`Error::Nesting`] if the module is wrapped already; [`Error::Schedule`] as
    /// [`Schedule::timetable`](super::schedule::Schedule::timetable); [`Error::Plan`] as
    /// [`Cut::by_path`](crate::pipeline_parallel::cut::Cut::by_path); [`Error::ModelMismatch`] if the ranks bring
    /// different models or configurations; those of [`Communicator`].
    fn pipeline_parallel(self, group: &Communicator, config: PipelineConfig) -> Result<Pipelined<Self>, Error> {
        nesting::check(&self, "pipeline_parallel")?;
        Pipelined::new(self, None, group, config)
    }
}

impl<M: Module> PipelineParallel for M {}
