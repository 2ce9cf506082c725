//! How often a training step goes over the parameters of the model.

use std::cell::Cell;
use std::fmt;

use burn::module::{Devices, ModuleMapper, ModuleVisitor};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

thread_local! {
    static WALKS: Cell<usize> = const { Cell::new(0) };
}

/// A model that counts who visits or maps it on this thread.
#[derive(Debug, Clone)]
struct Counted(Vec<Linear>);

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
fn walks(ranks: usize, strategy: &Strategy, micro_batches: usize) -> [usize; 2] {
    let found = launch::threads(ranks).run(|world| {
        let device = world.device().autodiff();
        let model = Counted((0..4).map(|_| LinearConfig::new(4, 4).init(&device)).collect());
        let mut model = model.parallelize(&world, strategy)?;
        let mut optim: ModuleOptimizer = AdamConfig::new().init();
        let mut walks = [0; 2];
        for _ in 0..3 {
            WALKS.set(0);
            let inputs = (0..micro_batches).map(|_| Tensor::<2>::ones([8, 4], &device));
            let step = model.step_micro_batches(inputs, |model, x| {
                model.0.iter().fold(x, |x, layer| layer.forward(x).tanh()).mean()
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
fn a_step_goes_over_the_parameters_a_few_times() {
    let plan = || Plan::new().shard("*.weight", 1).shard("*.bias", 0);
    let pipeline = || PipelineConfig::new(2);
    let zero = |sharding| Strategy::new().with_data(DataParallelConfig::new().with_sharding(sharding));
    let (replicas, captured) = (Strategy::new(), Engine::Captured);
    let split = replicas.clone().with_tp(2, plan());
    let of = |ranks, strategy: &Strategy| [walks(ranks, strategy, 1), walks(ranks, strategy, 3)];
    let found = [
        ("one device", of(1, &replicas)),
        ("replicas", of(2, &replicas)),
        ("captured replicas", of(2, &replicas.clone().with_engine(captured))),
        ("ZeRO 1", of(2, &zero(Sharding::Optimizer))),
        ("ZeRO 2", of(2, &zero(Sharding::Gradients))),
        ("ZeRO 3", of(2, &zero(Sharding::Parameters))),
        ("eager ZeRO 3", of(2, &zero(Sharding::Parameters).with_engine(Engine::Eager))),
        ("split", of(2, &split)),
        ("pipeline", of(2, &replicas.clone().with_pp(2, pipeline()))),
        ("split replicas", of(4, &split.clone().with_dp(2))),
        ("replicas of a split pipeline", of(8, &split.clone().with_dp(2).with_pp(2, pipeline()))),
    ];
    // The walks of a step of one micro-batch, of one of three, and of the update after each.
    let most = [
        ("one device", [[3, 1], [5, 1]]),
        ("replicas", [[3, 1], [5, 1]]),
        ("captured replicas", [[4, 1], [8, 1]]),
        ("ZeRO 1", [[3, 3], [5, 3]]),
        ("ZeRO 2", [[3, 3], [5, 3]]),
        ("ZeRO 3", [[3, 3], [7, 3]]),
        ("eager ZeRO 3", [[5, 5], [9, 5]]),
        ("split", [[4, 1], [8, 1]]),
        ("pipeline", [[4, 1], [8, 1]]),
        ("split replicas", [[4, 1], [8, 1]]),
        ("replicas of a split pipeline", [[4, 1], [8, 1]]),
    ];
    for ((what, found), (_, most)) in found.into_iter().zip(most) {
        let few = found.iter().flatten().zip(most.iter().flatten()).all(|(found, most)| found <= most);
        assert!(few, "{what}: {found:?} walks, and {most:?} are known to do");
    }
}
