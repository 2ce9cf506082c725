//! Captured steps make their tensors in memory that the steps before had, and give it back with the model.

use std::sync::atomic::Ordering::Relaxed;

use burn::module::Module;
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn_parallel::graph::{CustomOps, Executor, capture_step};
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::TensorParallelConfig;

use crate::memory::{LARGEST, MOST, Mlp, WHOLE, held};

/// A weight has 4 MiB, as have the rows: all other tensors are smaller than a row of it.
const ROWS: usize = 1024;

/// What `gemm` packs factors in, some of which it keeps, and what burn keeps for each operation.
const BESIDE: isize = 5 << 20;

fn rows(device: &Device) -> Tensor<2> {
    Tensor::ones([ROWS, 1024], device)
}

#[test]
fn a_step_needs_what_its_plan_says() {
    let _turn = crate::turn();
    let device = Device::flex().autodiff();
    let (model, x) = (Mlp::new(&device).materialize(), rows(&device));
    let loss = |model: &Mlp, x| model.loss(x);
    let graph = capture_step(&model, x.clone(), loss).unwrap();
    let mut executor = Executor::new(graph, CustomOps::new()).unwrap();
    let plan = executor.memory().peak as isize;
    for number in 0..3 {
        let before = held();
        MOST.store(before, Relaxed);
        let outputs = executor.step(&model, x.clone()).unwrap();
        let peak = MOST.load(Relaxed) - before;
        drop(outputs);
        // The first finds nothing yet, the others find what it had.
        let expected = if number == 0 { plan } else { 0 };
        assert!((peak - expected).abs() <= BESIDE, "step {number} took {peak} bytes at most, planned are {plan}");
    }
    let before = held();
    drop(executor);
    assert!((before - held() - plan).abs() <= BESIDE, "{} bytes came back", before - held());
}

#[test]
fn training_asks_for_no_large_memory_after_its_first_steps() {
    let _turn = crate::turn();
    launch::threads(1)
        .run(|rank| {
            let device = rank.device().autodiff();
            let config = TensorParallelConfig::new(Plan::new());
            let mut model = Mlp::new(&device).tensor_parallel(&rank, config)?;
            let mut optim: ModuleOptimizer = SgdConfig::new().init_fused();
            let x = rows(&device);
            for number in 0..4 {
                LARGEST.set(0);
                let step = model.step(x.clone(), |model, x| model.loss(x))?;
                model = model.optimize(&mut optim, 0.01, step)?;
                let largest = LARGEST.get();
                assert!(number < 2 || largest < WHOLE, "step {number} asked for {largest} bytes at once");
            }
            Ok(())
        })
        .unwrap();
}
