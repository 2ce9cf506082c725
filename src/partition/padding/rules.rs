//! Rules of padding: where a padded dim goes in an operation, and what its elements must be.

use burn_ir::{MatmulOpIr, OperationIr, TensorIr};

use super::content::Content::{self, Finite, Lowest, Wild, Zero};
use super::content::of_elementwise;
use crate::graph::operation::{AlongDim, AlongDimKind, Form, Reduction, ReductionKind, is_elementwise};
use crate::partition::rules::whole;

/// What of an input is padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pad {
    pub(super) dim: usize,
    pub(super) content: Content,
}

/// How an operation runs on padded inputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Follow {
    /// For each input the dim that has to be padded, and with what, unless anything will do.
    pub(super) inputs: Vec<Option<(usize, Option<Content>)>>,
    /// What of the output is padded.
    pub(super) output: Option<Pad>,
}

/// How an operation runs on inputs of which some are padded; `None` if it cannot, and needs them as they were.
pub(super) fn follow(op: &OperationIr, inputs: &[(&TensorIr, Option<Pad>)]) -> Option<Follow> {
    let pads: Vec<Option<Pad>> = inputs.iter().map(|input| input.1).collect();
    if is_elementwise(op) {
        return elementwise(op, inputs);
    }
    match Form::of(op) {
        Form::Reduction(reduction) => {
            let [Some(pad)] = pads[..] else { return None };
            self::reduction(reduction, pad)
        }
        Form::Matmul(op) => matmul(op, &pads),
        Form::Embedding(op) => match pads[..] {
            [Some(Pad { dim: 0, .. }), None] => Some(Follow { inputs: vec![any(0), None], output: None }),
            [Some(Pad { dim, content }), None] => {
                let output = Some(Pad { dim: op.out.shape.num_dims() - 1, content });
                Some(Follow { inputs: vec![any(dim), None], output })
            }
            _ => None,
        },
        Form::EmbeddingBackward(op) => match pads[..] {
            [Some(Pad { dim: 0, .. }), None, None] => {
                Some(Follow { inputs: vec![any(0), None, None], output: Some(Pad { dim: 0, content: Zero }) })
            }
            [Some(Pad { dim: 1, .. }), grad, None] => {
                let last = op.out_grad.shape.num_dims() - 1;
                let content = match grad {
                    Some(Pad { dim, .. }) if dim != last => return None,
                    Some(Pad { content: Zero, .. }) | None => Zero,
                    Some(_) => Wild,
                };
                Some(Follow { inputs: vec![any(1), any(last), None], output: Some(Pad { dim: 1, content }) })
            }
            _ => None,
        },
        Form::AlongDim(AlongDim { what, dim, .. }) if pads[0].is_some_and(|pad| pad.dim == dim) => {
            let output = match what {
                AlongDimKind::Softmax => Some(Pad { dim, content: Zero }),
                AlongDimKind::LogSoftmax => Some(Pad { dim, content: Lowest }),
                AlongDimKind::ArgMax => None,
                _ => return None,
            };
            Some(Follow { inputs: vec![Some((dim, Some(Lowest)))], output })
        }
        form => moving(form, &pads),
    }
}

fn any(dim: usize) -> Option<(usize, Option<Content>)> {
    Some((dim, None))
}

fn elementwise(op: &OperationIr, inputs: &[(&TensorIr, Option<Pad>)]) -> Option<Follow> {
    let out = op.outputs().next()?;
    let mut dims = inputs.iter().filter_map(|(_, pad)| pad.map(|pad| pad.dim));
    let dim = dims.next()?;
    let full = |input: &TensorIr| input.shape[dim] == out.shape[dim];
    // A single place that is spread over others cannot be padded.
    let fits = dims.all(|other| other == dim)
        && inputs
            .iter()
            .all(|(input, pad)| input.shape.num_dims() == out.shape.num_dims() && (pad.is_none() || full(input)));
    if !fits {
        return None;
    }
    // What is not padded yet is with zeros.
    let contents: Vec<Option<Content>> =
        inputs.iter().map(|(input, pad)| full(input).then(|| pad.map_or(Zero, |pad| pad.content))).collect();
    let output = Some(Pad { dim, content: of_elementwise(op, &contents) });
    Some(Follow { inputs: inputs.iter().map(|(input, _)| full(input).then_some((dim, None))).collect(), output })
}

/// Of what moves elements, or reads and writes them at indices.
fn moving(form: Form<'_>, pads: &[Option<Pad>]) -> Option<Follow> {
    let moved = |to: &dyn Fn(usize) -> Option<usize>| {
        let [Some(Pad { dim, content })] = pads[..] else { return None };
        Some(Follow { inputs: vec![any(dim)], output: Some(Pad { dim: to(dim)?, content }) })
    };
    match form {
        Form::Reshape(op) => moved(&|dim| {
            let (from, to) = (op.input.shape.as_slice(), op.out.shape.as_slice());
            let before: usize = from[..dim].iter().product();
            let is = |place: &usize| to[*place] == from[dim] && to[..*place].iter().product::<usize>() == before;
            // There may be several of one place each: then the same, counted from the end.
            (to.len() + dim).checked_sub(from.len()).filter(is).or_else(|| (0..to.len()).find(is))
        }),
        Form::SwapDims(op) => moved(&|dim| match dim {
            dim if dim == op.dim1 => Some(op.dim2),
            dim if dim == op.dim2 => Some(op.dim1),
            dim => Some(dim),
        }),
        Form::Permute(op) => moved(&|dim| op.axes.iter().position(|axis| *axis == dim)),
        Form::Expand(op) => {
            let before = op.out.shape.num_dims().checked_sub(op.input.shape.num_dims())?;
            moved(&|dim| (op.input.shape[dim] == op.out.shape[dim + before]).then_some(dim + before))
        }
        Form::Slice(op) => moved(&|dim| whole(&op.ranges, &op.tensor.shape, dim).then_some(dim)),
        Form::Cat(op) => {
            let mut dims = pads.iter().flatten().map(|pad| pad.dim);
            let dim = dims.next().filter(|dim| *dim != op.dim)?;
            let same = dims.all(|other| other == dim);
            let zero = pads.iter().all(|pad| pad.is_none_or(|pad| pad.content == Zero));
            let output = Some(Pad { dim, content: if zero { Zero } else { Wild } });
            same.then(|| Follow { inputs: vec![any(dim); pads.len()], output })
        }
        // Indices point at nothing that was added.
        Form::Gather(op) => at(op.dim, pads, false),
        Form::Select(op) => at(op.dim, pads, false),
        Form::Scatter(op) => at(op.dim, pads, true),
        Form::SelectAssign(op) => at(op.dim, pads, true),
        _ => None,
    }
}

/// Reads or, keeping the rest, writes at indices along a dim, if that is the one that is padded.
fn at(indexed: usize, pads: &[Option<Pad>], writes: bool) -> Option<Follow> {
    let (Some(pad), others) = (*pads.first()?, &pads[1..]) else { return None };
    let fits = pad.dim == indexed && others.iter().all(Option::is_none);
    let inputs = [any(indexed)].into_iter().chain(others.iter().map(|_| None)).collect();
    fits.then_some(Follow { inputs, output: writes.then_some(pad) })
}

fn reduction(Reduction { by, over, .. }: Reduction<'_>, Pad { dim, content }: Pad) -> Option<Follow> {
    let beside = |content| Some(Follow { inputs: vec![any(dim)], output: Some(Pad { dim, content }) });
    let across = |need| Some(Follow { inputs: vec![Some((dim, Some(need)))], output: None });
    match by {
        ReductionKind::Sum | ReductionKind::Mean if over.contains(dim) => across(Zero),
        ReductionKind::Sum | ReductionKind::Mean => beside(if content == Zero { Zero } else { Wild }),
        ReductionKind::Max if over.contains(dim) => across(Lowest),
        ReductionKind::Max => beside(if content == Wild { Wild } else { Finite }),
        _ => None,
    }
}

fn matmul(op: &MatmulOpIr, pads: &[Option<Pad>]) -> Option<Follow> {
    let rank = op.out.shape.num_dims();
    if rank < 2 || op.lhs.shape.num_dims() != rank || op.rhs.shape.num_dims() != rank {
        return None;
    }
    let (row, column) = (rank - 2, rank - 1);
    let at = |pad: Option<Pad>| pad.map(|pad| pad.dim);
    let kept = |pad: Option<Pad>| if pad.is_some_and(|pad| pad.content == Zero) { Zero } else { Wild };
    let &[lhs, rhs] = pads else { return None };
    match (at(lhs), at(rhs)) {
        // What is contracted: zeros on both sides.
        (Some(contracted), Some(other)) if contracted == column && other == row => both(column, row),
        (Some(contracted), None) if contracted == column => both(column, row),
        (None, Some(contracted)) if contracted == row => both(column, row),
        (Some(dim), None) if dim == row => {
            Some(Follow { inputs: vec![any(row), None], output: Some(Pad { dim: row, content: kept(lhs) }) })
        }
        (None, Some(dim)) if dim == column => {
            Some(Follow { inputs: vec![None, any(column)], output: Some(Pad { dim: column, content: kept(rhs) }) })
        }
        _ => None,
    }
}

fn both(lhs: usize, rhs: usize) -> Option<Follow> {
    Some(Follow { inputs: vec![Some((lhs, Some(Zero))), Some((rhs, Some(Zero)))], output: None })
}
