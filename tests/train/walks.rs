//! How often a training step goes over the parameters of the model.

use std::cell::Cell;
use std::fmt;

use burn::module::{Devices, ModuleMapper, ModuleVisitor};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig};
use burn::optim::{AdamConfig, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::checkpointing::own_by;

thread_local! {
    static WALKS: Cell<usize> = const { Cell::new(0) };
}

/// Layers, with or without running statistics.
type Layers = (Vec<Linear>, Option<BatchNorm>);

/// A model that counts who visits or maps it on this thread.
#[derive(Debug, Clone)]
struct Counted(Layers);

impl Counted {
    fn walked() {
        WALKS.set(WALKS.get() + 1);
    }
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl Module for Counted {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.0.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self(self.0.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        Self(self.0.to_device(device))
    }

    fn train(self) -> Self {
        Self(self.0.train())
    }

    fn valid(&self) -> Self {
        Self(self.0.valid())
    }

    fn materialize(self) -> Self {
        Self(self.0.materialize())
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        Self::walked();
        self.0.visit(visitor);
    }

    fn map<V: ModuleMapper>(self, mapper: &mut V) -> Self {
        Self::walked();
        Self(self.0.map(mapper))
    }
}

/// The walks of a step of so many micro-batches that is known already, and of its update, on rank 0 of as many ranks as
/// the strategy is for.
fn walks(ranks: usize, strategy: &Strategy, norm: bool, micro_batches: usize) -> [usize; 2] {
    let found = launch::threads(ranks).run(|world| {
        let device = world.device().autodiff();
        let norm = norm.then(|| BatchNormConfig::new(4).init(&device));
        let model = Counted(((0..4).map(|_| LinearConfig::new(4, 4).init(&device)).collect(), norm));
        let mut model = own_by(&model, strategy).parallelize(&world, strategy)?;
        let mut optim: ModuleOptimizer = AdamConfig::new().init();
        let mut walks = [0; 2];
        for _ in 0..3 {
            WALKS.set(0);
            let inputs = (0..micro_batches).map(|_| Tensor::<2>::ones([8, 4], &device));
            let step = model.step_micro_batches(inputs, |Counted((layers, norm)), x| {
                let x = layers.iter().fold(x, |x, layer| layer.forward(x).tanh());
                norm.as_ref().map_or(x.clone(), |norm| norm.forward(x)).powi_scalar(2).mean()
            })?;
            assert!(step.loss.item().is_finite());
            walks[0] = WALKS.replace(0);
            model = model.optimize(&mut optim, 0.1, step)?;
            walks[1] = WALKS.get();
        }
        Ok(walks)
    });
    found.unwrap()[0]
}

#[test]
fn a_step_goes_over_the_parameters_once() {
    let plan = || Plan::new().shard("0.*.weight", 1).shard("0.*.bias", 0);
    let pipeline = || PipelineConfig::new(2);
    let zero = |sharding| Strategy::new().with_data(DataParallelConfig::new().with_sharding(sharding));
    let data = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_keep(Keep::Step);
    let whole = Strategy::new().with_data(data);
    let (replicas, eager) = (Strategy::new(), Engine::Eager);
    let captured = replicas.clone().with_engine(Engine::Captured);
    let split = replicas.clone().with_tp(2, plan());
    // The ranks, and the walks of the update after a step.
    let strategies = [
        ("one device", 1, replicas.clone(), 1),
        ("replicas", 2, replicas.clone(), 1),
        ("captured replicas", 2, captured.clone(), 1),
        ("ZeRO 1", 2, zero(Sharding::Optimizer), 2),
        ("ZeRO 2", 2, zero(Sharding::Gradients), 2),
        ("ZeRO 3", 2, zero(Sharding::Parameters), 2),
        ("ZeRO 3 whole in a step", 2, whole, 2),
        ("eager ZeRO 3", 2, zero(Sharding::Parameters).with_engine(eager), 2),
        ("split", 2, split.clone(), 1),
        ("pipeline", 2, replicas.clone().with_pp(2, pipeline()), 1),
        ("split replicas", 4, split.clone().with_dp(2), 1),
        ("replicas of a split pipeline", 8, split.with_dp(2).with_pp(2, pipeline()), 1),
    ];
    for (what, ranks, strategy, update) in strategies {
        for micro_batches in [1, 3] {
            let found = walks(ranks, &strategy, false, micro_batches);
            assert_eq!(found, [1, update], "{what}, {micro_batches} micro-batches");
        }
    }
    // Captured micro-batches read the running statistics that they move, and write them.
    for micro_batches in [1, 3] {
        assert_eq!(walks(2, &captured, true, micro_batches), [1 + 2 * micro_batches, 1], "{micro_batches}");
        assert_eq!(walks(2, &replicas.clone().with_engine(eager), true, micro_batches), [1, 1], "{micro_batches}");
    }
}
