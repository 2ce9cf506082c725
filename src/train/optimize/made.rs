//! What an optimizer makes of a few numbers, which is the same of optimizers of one kind and settings: those that
//! parameters get which no group takes.

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::{Param, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Device, Tensor};

use super::moments::MomentDigests;
use crate::Error;
use crate::error::catch_quietly;
use crate::graph::{NewOptimizer, Update};
use crate::sharding::{RankedParam, Rows, ShardParam, ShardParams};

const VALUES: [[f32; 2]; 2] = [[1.0, -0.5], [0.25, 2.0]];

const GRADIENTS: [[f32; 2]; 2] = [[0.5, -1.0], [3.0, -0.25]];

/// What the gradients are multiplied by, in each step: small ones show what is added to a divisor, large ones what is
/// clipped.
const SCALES: [f32; 3] = [1e-7, 1.0, 1e4];

const LEARNING_RATE: f64 = 0.1;

/// What the ranks compare of a call of `optimize`. `moments` are those of a new optimizer that other ranks have too.
pub(super) fn update_of(optim: &ModuleOptimizer, lr: &ModuleLearningRate, new: Option<&MomentDigests>) -> Update {
    // It panics if there is none.
    let rate = catch_quietly(|_| true, || lr.base()).unwrap_or(f64::NAN);
    let new = new.map(|moments| NewOptimizer { made: made_by(optim), moments: moments.all() });
    Update { rate, new }
}

fn made_by(optim: &ModuleOptimizer) -> [f32; NewOptimizer::NUMBERS] {
    let train = || train(optim).unwrap_or_default();
    let made = catch_quietly(|_| true, train).unwrap_or_default();
    made.try_into().unwrap_or([f32::NAN; NewOptimizer::NUMBERS])
}

fn train(optim: &ModuleOptimizer) -> Result<Vec<f32>, Error> {
    // The same groups without moments.
    let mut optim = optim.clone().load_record(OptimizerRecord::default());
    let (id, device) = (ParamId::from(0), Device::flex());
    let value = Tensor::<2>::from_floats(VALUES, &device).autodiff().require_grad();
    let (param, rows) = (RankedParam::new(Param::initialized(id, value)), Rows::new(&[2, 2], 1));
    let (Some(param), Some(rows)) = (param, rows) else { return Ok(Vec::new()) };
    let mut model = ShardParams(vec![ShardParam { path: String::new(), rows, owner: 0, param }]);
    for scale in SCALES {
        let mut grads = GradientsParams::new();
        grads.register(id, Tensor::<2>::from_floats(GRADIENTS, &device) * scale);
        model = optim.step(LEARNING_RATE, model, grads);
    }
    let data = model.0.remove(0).param.value().into_data()?;
    Ok(data.iter::<f32>().collect())
}

#[cfg(test)]
mod tests {
    use burn::grad_clipping::GradientClippingConfig;
    use burn::optim::{AdamConfig, AdamWConfig, LionConfig, MuonConfig, SgdConfig};

    use super::*;

    #[test]
    fn kinds_and_settings_make_other_numbers() {
        let adamw = || AdamWConfig::new().with_weight_decay(0.01);
        let clip = |most| Some(GradientClippingConfig::Norm(most));
        let optimizers: Vec<ModuleOptimizer> = vec![
            adamw().init(),
            adamw().with_weight_decay(0.02).init(),
            adamw().with_epsilon(1e-8).init(),
            adamw().with_beta_1(0.8).init(),
            adamw().with_beta_2(0.99).init(),
            adamw().with_grad_clipping(clip(0.05)).init(),
            adamw().with_grad_clipping(clip(1.0)).init(),
            AdamConfig::new().init(),
            SgdConfig::new().init(),
            LionConfig::new().init(),
            MuonConfig::new().init(),
        ];
        let made: Vec<_> = optimizers.iter().map(made_by).collect();
        for (place, one) in made.iter().enumerate() {
            assert!(one.iter().all(|number| number.is_finite()), "{place}: {one:?}");
            assert_eq!(*one, made_by(&optimizers[place]));
            for (other, numbers) in made.iter().enumerate().skip(place + 1) {
                // Twice what ranks take for rounding. Of two norms at which Adam's kin clip it sees least.
                let alike = |(a, b): (&f32, &f32)| (a - b).abs() <= 2e-4 * a.abs().max(b.abs());
                assert!(!one.iter().zip(numbers).all(alike), "{place} and {other} make {one:?} and {numbers:?}");
            }
        }
    }
}
