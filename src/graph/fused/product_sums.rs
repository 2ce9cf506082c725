//! Sums of products as one operation each: the gradient of what several layers have read, queries, keys and values or
//! gate and up.
//!
//! The first product is written, and the others are added to it as they are made: no product has memory of its own, and
//! none is read again to be added.

use std::collections::HashMap;

use burn_ir::{CustomOpIr, MatmulOpIr, OperationIr, TensorId, TensorIr};

use super::super::custom::CustomOps;
use super::super::graph_error;
use super::super::instruction::Item;
use super::super::operation::{build, matmul, reshape, sum};
use super::fusion_group::LONGEST;
use super::multiply::{WantedProduct, multiplies, multiply};
use super::terms::without_terms;
use crate::tensor::PlainTensor;

/// The custom operation that is a sum of products; its inputs are their factors, pair by pair.
pub(crate) const PRODUCT_SUM: &str = "burn_parallel::product_sum";

/// Whether an operation is a sum of products.
pub(crate) fn is_product_sum(op: &OperationIr) -> bool {
    matches!(op, OperationIr::Custom(op) if op.id == PRODUCT_SUM)
}

/// Adds the operation that runs them.
pub(super) fn register(ops: &mut CustomOps) {
    let memory = ops.memory().clone();
    ops.register(PRODUCT_SUM, move |op, inputs| {
        let inputs = inputs.into_iter().map(PlainTensor::into_flex).collect::<Result<Vec<_>, _>>()?;
        let out = op.outputs.first().ok_or_else(|| graph_error("a sum of products gives nothing"))?;
        let factors = inputs.chunks_exact(2).map(|factors| [&factors[0], &factors[1]]).collect();
        let wanted = WantedProduct { factors, dims: &out.shape, room: memory.room(out) };
        Ok(multiply(vec![wanted], out.dtype).into_iter().map(PlainTensor::from_flex).collect())
    });
}

/// What is a product, or a sum of products, and perhaps of other terms.
struct ProductSum {
    factors: Vec<TensorIr>,
    /// As the products give it, which is wanted under other dims perhaps.
    out: TensorIr,
    others: Vec<TensorIr>,
    /// The operations that make it, which nothing else needs.
    made_by: Vec<usize>,
    /// Where the first of its products was.
    since: usize,
}

/// The program with sums of products as one operation each. New tensors are numbered from `next_id`.
pub(super) fn products_summed(items: Vec<Item>, readers: &HashMap<TensorId, usize>, next_id: &mut u64) -> Vec<Item> {
    let mut known: HashMap<TensorId, ProductSum> = HashMap::new();
    let mut done: Vec<Option<Item>> = Vec::with_capacity(items.len());
    for item in items {
        let Item::Run(op) = item else {
            done.push(Some(item));
            continue;
        };
        let place = done.len();
        // What others read too has to be there by itself; and factors are not kept for long.
        let alone = |tensor: &TensorIr| readers.get(&tensor.id) == Some(&1);
        let mut take = |tensor: &TensorIr| {
            known.remove(&tensor.id).filter(|products| alone(tensor) && products.since + LONGEST >= place)
        };
        if let Some(MatmulOpIr { lhs, rhs, out }) = matmul(&op).filter(|product| multiplies(product.out.dtype)) {
            let factors = vec![lhs.clone(), rhs.clone()];
            let (others, made_by) = (Vec::new(), vec![place]);
            known.insert(out.id, ProductSum { factors, out: out.clone(), others, made_by, since: place });
        } else if let Some(view) = reshape(&op)
            && let Some(mut products) = take(&view.input).filter(|products| products.others.is_empty())
        {
            products.made_by.push(place);
            known.insert(view.out.id, products);
        } else if let Some(sum) = sum(&op).filter(|sum| sum.lhs.shape == sum.rhs.shape) {
            match [&sum.lhs, &sum.rhs].map(|term| take(term).ok_or(term)) {
                [Ok(left), Ok(right)] if left.out.shape == right.out.shape => {
                    left.made_by.iter().chain(&right.made_by).for_each(|place| done[*place] = None);
                    let (operations, products) = left.and(right, &sum.out, place, next_id);
                    done.extend(operations.into_iter().map(|op| Some(Item::Run(Box::new(op)))));
                    known.insert(sum.out.id, products);
                    continue;
                }
                [Ok(mut products), Err(term)] | [Err(term), Ok(mut products)] => {
                    products.others.push(term.clone());
                    products.made_by.push(place);
                    known.insert(sum.out.id, products);
                }
                _ => {}
            }
        }
        done.push(Some(Item::Run(op)));
    }
    done.into_iter().flatten().collect()
}

impl ProductSum {
    /// The sum of both, which is `wanted`, made from a place on.
    fn and(self, other: Self, wanted: &TensorIr, place: usize, next_id: &mut u64) -> (Vec<OperationIr>, Self) {
        let chained = |own: Vec<TensorIr>, others| own.into_iter().chain(others).collect::<Vec<TensorIr>>();
        let (factors, others) = (chained(self.factors, other.factors), chained(self.others, other.others));
        let out = TensorIr::uninit(TensorId::new(*next_id), self.out.shape, wanted.dtype);
        *next_id += 1;
        let (rest, added) = without_terms(wanted, &others, next_id);
        let (inputs, outputs) = (factors.clone(), vec![out.clone()]);
        let sum = CustomOpIr { id: PRODUCT_SUM.into(), inputs, outputs, scalars: Vec::new() };
        let mut operations = vec![OperationIr::Custom(sum), build::reshape(out.clone(), rest)];
        operations.extend(added);
        let made_by = (place..place + operations.len()).collect();
        (operations, Self { factors, out, others, made_by, since: self.since.min(other.since) })
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Module;
    use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig};
    use burn::nn::{Linear, LinearConfig};
    use burn::prelude::*;
    use burn::tensor::{FloatDType, activation};

    use super::super::super::operation::op_name;
    use super::super::super::{Executor, TensorTree, capture_forward, capture_step};
    use super::super::grouped_products::are_grouped_products;
    use super::*;

    /// Of how many products each sum is, and how many products are by themselves.
    fn counted<'a>(operations: impl IntoIterator<Item = &'a OperationIr>) -> (Vec<usize>, usize) {
        let (mut sums, mut alone) = (Vec::new(), 0);
        for op in operations {
            let factors = op.inputs().count() / 2;
            match op {
                op if is_product_sum(op) => sums.push(factors),
                op if are_grouped_products(op) => alone += factors,
                op => alone += usize::from(matmul(op).is_some()),
            }
        }
        (sums, alone)
    }

    fn found<M: Module, I: TensorTree>(model: &M, inputs: I, loss: impl Fn(&M, I) -> Tensor<1>) -> (Vec<usize>, usize) {
        let executor = Executor::new(capture_step(model, inputs, loss).unwrap(), CustomOps::new()).unwrap();
        counted(executor.operations())
    }

    fn layers(widths: &[usize], bias: bool) -> Vec<Linear> {
        let device = Device::flex().autodiff();
        widths.iter().map(|width| LinearConfig::new(6, *width).with_bias(bias).init(&device)).collect()
    }

    fn input() -> Tensor<3> {
        Tensor::ones([2, 5, 6], &Device::flex().autodiff())
    }

    /// A step in which all other layers read what the first one gives.
    fn of_one(layers: Vec<Linear>) -> (Vec<usize>, usize) {
        found(&layers, input(), |layers: &Vec<Linear>, x| {
            let x = layers[0].forward(x).tanh();
            layers[1..].iter().map(|layer| layer.forward(x.clone()).powi_scalar(2).mean()).reduce(|a, b| a + b).unwrap()
        })
    }

    /// Forward and for the weight each layer has a product, but one is the gradient of what they read.
    #[test]
    fn layers_of_one_input_have_one_gradient_of_it() {
        for bias in [false, true] {
            assert_eq!(of_one(layers(&[6, 6], bias)), (vec![], 5));
            assert_eq!(of_one(layers(&[6, 6, 2, 2], bias)), (vec![3], 8), "queries, keys, values");
            assert_eq!(of_one(layers(&[6, 17, 17], bias)), (vec![2], 6), "gate and up");
        }
    }

    #[test]
    fn so_do_queries_keys_and_values_of_attention() {
        let device = Device::flex().autodiff();
        let model = (
            LinearConfig::new(6, 6).init(&device),
            MultiHeadAttentionConfig::new(6, 2).with_dropout(0.0).init(&device),
            layers(&[8, 8], false),
        );
        type Model = (Linear, MultiHeadAttention, Vec<Linear>);
        let (sums, _) = found(&model, input(), |(first, attention, layers): &Model, x| {
            let x = attention.forward(MhaInput::self_attn(first.forward(x))).context;
            (activation::silu(layers[0].forward(x.clone())) * layers[1].forward(x)).powi_scalar(2).mean()
        });
        assert_eq!(sums, [2, 3]);
    }

    /// What the layers read goes on beside them as well, and its gradient comes first.
    #[test]
    fn other_terms_wait() {
        let sums = |layers: Vec<Linear>| {
            found(&layers, input(), |layers: &Vec<Linear>, x| {
                let x = layers[0].forward(x).tanh();
                let squares = |x: Tensor<3>| x.powi_scalar(2).mean();
                let layers = layers[1..].iter().map(|layer| squares(layer.forward(x.clone())));
                layers.reduce(|a, b| a + b).unwrap() + squares(x.clone().exp()) + (x + 1.0).mean()
            })
        };
        assert_eq!(sums(layers(&[6, 6, 2, 2], true)).0, [3]);
    }

    /// A layer that is frozen passes its part of the gradient on; one that takes no part has none.
    #[test]
    fn frozen_layers() {
        let mut model = layers(&[6, 6, 2, 2], true);
        model[2] = model[2].clone().no_grad();
        assert_eq!(of_one(model.clone()), (vec![3], 7));
        model[0] = model[0].clone().no_grad();
        assert_eq!(of_one(model), (vec![], 6), "nobody wants the gradient of an input");
    }

    /// Products of a forward alone, between which there are so many other operations.
    fn of_forward(dtype: FloatDType, others: usize, is_read: bool) -> (Vec<usize>, usize) {
        let device = Device::flex();
        let model: Linear = LinearConfig::new(1, 1).init(&device);
        let tensor = |rows, columns| Tensor::<2>::ones([rows, columns], &device).cast(dtype);
        let inputs = (tensor(3, 4), tensor(4, 5), tensor(3, 7), tensor(7, 5));
        type Inputs = (Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>);
        let captured = capture_forward(&model, inputs, |_: &Linear, (a, b, c, d): Inputs| {
            let first = a.matmul(b);
            let c = (0..others).fold(c, |c, _| c.flip([0]));
            let read = if is_read { vec![first.clone()] } else { vec![] };
            [vec![first + c.matmul(d)], read].concat()
        });
        let executor = Executor::new(captured.unwrap().graph, CustomOps::new()).unwrap();
        let names: Vec<String> = executor.operations().map(op_name).collect();
        assert!(names.len() > others, "{names:?}");
        counted(executor.operations())
    }

    #[test]
    fn products_that_are_not_added_up() {
        assert_eq!(of_forward(FloatDType::F32, 3, false), (vec![2], 0));
        assert_eq!(of_forward(FloatDType::F64, 3, false), (vec![2], 0));
        assert_eq!(of_forward(FloatDType::BF16, 3, false), (vec![], 2), "burn multiplies these");
        assert_eq!(of_forward(FloatDType::F32, 3, true), (vec![], 2), "a product that is wanted by itself");
        assert_eq!(of_forward(FloatDType::F32, 40, false), (vec![], 2), "far from each other");
    }
}
