//! The noise of gradients measured in some steps alone: which, on all ranks, and what the others cost.

use std::ops::Range;

use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::tensor::DType;
use burn_parallel::batch::{GradientNoise, NoNoise, NoiseScale};
use burn_parallel::comm::Counters;
use burn_parallel::prelude::*;
use burn_parallel::train::{Clip, Engine, Parallel};

use crate::common::checkpointing::own_by;
use crate::common::dir::Dir;
use crate::common::models::device;
use crate::grad_norm::lm::{self, Batch, Kind, Lm};

const KIND: Kind = Kind { tied: true, frozen: true, dtype: DType::F32 };

fn part(batch: &Batch, rows: Range<usize>) -> Batch {
    (batch.0.clone().narrow(0, rows.start, rows.len()), batch.1.clone().narrow(0, rows.start, rows.len()))
}

/// Strategies over two ranks that measure every so many steps, each in a way of its own.
fn ways(every: u64) -> [(&'static str, Strategy); 7] {
    let data = |sharding| DataParallelConfig::new().with_sharding(sharding).with_noise_scale_every(every);
    let strategy = |sharding| Strategy::new().with_data(data(sharding));
    [
        ("replicas", strategy(Sharding::None)),
        ("captured replicas", strategy(Sharding::None).with_engine(Engine::Captured)),
        ("ZeRO 1", strategy(Sharding::Optimizer)),
        ("ZeRO 2", strategy(Sharding::Gradients)),
        ("eager ZeRO 3", strategy(Sharding::Parameters).with_engine(Engine::Eager)),
        ("ZeRO 3", strategy(Sharding::Parameters).with_engine(Engine::Captured)),
        ("a split model", strategy(Sharding::None).with_tp(2, KIND.plan())),
    ]
}

/// A step of two micro-batches on each replica, which takes the norm, or only where it measures the noise.
fn step(model: &mut Parallel<Lm>, number: usize, clips: bool) -> Result<Step, Error> {
    let batch = lm::batch(number, &device());
    let first = model.replica().0;
    let rows = [part(&batch, first..first + 2), part(&batch, 4..7 + first)];
    let step = model.step_micro_batches(rows, lm::loss)?;
    let due = step.noise() == Err(NoNoise::NoNorm);
    let step = match (clips, due) {
        (true, _) => step.clip_grad_norm(model, Clip::at(1.0))?,
        (false, true) => step.clip_grad_norm(model, Clip::never())?,
        (false, false) => step,
    };
    assert_eq!(due, step.noise().is_ok());
    Ok(step)
}

type Noise = Result<GradientNoise, NoNoise>;

/// Calls and bytes.
fn of(counters: &Counters) -> (u64, u64) {
    let tally = counters.total();
    (tally.calls, tally.bytes)
}

/// The steps that measure find what they would find if all did; the others give their reason, and cost not a byte. Not
/// a bit of the training changes.
#[test]
fn steps_in_between_measure_nothing_and_cost_nothing() {
    const STEPS: usize = 7;
    let whole = KIND.init(&device());
    let train = |place: usize, every: u64, clips: bool| {
        launch::threads(2)
            .run(|world| {
                let (_, strategy) = &ways(every)[place];
                let mut model = own_by(&whole, strategy).parallelize(&world, strategy)?;
                let mut optim: ModuleOptimizer = SgdConfig::new().init();
                let (mut noise, mut trained, mut sent) = (Vec::new(), Vec::new(), Vec::new());
                for number in 0..STEPS {
                    let step = step(&mut model, number, clips)?;
                    let counters = &step.counters;
                    noise.push(step.noise());
                    trained.push((step.loss.item(), step.grad_norm.filter(|_| clips)));
                    sent.push([&counters.gradients, &counters.parameters, &counters.control, &counters.norm].map(of));
                    model = model.optimize(&mut optim, 0.1, step)?;
                }
                Ok((noise, trained, sent))
            })
            .unwrap()
    };
    let ways =
        ways(1).into_iter().enumerate().flat_map(|(place, (name, _))| [(place, name, true), (place, name, false)]);
    for (place, name, clips) in ways {
        let (never, always, third) = (train(place, 0, clips), train(place, 1, clips), train(place, 3, clips));
        for rank in 0..2 {
            let [never, always, third] = [&never, &always, &third].map(|run| &run[rank]);
            assert_eq!((&never.1, &always.1), (&third.1, &third.1), "{name}: another training");
            for number in 0..STEPS {
                let due = (number + 1).is_multiple_of(3);
                let expected: Noise = if due { always.0[number] } else { Err(NoNoise::Interval) };
                match clips {
                    true => assert_eq!(third.0[number], expected, "{name}, step {number}"),
                    // The norm may come with the step, or not, and be rounded in another way.
                    false => assert_eq!(third.0[number].err(), expected.err(), "{name}, step {number}"),
                }
                assert_eq!(never.0[number], Err(NoNoise::Off), "{name}");
                let free = third.2[number] == never.2[number];
                // A replica alone sends nothing for its measurement, if it takes the norm.
                let of_none = clips && name == "a split model";
                assert_eq!(free, !due || of_none, "{name}, {clips}, step {number}: {:?}", third.2[number]);
            }
        }
        assert_eq!(third[0].0, third[1].0, "{name}: the same on all ranks");
    }
}

/// A run that goes on measures in the steps in which it would have, on other ranks as well.
#[test]
fn a_run_that_goes_on_measures_in_the_same_steps() {
    let whole = KIND.init(&device());
    let dir = Dir::fresh();
    for (name, strategy) in ways(4) {
        let measured = |from: usize, to: usize| {
            launch::threads(2)
                .run(|world| {
                    let mut model = own_by(&whole, &strategy).parallelize(&world, &strategy)?;
                    let mut checkpoints = Checkpointer::new(&world, dir.join(name), CheckpointConfig::new())?;
                    if from > 0 {
                        checkpoints.restore_step(from as u64, TrainState::new(&mut model))?;
                    }
                    let mut noise = Vec::new();
                    for number in from..to {
                        noise.push(step(&mut model, number, true)?.noise());
                        if number + 1 == 2 {
                            checkpoints.save(2, TrainState::new(&mut model))?;
                        }
                    }
                    Ok(noise)
                })
                .unwrap()
        };
        let (all, rest) = (measured(0, 9), measured(2, 9));
        let due: Vec<usize> = (0..9).filter(|number| all[0][*number].is_ok()).collect();
        assert_eq!(due, [3, 7], "{name}");
        for rank in 0..2 {
            assert_eq!(all[rank][2..], rest[rank][..], "{name}");
        }
    }
}

/// Ranks with fewer batches than others count the steps of these as well.
#[test]
fn ranks_without_data_know_whose_turn_it_is() {
    let whole = KIND.init(&device());
    for (name, strategy) in ways(2).into_iter().filter(|(_, strategy)| strategy.tp == 1) {
        let found = launch::threads(2)
            .run(|world| {
                let mut model = own_by(&whole, &strategy).parallelize(&world, &strategy)?;
                let mut noise = NoiseScale::new();
                let mut steps = Vec::new();
                let batches: Vec<usize> = (0..3 + 3 * world.rank()).collect();
                for number in model.join(batches) {
                    let batch = number?.map(|number| lm::batch(number, &device()));
                    let rows = batch.iter().flat_map(|batch| [part(batch, 0..3), part(batch, 3..7)]);
                    let step = model.step_micro_batches(rows, lm::loss)?.clip_grad_norm(&model, Clip::never())?;
                    noise.add(&step);
                    steps.push(step.noise());
                }
                Ok((steps, noise))
            })
            .unwrap();
        assert_eq!(found[0], found[1], "{name}");
        let due: Vec<bool> = found[0].0.iter().map(Result::is_ok).collect();
        assert_eq!((due, found[0].1.steps()), (vec![false, true, false, true, false, true], 3), "{name}");
    }
}
