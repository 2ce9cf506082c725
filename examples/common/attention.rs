//! Whether the attention of a step fits memory.

use burn_parallel::batch::MemoryBudget;
use burn_parallel::prelude::*;

use super::device::Compute;
use super::flags::count;
use super::mesh::Axes;
use super::start::{Launch, Start};

/// What a layer of attention has at once on a replica.
pub struct Attention {
    /// The length of a row in tokens.
    pub seq: usize,
    pub heads: usize,
    /// The rows that go through a layer at once.
    pub rows: usize,
    /// How many masks there are: one that serves all rows, or one for each.
    pub masks: usize,
}

impl Attention {
    /// Whether there is memory for one layer, by which a long row is far beyond all else. What is too much would be
    /// killed without a word by a system that overcommits.
    pub fn fits(&self, axes: Axes, strategy: &Strategy, start: &Start) -> Result<(), String> {
        let Self { seq, heads, rows, masks } = *self;
        if start.device != Compute::Flex {
            return Ok(());
        }
        let Ok(MemoryBudget { bytes, limit }) = MemoryBudget::of_system() else { return Ok(()) };
        // Masks, of a byte each; and scores, where no fused loop computes them a few at a time.
        let scores = match strategy.captures(axes.ranks).map_err(|problem| problem.to_string())? {
            true => 0,
            false => size_of::<f32>() * heads * rows,
        };
        // What a launcher has started may be on several machines.
        let replicas = if start.launch == Launch::Env { 1 } else { axes.dp };
        let needed = (seq as u128).pow(2) * ((masks + scores) * replicas) as u128;
        if needed <= u128::from(bytes) {
            return Ok(());
        }
        let all = if replicas == 1 { String::new() } else { format!(" on {replicas} replicas") };
        Err(format!(
            "--seq {seq}: the attention of {} at once{all} takes {} MB at least, and there are {} MB ({limit}): give a \
             shorter --seq, or fewer rows at once",
            count(rows, "row"),
            needed / 1_000_000,
            bytes / 1_000_000
        ))
    }
}
