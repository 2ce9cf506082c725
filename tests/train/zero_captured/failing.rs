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
