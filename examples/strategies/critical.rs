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

/// How many times the batch the branches have.
const FACTORS: [usize; 4] = [1, 2, 4, 8];

/// A table of every seed and of their mean, and what it says.
pub fn measure(sizes: &Sizes, text: &Text, seeds: u64) -> Result<String, Error> {
    let cells = |first: [&str; 2], more: [String; 4]| format!("| {} | {} |\n", first.join(" | "), more.join(" | "));
    let mut told = cells(["seed", "noise scale, rows"], FACTORS.map(|factor| format!("{} rows", factor * BASE_ROWS)));
    told += "|---|---|---|---|---|---|\n";
    let mut sums = [0.0; FACTORS.len()];
    for seed in 0..seeds {
        let whole = model(sizes.small, sizes.seq, seed);
        let mut all = launch::threads(2).run(|rank| {
            let device = rank.device().autodiff();
            let data = DataParallelConfig::new().with_noise_scale_every(1);
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
            let found = critical_batch_size(BASE_ROWS, sizes.branch_rows, &FACTORS, TOLERANCE, |branch| {
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
        let losses: [f64; FACTORS.len()] = std::array::from_fn(|at| found.branches[at].1);
        sums = std::array::from_fn(|at| sums[at] + losses[at]);
        eprintln!("seed {seed}: {found}");
        told += &cells([&seed.to_string(), &noise], losses.map(|loss| format!("{loss:.4}")));
    }
    let means = sums.map(|sum| sum / seeds as f64);
    told += &cells(["mean", ""], means.map(|loss| format!("{loss:.4}")));
    // What the means of the seeds say, by the same rule.
    let mut losses = means.into_iter();
    let found = critical_batch_size(BASE_ROWS, sizes.branch_rows, &FACTORS, TOLERANCE, |_| {
        Ok(losses.next().unwrap_or(f64::NAN))
    })?;
    let (beyond, steps) = (if found.bounded { "" } else { "at least " }, sizes.branch_rows * 2 / BASE_ROWS);
    let _ = writeln!(
        told,
        "\nafter {steps} steps of {BASE_ROWS} rows, {} rows a branch, tolerance {TOLERANCE} nats: the critical batch size is {beyond}{} rows \
         on the mean of {seeds} seeds",
        sizes.branch_rows, found.rows
    );
    Ok(told)
}
