//! The training loop.

use burn::optim::AdamWConfig;
use burn::tensor::Device;
use burn_parallel::prelude::*;
use burn_parallel::train::{Clip, Parallel};

use crate::args::Args;
use crate::checkpoints::{Run, folder};
use crate::common::device;
use crate::common::figures::Figures;
use crate::common::memory::{Memory, Peak};
use crate::common::program::{Ended, unsuited};
use crate::common::progress::{Progress, finite};
use crate::common::saving::Saving;
use crate::common::usage::PipelineUsage;
use crate::data::row::batch;
use crate::data::set::BatchSize;
use crate::evaluate::held_out_loss;
use crate::generate::{Continuation, generate};
use crate::input::Input;
use crate::model::Llama;
use crate::report::{HeldOut, Outcome, Speed};
use crate::schedule::schedule;
use crate::{directory, lora};

/// Trains the model as the flags say. Every rank runs this, each replica on its rows of every batch.
pub fn run(rank: Rank, args: &Args, input: &Input) -> Result<Ended<Outcome>, Error> {
    let speaks = rank.rank() == 0;
    if speaks {
        eprintln!("{}", input.said());
        args.notes.iter().for_each(|note| eprintln!("{note}"));
    }
    let world = device::world(&rank, args.start.launch, args.start.nccl)?;
    let device = args.start.device.of(&rank, args.start.launch)?;
    let autodiff = args.autodiff(&device);

    let model = spread(&world, args, &autodiff)?;
    let (replica, replicas) = model.replica();
    let (end, steps) = (input.end(args), input.steps(args));
    let share = |rows| input.data.share(rows, replica, replicas, args.rows).map_err(Error::user);
    let first = share(input.data.batch(0, end, args.size))?;
    let model = directory::load(model, &args.model, &batch(&first[0], &autodiff)).map_err(unsuited)?;
    let optim = AdamWConfig::new().with_weight_decay(args.weight_decay as f32).with_epsilon(1e-8).init_fused();
    let mut run = Run::new(model, optim, schedule(args, steps)?, args, input);
    let (begun, opened) = run.resume(&world, args, input)?;
    let mut saving = Saving::begin(&args.saving, &world, folder, (&args.strategy, steps), opened)?;
    let mut progress = Progress::new(steps, speaks);
    let speed = Speed::new(args);
    let (mut pipeline, mut memory, mut tokens) = (PipelineUsage::default(), Memory::default(), 0);
    let wrapping = run.model.counters();

    for number in begun..steps {
        let size = match args.size {
            BatchSize::Rows(_) => BatchSize::Rows(run.batch.rows()),
            tokens => tokens,
        };
        let rows = input.data.batch(run.position(input), end, size);
        let filled = rows.clone().map(|row| input.data.filled(row)).sum::<usize>();
        let batches = share(rows.clone())?;
        let last = number + 1 == steps;
        let peak = if last { Some(Peak::begin(&world)?) } else { None };
        let mut step = run.model.step_micro_batches(batches.iter().map(|rows| batch(rows, &autodiff)), Llama::loss)?;
        if let Some(peak) = peak {
            memory.step = peak.end(&world, args.start.ranks_here(args.axes.ranks))?;
        }
        pipeline.add(&step.runs);
        // The mean over the targets of all ranks: every rank has the same, and ends here with the others.
        let loss = step.loss.item();
        finite("loss", number, loss)?;
        // Without --clip the norm is measured, and nothing clipped.
        step = step.clip_grad_norm(&run.model, args.clip.map_or(Clip::never(), Clip::at))?;
        let norm = step.grad_norm.unwrap_or(f64::NAN);
        finite("gradient norm", number, norm)?;
        if last {
            memory = Memory { step: memory.step, ..Memory::of_step(&run.model, &step.grads) };
        }
        let rate = run.schedule.step().base() * run.batch.lr_factor(args.batch());
        if args.growth.measures() {
            let grows = run.batch.after_step(&step, (rows.end - rows.start) as usize);
            grows.iter().for_each(|said| progress.note(&format!("after step {}: {said}", number + 1)));
        }
        run.model = run.model.optimize(&mut run.optim, rate, step)?;

        run.losses.push(loss);
        run.grad_norms.push(norm);
        run.advance(rows.end, input);
        tokens += filled;
        let done = number + 1;
        if let Some(set) = input.eval.as_ref().filter(|_| done == steps || due(args.eval_every, done)) {
            let loss = held_out_loss(&run.model, set, args.rows, &device)?;
            run.held_out.push(HeldOut { step: done, loss });
        }
        let counters = run.model.counters() - wrapping.clone();
        progress.step(number, filled, |elapsed| {
            let held_out = run.held_out.last().filter(|last| last.step == done);
            let held_out = held_out.map_or(String::new(), |last| format!(", held-out {:.4}", last.loss));
            let speed = speed.said(tokens, elapsed, counters.waited, &pipeline);
            [format!("loss {loss:.4}{held_out}, lr {rate:.2e}, norm {norm:.3}"), speed]
        });
        if let Some(signal) = saving.after_step(done, |checkpoints| run.save(done, checkpoints))? {
            return Ok(Ended::Stopped(signal));
        }
    }
    // With nothing to do there is still the file to be asked about that is given now: another than was saved, maybe.
    if let Some(set) = input.eval.as_ref().filter(|_| begun == steps) {
        let loss = held_out_loss(&run.model, set, args.rows, &device)?;
        run.held_out.retain(|before| before.step != steps);
        run.held_out.push(HeldOut { step: steps, loss });
    }
    saving.end()?;
    let (elapsed, seconds, counters) = (progress.elapsed(), progress.seconds(), run.model.counters() - wrapping);
    let (pipeline, memory) = (pipeline.of(&args.strategy)?, memory.with_optimizer(&run.optim)?);
    write(&run.model, &world, args)?;
    let sample = sample(&run.model, args, input, &device)?;
    let Run { losses, grad_norms, held_out, batch, .. } = run;
    let steps = steps.saturating_sub(begun);
    let figures = Figures { steps, losses, grad_norms, tokens, elapsed, seconds, counters, pipeline, memory };
    Ok(Ended::Complete(Outcome { figures, parameters: input.parameters, held_out, sample, batch }))
}

/// The model, without weights yet, spread over the ranks.
pub fn spread(world: &Communicator, args: &Args, device: &Device) -> Result<Parallel<Llama>, Error> {
    adapted(args, device)?.parallelize(world, &args.strategy).map_err(unsuited)
}

/// The model, without weights yet, with its adapters if it has any.
pub fn adapted(args: &Args, device: &Device) -> Result<Llama, Error> {
    let model = directory::unfilled(args.config.init(device));
    match &args.lora {
        Some(config) => lora::adapt(model, config).map_err(Error::user),
        None => Ok(model),
    }
}

/// Writes what the run was for.
fn write(model: &Parallel<Llama>, world: &Communicator, args: &Args) -> Result<(), Error> {
    let Some(dir) = &args.saving.save else { return Ok(()) };
    let whole = dir.join("model");
    directory::save(model, world, (&args.model, &whole), args.lora.as_ref().map(|lora| lora.alpha))?;
    if let Some(config) = &args.lora {
        lora::save(model, world, (&args.model, &dir.join("adapter")), config)?;
    }
    Ok(())
}

/// The text of `--generate`: the prompt and what the model adds.
fn sample(model: &Parallel<Llama>, args: &Args, input: &Input, device: &Device) -> Result<Option<String>, Error> {
    let (Some(prompt), Some(tokens)) = (&args.prompt, &input.prompt) else { return Ok(None) };
    let continuation = Continuation {
        length: prompt.length,
        longest: args.config.positions,
        ends: input.reading.tokenizer.ends().to_vec(),
        temperature: prompt.temperature,
        seed: args.seed,
        rows: args.in_pipeline(),
    };
    let added = generate(model, device, tokens, &continuation)?;
    let whole = [tokens.as_slice(), &added].concat();
    input.reading.tokenizer.decode(&whole).map(Some).map_err(Error::user)
}

fn due(every: Option<usize>, done: usize) -> bool {
    every.is_some_and(|every| done.is_multiple_of(every))
}
