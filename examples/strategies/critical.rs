//! The critical batch size by branches, beside the noise scale at the same state.

use std::fmt::Write as _;

use burn::module::Module;
use burn_parallel::batch::{NoiseScale, critical_batch_size};
use burn_parallel::prelude::*;
use burn_parallel::train::Clip;

use crate::text::{Text, tensors};
use crate::training::{BASE_ROWS, Sizes, loss, mean_loss, model, optimizer, settings};

/// The loss that a larger batch may cost, in nats per token.
const TOLERANCE: f64 = 0.02;

pub fn measure(sizes: &Sizes, text: &Text, seeds: u64) -> Result<String, Error> {
    let mut told = String::from("| seed | noise scale, rows | branches |\n|---|---|---|\n");
    for seed in 0..seeds {
        let whole = model(sizes.small, sizes.seq, seed);
        let mut all = launch::threads(2).run(|rank| {
            let device = rank.device().autodiff();
            let data = DataParallelConfig::new().with_noise_scale(true);
            let mut state = whole.clone().fork(&device).data_parallel(&rank, data.clone())?;
            let base = settings(BASE_ROWS)?;
            let mut optim = optimizer(base);
            let mut noise = NoiseScale::with_decay(0.98);
            let steps = sizes.branch_rows * 2 / BASE_ROWS;
            let batch = |seed, number, rows| tensors(&text.rows(seed, number, rows, rank.rank(), 2), &device);
            for number in 0..steps {
                let step = state.step(batch(seed, number, BASE_ROWS), loss)?.clip_grad_norm(&state, Clip::never())?;
                noise.add(&step);
                state = state.optimize(&mut optim, base.lr, step)?;
            }
            let (whole, state_of) = (state.into_inner(), optim);
            let held_out = text.held_out(256);
            let found = critical_batch_size(BASE_ROWS, sizes.branch_rows, &[1, 2, 4, 8], TOLERANCE, |branch| {
                let mut model = whole.clone().fork(&device).data_parallel(&rank, data.clone())?;
                let settings = settings(branch.rows)?;
                let mut optim = optimizer(settings).load_record(state_of.to_record());
                for number in 0..branch.steps {
                    let step = model.step(batch(seed + 1000, number, branch.rows), loss)?;
                    model = model.optimize(&mut optim, settings.lr, step)?;
                }
                // All replicas have the same model, and so the same loss.
                Ok(mean_loss(model.local(), &held_out))
            })?;
            Ok((noise, found))
        })?;
        let (noise, found) = all.swap_remove(0);
        let noise = match noise.items() {
            Ok(tokens) => format!("{:.0}", tokens / sizes.seq as f64),
            Err(why) => why.to_string(),
        };
        let _ = writeln!(told, "| {seed} | {noise} | {found} |");
    }
    let _ = writeln!(told, "\ntolerance {TOLERANCE} nats, {} rows a branch", sizes.branch_rows);
    Ok(told)
}
