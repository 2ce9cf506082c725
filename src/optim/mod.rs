//! burn's SGD, Adam and AdamW with the update of a parameter as one pass over memory.
//!
//! burn updates a parameter operation by operation: AdamW goes over it, its gradient and its moments some twenty times,
//! and what does not fit into the caches comes from memory each time. On the host a fused optimizer reads value,
//! gradient and moments once and writes value and moments once, in place, with the vectors of the machine and split
//! over the threads of the rank. Elsewhere it is burn's own update, which CubeCL devices fuse themselves.
//!
//! ```
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::{AdamWConfig, ModuleOptimizer};
//! use burn::prelude::*;
//! use burn_parallel::prelude::*;
//!
//! launch::threads(2).run(|rank| {
//!     let device = rank.device().autodiff();
//!     let model: Linear = LinearConfig::new(4, 2).init(&device);
//!     let mut model = model.data_parallel(&rank, DataParallelConfig::new())?;
//!     let mut optim: ModuleOptimizer = AdamWConfig::new().with_weight_decay(0.01).init_fused(); // instead of `init`
//!     let step = model.step(Tensor::<2>::ones([3, 4], &device), |model, x| model.forward(x).powi_scalar(2).mean())?;
//!     model = model.optimize(&mut optim, 1e-3, step)?;
//!     assert!(!optim.to_record().is_empty());
//!     Ok(())
//! })?;
//! # Ok::<(), Error>(())
//! ```
//!
//! # The same numbers
//! Every element is computed by the operations of burn 0.22, in their order, each rounded as burn rounds it: values and
//! moments have burn's bits, in `f32`, `f64`, `bf16` and `f16`. A record of the one is loaded by the other. A fused
//! optimizer loads moments in the dtype that they have in the record, into host memory, from where the next step brings
//! them to the device of their parameter; burn's own loads them in the default dtype of burn's default device, onto
//! that device first. A record of a fused optimizer shares the moments that are in host memory with it.
//!
//! An update is in place where nothing else holds the memory of the parameter; a clone of the model keeps its values.
//!
//! # The moments of a rank on its own device
//! burn's default device is the same for all ranks of a process: the first GPU, if there is one. With `init` of burn
//! all moments of a record come onto it before the next step moves them. Not so with fused optimizers, nor with any
//! other that is made with [`load_on_host`](LoadOnHost::load_on_host).

mod adam;
mod given;
mod number;
mod on_host;
mod read_out;
mod recorded;
mod sgd;
mod states_only;
mod update;
mod widened;

use burn::optim::{AdamConfig, AdamWConfig, ModuleOptimizer, Optimizer, SgdConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::adam::{FusedAdam, FusedAdamState, FusedAdamW};
pub(crate) use self::given::record_of;
pub use self::on_host::{HostLoaded, HostLoadedState, LoadOnHost};
pub(crate) use self::read_out::{MOST_AT_ONCE, ParamState, StateNames, has_others, portions, without};
pub use self::sgd::{FusedSgd, FusedSgdState};
pub(crate) use self::widened::{ASKED, Widened};

/// Configurations of burn whose optimizers update a parameter in one pass: see the [module page](self).
pub trait FusedOptimizer {
    /// The bare optimizer.
    type Optimizer: Optimizer;

    /// The bare optimizer, for [`ModuleOptimizer::with_group`] and [`ModuleOptimizer::from`]: as burn's `build`, it
    /// leaves out the clipping of gradients.
    fn build_fused(&self) -> Self::Optimizer;

    /// An optimizer of a whole module, to be given to [`optimize`](crate::train::ParallelModule::optimize): as burn's
    /// `init`.
    fn init_fused(&self) -> ModuleOptimizer;
}

macro_rules! fused {
    ($($config:ty => $optimizer:ty;)*) => {$(
        impl FusedOptimizer for $config {
            type Optimizer = $optimizer;

            fn build_fused(&self) -> $optimizer {
                <$optimizer>::new(self)
            }

            fn init_fused(&self) -> ModuleOptimizer {
                with_clipping_of(self.init(), self.build_fused())
            }
        }
    )*};
}
fused! {
    SgdConfig => FusedSgd;
    AdamConfig => FusedAdam;
    AdamWConfig => FusedAdamW;
}

/// A fused optimizer that clips as burn's own does.
fn with_clipping_of(burn: ModuleOptimizer, fused: impl Optimizer) -> ModuleOptimizer {
    let fused = ModuleOptimizer::from(fused);
    match burn.grad_clipping() {
        Some(clipping) => fused.with_grad_clipping(clipping.clone()),
        None => fused,
    }
}

/// The numbers of a configuration, which burn gives away in its serialized form only.
fn numbers_of<N: DeserializeOwned>(config: &impl Serialize) -> N {
    let numbers = serde_json::to_value(config).and_then(serde_json::from_value);
    numbers.expect("burn's configurations have the fields that burn documents")
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::GradientsParams;
    use burn::tensor::{Device, Tensor};

    use super::*;
    use crate::tensor::PlainTensor;

    fn place(weight: &Param<Tensor<2>>) -> *const u8 {
        PlainTensor::from(weight.val()).into_flex().unwrap().bytes().as_ptr()
    }

    fn optimizers() -> [ModuleOptimizer; 3] {
        [SgdConfig::new().init_fused(), AdamConfig::new().init_fused(), AdamWConfig::new().init_fused()]
    }

    fn step(optim: &mut ModuleOptimizer, model: Linear) -> Linear {
        let mut grads = GradientsParams::new();
        grads.register(model.weight.id, Tensor::<2>::ones([5, 3], &Device::flex()));
        optim.step(0.1, model, grads)
    }

    #[test]
    fn a_parameter_stays_where_it_is() {
        for mut optim in optimizers() {
            let mut model: Linear = LinearConfig::new(5, 3).init(&Device::flex().autodiff());
            let before = place(&model.weight);
            for _ in 0..3 {
                model = step(&mut optim, model);
            }
            assert_eq!(place(&model.weight), before);
        }
    }

    #[test]
    fn a_clone_keeps_its_values() {
        for mut optim in optimizers() {
            let mut model: Linear = LinearConfig::new(5, 3).init(&Device::flex().autodiff());
            for _ in 0..2 {
                let (clone, record) = (model.clone(), optim.clone());
                let (weight, moments) = (clone.weight.val().into_data(), record.to_record().into_bytes().unwrap());
                model = step(&mut optim, model);
                assert_ne!(model.weight.val().into_data(), weight);
                assert_eq!(clone.weight.val().into_data(), weight);
                assert_eq!(&*record.to_record().into_bytes().unwrap(), &*moments);
            }
        }
    }
}
