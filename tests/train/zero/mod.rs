//! Sharded replicas (ZeRO) against one device, and what they promise: bytes held, bytes moved, failures.

mod apart;
pub mod bytes;
mod crash;
mod gathered;
mod generation;
mod kept;
pub mod norm;
mod parity;
mod replaced;
mod rules;
mod splits;
mod uneven;
mod unused;
mod wholes;

use burn::module::{Module, ParamGroup};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamWConfig, ModuleOptimizer, MuonConfig, SgdConfig};
use burn_parallel::Error;
use burn_parallel::comm::part;
use burn_parallel::prelude::*;

use crate::common::cases::{Case, wrap};
use crate::common::reference::{Wholes, values};

/// The levels that eager replicas have.
pub const LEVELS: [Sharding; 3] = [Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters];

/// An optimizer by its name; `muon` updates matrices, and AdamW the rest.
pub fn optimizer(name: &str) -> ModuleOptimizer {
    let adamw = AdamWConfig::new().with_weight_decay(0.01);
    match name {
        "adamw" => adamw.init(),
        "muon" => {
            let matrices = ParamGroup::from_regex("weight$").unwrap();
            adamw.init().with_group(matrices, MuonConfig::new().build(), None)
        }
        _ => SgdConfig::new()
            .with_momentum(Some(MomentumConfig { momentum: 0.9, dampening: 0.1, nesterov: true }))
            .init(),
    }
}

pub fn config(sharding: Sharding) -> DataParallelConfig {
    DataParallelConfig::new().with_bucket_bytes(3000).with_sharding(sharding)
}

/// What a run did: the loss of each step, and the values of all parameters at its end.
pub type Run = (Vec<f64>, Wholes);

/// Trains replicas, each on its part of so many rows a step, in so many micro-batches.
pub fn train<M: Module>(
    rank: &Rank,
    case: &Case<M>,
    config: DataParallelConfig,
    mut optim: ModuleOptimizer,
    rows: &[usize],
    micro_batches: usize,
) -> Result<Run, Error> {
    let mut model = wrap(rank, &case.model, config)?;
    let mut losses = Vec::new();
    for (step, all) in rows.iter().enumerate() {
        let own = part(*all, rank.size(), rank.rank());
        let parts: Vec<_> = (0..micro_batches)
            .map(|number| part(own.len(), micro_batches, number))
            .map(|rows| own.start + rows.start..own.start + rows.end)
            .filter(|rows| !rows.is_empty())
            .map(|rows| (case.input)(step, rows))
            .collect();
        let done = model.step_micro_batches(parts, |model, batch| {
            let items = batch.targets.dims()[0];
            Loss::mean((case.loss)(model, batch), items)
        })?;
        assert_eq!(done.weight, *all as f64);
        losses.push(done.loss.item());
        model = model.optimize(&mut optim, 1e-2, done)?;
    }
    Ok((losses, values(&model.assemble()?)))
}
