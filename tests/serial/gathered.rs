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

/// What the machinery takes on a rank, and what is gathered of norms and biases.
const FEW: isize = 64 << 10;

#[derive(Module, Debug)]
struct Encoder {
    encoder: TransformerEncoder,
}

impl Encoder {
    fn new(device: &Device) -> Self {
        let config = TransformerEncoderConfig::new(WIDTH, 4 * WIDTH, 4, LAYERS).with_dropout(0.0).with_norm_first(true);
        Self { encoder: config.init(device) }
    }

    fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        let input = TransformerEncoderInput::new(x.unsqueeze());
        self.encoder.forward(input).powi_scalar(2).mean()
    }
}

/// Layers on matrices.
#[derive(Module, Debug)]
struct Chain {
    layers: Vec<Linear>,
}

impl Chain {
    fn new(device: &Device) -> Self {
        let layer = |_| LinearConfig::new(200, 200).with_bias(false).init(device);
        Self { layers: (0..LAYERS).map(layer).collect() }
    }

    /// By their weights.
    fn plain(&self, x: Tensor<2>) -> Tensor<1> {
        self.layers.iter().fold(x, |x, layer| layer.forward(x).tanh()).mean()
    }

    /// By views of them.
    fn turned(&self, x: Tensor<2>) -> Tensor<1> {
        self.layers.iter().fold(x, |x, layer| x.matmul(layer.weight.val().transpose()).tanh()).mean()
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
    config: DataParallelConfig,
    device: &Device,
    loss: fn(&M, Tensor<2>) -> Tensor<1>,
) -> isize {
    let found = AtomicIsize::new(0);
    launch::threads(2)
        .run(|rank| {
            let mut model = model.clone().fork(device).data_parallel(&rank, config.clone())?;
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

/// How much of that is gathered: what replicas that hold everything have no need of.
fn gathered<M: Module + Sync>(
    model: &M,
    width: usize,
    keep: Keep,
    device: &Device,
    loss: fn(&M, Tensor<2>) -> Tensor<1>,
) -> isize {
    let config = |sharding| DataParallelConfig::new().with_sharding(sharding).with_keep(keep);
    let with = |sharding| after_forward(model, width, config(sharding), device, loss);
    with(Sharding::Parameters) - with(Sharding::None)
}

fn checkpointed() -> Device {
    Device::flex().autodiff().gradient_checkpointing()
}

/// With `Keep::Pass` no more is whole when forward ends than two groups, on a device with burn's gradient checkpointing, whatever
/// burn's layers do with their weights; with `Keep::MicroBatch` everything is.
#[test]
fn two_groups_are_whole_with_gradient_checkpointing() {
    let _turn = crate::turn();
    let device = checkpointed();
    let model = Encoder::new(&device);
    let (group, all) = sizes(&model);
    let pass = gathered(&model, WIDTH, Keep::Pass, &device, Encoder::loss);
    assert!(pass < 2 * group + FEW, "{pass} of groups of {group}");
    let micro_batch = gathered(&model, WIDTH, Keep::MicroBatch, &device, Encoder::loss);
    assert!(micro_batch > all - FEW, "{micro_batch} of {all}");
}

/// Nor is the sum of a weight and its adapter kept.
#[test]
fn adapted_weights_are_not_kept() {
    let _turn = crate::turn();
    let device = checkpointed();
    let model = Encoder::new(&device);
    let (group, _) = sizes(&model);
    let model = model.apply_lora(Lora::new(2, 4.0));
    let config = DataParallelConfig::new().with_sharding(Sharding::Parameters);
    let pass = after_forward(&model, WIDTH, config, &device, Encoder::loss);
    let alone = after_forward(&Encoder::new(&device), WIDTH, DataParallelConfig::new(), &device, Encoder::loss);
    // Kept sums would be as many bytes as the whole model, 6 groups; factors and what is in use are less than one.
    assert!(pass - alone < 3 * group + FEW, "{} of groups of {group}", pass - alone);
}

/// Without it burn keeps what a product multiplies by, if that was made of a weight by an operation: a view of one's own, or
/// that of a `Linear` whose input has more than two dims.
#[test]
fn views_of_weights_are_kept_without_gradient_checkpointing() {
    let _turn = crate::turn();
    let words = "burn has changed: docs/memory.md and the warning of `data_parallel` are to be as well";
    let device = Device::flex().autodiff();
    let model = Encoder::new(&device);
    let (group, all) = sizes(&model);
    let kept = gathered(&model, WIDTH, Keep::Pass, &device, Encoder::loss);
    assert!(kept > all - group, "{kept} of {all}: {words}");
    for (device, keeps) in [(device, true), (checkpointed(), false)] {
        let model = Chain::new(&device);
        let (group, all) = sizes(&model);
        let turned = gathered(&model, 200, Keep::Pass, &device, Chain::turned);
        assert_eq!(turned > all - group - FEW, keeps, "{turned} of {all}: {words}");
        // As it is it is gathered again in any case.
        let plain = gathered(&model, 200, Keep::Pass, &device, Chain::plain);
        assert!(plain < 2 * group + FEW, "{plain} of groups of {group}");
    }
}
