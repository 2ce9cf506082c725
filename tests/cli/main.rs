//! The examples as their users meet them: flags, errors, output.

mod launchers;
mod schedules;
mod strategies;
mod train_lm;
mod wrap_any_model;
