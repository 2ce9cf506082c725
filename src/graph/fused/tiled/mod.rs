//! Attention in tiles: products, the loop over what they give, and the products with what it gives, for some rows of
//! one matrix of a batch at a time.
//!
//! The scores of attention are the largest tensors of a transformer, and what makes weights of them reads and writes
//! them several times. Here no tensor `[batch, heads, queries, keys]` is made: a tile of a few rows of scores is
//! multiplied, goes through its loop while it is in the caches, and is multiplied again. A row is always there as a
//! whole, so nothing is corrected later on, and the loop is that of [`lower`](super::lower), whatever it scales, masks,
//! or drops. The backward pass makes the tiles of the forward pass anew from what that was made of, instead of keeping
//! them.
//!
//! What is fused is found from the operations ([`find`]): a product of two batches that the step has made, the
//! element-wise operations and reductions over its last dim which it goes through, and the products that these end in.
//! A tile has no more columns than its mask leaves ([`narrowing`]): with a causal mask half of all.

mod enters;
mod find;
mod flat_program;
mod leaves;
mod narrowing;
mod phases;
mod run;
mod web;

use burn::tensor::DType;

pub(super) use self::find::tiled;
pub(super) use self::flat_program::FlatProgram;
use self::narrowing::Narrowing;
use super::super::custom::CustomOps;
use super::super::graph_error;
use super::kernel::{Kernel, number};

/// The custom operation that is attention in tiles; its scalar is the number of what it does.
pub(crate) const TILED: &str = "burn_parallel::tiled";

/// Products, a loop, and products.
#[derive(Debug)]
pub(super) struct Tiled {
    /// Over `[batch.., rows, columns]`. What its results are is never whole in memory.
    kernel: Kernel,
    /// Of the kernel.
    inputs: Vec<Input>,
    entering: Vec<Entering>,
    leaving: Vec<Leaving>,
    narrowing: Option<Narrowing>,
}

/// What a kernel reads.
#[derive(Debug, Clone, Copy)]
enum Input {
    /// An input of the operation.
    Given(usize),
    /// A product.
    Product(usize),
}

/// A product that a kernel reads, of two inputs of the operation.
#[derive(Debug)]
struct Entering {
    left: usize,
    right: usize,
    /// What its elements are rounded to.
    dtype: DType,
}

/// A product with a result of a kernel.
#[derive(Debug)]
struct Leaving {
    /// The result, and whether its rows and columns are swapped before.
    result: usize,
    is_turned: bool,
    /// Whether it is the left factor.
    is_left: bool,
    /// The other factor: an input of the operation.
    other: usize,
    dims: Vec<usize>,
    /// The dims by how they lie in memory, so that no copy is needed where they are put into another order next.
    order: Vec<usize>,
    dtype: DType,
}

impl Leaving {
    /// Whether each row of the kernel adds to all elements of the product, else it gives elements of its own.
    fn adds_up(&self) -> bool {
        self.is_left == self.is_turned
    }
}

/// Adds the operation that runs them.
pub(super) fn register(all: Vec<Tiled>, ops: &mut CustomOps) {
    if all.is_empty() {
        return;
    }
    let memory = ops.memory().clone();
    ops.register(TILED, move |op, inputs| {
        let tiles = number(&op.scalars).and_then(|number| all.get(number));
        tiles.ok_or_else(|| graph_error(format!("there are no tiles {:?}", op.scalars)))?.run(op, inputs, &memory)
    });
}

#[cfg(test)]
mod tests {
    use burn::module::Module;
    use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, generate_autoregressive_mask};
    use burn::nn::{Linear, LinearConfig};
    use burn::prelude::*;
    use burn::tensor::ops::AttentionModuleOptions;
    use burn::tensor::{FloatDType, activation, module};
    use burn_ir::TensorIr;

    use super::super::super::liveness::program;
    use super::super::super::operation::op_name;
    use super::super::super::{CustomOps, Executor, TensorTree, capture_forward, capture_step};

    /// Rows, and columns of scores: no other tensor has these last dims.
    const SCORES: [usize; 2] = [17, 19];

    /// How many operations are in tiles, and how many give scores.
    fn found<M: Module, I: TensorTree>(model: &M, inputs: I, loss: impl Fn(&M, I) -> Tensor<1>) -> (usize, usize) {
        let executor = Executor::new(capture_step(model, inputs, loss).unwrap(), CustomOps::new()).unwrap();
        let tiled = executor.operations().filter(|op| op_name(op).contains(super::TILED)).count();
        let is_whole = |out: &&TensorIr| {
            out.dtype.is_float() && out.shape.num_dims() == 4 && out.shape.as_slice().ends_with(&SCORES)
        };
        let whole = executor.operations().flat_map(|op| op.outputs()).filter(is_whole).count();
        (tiled, whole)
    }

    type Inputs = (Tensor<3>, Tensor<3>, Tensor<3, Bool>);

    fn inputs() -> Inputs {
        let device = Device::flex().autodiff();
        let [rows, columns] = SCORES;
        let mask = generate_autoregressive_mask(2, columns, &Device::flex()).slice([0..2, 0..rows, 0..columns]);
        (Tensor::ones([2, rows, 12], &device), Tensor::ones([2, columns, 12], &device), mask)
    }

    fn attention(dropout: f64) -> MultiHeadAttention {
        MultiHeadAttentionConfig::new(12, 3).with_dropout(dropout).init(&Device::flex().autodiff())
    }

    fn context(model: &MultiHeadAttention, (x, y, mask): Inputs) -> Tensor<1> {
        model.forward(MhaInput::new(x, y.clone(), y).mask_attn(mask)).context.powi_scalar(2).mean()
    }

    #[test]
    fn attention_is_one_operation_forward_and_one_backward() {
        assert_eq!(found(&attention(0.0), inputs(), context), (2, 0));
        let unmasked = |model: &MultiHeadAttention, (x, y, _): Inputs| {
            model.forward(MhaInput::new(x, y.clone(), y)).context.powi_scalar(2).mean()
        };
        assert_eq!(found(&attention(0.0), inputs(), unmasked), (2, 0));
        // What dropout draws is in memory.
        assert_eq!(found(&attention(0.1), inputs(), context).0, 2);
    }

    /// Whether masks leave columns out, forward and backward.
    fn narrowed<M: Module>(model: &M, loss: impl Fn(&M, Inputs) -> Tensor<1>) -> Vec<bool> {
        let (kernels, _) = program(&capture_step(model, inputs(), loss).unwrap(), true).fused.unwrap();
        kernels.tiled.iter().map(|tiled| tiled.narrowing.is_some()).collect()
    }

    #[test]
    fn a_mask_leaves_columns_out() {
        assert_eq!(narrowed(&attention(0.0), context), [true, true]);
        let quiet = MultiHeadAttentionConfig::new(12, 3).with_dropout(0.0).with_quiet_softmax(true);
        assert_eq!(narrowed(&quiet.init(&Device::flex().autodiff()), context), [true, true], "a quiet softmax");
        let linear: Linear = LinearConfig::new(12, 12).init(&Device::flex().autodiff());
        let rounded = |linear: &Linear, (x, y, mask): Inputs| {
            let [query, key] = [x, y].map(|x| linear.forward(x).cast(FloatDType::BF16));
            let scores = query.matmul(key.clone().swap_dims(1, 2)).mask_fill(mask, f32::NEG_INFINITY);
            activation::softmax(scores, 2).matmul(key).cast(FloatDType::F32).powi_scalar(2).mean()
        };
        assert_eq!(narrowed(&linear, rounded), [true, true], "bf16");
    }

    fn by_heads(linear: &Linear, x: Tensor<3>, dtype: FloatDType) -> Tensor<4> {
        let [batch, rows, _] = x.dims();
        linear.forward(x).reshape([batch, rows, 3, 4]).swap_dims(1, 2).cast(dtype)
    }

    /// burn differentiates its maximum too, by the place of it.
    fn burns_own(
        linear: &Linear,
        (x, y, mask): Inputs,
        options: AttentionModuleOptions,
        kind: FloatDType,
    ) -> Tensor<4> {
        let [query, key, value] = [x, y.clone(), y].map(|x| by_heads(linear, x, kind));
        let [rows, columns] = SCORES;
        let mask = (!options.is_causal).then(|| mask.unsqueeze_dim::<4>(1).expand([2, 3, rows, columns]));
        module::attention(query, key, value, mask, None, options).cast(FloatDType::F32)
    }

    #[test]
    fn burns_own_attention_is_one_operation_forward_and_one_backward() {
        let linear: Linear = LinearConfig::new(12, 12).init(&Device::flex().autodiff());
        let kinds = [(false, None), (true, None), (true, Some(2.0))];
        for (is_causal, softcap) in kinds {
            for dtype in [FloatDType::F32, FloatDType::F64, FloatDType::BF16, FloatDType::F16] {
                let options = AttentionModuleOptions { scale: None, softcap, is_causal };
                let step = |linear: &Linear, inputs| burns_own(linear, inputs, options, dtype).powi_scalar(2).mean();
                assert_eq!(found(&linear, inputs(), step), (2, 0), "{is_causal} {softcap:?} {dtype:?}");
                assert_eq!(narrowed(&linear, step), [true, true], "{is_causal} {softcap:?} {dtype:?}");
                let forward = |linear: &Linear, inputs| burns_own(linear, inputs, options, dtype);
                let captured = capture_forward(&linear, inputs(), forward).unwrap();
                let (kernels, _) = program(&captured.graph, true).fused.unwrap();
                let narrowed: Vec<bool> = kernels.tiled.iter().map(|tiled| tiled.narrowing.is_some()).collect();
                assert_eq!(narrowed, [true], "{is_causal} {softcap:?} {dtype:?}");
            }
        }
    }

    #[test]
    fn attention_of_16_bits_is_in_tiles_whatever_its_softmax() {
        let linear: Linear = LinearConfig::new(12, 12).init(&Device::flex().autodiff());
        for dtype in [FloatDType::BF16, FloatDType::F16] {
            for quiet in [false, true] {
                let attend = |linear: &Linear, (x, y, mask): Inputs| {
                    let [query, key, value] = [x, y.clone(), y].map(|x| by_heads(linear, x, dtype));
                    let scores = query.matmul(key.swap_dims(2, 3));
                    let scores = scores.mask_fill(mask.unsqueeze_dim::<4>(1), f32::NEG_INFINITY);
                    let weights = match quiet {
                        true => activation::quiet_softmax(scores, 3),
                        false => activation::softmax(scores, 3),
                    };
                    weights.matmul(value).cast(FloatDType::F32).powi_scalar(2).mean()
                };
                assert_eq!(found(&linear, inputs(), attend), (2, 0), "{dtype:?}, quiet: {quiet}");
                assert_eq!(narrowed(&linear, attend), [true, true], "{dtype:?}, quiet: {quiet}");
            }
        }
    }

    #[test]
    fn forward_passes_alone_are_one_operation() {
        let pad = Tensor::<2, Bool>::from_data([[false; SCORES[1]]; 2], &Device::flex());
        for quiet in [false, true] {
            let model = MultiHeadAttentionConfig::new(12, 3).with_quiet_softmax(quiet).init(&Device::flex());
            let (x, y, mask) = inputs();
            let inputs = (x.inner(), y.inner(), mask, pad.clone());
            let run = |model: &MultiHeadAttention, (x, y, mask, pad): (Tensor<3>, Tensor<3>, _, _)| {
                model.forward(MhaInput::new(x, y.clone(), y).mask_attn(mask).mask_pad(pad)).context
            };
            let captured = capture_forward(&model, inputs, run).unwrap();
            let (kernels, _) = program(&captured.graph, true).fused.unwrap();
            let masks = kernels.tiled.iter().map(|tiled| tiled.narrowing.as_ref().map_or(0, |found| found.masks.len()));
            assert_eq!(masks.collect::<Vec<_>>(), [2], "quiet: {quiet}");
        }
    }

    #[test]
    fn weights_that_are_read_are_in_memory() {
        let (tiled, whole) = found(&attention(0.0), inputs(), |model, (x, y, mask)| {
            let output = model.forward(MhaInput::new(x, y.clone(), y).mask_attn(mask));
            output.context.powi_scalar(2).mean() + output.weights.mean()
        });
        assert!(tiled < 2 && whole > 0, "{tiled} {whole}");
    }
}
