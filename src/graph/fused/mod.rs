//! Fuses operations on the host: groups of element-wise operations, with what they broadcast, mask, cast and reduce,
//! become one loop over blocks that stay in the caches.
//!
//! [`fuse`] works on a program, after all passes over the graph: it finds the groups ([`fusion_group`]) from operations
//! alone, whatever layers they come from. So softmax, norms, activations and their backwards become one kernel each, or
//! parts of one. A kernel is data ([`kernel`]): instructions over values, each with one element for the block, for each
//! row, or for each place; it is made of burn's operations by [`lower`] and run on Flex tensors by [`run`], split over
//! the threads of the rank. A result takes the memory of an input that nobody else holds; else memory that steps before
//! have used, and that is not zeroed first. Loops go on through tensors under other dims, and through what an index
//! picks of each row: a loss by classes is part of the loop of its log-softmax, forward and backward, without zeros to
//! add to. What burn computes as one, in passes without backward, is taken apart first ([`single`](mod@single)). Matrix
//! products are written into such memory too ([`multiply`](multiply())), those of one left factor as one
//! ([`grouped_products`]), sums of products as one ([`product_sums`]), and tensors beside each other
//! ([`assemble`](assemble()), [`parts`]). Attention, whose tensors between its products are the largest of all, runs
//! tile by tile, loops and products together ([`tiled`](mod@tiled)).
//!
//! # Numbers
//! Sums, products, quotients and roots have the bits that burn gives them, but for sums of matrix products, which are
//! accumulated product by product, and for the signs of zeros that an index leaves. The transcendental functions are
//! those of [`functions`], within 1 unit in the last place in `f32`, and burn's own in `f64`. Sums along a dim are
//! added in another order than burn's. Elements of 16 bits are computed in `f32` and rounded after each operation, as
//! burn does. All results are the same for every number of threads, to the last bit.
//!
//! On other devices nothing is fused here: burn's own fusion does it.

mod assemble;
mod block;
mod functions;
mod fusion_group;
mod grouped_products;
mod kernel;
mod loops;
mod lower;
mod memory;
mod multiply;
mod native;
mod parts;
mod product_sums;
mod products;
mod run;
mod simplify;
mod single;
mod sums;
mod terms;
mod tiled;
mod work;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_ir::{CustomOpIr, OperationIr, ScalarIr, TensorId};

pub(crate) use self::assemble::{assemble, assembles};
use self::fusion_group::{FusionGroup, Grouped, grouped};
use self::grouped_products::{are_grouped_products, products_grouped};
use self::kernel::{Kernel, number};
pub(crate) use self::multiply::{WantedProduct, multiplies, multiply};
use self::parts::parts_assembled;
use self::product_sums::{is_product_sum, products_summed};
use self::products::merged;
use self::single::single;
use self::sums::rows_added;
pub(crate) use self::tiled::TILED;
use self::tiled::{Tiled, tiled};
use self::work::Work;
use super::custom::CustomOps;
use super::graph_error;
use super::instruction::Item;
use super::operation::{cat, matmul};

/// The custom operation that is a kernel; its scalar is the kernel's number.
pub(crate) const FUSED: &str = "burn_parallel::fused";

/// Whether kernels run on a device: on the host.
pub(crate) fn fuses_on(device: &Device) -> bool {
    matches!(device.as_dispatch(), DispatchDevice::Flex(_))
}

/// The kernels of a program.
#[derive(Debug, Default)]
pub(crate) struct Kernels {
    loops: Vec<Kernel>,
    tiled: Vec<Tiled>,
}

impl Kernels {
    /// Whether a result of the kernel that an operation runs may be written over an input of its dims and dtype.
    pub(crate) fn may_take(&self, op: &OperationIr, output: usize, input: usize) -> bool {
        let OperationIr::Custom(op) = op else { return false };
        let kernel = number(&op.scalars).and_then(|number| self.loops.get(number));
        kernel.is_some_and(|kernel| kernel.may_take(output, input))
    }

    /// Adds the operation that runs them.
    pub(crate) fn register(self, ops: &mut CustomOps) {
        grouped_products::register(ops);
        product_sums::register(ops);
        tiled::register(self.tiled, ops);
        if self.loops.is_empty() {
            return;
        }
        let kernels = Arc::new(self.loops);
        let memory = ops.memory().clone();
        ops.register(FUSED, move |op, inputs| {
            let kernel = number(&op.scalars).and_then(|number| kernels.get(number));
            kernel.ok_or_else(|| graph_error(format!("there is no kernel {:?}", op.scalars)))?.run(op, inputs, &memory)
        });
    }
}

/// The input whose memory each result of a kernel takes, if nobody else holds it: as the memory plan has written it
/// behind the kernel's number.
fn takes(op: &CustomOpIr) -> impl Iterator<Item = Option<usize>> {
    let number = |take: Option<&ScalarIr>| match take {
        Some(ScalarIr::UInt(input)) => (*input as usize).checked_sub(1),
        _ => None,
    };
    (1..=op.outputs.len()).map(move |place| number(op.scalars.get(place)))
}

/// The inputs of a kernel whose memory its results take.
pub(crate) fn taken(op: &OperationIr) -> impl Iterator<Item = TensorId> {
    let kernel = match op {
        OperationIr::Custom(op) if op.id == FUSED => Some(op),
        _ => None,
    };
    kernel.into_iter().flat_map(|op| takes(op).flatten().filter_map(|input| op.inputs.get(input))).map(|input| input.id)
}

/// Whether an operation that no kernel runs, but this crate, has results with memory of their own, which lie in order.
pub(crate) fn makes_whole(op: &OperationIr) -> bool {
    let is_product = matmul(op).is_some_and(|product| multiplies(product.out.dtype));
    is_product || is_product_sum(op) || are_grouped_products(op) || cat(op).is_some_and(assembles)
}

/// The sections of a program with their groups fused, which run one after the other with others in between; and the
/// kernels.
pub(crate) fn fuse<const SECTIONS: usize>(sections: [Vec<Item>; SECTIONS]) -> ([Vec<Item>; SECTIONS], Kernels) {
    let operations = sections.iter().flatten().filter_map(|item| match item {
        Item::Run(op) => Some(op),
        Item::Output(_) => None,
    });
    let tensors = operations.flat_map(|op| op.inputs().chain(op.outputs()));
    let mut next_id = tensors.map(|tensor| tensor.id.value() + 1).max().unwrap_or_default();
    let sections = single(sections, &mut next_id);
    let readers = readers(&sections);
    let sections = sections.map(|items| {
        let items = parts_assembled(items, &readers, &mut next_id);
        let items = merged(items, &readers, &mut next_id);
        rows_added(items, &readers, &mut next_id)
    });
    let mut kernels = Kernels::default();
    let sections = tiled(sections, &mut kernels.tiled);
    // What is in tiles is no product any more.
    let readers = self::readers(&sections);
    let sections = sections.map(|items| products_grouped(products_summed(items, &readers, &mut next_id)));
    let readers = self::readers(&sections);
    let sections = sections.map(|items| {
        let found = grouped(items).into_iter();
        found
            .flat_map(|item| match item {
                Grouped::Item(item) => vec![item],
                Grouped::Group(group) => fused(group, &readers, &mut kernels),
            })
            .collect()
    });
    (sections, kernels)
}

/// How often each tensor is read.
fn readers(sections: &[Vec<Item>]) -> HashMap<TensorId, usize> {
    let mut readers: HashMap<TensorId, usize> = HashMap::new();
    for item in sections.iter().flatten() {
        match item {
            Item::Run(op) => op.inputs().for_each(|input| *readers.entry(input.id).or_default() += 1),
            Item::Output(tensor) => *readers.entry(tensor.id).or_default() += 1,
        }
    }
    readers
}

/// A group as one operation; its operations as they are, if there is nothing to gain.
fn fused(group: FusionGroup, readers: &HashMap<TensorId, usize>, kernels: &mut Kernels) -> Vec<Item> {
    let worth = group.is_worth_it();
    let dims = group.dims();
    let operations: Vec<OperationIr> = group.operations.into_values().map(|op| *op).collect();
    let apart = |operations: Vec<OperationIr>| operations.into_iter().map(|op| Item::Run(Box::new(op))).collect();
    if !worth {
        return apart(operations);
    }
    let mut inside: HashMap<TensorId, usize> = HashMap::new();
    for input in operations.iter().flat_map(|op| op.inputs()) {
        *inside.entry(input.id).or_default() += 1;
    }
    let made = operations.iter().flat_map(|op| op.outputs()).map(|out| out.id);
    let mut wanted: HashSet<TensorId> = made.filter(|id| readers.get(id) != inside.get(id)).collect();
    // What others read under other dims is that, once it is there.
    let mut after: Vec<Item> = Vec::new();
    for op in operations.iter().rev() {
        if let Some((Work::Reshape(input), out)) = Work::of(op)
            && wanted.remove(&out.id)
        {
            wanted.insert(input.id);
            after.push(Item::Run(Box::new(op.clone())));
        }
    }
    let Some((kernel, inputs, outputs)) = lower::lower(&operations, &dims, &wanted) else { return apart(operations) };
    kernels.loops.push(kernel);
    let scalars = vec![ScalarIr::UInt(kernels.loops.len() as u64 - 1)];
    let op = CustomOpIr { id: FUSED.into(), inputs, outputs, scalars };
    let kernel = Item::Run(Box::new(OperationIr::Custom(op)));
    std::iter::once(kernel).chain(after.into_iter().rev()).collect()
}

#[cfg(test)]
mod tests {
    use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
    use burn::prelude::*;
    use burn::tensor::activation;

    use super::super::operation::{matmul, op_name};
    use super::super::{CustomOps, Executor, Forward, capture_forward, capture_step};

    /// The operations of a step that are run, by name.
    fn run<const D: usize>(x: Tensor<D>, loss: impl Fn(&LayerNorm, Tensor<D>) -> Tensor<1>) -> Vec<String> {
        let model = LayerNormConfig::new(6).init(&Device::flex().autodiff());
        let graph = capture_step(&model, x, loss).unwrap();
        let executor = Executor::new(graph, CustomOps::new()).unwrap();
        executor.operations().map(op_name).collect()
    }

    fn input() -> Tensor<3> {
        Tensor::ones([2, 5, 6], &Device::flex().autodiff())
    }

    #[test]
    fn a_norm_is_one_loop_forward_and_one_backward() {
        let found = run(input(), |norm, x| norm.forward(x).powi_scalar(2).mean());
        assert_eq!(found.iter().filter(|name| name.contains("fused")).count(), 2, "{found:?}");
        let other = |name: &&String| !name.contains("fused") && !name.contains("Reshape");
        let other: Vec<&String> = found.iter().filter(other).collect();
        assert!(other.len() <= 4, "{other:?}");
    }

    #[test]
    fn a_softmax_is_one_loop_forward_and_one_backward() {
        let found = run(input(), |norm, x| {
            let x = x * norm.gamma.val().reshape([1, 1, 6]);
            let ones = Tensor::ones([2, 6, 3], &x.device());
            activation::softmax(x, 2).matmul(ones).mean()
        });
        let is = |word: &'static str| move |name: &String| name.contains(word);
        let (first, last) = (found.iter().position(is("Matmul")), found.iter().rposition(is("Matmul")));
        let fused = |names: &[String]| names.iter().filter(|name| name.contains("fused")).count();
        let (ahead, behind) = (fused(&found[..first.unwrap()]), fused(&found[last.unwrap()..]));
        assert_eq!((ahead, behind), (1, 1), "{found:?}");
    }

    #[test]
    fn a_loss_by_classes_is_one_loop_forward_and_one_backward() {
        let model: Linear = LinearConfig::new(6, 9).init(&Device::flex().autodiff());
        let classes = Tensor::<2, Int>::zeros([10, 1], &Device::flex());
        let loss = |model: &Linear, (x, classes): (Tensor<3>, Tensor<2, Int>)| {
            let nats = activation::log_softmax(model.forward(x).reshape([10, 9]), 1);
            nats.gather(1, classes).mean().neg()
        };
        let graph = capture_step(&model, (input(), classes), loss).unwrap();
        let executor = Executor::new(graph, CustomOps::new()).unwrap();
        let found: Vec<String> = executor.operations().map(op_name).collect();
        let is = |word: &'static str| move |name: &&String| name.contains(word);
        assert_eq!(found.iter().filter(is("fused")).count(), 2, "{found:?}");
        assert!(
            !found.iter().any(|name| ["Gather", "Scatter", "Add", "Sum"].iter().any(|word| name.contains(word))),
            "{found:?}"
        );
    }

    #[test]
    fn forward_passes_alone_are_loops() {
        let norm: LayerNorm = LayerNormConfig::new(6).init(&Device::flex());
        let x = Tensor::<3>::ones([2, 5, 6], &Device::flex());
        let run = |norm: &LayerNorm, x| activation::log_softmax(activation::softmax(norm.forward(x), 2), 2);
        let forward = Forward::new(capture_forward(&norm, x, run).unwrap(), CustomOps::new()).unwrap();
        let found: Vec<String> = forward.operations().map(op_name).filter(|name| !name.contains("Reshape")).collect();
        assert!(found.len() == 1 && found[0].contains("fused"), "{found:?}");
    }

    #[test]
    fn a_linear_layer_on_a_batch_is_one_product_forward_and_one_for_its_weight() {
        let model: Linear = LinearConfig::new(6, 3).init(&Device::flex().autodiff());
        let loss = |model: &Linear, x| model.forward(x).powi_scalar(2).mean();
        for (fusion, batch) in [(true, 1), (false, 2)] {
            let graph = capture_step(&model, input(), loss).unwrap();
            let executor = Executor::new(graph, CustomOps::new().with_fusion(fusion)).unwrap();
            let batches: Vec<usize> = executor.operations().filter_map(matmul).map(|op| op.out.shape[0]).collect();
            assert_eq!(batches, [batch; 2]);
        }
    }
    /// The output layer has the weight of an embedding, transposed: one product gives its gradient as it lies, and the
    /// embedding adds rows to that.
    #[test]
    fn a_tied_weight_has_one_gradient() {
        let model: Embedding = EmbeddingConfig::new(9, 6).init(&Device::flex().autodiff());
        let tokens = Tensor::<2, Int>::zeros([2, 5], &Device::flex());
        let loss = |model: &Embedding, tokens| {
            let weight = model.weight.val().transpose().unsqueeze();
            model.forward(tokens).tanh().matmul(weight).powi_scalar(2).mean()
        };
        let found = |fusion| {
            let graph = capture_step(&model, tokens.clone(), loss).unwrap();
            let executor = Executor::new(graph, CustomOps::new().with_fusion(fusion)).unwrap();
            let products = executor.operations().filter_map(matmul).map(|op| op.out.shape.to_vec()).collect::<Vec<_>>();
            let names: Vec<String> = executor.operations().map(op_name).collect();
            let is = |word: &'static str| names.iter().any(|name| name.contains(word));
            (products, is("EmbeddingBackward"), is("SelectAssign"))
        };
        let (products, whole, rows) = found(true);
        assert!(products.contains(&vec![1, 9, 6]) && !whole && rows, "{products:?} {whole} {rows}");
        let (products, whole, rows) = found(false);
        assert!(!products.contains(&vec![1, 9, 6]) && whole && !rows, "{products:?} {whole} {rows}");
    }
}
