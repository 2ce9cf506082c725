//! Models as their authors write them: what plans cost, what is suggested, and what is told of tokens that no table
//! has.

mod bert;
mod beyond;
mod burn_layers;
mod costs;
mod gpt2;
mod names;
mod suggested;

use burn::prelude::*;

use crate::common::models::{Numbers, device};

/// Tokens of four rows, below a number.
fn tokens(length: usize, words: usize, seed: u64) -> Tensor<2, Int> {
    Numbers(seed + 3).classes([4, length], words, &device())
}
