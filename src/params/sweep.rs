//! Frees burn's table of autodiff leaves where no backward pass runs.
//!
//! Every leaf of the process enters one table, and only a `backward` takes those out whose tensors are gone. Captured
//! steps run none, but burn's optimizers make a new leaf of every parameter at every step, and so does who loads it.

use std::sync::atomic::{AtomicU64, Ordering};

use burn::backend::autodiff::NodeId;
use burn::tensor::{Device, Tensor};

/// How many nodes are made between two sweeps: half a megabyte of leaves, and few enough sweeps, which look at all
/// nodes.
const NODES: u64 = 1024;

/// The number of the node that was the newest at the last sweep: one for the process, as are burn's table and its
/// numbers.
static SWEPT: AtomicU64 = AtomicU64::new(0);

/// Takes leaves whose tensors are gone out of burn's table, if there may be many. Called at every captured step or
/// forward, and whenever a module was loaded.
pub(crate) fn sweep_leaves() {
    let newest = NodeId::new().value;
    let swept = SWEPT.load(Ordering::Relaxed);
    let many = newest.saturating_sub(swept) >= NODES;
    // One thread sweeps for all.
    if many && SWEPT.compare_exchange(swept, newest, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
        // Every backward pass ends with a sweep of the whole table; this is the smallest one.
        drop(Tensor::<1>::zeros([1], &Device::flex().autodiff()).require_grad().backward());
    }
}
