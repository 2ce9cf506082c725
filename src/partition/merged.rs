//! Dims that were merged, taken apart again.
//!
//! burn's `RotaryEncoding`, and attention on `[batch * heads, ..]`, make one dim of two, compute on it as on a batch, and take
//! it apart behind. A split of the inner one, the heads, cannot follow: a rank's part of the merged dim would be many pieces.
//! The same operations on the dims as they were before can run in any split. Where everything that reads a merged dim can do
//! without merging, it does: the elements, their order and the work stay the same.

mod relate;
mod rewrite;

use std::collections::{HashMap, HashSet};

use burn_ir::{BaseOperationIr as Base, OperationIr, ShapeOpIr, TensorId, TensorIr};

use self::relate::{Related, related};
use self::rewrite::Rewrite;
use crate::graph::StepGraph;
use crate::graph::step::Uses;

/// A dim that is several.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Merge {
    /// Where it is.
    at: usize,
    /// The sizes of those that it was made of, each more than 1, the outer first.
    factors: Vec<usize>,
}

impl Merge {
    fn size(&self) -> usize {
        self.factors.iter().product()
    }

    /// How many dims more there are without it.
    fn more(&self) -> usize {
        self.factors.len() - 1
    }

    fn moved_to(&self, at: usize) -> Self {
        Self { at, ..self.clone() }
    }

    /// The number of another dim once this one is taken apart.
    fn shift(&self, dim: usize) -> usize {
        if dim > self.at { dim + self.more() } else { dim }
    }

    /// A tensor without the merge.
    fn apart(&self, tensor: &TensorIr) -> TensorIr {
        let mut dims = tensor.shape.to_vec();
        dims.splice(self.at..=self.at, self.factors.iter().copied());
        TensorIr { shape: dims.into(), ..tensor.clone() }
    }

    /// Merges that a reshape makes.
    fn made_by(ShapeOpIr { input, out }: &ShapeOpIr) -> Vec<Self> {
        let (from, to) = (input.shape.as_slice(), out.shape.as_slice());
        let (mut place, mut before_from, mut before_to) = (0, 1, 1);
        let mut found = Vec::new();
        for (at, size) in to.iter().enumerate() {
            while place < from.len() && before_from < before_to {
                before_from *= from[place];
                place += 1;
            }
            if before_from == before_to {
                let (mut product, mut factors) = (1, Vec::new());
                for other in &from[place..] {
                    if product >= *size {
                        break;
                    }
                    product *= other;
                    factors.extend((*other > 1).then_some(*other));
                }
                if product == *size && factors.len() > 1 {
                    found.push(Self { at, factors });
                }
            }
            before_to *= size;
        }
        found
    }
}

/// The step without merges that nothing needs; `None` if it has none.
pub(super) fn unmerged(graph: &StepGraph) -> Option<StepGraph> {
    let results: HashSet<TensorId> = graph.results().map(|result| result.id).collect();
    let find = Find { operations: &graph.operations, uses: Uses::of(&graph.operations), results };
    let mut apart = HashMap::new();
    for op in &graph.operations {
        let Some(reshape) = as_reshape(op).filter(|op| !apart.contains_key(&op.out.id)) else { continue };
        let found = Merge::made_by(reshape).into_iter().find_map(|merge| find.connected(&reshape.out, merge));
        apart.extend(found.unwrap_or_default());
    }
    (!apart.is_empty()).then(|| Rewrite::new(graph, &apart).run())
}

fn as_reshape(op: &OperationIr) -> Option<&ShapeOpIr> {
    match op {
        OperationIr::BaseFloat(Base::Reshape(op))
        | OperationIr::BaseInt(Base::Reshape(op))
        | OperationIr::BaseBool(Base::Reshape(op)) => Some(op),
        _ => None,
    }
}

struct Find<'a> {
    operations: &'a [OperationIr],
    uses: Uses,
    results: HashSet<TensorId>,
}

impl Find<'_> {
    /// All tensors that have a merged dim in common, each with its place, if all that reads them can do without and the dim
    /// is taken apart in the end.
    fn connected(&self, first: &TensorIr, merge: Merge) -> Option<HashMap<TensorId, Merge>> {
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

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Shape};

    use super::*;

    fn made(from: &[usize], to: &[usize]) -> Vec<Merge> {
        let tensor = |id, dims: &[usize]| TensorIr::uninit(TensorId::new(id), Shape::from(dims.to_vec()), DType::F32);
        Merge::made_by(&ShapeOpIr { input: tensor(0, from), out: tensor(1, to) })
    }

    #[test]
    fn merges_of_reshapes() {
        let merge = |at, factors: &[usize]| Merge { at, factors: factors.to_vec() };
        assert_eq!(made(&[2, 3, 4, 6], &[6, 4, 3, 2]), [merge(0, &[2, 3])]);
        assert_eq!(made(&[2, 3, 4, 6], &[2, 12, 6]), [merge(1, &[3, 4])]);
        assert_eq!(made(&[2, 3, 4, 6], &[6, 24]), [merge(0, &[2, 3]), merge(1, &[4, 6])]);
        assert_eq!(made(&[2, 1, 3, 5], &[1, 6, 5]), [merge(1, &[2, 3])]);
        assert_eq!(made(&[2, 3, 4], &[24]), [merge(0, &[2, 3, 4])]);
        assert_eq!(made(&[6, 4], &[2, 3, 4]), []);
        assert_eq!(made(&[4, 6], &[6, 4]), []);
        assert_eq!(made(&[1, 6, 4], &[6, 4]), []);
        assert_eq!(made(&[0, 3], &[0, 3]), []);
    }
}
