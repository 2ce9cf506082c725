//! Products by weights that are split over the ranks, overlapped with their collective; no autodiff. Explicit layers
//! and captured steps run on them.
//!
//! A left factor is `[.., features]`, of two dims or more, a right factor `[features, columns]`, behind any number of
//! dims that are 1: there are three kinds of products, the [sum](ShardedProducts::sum) over the ranks, the same
//! [scattered](ShardedProducts::scatter) along a dim, and that of a left factor that is
//! [gathered](ShardedProducts::gather) along a dim. The places along this dim are the *positions*, which the ranks
//! divide among them as [`part`](crate::comm::part) does; the places along the dims before it are *outer*, and a
//! position has as many rows as the dims between it and the features have places, of each outer one. How products are
//! cut into chunks that overlap with their collectives is told in
//! [`tensor_parallel::functional`](crate::tensor_parallel::functional).

mod chunk_plan;
#[cfg(feature = "cubecl")]
mod device;
mod host;
mod pending;
mod plain;
mod schedule;

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Device};

use crate::Error;
use crate::comm::Communicator;

pub(crate) use pending::PendingProduct;
pub(crate) use plain::{gather, scatter, sum};
pub use schedule::Overlap;
use schedule::{ChunkSchedule, Size};

/// How a product is made, and with whom.
#[derive(Debug, Clone)]
pub(crate) struct ProductCall {
    /// The operation that errors name.
    pub name: &'static str,
    /// The dim of the left factor, not its last, along which positions are scattered or gathered.
    pub dim: usize,
    /// Whether it is certain that all ranks have as many positions, and as much of the weights: then they need not ask
    /// each other.
    pub even: bool,
    pub overlap: Overlap,
    pub comm: Communicator,
}

impl ProductCall {
    /// # Errors
    /// Those of a collective, where the ranks ask each other.
    fn schedule(&self, size: Size) -> Result<ChunkSchedule, Error> {
        self.overlap.plan(size, self.even, &self.comm)
    }

    fn no_terms(&self) -> Error {
        Error::invalid(self.name, "a sum of no products")
    }
}

/// Sharded products on the tensors of a backend. Factors are of dims that fit.
pub(crate) trait ShardedProducts: Backend {
    /// Starts `sum over r and i of left_i right_i`, the same on all ranks. `beside` says that something else will be
    /// computed before anyone waits for it.
    fn sum(
        terms: Vec<[FloatTensor<Self>; 2]>,
        call: &ProductCall,
        beside: bool,
    ) -> Result<PendingProduct<FloatTensor<Self>>, Error>;

    /// As [`sum`](Self::sum), of which each rank gets its positions.
    fn scatter(
        terms: Vec<[FloatTensor<Self>; 2]>,
        call: &ProductCall,
        beside: bool,
    ) -> Result<PendingProduct<FloatTensor<Self>>, Error>;

    /// `[left_0, .., left_(n-1)] right_i` for each right factor, and the gathered left factor.
    fn gather(
        left: FloatTensor<Self>,
        rights: Vec<FloatTensor<Self>>,
        call: &ProductCall,
    ) -> Result<(Vec<FloatTensor<Self>>, FloatTensor<Self>), Error>;

    /// A product of this rank's own: `left right`.
    fn multiply(
        left: FloatTensor<Self>,
        right: FloatTensor<Self>,
        name: &'static str,
    ) -> Result<FloatTensor<Self>, Error>;

    /// `left^T right`, summed over all rows: `[features of left, features of right]`.
    fn multiply_rows(
        left: FloatTensor<Self>,
        right: FloatTensor<Self>,
        name: &'static str,
    ) -> Result<FloatTensor<Self>, Error>;

    /// A right factor transposed, without a copy.
    fn transposed(right: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Whether there are sharded products on a device (without autodiff). On others the product is one operation, the move
/// another.
pub(crate) fn run_on(device: &Device) -> bool {
    #[cfg(feature = "cubecl")]
    if matches!(device.as_dispatch(), burn::backend::DispatchDevice::Cube(_)) {
        return true;
    }
    *device == Device::flex()
}

/// Whether there are sharded products of a dtype.
pub(crate) fn multiply(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16)
}
