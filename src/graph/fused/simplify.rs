//! Takes out of a kernel what computes whole rows for one element of each, as a loss by classes and its gradient do.
//! What is left has the same numbers, but for the signs of zeros.

use std::collections::{HashMap, HashSet};

use super::kernel::{BlockOp, Extent, Output, Value};
use super::loops::{Binary, RowReduction, Unary};

/// Instructions with the same results; `known` are the values that are one number.
pub(super) fn simplified(
    code: Vec<BlockOp>,
    extents: &mut Vec<Extent>,
    known: &HashMap<Value, f64>,
    outputs: &[Output],
) -> Vec<BlockOp> {
    let rounded =
        code.iter().filter_map(|op| if let BlockOp::Round { x, .. } = op { Some(*x) } else { None }).collect();
    let zeros = known.iter().filter(|(_, number)| **number == 0.0).map(|(value, _)| *value).collect();
    let mut simple = Simple { extents, rounded, zeros, lone: HashMap::new(), code: Vec::new() };
    code.into_iter().for_each(|op| simple.push(op));
    needed(simple.code, outputs)
}

struct Simple<'a> {
    extents: &'a mut Vec<Extent>,
    /// Values that are rounded once they are made, of which nothing is said here.
    rounded: HashSet<Value>,
    zeros: HashSet<Value>,
    /// Values that are 0 but at one place of each row: the index of that, and what is there.
    lone: HashMap<Value, (Value, Value)>,
    code: Vec<BlockOp>,
}

impl Simple<'_> {
    fn push(&mut self, op: BlockOp) {
        let simple = op.writes().filter(|out| !self.rounded.contains(out)).and_then(|_| self.simple(&op));
        self.code.push(simple.unwrap_or(op));
    }

    /// An instruction for an instruction, behind others that it needs.
    fn simple(&mut self, op: &BlockOp) -> Option<BlockOp> {
        match *op {
            BlockOp::AddAt { out, x, index, add } if self.zeros.contains(&x) => {
                self.lone.insert(out, (index, add));
                None
            }
            BlockOp::Unary { op: Unary::Neg, out, x } => {
                let (index, add) = *self.lone.get(&x)?;
                let neg = self.row();
                self.code.push(BlockOp::Unary { op: Unary::Neg, out: neg, x: add });
                self.lone.insert(out, (index, neg));
                None
            }
            BlockOp::Reduce { op: RowReduction::Sum, out, x } => {
                let (_, x) = *self.lone.get(&x)?;
                Some(BlockOp::Unary { op: Unary::Copy, out, x })
            }
            BlockOp::Binary { op: Binary::Add, out, a, b } => {
                let ((index, add), x) = match (self.lone.get(&a), self.lone.get(&b)) {
                    (_, Some(lone)) => (*lone, a),
                    (Some(lone), _) => (*lone, b),
                    _ => return None,
                };
                Some(BlockOp::AddAt { out, x, index, add })
            }
            BlockOp::Pick { out, x, index } if !self.rounded.contains(&x) => {
                let made = self.code.iter().find(|op| op.writes() == Some(x))?.clone();
                let mut picked = |x: Value| {
                    if self.extents[x] != Extent::Full {
                        return x;
                    }
                    let out = self.row();
                    self.code.push(BlockOp::Pick { out, x, index });
                    out
                };
                match made {
                    BlockOp::Unary { op, x, .. } => Some(BlockOp::Unary { op, out, x: picked(x) }),
                    BlockOp::Binary { op, a, b, .. } => {
                        let (a, b) = (picked(a), picked(b));
                        Some(BlockOp::Binary { op, out, a, b })
                    }
                    _ => None,
                }
            }
            _ => None,
        }
    }

    fn row(&mut self) -> Value {
        self.extents.push(Extent::Row);
        self.extents.len() - 1
    }
}

/// Without what nobody reads; but an index is looked at once.
fn needed(code: Vec<BlockOp>, outputs: &[Output]) -> Vec<BlockOp> {
    let mut read: HashSet<Value> = outputs.iter().filter_map(|output| output.value).collect();
    let mut looked: HashSet<Value> = HashSet::new();
    let mut kept = Vec::new();
    for op in code.into_iter().rev() {
        let index = match op {
            BlockOp::Pick { index, .. } | BlockOp::AddAt { index, .. } => Some(index),
            _ => None,
        };
        // A value that is rounded is read by that, behind what makes it.
        let of = if let BlockOp::Round { x, .. } = op { Some(x) } else { op.writes() };
        let is_read = of.is_none_or(|of| read.contains(&of));
        if is_read || index.is_some_and(|index| !looked.contains(&index)) {
            read.extend(op.reads());
            looked.extend(index);
            kept.push(op);
        }
    }
    kept.reverse();
    kept
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::prelude::*;
    use burn::tensor::activation;

    use super::super::super::capture_step;
    use super::super::super::liveness::program;
    use super::Extent;

    /// Forward the logits with their bias, what they are below the largest, and the exponentials of that; backward
    /// exponentials again, multiplied, and with one element of each row added.
    #[test]
    fn a_loss_by_classes_goes_over_rows_three_times_each_way() {
        let model: Linear = LinearConfig::new(6, 9).init(&Device::flex().autodiff());
        let classes = Tensor::<2, Int>::zeros([10, 1], &Device::flex());
        let x = Tensor::<2>::ones([10, 6], &Device::flex().autodiff());
        let loss = |model: &Linear, (x, classes): (Tensor<2>, Tensor<2, Int>)| {
            activation::log_softmax(model.forward(x), 1).gather(1, classes).mean().neg()
        };
        let (kernels, _) = program(&capture_step(&model, (x, classes), loss).unwrap(), true).fused.unwrap();
        let whole = kernels.loops.iter().map(|kernel| {
            let written = kernel.code.iter().filter_map(|op| op.writes());
            written.filter(|value| kernel.extents[*value] == Extent::Full).count()
        });
        assert_eq!(whole.collect::<Vec<_>>(), [3, 3], "{kernels:?}");
    }
}
