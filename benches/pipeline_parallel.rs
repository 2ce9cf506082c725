//! A pipeline of two stages against one rank alone and against two ranks that do not talk to each other.
//!
//! The three take turns within one run, round by round, and what counts is the median over rounds of their ratio: a
//! machine that is slower for a while is slower for all of them. One rank alone and the independent ranks run the same
//! captured step in the same micro-batches. Two stages of equal cost with `m` micro-batches can at best be `2m / (m +
//! 1)` times as fast as one rank; the efficiency is the part of that which is reached, after what two independent ranks
//! lose on the same machine.
//!
//! `cargo bench --bench pipeline_parallel -- [ROUNDS] [measured]`; with `measured` the model is cut by measured costs
//! of operations, else by counted ones.

mod figures;
#[allow(dead_code)]
mod models;

use std::time::Instant;

use burn::module::Module;
use burn::optim::{AdamConfig, ModuleOptimizer};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_parallel::pipeline_parallel::Pipelined;
use burn_parallel::prelude::*;
use figures::{Figures, median};
use models::{Gpt, SEQUENCE, VOCABULARY};

const STEPS_PER_TURN: usize = 2;

const ROWS: usize = 8;

fn batch() -> (Tensor<2, Int>, Tensor<2, Int>) {
    let numbers = |salt: usize| {
        let values: Vec<i64> = (0..ROWS * SEQUENCE).map(|i| ((i * 7919 + salt) % VOCABULARY) as i64).collect();
        Tensor::<2, Int>::from_data(TensorData::new(values, [ROWS, SEQUENCE]), &Device::flex())
    };
    (numbers(1), numbers(104_729))
}

/// A model in training.
struct Training {
    model: Option<Pipelined<Gpt>>,
    optimizer: ModuleOptimizer,
}

impl Training {
    fn new(model: &Gpt, group: &Communicator, device: &Device, config: &PipelineConfig) -> Result<Self, Error> {
        let mut model = model.clone().fork(device).pipeline_parallel(group, config.clone())?;
        model.prepare(batch(), |model, (tokens, targets)| model.loss_sum(tokens, targets))?;
        Ok(Self { model: Some(model), optimizer: AdamConfig::new().init() })
    }

    /// Idle share, host seconds an action, seconds in passes.
    fn step(&mut self) -> Result<[f64; 3], Error> {
        let Some(mut model) = self.model.take() else { return Ok([0.0; 3]) };
        let step = model.step(batch(), |model, (tokens, targets)| model.loss_sum(tokens, targets))?;
        // Host time of the executor for each action: what is neither a pass nor waiting.
        let run = &step.runs[0];
        let host = run.elapsed.saturating_sub(run.busy).saturating_sub(run.waited).as_secs_f64() / run.actions as f64;
        let busy = run.busy.as_secs_f64();
        self.model = Some(self.optimizer.step(1e-4, model, step.grads));
        Ok([run.idle_share, host, busy])
    }
}

/// Seconds a step of one rank alone, of two independent ranks and of two stages; the idle share; host seconds an
/// action; seconds in passes of each rank.
fn rounds(rounds: usize, model: &Gpt, schedule: &Schedule, micro_batches: usize, measured: bool) -> Vec<[f64; 7]> {
    let times = launch::threads(2).run(|rank| {
        let device = rank.device().autodiff();
        let alone = rank.split(rank.rank() as u64, 0)?;
        let config = PipelineConfig::new(micro_batches);
        let mut single = Training::new(model, &alone, &device, &config.clone().with_schedule(Schedule::GPipe))?;
        let mut config = config.with_schedule(schedule.clone());
        if measured {
            let uncut = model.clone().pipeline_parallel(&rank, config.clone())?;
            let costs = match rank.rank() {
                0 => uncut.measure(batch(), |model, (tokens, targets)| model.loss_sum(tokens, targets), 3)?,
                _ => Vec::new(),
            };
            let count = rank.broadcast(vec![costs.len() as u64], 0)?[0] as usize;
            config = config
                .with_cut(Cut::Measured(rank.broadcast(if costs.is_empty() { vec![0.0; count] } else { costs }, 0)?));
        }
        let mut stages = Training::new(model, &rank, &device, &config)?;
        if rank.rank() == 0
            && let Some(report) = stages.model.as_ref().and_then(|model| model.report().cut)
        {
            eprint!("{report}");
        }
        let mut times = Vec::new();
        for round in 0..rounds + 1 {
            let mut time = [0.0; 6];
            for mode in 0..3 {
                rank.barrier()?;
                let began = Instant::now();
                for _ in 0..STEPS_PER_TURN {
                    match mode {
                        0 if rank.rank() > 0 => {}
                        0 | 1 => drop(single.step()?),
                        _ => [time[3], time[4], time[5]] = stages.step()?,
                    }
                }
                time[mode] = began.elapsed().as_secs_f64() / STEPS_PER_TURN as f64;
            }
            let slowest = rank.all_reduce(time[..5].to_vec(), ReduceOp::Max)?;
            let busy = rank.all_gather(vec![time[5]])?;
            // The first round is for caches and lazy initialisation.
            if round > 0 {
                times.push([slowest[0], slowest[1], slowest[2], slowest[3], slowest[4], busy[0], busy[1]]);
            }
        }
        Ok(times)
    });
    times.expect("a world of threads").swap_remove(0)
}

fn main() {
    let (arguments, mut figures) = (figures::arguments(), Figures::of("pipeline_parallel"));
    let number = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(9);
    let measured = arguments.iter().any(|argument| argument == "measured");
    let model = Gpt::new(&Device::flex().autodiff()).materialize();
    for micro_batches in [4, 8] {
        let schedules = [
            Schedule::GPipe,
            Schedule::OneForwardOneBackward,
            Schedule::Interleaved { stages_per_rank: 2 },
            Schedule::ZeroBubbleH1,
        ];
        for schedule in schedules {
            let times = rounds(number, &model, &schedule, micro_batches, measured);
            let of = |mode: usize| median(times.iter().map(|time| time[mode]));
            let over = |a: usize, b: usize| median(times.iter().map(|time| time[a] / time[b]));
            let m = micro_batches as f64;
            let name = format!("{schedule:?}, m = {micro_batches}");
            println!(
                "{name}: one rank {:.1} ms, two independent {:.1} ms, two stages {:.1} ms a step",
                1e3 * of(0),
                1e3 * of(1),
                1e3 * of(2)
            );
            println!(
                "{name}: speed-up {:.3} over one rank (ideal of a fill-drain pipeline {:.3}); efficiency after what \
                 independent ranks lose {:.3}; idle {:.3}; in passes {:.1} and {:.1} ms; host time {:.1} us an action",
                over(0, 2),
                2.0 * m / (m + 1.0),
                over(1, 2) / 2.0 * (m + 1.0) / m,
                of(3),
                1e3 * of(5),
                1e3 * of(6),
                1e6 * of(4)
            );
            let name = format!("{name}, {}", if measured { "measured" } else { "counted" });
            for (way, mode) in [("one rank", 0), ("two independent", 1), ("two stages", 2)] {
                figures.note(format!("{name}: {way}"), 1e3 * of(mode), "ms");
            }
            figures.note(format!("{name}: two stages over one rank"), over(2, 0), "ratio");
            figures.note(format!("{name}: efficiency"), over(1, 2) / 2.0 * (m + 1.0) / m, "ratio");
            figures.note(format!("{name}: idle"), of(3), "ratio");
            figures.note(format!("{name}: host time of an action"), 1e6 * of(4), "us");
        }
    }
    figures.finish();
}
