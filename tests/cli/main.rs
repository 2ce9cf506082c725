//! The examples as their users meet them: flags, errors, output.

mod schedules;
mod strategies;
mod train_lm;
mod wrap_any_model;
