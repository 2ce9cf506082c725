//! Models, values and numbers at the edge of what there is: what is saved comes back, or is an error when it is saved.

use std::collections::BTreeMap;
use std::fs;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::Tensor;
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, DataPosition, TrainState};
use burn_parallel::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize, Serializer};

use crate::Dir;
use crate::common::models::device;
use crate::common::reference::{filled, optimizer, values};
use crate::keep::{AXES, names};
use crate::net::{Axes, Net, train};

/// A table of no rows beside a layer.
#[derive(Module, Debug)]
struct NoRows {
    none: Param<Tensor<2>>,
    layer: Linear,
}

#[derive(Module, Debug)]
struct Nothing {}

/// Gradients of ones.
#[derive(Default)]
struct Ones(GradientsParams);

impl ModuleVisitor for Ones {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.register(param.id, param.val().inner().ones_like());
    }
}

fn update<M: Module>(model: M, optim: &mut ModuleOptimizer) -> M {
    let mut ones = Ones::default();
    model.visit(&mut ones);
    optim.step(0.1, model, ones.0)
}

/// Saves a model, and an optimizer that has updated it, on two ranks, and restores both on one. Returns the bytes that
/// it reads.
fn comes_back<M: Module + Sync>(model: &M, step: u64) -> u64 {
    let (dir, mut optim) = (Dir::fresh(), optimizer());
    let model = update(model.clone(), &mut optim);
    let saved = launch::threads(2).run(|world| {
        let mut wrapped = model.clone().data_parallel(&world, DataParallelConfig::new())?;
        let mut optim = optim.clone();
        let state = TrainState::new(&mut wrapped).with_optimizer("adamw", &mut optim);
        Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.save(step, state)
    });
    saved.unwrap();
    let next = values(&update(model.clone(), &mut optim));
    let restored = launch::threads(1).run(|world| {
        let mut wrapped = model.clone().data_parallel(&world, DataParallelConfig::new())?;
        let (before, mut optim) = (values(wrapped.local()), optimizer());
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        assert_eq!(checkpoints.latest()?, Some(step));
        let state = TrainState::new(&mut wrapped).with_optimizer("adamw", &mut optim);
        let restored = checkpoints.restore(state)?.unwrap();
        assert_eq!((restored.step, values(wrapped.local())), (step, before));
        assert_eq!(values(&update(wrapped.local().clone(), &mut optim)), next);
        Ok(restored.bytes_read)
    });
    restored.unwrap()[0]
}

#[test]
fn models_of_nothing_come_back() {
    let none = Param::from_tensor(Tensor::zeros([0, 3], &device()));
    let layer = filled(LinearConfig::new(4, 3).init(&device()));
    // With the moments.
    assert_eq!(comes_back(&NoRows { none, layer }, 1), 3 * 4 * 15);
    assert_eq!(comes_back(&Nothing {}, 1), 0);
}

/// The step after it counts on.
#[test]
fn the_last_step_that_there_can_be() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let run = launch::threads(2).run(|world| {
        let (mut model, mut optim) = (AXES.wrap(&world, &net)?, optimizer());
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new().with_keep_last(1))?;
        checkpoints.save(1, TrainState::new(&mut model))?;
        checkpoints.save(u64::MAX, TrainState::new(&mut model))?;
        let restored = checkpoints.restore(TrainState::new(&mut model))?.map(|restored| restored.step);
        train(model, &mut optim, (0, 1))?;
        Ok(restored)
    });
    assert_eq!(run.unwrap(), [Some(u64::MAX); 2]);
    assert_eq!(names(&dir), ["step-18446744073709551615"]);
}

/// What a save of a value says; and that the next one without it is saved.
fn says<T: Serialize + DeserializeOwned + Clone + Sync>(value: &T) -> String {
    let (dir, net) = (Dir::fresh(), Net::new());
    let run = launch::threads(2).run(|world| {
        let (mut model, mut value) = (AXES.wrap(&world, &net)?, value.clone());
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        let state = TrainState::new(&mut model).with_value("losses", &mut value);
        let refused = checkpoints.save(1, state).unwrap_err();
        checkpoints.save(2, TrainState::new(&mut model))?;
        assert_eq!(checkpoints.steps()?, [2]);
        Ok(refused.to_string())
    });
    let said = run.unwrap().swap_remove(1);
    assert!(said.contains("value `losses`"), "{said}");
    said
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Nested {
    inner: Option<Box<Self>>,
}

/// It is written without its number, and not read without.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct Forgetful {
    #[serde(skip_serializing)]
    number: u64,
}

/// Such as the best loss before the first evaluation.
#[test]
fn values_that_json_has_no_number_for_come_back() {
    type Best = (f64, Vec<f32>, BTreeMap<String, Option<f64>>);
    let (dir, net) = (Dir::fresh(), Net::new());
    let best = || (f64::INFINITY, vec![0.1, f32::NAN], BTreeMap::from([("a".to_owned(), Some(f64::NEG_INFINITY))]));
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        checkpoints.save(1, TrainState::new(&mut model).with_value("best", &mut best()))?;
        let mut restored = Best::default();
        checkpoints.restore(TrainState::new(&mut model).with_value("best", &mut restored))?;
        Ok([Some(restored), checkpoints.read_value::<Best>(1, "best")?].map(|best| format!("{best:?}")))
    });
    assert!(run.unwrap().concat().iter().all(|restored| *restored == format!("{:?}", Some(best()))));
}

/// They would be read as other ones, or not at all, when the run that needs them is gone.
#[test]
fn values_that_would_not_come_back_are_not_saved() {
    let deep = (0..300).fold(Nested::default(), |inner, _| Nested { inner: Some(Box::new(inner)) });
    assert!(says(&deep).contains("within each other"));
    assert!(says(&Forgetful { number: 1 }).contains("missing field `number`"));
    says(&BTreeMap::from([("$float".to_owned(), "0.5".to_owned())]));
    says(&serde_json::json!({ "$float": "0.5" }));
}

/// It cannot be written below 0.
#[derive(Clone, Copy, Deserialize)]
struct NotNegative(f64);

impl Serialize for NotNegative {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0 < 0.0 { Err(serde::ser::Error::custom("it is negative")) } else { serializer.serialize_f64(self.0) }
    }
}

/// That of rank 0 is: what the others have need not even be anything that could be.
#[test]
fn values_of_other_ranks_are_not_saved() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let run = launch::threads(3).run(|world| {
        let mut model = Axes::new(3, 1, 1).wrap(&world, &net)?;
        let mut loss = NotNegative(if world.rank() == 0 { 0.5 } else { -1.0 });
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        checkpoints.save(1, TrainState::new(&mut model).with_value("loss", &mut loss))?;
        checkpoints.restore(TrainState::new(&mut model).with_value("loss", &mut loss))?;
        Ok(loss.0)
    });
    assert_eq!(run.unwrap(), [0.5; 3]);
}

/// By its index it is of another step than by its name.
#[test]
fn a_checkpoint_that_was_renamed_is_not_restored() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.save(1, TrainState::new(&mut model)).map(drop)
    });
    run.unwrap();
    let path = |step: &str| dir.path().join(step);
    fs::rename(path("step-000000001"), path("step-000000200")).unwrap();
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        let refused = checkpoints.restore(TrainState::new(&mut model)).unwrap_err().to_string();
        let value = checkpoints.read_value::<u64>(200, "number").unwrap_err().to_string();
        Ok([refused, value])
    });
    for said in run.unwrap().concat() {
        assert!(said.contains("step-000000200") && said.contains("`step-000000001`"), "{said}");
    }
}

#[test]
fn a_position_in_other_data() {
    let run = launch::threads(2).run(|world| {
        let sampler = DistributedSampler::new(10, &world);
        let at = |items| DataPosition { epoch: 3, items };
        let refused = at(11).rest(&sampler).unwrap_err().to_string();
        assert!(refused.contains("11 items") && refused.contains("has 10"), "{refused}");
        assert_eq!(at(10).rest(&sampler)?.len(), 0);
        // One replica has left the eleventh, which two leave out: the epoch is over.
        let mut position = at(10);
        let dropping = DistributedSampler::new(11, &world).with_remainder(Remainder::Drop);
        assert_eq!(position.rest(&dropping)?.len(), 0);
        position.advance(0, &dropping);
        assert_eq!(position, DataPosition { epoch: 4, items: 0 });
        let mut last = DataPosition { epoch: usize::MAX, items: usize::MAX };
        last.advance(1, &dropping);
        assert_eq!(last.items, 0);
        Ok(())
    });
    run.unwrap();
}
