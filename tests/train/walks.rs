//! How often a training step goes over the parameters of the model.

use std::cell::Cell;
use std::fmt;

use burn::module::{Devices, ModuleMapper, ModuleVisitor};
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;

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

/// The walks of a step that is known already, on rank 0 of as many ranks as the strategy is for.
fn walks(ranks: usize, strategy: &Strategy) -> usize {
    let found = launch::threads(ranks).run(|world| {
        let device = world.device().autodiff();
        let model = Counted((0..4).map(|_| LinearConfig::new(4, 4).init(&device)).collect());
        let mut model = model.parallelize(&world, strategy)?;
        let mut walks = 0;
        for _ in 0..3 {
            let x = Tensor::<2>::ones([8, 4], &device);
            WALKS.set(0);
            let step = model.step(x, |model, x| model.0.iter().fold(x, |x, layer| layer.forward(x).tanh()).mean())?;
            assert!(step.loss.item().is_finite());
            walks = WALKS.get();
        }
        Ok(walks)
    });
    found.unwrap()[0]
}

#[test]
fn a_step_goes_over_the_parameters_a_few_times() {
    let plan = || Plan::new().shard("*.weight", 1).shard("*.bias", 0);
    let pipeline = || PipelineConfig::new(2);
    let found = [
        ("replicas", walks(2, &Strategy::new())),
        ("split", walks(2, &Strategy::new().with_tp(2, plan()))),
        ("pipeline", walks(2, &Strategy::new().with_pp(2, pipeline()))),
        ("split replicas", walks(4, &Strategy::new().with_dp(2).with_tp(2, plan()))),
        (
            "replicas of a split pipeline",
            walks(8, &Strategy::new().with_dp(2).with_pp(2, pipeline()).with_tp(2, plan())),
        ),
    ];
    // Of replicas the first walk looks for what has changed, and the last gives the averages to burn. In between the
    // eager engine takes what the hooks have left, and a captured step reads its key and then the values.
    let expected =
        [("replicas", 3), ("split", 4), ("pipeline", 4), ("split replicas", 4), ("replicas of a split pipeline", 4)];
    assert_eq!(found, expected);
}
