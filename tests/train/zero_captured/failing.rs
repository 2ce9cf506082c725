//! What goes wrong on one rank ends all of them.

use std::time::{Duration, Instant};

use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::models::device;
use crate::common::reference::filled;

fn layers() -> Vec<Linear> {
    let layer = |_| LinearConfig::new(6, 6).init(&device());
    filled((0..3).map(layer).collect())
}

fn strategy() -> Strategy {
    Strategy::new()
        .with_data(DataParallelConfig::new().with_sharding(Sharding::Parameters))
        .with_engine(Engine::Captured)
}

fn forward(layers: &[Linear], x: Tensor<2>) -> Tensor<2> {
    layers.iter().fold(x, |x, layer| layer.forward(x).tanh())
}

/// The errors of a run in which rank 1 does `otherwise` in the second step.
fn ended(otherwise: fn(&mut burn_parallel::train::Parallel<Vec<Linear>>) -> Result<(), Error>) -> Error {
    let began = Instant::now();
    let ended = launch::threads(3).timeout(Duration::from_secs(20)).run(|world| {
        let mut model = layers().parallelize(&world, &strategy())?;
        let x = Tensor::<2>::ones([2, 6], &device());
        for step in 0..3 {
            if step == 1 && world.rank() == 1 {
                otherwise(&mut model)?;
            }
            model.step(x.clone(), |model, x| forward(model, x).mean())?;
        }
        Ok(())
    });
    assert!(began.elapsed() < Duration::from_secs(15), "nobody waits for the time-out");
    ended.unwrap_err()
}

#[test]
fn an_error_in_the_middle_of_a_step_ends_all() {
    // The batch is refused once the others have begun to gather.
    let error = ended(|model| {
        let x = Tensor::<2>::ones([2, 5], &device());
        model.step(x, |model, x| forward(model, x).mean()).map(|_| ())
    });
    assert!(matches!(error, Error::RankFailed { rank: 1, .. }) && error.to_string().contains("axis 1"), "{error}");
}

#[test]
fn a_panic_ends_all() {
    let error = ended(|_| panic!("in the middle"));
    assert!(error.to_string().contains("in the middle"), "{error}");
}

/// What each rank is told that wraps layers of such widths with such a strategy.
fn refused(of_rank: impl Fn(usize) -> (usize, Strategy) + Sync) -> Vec<String> {
    let said = std::sync::Mutex::new(Vec::new());
    let ended = launch::threads(3).timeout(Duration::from_secs(20)).run(|world| {
        let (width, strategy) = of_rank(world.rank());
        let layer = |_| LinearConfig::new(width, 6).init(&device());
        let layers: Vec<Linear> = filled((0..3).map(layer).collect());
        let error = layers.parallelize(&world, &strategy).map(drop).unwrap_err();
        said.lock().unwrap().push(error.to_string());
        Err::<(), _>(error)
    });
    ended.unwrap_err();
    said.into_inner().unwrap()
}

/// Ranks that would gather other rows than the others, or at other times, are told so before they gather anything.
#[test]
fn ranks_that_would_gather_something_else_are_told_so() {
    let keeping = |keep| {
        let data = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_keep(keep);
        Strategy::new().with_data(data).with_engine(Engine::Captured)
    };
    let wide = refused(|rank| (if rank == 1 { 7 } else { 6 }, strategy()));
    let kept = refused(|rank| (6, if rank == 2 { keeping(Keep::Step) } else { keeping(Keep::Pass) }));
    assert_eq!((wide.len(), kept.len()), (3, 3), "all ranks return: {wide:?} {kept:?}");
    for said in wide {
        assert!(
            said.contains("`0.weight`") && said.contains("[7, 6], sharded along dim 0 here and F32 [6, 6]"),
            "{said}"
        );
        assert!(said.contains("build the same model on every rank"), "{said}");
    }
    for said in kept {
        assert!(said.contains(r#"`keep = "step"`, and rank 0 with `keep = "pass"`"#), "{said}");
        assert!(said.contains("give all ranks the same `DataParallelConfig`"), "{said}");
    }
}
