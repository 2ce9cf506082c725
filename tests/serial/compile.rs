//! To capture and compile a step takes time that grows with its layers, not with their square.

use std::sync::atomic::Ordering::Relaxed;

use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::memory::CALLS;

/// How often the ranks ask for memory in the first step of so many layers more than in the second, which finds it
/// compiled.
fn compiled(layers: usize, ranks: usize, strategy: &Strategy) -> usize {
    let counted = launch::threads(ranks).run(|rank| {
        let device = rank.device().autodiff();
        let model = TransformerEncoderConfig::new(8, 16, 2, layers).with_dropout(0.0).init(&device);
        let mut model = model.parallelize(&rank, strategy)?;
        let x = Tensor::<3>::ones([4, 4, 8], &device);
        let mut step = || {
            rank.barrier()?;
            let before = CALLS.load(Relaxed);
            rank.barrier()?;
            model.step(x.clone(), |model: &TransformerEncoder, x| {
                model.forward(TransformerEncoderInput::new(x)).powi_scalar(2).mean()
            })?;
            rank.barrier()?;
            Ok::<_, Error>(CALLS.load(Relaxed) - before)
        };
        let [first, second] = [step()?, step()?];
        Ok(first.saturating_sub(second))
    });
    counted.unwrap()[0]
}

#[test]
fn compiling_grows_with_the_layers() {
    let _turn = crate::turn();
    let captured = || Strategy::new().with_engine(Engine::Captured);
    let divided = DataParallelConfig::new().with_sharding(Sharding::Parameters);
    for (name, ranks, strategy) in [
        ("one rank", 1, captured()),
        ("tp", 2, captured().with_tp(2, Plan::megatron())),
        ("pp", 2, captured().with_pp(2, PipelineConfig::new(2))),
        ("ZeRO 3", 2, captured().with_dp(2).with_data(divided)),
    ] {
        let [few, many] = [2, 8].map(|layers| compiled(layers, ranks, &strategy));
        // Four times as many; of what grows with the square sixteen times.
        assert!(few > 1000 && many < 6 * few, "{name}: {few} calls for 2 layers, {many} for 8");
    }
}
