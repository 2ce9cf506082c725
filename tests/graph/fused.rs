//! Fused operations against the same operations one by one.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, LayerNormConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::{DType, FloatDType, activation};
use burn_parallel::graph::{CustomOps, Executor, Forward, TensorTree, capture_forward, capture_step};

use crate::common::models::*;
use crate::common::reference::{difference, gradient_values};

fn linear() -> Linear {
    LinearConfig::new(2, 2).init(&device())
}

/// What a forward gives with its operations fused, and one by one.
fn both<I: TensorTree + Clone, O: TensorTree + Clone + Send + 'static>(inputs: I, run: impl Fn(I) -> O) -> [O; 2] {
    let model = linear();
    [true, false].map(|fusion| {
        let captured = capture_forward(&model, inputs.clone(), |_, inputs| run(inputs)).unwrap();
        let mut forward = Forward::new(captured, CustomOps::new().with_fusion(fusion)).unwrap();
        forward.run(&model, inputs.clone()).unwrap()
    })
}

fn numbers<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    tensor.to_data().iter::<f64>().collect()
}

/// Of the values of a list of tensors the largest difference, over one and their size.
fn apart<const D: usize>([fused, plain]: &[Vec<Tensor<D>>; 2]) -> f64 {
    assert_eq!(fused.len(), plain.len());
    let mut worst = 0.0f64;
    for (place, (a, b)) in fused.iter().zip(plain).enumerate() {
        assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()), "result {place}");
        for (a, b) in numbers(a).into_iter().zip(numbers(b)) {
            assert_eq!(a.is_nan(), b.is_nan(), "result {place}: {a} for {b}");
            if a != b && !a.is_nan() {
                worst = worst.max((a - b).abs() / (1.0 + b.abs()));
            }
        }
    }
    worst
}

type Inputs = (Tensor<3>, Tensor<3>, Tensor<3>, Tensor<3>);

/// Two tensors, numbers for columns and for rows.
fn inputs([a, b, c]: [usize; 3], dtype: FloatDType) -> Inputs {
    let mut numbers = Numbers(3);
    let mut make = |dims| numbers.tensor::<3>(dims, &Device::flex()).cast(dtype);
    (make([a, b, c]), make([a, b, c]), make([1, 1, c]), make([a, b, 1]))
}

/// Arithmetic, whose results have the very bits of burn's.
fn arithmetic((x, y, column, row): Inputs) -> Vec<Tensor<3>> {
    let mask = x.clone().greater(y.clone()).bool_and(row.clone().lower_elem(0.2).expand(x.dims()));
    let sum = x.clone() + y.clone() * column.clone() - row.clone();
    let quotient = (sum.clone() / (row.clone().abs() + 1.5)).recip();
    vec![
        sum.clone(),
        quotient.clone(),
        x.clone().mask_fill(mask.clone(), -7.25),
        x.clone().mask_where(mask, column.clone().expand(x.dims())),
        activation::relu(sum.clone()).neg(),
        (y.clone() * 3.0 - 0.125).clamp(-0.5, 0.75) / 0.3,
        y.clone().clamp_min(0.25).abs().sqrt() + quotient.clamp_max(2.0),
        x.clone().powi_scalar(2).add_scalar(1.0).sqrt().powf_scalar(-1.0) * column,
        x.clone().equal(y.clone()).float().cast(x.dtype()) + y.clone().lower_equal(x.clone()).float().cast(x.dtype()),
        Tensor::ones(x.dims(), (&x.device(), x.dtype())) * row * sum.swap_dims(0, 2).swap_dims(0, 2),
    ]
}

/// With functions and sums.
fn functions((x, y, column, row): Inputs) -> Vec<Tensor<3>> {
    let exp = (x.clone() * 8.0).exp() - row.clone();
    let normal = x.clone() - x.clone().mean_dim(2);
    let normal = normal.clone() / ((normal.clone() * normal).mean_dim(2) + 1e-5).sqrt() * column.clone();
    let top = y.clone() - y.clone().max_dim(2);
    let share = top.clone().exp() / top.clone().exp().sum_dim(2);
    vec![
        exp,
        (y.clone().abs() + 0.01).log() * column,
        (y.clone().abs()).log1p().tanh() + row,
        activation::gelu(x.clone() * 3.0),
        activation::sigmoid(x.clone() * 5.0),
        (x.clone() * 2.0).erf(),
        normal.clone(),
        share.clone(),
        top.clone() - top.exp().sum_dim(2).log(),
        (share * y).sum_dim(2) * normal.clone(),
        normal.clone().sum_dim(0).sum_dim(1).repeat_dim(1, 2),
        normal.powf_scalar(2.0).add_scalar(0.5).powf_scalar(-0.5),
    ]
}

#[test]
fn arithmetic_has_the_same_bits() {
    for dtype in [FloatDType::F32, FloatDType::F64, FloatDType::BF16, FloatDType::F16] {
        for dims in [[3, 4, 37], [2, 1, 1], [1, 1, 5], [5, 3, 1], [1, 2, 5000]] {
            assert_eq!(apart(&both(inputs(dims, dtype), arithmetic)), 0.0, "{dtype:?} {dims:?}");
        }
    }
}

#[test]
fn functions_and_sums_are_near() {
    let bounds =
        [(FloatDType::F32, 1e-6), (FloatDType::F64, 1e-14), (FloatDType::BF16, 1.6e-2), (FloatDType::F16, 2e-3)];
    for (dtype, bound) in bounds {
        for dims in [[3, 4, 37], [2, 1, 1], [5, 3, 1], [2, 3, 2050]] {
            let worst = apart(&both(inputs(dims, dtype), functions));
            assert!(worst <= bound, "{dtype:?} {dims:?}: {worst}");
        }
    }
}

#[test]
fn what_is_no_number_stays_so() {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, f32::MIN_POSITIVE / 8.0, 1.0, -120.0, 120.0];
    let x = Tensor::<1>::from_floats(odd, &Device::flex()).reshape([1, 3, 3]);
    let run = |x: Tensor<3>| {
        let other = x.clone().flip([2]);
        vec![
            x.clone().exp(),
            x.clone().log(),
            x.clone().log1p(),
            x.clone().tanh(),
            x.clone().erf(),
            activation::relu(x.clone()) + 0.0,
            activation::sigmoid(x.clone()),
            activation::gelu(x.clone()),
            x.clone().clamp(-1.0, 1.0) + 0.0,
            x.clone().greater_equal(other.clone()).float() + x.clone().not_equal(other.clone()).float(),
            (x.clone() + 0.0).max_dim(2),
            (x.clone() * other).sum_dim(2),
        ]
    };
    let worst = apart(&both(x, run));
    assert!(worst <= 1e-6, "{worst}");
}

/// Views are read where they lie, whatever their strides, and what others hold is not written.
#[test]
fn views_and_shared_inputs() {
    let mut numbers = Numbers(9);
    let x = numbers.tensor::<3>([4, 6, 10], &Device::flex());
    let run = |x: Tensor<3>| {
        let turned = x.clone().swap_dims(0, 2);
        let wide = x.clone().slice([0..1, 0..6, 2..3]).expand([10, 6, 4]);
        let narrow = x.clone().slice([0..4, 1..5, 3..9]);
        vec![(turned.clone() + wide.clone()).exp() * 2.0, turned - wide + 1.0, narrow.clone() * narrow + 1.0]
    };
    let before = x.to_data();
    let [fused, plain] = both(x.clone(), run);
    assert!(apart(&[fused[..2].to_vec(), plain[..2].to_vec()]) <= 1e-6);
    assert_eq!(fused[2].to_data(), plain[2].to_data());
    assert_eq!(x.to_data(), before);
}

/// The same bits with one thread and with several.
#[test]
fn threads_change_nothing() {
    let run = |x: Tensor<2>| {
        let share = (x.clone() - x.clone().max_dim(1)).exp();
        let share = share.clone() / share.sum_dim(1);
        (share.clone(), share.sum_dim(0), x.reshape([700 * 400]).mul_scalar(1.5).exp())
    };
    let x = Numbers(4).tensor::<2>([700, 400], &Device::flex());
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let [fused, plain] = pool.install(|| both(x.clone(), run));
        assert!(apart(&[vec![fused.0.clone(), fused.1.clone()], vec![plain.0, plain.1]]) <= 1e-6);
        (fused.0.to_data(), fused.1.to_data(), fused.2.to_data())
    };
    let (one, three) = (on(1), on(3));
    assert_eq!(one, three);
}

/// Loss and gradients of a whole step, fused and one by one.
fn steps<M: Module, I: TensorTree + Clone>(model: M, inputs: I, loss: impl Fn(&M, I) -> Tensor<1>) {
    let [fused, plain] = [true, false].map(|fusion| {
        let graph = capture_step(&model, inputs.clone(), &loss).unwrap();
        let mut executor = Executor::new(graph, CustomOps::new().with_fusion(fusion)).unwrap();
        let first = executor.step(&model, inputs.clone()).unwrap();
        let again = executor.step(&model, inputs.clone()).unwrap();
        assert_eq!(first.loss.to_data(), again.loss.to_data());
        (scalar(first.loss), gradient_values(&model, &first.gradients), executor.memory().peak)
    });
    assert!((fused.0 - plain.0).abs() <= 1e-6 * plain.0.abs());
    let worst = difference(&fused.1, &plain.1);
    // Some gradients are zero but for rounding, as that of a bias ahead of a norm.
    assert!(worst <= 2e-5, "gradients differ by {worst}");
    // What a group reads stays until its loop runs, which counts for something in a model of a few numbers.
    assert!(fused.2 as f64 <= 1.25 * plain.2 as f64, "{} bytes where {} are enough", fused.2, plain.2);
}

#[test]
fn whole_steps() {
    let tokens = |seed, rows, length| {
        let mut numbers = Numbers(seed);
        (numbers.classes([rows, length], 11, &device()), numbers.classes([rows, length], 11, &device()))
    };
    steps(Lm::new(11, 8, 2, &device()), tokens(1, 3, 5), |m, (x, t)| m.loss(x, t));
    steps(Cnn::new(&device()), images(4, 2, &device()), |m, (x, t)| m.loss(x, t));
    steps(Rnn::new(&device()), tokens(3, 2, 4), |m, (x, t)| m.loss(x, t));
    let layers = (LinearConfig::new(6, 9).init(&device()), LayerNormConfig::new(9).init(&device()));
    let x = Numbers(5).tensor::<2>([7, 6], &device());
    steps(layers, x, |(linear, norm): &(Linear, burn::nn::LayerNorm), x| {
        let y = activation::silu(norm.forward(activation::gelu(linear.forward(x))));
        (activation::softmax(y.clone(), 1) * activation::log_softmax(y, 1)).sum_dim(1).mean()
    });
}

#[test]
fn bools_and_casts() {
    let x = Numbers(6).tensor::<2>([5, 33], &Device::flex());
    let run = |x: Tensor<2>| {
        let half = (x.clone() * 3.0).cast(DType::BF16) * 1.7;
        let back = half.clone().cast(DType::F32) + x.clone();
        (half, back.clone(), (back * 2.0).greater_elem(0.3))
    };
    let [fused, plain] = both(x, run);
    assert_eq!(fused.0.to_data(), plain.0.to_data());
    assert_eq!(fused.1.to_data(), plain.1.to_data());
    assert_eq!(fused.2.to_data(), plain.2.to_data());
}

/// What changes nothing gives its input on, which another result of the loop must not be written over.
#[test]
fn results_that_are_an_input_as_it_came() {
    let mut numbers = Numbers(3);
    let mut make = |dims| numbers.tensor::<3>(dims, &Device::flex());
    let inputs = (make([1, 5, 4]), make([1, 4, 6]), make([1, 6, 3]));
    for unchanged in [
        |x: Tensor<3>| x.mul_scalar(1.0),
        |x: Tensor<3>| x.div_scalar(1.0),
        |x: Tensor<3>| x.powi_scalar(1),
        |x: Tensor<3>| x.sum_dim(0),
    ] {
        let found = both(inputs.clone(), |(x, w, v)| {
            let product = x.matmul(w);
            let first = product.clone().exp();
            let second = unchanged(product);
            vec![first.matmul(v.clone()), second.matmul(v)]
        });
        let worst = apart(&found);
        assert!(worst <= 1e-5, "apart by {worst}");
    }
    let layers = (LinearConfig::new(6, 9).init(&device()), LinearConfig::new(9, 9).init(&device()));
    for scale in [1.0, 2.0] {
        steps(
            layers.clone(),
            Numbers(5).tensor::<2>([7, 6], &device()),
            move |(first, second): &(Linear, Linear), x| {
                let hidden = first.forward(x);
                let shifted = (hidden.clone() * 3.0 + 1.0).matmul(second.weight.val());
                let scaled = hidden.mul_scalar(scale).matmul(second.weight.val());
                (shifted.powi_scalar(2) + scaled.powi_scalar(2)).mean()
            },
        );
    }
}

/// The sum of a column has one element, whatever the width of the loop that it is found in.
#[test]
fn sums_of_a_column() {
    let mut numbers = Numbers(3);
    for width in [1, 3, 70, 4000] {
        let x = numbers.tensor::<2>([5, width], &Device::flex());
        let found = both(x, |x| vec![x.exp().sum_dim(1).sum_dim(0)]);
        let worst = apart(&found);
        assert!(worst <= 1e-5, "width {width}: apart by {worst}");
        let gate = LinearConfig::new(width, 1).init(&device());
        steps(gate, numbers.tensor::<2>([5, width], &device()), |gate: &Linear, x| {
            let gated = activation::sigmoid(gate.forward(x.clone())) * x.tanh();
            gated.powi_scalar(2).mean()
        });
    }
}

/// The weight of an embedding that the output layer has too, transposed or as it lies, and with a third use.
#[test]
fn weights_of_several_uses() {
    let tokens = Numbers(8).classes([3, 5], 7, &device());
    for (rows, turned, third) in [(7, true, false), (7, true, true), (7, false, false), (300, true, false)] {
        let model: Embedding = seeded(EmbeddingConfig::new(rows, 20).init(&device()));
        steps(model, tokens.clone(), |model: &Embedding, tokens: Tensor<2, Int>| {
            let weight = model.weight.val();
            let x = model.forward(tokens).tanh();
            let y = match turned {
                true => x.matmul(weight.clone().transpose().unsqueeze()),
                false => weight.clone().unsqueeze::<3>().matmul(x.swap_dims(1, 2)).swap_dims(1, 2),
            };
            let more = if third { weight.powi_scalar(2).mean() } else { y.clone().mean() };
            y.powi_scalar(2).mean() + more
        });
    }
}

/// Products whose rows and columns are swapped, whoever reads them.
#[test]
fn products_that_are_swapped() {
    let mut numbers = Numbers(16);
    let mut make = |dims| numbers.tensor::<3>(dims, &Device::flex());
    let inputs = (make([1, 9, 33]), make([1, 33, 14]), make([1, 9, 14]), make([3, 9, 33]));
    let worst = apart(&both(inputs, |(x, y, z, batch): (Tensor<3>, Tensor<3>, Tensor<3>, Tensor<3>)| {
        let turned = x.clone().matmul(y.clone()).swap_dims(1, 2);
        let flat: Tensor<2> = x.clone().abs().matmul(y.clone()).reshape([9, 14]).transpose();
        // Of what is under other dims the product is kept, or those dims are.
        let [under, other] = [0.5, 2.0].map(|factor| {
            let product = (x.clone() * factor).matmul(y.clone());
            (product.clone(), product.reshape([9, 14]))
        });
        let (kept, read) = (x.clone().tanh().matmul(y.clone()), x.exp().matmul(y.clone()));
        let of_batch = batch.matmul(y.expand([3, 33, 14])).swap_dims(1, 2);
        vec![
            turned.clone(),
            turned + 1.0,
            flat.unsqueeze::<3>() * 2.0,
            under.1.transpose().unsqueeze::<3>() * 2.0,
            under.0,
            other.1.clone().transpose().unsqueeze::<3>() * 2.0,
            other.1.unsqueeze::<3>() + 1.0,
            kept.clone().swap_dims(1, 2) - kept.clone().swap_dims(1, 2).exp(),
            kept,
            read.swap_dims(1, 2).matmul(z),
            of_batch,
        ]
    }));
    assert!(worst <= 1e-5, "apart by {worst}");
}

/// Two captured steps take turns in the memory of a thread; what they gave before stays what it was, whoever holds it.
#[test]
fn results_outlive_the_steps_that_follow() {
    let device = device();
    let model = (LinearConfig::new(256, 256).init(&device), LayerNormConfig::new(256).init(&device));
    type Model = (Linear, burn::nn::LayerNorm);
    let narrow = |(linear, norm): &Model, x: Tensor<2>| {
        let y = norm.forward(activation::gelu(linear.forward(x.clone())) + x);
        (linear.forward(y.clone()) * y).powi_scalar(2).mean()
    };
    let wide = |(linear, norm): &Model, x: Tensor<2>| {
        let y = activation::softmax(linear.forward(norm.forward(x)), 1);
        (y.clone().transpose().matmul(y.clone()) + 1.0).log().mean()
    };
    let x = |seed: u64, rows| Numbers(seed).tensor::<2>([rows, 256], &device);
    let executors = |fusion| {
        let ops = || CustomOps::new().with_fusion(fusion);
        let narrow = Executor::new(capture_step(&model, x(1, 257), narrow).unwrap(), ops()).unwrap();
        (narrow, Executor::new(capture_step(&model, x(1, 512), wide).unwrap(), ops()).unwrap())
    };
    let (mut fused, mut plain) = (executors(true), executors(false));
    let mut held = Vec::new();
    for turn in 0..3 {
        for rows in [257, 512] {
            let step = |(narrow, wide): &mut (Executor, Executor)| {
                let executor = if rows == 257 { narrow } else { wide };
                executor.step(&model, x(turn, rows)).unwrap()
            };
            let (given, expected) = (step(&mut fused), step(&mut plain));
            held.push((given, gradient_values(&model, &expected.gradients), scalar(expected.loss)));
        }
        if turn == 1 {
            // What another thread drops returns to this one's memory.
            let first = held.swap_remove(0).0;
            std::thread::spawn(move || drop(first)).join().unwrap();
        }
    }
    for (given, gradients, loss) in held {
        let worst = difference(&gradient_values(&model, &given.gradients), &gradients);
        assert!(worst <= 2e-5, "gradients differ by {worst}");
        assert!((scalar(given.loss) - loss).abs() <= 1e-5 * loss.abs());
    }
}

/// What leaves a step as a view of something, or as a view of what came, is nobody's to write over.
#[test]
fn views_that_leave_a_step_stay_what_they_were() {
    let model = linear();
    let run = |(x, weight): (Tensor<2>, Tensor<2>)| {
        let product = x.clone().matmul(weight);
        let view = product.clone().swap_dims(0, 1);
        let scaled = product.clone() * 2.0 + 1.0;
        let rows = scaled.clone().slice(3..9);
        let activated = (scaled.clone().tanh() - product.clone()).reshape([128, 2, 272]);
        let cut = x.clone().slice(0..2);
        vec![view.exp().swap_dims(0, 1), product.swap_dims(0, 1), rows, activated.flatten(0, 1), cut, scaled, x]
    };
    let inputs = |seed| {
        let mut numbers = Numbers(seed);
        let mut make = |dims| numbers.tensor::<2>(dims, &Device::flex());
        (make([256, 260]), make([260, 272]))
    };
    let [mut fused, mut plain] = [true, false].map(|fusion| {
        let captured = capture_forward(&model, inputs(0), |_, inputs| run(inputs)).unwrap();
        Forward::new(captured, CustomOps::new().with_fusion(fusion)).unwrap()
    });
    let held: Vec<_> = (0..4)
        .map(|seed| (fused.run(&model, inputs(seed)).unwrap(), plain.run(&model, inputs(seed)).unwrap()))
        .collect();
    for (turn, (fused, plain)) in held.into_iter().enumerate() {
        let worst = apart(&[fused, plain]);
        assert!(worst <= 1e-5, "apart by {worst} in turn {turn}");
    }
}

/// What is computed in 16 bits and again in 32 are two values of a loop, whichever comes first; so are a value's
/// roundings to two dtypes.
#[test]
fn one_operation_in_several_dtypes() {
    let narrow = |x: &Tensor<2>| x.clone().cast(FloatDType::BF16);
    let wide = |x: &Tensor<2>| x.clone().cast(FloatDType::F32);
    let mut numbers = Numbers(3);
    let mut make = || narrow(&numbers.tensor::<2>([64, 50], &Device::flex()));
    let inputs = (make(), make());
    let check = |what: &str, run: &dyn Fn((Tensor<2>, Tensor<2>)) -> Vec<Tensor<2>>| {
        let worst = apart(&both(inputs.clone(), run));
        assert!(worst <= 1e-6, "{what}: apart by {worst}");
    };
    check("a sum, and its norm", &|(x, y)| {
        let exact = wide(&x) + wide(&y);
        let sum = x + y;
        let size = (exact.clone().powi_scalar(2).mean_dim(1) + 1e-5).sqrt();
        vec![exact / size, wide(&sum)]
    });
    check("wide first", &|(x, y)| {
        let exact = wide(&x) * wide(&y);
        let product = x * y;
        vec![exact * 2.0, wide(&product)]
    });
    check("narrow first", &|(x, y)| {
        let product = x.clone() * y.clone();
        let exact = wide(&x) * wide(&y);
        vec![wide(&product), exact * 2.0]
    });
    check("functions, wide first", &|(x, _)| {
        let exact = wide(&x).sqrt();
        vec![wide(&x.clone().sqrt()), wide(&x).neg() + exact]
    });
    check("functions, narrow first", &|(x, _)| {
        let rounded = wide(&x.clone().sqrt());
        vec![wide(&x).neg() + wide(&x).sqrt(), rounded]
    });
    check("two roundings", &|(x, y)| {
        let sum = wide(&x) * 1.2345 + wide(&y);
        vec![wide(&narrow(&sum)) * 2.0 - wide(&sum.clone().cast(FloatDType::F16)), sum]
    });
}

/// Loops go on through tensors under other dims, whoever reads those.
#[test]
fn the_same_under_other_dims() {
    let mut numbers = Numbers(12);
    let mut make = |dims| numbers.tensor::<3>(dims, &Device::flex());
    let inputs = (make([3, 4, 37]), make([3, 1, 37]), make([1, 1, 37]));
    let run = |(x, rows, column): (Tensor<3>, Tensor<3>, Tensor<3>)| {
        let first = (x.clone() + column.clone()).exp();
        let flat = first.clone().reshape([12, 37]);
        let second = flat.clone() * column.clone().reshape([1, 37]) - flat.clone().mean_dim(1);
        let back = second.clone().reshape([3, 4, 37]) / (rows.abs() + 1.0);
        let other = second.clone().reshape([4, 3, 37]) * 2.0 + x.swap_dims(0, 1).reshape([4, 3, 37]);
        let sums = back.clone().sum_dim(0).sum_dim(1).reshape([1, 1, 37]);
        let chain = back.clone().reshape([2, 6, 37]).reshape([1, 12, 37]).sqrt();
        let wide = |x: Tensor<2>| x.reshape([1, 12, 37]);
        vec![first, wide(flat), wide(second), back, other, sums, chain]
    };
    let worst = apart(&both(inputs, run));
    assert!(worst <= 1e-6, "{worst}");
}

/// Numbers of a row that an index says, read and written.
#[test]
fn elements_at_indices() {
    let mut numbers = Numbers(13);
    for [rows, columns] in [[5, 33], [1, 1], [7, 1], [1, 40], [300, 3000]] {
        for dtype in [FloatDType::F32, FloatDType::F64, FloatDType::BF16] {
            let x = numbers.tensor::<2>([rows, columns], &Device::flex()).cast(dtype);
            let classes = numbers.classes([rows, 1], columns, &Device::flex());
            let run = |(x, classes): (Tensor<2>, Tensor<2, Int>)| {
                let picked = (x.clone() * 2.0).gather(1, classes.clone()) + 1.0;
                let zeros = Tensor::zeros(x.dims(), (&x.device(), x.dtype()));
                let update = burn::tensor::IndexingUpdateOp::Add;
                let spot = zeros.scatter(1, classes.clone(), picked.clone(), update) * 3.0;
                let column = x.clone().slice([0..rows, 0..1]);
                let added = (x.clone() - 0.5).scatter(1, classes.clone(), column, update) * 0.5;
                // A number for each row among longer rows.
                let top = x.clone().max_dim(1);
                let twice = top.clone().scatter(1, classes.zeros_like(), top, update);
                vec![picked, spot, added, x * twice]
            };
            assert_eq!(apart(&both((x, classes), run)), 0.0, "{rows} {columns} {dtype:?}");
        }
    }
}

/// Rows that are zero but for one element, as in the gradient of a loss by classes, and one element of what is made of
/// whole rows.
#[test]
fn lone_elements_of_rows() {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1.5, 2.0, -3.0, 0.25, 4.0, 5.0, -6.0, 7.0];
    for [rows, columns] in [[3, 4], [4, 3], [12, 1], [1, 12]] {
        for dtype in [FloatDType::F32, FloatDType::F64, FloatDType::BF16] {
            let x = Tensor::<1>::from_floats(odd, &Device::flex()).reshape([rows, columns]).cast(dtype);
            let classes = Numbers(15).classes([rows, 1], columns, &Device::flex());
            let run = |(x, classes): (Tensor<2>, Tensor<2, Int>)| {
                let top = x.clone().max_dim(1);
                let zeros = || Tensor::zeros(x.dims(), (&x.device(), x.dtype()));
                let add = |to: Tensor<2>, what: Tensor<2>| {
                    to.scatter(1, classes.clone(), what, burn::tensor::IndexingUpdateOp::Add)
                };
                let lone = add(zeros(), top.clone() * 2.0);
                let other = add(zeros(), top.clone() - 1.0);
                let less = lone.clone().neg();
                vec![
                    less.clone().sum_dim(1),
                    x.clone() * 2.0 + less.clone(),
                    less + (x.clone() - 1.0),
                    lone.clone() + other,
                    lone * x.clone(),
                    ((x.clone() - top.clone()) * 3.0).gather(1, classes.clone()),
                    (x.clone() + 1.0).neg().gather(1, classes.clone()) + add(x.clone() * 0.5, top),
                ]
            };
            assert_eq!(apart(&both((x, classes), run)), 0.0, "{rows} {columns} {dtype:?}");
        }
    }
}

#[test]
fn indices_beyond_a_row_are_an_error() {
    let model = linear();
    for (wrong, named) in [(4, "4"), (-1, "-1"), (i32::MAX, "about 2147483648")] {
        let inputs =
            (Tensor::<2>::ones([2, 4], &Device::flex()), Tensor::<2, Int>::from_ints([[1], [wrong]], &Device::flex()));
        let run = |(x, classes): (Tensor<2>, Tensor<2, Int>)| (x * 2.0).gather(1, classes) + 1.0;
        let captured = capture_forward(&model, inputs.clone(), |_, inputs| run(inputs)).unwrap();
        let mut forward = Forward::new(captured, CustomOps::new()).unwrap();
        let error = forward.run(&model, inputs).unwrap_err().to_string();
        assert!(error.contains(&format!("index {named} is not one of a row of 4")), "{error}");
    }
}

/// One of two attentions reads what the other gives, which would come too late if both took their new places.
#[test]
fn attention_that_reads_what_another_gives() {
    let mut numbers = Numbers(14);
    let mut make = || numbers.tensor::<3>([2, 9, 9], &Device::flex());
    let run = |(x, y): (Tensor<3>, Tensor<3>)| {
        let weights = |x: &Tensor<3>| {
            let x = x.clone().tanh();
            let scores = x.clone().matmul(x.swap_dims(1, 2));
            let weights = (scores.clone() - scores.max_dim(2)).exp();
            weights.clone() / weights.sum_dim(2)
        };
        let (first, second) = (weights(&x), weights(&y));
        let early = first.clone().matmul(y.tanh());
        let between = second.clone().matmul(x.clone().tanh());
        let read = early.exp();
        let beside = second.matmul(x.abs());
        vec![read, beside, first.matmul(between)]
    };
    let worst = apart(&both((make(), make()), run));
    assert!(worst <= 1e-5, "apart by {worst}");
}
