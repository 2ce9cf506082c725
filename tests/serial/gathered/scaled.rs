//! Rows of small gradients that are scaled: by the weight of a step, or as they are clipped.

use std::sync::atomic::{AtomicIsize, Ordering::Relaxed};

use burn::module::Module;
use burn::nn::LinearConfig;
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use super::models::Chain;
use crate::memory::{MOST, held};

const LAYERS: usize = 64;
const WIDE: usize = 100;

/// By how much each of two ranks grows at most up to the gradients that an optimizer is given.
fn growth((sharding, engine): (Sharding, Engine), loss: fn(&Chain, Tensor<2>) -> Loss, largest: f64) -> isize {
    let device = Device::flex().autodiff();
    let layer = |_| LinearConfig::new(WIDE, WIDE).init(&device);
    let model = Chain { layers: (0..LAYERS).map(layer).collect() };
    let strategy = Strategy::new().with_data(DataParallelConfig::new().with_sharding(sharding)).with_engine(engine);
    let found = AtomicIsize::new(0);
    launch::threads(2)
        .run(|rank| {
            let mut model = model.clone().fork(&device).parallelize(&rank, &strategy)?;
            let mut optim: ModuleOptimizer = SgdConfig::new().init();
            for number in 0..5 {
                rank.barrier()?;
                let before = held();
                MOST.store(before, Relaxed);
                rank.barrier()?;
                let step = model.step(Tensor::<2>::ones([2, WIDE], &device), loss)?;
                let step = step.clip_grad_norm(&model, largest)?;
                rank.barrier()?;
                if number >= 2 {
                    found.fetch_max((MOST.load(Relaxed) - before) / 2, Relaxed);
                }
                // The optimizer of the other rank is no part of it.
                rank.barrier()?;
                model = model.optimize(&mut optim, 1e-3, step)?;
            }
            Ok(())
        })
        .unwrap();
    found.into_inner()
}

fn mean(model: &Chain, x: Tensor<2>) -> Loss {
    model.plain(x).into()
}

fn sum(model: &Chain, x: Tensor<2>) -> Loss {
    let items = (7 * x.dims()[0]) as f64;
    Loss::sum(model.plain(x), items)
}

/// They lie beside others in one buffer, and stay there: they are not held twice.
#[test]
fn rows_of_small_gradients_are_scaled_where_they_lie() {
    let _turn = crate::turn();
    let rows = (4 * LAYERS * (WIDE * WIDE + WIDE) / 2) as isize;
    let (small, large) = (1e-6, 1e6);
    let captured = (Sharding::Parameters, Engine::Captured);
    let [unscaled, by_weight, clipped] =
        [(mean as fn(&_, _) -> _, large), (sum, large), (mean, small)].map(|(loss, clip)| growth(captured, loss, clip));
    assert!(by_weight - unscaled < rows / 4, "{by_weight} by the weight, {unscaled} not scaled, rows of {rows}");
    assert!(clipped - unscaled < rows / 4, "{clipped} clipped, {unscaled} not scaled, rows of {rows}");
    let eager = (Sharding::Gradients, Engine::Eager);
    let [unscaled, clipped] = [large, small].map(|clip| growth(eager, mean, clip));
    assert!(clipped - unscaled < rows / 4, "eager: {clipped} clipped, {unscaled} not scaled, rows of {rows}");
}
