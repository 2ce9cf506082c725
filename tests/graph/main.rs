//! The graph room against eager burn: the same loss, gradients, running statistics and trained weights.

mod batch_norm;
mod capture;
mod errors;
mod execute;
mod models;
mod parity;
mod token_loss;
