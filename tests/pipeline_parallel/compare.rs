//! Training as a pipeline against training on one device.

use burn::module::Module;
use burn::tensor::Tensor;
use burn_parallel::graph::TensorTree;
use burn_parallel::pipeline_parallel::Pipelined;
use burn_parallel::prelude::*;

use crate::common::reference::{Reference, Wholes, all_same, bytes, filled, gradient_values, optimizer, values};

/// Trains as a pipeline and compares everything with one device.
pub fn compare<M: Module, I: TensorTree + Clone>(
    make: impl Fn() -> M + Sync,
    batch: fn(u64) -> I,
    loss: fn(&M, I) -> Tensor<1>,
    ranks: usize,
    config: &PipelineConfig,
    references: &[Reference],
) -> Result<(), Error> {
    let held = launch::threads(ranks).run(|rank| {
        let mut model: Pipelined<M> = filled(make()).pipeline_parallel(&rank, config.clone())?;
        let mut optim = optimizer();
        let mut held = 0;
        for (step, reference) in references.iter().enumerate() {
            let what = format!("rank {} of {ranks}, step {step}, {:?}", rank.rank(), config.schedule);
            let result = model.step(batch(step as u64), loss)?;
            let (found, expected) = (result.loss.item() as f32, reference.loss);
            assert!((found - expected).abs() <= 1e-4 * expected.abs(), "{what}: {found} {expected}");
            let mine = gradient_values(&model, &result.grads);
            let expected: Wholes = reference
                .gradients
                .iter()
                .filter(|(path, _)| mine.contains_key(*path))
                .map(|(p, v)| (p.clone(), v.clone()))
                .collect();
            all_same(&format!("gradients, {what}"), &expected, &mine, 3e-4);
            // Every gradient is somewhere.
            let mut anywhere = Vec::new();
            for path in reference.gradients.keys() {
                anywhere.push(u64::from(mine.contains_key(path)));
            }
            assert!(rank.all_reduce(anywhere, ReduceOp::Max)?.iter().all(|found| *found == 1), "{what}");
            model = optim.step(0.05, model, result.grads);
            all_same(&format!("after, {what}"), &reference.after, &values(&model.assemble()?), 3e-4);
            held = bytes(model.local()).bytes.values().sum();
        }
        let report = model.report().cut.ok_or_else(|| Error::user("the model was not cut"))?;
        Ok((held, report))
    })?;
    // Nobody holds more than its stages, and together they hold the model.
    let report = &held[0].1;
    let stages = config.schedule.timetable(ranks, config.micro_batches)?;
    for (rank, (held, other)) in held.iter().enumerate() {
        assert_eq!(other, report);
        let mine = stages.stages_of(rank);
        let own: u64 = mine.iter().map(|stage| report.stages[*stage].param_bytes).sum();
        // What several stages of one rank use is there once.
        let again = |(path, holders): &(String, Vec<usize>)| {
            let uses = holders.iter().filter(|stage| mine.contains(stage)).count();
            uses.saturating_sub(1) * references[0].after[path].values.len() * 4
        };
        let again: usize = report.tied.iter().map(again).sum();
        assert_eq!(*held as u64, own - again as u64, "rank {rank}");
    }
    Ok(())
}
