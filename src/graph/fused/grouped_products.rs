//! Products of one left factor as one operation: queries, keys and values of one input, or gate and up.
//!
//! (A grouped GEMM.) The threads of a rank share out the parts of all of them together, and wait for each other once;
//! one thread takes as long as for each by itself. One product of weights that are put beside each other would copy the
//! weights in every step, and gain no more.

use std::collections::HashMap;

use burn_ir::{CustomOpIr, MatmulOpIr, OperationIr, TensorId, TensorIr};

use super::super::custom::CustomOps;
use super::super::graph_error;
use super::super::instruction::Item;
use super::super::operation::{Class, build, matmul, reshape, swap_dims};
use super::fusion_group::LONGEST;
use super::multiply::{WantedProduct, multiplies, multiply};
use crate::tensor::PlainTensor;

/// The custom operation; its inputs are factors, pair by pair, one for each output.
pub(crate) const GROUPED_PRODUCTS: &str = "burn_parallel::grouped_products";

/// As many as a layer has of one input. More would be in memory at once for no gain.
const MOST: usize = 4;

/// Whether an operation is products as one.
pub(crate) fn are_grouped_products(op: &OperationIr) -> bool {
    matches!(op, OperationIr::Custom(op) if op.id == GROUPED_PRODUCTS)
}

/// Adds the operation that runs them.
pub(super) fn register(ops: &mut CustomOps) {
    let memory = ops.memory().clone();
    ops.register(GROUPED_PRODUCTS, move |op, inputs| {
        let inputs = inputs.into_iter().map(PlainTensor::into_flex).collect::<Result<Vec<_>, _>>()?;
        let first = op.outputs.first().ok_or_else(|| graph_error("products give nothing"))?;
        let wanted = op.outputs.iter().zip(inputs.chunks_exact(2)).map(|(out, factors)| WantedProduct {
            factors: vec![[&factors[0], &factors[1]]],
            dims: &out.shape,
            room: memory.room(out),
        });
        Ok(multiply(wanted.collect(), first.dtype).into_iter().map(PlainTensor::from_flex).collect())
    });
}

/// Products that become one operation, where the first of them was.
struct OpenGroup {
    place: usize,
    /// What all read, under whichever dims, and the dims under which they do.
    left: (TensorId, Vec<usize>),
    products: Vec<MatmulOpIr>,
}

#[derive(Default)]
struct ProductGrouping {
    /// What is at each place of the program.
    done: Vec<Vec<Item>>,
    /// Where each tensor is made.
    makers: HashMap<TensorId, usize>,
    open: Option<OpenGroup>,
}

/// The program with products of one left factor as one operation each, if no other product and no more than [`LONGEST`]
/// places are between them: what a product gives is in memory until it is read.
pub(super) fn products_grouped(items: Vec<Item>) -> Vec<Item> {
    let mut grouping = ProductGrouping::default();
    items.into_iter().for_each(|item| grouping.take(item));
    grouping.close();
    grouping.done.into_iter().flatten().collect()
}

impl ProductGrouping {
    fn take(&mut self, item: Item) {
        let place = self.done.len();
        let mut here = Vec::new();
        match item {
            Item::Run(op) => match matmul(&op).filter(|product| multiplies(product.out.dtype)) {
                Some(product) => self.take_product(product.clone(), place),
                None => {
                    if matches!(Class::of(&op), Class::Product | Class::Custom) {
                        self.close();
                    }
                    self.makers.extend(op.outputs().map(|out| (out.id, place)));
                    here.push(Item::Run(op));
                }
            },
            item => here.push(item),
        }
        self.done.push(here);
    }

    fn take_product(&mut self, product: MatmulOpIr, place: usize) {
        let left = (self.under_other_dims(product.lhs.id), product.lhs.shape.to_vec());
        if let Some(views) = self.views_ahead(&product, &left)
            && let Some(group) = &mut self.open
        {
            for view in views {
                let moved = std::mem::take(&mut self.done[view]);
                self.makers.extend(outputs(&moved).map(|out| (out.id, group.place)));
                self.done[group.place].extend(moved);
            }
            self.makers.insert(product.out.id, group.place);
            group.products.push(product);
            return;
        }
        self.close();
        self.makers.insert(product.out.id, place);
        self.open = Some(OpenGroup { place, left, products: vec![product] });
    }

    fn close(&mut self) {
        let Some(OpenGroup { place, products, .. }) = self.open.take() else { return };
        let op = match <[MatmulOpIr; 1]>::try_from(products) {
            Ok([MatmulOpIr { lhs, rhs, out }]) => build::matmul(lhs, rhs, out),
            Err(products) => {
                let (factors, outputs): (Vec<_>, _) = products.into_iter().map(|op| ([op.lhs, op.rhs], op.out)).unzip();
                let inputs = factors.into_iter().flatten().collect();
                let (id, scalars) = (GROUPED_PRODUCTS.into(), Vec::new());
                OperationIr::Custom(CustomOpIr { id, inputs, outputs, scalars })
            }
        };
        self.done[place].push(Item::Run(Box::new(op)));
    }

    /// The tensor that another is under other dims.
    fn under_other_dims(&self, mut id: TensorId) -> TensorId {
        while let Some(view) = self.maker(id).and_then(reshape) {
            id = view.input.id;
        }
        id
    }

    fn maker(&self, id: TensorId) -> Option<&OperationIr> {
        let here = self.done.get(*self.makers.get(&id)?)?;
        here.iter().find_map(|item| match item {
            Item::Run(op) if op.outputs().any(|out| out.id == id) => Some(&**op),
            _ => None,
        })
    }

    /// The places of the views that are to come before the open group for a product to join it; none if it cannot.
    fn views_ahead(&self, product: &MatmulOpIr, left: &(TensorId, Vec<usize>)) -> Option<Vec<usize>> {
        let group = self.open.as_ref()?;
        let dtype = group.products.first()?.out.dtype;
        let is_far = self.done.len() > group.place + LONGEST;
        if group.left != *left || group.products.len() == MOST || product.out.dtype != dtype || is_far {
            return None;
        }
        let mut views = Vec::new();
        [&product.lhs, &product.rhs].iter().all(|factor| self.is_there(group, factor, &mut views)).then_some(views)
    }

    /// Whether a tensor is there before a group, once the views that are added have been moved there.
    fn is_there(&self, group: &OpenGroup, tensor: &TensorIr, views: &mut Vec<usize>) -> bool {
        let Some(place) = self.makers.get(&tensor.id).copied().filter(|place| *place >= group.place) else {
            return true;
        };
        if place == group.place {
            return group.products.iter().all(|product| product.out.id != tensor.id);
        }
        let maker = self.maker(tensor.id);
        let viewed = maker.and_then(|op| reshape(op).map(|view| &view.input).or(swap_dims(op).map(|view| &view.input)));
        let is_there = viewed.is_some_and(|viewed| self.is_there(group, viewed, views));
        if is_there && !views.contains(&place) {
            views.push(place);
        }
        is_there
    }
}

fn outputs(items: &[Item]) -> impl Iterator<Item = &TensorIr> {
    items.iter().flat_map(|item| match item {
        Item::Run(op) => op.outputs().collect(),
        Item::Output(_) => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use burn::module::Module;
    use burn::nn::{Linear, LinearConfig};
    use burn::prelude::*;
    use burn::tensor::module::conv1d;
    use burn::tensor::ops::ConvOptions;
    use burn::tensor::{DType, FloatDType, Shape, activation};

    use super::super::super::{Executor, capture_forward, capture_step};
    use super::*;

    /// How many products there are in each operation of several, and how many are by themselves.
    fn counted<'a>(operations: impl IntoIterator<Item = &'a OperationIr>) -> (Vec<usize>, usize) {
        let (mut groups, mut alone) = (Vec::new(), 0);
        for op in operations {
            match are_grouped_products(op) {
                true => groups.push(op.outputs().count()),
                false => alone += usize::from(matmul(op).is_some()),
            }
        }
        (groups, alone)
    }

    fn of_step<M: Module>(model: &M, loss: impl Fn(&M, Tensor<3>) -> Tensor<1>) -> (Vec<usize>, usize) {
        let input = Tensor::ones([2, 5, 6], &Device::flex().autodiff());
        let executor = Executor::new(capture_step(model, input, loss).unwrap(), CustomOps::new()).unwrap();
        counted(executor.operations())
    }

    fn layers(widths: &[usize], bias: bool) -> Vec<Linear> {
        let device = Device::flex().autodiff();
        widths.iter().map(|width| LinearConfig::new(6, *width).with_bias(bias).init(&device)).collect()
    }

    #[test]
    fn layers_of_one_input_are_one_operation_forward() {
        let each = |layers: &Vec<Linear>, x: Tensor<3>| {
            layers.iter().map(|layer| layer.forward(x.clone()).powi_scalar(2).mean()).reduce(|a, b| a + b).unwrap()
        };
        for bias in [false, true] {
            // Products that give gradients of weights have another left factor each.
            assert_eq!(of_step(&layers(&[6, 2, 2], bias), each), (vec![3], 3), "queries, keys, values");
            assert_eq!(of_step(&layers(&[17, 17], bias), each), (vec![2], 2), "gate and up");
            assert_eq!(of_step(&layers(&[3; 6], bias), each), (vec![4, 2], 6), "not too many at once");
            assert_eq!(of_step(&layers(&[6], bias), each), (vec![], 2));
        }
    }

    #[test]
    fn what_others_make_in_between_stays_before() {
        let experts = |layers: &Vec<Linear>, x: Tensor<3>| {
            let expert = |gate: usize| {
                let inner = activation::silu(layers[gate].forward(x.clone())) * layers[gate + 1].forward(x.clone());
                layers[gate + 2].forward(inner)
            };
            (expert(0) + expert(3)).powi_scalar(2).mean()
        };
        let mut model = layers(&[8, 8, 6, 8, 8, 6], true);
        let device = Device::flex().autodiff();
        for down in [2, 5] {
            model[down] = LinearConfig::new(8, 6).init(&device);
        }
        assert_eq!(of_step(&model, experts).0, [2, 2], "a layer behind ends the group of its expert");
    }

    /// `x W` and what a closure makes of both, in a forward pass.
    fn of_forward(dtype: FloatDType, second: impl Fn([Tensor<2>; 3]) -> Tensor<2>) -> (Vec<usize>, usize) {
        let device = Device::flex();
        let model: Linear = LinearConfig::new(1, 1).init(&device);
        let square = || Tensor::<2>::ones([4, 4], &device).cast(dtype);
        let captured = capture_forward(&model, (square(), square()), |_: &Linear, (x, w): (Tensor<2>, Tensor<2>)| {
            let first = x.clone().matmul(w.clone());
            vec![first.clone(), second([x, w, first])]
        });
        counted(Executor::new(captured.unwrap().graph, CustomOps::new()).unwrap().operations())
    }

    #[test]
    fn factors_that_are_there_and_factors_that_are_not() {
        assert_eq!(of_forward(FloatDType::F32, |[x, w, _]| x.matmul(w.transpose())), (vec![2], 0), "a view of one");
        assert_eq!(of_forward(FloatDType::F64, |[x, w, _]| x.matmul(w)), (vec![2], 0));
        let views = |[x, w, _]: [Tensor<2>; 3]| {
            let turned = w.transpose().reshape([2, 8]).transpose().reshape([4, 4]);
            x.clone().matmul(turned.clone()) + x.matmul(turned.transpose()).exp()
        };
        assert_eq!(of_forward(FloatDType::F32, views), (vec![3], 0), "views of a view");
        let narrow = |[x, w, _]: [Tensor<2>; 3]| {
            let [half, by] = [&x, &w].map(|factor| factor.clone().cast(FloatDType::BF16));
            half.matmul(by).cast(FloatDType::F32) + x.matmul(w.transpose())
        };
        assert_eq!(of_forward(FloatDType::F32, narrow), (vec![], 3), "one of burn's in between");
        assert_eq!(of_forward(FloatDType::F32, |[x, _, first]| x.matmul(first)), (vec![], 2), "the other product");
        assert_eq!(of_forward(FloatDType::F32, |[x, _, first]| x.matmul(first.transpose())), (vec![], 2));
        assert_eq!(of_forward(FloatDType::F32, |[x, w, _]| x.matmul(w.exp())), (vec![], 2), "made later");
        assert_eq!(of_forward(FloatDType::F32, |[x, w, _]| x.transpose().matmul(w)), (vec![], 2), "another factor");
        assert_eq!(of_forward(FloatDType::BF16, |[x, w, _]| x.matmul(w)), (vec![], 2), "burn multiplies these");
    }

    #[test]
    fn what_is_far_away_is_made_where_it_is_read() {
        let behind = |others: usize| {
            of_forward(FloatDType::F32, |[x, w, _]| {
                let other = (0..others).fold(w.clone(), |other, _| other.sin());
                x.matmul(w) + other
            })
        };
        assert_eq!([behind(LONGEST / 2), behind(LONGEST)], [(vec![2], 0), (vec![], 2)]);
        let behind_convolution = |[x, w, _]: [Tensor<2>; 3]| {
            let options = ConvOptions::new([1], [0], [1], 1);
            let other = conv1d(x.clone().unsqueeze(), w.clone().unsqueeze_dim(2), None, options);
            x.matmul(w) + other.squeeze_dim(0)
        };
        assert_eq!(of_forward(FloatDType::F32, behind_convolution), (vec![], 2));
    }

    /// What a pass has put between the start and the end of a collective stays there.
    #[test]
    fn an_operation_of_this_crate_ends_a_group() {
        let tensor = |number| TensorIr::uninit(TensorId::new(number), Shape::from([4, 4]), DType::F32);
        let item = |op| Item::Run(Box::new(op));
        let product = |by, out| item(build::matmul(tensor(0), tensor(by), tensor(out)));
        let collective = || {
            let (inputs, outputs, scalars) = (vec![tensor(5)], vec![tensor(6)], Vec::new());
            item(OperationIr::Custom(CustomOpIr { id: "collective".into(), inputs, outputs, scalars }))
        };
        let found = |items| {
            let items = products_grouped(items);
            counted(items.iter().filter_map(|item| match item {
                Item::Run(op) => Some(&**op),
                Item::Output(_) => None,
            }))
        };
        assert_eq!(found(vec![collective(), product(1, 3), product(2, 4)]), (vec![2], 0));
        assert_eq!(found(vec![product(1, 3), collective(), product(2, 4)]), (vec![], 2));
    }
}
