//! One model under every strategy, on two ranks: what each holds, what it sends, how long a step takes.

use std::fmt::Write as _;
use std::time::Instant;

use burn::module::Module;
use burn_parallel::batch::RankMemory;
use burn_parallel::comm::Tally;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::{Clip, Engine};

use crate::common::memory::{Memory, Peak};
use crate::text::tensors;
use crate::training::{Sizes, loss, model, optimizer, settings};

const ROWS: usize = 16;
/// Steps of a round.
const STEPS: usize = 4;

/// What the first rank saw.
struct Seen {
    /// What it holds, and what a step needs beside that, on average of the ranks.
    memory: Memory,
    /// What a step is known to need before it has run.
    known: usize,
    sent: u64,
    calls: u64,
    idle: Option<f64>,
    seconds: f64,
}

/// What is measured: its name, the strategy, the replicas that share the batch, and whether the norm is taken.
type Row = (&'static str, Option<Strategy>, usize, bool);

fn all() -> Vec<Row> {
    let zero = |sharding| Strategy::new().with_data(DataParallelConfig::new().with_sharding(sharding));
    let pipeline = PipelineConfig::new(4);
    let noise = DataParallelConfig::new().with_noise_scale_every(1);
    vec![
        ("two that do not talk", None, 2, false),
        ("data parallelism", Some(Strategy::new()), 2, false),
        ("the same, with the norm", Some(Strategy::new()), 2, true),
        ("the same, with norm and noise", Some(Strategy::new().with_data(noise)), 2, true),
        ("data parallelism, captured", Some(Strategy::new().with_engine(Engine::Captured)), 2, false),
        ("ZeRO 1", Some(zero(Sharding::Optimizer)), 2, false),
        ("ZeRO 2", Some(zero(Sharding::Gradients)), 2, false),
        ("ZeRO 3, captured", Some(zero(Sharding::Parameters)), 2, false),
        ("tensor parallelism, captured", Some(Strategy::new().with_tp(2, Plan::megatron())), 1, false),
        ("pipeline, 1F1B, 4 micro-batches, captured", Some(Strategy::new().with_pp(2, pipeline)), 1, false),
    ]
}

/// A table of all strategies, whose times are those of steps that take turns.
pub fn measure(sizes: &Sizes) -> Result<String, Error> {
    let strategies = all();
    let mut seen: Vec<Vec<Seen>> = strategies.iter().map(|_| Vec::new()).collect();
    for _ in 0..sizes.rounds {
        for ((_, strategy, replicas, norm), seen) in strategies.iter().zip(&mut seen) {
            seen.push(steps(sizes, strategy.as_ref(), *replicas, *norm)?);
        }
    }
    let mut table = String::from(
        "| two ranks | parameters | gradients | optimizer | more at the peak of a step | known before | sent and received a step | calls \
         | step, over two that do not talk (least to most) | idle |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for (place, (name, ..)) in strategies.iter().enumerate() {
        let Seen { memory, known, sent, calls, idle, .. } = &seen[place][0];
        let Memory { parameters, gradients, optimizer, step } = memory;
        let mut ratios: Vec<f64> =
            seen[place].iter().zip(&seen[0]).map(|(mine, alone)| mine.seconds / alone.seconds).collect();
        ratios.sort_by(f64::total_cmp);
        let [least, median, most] = [ratios[0], ratios[ratios.len() / 2], ratios[ratios.len() - 1]];
        let idle = idle.map_or("-".into(), |idle| format!("{:.0} %", 100.0 * idle));
        let _ = writeln!(
            table,
            "| {name} | {parameters} | {gradients} | {optimizer} | {step} | {known} | {sent} | {calls} | {median:.2} ({least:.2} to {most:.2}) | {idle} |"
        );
    }
    let parameters = model(sizes.wide, sizes.seq, 0).num_params();
    let [width, layers] = sizes.wide;
    let _ = writeln!(
        table,
        "\n{parameters} parameters: {layers} layers of width {width}; {ROWS} rows of {} tokens a step; medians of {} rounds",
        sizes.seq, sizes.rounds
    );
    Ok(table)
}

/// Some steps on two ranks, after two that make ready. Without a strategy each rank trains by itself.
fn steps(sizes: &Sizes, strategy: Option<&Strategy>, replicas: usize, norm: bool) -> Result<Seen, Error> {
    let whole = model(sizes.wide, sizes.seq, 0);
    let bytes: Vec<u8> = (0..ROWS * (sizes.seq + 1)).map(|place| (place * 7919 % 251) as u8).collect();
    let rows: Vec<&[u8]> = bytes.chunks(sizes.seq + 1).collect();
    let mut seen = launch::threads(2).run(|rank| {
        let device = rank.device().autodiff();
        let alone = rank.split(rank.rank() as u64, 0)?;
        let group = if strategy.is_some() { &*rank } else { &alone };
        let strategy = strategy.cloned().unwrap_or_default();
        let mut model = whole.clone().fork(&device).parallelize(group, &strategy)?;
        let settings = settings(ROWS)?;
        let mut optim = optimizer(settings);
        let share = ROWS / replicas;
        let start = if replicas == 2 { rank.rank() * share } else { 0 };
        let batch = || tensors(&rows[start..start + share], &device);
        let known = RankMemory::of(&mut model, 2, batch(), loss)?.step;
        let known = rank.all_reduce(vec![known as u64], ReduceOp::Sum)?[0] as usize / 2;
        let (mut memory, mut idle) = (Memory::default(), Vec::new());
        let (mut began, mut before) = (Instant::now(), model.counters());
        for number in 0..STEPS + 2 {
            if number == 2 {
                rank.barrier()?;
                (began, before) = (Instant::now(), model.counters());
            }
            let peak = if number == 1 { Some(Peak::begin(&rank)?) } else { None };
            let mut step = model.step(batch(), loss)?;
            let most = peak.map_or(Ok(0), |peak| peak.end(&rank, 2))?;
            if norm {
                step = step.clip_grad_norm(&model, Clip::never())?;
            }
            if number >= 2 {
                idle.extend(step.runs.iter().map(|run| run.idle_share));
            }
            if number == 1 {
                memory = Memory { step: most, ..Memory::of_step(&model, &step.grads) };
            }
            model = model.optimize(&mut optim, settings.lr, step)?;
        }
        rank.barrier()?;
        let seconds = began.elapsed().as_secs_f64() / STEPS as f64;
        let memory = memory.with_optimizer(&optim)?;
        let Tally { bytes, calls, .. } = (model.counters() - before).total().total();
        let idle = (!idle.is_empty()).then(|| idle.iter().sum::<f64>() / idle.len() as f64);
        Ok(Seen { memory, known, sent: bytes / STEPS as u64, calls: calls / STEPS as u64, idle, seconds })
    })?;
    Ok(seen.swap_remove(0))
}
