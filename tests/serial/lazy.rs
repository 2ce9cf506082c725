//! Lazy parameters of split models have the values that one device would have given them, and are made in pieces.

use std::sync::Mutex;

use burn::module::{Module, Param, ParamId};
use burn::nn::{
    Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig, LinearLayout,
};
use burn::prelude::*;
use burn::tensor::Distribution;
use burn_parallel::prelude::*;

const SEED: u64 = 7;

/// Layers that are initialised in all ways: drawn, drawn and reworked, drawn in rows and turned, constant, orthogonal.
#[derive(Module, Debug)]
struct Layers {
    embedding: Embedding,
    up: Linear,
    norm: LayerNorm,
    turned: Param<Tensor<2>>,
    square: Linear,
    thin: Param<Tensor<2>>,
    clipped: Param<Tensor<3>>,
    sums: Param<Tensor<2>>,
}

impl Layers {
    fn new(device: &Device) -> Self {
        let linear = |initializer: Option<Initializer>| {
            let config = LinearConfig::new(24, 12);
            let config = config.with_bias(!matches!(initializer, Some(Initializer::Orthogonal { .. })));
            initializer.map_or(config.clone(), |initializer| config.with_initializer(initializer)).init(device)
        };
        let own = |init: fn(&Device) -> Tensor<2>, dims: [usize; 2]| {
            Param::uninitialized(ParamId::new(), move |device, _| init(device), device.clone(), true, dims.into())
        };
        Self {
            embedding: EmbeddingConfig::new(13, 24).init(device),
            up: linear(None),
            norm: LayerNormConfig::new(24).init(device),
            turned: own(
                |device| Tensor::random([12, 24], Distribution::Normal(0.0, 1.0), device).transpose(),
                [24, 12],
            ),
            square: linear(Some(Initializer::Orthogonal { gain: 1.0 })),
            thin: own(|device| Tensor::random([1, 36], Distribution::Uniform(-2.0, 3.0), device), [1, 36]),
            clipped: Param::uninitialized(
                ParamId::new(),
                |device, _| Tensor::random([12, 5, 24], Distribution::Normal(0.0, 1.0), device).clamp(-1.0, 1.0) * 0.02,
                device.clone(),
                true,
                [12, 5, 24].into(),
            ),
            // Each element of it comes from a whole row: no piece of its columns can be made.
            sums: own(|device| Tensor::<2>::random([24, 12], Distribution::Default, device).cumsum(1), [24, 12]),
        }
    }

    fn values(self) -> Vec<Vec<f32>> {
        let read = |data: TensorData| data.try_into_vec::<f32>().unwrap();
        let linear = |linear: Linear| {
            let bias = linear.bias.map(|bias| bias.val().into_data());
            std::iter::once(linear.weight.val().into_data()).chain(bias)
        };
        let mut all = vec![self.embedding.weight.val().into_data(), self.norm.gamma.val().into_data()];
        all.extend([self.up, self.square].into_iter().flat_map(linear));
        all.extend([
            self.turned.val().into_data(),
            self.thin.val().into_data(),
            self.clipped.val().into_data(),
            self.sums.val().into_data(),
        ]);
        all.into_iter().map(read).collect()
    }
}

/// Each parameter along each of its dims, and the vocabulary of 13 padded.
fn plans() -> Vec<Plan> {
    let all = |weight: usize, clipped: usize| {
        Plan::new()
            .shard("up.weight", weight)
            .shard("up.bias", 0)
            .shard("turned", weight)
            .shard("square.weight", weight)
            .shard("thin", 1)
            .shard("clipped", clipped)
            .shard("sums", weight)
    };
    vec![
        all(1, 2).then(Plan::tied_vocabulary("embedding")),
        all(0, 0).shard("embedding.weight", 1).shard("norm.gamma", 0),
    ]
}

/// In the order in which a wrapped model makes them.
fn expected(device: &Device) -> Vec<Vec<f32>> {
    device.seed(SEED);
    Layers::new(device).train().values()
}

#[test]
fn parts_are_those_of_the_values_that_one_device_draws() {
    let _turn = crate::turn();
    let device = Device::flex().autodiff();
    let expected = expected(&device);
    for degree in [1, 2, 3, 4] {
        for plan in plans() {
            device.seed(SEED);
            let found = launch::threads(degree)
                .run(|rank| {
                    let model = Layers::new(&rank.device().autodiff()).tensor_parallel(&rank, &plan)?;
                    model.clone().train().assemble().map(Layers::values)
                })
                .unwrap();
            for found in found {
                assert!(found == expected, "{degree} ranks, {plan:?}");
            }
        }
    }
}

#[test]
fn a_model_that_somebody_else_holds_too_has_one_value() {
    let _turn = crate::turn();
    let device = Device::flex().autodiff();
    let expected = expected(&device);
    device.seed(SEED);
    let kept = Mutex::new(None);
    launch::threads(3)
        .run(|rank| {
            let model = Layers::new(&rank.device().autodiff());
            if rank.rank() == 0 {
                *kept.lock().unwrap() = Some(model.clone());
            }
            let model = model.tensor_parallel(&rank, &plans()[0])?;
            assert!(model.clone().train().assemble()?.values() == expected);
            Ok(())
        })
        .unwrap();
    assert!(kept.into_inner().unwrap().unwrap().values() == expected);
}

#[test]
fn what_an_axis_copies_another_has_split_first() {
    let _turn = crate::turn();
    let device = Device::flex().autodiff();
    let expected = expected(&device);
    device.seed(SEED);
    launch::threads(4)
        .run(|rank| {
            let mesh = Mesh::new(&rank, [("a", 2), ("b", 2)])?;
            let plan = Plan::new()
                .shard("up.weight", 1)
                .on("b", Plan::new().shard("turned", 0).shard("clipped", 2).shard("up.weight", 1));
            let model = Layers::new(&rank.device().autodiff());
            let model = model.tensor_parallel_over(&mesh, &["a", "b"], &plan)?;
            assert!(model.clone().train().assemble()?.values() == expected);
            Ok(())
        })
        .unwrap();
}

/// Reads what it has drawn, which no recording can give it.
fn reading(device: &Device) -> Tensor<2> {
    let drawn = Tensor::<2>::random([4, 4], Distribution::Default, device);
    let largest = drawn.clone().max().into_scalar::<f32>();
    drawn / largest
}

#[derive(Module, Debug)]
struct Reading {
    weight: Param<Tensor<2>>,
}

#[test]
fn an_initialiser_that_reads_values_is_an_error_that_says_what_to_do() {
    let _turn = crate::turn();
    let model = |device: &Device| {
        let init = |device: &Device, _| reading(device);
        Reading { weight: Param::uninitialized(ParamId::new(), init, device.clone(), true, [4, 4].into()) }
    };
    let plan = Plan::new().shard("weight", 0);
    let step = |model: Reading, rank: launch::Rank| {
        let mut model = model.tensor_parallel(&rank, &plan)?;
        let x = Tensor::<2>::ones([2, 4], &rank.device().autodiff());
        model.step(x, |model, x| x.matmul(model.weight.val()).sum()).map(drop)
    };
    let error = launch::threads(2).run(|rank| step(model(&rank.device().autodiff()), rank)).unwrap_err().to_string();
    assert!(error.contains("`train` makes them"), "{error}");
    launch::threads(2).run(|rank| step(model(&rank.device().autodiff()).train(), rank)).unwrap();
}

#[test]
fn a_parameter_of_other_dims_than_it_said_is_an_error() {
    let _turn = crate::turn();
    let plan = Plan::new().shard("weight", 0);
    // burn says the dims of the transposed weight until it has made it.
    let linear =
        |rank: &launch::Rank| LinearConfig::new(24, 12).with_layout(LinearLayout::Col).init(&rank.device().autodiff());
    let whole = |model: Linear, rank: launch::Rank| {
        Ok(model.tensor_parallel(&rank, &plan)?.train().assemble()?.weight.val().dims())
    };
    let error = launch::threads(2).run(|rank| whole(linear(&rank), rank)).unwrap_err().to_string();
    assert!(error.contains("has dims [24, 12] and said [12, 24] before"), "{error}");
    let made = launch::threads(2).run(|rank| whole(linear(&rank).train(), rank)).unwrap();
    assert_eq!(made, [[24, 12]; 2]);
}
