//! Relates a merged dim of one tensor of an operation to the others.

use burn_ir::{OperationIr, ShapeOpIr, TensorId, TensorIr};

use super::merge::MergedDim;
use crate::graph::operation::{
    self, AlongDim, AlongDimKind, Form, Reduction, ReductionDims, ReductionKind, is_elementwise,
};
use crate::graph::random::is_counter_based_rng;
use crate::partition::rules::whole;

/// What an operation says of a merged dim of one of its tensors.
#[derive(Debug, Default)]
pub(super) struct Related {
    /// The other tensors that have it.
    pub tensors: Vec<(TensorId, MergedDim)>,
    /// Whether it is taken apart here.
    pub ends: bool,
}

/// What an operation that reads or makes the tensor `id` says of its merged dim; `None` if it needs the merge.
pub(super) fn related(op: &OperationIr, id: TensorId, merge: &MergedDim) -> Option<Related> {
    let is_input = op.inputs().any(|input| input.id == id);
    if is_elementwise(op) {
        return aligned(op, merge);
    }
    if let Some(op) = operation::reshape(op) {
        return reshape(op, is_input, merge);
    }
    match Form::of(op) {
        Form::Reduction(Reduction { by, over, .. }) => match (by, over) {
            (ReductionKind::All | ReductionKind::Any, _) => None,
            (ReductionKind::Sum, over) if over.contains(merge.at) => Some(Related::default()),
            (ReductionKind::Mean, ReductionDims::All) => Some(Related::default()),
            (_, over) => (!over.contains(merge.at)).then(|| together(op, merge)),
        },
        Form::Filled(_) => Some(Related::default()),
        Form::AlongDim(AlongDim { what: AlongDimKind::Softmax | AlongDimKind::LogSoftmax, dim, .. }) => {
            (dim != merge.at).then(|| together(op, merge))
        }
        Form::Matmul(product) => {
            let batch = merge.at + 2 < product.out.shape.num_dims();
            batch.then(|| aligned(op, merge))?
        }
        Form::Custom(_) => is_counter_based_rng(op).then(Related::default),
        form => moved(form, op, is_input, merge),
    }
}

/// Of what moves elements.
fn moved(form: Form<'_>, op: &OperationIr, is_input: bool, merge: &MergedDim) -> Option<Related> {
    let at = merge.at;
    let one = |other: &TensorIr, at| Related { tensors: vec![(other.id, merge.moved_to(at))], ends: false };
    match form {
        Form::SwapDims(swap) => {
            let to = match at {
                at if at == swap.dim1 => swap.dim2,
                at if at == swap.dim2 => swap.dim1,
                at => at,
            };
            Some(one(if is_input { &swap.out } else { &swap.input }, to))
        }
        Form::Permute(permute) if is_input => {
            Some(one(&permute.out, permute.axes.iter().position(|axis| *axis == at)?))
        }
        Form::Permute(permute) => Some(one(&permute.input, *permute.axes.get(at)?)),
        Form::Expand(expand) => {
            let before = expand.out.shape.num_dims().checked_sub(expand.input.shape.num_dims())?;
            if is_input {
                return Some(one(&expand.out, at + before));
            }
            match at.checked_sub(before) {
                Some(at) if expand.input.shape[at] == merge.size() => Some(one(&expand.input, at)),
                _ => Some(Related::default()),
            }
        }
        Form::Slice(slice) => whole(&slice.ranges, &slice.tensor.shape, at).then(|| together(op, merge)),
        Form::SliceAssign(slice) => whole(&slice.ranges, &slice.tensor.shape, at).then(|| together(op, merge)),
        Form::Cat(cat) => (cat.dim != at).then(|| together(op, merge)),
        Form::RepeatDim(repeat) => (repeat.dim != at).then(|| together(op, merge)),
        Form::Flip(flip) => (!flip.axes.contains(&at)).then(|| together(op, merge)),
        _ => None,
    }
}

/// All tensors of an operation, which have it at the same place.
fn together(op: &OperationIr, merge: &MergedDim) -> Related {
    let tensors = op.inputs().chain(op.outputs()).map(|tensor| (tensor.id, merge.clone()));
    Related { tensors: tensors.collect(), ends: false }
}

/// Those tensors of an operation that broadcasts which have more than one place along the dim.
fn aligned(op: &OperationIr, merge: &MergedDim) -> Option<Related> {
    let rank = op.outputs().next()?.shape.num_dims();
    let all: Vec<&TensorIr> = op.inputs().chain(op.outputs()).collect();
    let fits =
        |tensor: &&TensorIr| tensor.shape.num_dims() == rank && [1, merge.size()].contains(&tensor.shape[merge.at]);
    let wide = all.iter().filter(|tensor| tensor.shape.get(merge.at) == Some(&merge.size()));
    let tensors = wide.map(|tensor| (tensor.id, merge.clone())).collect();
    all.iter().all(fits).then_some(Related { tensors, ends: false })
}

fn reshape(op: &ShapeOpIr, is_input: bool, merge: &MergedDim) -> Option<Related> {
    let (this, other) = if is_input { (&op.input, &op.out) } else { (&op.out, &op.input) };
    let before: usize = this.shape.as_slice()[..merge.at].iter().product();
    let dims = other.shape.as_slice();
    let begins = |dim: usize| dims[..dim].iter().product::<usize>();
    if let Some(at) = (0..dims.len()).find(|dim| dims[*dim] == merge.size() && begins(*dim) == before) {
        return Some(Related { tensors: vec![(other.id, merge.moved_to(at))], ends: false });
    }
    // On the other side the parts are dims, or several each.
    let mut bound = before;
    let bounds = merge.factors.iter().map(|factor| {
        bound *= factor;
        bound
    });
    let apart = [before].into_iter().chain(bounds).all(|bound| (0..=dims.len()).any(|dim| begins(dim) == bound));
    apart.then_some(Related { tensors: Vec::new(), ends: is_input })
}
