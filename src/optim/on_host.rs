//! Optimizers that load records into host memory.
//!
//! burn makes what it takes out of a record on its default device: with several GPUs, the moments of all ranks on the
//! first. On which device that is comes by way of the optimizer of each parameter, so one around it can say another.

use burn::optim::{LearningRate, Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{Device, Tensor};

/// Any optimizer of burn loads records into host memory if it is told to: [`HostLoaded`].
pub trait LoadOnHost: Optimizer {
    /// The same optimizer, which loads records into host memory, whatever burn's default device is.
    fn load_on_host(self) -> HostLoaded<Self> {
        HostLoaded(self)
    }
}

impl<O: Optimizer> LoadOnHost for O {}

/// An optimizer of burn that loads the moments of a record into host memory, from where the next step brings each to
/// the device of its parameter: they are on no other device. burn's own loads them onto its default device first.
///
/// ```
/// use burn::grad_clipping::GradientClipping;
/// use burn::module::ParamGroup;
/// use burn::optim::{AdafactorConfig, AdamWConfig, ModuleOptimizer, MuonConfig};
/// use burn_parallel::optim::{FusedOptimizer, LoadOnHost};
///
/// // In the place of `AdafactorConfig::new().init()`; as burn's, `build` leaves out the clipping of gradients.
/// let optim: ModuleOptimizer = AdafactorConfig::new().build().load_on_host().into();
/// let optim = optim.with_grad_clipping(GradientClipping::Norm(1.0));
/// # let _ = optim;
/// // And in a group.
/// let matrices = ParamGroup::from_regex("blocks\\..*weight$").unwrap();
/// let optim = AdamWConfig::new().init_fused().with_group(matrices, MuonConfig::new().build().load_on_host(), None);
/// # let _ = optim;
/// ```
///
/// Its updates, and its records, are those of the optimizer in it: the one loads what the other has saved. Floats of a
/// record become the default dtype of [`Device::flex`], as burn's own become that of burn's default device;
/// the [fused](super::FusedOptimizer) ones keep their dtype.
#[derive(Debug, Clone)]
pub struct HostLoaded<O>(O);

/// What [`HostLoaded`] keeps of a parameter: what the optimizer in it does.
#[derive(Debug, Clone)]
pub struct HostLoadedState<S>(pub S);

impl<O: Optimizer> Optimizer for HostLoaded<O> {
    type State<const D: usize> = HostLoadedState<O::State<D>>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let (tensor, state) = self.0.step(lr, tensor, grad, state.map(|state| state.0));
        (tensor, state.map(HostLoadedState))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        HostLoadedState(O::to_device(state.0, device))
    }
}

impl<S: RecordState> RecordState for HostLoadedState<S> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        self.0.state_flatten(prefix, out);
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, _: &Device) -> Option<Self> {
        S::state_unflatten(prefix, src, &Device::flex()).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{
        AdaGradConfig, AdafactorConfig, AdamConfig, AdamWConfig, AdanConfig, GradientsParams, LambConfig, LionConfig,
        ModuleOptimizer, MuonConfig, RmsPropConfig, SgdConfig, momentum::MomentumConfig,
    };
    use burn::tensor::DType;

    use super::*;
    use crate::optim::FusedOptimizer;
    use crate::optim::recorded::tests::{flat, of, state};

    /// Calls a function with all optimizers of burn, and whether they update vectors.
    macro_rules! each {
        ($check:ident) => {
            let momentum = Some(MomentumConfig::new());
            $check("adafactor", AdafactorConfig::new().build(), true);
            $check("adagrad", AdaGradConfig::new().with_lr_decay(0.1).build(), true);
            $check("adam", AdamConfig::new().with_amsgrad(true).build(), true);
            $check("adamw", AdamWConfig::new().build(), true);
            $check("adan", AdanConfig::new().build(), true);
            $check("lamb", LambConfig::new().build(), true);
            $check("lion", LionConfig::new().build(), true);
            $check("muon", MuonConfig::new().build(), false);
            $check("rmsprop", RmsPropConfig::new().with_momentum(0.9).with_centered(true).build(), true);
            $check("sgd", SgdConfig::new().with_momentum(momentum).build(), true);
            $check("fused", AdamWConfig::new().build_fused(), true);
        };
    }

    /// Moments are what they would be on the host, whatever device burn says: what is recorded on that of a graph could
    /// not be read.
    #[test]
    fn records_are_loaded_into_host_memory() {
        fn check<O: Optimizer>(name: &str, optimizer: O, _: bool) {
            let host_loaded = optimizer.clone().load_on_host();
            for dtype in [DType::F32, DType::BF16] {
                let bare = flat(&state(&optimizer, dtype));
                let ours = flat(&state(&host_loaded, dtype));
                assert!(!bare.tensors.is_empty() && bare.tensors == ours.tensors, "{name}");
                assert_eq!(format!("{:?}", bare.scalars), format!("{:?}", ours.scalars), "{name}");
                let bare = flat(&of::<O::State<2>>(bare, &Device::flex()));
                let loaded = flat(&of::<HostLoadedState<O::State<2>>>(ours, &Device::capture()));
                assert_eq!(bare.tensors, loaded.tensors, "{name}");
                assert_eq!(format!("{:?}", bare.scalars), format!("{:?}", loaded.scalars), "{name}");
            }
        }
        each!(check);
    }

    /// The bits of steps, and of steps behind a record of either that either has loaded.
    #[test]
    fn updates_and_records_are_those_of_the_optimizer_in_it() {
        fn check<O: Optimizer>(name: &str, optimizer: O, vectors: bool) {
            let model: Linear = LinearConfig::new(5, 3).init(&Device::flex().autodiff());
            let step = |optim: &mut ModuleOptimizer, model: Linear, number: u32| {
                let gradient = |param: Tensor<2>| param.cos().mul_scalar(number) + 0.1;
                let mut grads = GradientsParams::new();
                grads.register(model.weight.id, gradient(model.weight.val().inner()));
                if let Some(bias) = model.bias.as_ref().filter(|_| vectors) {
                    grads.register(bias.id, gradient(bias.val().inner().unsqueeze()).squeeze_dim::<1>(0));
                }
                optim.step(0.05, model, grads)
            };
            let steps = |mut optim: ModuleOptimizer, mut model: Linear, numbers: std::ops::Range<u32>| {
                for number in numbers {
                    model = step(&mut optim, model, number);
                }
                (optim, model)
            };
            let bits = |model: &Linear| {
                let bias = model.bias.as_ref().map(Param::val).map(Tensor::into_data);
                (model.weight.val().into_data(), bias)
            };
            let made: [&dyn Fn() -> ModuleOptimizer; 2] =
                [&|| optimizer.clone().into(), &|| optimizer.clone().load_on_host().into()];
            let alone = bits(&steps(made[0](), model.clone(), 1..6).1);
            assert_ne!(alone, bits(&model), "{name}");
            for (saves, loads) in [(0, 1), (1, 0), (1, 1)] {
                let (optim, model) = steps(made[saves](), model.clone(), 1..4);
                let optim = made[loads]().from_bytes(optim.into_bytes().unwrap()).unwrap();
                assert_eq!(bits(&steps(optim, model, 4..6).1), alone, "{name}");
            }
        }
        each!(check);
    }
}
