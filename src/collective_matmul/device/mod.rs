//! Sharded products on CubeCL's devices.
//!
//! Everything is enqueued, nothing waits for the device. Chunks that travel do so from the background thread, whose
//! stream CubeCL makes wait for that of the product, and no more than that.

mod product;
mod view;

use burn::backend::tensor::FloatTensor;
use burn_cubecl::Cube;

use super::{PendingProduct, ProductCall, ShardedProducts};
use crate::Error;
use crate::comm::DeviceTensor;
use view::{fused, resolved};

fn all_resolved(terms: Vec<[FloatTensor<Cube>; 2]>) -> Vec<[DeviceTensor; 2]> {
    terms.into_iter().map(|term| term.map(resolved)).collect()
}

impl ShardedProducts for Cube {
    fn sum(
        terms: Vec<[FloatTensor<Self>; 2]>,
        call: &ProductCall,
        beside: bool,
    ) -> Result<PendingProduct<FloatTensor<Self>>, Error> {
        Ok(product::sum(all_resolved(terms), call, beside)?.map(fused))
    }

    fn scatter(
        terms: Vec<[FloatTensor<Self>; 2]>,
        call: &ProductCall,
        beside: bool,
    ) -> Result<PendingProduct<FloatTensor<Self>>, Error> {
        Ok(product::scatter(all_resolved(terms), call, beside)?.map(fused))
    }

    fn gather(
        left: FloatTensor<Self>,
        rights: Vec<FloatTensor<Self>>,
        call: &ProductCall,
    ) -> Result<(Vec<FloatTensor<Self>>, FloatTensor<Self>), Error> {
        let (made, whole) = product::gather(resolved(left), rights.into_iter().map(resolved).collect(), call)?;
        Ok((made.into_iter().map(fused).collect(), fused(whole)))
    }

    fn multiply(
        left: FloatTensor<Self>,
        right: FloatTensor<Self>,
        _: &'static str,
    ) -> Result<FloatTensor<Self>, Error> {
        product::multiply_own(resolved(left), resolved(right)).map(fused)
    }

    fn multiply_rows(
        left: FloatTensor<Self>,
        right: FloatTensor<Self>,
        _: &'static str,
    ) -> Result<FloatTensor<Self>, Error> {
        product::multiply_rows(resolved(left), resolved(right)).map(fused)
    }

    fn transposed(right: FloatTensor<Self>) -> FloatTensor<Self> {
        fused(view::transposed(resolved(right)))
    }
}
