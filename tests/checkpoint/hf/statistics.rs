//! Running statistics are written as they are after the last step.

use burn_parallel::hf::{self, Mapping, SaveConfig};
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::Dir;
use crate::common::models::{Cnn, device, images};
use crate::common::reference::{self, optimizer, own};
use crate::hf::values;

#[test]
fn running_statistics_are_those_after_the_last_step() {
    let cnn = Cnn::new(&device());
    let plan = Plan::new().shard_padded("head.weight", 1);
    for strategy in [
        Strategy::new().with_dp(2).with_engine(Engine::Eager),
        Strategy::new().with_dp(2).with_engine(Engine::Captured),
        Strategy::new().with_tp(2, plan),
    ] {
        let dir = Dir::fresh();
        let found = launch::threads(2).run(|world| {
            let mut model = own(&cnn).parallelize(&world, &strategy)?;
            let (mut optim, replica) = (optimizer(), model.mesh().coordinate("dp")? as u64);
            for step in 0..2 {
                let batch = images(4, 10 * step + replica + 1, &device());
                let gave = model.step(batch, |model, (x, targets)| model.loss(x, targets))?;
                model = model.optimize(&mut optim, 0.1, gave)?;
            }
            hf::save(&model, &world, dir.join("out"), &SaveConfig::new(Mapping::identity()))?;
            // To look at them brings them up to date, so it comes after.
            Ok(reference::values(&model.assemble()?))
        });
        let found = found.unwrap().swap_remove(0);
        let mut weights = hf::open(dir.join("out")).unwrap();
        assert_eq!(weights.names().count(), found.len());
        for (path, expected) in &found {
            assert_eq!(values(&mut weights, path), expected.values, "{path} under {strategy:?}");
        }
        let fresh = reference::values(&cnn);
        assert_ne!(found["norm.running_mean"], fresh["norm.running_mean"]);
    }
}
