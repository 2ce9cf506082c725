//! The executor of pipeline schedules, with stages written by hand.

mod failures;
mod messages;
mod model;
mod parity;
mod probe;
