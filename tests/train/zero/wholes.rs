//! How often burn's own layers have their parameters gathered.

use burn::module::Module;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::tensor::{Device, Tensor};
use burn_parallel::prelude::*;

use super::{config, optimizer, wrap};
use crate::common::checkpointing::beside;

const LAYERS: usize = 4;

#[derive(Module, Debug)]
struct Encoder {
    encoder: TransformerEncoder,
}

impl Encoder {
    fn loss(&self, x: Tensor<3>) -> Tensor<1> {
        self.encoder.forward(TransformerEncoderInput::new(x)).powi_scalar(2).mean()
    }
}

/// Each layer is a group, gathered for forward and again for backward, but for the last, which is in use where these
/// meet: in a step, and by a forward of one's own, also the first one.
#[test]
fn the_layers_of_a_transformer_are_gathered_twice() {
    let device = Device::flex().autodiff();
    let encoder = TransformerEncoderConfig::new(64, 128, 4, LAYERS).with_dropout(0.0).with_norm_first(true);
    let model = Encoder { encoder: encoder.init(&device) };
    let (layer, gathers) = (model.num_params() * 4 / LAYERS, 2 * LAYERS as u64 - 1);
    launch::threads(2)
        .run(|rank| {
            let mut model = wrap(&rank, &model, config(Sharding::Parameters))?;
            let mut optim = optimizer("sgd");
            let x = || Tensor::<3>::ones([2, 5, 64], &rank.device().autodiff());
            for step in 0..4 {
                let before = model.counters();
                let step = match step % 2 {
                    0 => {
                        let grads = model.backward(model.loss(beside(&model, x())))?;
                        let mut step = model.step_micro_batches(Vec::<Tensor<3>>::new(), Encoder::loss)?;
                        step.grads = grads;
                        step
                    }
                    _ => model.step(x(), Encoder::loss)?,
                };
                let gathered = (model.counters() - before).parameters;
                assert_eq!(gathered.of("all_gather").calls, gathers);
                assert_eq!(gathered.total().bytes, gathers * layer as u64 / 2);
                model = model.optimize(&mut optim, 1e-3, step)?;
            }
            Ok(())
        })
        .unwrap();
}
