//! The examples as their users meet them: flags, errors, output.

#[path = "../common"]
mod common {
    pub mod ports;
}

/// What the examples share.
#[allow(dead_code)]
#[path = "../../examples/common/mod.rs"]
mod programs;

mod batch;
mod given;
mod launchers;
mod schedules;
mod strategies;
mod train_lm;
mod wrap_any_model;
