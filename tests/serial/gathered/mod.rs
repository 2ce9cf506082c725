//! What replicas that divide parameters (ZeRO 3) hold while a step runs.

mod models;
mod scaled;

use std::sync::atomic::{AtomicIsize, Ordering::Relaxed};

use burn::module::{Lora, Module};
use burn::nn::LinearConfig;
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use self::models::{Chain, Encoder, LAYERS, WIDTH, Worded};
use crate::memory::{MOST, held};

/// What the machinery takes on a rank, and what is gathered of norms and biases.
const FEW: isize = 64 << 10;

/// The bytes of the largest group of a model, which is a layer of it, and of all.
fn sizes<M: Module>(model: &M) -> (isize, isize) {
    let all = 4 * model.num_params() as isize;
    (all / LAYERS as isize, all)
}

/// How much more than before a step each of two ranks holds at the end of its forward, with inputs on a device.
fn after_forward<M: Module + Sync>(
    model: &M,
    width: usize,
    config: DataParallelConfig,
    inputs: &Device,
    loss: fn(&M, Tensor<2>) -> Tensor<1>,
) -> isize {
    let found = AtomicIsize::new(0);
    launch::threads(2)
        .run(|rank| {
            let mut model = model.clone().fork(inputs).data_parallel(&rank, config.clone())?;
            let x = Tensor::<2>::ones([2, width], inputs);
            model.step(x.clone(), loss)?;
            rank.barrier()?;
            let before = held();
            rank.barrier()?;
            model.step(x, |model, x| {
                let loss = loss(model, x);
                // What is gathered ahead is there by then, and neither rank goes on.
                std::thread::sleep(std::time::Duration::from_millis(200));
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
    inputs: &Device,
    loss: fn(&M, Tensor<2>) -> Tensor<1>,
) -> isize {
    let divided = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_keep(keep);
    let plain = after_forward(model, width, DataParallelConfig::new(), &checkpointed(), loss);
    after_forward(model, width, divided, inputs, loss) - plain
}

fn checkpointed() -> Device {
    Device::flex().autodiff().gradient_checkpointing()
}

/// With `Keep::Pass` no more is whole when forward ends than two groups, on a device with burn's gradient
/// checkpointing, whatever burn's layers do with their weights; with `Keep::MicroBatch` everything is.
#[test]
fn two_groups_are_whole_with_gradient_checkpointing() {
    let _turn = crate::turn();
    let device = checkpointed();
    let model = Encoder::new(&device);
    let (group, all) = sizes(&model);
    let pass = gathered(&model, WIDTH, Keep::Pass, &device, Encoder::loss);
    assert!(pass < 2 * group + FEW, "{pass} of groups of {group}");
    // Inputs of another device are put beside the model.
    let pass = gathered(&model, WIDTH, Keep::Pass, &Device::flex().autodiff(), Encoder::loss);
    assert!(pass < 2 * group + FEW, "{pass} of groups of {group}, with inputs on another device");
    let micro_batch = gathered(&model, WIDTH, Keep::MicroBatch, &device, Encoder::loss);
    assert!(micro_batch > all - FEW, "{micro_batch} of {all}");
}

/// By how much what a rank of so many holds grows in a step on inputs of such dims, at most.
fn growth<M: Module + Sync>(
    (model, device): (&M, &Device),
    ranks: usize,
    strategy: &Strategy,
    dims: [usize; 2],
    loss: fn(&M, Tensor<2>) -> Tensor<1>,
) -> isize {
    let found = AtomicIsize::new(0);
    launch::threads(ranks)
        .run(|rank| {
            let mut model = model.clone().fork(device).parallelize(&rank, strategy)?;
            let x = Tensor::<2>::ones(dims, device);
            let mut optim: ModuleOptimizer = SgdConfig::new().init();
            for step in 0..5 {
                rank.barrier()?;
                let before = held();
                MOST.store(before, Relaxed);
                rank.barrier()?;
                let done = model.step(x.clone(), loss)?;
                rank.barrier()?;
                if step >= 2 {
                    found.fetch_max((MOST.load(Relaxed) - before) / ranks as isize, Relaxed);
                }
                // The optimizer of the other rank is no part of the step.
                rank.barrier()?;
                model = model.optimize(&mut optim, 1e-3, done)?;
            }
            Ok(())
        })
        .unwrap();
    found.into_inner()
}

/// By how much each of two ranks grows in a step at most, beside activations and its rows of the gradients.
fn beside_rows<M: Module + Sync>(
    (model, device): (&M, &Device),
    (engine, bucket): (Engine, usize),
    dims: [usize; 2],
    loss: fn(&M, Tensor<2>) -> Tensor<1>,
) -> isize {
    let all = 4 * model.num_params() as isize;
    let with = |ranks, sharding, engine| {
        let data = DataParallelConfig::new().with_bucket_bytes(bucket).with_sharding(sharding);
        growth((model, device), ranks, &Strategy::new().with_data(data).with_engine(engine), dims, loss)
    };
    // Beside activations there are all gradients; with rows, half of them. One rank alone holds as much whenever it
    // runs, where of two that hardly meet one may have let go of its activations before the other has its own.
    let alone = if engine == Engine::Auto { Engine::Captured } else { engine };
    let activations = with(1, Sharding::None, alone) - all;
    with(2, Sharding::Parameters, engine) - activations - all / 2
}

/// What a user of `parallelize` gets who asks for nothing but that parameters are divided, on an ordinary device:
/// whatever burn's layers do with their weights, two groups of them are whole, beside rows of gradients and what is
/// exchanged.
#[test]
fn two_groups_are_whole_by_default() {
    fn check<M: Module + Sync>(model: &M, loss: fn(&M, Tensor<2>) -> Tensor<1>) {
        let group = 4 * model.num_params() as isize / (2 * LAYERS as isize);
        let device = Device::flex().autodiff();
        // Rows that fill burn's tiles, of which no matrix is made.
        let bucket = DataParallelConfig::new().bucket_bytes;
        let found = beside_rows((model, &device), (Engine::Auto, bucket), [32, WIDTH], loss);
        // Two groups, the gradients of two, and a gather and a reduction of one that are packed and taken apart.
        assert!(found < 8 * group, "{found} of groups of {group}");
    }
    let _turn = crate::turn();
    let device = Device::flex().autodiff();
    check(&Encoder::of(2 * LAYERS, &device), Encoder::loss);
    let layer = |_| LinearConfig::new(WIDTH, 5 * WIDTH).with_bias(false).init(&device);
    let chain = Chain { layers: (0..2 * LAYERS).map(layer).collect() };
    check(&chain, |model, x| {
        let x = x.unsqueeze::<3>();
        model.layers.iter().fold(x, |x, layer| layer.forward(x).tanh().narrow(2, 0, WIDTH)).mean()
    });
}

/// So it is however many layers there are: their gradients are scattered as backward comes by, also where each has a
/// bias, whose gradient burn gives its dims behind all layers.
#[test]
fn gradients_of_two_groups_are_whole_in_a_captured_step() {
    let _turn = crate::turn();
    let device = Device::flex().autodiff();
    const WIDE: usize = 200;
    const GROUP: isize = 4 * (WIDE * WIDE + WIDE) as isize;
    let bucket = DataParallelConfig::new().bucket_bytes;
    let [few, many] = [12, 48].map(|layers| {
        let layer = |_| LinearConfig::new(WIDE, WIDE).init(&device);
        let model = Chain { layers: (0..layers).map(layer).collect() };
        beside_rows((&model, &device), (Engine::Captured, bucket), [2, WIDE], Chain::plain)
    });
    assert!(many - few < 8 * GROUP, "{few} of 12 layers, {many} of 48, groups of {GROUP}");
}

/// So it is at any time of a step by the model's own forward, on a device with gradient checkpointing: what is whole
/// does not grow with the number of layers.
#[test]
fn two_groups_are_whole_in_an_eager_step() {
    let _turn = crate::turn();
    let device = checkpointed();
    let bucket = Worded::LAYER as usize;
    for (what, loss) in [("with", Worded::with_table as fn(&_, _) -> _), ("without", Worded::without_table)] {
        let with = |layers| {
            let model = Worded::of(layers, &device);
            beside_rows((&model, &device), (Engine::Eager, bucket), [2, Worded::WIDTH], loss)
        };
        let (few, many) = (with(12), with(48));
        // Two groups, the gradients of one, which are packed to be reduced, and few activations; and gradients that
        // wait where one rank is ahead of the other, which is by no more than a gather or two.
        assert!(many < 12 * Worded::LAYER, "{what} the table: {many} of groups of {}", Worded::LAYER);
        assert!(many - few < 8 * Worded::LAYER, "{what} the table: {few} of 12 layers, {many} of 48");
    }
}

/// The table of burn's `Embedding` stays from forward to backward beside the two groups, once for each time that the
/// forward comes to it.
#[test]
fn an_embedding_keeps_its_table() {
    let _turn = crate::turn();
    let device = checkpointed();
    let model = Worded::of(LAYERS, &device);
    let losses = [Worded::without_table, Worded::with_table, Worded::with_table_twice];
    let [without, once, twice] = losses.map(|loss| gathered(&model, Worded::WIDTH, Keep::Pass, &device, loss));
    for (what, found, expected) in [
        ("without", without, 2 * Worded::LAYER),
        ("with", once, 2 * Worded::LAYER + Worded::TABLE),
        // The last group is the table.
        ("with, twice", twice, Worded::LAYER + 2 * Worded::TABLE),
    ] {
        let words = "if burn lets go of the table, docs/memory.md is to say so";
        assert!((found - expected).abs() < FEW, "{what} the table: {found}, not {expected}; {words}");
    }
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

/// So it is of views of one's own as well; without gradient checkpointing burn would keep them, so that is refused.
#[test]
fn views_of_weights_are_not_kept() {
    let _turn = crate::turn();
    let device = checkpointed();
    let model = Chain::new(&device);
    let (group, _) = sizes(&model);
    let losses: [fn(&Chain, Tensor<2>) -> Tensor<1>; 2] = [Chain::turned, Chain::plain];
    for loss in losses {
        let found = gathered(&model, 200, Keep::Pass, &device, loss);
        assert!(found < 2 * group + FEW, "{found} of groups of {group}");
    }
}

/// Where ranks may use different layers one group is whole when forward ends: none is gathered ahead.
#[test]
fn one_group_is_whole_where_ranks_say_what_they_want() {
    let _turn = crate::turn();
    let device = checkpointed();
    let model = Chain::new(&device);
    let (group, _) = sizes(&model);
    let divided = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_allow_unused_parameters(true);
    let with = |config| after_forward(&model, 200, config, &device, Chain::plain);
    let found = with(divided) - with(DataParallelConfig::new());
    assert!(found < group + FEW, "{found} of groups of {group}");
}

/// Steps gather for a pass into memory that stays: that of two groups. What is kept for longer goes back.
#[test]
fn memory_of_two_groups_stays_between_steps() {
    let _turn = crate::turn();
    const WIDE: usize = 600;
    let device = checkpointed();
    let layer = |_| LinearConfig::new(WIDE, WIDE).with_bias(false).init(&device);
    let model = Chain { layers: (0..LAYERS).map(layer).collect() };
    let (group, _) = sizes(&model);
    let stays = |engine, keep| {
        let data = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_keep(keep);
        let strategy = Strategy::new().with_data(data).with_engine(engine);
        let found = AtomicIsize::new(0);
        launch::threads(2)
            .run(|rank| {
                let mut model = model.clone().fork(&device).parallelize(&rank, &strategy)?;
                let mut optim: ModuleOptimizer = SgdConfig::new().init();
                rank.barrier()?;
                let before = held();
                rank.barrier()?;
                for _ in 0..3 {
                    let done = model.step(Tensor::<2>::ones([2, WIDE], &device), Chain::plain)?;
                    model = model.optimize(&mut optim, 1e-3, done)?;
                }
                rank.barrier()?;
                found.store((held() - before) / 2, Relaxed);
                rank.barrier()?;
                Ok(())
            })
            .unwrap();
        found.into_inner()
    };
    for engine in [Engine::Captured, Engine::Eager] {
        // What a process makes once is no part of it: this test may be the first.
        stays(engine, Keep::Pass);
        let (pass, micro_batch) = (stays(engine, Keep::Pass), stays(engine, Keep::MicroBatch));
        let more = pass - micro_batch;
        assert!(more > group && more < 2 * group + 2 * FEW, "{engine:?}: {pass} and {micro_batch}, groups of {group}");
    }
}
