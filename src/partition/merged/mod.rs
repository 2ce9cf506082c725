//! Splits dims that a reshape has merged, where operations can run without the merge.
//!
//! burn's `RotaryEncoding`, and attention on `[batch * heads, ..]`, make one dim of two, compute on it as on a batch,
//! and take it apart behind. A split of the inner one, the heads, cannot follow: a rank's part of the merged dim would
//! be many pieces. The same operations on the dims as they were before can run in any split. Where everything that
//! reads a merged dim can do without merging, it does: the elements, their order and the work stay the same.

mod merge;
mod relate;
mod rewrite;

use std::collections::{HashMap, HashSet};

use burn_ir::{OperationIr, TensorId, TensorIr};

use self::merge::MergedDim;
use self::relate::{Related, related};
use self::rewrite::Rewrite;
use crate::graph::step::Uses;
use crate::graph::{StepGraph, operation};

/// The step without merges that nothing needs; `None` if it has none.
pub(super) fn unmerged(graph: &StepGraph) -> Option<StepGraph> {
    let results: HashSet<TensorId> = graph.results().map(|result| result.id).collect();
    let find = FindMerged { operations: &graph.operations, uses: Uses::of(&graph.operations), results };
    let mut apart = HashMap::new();
    for op in &graph.operations {
        let Some(reshape) = operation::reshape(op).filter(|op| !apart.contains_key(&op.out.id)) else { continue };
        let found = MergedDim::made_by(reshape).into_iter().find_map(|merge| find.connected(&reshape.out, merge));
        apart.extend(found.unwrap_or_default());
    }
    (!apart.is_empty()).then(|| Rewrite::new(graph, &apart).run())
}

struct FindMerged<'a> {
    operations: &'a [OperationIr],
    uses: Uses,
    results: HashSet<TensorId>,
}

impl FindMerged<'_> {
    /// All tensors that have a merged dim in common, each with its place, if all that reads them can do without and the
    /// dim is taken apart in the end.
    fn connected(&self, first: &TensorIr, merge: MergedDim) -> Option<HashMap<TensorId, MergedDim>> {
        let mut found = HashMap::from([(first.id, merge)]);
        let mut open = vec![first.id];
        let mut ends = false;
        while let Some(id) = open.pop() {
            let merge = found[&id].clone();
            if self.results.contains(&id) {
                return None;
            }
            let maker = self.uses.maker(id).map(|place| &self.operations[place]);
            // What comes from an operation that needs the merge is taken apart behind it.
            let made = maker.and_then(|op| related(op, id, &merge));
            let mut all: Vec<Related> = made.into_iter().collect();
            for reader in self.uses.readers(id) {
                all.push(related(&self.operations[*reader], id, &merge)?);
            }
            for Related { tensors, ends: here } in all {
                ends |= here;
                for (other, merge) in tensors {
                    match found.get(&other) {
                        Some(known) if *known != merge => return None,
                        Some(_) => {}
                        None => {
                            found.insert(other, merge);
                            open.push(other);
                        }
                    }
                }
            }
        }
        ends.then_some(found)
    }
}
