//! Parallel training for [burn](https://burn.dev), for any module, unedited.
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod comm;
pub mod data_parallel;
mod error;
pub mod graph;
pub mod launch;
pub mod layout;
pub mod mesh;
pub mod plan;
pub mod tensor_parallel;

pub use error::Error;

/// What a training program needs.
pub mod prelude {
    pub use crate::Error;
    pub use crate::comm::{Communicator, ReduceOp};
    pub use crate::data_parallel::{DataParallel, DataParallelConfig, Loss};
    pub use crate::data_parallel::{DistributedDataset, DistributedSampler, Remainder};
    pub use crate::launch::{self, Rank};
    pub use crate::layout::{self, Layout};
    pub use crate::mesh::Mesh;
    pub use crate::plan::Plan;
    pub use crate::tensor_parallel::TensorParallel;
}
