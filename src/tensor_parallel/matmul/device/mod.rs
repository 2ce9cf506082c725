//! Sharded products on CubeCL's devices.
//!
//! Everything is enqueued, nothing waits for the device. Chunks that travel do so from the background thread, whose stream
//! CubeCL makes wait for that of the product, and no more than that.

mod product;
mod view;

use burn::backend::tensor::FloatTensor;
use burn_cubecl::Cube;

use super::tape::{Job, Products};
use crate::Error;

impl Products for Cube {
    fn product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        job: &Job,
    ) -> Result<(FloatTensor<Self>, FloatTensor<Self>), Error> {
        let (made, kept) = product::forward(view::resolved(x), view::resolved(weight), job)?;
        Ok((view::fused(made), view::fused(kept)))
    }

    fn gradients(
        gradient: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        wanted: [bool; 2],
        job: &Job,
    ) -> Result<[Option<FloatTensor<Self>>; 2], Error> {
        let [gradient, x, weight] = [gradient, x, weight].map(view::resolved);
        let made = product::backward(gradient, x, weight, wanted, job)?;
        Ok(made.map(|made| made.map(view::fused)))
    }
}
