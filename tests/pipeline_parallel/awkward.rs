//! A model with everything that is awkward to cut trains like one device.

use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::{Bool, DType, activation};
use burn_parallel::prelude::*;

use super::compare::compare;
use super::parity::schedules;
use crate::common::models::{Numbers, cross_entropy, device};
use crate::common::reference::{filled, reference};

const WIDTH: usize = 8;
const VOCABULARY: usize = 11;

/// Five layers, so that no number of ranks divides them, with connections between all of them. The embedding is the
/// head as well, and every layer uses one scale.
#[derive(Module, Debug)]
struct Awkward {
    embedding: Embedding,
    layers: Vec<Linear>,
    scale: Param<Tensor<1>>,
    norm: LayerNorm,
}

fn awkward() -> Awkward {
    let device = device();
    Awkward {
        embedding: EmbeddingConfig::new(VOCABULARY, WIDTH).init(&device),
        layers: (0..5).map(|_| LinearConfig::new(WIDTH, WIDTH).init(&device)).collect(),
        scale: Param::from_tensor(Tensor::ones([WIDTH], &device)),
        norm: LayerNormConfig::new(WIDTH).init(&device),
    }
    .materialize()
}

type Batch = (Tensor<2, Int>, Tensor<2, Int>);

fn batch(seed: u64) -> Batch {
    let mut numbers = Numbers(seed + 3);
    let mut tokens = || numbers.classes([7, 5], VOCABULARY, &device());
    (tokens(), tokens())
}

/// What crosses: activations of all layers so far, one of them as `f64` and one as `f16`; the mask of a layer (bool),
/// which all later ones use; the place of the greatest activation (int), which the head uses.
fn loss(model: &Awkward, (tokens, targets): Batch) -> Tensor<1> {
    let [rows, length] = tokens.dims();
    let padding: Tensor<3, Bool> = tokens.clone().equal_elem(0).unsqueeze_dim::<3>(2).expand([rows, length, WIDTH]);
    let mut seen: Vec<Tensor<3>> = vec![model.embedding.forward(tokens)];
    let (mut wide, mut narrow) = (None, None);
    let mut found: Option<(Tensor<3, Bool>, Tensor<3, Int>)> = None;
    for (level, layer) in model.layers.iter().enumerate() {
        let scale = model.scale.val().reshape([1, 1, WIDTH]);
        let mut x = activation::tanh(layer.forward(seen[level].clone())) * scale;
        for earlier in &seen[..level] {
            x = x + earlier.clone() * 0.25;
        }
        match (&found, level) {
            (Some((large, _)), _) => x = x.mask_fill(large.clone(), 0.1),
            (None, _) => found = Some((x.clone().greater_elem(0.6), x.clone().argmax(2))),
        }
        match level {
            1 => wide = Some(x.clone().cast(DType::F64)),
            2 => narrow = Some((x.clone() * 0.5).cast(DType::F16)),
            _ => {}
        }
        seen.push(x.mask_fill(padding.clone(), 0.0));
    }
    let last = model.norm.forward(seen.pop().unwrap());
    let best = last.clone().gather(2, found.unwrap().1).powi_scalar(2).mean();
    let wide = wide.unwrap().powi_scalar(2).mean().cast(DType::F32);
    let narrow = narrow.unwrap().cast(DType::F32).powi_scalar(2).mean();
    let logits = last.reshape([rows * length, WIDTH]).matmul(model.embedding.weight.val().transpose());
    cross_entropy(logits, targets.reshape([rows * length])) + best + wide + narrow
}

#[test]
fn everything_at_once_trains_alike_with_every_schedule_on_2_3_and_4_ranks() {
    let references = reference(awkward, batch, loss, 3);
    for ranks in [2, 3, 4] {
        for schedule in schedules() {
            // Seven rows: micro-batches of two sizes.
            let config = PipelineConfig::new(4).with_schedule(schedule);
            compare(awkward, batch, loss, ranks, &config, &references).unwrap();
        }
    }
}

/// No layer on the first stage and the last, and not as many on the others.
#[test]
fn everything_at_once_trains_alike_when_cut_by_hand() {
    let references = reference(awkward, batch, loss, 2);
    let cut = Cut::patterns([
        vec!["embedding*"],
        vec!["scale", "layers.0.*", "layers.1.*"],
        vec!["layers.2.*", "layers.3.*", "layers.4.*"],
        vec!["norm*"],
    ]);
    for schedule in [Schedule::GPipe, Schedule::OneForwardOneBackward, Schedule::ZeroBubbleH1] {
        let config = PipelineConfig::new(3).with_schedule(schedule).with_cut(cut.clone());
        compare(awkward, batch, loss, 4, &config, &references).unwrap();
    }
    let config =
        PipelineConfig::new(3).with_schedule(Schedule::Interleaved { stages_per_rank: 2 }).with_cut(cut.clone());
    compare(awkward, batch, loss, 2, &config, &references).unwrap();
    // Two stages on the first rank, of which one is behind those of the second.
    let timetable = "0F0,0F1,3F0,3B0,3F1,3B1,0B0,0B1\n1F0,2F0,1F1,2F1,2I0,2W0,1B0,2I1,1B1,2W1";
    let config = PipelineConfig::new(2).with_schedule(Schedule::Custom(timetable.parse().unwrap())).with_cut(cut);
    compare(awkward, batch, loss, 2, &config, &references).unwrap();
}

/// A parameter of no elements, as of a layer whose size is 0 by its configuration.
#[derive(Module, Debug)]
struct Hollow {
    layers: Vec<Linear>,
    nothing: Param<Tensor<2>>,
}

fn hollow() -> Hollow {
    let device = device();
    let layers = (0..3).map(|_| LinearConfig::new(4, 4).init(&device)).collect();
    Hollow { layers, nothing: Param::from_tensor(Tensor::zeros([0, 4], &device)) }
}

fn hollow_loss(model: &Hollow, x: Tensor<2>) -> Tensor<1> {
    let x = model.layers.iter().fold(x, |x, layer| layer.forward(x).tanh());
    x.powi_scalar(2).mean() + model.nothing.val().sum()
}

#[test]
fn a_parameter_of_no_elements_is_one_like_any_other() {
    let rows: fn(u64) -> Tensor<2> = |seed| Numbers(seed + 3).tensor([6, 4], &device());
    let references = reference(hollow, rows, hollow_loss, 2);
    for ranks in [1, 2, 3] {
        compare(hollow, rows, hollow_loss, ranks, &PipelineConfig::new(2), &references).unwrap();
    }
    // And when it is split.
    launch::threads(2)
        .run(|rank| {
            let plan = Plan::new().shard("nothing", 1);
            let mut model = filled(hollow()).tensor_parallel(&rank, &plan)?;
            let loss = model.step(rows(0), hollow_loss)?.loss.item() as f32;
            assert!((loss - references[0].loss).abs() < 1e-5);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_model_on_a_device_without_autodiff_is_an_error_that_says_so() {
    let plain = || vec![LinearConfig::new(4, 4).init(&Device::flex()), LinearConfig::new(4, 4).init(&Device::flex())];
    let loss = |model: &Vec<Linear>, x: Tensor<2>| model.iter().fold(x, |x, layer| layer.forward(x)).mean();
    let rows = || Tensor::<2>::ones([4, 4], &Device::flex());
    let told = |error: Error| {
        let text = error.to_string();
        assert!(text.contains("without autodiff") && text.contains("device.autodiff()"), "{text}");
    };
    launch::threads(2)
        .run(|rank| {
            let mut model = plain().tensor_parallel(&rank, Plan::new().shard("0.weight", 1))?;
            told(model.step(rows(), loss).map(drop).unwrap_err());
            let _: Tensor<2> = model.forward_with(rows(), |m, x| m[1].forward(m[0].forward(x)))?;
            // Training mode brings it there.
            model.train().step(rows(), loss)?;
            let mut model = plain().pipeline_parallel(&rank, PipelineConfig::new(2))?;
            told(model.step(rows(), loss).map(drop).unwrap_err());
            model.train().step(rows(), loss)?;
            Ok(())
        })
        .unwrap();
}
