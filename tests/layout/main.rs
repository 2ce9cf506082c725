//! The moves between layouts, against what one device computes.

mod dense;
mod failures;
mod models;
mod moves;
mod numeric;
