//! Small and large batches: the loss by step, token and second, the noise scale, and the gap to text that was held out.

use std::fmt::Write as _;
use std::time::Instant;

use burn::module::Module;
use burn_parallel::batch::{BatchSplit, NoiseScale, warm_up};
use burn_parallel::prelude::*;
use burn_parallel::train::Clip;

use crate::text::{Text, tensors};
use crate::training::{Sizes, learned, loss, mean_loss, model, optimizer, settings};

/// A training with batches of one size and one seed.
pub struct Curve {
    pub rows: usize,
    pub points: Vec<Point>,
    /// The loss at the end on text that was learned from, and on text that was held out.
    pub learned: f64,
    pub held_out: f64,
}

/// The training after some steps.
#[derive(Clone, Copy)]
pub struct Point {
    pub step: usize,
    pub tokens: f64,
    pub seconds: f64,
    /// The mean loss since the point before.
    pub loss: f64,
    /// The noise scale in rows.
    pub noise: Option<f64>,
}

/// How many points a curve has.
const POINTS: usize = 24;

/// Every size with every seed; sizes take turns.
pub fn measure(sizes: &Sizes, text: &Text, seeds: u64) -> Result<Vec<Curve>, Error> {
    let mut curves = Vec::new();
    for seed in 0..seeds {
        for &rows in &sizes.batches {
            let curve = train(sizes, text, rows, seed)?;
            eprintln!("{rows} rows, seed {seed}: held-out loss {:.3}", curve.held_out);
            curves.push(curve);
        }
    }
    Ok(curves)
}

fn train(sizes: &Sizes, text: &Text, rows: usize, seed: u64) -> Result<Curve, Error> {
    let whole = model(sizes.small, sizes.seq, seed);
    let steps = sizes.rows / rows;
    let mut all = launch::threads(2).run(|rank| {
        let device = rank.device().autodiff();
        let data = DataParallelConfig::new().with_noise_scale_every(1);
        let mut model = whole.clone().fork(&device).data_parallel(&rank, data)?;
        let settings = settings(rows)?;
        let mut optim = optimizer(settings);
        let split = BatchSplit::new(rows, 2, None)?;
        let (mut noise, mut points) = (NoiseScale::with_decay(0.98), Vec::new());
        let (mut sum, mut count, began) = (0.0, 0, Instant::now());
        for number in 0..steps {
            let all = text.rows(seed, number, rows, 0, 1);
            let batch = tensors(&all[split.replica(rank.rank())], &device);
            let step = model.step(batch, loss)?.clip_grad_norm(&model, Clip::never())?;
            noise.add(&step);
            sum += step.loss.item();
            count += 1;
            let lr = settings.lr * warm_up(number, steps.div_ceil(20), 0.0);
            model = model.optimize(&mut optim, lr, step)?;
            let done = number + 1;
            if done * POINTS / steps > number * POINTS / steps {
                points.push(Point {
                    step: done,
                    tokens: (done * rows * sizes.seq) as f64,
                    seconds: began.elapsed().as_secs_f64(),
                    loss: sum / count as f64,
                    noise: noise.items().ok().map(|tokens| tokens / sizes.seq as f64),
                });
                (sum, count) = (0.0, 0);
            }
        }
        Ok((points, model.into_inner()))
    })?;
    let (points, trained) = all.swap_remove(0);
    let (learned, held_out) = (mean_loss(&trained, &learned(text, 512)), mean_loss(&trained, &text.held_out(512)));
    Ok(Curve { rows, points, learned, held_out })
}

/// What the curves end with: means over the seeds, and how far these are apart.
pub fn table(curves: &[Curve]) -> String {
    let mut table = String::from(
        "| rows of a step | steps | seconds | loss, learned text | loss, held-out text | gap | noise scale at the end, rows |\n\
         |---|---|---|---|---|---|---|\n",
    );
    let mut sizes: Vec<usize> = curves.iter().map(|curve| curve.rows).collect();
    sizes.dedup();
    sizes.sort_unstable();
    sizes.dedup();
    for rows in sizes {
        let of_size = || curves.iter().filter(move |curve| curve.rows == rows);
        let last = |curve: &Curve| curve.points.last().copied();
        let spread = |numbers: Vec<f64>, digits: usize| {
            let (least, most) = numbers.iter().fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
            let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
            match numbers.is_empty() {
                true => "-".into(),
                false => format!("{mean:.digits$} ({least:.digits$} to {most:.digits$})"),
            }
        };
        let steps = of_size().filter_map(last).map(|point| point.step).max().unwrap_or(0);
        let _ = writeln!(
            table,
            "| {rows} | {steps} | {} | {} | {} | {} | {} |",
            spread(of_size().filter_map(last).map(|point| point.seconds).collect(), 0),
            spread(of_size().map(|curve| curve.learned).collect(), 3),
            spread(of_size().map(|curve| curve.held_out).collect(), 3),
            spread(of_size().map(|curve| curve.held_out - curve.learned).collect(), 3),
            spread(of_size().filter_map(last).filter_map(|point| point.noise).collect(), 0),
        );
    }
    table
}
