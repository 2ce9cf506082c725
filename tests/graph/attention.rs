//! Attention in tiles against the same operations one by one.

use burn::module::Module;
use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, generate_autoregressive_mask};
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::module::attention as attention_of;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{FloatDType, activation};
use burn_parallel::graph::{CustomOps, Executor, Forward, TensorTree, capture_forward, capture_step};

use crate::common::models::*;
use crate::common::reference::{difference, gradient_values};

/// Loss and gradients fused are those of one by one.
fn compare<M: Module, I: TensorTree + Clone>(
    what: &str,
    model: &M,
    inputs: I,
    bound: f32,
    loss: impl Fn(&M, I) -> Tensor<1>,
) {
    let [fused, plain] = [true, false].map(|fusion| {
        let graph = capture_step(model, inputs.clone(), &loss).unwrap();
        let mut executor = Executor::new(graph, CustomOps::new().with_fusion(fusion)).unwrap();
        let first = executor.step(model, inputs.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let again = executor.step(model, inputs.clone()).unwrap();
        assert_eq!(first.loss.to_data(), again.loss.to_data());
        (scalar(first.loss), gradient_values(model, &first.gradients))
    });
    assert!(
        (fused.0 - plain.0).abs() <= bound * (1.0 + plain.0.abs()),
        "{what}: a loss of {} for {}",
        fused.0,
        plain.0
    );
    let worst = difference(&fused.1, &plain.1);
    assert!(worst <= bound, "{what}: gradients differ by {worst}");
}

/// True where a query may not look: at what comes later, and at what `more` says.
fn mask([batch, queries, keys]: [usize; 3], more: impl Fn(usize, usize, usize) -> bool) -> Tensor<3, Bool> {
    let places = (0..batch * queries * keys).map(|place| {
        let (row, key) = (place / keys, place % keys);
        more(row / queries, row % queries, key)
    });
    Tensor::from_data(TensorData::new(places.collect::<Vec<bool>>(), [batch, queries, keys]), &Device::flex())
}

fn attention(width: usize, heads: usize, quiet: bool) -> MultiHeadAttention {
    let config = MultiHeadAttentionConfig::new(width, heads).with_dropout(0.0).with_quiet_softmax(quiet);
    seeded(config.init(&device()))
}

type Inputs = (Tensor<3>, Tensor<3>, Tensor<2, Bool>, Tensor<3, Bool>);

fn inputs(batch: usize, [queries, keys]: [usize; 2], width: usize, mask: Tensor<3, Bool>) -> Inputs {
    let mut numbers = Numbers(11);
    let x = numbers.tensor([batch, queries, width], &device());
    let y = numbers.tensor([batch, keys, width], &device());
    let pad: Vec<bool> = (0..batch * keys).map(|place| place % keys >= keys - (place / keys) % keys.min(7)).collect();
    let pad = Tensor::from_data(TensorData::new(pad, [batch, keys]), &Device::flex());
    (x, y, pad, mask)
}

#[test]
fn attention_of_all_masks() {
    // From one key to more than a tile has, and rows that no tile is a multiple of.
    for (batch, queries, keys, heads, of_head) in
        [(2, 5, 5, 3, 4), (1, 1, 9, 2, 3), (3, 33, 40, 1, 8), (2, 130, 130, 2, 5), (1, 70, 300, 2, 16), (2, 3, 1, 2, 2)]
    {
        let width = heads * of_head;
        let model = attention(width, heads, false);
        let causal = mask([batch, queries, keys], |_, query, key| key > query + keys - queries.min(keys));
        // Some rows see nothing at all, some only what a tile leaves out.
        let odd = mask([batch, queries, keys], |number, query, key| query % 4 == number || key > query || key % 3 == 2);
        let none = mask([batch, queries, keys], |_, _, _| false);
        for (name, mask) in [("causal", causal), ("odd", odd), ("none", none)] {
            for (pads, masks) in [(false, true), (true, false), (true, true), (false, false)] {
                let what = format!("{name} {pads} {masks} {queries} {keys}");
                let inputs = inputs(batch, [queries, keys], width, mask.clone());
                compare(&what, &model, inputs, 2e-5, |model, (x, y, pad, mask)| {
                    let mut input = MhaInput::new(x, y.clone(), y);
                    input = if pads { input.mask_pad(pad) } else { input };
                    input = if masks { input.mask_attn(mask) } else { input };
                    model.forward(input).context.powi_scalar(2).mean()
                });
            }
        }
    }
}

#[test]
fn attention_with_a_quiet_softmax_and_with_its_weights_read() {
    let (model, causal) = (attention(12, 3, true), mask([2, 40, 40], |_, query, key| key > query));
    compare("quiet", &model, inputs(2, [40, 40], 12, causal.clone()), 2e-5, |model, (x, y, _, mask)| {
        model.forward(MhaInput::new(x, y.clone(), y).mask_attn(mask)).context.powi_scalar(2).mean()
    });
    // Then they are in memory.
    compare("weights", &model, inputs(2, [40, 40], 12, causal), 2e-5, |model, (x, y, _, mask)| {
        let output = model.forward(MhaInput::new(x, y.clone(), y).mask_attn(mask));
        output.context.powi_scalar(2).mean() + output.weights.powi_scalar(2).mean()
    });
}

/// Queries, keys and values of one projection, in a dtype.
fn projected(x: Tensor<3>, linear: &[Linear; 3], heads: usize, dtype: FloatDType) -> [Tensor<4>; 3] {
    let [batch, rows, _] = x.dims();
    linear.each_ref().map(|linear| {
        let y = linear.forward(x.clone());
        let of_head = y.dims()[2] / heads;
        y.reshape([batch, rows, heads, of_head]).swap_dims(1, 2).cast(dtype)
    })
}

#[test]
fn attention_of_all_dtypes() {
    let linear = [7, 8, 9].map(|_| seeded(LinearConfig::new(12, 12).init(&device())));
    let x = Numbers(5).tensor::<3>([2, 50, 12], &device());
    let causal = mask([1, 50, 50], |_, query, key| key > query);
    let bounds = [(FloatDType::F32, 2e-5), (FloatDType::F64, 2e-5), (FloatDType::BF16, 2e-2), (FloatDType::F16, 3e-3)];
    for (dtype, bound) in bounds {
        compare(&format!("{dtype:?}"), &linear, (x.clone(), causal.clone()), bound, |linear, (x, mask)| {
            let [query, key, value] = projected(x, linear, 3, dtype);
            let scores = query.matmul(key.swap_dims(2, 3)) * 0.7;
            let scores = scores.mask_fill(mask.unsqueeze::<4>(), f32::NEG_INFINITY);
            activation::softmax(scores, 3).matmul(value).cast(FloatDType::F32).powi_scalar(2).mean()
        });
        compare(&format!("quiet, {dtype:?}"), &linear, (x.clone(), causal.clone()), bound, |linear, (x, mask)| {
            let [query, key, value] = projected(x, linear, 3, dtype);
            // The first row sees nothing.
            let before = Tensor::<2, Bool>::tril_mask([50, 50], -1, &mask.device());
            let mask = mask.unsqueeze::<4>().bool_or(before.unsqueeze());
            let scores = query.matmul(key.swap_dims(2, 3)).mask_fill(mask, f32::NEG_INFINITY);
            activation::quiet_softmax(scores, 3).matmul(value).cast(FloatDType::F32).powi_scalar(2).mean()
        });
    }
}

#[test]
fn attention_written_in_other_ways() {
    let linear = [7, 8, 9].map(|_| seeded(LinearConfig::new(12, 12).init(&device())));
    let x = Numbers(5).tensor::<3>([2, 37, 12], &device());
    let distance = Numbers(6).tensor::<4>([1, 3, 37, 37], &Device::flex());
    let f32 = FloatDType::F32;
    let other = |what: &str, attend: &dyn Fn([Tensor<4>; 3], Tensor<4>) -> Tensor<4>| {
        compare(what, &linear, (x.clone(), distance.clone()), 2e-5, |linear, (x, distance)| {
            attend(projected(x, linear, 3, f32), distance).powi_scalar(2).mean()
        });
    };
    other("bias", &|[query, key, value], bias| {
        activation::softmax(query.matmul(key.swap_dims(2, 3)) + bias, 3).matmul(value)
    });
    other("keys by rows", &|[query, key, value], _| {
        let scores = key.matmul(query.swap_dims(2, 3)).swap_dims(2, 3);
        activation::softmax(scores, 3).matmul(value)
    });
    other("values first", &|[query, key, value], _| {
        let weights = activation::softmax(query.matmul(key.swap_dims(2, 3)), 3);
        value.swap_dims(2, 3).matmul(weights.swap_dims(2, 3)).swap_dims(2, 3)
    });
    other("no softmax", &|[query, key, value], _| {
        let scores = activation::relu(query.matmul(key.swap_dims(2, 3)));
        let sum = scores.clone().sum_dim(3) + 1.0;
        (scores / sum).matmul(value)
    });
    other("twice", &|[query, key, value], _| {
        let weights = activation::softmax(query.matmul(key.swap_dims(2, 3)), 3);
        weights.clone().matmul(weights.matmul(value))
    });
    other("capped", &|[query, key, value], bias| {
        let scores = (query.matmul(key.swap_dims(2, 3)) / 5.0).tanh() * 5.0;
        activation::softmax(scores.mask_fill(bias.greater_elem(0.4), -1e9), 3).matmul(value)
    });
}

/// burn's own attention, with what it can be told, in a step of which it is part.
#[test]
fn burns_own_attention_of_all_kinds() {
    let linear = [7, 8, 9].map(|_| seeded(LinearConfig::new(12, 12).init(&device())));
    let bounds = [(FloatDType::F32, 2e-5), (FloatDType::F64, 2e-5), (FloatDType::BF16, 2e-2), (FloatDType::F16, 3e-3)];
    for (dtype, bound) in bounds {
        let f32 = dtype == FloatDType::F32;
        for [queries, keys] in
            [[37, 37], [33, 70], [130, 130], [1, 9], [5, 1]].into_iter().take(if f32 { 5 } else { 2 })
        {
            let mut numbers = Numbers(5);
            let [x, y] = [queries, keys].map(|rows| numbers.tensor::<3>([2, rows, 12], &device()));
            let bias = numbers.tensor::<4>([2, 3, queries, keys], &Device::flex()).cast(dtype);
            // Some rows see nothing at all.
            let odd = mask([2, queries, keys], |number, query, key| query % 4 == number || key % 3 == 2);
            let most = mask([2, queries, keys], |_, query, key| key > query + 3);
            for kind in (0..8).filter(|kind| f32 || [3, 5, 7].contains(kind)) {
                let options = AttentionModuleOptions {
                    scale: (kind == 1).then_some(0.3),
                    softcap: (kind == 2 || kind == 7).then_some(1.5),
                    is_causal: kind == 3 || kind > 5,
                };
                let hidden = [4, 6, 7].contains(&kind).then(|| odd.clone()).or((kind == 5).then(|| most.clone()));
                let bias = [5, 7].contains(&kind).then(|| bias.clone());
                let what = format!("{dtype:?}, {queries} of {keys}, kind {kind}");
                let inputs = (x.clone(), y.clone(), hidden, bias);
                compare(&what, &linear, inputs, bound, |linear, (x, y, hidden, bias)| {
                    let [query, ..] = projected(x, linear, 3, dtype);
                    let [_, key, value] = projected(y, linear, 3, dtype);
                    let hidden = hidden.map(|mask| mask.unsqueeze_dim::<4>(1).expand([2, 3, queries, keys]));
                    let seen = attention_of(query, key, value, hidden, bias, options);
                    seen.cast(FloatDType::F32).powi_scalar(2).mean() * 10.0
                });
            }
        }
    }
}

/// The same bits with one thread and with several, also where the rows of a few matrices are split over them.
#[test]
fn threads_change_nothing_of_attention() {
    for (batch, tokens, heads, of_head) in [(2, 200, 6, 4), (1, 530, 1, 5), (1, 300, 3, 2)] {
        let model = attention(heads * of_head, heads, false);
        let causal = generate_autoregressive_mask(batch, tokens, &Device::flex());
        let inputs = inputs(batch, [tokens, tokens], heads * of_head, causal);
        let loss = |model: &MultiHeadAttention, (x, y, _, mask): Inputs| {
            model.forward(MhaInput::new(x, y.clone(), y).mask_attn(mask)).context.powi_scalar(2).mean()
        };
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let graph = capture_step(&model, inputs.clone(), loss).unwrap();
                let step = Executor::new(graph, CustomOps::new()).unwrap().step(&model, inputs.clone()).unwrap();
                (step.loss.to_data(), gradient_values(&model, &step.gradients))
            })
        };
        let one = run(1);
        assert_eq!((&one, &one), (&run(2), &run(3)), "{batch} x {heads}, {tokens} tokens");
        compare(&format!("{batch} x {heads}, {tokens} tokens"), &model, inputs, 2e-5, loss);
    }
}

/// A mask's number is rounded with the scores that it is among; rows that see nothing need all columns.
#[test]
fn scores_that_are_rounded_after_their_mask() {
    let linear = [7, 8, 9].map(|_| seeded(LinearConfig::new(6, 6).init(&device())));
    let x = Numbers(5).tensor::<3>([1, 100, 6], &device());
    let mask = mask([1, 100, 100], |_, query, key| key >= 20 || query >= 64);
    // In an f16 others are infinite, and such rows no numbers.
    let (bf16, f16) = (vec![-1e4f32, -1e5, -1e9], vec![-1e4]);
    for (dtype, fills, bound) in [(FloatDType::BF16, bf16, 2e-2), (FloatDType::F16, f16, 3e-3)] {
        for fill in fills {
            let inputs = (x.clone(), mask.clone());
            compare(&format!("{dtype:?} {fill}"), &linear, inputs, bound, |linear, (x, mask)| {
                let [query, key, value] = projected(x, linear, 2, FloatDType::F32);
                let scores = query.matmul(key.swap_dims(2, 3)).mask_fill(mask.unsqueeze::<4>(), fill);
                let weights = activation::softmax(scores.cast(dtype), 3);
                weights.matmul(value.cast(dtype)).cast(FloatDType::F32).powi_scalar(2).mean() * 100.0
            });
        }
    }
    // The maximum is rounded alone.
    for fill in [-1e4f32, -1e5, -1e9] {
        compare(&format!("maximum {fill}"), &linear, (x.clone(), mask.clone()), 2e-2, |linear, (x, mask)| {
            let [query, key, value] = projected(x, linear, 2, FloatDType::F32);
            let scores = query.matmul(key.swap_dims(2, 3)).mask_fill(mask.unsqueeze::<4>(), fill);
            let top = scores.clone().max_dim(3).detach().cast(FloatDType::BF16).cast(FloatDType::F32);
            let weights = (scores - top).exp();
            let weights = weights.clone() / (weights.sum_dim(3) + 1e-6);
            weights.matmul(value).powi_scalar(2).mean() * 100.0
        });
    }
}

#[test]
fn a_mask_of_scores_in_another_dtype() {
    let linear = [7, 8, 9].map(|_| seeded(LinearConfig::new(6, 6).init(&device())));
    let x = Numbers(5).tensor::<3>([2, 20, 6], &device());
    for (of_mask, dtype) in [(FloatDType::F64, FloatDType::F32), (FloatDType::F32, FloatDType::F64)] {
        compare(&format!("{of_mask:?} {dtype:?}"), &linear, x.clone(), 2e-5, |linear, x| {
            let [query, key, value] = projected(x, linear, 2, dtype);
            let low = query.clone().cast(of_mask).matmul(key.clone().cast(of_mask).swap_dims(2, 3)).lower_elem(-0.1);
            let scores = query.matmul(key.swap_dims(2, 3)).mask_fill(low, -1e4);
            activation::softmax(scores, 3).matmul(value).cast(FloatDType::F32).powi_scalar(2).mean()
        });
    }
}

/// A constant of the loop of one attention is a factor of another, or is read by a view for a factor.
#[test]
fn constants_that_others_read_too() {
    let linear = [7, 8, 9].map(|_| seeded(LinearConfig::new(6, 6).init(&device())));
    let x = Numbers(5).tensor::<3>([2, 3, 6], &Device::flex());
    let scores = |query: Tensor<4>, key: &Tensor<4>| query.matmul(key.clone().swap_dims(2, 3));
    let attend = |scores: Tensor<4>, value: &Tensor<4>| activation::softmax(scores, 3).matmul(value.clone());
    for turned in [false, true] {
        let [fused, plain] = [true, false].map(|fusion| {
            let captured = capture_forward(&linear, x.clone(), |linear, x| {
                let [query, key, value] = projected(x, linear, 2, FloatDType::F32);
                let ones = Tensor::<4>::ones([2, 2, 3, 3], &value.device());
                if turned {
                    let weights = activation::softmax(scores(query, &key) / ones.clone(), 3);
                    let twice = weights.clone().matmul(value) * 2.0;
                    return twice + weights.matmul(ones.swap_dims(2, 3));
                }
                let first = attend(scores(query, &key), &ones) + value.clone();
                attend(scores(first, &key) / ones, &value)
            });
            let mut forward = Forward::new(captured.unwrap(), CustomOps::new().with_fusion(fusion)).unwrap();
            let out = forward.run(&linear, x.clone()).unwrap_or_else(|error| panic!("turned {turned}: {error}"));
            out.into_data().iter::<f32>().collect::<Vec<_>>()
        });
        let worst = fused.iter().zip(&plain).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(fused.len() == plain.len() && worst <= 2e-5, "turned {turned}: apart by {worst}");
    }
}
