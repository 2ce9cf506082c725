//! Replicas that divide parameters, gradients and optimizer state by rows, in captured steps.

pub mod branches;
mod counted;
mod failing;
pub mod parity;
mod surface;
mod uneven;
