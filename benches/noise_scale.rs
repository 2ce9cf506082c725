//! What it costs to measure the noise of the gradient, in processor time of all ranks.
//!
//! Steps of the GPT that measure nothing, the norm of the gradient, norm and noise, and these two in every fourth step
//! alone take turns, one at a time and in changing order: whatever else runs slows all of them down alike. A round is
//! four steps of each, so that one of the fourth kind measures. What counts is the median over the rounds of the ratio
//! within a round, and the spread of its middle half. Unix only.
//!
//! Each kind has a model of its own, whose memory lies elsewhere: two that measure nothing differ by up to a percent as
//! well. So of the fourth kind the steps of one model are compared too: all four of a round with the three in between.
//!
//! `cargo bench --bench noise_scale -- [ROUNDS]`

mod figures;
#[allow(dead_code)]
mod models;

use burn::module::Module;
use burn::optim::{AdamConfig, ModuleOptimizer};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_parallel::batch::NoNoise;
use burn_parallel::prelude::*;
use burn_parallel::train::{Clip, Engine};
use figures::{Figures, clock};
use models::{Gpt, SEQUENCE, VOCABULARY};

/// Rows of a step over all ranks.
const ROWS: usize = 8;

/// The steps of a round, of which one measures norm and noise in the last of [`MEASURES`].
const CYCLE: usize = 4;

/// What is measured: the norm in every step, or where the noise is; and the noise after how many steps, if it is.
#[derive(Clone, Copy)]
struct Measure {
    norm: bool,
    noise_every: usize,
}

const NOTHING: Measure = Measure { norm: false, noise_every: 0 };
const MEASURES: [Measure; 4] = [
    NOTHING,
    Measure { norm: true, ..NOTHING },
    Measure { noise_every: 1, ..NOTHING },
    Measure { noise_every: CYCLE, ..NOTHING },
];

/// What is compared: its name, and the places of both in [`MEASURES`].
const COMPARED: [(&str, usize, usize); 4] = [
    ("norm over nothing", 1, 0),
    ("norm and noise over norm", 2, 1),
    ("norm and noise over nothing", 2, 0),
    ("norm and noise in every 4th step over nothing", 3, 0),
];

/// A way to train: its name, the ranks, the strategy, and the micro-batches of each replica.
type Way = (&'static str, usize, Strategy, usize);

fn ways() -> [Way; 4] {
    let zero_3 = DataParallelConfig::new().with_sharding(Sharding::Parameters);
    [
        ("dp 2, eager", 2, Strategy::new().with_dp(2), 1),
        ("one rank, eager, 4 micro-batches", 1, Strategy::new(), 4),
        ("tp 2, captured, 2 micro-batches", 2, Strategy::new().with_tp(2, Plan::megatron()), 2),
        ("dp 2, ZeRO 3, captured", 2, Strategy::new().with_dp(2).with_data(zero_3).with_engine(Engine::Captured), 1),
    ]
}

fn rows(number: usize, salt: usize) -> Tensor<2, Int> {
    let values: Vec<i64> = (0..number * SEQUENCE).map(|i| ((i * 7919 + salt) % VOCABULARY) as i64).collect();
    Tensor::from_data(TensorData::new(values, [number, SEQUENCE]), &Device::flex().autodiff())
}

/// Seconds of the processors for each step of a round, with each of [`MEASURES`].
type Round = [[f64; CYCLE]; MEASURES.len()];

fn mean(times: &[f64]) -> f64 {
    times.iter().sum::<f64>() / times.len() as f64
}

fn rounds(number: usize, model: &Gpt, (_, ranks, strategy, micro_batches): &Way) -> Result<Vec<Round>, Error> {
    let mut seen = launch::threads(*ranks).run(|rank| {
        let mut models: Vec<(_, ModuleOptimizer)> = Vec::new();
        for measure in MEASURES {
            let data = strategy.data.clone().with_noise_scale_every(measure.noise_every as u64);
            let strategy = strategy.clone().with_data(data);
            let model = model.clone().fork(&rank.device().autodiff()).parallelize(&rank, &strategy)?;
            models.push((Some(model), AdamConfig::new().init()));
        }
        let mut times = Vec::new();
        for round in 0..number + 1 {
            let mut time = Round::default();
            for turn in 0..CYCLE * MEASURES.len() {
                let (done, mode) = (turn / MEASURES.len(), (turn + round) % MEASURES.len());
                let Measure { norm, noise_every } = MEASURES[mode];
                let (place, optim) = &mut models[mode];
                let Some(mut taken) = place.take() else { continue };
                let replicas = taken.mesh().axis("dp")?.size();
                let each = ROWS / replicas / micro_batches;
                let batches = (0..*micro_batches).map(|batch| (rows(each, 1 + batch), rows(each, 104_729 + batch)));
                rank.barrier()?;
                let before = clock::of_process();
                let mut step = taken.step_micro_batches(batches, |model: &Gpt, (x, y)| model.loss_sum(x, y))?;
                let due = step.noise() == Err(NoNoise::NoNorm);
                if norm || due {
                    step = step.clip_grad_norm(&taken, Clip::never())?;
                }
                if noise_every > 0 && (done + 1).is_multiple_of(noise_every) {
                    step.noise().map_err(|why| Error::user(why.to_string()))?;
                } else if due {
                    return Err(Error::user("a step has measured that was not to"));
                }
                *place = Some(taken.optimize(optim, 1e-4, step)?);
                rank.barrier()?;
                time[mode][done] = clock::of_process() - before;
            }
            // The first round is for caches, captures and the order of buckets.
            if round > 0 {
                times.push(time);
            }
        }
        Ok(times)
    })?;
    Ok(seen.swap_remove(0))
}

/// The lower quartile, the median and the upper quartile.
fn quartiles(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| values[(values.len() - 1) * quarter / 4])
}

fn main() -> Result<(), Error> {
    let (arguments, mut figures) = (figures::arguments(), Figures::of("noise_scale"));
    let number = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(8).max(1);
    let model = Gpt::new(&Device::flex().autodiff()).materialize();
    for way in ways() {
        let times = rounds(number, &model, &way)?;
        let [_, step, _] = quartiles(times.iter().map(|time| mean(&time[0])));
        println!("{}: {:.0} ms of the processors a step", way.0, 1e3 * step);
        figures.note(format!("{}: processors", way.0), 1e3 * step, "ms");
        let mut told = |what: &str, pairs: Vec<[f64; 2]>| {
            let [low, median, high] = quartiles(pairs.iter().map(|[of, over]| 100.0 * (of / over - 1.0)));
            let extra = 1e3 * quartiles(pairs.iter().map(|[of, over]| of - over))[1];
            println!("  {what}: {median:+.2} % ({low:+.2} to {high:+.2}), {extra:+.2} ms");
            figures.note(format!("{}: {what}", way.0), 1.0 + median / 100.0, "ratio");
        };
        for (what, of, over) in COMPARED {
            told(what, times.iter().map(|time| [mean(&time[of]), mean(&time[over])]).collect());
        }
        // The last of each round measures.
        let of_one = |time: &Round| [mean(&time[3]), mean(&time[3][..CYCLE - 1])];
        told("the same, over the steps in between of that model", times.iter().map(of_one).collect());
    }
    figures.finish();
    Ok(())
}
