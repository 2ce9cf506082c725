//! The moves between layouts, against what one device computes.

mod failures;
mod models;
mod moves;
mod numeric;
