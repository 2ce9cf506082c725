//! Gradients of the parts of a tensor, beside each other: of queries, keys and values that one product gives, of gate
//! and up, of the halves that rotary positions turn.
//!
//! burn puts the gradient of each part into zeros of the size of the whole, and adds these up. Here the parts are
//! written once, where they are wanted.

use std::collections::HashMap;

use burn_ir::{SliceAssignOpIr, TensorId, TensorIr};

use super::super::instruction::Item;
use super::super::operation::{build, is_zeros, slice_assign, sum};
use super::terms::without_terms;

/// A sum of a tensor that is zero but for some parts of it, and perhaps of other terms.
struct PartlyZero {
    /// The dim along which they are beside each other.
    dim: usize,
    /// By where they begin, none over another.
    parts: Vec<(usize, TensorIr)>,
    /// Other terms, as large as the whole.
    others: Vec<TensorIr>,
    /// The operations that make it, which nothing else needs.
    made_by: Vec<usize>,
}

/// The program with the sums of parts that are all of a tensor as these parts beside each other. New tensors are
/// numbered from `next_id`.
pub(super) fn parts_assembled(items: Vec<Item>, readers: &HashMap<TensorId, usize>, next_id: &mut u64) -> Vec<Item> {
    let once = |tensor: &TensorIr| readers.get(&tensor.id) == Some(&1);
    let mut zeros: HashMap<TensorId, usize> = HashMap::new();
    let mut known: HashMap<TensorId, PartlyZero> = HashMap::new();
    let mut done: Vec<Option<Item>> = Vec::with_capacity(items.len());
    for item in items {
        let place = done.len();
        let Item::Run(op) = item else {
            done.push(Some(item));
            continue;
        };
        if is_zeros(&op) {
            zeros.extend(op.outputs().filter(|out| once(out)).map(|out| (out.id, place)));
        }
        if let Some(assign) = slice_assign(&op)
            && let (Some(zeros), Some((dim, start))) = (zeros.remove(&assign.tensor.id), place_of(assign))
        {
            let parts = vec![(start, assign.value.clone())];
            known.insert(assign.out.id, PartlyZero { dim, parts, others: Vec::new(), made_by: vec![zeros, place] });
        }
        if let Some(sum) = sum(&op).filter(|sum| sum.lhs.shape == sum.rhs.shape) {
            let parts = match [&sum.lhs, &sum.rhs].map(|term| known.remove(&term.id).filter(|_| once(term)).ok_or(term))
            {
                [Ok(left), Ok(right)] => left.and(right),
                [Ok(mut parts), Err(term)] | [Err(term), Ok(mut parts)] => {
                    parts.others.push(term.clone());
                    Some(parts)
                }
                [Err(_), Err(_)] => None,
            };
            if let Some(mut parts) = parts {
                if parts.are_all_of(&sum.out) {
                    parts.made_by.iter().for_each(|place| done[*place] = None);
                    let (whole, added) = without_terms(&sum.out, &parts.others, next_id);
                    let beside = parts.parts.into_iter().map(|(_, part)| part).collect();
                    let operations = [build::cat(beside, parts.dim, whole)].into_iter().chain(added);
                    done.extend(operations.map(|op| Some(Item::Run(Box::new(op)))));
                    continue;
                }
                parts.made_by.push(place);
                known.insert(sum.out.id, parts);
            }
        }
        done.push(Some(Item::Run(op)));
    }
    done.into_iter().flatten().collect()
}

/// Along which dim a value is put where, if that is all of the others.
fn place_of(assign: &SliceAssignOpIr) -> Option<(usize, usize)> {
    let (whole, value): (&[usize], &[usize]) = (&assign.out.shape, &assign.value.shape);
    let mut cut = (0..whole.len()).filter(|dim| whole[*dim] != value[*dim]);
    let (dim, None) = (cut.next()?, cut.next()) else { return None };
    let range = assign.ranges.get(dim).filter(|range| range.step == 1)?;
    // Nothing is written the other way round.
    let steps = assign.ranges.iter().all(|range| range.step == 1);
    steps.then(|| (dim, range.to_range(whole[dim]).start))
}

impl PartlyZero {
    /// Both, if they are along one dim and none is over another.
    fn and(mut self, other: Self) -> Option<Self> {
        self.parts.extend(other.parts);
        self.others.extend(other.others);
        self.made_by.extend(other.made_by);
        self.parts.sort_by_key(|(start, _)| *start);
        let size = |part: &TensorIr| part.shape[self.dim];
        let apart = self.parts.windows(2).all(|pair| pair[0].0 + size(&pair[0].1) <= pair[1].0);
        (self.dim == other.dim && apart).then_some(self)
    }

    /// Whether nothing of a tensor is zero, given that no part is over another.
    fn are_all_of(&self, whole: &TensorIr) -> bool {
        self.parts.iter().map(|(_, part)| part.shape[self.dim]).sum::<usize>() == whole.shape[self.dim]
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::prelude::*;
    use burn::tensor::Slice;
    use burn_ir::OperationIr;

    use super::super::super::operation::cat;
    use super::super::super::{CustomOps, Executor, capture_step};
    use super::*;

    /// How many tensors beside each other a step makes, of how many parts, and how many parts it puts into zeros.
    fn found(loss: impl Fn(Tensor<3>) -> Tensor<1>) -> (Vec<usize>, usize) {
        let device = Device::flex().autodiff();
        let model: Linear = LinearConfig::new(6, 12).init(&device);
        let step = |model: &Linear, x| loss(model.forward(x));
        let graph = capture_step(&model, Tensor::<3>::ones([2, 5, 6], &device), step).unwrap();
        let executor = Executor::new(graph, CustomOps::new()).unwrap();
        let operations: Vec<&OperationIr> = executor.operations().collect();
        let beside = operations.iter().filter_map(|op| cat(op)).map(|cat| cat.tensors.len()).collect();
        (beside, operations.iter().filter(|op| slice_assign(op).is_some()).count())
    }

    fn squares(parts: impl IntoIterator<Item = Tensor<3>>) -> Tensor<1> {
        parts.into_iter().map(|part| part.powi_scalar(2).mean()).reduce(|a, b| a + b).unwrap()
    }

    #[test]
    fn parts_that_are_all_of_a_tensor_are_put_beside_each_other() {
        assert_eq!(found(|x| squares(x.chunk(3, 2))), (vec![3], 0));
        assert_eq!(found(|x| squares(x.split_with_sizes(vec![6, 1, 5], 2))), (vec![3], 0));
        assert_eq!(found(|x| squares(x.split(3, 1))), (vec![2], 0), "rows, of which the last are fewer");
        // Halves that turn, and are read as a whole beside.
        let turned = |x: Tensor<3>| {
            let halves = x.clone().chunk(2, 2);
            squares([x * 2.0 + Tensor::cat(vec![halves[1].clone().neg(), halves[0].clone()], 2)])
        };
        assert_eq!(found(turned), (vec![2, 2], 0), "forward and backward");
        // With another term first, and between.
        let beside = |x: Tensor<3>| squares(x.clone().chunk(2, 2)) + (x.clone() * 2.0).tanh().mean() + x.exp().mean();
        assert_eq!(found(beside), (vec![2], 0));
    }

    #[test]
    fn other_parts_stay_in_zeros() {
        assert_eq!(found(|x| squares([x.clone().narrow(2, 0, 4), x.narrow(2, 8, 4)])), (vec![], 2), "a gap");
        assert_eq!(found(|x| squares([x.clone().narrow(2, 0, 7), x.narrow(2, 5, 7)])), (vec![], 2), "twice the same");
        assert_eq!(found(|x| squares([x.clone().narrow(2, 0, 8), x.narrow(2, 4, 4)])), (vec![], 2), "as many as all");
        assert_eq!(found(|x| squares([x.clone().narrow(2, 0, 6), x.narrow(1, 0, 2)])), (vec![], 2), "two dims");
        assert_eq!(found(|x| squares([x.narrow(2, 0, 6)])), (vec![], 1), "one alone");
        let steps = |x: Tensor<3>| {
            let every_other = |from: isize, to| x.clone().slice(s![.., .., Slice::new(from, Some(to), 2)]);
            squares([every_other(0, 6), every_other(3, 9), x.clone().narrow(2, 6, 6)])
        };
        assert_eq!(found(steps), (vec![], 3), "steps");
        let back = |x: Tensor<3>| x.slice(s![.., Slice::new(0, None, -1), 0..6]);
        assert_eq!(found(|x| squares([back(x.clone()), x.narrow(2, 6, 6)])), (vec![], 2), "the other way round");
    }
}
