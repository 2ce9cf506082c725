//! Runs a model under loom.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Explores `model`, with at most `preemptions` of a running thread (all interleavings if `None`), and says how much
/// that was.
pub fn explore(name: &str, preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let executions = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 20_000;
    let count = executions.clone();
    builder.check(move || {
        count.fetch_add(1, Ordering::SeqCst);
        model();
    });
    println!("{name}: {} executions in {:.1?}", executions.load(Ordering::SeqCst), began.elapsed());
}
