//! The model of `examples/finetune`: its config, packed rows, adapters, and generation, on any mesh.

mod config;
mod generate;
mod lora;
mod packing;

use std::path::PathBuf;

use burn::module::Module;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;

use crate::common::finetune::directory;
use crate::common::llama::{Llama, LlamaConfig};
use crate::common::models::{device, seeded};

/// A small model of all that there is: grouped queries, biases, norms of heads, a tied head, YaRN.
fn model() -> Llama {
    let config = LlamaConfig::read(folder()).unwrap();
    seeded(config.init(&device()).materialize())
}

/// Where the model above has its config from.
fn folder() -> PathBuf {
    crate::hf::folder("qwen3_yarn")
}

/// The mesh `[dp, pp, tp]`, with replicas that divide what is said.
fn strategy([dp, pp, tp]: [usize; 3], sharding: Sharding) -> Strategy {
    let mut strategy = Strategy::new().with_dp(dp).with_data(DataParallelConfig::new().with_sharding(sharding));
    if tp > 1 {
        strategy = strategy.with_tp(tp, directory::plan());
    }
    if pp > 1 {
        strategy = strategy.with_pp(pp, PipelineConfig::new(2));
    }
    strategy
}
