//! What can be reached from a product: the operations that attention is made of, and what each is in it.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::DType;
use burn_ir::{MatmulOpIr, OperationIr, TensorIr};

use super::super::super::operation::{matmul, swap_dims};
use super::super::fusion_group::MOST;
use super::super::work::{Work, is_wide};
use super::flat_program::FlatProgram;

/// What an operation is in a web.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// A product that the loop reads.
    Enters,
    Loops,
    /// Rows and columns swapped, for a product.
    Turns,
    /// A product with what the loop gives.
    Leaves,
}

/// Operations by their places in the program.
#[derive(Debug, Default)]
pub(super) struct Web {
    pub(super) dims: Vec<usize>,
    /// Whether all of it is computed in `f64`, else nothing.
    pub(super) wide: bool,
    pub(super) roles: BTreeMap<usize, Role>,
    /// Operations that make the same number everywhere, which each phase does for itself.
    pub(super) fills: BTreeSet<usize>,
}

impl FlatProgram<'_> {
    /// What can be reached from a product; none if that is not all of attention.
    pub(super) fn web(&self, first: usize) -> Option<Web> {
        let MatmulOpIr { lhs, rhs, out } = matmul(self.op(first)?)?;
        let known = matches!(out.dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16);
        let fits = known && out.shape.num_dims() >= 3 && out.shape.num_elements() > 0;
        if !(fits && self.is_computed(lhs) && self.is_computed(rhs)) {
            return None;
        }
        let mut web = Web { dims: out.shape.to_vec(), wide: out.dtype == DType::F64, ..Web::default() };
        web.roles.insert(first, Role::Enters);
        let mut reached = vec![out];
        let mut reduces = false;
        while let Some(tensor) = reached.pop() {
            let is_turned = self.role(&web, tensor) == Some(Role::Turns);
            for place in self.readers(tensor.id) {
                let op = self.op(*place)?;
                if web.roles.contains_key(place) {
                    continue;
                }
                let role = web.role_of(op, tensor, is_turned)?;
                if web.roles.insert(*place, role).is_none() && web.roles.len() > 4 * MOST {
                    return None;
                }
                if role == Role::Leaves {
                    continue;
                }
                reached.extend(op.outputs());
                reduces |= matches!(Work::of(op), Some((Work::Reduce(..), _)));
                for input in op.inputs() {
                    let Some((maker, op)) = self.maker(input).filter(|(maker, _)| !web.roles.contains_key(maker))
                    else {
                        continue;
                    };
                    if matches!(Work::of(op), Some((Work::Fill(_), _))) {
                        web.fills.insert(maker);
                    } else if matmul(op).is_some() && is_wide(op) == web.wide && *input.shape.as_slice() == *web.dims {
                        web.roles.insert(maker, Role::Enters);
                        reached.push(input);
                    }
                }
            }
        }
        // A product that enters is of none of its tensors, one that leaves of one.
        let is_one_of_its = |place: usize, op: &OperationIr| {
            let factors = op.inputs().filter(|input| self.is_of(&web, input)).count();
            match web.roles[&place] {
                Role::Enters => factors == 0,
                Role::Leaves => factors == 1,
                Role::Loops | Role::Turns => true,
            }
        };
        let mut members = web.roles.keys().filter_map(|place| Some((*place, self.op(*place)?)));
        (reduces && members.all(|(place, op)| is_one_of_its(place, op))).then_some(web)
    }

    fn role(&self, web: &Web, tensor: &TensorIr) -> Option<Role> {
        web.roles.get(self.makers.get(&tensor.id)?).copied()
    }

    /// Whether a tensor is one of those that are never whole in memory.
    pub(super) fn is_of(&self, web: &Web, tensor: &TensorIr) -> bool {
        self.role(web, tensor).is_some_and(|role| role != Role::Leaves)
    }
}

impl Web {
    /// What an operation is that reads one of its tensors; none if it does not belong there.
    fn role_of(&self, op: &OperationIr, tensor: &TensorIr, is_turned: bool) -> Option<Role> {
        let [batch @ .., rows, columns] = &self.dims[..] else { return None };
        // A mask may come of scores in another dtype, which are a web of their own.
        if is_wide(op) != self.wide {
            return None;
        }
        if let Some(product) = matmul(op) {
            let dims: &[usize] = &product.out.shape;
            let of: &[usize] = &tensor.shape;
            let is_whole = if is_turned { of.ends_with(&[*columns, *rows]) } else { *of == *self.dims };
            let same = dims.len() == self.dims.len() && dims.starts_with(batch) && product.out.dtype == tensor.dtype;
            return (is_whole && same && product.lhs.id != product.rhs.id).then_some(Role::Leaves);
        }
        if is_turned {
            return None;
        }
        if let Some(swap) = swap_dims(op) {
            let last = self.dims.len() - 1;
            let turns = (swap.dim1.min(swap.dim2), swap.dim1.max(swap.dim2)) == (last - 1, last);
            return (turns && *swap.input.shape.as_slice() == *self.dims).then_some(Role::Turns);
        }
        let (work, out) = Work::of(op)?;
        let fits = |tensor: &TensorIr| {
            let dims: &[usize] = &tensor.shape;
            *dims == *self.dims || dims.split_last() == Some((&1, &self.dims[..self.dims.len() - 1]))
        };
        // Tiles have all rows of a matrix, under these dims.
        let of_tiles = match work {
            Work::Unary(..) | Work::Binary(..) | Work::Scalar(..) | Work::Choose(..) => true,
            Work::Reduce(..) | Work::PlaceOfMax(..) | Work::AddAt(..) => true,
            Work::Fill(..) | Work::Reshape(..) | Work::Pick(..) | Work::AddRows(..) => false,
        };
        (fits(work.over(out)) && fits(out) && of_tiles).then_some(Role::Loops)
    }
}
