//! What replicas that divide parameters (ZeRO 3) hold while a step runs.

use std::sync::atomic::{AtomicIsize, Ordering::Relaxed};

use burn::module::{Lora, Module};
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;

use crate::memory::held;

const WIDTH: usize = 64;
const LAYERS: usize = 6;

/// What activations of a few rows and the machinery take on a rank.
const FEW: isize = 160 << 10;

#[derive(Module, Debug)]
struct Encoder {
    encoder: TransformerEncoder,
}

impl Encoder {
    fn new() -> Self {
        let config = TransformerEncoderConfig::new(WIDTH, 4 * WIDTH, 4, LAYERS).with_dropout(0.0).with_norm_first(true);
        Self { encoder: config.init(&Device::flex().autodiff()) }
    }

    fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        let input = TransformerEncoderInput::new(x.unsqueeze());
        self.encoder.forward(input).powi_scalar(2).mean()
    }
}

/// Layers that multiply by a view of their weight.
#[derive(Module, Debug)]
struct Turned {
    layers: Vec<Linear>,
}

impl Turned {
    fn new() -> Self {
        let layer = |_| LinearConfig::new(200, 200).with_bias(false).init(&Device::flex().autodiff());
        Self { layers: (0..LAYERS).map(layer).collect() }
    }

    fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        self.layers.iter().fold(x, |x, layer| x.matmul(layer.weight.val().transpose()).tanh()).powi_scalar(2).mean()
    }
}

/// The bytes of the largest group of a model, which is a layer of it, and of all.
fn sizes<M: Module>(model: &M) -> (isize, isize) {
    let all = 4 * model.num_params() as isize;
    (all / LAYERS as isize, all)
}

/// How much more than before a step each of two ranks holds at the end of its forward.
fn after_forward<M: Module + Sync>(
    model: &M,
    width: usize,
    keep: Keep,
    device: &Device,
    loss: fn(&M, Tensor<2>) -> Tensor<1>,
) -> isize {
    let found = AtomicIsize::new(0);
    launch::threads(2)
        .run(|rank| {
            let config = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_keep(keep);
            let mut model = model.clone().fork(device).data_parallel(&rank, config)?;
            let x = Tensor::<2>::ones([2, width], device);
            model.step(x.clone(), |model, x| loss(model, x))?;
            rank.barrier()?;
            let before = held();
            rank.barrier()?;
            model.step(x, |model, x| {
                let loss = loss(model, x);
                // What is gathered ahead is there by then, and neither rank goes on.
                std::thread::sleep(std::time::Duration::from_millis(20));
                rank.barrier().expect("both come here");
                found.store((held() - before) / 2, Relaxed);
                rank.barrier().expect("both come here");
                loss
            })?;
            Ok(())
        })
        .unwrap();
    found.into_inner()
}

/// With `Keep::Pass` no more is whole when forward ends than two groups, whatever burn's layers do with their weights;
/// with `Keep::MicroBatch` everything is.
#[test]
fn burns_layers_keep_no_gathered_weight() {
    let _turn = crate::turn();
    let model = Encoder::new();
    let ((group, all), device) = (sizes(&model), Device::flex().autodiff());
    let pass = after_forward(&model, WIDTH, Keep::Pass, &device, Encoder::loss);
    assert!(pass < 2 * group + FEW, "{pass} of groups of {group}");
    let micro_batch = after_forward(&model, WIDTH, Keep::MicroBatch, &device, Encoder::loss);
    assert!(micro_batch > all, "{micro_batch} of {all}");
}

/// Nor is the sum of a weight and its adapter.
#[test]
fn adapted_weights_are_not_kept() {
    let _turn = crate::turn();
    let model = Encoder::new();
    let (group, _) = sizes(&model);
    let model = model.apply_lora(Lora::new(2, 4.0));
    let pass = after_forward(&model, WIDTH, Keep::Pass, &Device::flex().autodiff(), Encoder::loss);
    assert!(pass < 2 * group + FEW, "{pass} of groups of {group}");
}

/// burn keeps what a product multiplies by, if that was made of a weight by an operation, a view for example. With
/// burn's gradient checkpointing it makes views again, of the weight that is gathered again.
#[test]
fn views_of_weights_are_kept_without_gradient_checkpointing() {
    let _turn = crate::turn();
    let model = Turned::new();
    let (group, all) = sizes(&model);
    let device = Device::flex().autodiff();
    let kept = after_forward(&model, 200, Keep::Pass, &device, Turned::loss);
    assert!(kept > all - group, "{kept} of {all}: burn has changed, and the documentation is to be");
    let checkpointed = Device::flex().autodiff().gradient_checkpointing();
    let pass = after_forward(&model, 200, Keep::Pass, &checkpointed, Turned::loss);
    assert!(pass < 2 * group + FEW, "{pass} of groups of {group}");
}
