//! The training loop.

use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::lr_scheduler::sequential::SequentialLrSchedulerConfig;
use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::tensor::{Int, Tensor};
use burn_parallel::pipeline_parallel::schedule::{Costs, Routes, StageCosts};
use burn_parallel::prelude::*;
use burn_parallel::train::{GraphEngine, Replicas};

use crate::args::Args;
use crate::device;
use crate::gpt::Gpt;
use crate::report::{Outcome, Pipeline, Progress, Trained};
use crate::text::{Text, tensors};

/// Trains the model on a text as the flags say. Every rank runs this, each replica on its rows of every batch.
pub fn train(rank: Rank, model: Gpt, args: &Args, text: &Text) -> Result<Outcome, Error> {
    if rank.rank() == 0 {
        let (learned, held_out) = text.split();
        eprintln!("{learned} bytes to learn from, {held_out} held out");
    }
    let world = device::world(&rank, args.start.launch, args.start.nccl)?;
    let mesh = Mesh::new(&world, [("dp", args.dp), ("pp", args.pp), ("tp", args.tp)])?;
    let (dp, pp, tp) = (mesh.axis("dp")?, mesh.axis("pp")?, mesh.axis("tp")?);
    let device = args.device.of(&rank, args.start.launch)?.autodiff();
    let model = model.fork(&device).tensor_parallel(&tp, &Plan::megatron())?;
    if args.pp == 1 {
        let model = model.data_parallel(&dp, DataParallelConfig::new())?;
        let wrapping = model.counters();
        let (model, outcome) = run(&rank, &dp, model, args, text, |_| {})?;
        return Ok(Outcome { splitting: model.counters() - wrapping, ..outcome.of(model.assemble()?) });
    }

    let config = PipelineConfig::new(args.micro_batches).with_schedule(args.schedule.clone());
    let mut model = model.pipeline_parallel(&pp, config)?;
    let rows = text.rows(args.seed, 0, args.batch, dp.rank(), dp.size());
    model.prepare(tensors(&rows, &device), loss)?;
    let model = model.data_parallel(&dp, DataParallelConfig::new())?;
    let wrapping = model.counters();
    let mut pipeline = Pipeline::default();
    let (model, outcome) = run(&rank, &dp, model, args, text, |model| pipeline.add(model.last_run()))?;
    let timetable = model.timetable();
    let chain = Routes::chain(timetable.stages());
    pipeline.bound = timetable.simulate(&chain, &Costs::uniform(StageCosts::default()))?.idle_share();
    Ok(Outcome { splitting: model.counters() - wrapping, pipeline: Some(pipeline), ..outcome.of(model.assemble()?) })
}

/// The summed loss of some rows, and the number of their tokens.
fn loss(model: &Gpt, (tokens, targets): (Tensor<2, Int>, Tensor<2, Int>)) -> TokenLoss {
    let (nats, count) = model.loss_sum(tokens, targets);
    TokenLoss::of(nats, count)
}

/// The training loop, whatever the model is spread over; `after` sees the model after each step.
fn run<E: GraphEngine<Model = Gpt>>(
    rank: &Rank,
    dp: &Communicator,
    mut model: Replicas<E>,
    args: &Args,
    text: &Text,
    mut after: impl FnMut(&E),
) -> Result<(Replicas<E>, Trained), Error> {
    let device = args.device.of(rank, args.start.launch)?.autodiff();
    let mut optim = AdamWConfig::new().with_beta_2(0.99).with_epsilon(1e-8).with_weight_decay(0.1).init();
    let mut schedule = schedule(args)?;
    let mut progress = Progress::new(args.steps, rank.rank() == 0);
    let mut losses = Vec::with_capacity(args.steps);

    for number in 0..args.steps {
        let rows = text.rows(args.seed, number, args.batch, dp.rank(), dp.size());
        let micro_batches = rows.chunks(args.micro_batch).map(|rows| tensors(rows, &device));
        let step = model.step_micro_batches(micro_batches, loss)?;
        after(&model);
        // The mean over the tokens of all ranks: every rank has the same, and ends here with the others.
        if !step.loss.is_finite() {
            let problem = format!("the loss of step {} is {}: a lower --lr may help", number + 1, step.loss);
            return Err(Error::user(problem));
        }
        model = optim.step(schedule.step(), model, step.grads);

        losses.push(step.loss);
        progress.step(number, step.loss, args.batch * args.seq, model.averaging().waited);
    }
    let tokens = args.steps * args.batch * args.seq;
    let trained = Trained { losses, tokens, elapsed: progress.elapsed(), averaging: model.averaging() };
    Ok((model, trained))
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
