//! The examples as their users meet them: flags, errors, output.

#[path = "../common"]
mod common {
    pub mod ports;
}

mod given;
mod launchers;
mod schedules;
mod strategies;
mod train_lm;
mod wrap_any_model;
