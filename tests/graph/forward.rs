//! Forward passes alone: what burn computes as one operation there, fused and by burn's own.

use burn::nn::attention::{MhaInput, MultiHeadAttentionConfig};
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::module::{attention, layer_norm};
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{FloatDType, activation};
use burn_parallel::graph::{CustomOps, Forward, TensorTree, capture_forward};

use crate::common::models::*;

const DTYPES: [(FloatDType, f64); 4] =
    [(FloatDType::F32, 1e-6), (FloatDType::F64, 1e-12), (FloatDType::BF16, 8e-3), (FloatDType::F16, 1e-3)];

/// Numbers of the results, with operations fused and one by one.
fn both<I, O>(inputs: I, run: impl Fn(&[Linear; 3], I) -> O) -> [Vec<Vec<f64>>; 2]
where
    I: TensorTree + Clone,
    O: TensorTree + Clone + IntoIterator<Item = Tensor<4>> + Send + 'static,
{
    let model = [3, 4, 5].map(|_| seeded(LinearConfig::new(12, 12).init(&Device::flex())));
    [true, false].map(|fusion| {
        let captured = capture_forward(&model, inputs.clone(), &run).unwrap();
        let mut forward = Forward::new(captured, CustomOps::new().with_fusion(fusion)).unwrap();
        let given = forward.run(&model, inputs.clone()).unwrap().into_iter();
        given.map(|tensor| tensor.into_data().iter::<f64>().collect()).collect()
    })
}

fn check(what: &str, [fused, plain]: [Vec<Vec<f64>>; 2], bound: f64) {
    assert_eq!(fused.len(), plain.len());
    for (place, (fused, plain)) in fused.into_iter().zip(plain).enumerate() {
        assert_eq!(fused.len(), plain.len(), "{what}");
        for (a, b) in fused.into_iter().zip(plain) {
            let same = a == b || (a - b).abs() <= bound * (1.0 + b.abs()) || a.is_nan() && b.is_nan();
            assert!(same, "{what}, result {place}: {a} for {b}");
        }
    }
}

/// Of numbers between -1 and 1, with rows of others.
fn rows([batch, rows, columns]: [usize; 3], dtype: FloatDType) -> Tensor<4> {
    let x = Numbers(8).tensor::<4>([1, batch, rows, columns], &Device::flex()) * 4.0;
    let odd = |row: usize, value: f32| {
        let at = x.clone().slice([0..1, 0..batch, row..row + 1, 0..1]);
        (at * 0.0 + value, row)
    };
    let x = [(0, f32::NAN), (1, f32::INFINITY), (2, f32::NEG_INFINITY)]
        .into_iter()
        .filter(|(row, _)| *row < rows)
        .fold(x.clone(), |x, (row, value)| {
            let (value, row) = odd(row, value);
            x.slice_assign([0..1, 0..batch, row..row + 1, 0..1], value)
        });
    x.cast(dtype)
}

#[test]
fn what_burn_computes_as_one() {
    for (dtype, bound) in DTYPES {
        for dims in [[2, 5, 7], [1, 1, 1], [3, 4, 1], [1, 70, 40], [2, 3, 3000]] {
            let columns = dims[2];
            let mut numbers = Numbers(2);
            let mut of_columns = || numbers.tensor::<1>([columns], &Device::flex()).cast(dtype);
            let inputs = (rows(dims, dtype), of_columns(), of_columns());
            let found = both(inputs, |_, (x, gamma, beta): (Tensor<4>, Tensor<1>, Tensor<1>)| {
                vec![
                    activation::softmax(x.clone() * 1.5, 3) + 1.0,
                    activation::softmax(x.clone(), 2),
                    activation::softmin(x.clone(), 3),
                    activation::log_softmax(x.clone(), 3) * 0.5,
                    layer_norm(x.clone() + 0.25, gamma.clone(), Some(beta), 1e-5),
                    layer_norm(x, gamma, None, 1e-3).tanh(),
                ]
            });
            check(&format!("{dtype:?} {dims:?}"), found, 4.0 * bound);
        }
    }
}

/// Of numbers that are there twice, and of what is no number, the first.
#[test]
fn places_of_maxima() {
    for (dtype, _) in DTYPES {
        for dims in [[2, 5, 7], [3, 4, 1], [1, 4, 33], [1, 70, 40], [2, 5, 3000]] {
            let found = both(rows(dims, dtype).round(), |_, x: Tensor<4>| {
                let (max, place) = (x.clone() + 1.0).max_dim_with_indices(3);
                let alone = (x.clone() * 2.0).argmax(3);
                vec![max * 2.0, place.float(), alone.float(), x.argmax(2).float()]
            });
            check(&format!("{dtype:?} {dims:?}"), found, 0.0);
        }
    }
}

/// True where a query may not look.
fn hidden([queries, keys]: [usize; 2], is: impl Fn(usize, usize) -> bool) -> Tensor<4, Bool> {
    let places = (0..queries * keys).map(|place| is(place / keys, place % keys));
    let places = TensorData::new(places.collect::<Vec<bool>>(), [1, 1, queries, keys]);
    Tensor::from_data(places, &Device::flex())
}

fn projected(x: Tensor<3>, linear: &[Linear; 3], dtype: FloatDType) -> [Tensor<4>; 3] {
    let [batch, rows, _] = x.dims();
    linear.each_ref().map(|linear| linear.forward(x.clone()).reshape([batch, rows, 3, 4]).swap_dims(1, 2).cast(dtype))
}

#[test]
fn attention_of_all_kinds() {
    for (dtype, bound) in DTYPES {
        for [queries, keys] in [[40, 40], [33, 70], [1, 9], [3, 1], [70, 33]] {
            let mut numbers = Numbers(5);
            let [x, y] = [queries, keys].map(|rows| numbers.tensor::<3>([2, rows, 12], &Device::flex()));
            let bias = numbers.tensor::<4>([2, 3, queries, keys], &Device::flex()).cast(dtype);
            let odd = hidden([queries, keys], |query, key| query % 5 == 1 || key % 3 == 2);
            let found = both((x, y, odd, bias), |linear, (x, y, odd, bias)| {
                let [query, ..] = projected(x, linear, dtype);
                let [_, key, value] = projected(y, linear, dtype);
                let own = |mask: Option<Tensor<4, Bool>>, bias: Option<Tensor<4>>, options| {
                    let mask = mask.map(|mask| mask.expand([2, 3, queries, keys]));
                    attention(query.clone(), key.clone(), value.clone(), mask, bias, options)
                };
                let options = |scale, softcap, is_causal| AttentionModuleOptions { scale, softcap, is_causal };
                let scores = query.clone().matmul(key.clone().swap_dims(2, 3));
                let masked = scores.clone().mask_fill(odd.clone(), -1e4);
                vec![
                    own(None, None, options(None, None, false)),
                    own(Some(odd.clone()), None, options(Some(0.4), None, false)),
                    own(None, Some(bias.clone()), options(None, Some(2.0), true)),
                    own(Some(odd.clone()), Some(bias.clone()), options(None, None, true)),
                    activation::softmax(scores, 3).matmul(value.clone()),
                    activation::softmax(masked.clone(), 3).matmul(value.clone()),
                    activation::quiet_softmax(masked, 3).matmul(value.clone()),
                ]
            });
            check(&format!("{dtype:?} {queries} {keys}"), found, 4.0 * bound);
        }
    }
}

/// Queries that share keys and values, and factors that come from outside: by burn's own.
#[test]
fn attention_that_is_not_taken_apart() {
    let mut numbers = Numbers(6);
    let mut make = |heads: usize| numbers.tensor::<4>([2, heads, 9, 5], &Device::flex());
    let found = both((make(4), make(2), make(2)), |_, (query, key, value): (Tensor<4>, Tensor<4>, Tensor<4>)| {
        let own = |query| attention(query, key.clone().tanh(), value.clone().tanh(), None, None, Default::default());
        let of_two = query.clone().slice([0..2, 0..2]);
        let outside = attention(of_two, key.clone(), value.clone(), None, None, Default::default());
        vec![own(query.tanh()), outside]
    });
    check("shared", found, 1e-6);
}

/// A module's attention, evaluated.
#[test]
fn a_module_that_is_evaluated() {
    let device = Device::flex();
    for quiet in [false, true] {
        let model = seeded(MultiHeadAttentionConfig::new(12, 3).with_quiet_softmax(quiet).init(&device));
        let x = Numbers(4).tensor::<3>([2, 45, 12], &device);
        let mask = hidden([45, 45], |query, key| key > query).squeeze_dim::<3>(0).expand([2, 45, 45]);
        let pad = hidden([2, 45], |row, key| key > 40 - 3 * row).reshape([2, 45]);
        let inputs = (x, mask, pad);
        let found = [true, false].map(|fusion| {
            let run = |model: &burn::nn::attention::MultiHeadAttention,
                       (x, mask, pad): (Tensor<3>, Tensor<3, Bool>, Tensor<2, Bool>)| {
                model.forward(MhaInput::self_attn(x).mask_attn(mask).mask_pad(pad)).context
            };
            let captured = capture_forward(&model, inputs.clone(), run).unwrap();
            let mut forward = Forward::new(captured, CustomOps::new().with_fusion(fusion)).unwrap();
            vec![forward.run(&model, inputs.clone()).unwrap().into_data().iter::<f64>().collect()]
        });
        check(&format!("quiet: {quiet}"), found, 1e-6);
    }
}
