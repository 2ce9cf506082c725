//! What does not fit is an error that says what, on all ranks alike, and changes nothing.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::tensor::Tensor;
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;

use crate::Dir;
use crate::common::heard::Heard;
use crate::common::models::device;
use crate::common::reference::{filled, optimizer, own, values};

#[derive(Module, Debug)]
struct Two {
    first: Linear,
    second: Linear,
}

#[derive(Module, Debug)]
struct Other {
    first: Linear,
    third: Linear,
}

fn linear(inputs: usize) -> Linear {
    filled(LinearConfig::new(inputs, 3).init(&device()))
}

/// Saves a model after a step of AdamW.
fn saved(dir: &Dir) -> Two {
    let two = Two { first: linear(4), second: linear(4) };
    let run = launch::threads(2).run(|world| {
        let mut model = own(&two).data_parallel(&world, DataParallelConfig::new())?;
        let mut optim = optimizer();
        let x = Tensor::<2>::ones([2, 4], &device());
        let gave = model.step(x, |model, x| (model.first.forward(x.clone()) + model.second.forward(x)).sum())?;
        model = model.optimize(&mut optim, 0.1, gave)?;
        let state = TrainState::new(&mut model).with_optimizer("optim", &mut optim);
        let mut number = 7;
        let state = state.with_value("number", &mut number);
        Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.save(1, state)?;
        Ok(model.local().clone())
    });
    run.unwrap().swap_remove(0)
}

fn refused<M: Module + Sync>(
    dir: &Dir,
    model: &M,
    config: CheckpointConfig,
    optim: Option<&ModuleOptimizer>,
    words: &[&str],
) {
    let run = launch::threads(2).run(|world| {
        let mut model = own(model).data_parallel(&world, DataParallelConfig::new())?;
        let before = values(model.local());
        let mut checkpoints = Checkpointer::new(&world, dir.path(), config.clone())?;
        let mut optim = optim.cloned();
        let mut state = TrainState::new(&mut model);
        if let Some(optim) = &mut optim {
            state = state.with_optimizer("optim", optim);
        }
        let error = checkpoints.restore(state).unwrap_err();
        assert!(matches!(error, Error::Checkpoint { .. }), "{error:?}");
        assert_eq!(values(model.local()), before);
        assert!(optim.is_none_or(|optim| optim.to_record().is_empty()));
        // The world goes on.
        world.barrier()?;
        Ok(error.to_string())
    });
    let errors = run.unwrap();
    assert_eq!(errors[0], errors[1]);
    for words in words {
        assert!(errors[0].contains(words), "`{words}` is missing in: {}", errors[0]);
    }
}

#[test]
fn parameters_that_are_missing_and_that_nobody_expects() {
    let dir = Dir::fresh();
    let two = saved(&dir);
    let other = Other { first: linear(4), third: linear(4) };
    let strict = CheckpointConfig::new();
    let words = [
        "lacks",
        "third.bias, third.weight",
        "with_allow_missing",
        "second.bias, second.weight",
        "with_allow_unexpected",
    ];
    refused(&dir, &other, strict.clone(), None, &words);
    refused(&dir, &other, strict.clone().with_allow_missing(["third.*"]), None, &["second.bias, second.weight"]);
    refused(&dir, &other, strict.clone().with_allow_unexpected(["sec*"]), None, &["third.bias, third.weight"]);
    refused(
        &dir,
        &Two { first: linear(5), second: linear(4) },
        strict.clone(),
        None,
        &["`first.weight` has dims [4, 3] there and [5, 3] here"],
    );
    let allowing = strict.with_allow_missing(["third.*"]).with_allow_unexpected(["second.*"]);
    let run = launch::threads(2).run(|world| {
        let mut model = own(&other).data_parallel(&world, DataParallelConfig::new())?;
        let mut optim = optimizer();
        let state = TrainState::new(&mut model).with_optimizer("optim", &mut optim);
        Checkpointer::new(&world, dir.path(), allowing.clone())?.restore(state)?;
        Ok((values(&model.local().first), values(&model.local().third), optim.to_record().len()))
    });
    let (first, third, moments) = run.unwrap().swap_remove(1);
    assert_eq!((first, third, moments), (values(&two.first), values(&other.third), 4));
}

#[test]
fn optimizers_of_another_kind_and_names_that_are_not_there() {
    let dir = Dir::fresh();
    let two = saved(&dir);
    let strict = CheckpointConfig::new();
    let momentum: ModuleOptimizer = SgdConfig::new().with_momentum(Some(MomentumConfig::new())).init();
    refused(&dir, &two, strict.clone(), Some(&momentum), &["optimizer `optim` does not take `", "of another kind"]);
    launch::threads(1)
        .run(|world| {
            let mut model = own(&two).data_parallel(&world, DataParallelConfig::new())?;
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
            let (mut optim, mut text, mut number) = (optimizer(), String::from("as it was"), 1);
            let state = TrainState::new(&mut model).with_optimizer("adam", &mut optim);
            let error = checkpoints.restore(state).unwrap_err().to_string();
            assert!(error.contains("lacks") && error.contains("optimizers/adam"), "{error}");
            assert!(error.contains("it has the optimizers optim"), "{error}");
            let state = TrainState::new(&mut model).with_value("number", &mut text);
            let error = checkpoints.restore(state).unwrap_err().to_string();
            assert!(error.contains("value `number`") && error.contains("string"), "{error}");
            let state = TrainState::new(&mut model).with_value("number", &mut number);
            checkpoints.restore(state)?;
            assert_eq!((text.as_str(), number), ("as it was", 7));
            assert_eq!(checkpoints.read_value::<i32>(1, "number")?, Some(7));
            assert_eq!(checkpoints.read_value::<i32>(1, "none")?, None);
            let error = checkpoints.read_value::<String>(1, "number").unwrap_err().to_string();
            assert!(error.contains("value `number`") && error.contains("string"), "{error}");
            let error = checkpoints.read_value::<i32>(5, "number").unwrap_err().to_string();
            assert!(error.contains("step-000000005"), "{error}");
            let error = checkpoints.restore_step(5, TrainState::new(&mut model)).unwrap_err().to_string();
            assert!(error.contains("step-000000005"), "{error}");
            let twice = TrainState::new(&mut model).with_value("a", &mut number).with_value("a", &mut text);
            let error = checkpoints.save(9, twice).unwrap_err().to_string();
            assert!(error.contains("two of the values are called `a`"), "{error}");
            Ok(())
        })
        .unwrap();
}

/// A value that one rank alone cannot write.
#[derive(Default)]
struct Fickle(Option<&'static str>);

impl serde::Serialize for Fickle {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some("panics") => panic!("it panics"),
            Some(problem) => Err(serde::ser::Error::custom(problem)),
            None => serializer.serialize_unit(),
        }
    }
}

impl<'de> serde::Deserialize<'de> for Fickle {
    fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Ok(Self(None))
    }
}

/// One rank fails, or panics, by itself: no other waits for the time-out, and all have its error.
#[test]
fn what_one_rank_cannot_do_is_the_error_of_all() {
    let dir = Dir::fresh();
    let run = launch::threads(3).timeout(std::time::Duration::from_secs(20)).run(|world| {
        let mut model = own(&linear(4)).data_parallel(&world, DataParallelConfig::new())?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        let mut errors = Vec::new();
        for problem in ["it will not", "panics"] {
            // That of rank 0 alone is written.
            let mut value = Fickle((world.rank() == 0).then_some(problem));
            let state = TrainState::new(&mut model).with_value("fickle", &mut value);
            errors.push(checkpoints.save(1, state).unwrap_err().to_string());
            let state = TrainState::new(&mut model).with_value("fickle", &mut value);
            errors.push(checkpoints.save_async(1, state).unwrap_err().to_string());
        }
        assert_eq!(checkpoints.latest()?, None);
        checkpoints.save(1, TrainState::new(&mut model).with_value("fickle", &mut Fickle::default()))?;
        Ok(errors)
    });
    let errors = run.unwrap();
    assert!(errors.iter().all(|all| *all == errors[0]));
    for (error, words) in errors[0].iter().zip(["it will not", "it will not", "it panics", "it panics"]) {
        assert!(error.contains("rank 0: ") && error.contains(words), "{error}");
    }
}

/// Patterns that match everything have a model of others' parameters restored, which stay as they are: the log says
/// so, once.
#[test]
fn that_nothing_is_restored_is_a_warning() {
    let heard = Heard::install(log::LevelFilter::Info);
    let dir = Dir::fresh();
    saved(&dir);
    let all = CheckpointConfig::new().with_allow_missing(["*"]).with_allow_unexpected(["*"]);
    let restore = |which| {
        let run = launch::threads(2).run(|world| {
            let other = Other { first: linear(4), third: linear(4) };
            let mut model = own(&other).data_parallel(&world, DataParallelConfig::new())?;
            let mut alone = own(&other.third).data_parallel(&world, DataParallelConfig::new())?;
            let mut checkpoints = Checkpointer::new(&world, dir.path(), all.clone())?;
            match which {
                "some" => checkpoints.restore(TrainState::new(&mut model)).map(drop),
                _ => checkpoints.restore(TrainState::new(&mut alone)).map(drop),
            }
        });
        run.unwrap();
        let here = dir.path().display().to_string();
        let said: Vec<String> = heard.take().into_iter().filter(|said| said.contains(&here)).collect();
        said
    };
    let some = restore("some");
    assert!(
        some.len() == 1 && some[0].starts_with("INFO") && some[0].ends_with("third.bias, third.weight"),
        "{some:?}"
    );
    let none = restore("none");
    assert!(none.len() == 1 && none[0].starts_with("WARN") && none[0].contains("none of the 2 parameters"), "{none:?}");
}
