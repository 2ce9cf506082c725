//! The training loop.

use std::error::Error;
use std::time::Duration;

use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::lr_scheduler::sequential::SequentialLrSchedulerConfig;
use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams};
use burn::tensor::Device;

use crate::args::Args;
use crate::gpt::Gpt;
use crate::report::{Outcome, Progress};
use crate::sample::{generate, readable};
use crate::text::{Text, tensors};

/// Trains the model on a text as the flags say.
pub fn train(mut model: Gpt, device: &Device, args: &Args, text: &Text) -> Result<Outcome, Box<dyn Error>> {
    let mut optimizer = AdamWConfig::new().with_beta_2(0.99).with_epsilon(1e-8).with_weight_decay(0.1).init();
    let mut schedule = schedule(args)?;
    let mut progress = Progress::new(args.steps, true);
    let mut losses = Vec::with_capacity(args.steps);
    let tokens = args.batch * args.seq;

    for step in 0..args.steps {
        let mut nats = 0.0;
        let mut grads = GradientsAccumulator::new();
        for rows in text.rows(args.seed, step, args.batch, 0, 1).chunks(args.micro_batch) {
            let (inputs, targets) = tensors(rows, device);
            let (loss, _) = model.loss_sum(inputs, targets);
            nats += loss.clone().into_scalar::<f64>();
            // A sum over the micro-batches of sums over tokens, divided once: the mean over all tokens.
            let gradients = loss.div_scalar(tokens as f64).backward();
            grads.accumulate(&model, GradientsParams::from_grads(gradients, &model));
        }
        model = optimizer.step(schedule.step(), model, grads.grads());

        let loss = nats / tokens as f64;
        if !loss.is_finite() {
            return Err(format!("the loss of step {} is {loss}: a lower --lr may help", step + 1).into());
        }
        losses.push(loss);
        progress.step(step, loss, tokens, Duration::ZERO);
    }

    Ok(Outcome {
        losses,
        tokens: args.steps * tokens,
        elapsed: progress.elapsed(),
        communication: Duration::ZERO,
        bytes_sent: 0,
        calls: 0,
        parameters: model.num_params(),
        held_out: held_out_loss(&model, text),
        sample: readable(&generate(&model, b"\n", 300, 0.8, args.seed)),
    })
}

/// The learning rate of each step: up to `--lr` in a tenth of the steps, then down to a tenth of it along a cosine.
fn schedule(args: &Args) -> Result<ModuleLrScheduler, String> {
    let warm_up = (args.steps / 10).clamp(1, 100);
    let up = LinearLrSchedulerConfig::new(args.lr / warm_up as f64, args.lr, warm_up);
    let down =
        CosineAnnealingLrSchedulerConfig::new(args.lr, (args.steps - warm_up).max(1)).with_min_lr(args.lr / 10.0);
    SequentialLrSchedulerConfig::new(vec![up.into(), down.into()], vec![warm_up]).init()
}

/// The mean loss on rows that were held out, in nats per byte.
fn held_out_loss(model: &Gpt, text: &Text) -> Option<f64> {
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
