//! The training loop.

use std::ops::Range;
use std::time::Duration;

use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::lr_scheduler::sequential::SequentialLrSchedulerConfig;
use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::tensor::{Int, Tensor};
use burn_parallel::batch::{BatchSplit, NoNoise};
use burn_parallel::prelude::*;
use burn_parallel::train::Clip;

use crate::args::Args;
use crate::checkpoints::{Run, SavedFlags, folder};
use crate::common::batch::Batch;
use crate::common::device;
use crate::common::figures::Figures;
use crate::common::memory::{Memory, Peak};
use crate::common::mesh;
use crate::common::program::{Ended, unsuited};
use crate::common::progress::{Progress, finite};
use crate::common::resume::run_names;
use crate::common::saving::Saving;
use crate::common::usage::PipelineUsage;
use crate::gpt::Gpt;
use crate::report::Outcome;
use crate::text::{Text, tensors};

/// Trains the model on a text as the flags say. Every rank runs this, each replica on its rows of every batch.
pub fn train(rank: Rank, model: Gpt, args: &Args, text: &Text) -> Result<Ended<Outcome>, Error> {
    if rank.rank() == 0 {
        let (learned, held_out) = text.split();
        eprintln!("{learned} bytes to learn from, {held_out} held out");
        args.note.iter().for_each(|note| eprintln!("{note}"));
    }
    let world = device::world(&rank, args.start.launch, args.start.nccl)?;
    let device = mesh::autodiff(&args.strategy, args.start.device.of(&rank, args.start.launch)?);
    let mut model = model.fork(&device).parallelize(&world, &args.strategy).map_err(unsuited)?;
    let (replica, replicas) = model.replica();
    let batch = |number: usize, split: &BatchSplit| {
        let rows = text.rows(args.seed, number, split.rows(), replica, replicas);
        let first = split.replica(replica).start;
        let part = |part: Range<usize>| tensors(&rows[part.start - first..part.end - first], &device);
        split.micro_batches(replica).into_iter().map(part).collect::<Vec<_>>()
    };
    // Which rank holds what must be known before anything is restored.
    let begin = |size: Batch| size.begin(args.batch, args.growth, args.steps);
    let size = begin(Batch::default())?;
    model.prepare(batch(0, &args.split(&size)?).swap_remove(0), loss).map_err(unsuited)?;
    let optim = AdamWConfig::new().with_beta_2(0.99).with_epsilon(1e-8).with_weight_decay(0.1).init_fused();
    let (schedule, flags) = (schedule(args)?, SavedFlags::of(args, text));
    let (losses, grad_norms) = (Vec::new(), Vec::new());
    let (steps, names) = (args.steps, run_names());
    let mut run = Run { model, optim, schedule, flags, losses, grad_norms, batch: size, steps, run: names };
    let (first, opened) = run.resume(&world, args)?;
    run.batch = begin(run.batch)?;
    let mut saving = Saving::begin(&args.saving, &world, folder, (&args.strategy, args.steps), opened)?;
    let mut progress = Progress::new(args.steps, rank.rank() == 0);
    let mut pipeline = PipelineUsage::default();
    let mut memory = Memory::default();
    let wrapping = run.model.counters();

    let mut tokens = 0;
    for number in first..args.steps {
        let rows = run.batch.rows();
        let last = number + 1 == args.steps;
        let peak = if last { Some(Peak::begin(&world)?) } else { None };
        let mut step = run.model.step_micro_batches(batch(number, &args.split(&run.batch)?), loss)?;
        if let Some(peak) = peak {
            memory.step = peak.end(&world, args.start.ranks_here(args.axes.ranks))?;
        }
        pipeline.add(&step.runs);
        // The mean over the tokens of all ranks: every rank has the same, and ends here with the others.
        let loss = step.loss.item();
        finite("loss", number, loss)?;
        if let Some(max) = args.clip {
            step = step.clip_grad_norm(&run.model, max)?;
            finite("gradient norm", number, step.grad_norm.unwrap_or(f64::NAN))?;
            run.grad_norms.extend(step.grad_norm);
        } else if args.growth.measures() && step.noise() == Err(NoNoise::NoNorm) {
            // In the steps that measure the noise, which it completes; others have no use for it.
            step = step.clip_grad_norm(&run.model, Clip::never())?;
        }
        let factor = run.batch.lr_factor(args.batch);
        if args.growth.measures() {
            let grows = run.batch.after_step(&step, rows);
            grows.iter().for_each(|said| progress.note(&format!("after step {}: {said}", number + 1)));
        }
        if last {
            memory = Memory { step: memory.step, ..Memory::of_step(&run.model, &step.grads) };
        }
        let lr = run.schedule.step().base() * factor;
        run.model = run.model.optimize(&mut run.optim, lr, step)?;

        run.losses.push(loss);
        tokens += rows * args.seq;
        let waited = run.model.counters().waited;
        let learned = |elapsed| [format!("loss {loss:.4}"), waits(args.axes.dp, waited, elapsed)];
        progress.step(number, rows * args.seq, learned);
        if let Some(signal) = saving.after_step(number + 1, |checkpoints| run.save(number + 1, checkpoints))? {
            return Ok(Ended::Stopped(signal));
        }
    }
    saving.end()?;
    let Run { model, optim, losses, grad_norms, batch, .. } = run;
    let (elapsed, seconds, counters) = (progress.elapsed(), progress.seconds(), model.counters() - wrapping);
    let steps = args.steps.saturating_sub(first);
    let pipeline = pipeline.of(&args.strategy)?;
    let memory = memory.with_optimizer(&optim)?;
    let figures = Figures { steps, losses, grad_norms, tokens, elapsed, seconds, counters, pipeline, memory };
    Ok(Ended::Complete(Outcome { model: model.assemble()?, figures, batch }))
}

/// The summed loss of some rows, over their tokens.
pub fn loss(model: &Gpt, (tokens, targets): (Tensor<2, Int>, Tensor<2, Int>)) -> Loss {
    let (nats, count) = model.loss_sum(tokens, targets);
    Loss::sum(nats, count)
}

/// The learning rate of each step: up to `--lr` in a tenth of the steps, then down to a tenth of it along a cosine.
fn schedule(args: &Args) -> Result<ModuleLrScheduler, Error> {
    let warm_up = (args.steps / 10).clamp(1, 100);
    let up = LinearLrSchedulerConfig::new(args.lr / warm_up as f64, args.lr, warm_up);
    let down =
        CosineAnnealingLrSchedulerConfig::new(args.lr, (args.steps - warm_up).max(1)).with_min_lr(args.lr / 10.0);
    SequentialLrSchedulerConfig::new(vec![up.into(), down.into()], vec![warm_up]).init().map_err(Error::user)
}

/// The mean loss on rows that were held out, in nats per byte.
pub fn held_out_loss(model: &Gpt, text: &Text) -> Option<f64> {
    let model = model.valid();
    let device = model.devices().remove(0);
    let (mut nats, mut tokens) = (0.0, 0);
    for rows in text.held_out(64).chunks(8) {
        let (inputs, targets) = tensors(rows, &device);
        let (loss, count) = model.loss_sum(inputs, targets);
        nats += loss.into_scalar::<f64>();
        tokens += count;
    }
    (tokens > 0).then(|| nats / tokens as f64)
}

/// The share of the time in which replicas have waited for gradients and gathers. Nothing of ranks that share a model:
/// what these exchange is a part of their steps.
fn waits(replicas: usize, waited: Duration, elapsed: Duration) -> String {
    let share = 100.0 * waited.as_secs_f64() / elapsed.as_secs_f64();
    if replicas == 1 { String::new() } else { format!("{share:.1} % waiting for gradients") }
}
