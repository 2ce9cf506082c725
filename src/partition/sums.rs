//! Delays sums of partial and whole terms until the partial ones are reduced. Terms that are split wait for the sum to
//! be scattered.

use burn::tensor::Shape;
use burn_ir::{BinaryOpIr, OperationIr, TensorId, TensorIr};

use super::collectives::CollectiveKind;
use super::logical_tensor::{LogicalTensor, TensorState, WaitingSum};
use super::pass::Pass;
use crate::graph::operation::build::add;
use crate::graph::operation::sum;
use crate::layout::Layout::{self, Partial, Replicated, Sharded};

/// A term of a sum, if it can be added later.
enum Term {
    Partial(TensorIr),
    /// Whole, or split along a dim.
    Whole(TensorIr, Layout),
    Waiting(WaitingSum),
}

impl Pass<'_> {
    /// Plans a sum of partial and whole terms instead of making it.
    pub(super) fn postpone(&mut self, op: &OperationIr) -> bool {
        let Some(BinaryOpIr { lhs, rhs, out }) = sum(op) else { return false };
        if lhs.id == rhs.id {
            return false;
        }
        let (Some(a), Some(b)) = (self.term(lhs.id, out), self.term(rhs.id, out)) else { return false };
        let sum = match (a, b) {
            (Term::Partial(partial), Term::Whole(whole, layout))
            | (Term::Whole(whole, layout), Term::Partial(partial)) => WaitingSum { partial, whole, layout },
            (Term::Waiting(sum), Term::Partial(more)) | (Term::Partial(more), Term::Waiting(sum)) => {
                WaitingSum { partial: self.add(sum.partial, more), ..sum }
            }
            (Term::Waiting(sum), Term::Whole(more, layout)) | (Term::Whole(more, layout), Term::Waiting(sum)) => {
                let Some((whole, layout)) = self.add_whole((sum.whole, sum.layout), (more, layout), out) else {
                    return false;
                };
                WaitingSum { whole, layout, ..sum }
            }
            (Term::Waiting(a), Term::Waiting(b)) => {
                let Some((whole, layout)) = self.add_whole((a.whole, a.layout), (b.whole, b.layout), out) else {
                    return false;
                };
                WaitingSum { partial: self.add(a.partial, b.partial), whole, layout }
            }
            _ => return false,
        };
        // What is split can only be added to a sum that is split like it.
        if let Sharded(dim) = sum.layout
            && sum.partial.shape[dim] != out.shape[dim]
        {
            return false;
        }
        self.tensors.insert(out.id, LogicalTensor::waiting(out.clone(), sum));
        true
    }

    /// A tensor as a term that may wait. What is not whole yet may only if nobody else reads it.
    fn term(&self, id: TensorId, sum: &TensorIr) -> Option<Term> {
        let tensor = &self.tensors[&id];
        let alone = self.readers.get(&id).is_some_and(|r| r.len() == 1) && !self.wanted.contains_key(&id);
        if let TensorState::Waiting(sum) = &tensor.state {
            return alone.then(|| Term::Waiting(sum.clone()));
        }
        let local = |layout| tensor.version(layout).map(|local| tensor.local(layout, local, self.options.degree));
        match tensor.layout() {
            Partial if alone => local(Partial).map(Term::Partial),
            Partial => None,
            Sharded(dim) if tensor.global.shape[dim] != sum.shape[dim] => None,
            layout => local(layout).map(|local| Term::Whole(local, layout)),
        }
    }

    fn add(&mut self, lhs: TensorIr, rhs: TensorIr) -> TensorIr {
        let dims = lhs.shape.as_slice().iter().zip(rhs.shape.as_slice()).map(|(a, b)| *a.max(b));
        let shape = Shape::from(dims.collect::<Vec<_>>());
        let out = TensorIr::uninit(self.fresh(), shape, lhs.dtype);
        self.operations.push(add(lhs, rhs, out.clone()));
        out
    }

    /// Adds terms that are whole or split along the same dim.
    fn add_whole(
        &mut self,
        (a, of_a): (TensorIr, Layout),
        (b, of_b): (TensorIr, Layout),
        sum: &TensorIr,
    ) -> Option<(TensorIr, Layout)> {
        let (a, b, layout) = match (of_a, of_b) {
            (Replicated, Sharded(dim)) => (self.part(a, dim, sum), b, of_b),
            (Sharded(dim), Replicated) => (a, self.part(b, dim, sum), of_a),
            _ if of_a == of_b => (a, b, of_a),
            _ => return None,
        };
        Some((self.add(a, b), layout))
    }

    /// This rank's part of a whole term, or all of it where it is the same for every part.
    fn part(&mut self, term: TensorIr, dim: usize, sum: &TensorIr) -> TensorIr {
        if term.shape[dim] != sum.shape[dim] {
            return term;
        }
        let mut part = TensorIr { id: self.fresh(), ..term.clone() };
        part.shape[dim] /= self.options.degree;
        self.take_part(term, part.clone(), dim);
        part
    }

    /// Makes a sum that was waiting: split if its whole term is, or if that is asked for and possible; else whole.
    pub(super) fn settle(&mut self, id: TensorId, want: Layout) -> TensorIr {
        let tensor = &self.tensors[&id];
        let TensorState::Waiting(WaitingSum { partial, whole, layout }) = tensor.state.clone() else {
            return self.get(id, want);
        };
        let global = tensor.global.clone();
        let can = |dim: usize| partial.shape[dim] == global.shape[dim];
        let layout = match (layout, want, self.along_sequence(&global)) {
            (Sharded(_), ..) => layout,
            (_, Sharded(dim), _) if can(dim) && !self.is_wanted_whole(id) => want,
            (_, Replicated, Some(dim)) if can(dim) && !self.is_wanted_whole(id) => Sharded(dim),
            _ => Replicated,
        };
        let dims = partial.shape.to_vec();
        let mut reduced = TensorIr { id: self.fresh(), ..partial.clone() };
        let (local, whole) = match layout {
            Sharded(dim) => {
                reduced.shape[dim] /= self.options.degree;
                self.collective(CollectiveKind::ReduceScatter, dims, partial, reduced.clone(), &[dim]);
                let split = whole.shape[dim] != global.shape[dim];
                (self.fresh(), if split { whole } else { self.part(whole, dim, &global) })
            }
            _ => {
                self.collective(CollectiveKind::AllReduce, dims, partial, reduced.clone(), &[]);
                (id, whole)
            }
        };
        let out = self.tensors[&id].local(layout, local, self.options.degree);
        self.operations.push(add(reduced, whole, out));
        if let Some(tensor) = self.tensors.get_mut(&id) {
            tensor.state = TensorState::Made;
            tensor.add(layout, local);
        }
        self.get(id, want)
    }
}
