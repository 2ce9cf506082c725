//! Rows of small gradients that are scaled: by the weight of a step, or as they are clipped.

use std::sync::atomic::{AtomicIsize, Ordering::Relaxed};

use burn::module::Module;
use burn::nn::LinearConfig;
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use super::models::Chain;
use crate::memory::held;

const WIDE: usize = 200;
const BLOCKS: usize = 6;

/// Blocks of several layers, whose rows come in one buffer that is large enough to be used again.
#[derive(Module, Debug)]
struct Tower {
    blocks: Vec<Chain>,
}

impl Tower {
    fn new(device: &Device) -> Self {
        let layer = |_| LinearConfig::new(WIDE, WIDE).init(device);
        let block = |_| Chain { layers: (0..4).map(layer).collect() };
        Self { blocks: (0..BLOCKS).map(block).collect() }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<1> {
        let layers = self.blocks.iter().flat_map(|block| &block.layers);
        layers.fold(x, |x, layer| layer.forward(x).tanh()).mean()
    }

    fn mean(&self, x: Tensor<2>) -> Loss {
        self.forward(x).into()
    }

    fn sum(&self, x: Tensor<2>) -> Loss {
        let items = (7 * x.dims()[0]) as f64;
        Loss::sum(self.forward(x), items)
    }
}

/// How much more each of two ranks holds with the gradients that an optimizer is given than before their step.
fn more((sharding, engine): (Sharding, Engine), loss: fn(&Tower, Tensor<2>) -> Loss, largest: f64) -> isize {
    let device = Device::flex().autodiff();
    let model = Tower::new(&device);
    let strategy = Strategy::new().with_data(DataParallelConfig::new().with_sharding(sharding)).with_engine(engine);
    let found = AtomicIsize::new(0);
    launch::threads(2)
        .run(|rank| {
            let mut model = model.clone().fork(&device).parallelize(&rank, &strategy)?;
            let mut optim: ModuleOptimizer = SgdConfig::new().init();
            for number in 0..5 {
                rank.barrier()?;
                let before = held();
                rank.barrier()?;
                let step = model.step(Tensor::<2>::ones([2, WIDE], &device), loss)?;
                let step = step.clip_grad_norm(&model, largest)?;
                rank.barrier()?;
                if number >= 2 {
                    found.fetch_max((held() - before) / 2, Relaxed);
                }
                rank.barrier()?;
                model = model.optimize(&mut optim, 1e-3, step)?;
            }
            Ok(())
        })
        .unwrap();
    found.into_inner()
}

/// They lie beside others in one buffer, and stay there: in memory of their own they would be held twice until the next
/// step takes the buffer again.
#[test]
fn rows_of_small_gradients_are_scaled_where_they_lie() {
    let _turn = crate::turn();
    let rows = (4 * BLOCKS * 4 * (WIDE * WIDE + WIDE) / 2) as isize;
    let (small, large) = (1e-6, 1e6);
    let captured = (Sharding::Parameters, Engine::Captured);
    let [unscaled, by_weight, clipped] =
        [(Tower::mean as fn(&_, _) -> _, large), (Tower::sum, large), (Tower::mean, small)]
            .map(|(loss, largest)| more(captured, loss, largest));
    assert!(by_weight - unscaled < rows / 4, "{by_weight} by the weight, {unscaled} not scaled, rows of {rows}");
    assert!(clipped - unscaled < rows / 4, "{clipped} clipped, {unscaled} not scaled, rows of {rows}");
    let eager = (Sharding::Gradients, Engine::Eager);
    let [unscaled, clipped] = [large, small].map(|largest| more(eager, Tower::mean, largest));
    assert!(clipped - unscaled < rows / 4, "eager: {clipped} clipped, {unscaled} not scaled, rows of {rows}");
}
