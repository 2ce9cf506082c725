//! Products that share what they read, and tensors that are read in parts: captured steps against eager burn, over
//! several steps of an optimizer.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::{FloatDType, activation};
use burn_parallel::graph::{CustomOps, Executor, Forward, TensorTree, capture_forward, capture_step};

use crate::common::fill::filled;
use crate::common::models::*;
use crate::common::reference::{all_same, alone, close, gradient_values, optimizer, own, values};

const WIDTH: usize = 12;
const STEPS: usize = 3;

/// Layers of a decoder block whose keys and values may have fewer heads than its queries.
#[derive(Module, Debug)]
struct Block {
    first: Linear,
    queries: Linear,
    keys: Linear,
    values: Linear,
    low: Linear,
    high: Linear,
    output: Linear,
    gate: Linear,
    up: Linear,
    /// All of attention's factors at once, and gate and up.
    together: Linear,
    wide: Linear,
    down: Linear,
}

#[derive(Clone, Copy, Default)]
struct Kind {
    groups: usize,
    bias: bool,
    /// Queries with an adapter of low rank beside.
    adapted: bool,
    tied: bool,
    together: bool,
    turned: bool,
}

impl Block {
    fn new(kind: Kind) -> Self {
        let layer = |from, to| LinearConfig::new(from, to).with_bias(kind.bias).init(&device());
        let keys = WIDTH / kind.groups;
        filled(Self {
            first: layer(WIDTH, WIDTH),
            queries: layer(WIDTH, WIDTH),
            keys: layer(WIDTH, keys),
            values: layer(WIDTH, keys),
            low: layer(WIDTH, 2),
            high: layer(2, WIDTH),
            output: layer(WIDTH, WIDTH),
            gate: layer(WIDTH, 20),
            up: layer(WIDTH, 20),
            together: layer(WIDTH, WIDTH + 2 * keys),
            wide: layer(WIDTH, 40),
            down: layer(20, WIDTH),
        })
    }

    fn loss(&self, x: Tensor<3>, kind: Kind) -> Tensor<1> {
        let x = self.first.forward(x).tanh();
        let keys = WIDTH / kind.groups;
        let [mut query, key, value] = match kind.together {
            true => {
                let all = self.together.forward(x.clone());
                [(0, WIDTH), (WIDTH, keys), (WIDTH + keys, keys)].map(|(from, size)| all.clone().narrow(2, from, size))
            }
            false => [&self.queries, &self.keys, &self.values].map(|layer| layer.forward(x.clone())),
        };
        if kind.adapted {
            query = query + self.high.forward(self.low.forward(x.clone())) * 0.5;
        }
        let [batch, rows, _] = x.dims();
        let by_heads = |x: Tensor<3>| {
            let heads = x.dims()[2] / 4;
            let x = x.reshape([batch, rows, heads, 4]).swap_dims(1, 2).unsqueeze_dim::<5>(2);
            x.expand([batch, heads, 3 / heads, rows, 4]).reshape([batch, 3, rows, 4])
        };
        let turn = |x: Tensor<4>| match kind.turned {
            true => {
                let (a, b) = (x.clone().narrow(3, 0, 2), x.clone().narrow(3, 2, 2));
                x * 0.8 + Tensor::cat(vec![b.neg(), a], 3) * 0.6
            }
            false => x,
        };
        let (query, key, value) = (turn(by_heads(query)), turn(by_heads(key)), by_heads(value));
        let seen = activation::softmax(query.matmul(key.swap_dims(2, 3)) * 0.5, 3).matmul(value);
        let x = x + self.output.forward(seen.swap_dims(1, 2).reshape([batch, rows, WIDTH]));
        let inner = match kind.together {
            true => {
                let both = self.wide.forward(x.clone()).chunk(2, 2);
                activation::silu(both[0].clone()) * both[1].clone()
            }
            false => activation::silu(self.gate.forward(x.clone())) * self.up.forward(x.clone()),
        };
        let x = x + self.down.forward(inner);
        let x = if kind.tied { x.matmul(self.first.weight.val().transpose().unsqueeze()) } else { x };
        x.powi_scalar(2).mean()
    }
}

fn trains_as_eager_burn(what: &str, model: &Block, kind: Kind) {
    let batch = |step: usize| Numbers(step as u64).tensor::<3>([2, 7, WIDTH], &device());
    captured_as_alone(what, model, batch, |model, x| model.loss(x, kind));
}

/// Losses, gradients and parameters of each step.
pub fn captured_as_alone<M: Module, I: TensorTree>(
    what: &str,
    model: &M,
    batch: impl Fn(usize) -> I,
    loss: impl Fn(&M, I) -> Tensor<1>,
) {
    let expected = alone(model, STEPS, &batch, &loss);
    for fusion in [true, false] {
        let (mut model, mut optim) = (own(model), optimizer());
        let graph = capture_step(&model, batch(0), &loss).unwrap();
        let mut executor = Executor::new(graph, CustomOps::new().with_fusion(fusion)).unwrap();
        for (step, expected) in expected.iter().enumerate() {
            let found = executor.step(&model, batch(step)).unwrap();
            close(what, expected.loss, scalar(found.loss));
            all_same(what, &expected.gradients, &gradient_values(&model, &found.gradients), 2e-5);
            model = optim.step(0.05, model, found.gradients);
            all_same(what, &expected.after, &values(&model), 2e-5);
        }
    }
}

#[test]
fn what_several_layers_read() {
    for groups in [1, 3] {
        for bias in [false, true] {
            let plain = Kind { groups, bias, ..Kind::default() };
            trains_as_eager_burn(&format!("{groups} {bias}"), &Block::new(plain), plain);
            let tied = Kind { tied: true, turned: true, ..plain };
            trains_as_eager_burn(&format!("{groups} {bias}, tied"), &Block::new(tied), tied);
            let adapted = Kind { adapted: true, ..plain };
            let mut model = Block::new(adapted);
            trains_as_eager_burn(&format!("{groups} {bias}, adapted"), &model, adapted);
            model.queries = model.queries.no_grad();
            model.keys = model.keys.no_grad();
            model.up = model.up.no_grad();
            trains_as_eager_burn(&format!("{groups} {bias}, adapted and frozen"), &model, adapted);
        }
    }
}

#[test]
fn what_is_read_in_parts() {
    for groups in [1, 3] {
        for turned in [false, true] {
            let kind = Kind { groups, bias: turned, turned, together: true, ..Kind::default() };
            let mut model = Block::new(kind);
            trains_as_eager_burn(&format!("{groups} {turned}"), &model, kind);
            model.wide = model.wide.no_grad();
            trains_as_eager_burn(&format!("{groups} {turned}, frozen"), &model, kind);
        }
    }
}

/// Tensors beside each other, of every dtype and of views, by burn and in the memory of steps: the same bits.
#[test]
fn tensors_beside_each_other() {
    let model: Linear = LinearConfig::new(1, 1).init(&Device::flex());
    for dtype in [FloatDType::F32, FloatDType::F64, FloatDType::BF16, FloatDType::F16] {
        let x = Numbers(3).tensor::<3>([6, 33, 40], &Device::flex()).cast(dtype);
        let run = |_: &Linear, x: Tensor<3>| {
            let turned = x.clone().swap_dims(1, 2);
            let cut = turned.clone().slice([0..6, 0..40, 3..5]);
            let wide = x.clone().expand([6, 33, 40]).repeat_dim(0, 9);
            vec![
                Tensor::cat(vec![turned.clone(), cut, turned.clone()], 2),
                Tensor::cat(vec![x.clone(), x.clone()], 1),
                Tensor::cat(vec![wide.clone(), wide], 0),
                Tensor::cat(vec![x.clone()], 1),
                Tensor::cat(vec![x.clone().slice([0..6, 0..33, 0..0]), x], 2),
            ]
        };
        let [fused, plain] = [true, false].map(|fusion| {
            let captured = capture_forward(&model, x.clone(), run).unwrap();
            let mut forward = Forward::new(captured, CustomOps::new().with_fusion(fusion)).unwrap();
            forward.run(&model, x.clone()).unwrap();
            forward.run(&model, x.clone()).unwrap()
        });
        for (fused, plain) in fused.into_iter().zip(plain) {
            assert_eq!(fused.into_data(), plain.into_data(), "{dtype:?}");
        }
    }
}
