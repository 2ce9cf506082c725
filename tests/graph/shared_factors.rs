//! Products that share a factor, or read each other, on one thread and on several: captured steps against eager burn,
//! over several steps of an optimizer.

use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::FloatDType;
use burn_parallel::graph::{CustomOps, Forward, capture_forward};

use super::products::captured_as_alone;
use crate::common::fill::cast;
use crate::common::models::*;
use crate::common::reference::filled;

/// Rows of one of a batch, and what they have. A product of a batch is large enough for several threads.
const WIDTH: usize = 131;
const BATCH: usize = 2;

type Layers = Vec<Linear>;

/// What a loss has of layers and of their input, which a layer has made.
struct Factors<'a> {
    layers: &'a Layers,
    x: Tensor<3>,
}

impl Factors<'_> {
    fn weight(&self, layer: usize) -> Tensor<3> {
        self.layers[layer].weight.val().unsqueeze()
    }

    fn by(&self, layer: usize) -> Tensor<3> {
        self.x.clone().matmul(self.weight(layer))
    }
}

/// What a loss sums up the squares of.
type Products = fn(&Factors<'_>) -> Vec<Tensor<3>>;

const LOSSES: [(&str, Products); 12] = [
    ("five of one", |with| (0..5).map(|layer| with.by(layer)).collect()),
    ("by itself", |with| {
        let x = with.x.clone();
        let by_itself = x.clone().matmul(x.clone());
        let scores = x.clone().matmul(x.clone().swap_dims(1, 2)).tanh();
        vec![by_itself, with.by(0), scores.matmul(x)]
    }),
    ("one reads another", |with| {
        let first = with.by(0);
        let second = with.x.clone().matmul(first.clone() * 0.1);
        let third = with.x.clone().matmul(second.clone().swap_dims(1, 2) * 0.1);
        vec![first, with.by(1), second, third]
    }),
    ("one reads another as it is", |with| {
        let by = |right: &Tensor<3>| with.weight(0).matmul(right.clone());
        let first = by(&with.weight(1));
        let second = by(&first);
        vec![by(&with.weight(2)), by(&first.clone().swap_dims(1, 2)), by(&second), second, first]
    }),
    ("one weight, several uses", |with| {
        let turned = with.x.clone().matmul(with.weight(0).swap_dims(1, 2));
        vec![with.by(0), turned, with.by(1), with.by(0).tanh(), with.weight(0).exp()]
    }),
    ("of a batch by one, and of one by a batch", |with| {
        let right = with.x.clone().swap_dims(1, 2);
        let of_one = |layer| with.weight(layer).matmul(right.clone());
        vec![of_one(0), of_one(1).tanh(), with.weight(0).matmul(with.x.clone()), with.by(0)]
    }),
    ("read and replaced in between", |with| {
        let first = with.by(0);
        let inner = first.clone().exp() * 0.1 + with.x.clone();
        let replaced = (with.x.clone() * 1.5 + 0.25).tanh();
        vec![with.by(1), replaced.matmul(with.weight(2)), inner, with.by(3)]
    }),
    ("let go of after a product", |with| {
        let x = with.x.clone().tanh() * 2.0;
        let first = x.clone().matmul(with.weight(0));
        let inner = (0..6).fold(first, |y, _| y.tanh() * 1.3 + 0.1);
        vec![inner.clone(), x.matmul(with.weight(1)), inner.matmul(with.weight(2))]
    }),
    ("under other dims", |with| {
        let flat = with.x.clone().reshape([1, BATCH * WIDTH, WIDTH]);
        let halves = with.x.clone().reshape([WIDTH, BATCH, WIDTH]);
        let by = |x: Tensor<3>, layer| x.matmul(with.weight(layer)).reshape([BATCH, WIDTH, WIDTH]);
        let first = by(flat.clone(), 0);
        let turned = with.weight(4).swap_dims(1, 2).reshape([1, 1, WIDTH * WIDTH]).reshape([1, WIDTH, WIDTH]);
        let turned = turned.swap_dims(1, 2);
        let by_turned = flat.clone().matmul(turned).reshape([BATCH, WIDTH, WIDTH]);
        vec![first, by_turned, with.by(1), by(halves, 2), by(flat, 3)]
    }),
    ("by turns", |with| {
        let (first, other) = (with.by(0), with.x.clone().exp() * 0.2);
        let second = other.clone().matmul(with.weight(1));
        vec![with.by(2), first.clone().matmul(with.weight(1)), second, other.matmul(with.weight(3)), with.by(4)]
    }),
    ("a sum of products in between", |with| {
        let both = with.by(0) + with.x.clone().tanh().matmul(with.weight(1));
        vec![with.by(2), both.clone().matmul(with.weight(3)), both + with.by(4) + with.by(0)]
    }),
    ("parts of a factor", |with| {
        let parts = with.x.clone().split_with_sizes(vec![60, 71], 2);
        let rows = |from, to| with.weight(0).slice([0..1, from..to]);
        let by_rows = parts[0].clone().matmul(rows(0, 60)) + parts[1].clone().matmul(rows(60, 131));
        let columns = with.weight(1).slice([0..1, 0..WIDTH, 3..40]);
        vec![by_rows, with.by(0), with.x.clone().matmul(columns), with.by(1)]
    }),
];

/// Layers without biases, of which the last makes the input of the others.
fn layers() -> Layers {
    let layer = || LinearConfig::new(WIDTH, WIDTH).with_bias(false).init(&device());
    filled((0..6).map(|_| layer()).collect())
}

fn loss(of: Products) -> impl Fn(&Layers, Tensor<3>) -> Tensor<1> {
    move |layers, x| {
        let x = layers[5].forward(x).tanh();
        let squares = of(&Factors { layers, x }).into_iter().map(|y| y.powi_scalar(2).mean());
        squares.reduce(|a, b| a + b).unwrap()
    }
}

fn on(threads: usize, run: impl FnOnce() + Send) {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run);
}

#[test]
fn steps_with_products_that_share_a_factor() {
    for threads in [1, 2, 3] {
        on(threads, || {
            let batch = |step: usize| Numbers(step as u64).tensor::<3>([BATCH, WIDTH, WIDTH], &device());
            let (mut layers, mut frozen) = (layers(), layers());
            frozen[1] = frozen[1].clone().no_grad();
            frozen[5] = frozen[5].clone().no_grad();
            for (name, of) in LOSSES {
                let what = format!("{name}, {threads} threads");
                captured_as_alone(&what, &layers, batch, loss(of));
                captured_as_alone(&format!("{what}, frozen in part"), &frozen, batch, loss(of));
            }
            layers = cast(layers, FloatDType::F64);
            let batch = |step| batch(step).cast(FloatDType::F64);
            for (name, of) in LOSSES {
                captured_as_alone(&format!("{name}, {threads} threads, f64"), &layers, batch, loss(of));
            }
        });
    }
}

/// The same products of every dtype, fused and one by one.
#[test]
fn forward_passes_of_all_dtypes() {
    let bounds = [(FloatDType::F32, 1e-5), (FloatDType::F64, 1e-13), (FloatDType::BF16, 4e-2), (FloatDType::F16, 4e-3)];
    for (dtype, bound) in bounds {
        let model = cast(layers(), dtype).valid();
        let x = Numbers(2).tensor::<3>([BATCH, WIDTH, WIDTH], &Device::flex()).cast(dtype);
        for threads in [1, 2, 3] {
            let (model, x) = (model.clone(), x.clone());
            on(threads, move || {
                for (name, of) in LOSSES {
                    let run = |layers: &Layers, x: Tensor<3>| of(&Factors { layers, x });
                    let [fused, plain] = [true, false].map(|fusion| {
                        let captured = capture_forward(&model, x.clone(), run).unwrap();
                        let mut forward = Forward::new(captured, CustomOps::new().with_fusion(fusion)).unwrap();
                        forward.run(&model, x.clone()).unwrap();
                        forward.run(&model, x.clone()).unwrap()
                    });
                    for (place, (fused, plain)) in fused.into_iter().zip(plain).enumerate() {
                        assert_eq!((fused.dims(), fused.dtype()), (plain.dims(), plain.dtype()));
                        let [fused, plain] = [fused, plain].map(|tensor| tensor.cast(FloatDType::F64));
                        let size = plain.clone().abs().max().into_scalar::<f64>();
                        let worst = (fused - plain).abs().max().into_scalar::<f64>() / (1.0 + size);
                        let what = format!("{name}, {dtype:?}, {threads} threads: result {place}");
                        assert!(worst <= bound, "{what} is apart by {worst}");
                    }
                }
            });
        }
    }
}
