//! Sums of partial and whole terms: the whole ones wait until the partial ones are added up and reduced.

use burn::tensor::Shape;
use burn_ir::{BinaryOpIr, NumericOperationIr, OperationIr, TensorId, TensorIr};

use super::collectives::CollectiveKind;
use super::held::{Held, Origin, WaitingSum};
use super::pass::Pass;
use super::rules::as_sum;
use crate::layout::Layout::{self, Partial, Replicated, Sharded};

/// A term of a sum, if it can be added later.
enum Term {
    Partial(TensorIr),
    Whole(TensorIr),
    Waiting(WaitingSum),
}

impl Pass<'_> {
    /// Plans a sum of partial and whole terms instead of making it.
    pub(super) fn postpone(&mut self, op: &OperationIr) -> bool {
        let Some((lhs, rhs, out)) = as_sum(op) else { return false };
        if lhs.id == rhs.id {
            return false;
        }
        let (Some(a), Some(b)) = (self.term(lhs.id), self.term(rhs.id)) else { return false };
        let sum = match (a, b) {
            (Term::Partial(partial), Term::Whole(whole)) | (Term::Whole(whole), Term::Partial(partial)) => {
                WaitingSum { partial, whole }
            }
            (Term::Waiting(sum), Term::Partial(more)) | (Term::Partial(more), Term::Waiting(sum)) => {
                WaitingSum { partial: self.add(sum.partial, more), ..sum }
            }
            (Term::Waiting(sum), Term::Whole(more)) | (Term::Whole(more), Term::Waiting(sum)) => {
                WaitingSum { whole: self.add(sum.whole, more), ..sum }
            }
            (Term::Waiting(a), Term::Waiting(b)) => {
                WaitingSum { partial: self.add(a.partial, b.partial), whole: self.add(a.whole, b.whole) }
            }
            _ => return false,
        };
        self.held.insert(out.id, Held::waiting(out.clone(), sum));
        true
    }

    /// A tensor as a term that may wait. What is not whole yet may only if nobody else reads it.
    fn term(&self, id: TensorId) -> Option<Term> {
        let held = &self.held[&id];
        let alone = self.readers.get(&id).is_some_and(|r| r.len() == 1) && !self.wanted.contains_key(&id);
        if let Origin::Waiting(sum) = &held.origin {
            return alone.then(|| Term::Waiting(sum.clone()));
        }
        let local = |layout| held.version(layout).map(|local| held.local(layout, local, self.options.degree));
        match held.layout() {
            Replicated => local(Replicated).map(Term::Whole),
            Partial if alone => local(Partial).map(Term::Partial),
            _ => None,
        }
    }

    fn add(&mut self, lhs: TensorIr, rhs: TensorIr) -> TensorIr {
        let dims = lhs.shape.as_slice().iter().zip(rhs.shape.as_slice()).map(|(a, b)| *a.max(b));
        let shape = Shape::from(dims.collect::<Vec<_>>());
        let out = TensorIr::uninit(self.fresh(), shape, lhs.dtype);
        self.operations.push(sum(lhs, rhs, out.clone()));
        out
    }

    /// Makes a sum that was waiting: whole, or split when the partial term has the dim.
    pub(super) fn settle(&mut self, id: TensorId, want: Layout) -> TensorIr {
        let held = &self.held[&id];
        let Origin::Waiting(WaitingSum { partial, whole }) = held.origin.clone() else { return self.get(id, want) };
        let global = held.global.clone();
        let spans = |term: &TensorIr, dim: usize| term.shape[dim] == global.shape[dim];
        let (layout, dim) = match want {
            Sharded(dim) if spans(&partial, dim) && !self.is_wanted_whole(id) => (want, Some(dim)),
            _ => (Replicated, None),
        };
        let local = if dim.is_some() { self.fresh() } else { id };
        let out = self.held[&id].local(layout, local, self.options.degree);
        let part = |pass: &mut Self, term: &TensorIr, dim: usize| {
            let mut part = TensorIr { id: pass.fresh(), ..term.clone() };
            part.shape[dim] /= pass.options.degree;
            part
        };
        let dims = partial.shape.to_vec();
        let (reduced, whole) = match dim {
            Some(dim) => {
                let reduced = part(self, &partial, dim);
                self.collective(CollectiveKind::ReduceScatter, dims, partial, reduced.clone(), &[dim]);
                let whole = match spans(&whole, dim) {
                    false => whole,
                    true => {
                        let own = part(self, &whole, dim);
                        self.take_part(whole, own.clone(), dim);
                        own
                    }
                };
                (reduced, whole)
            }
            None => {
                let reduced = TensorIr { id: self.fresh(), ..partial.clone() };
                self.collective(CollectiveKind::AllReduce, dims, partial, reduced.clone(), &[]);
                (reduced, whole)
            }
        };
        self.operations.push(sum(reduced, whole, out));
        if let Some(held) = self.held.get_mut(&id) {
            held.origin = Origin::Made;
            held.add(layout, local);
        }
        self.get(id, want)
    }
}

fn sum(lhs: TensorIr, rhs: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::NumericFloat(out.dtype, NumericOperationIr::Add(BinaryOpIr { lhs, rhs, out }))
}
