//! Measures the gradients of micro-batches on this rank, before they are summed over the replicas.

use std::collections::{BTreeMap, HashSet};

use crate::tensor::{PlainTensor, Squares};

/// Adds up `w |g|^2` over micro-batches, with `g` the mean gradient over the `w` items of one.
#[derive(Debug, Default)]
pub(super) struct RowNoise {
    /// The parameters that another rank counts, by their numbers.
    elsewhere: HashSet<usize>,
    /// Over the micro-batches that are done.
    done: Squares,
    micro_batches: u64,
    /// Of those that run, a pipeline has several.
    running: BTreeMap<usize, Squares>,
    in_parts: bool,
}

impl RowNoise {
    pub fn new(elsewhere: HashSet<usize>) -> Self {
        Self { elsewhere, ..Self::default() }
    }

    /// Takes the gradient of a parameter in a micro-batch; with the sum of its squares, if that is known.
    pub fn add(&mut self, micro_batch: usize, param: usize, gradient: &PlainTensor, squares: Option<f64>) {
        if !self.elsewhere.contains(&param) {
            self.in_parts |= self.running.entry(micro_batch).or_default().add(gradient, squares).is_err();
        }
    }

    /// Ends the micro-batches that run, which count for so many items each. Their gradients are those of the sum over
    /// the items, divided by `unit`.
    pub fn end(&mut self, items: &[f64], unit: f64) {
        let mut running = std::mem::take(&mut self.running);
        for (micro_batch, items) in items.iter().enumerate().filter(|(_, items)| **items > 0.0) {
            self.done.add_scaled(running.remove(&micro_batch).unwrap_or_default(), unit * unit / items);
            self.micro_batches += 1;
        }
    }

    /// Forgets micro-batches that have failed.
    pub fn forget(&mut self) {
        self.running.clear();
    }

    /// What this rank brings to the sum over the replicas: squares, micro-batches, and whether gradients came in parts.
    pub fn numbers(self) -> [f64; 3] {
        [self.done.read(), self.micro_batches as f64, f64::from(u8::from(self.in_parts))]
    }
}
