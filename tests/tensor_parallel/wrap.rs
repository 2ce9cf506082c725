//! `TensorParallel` on models of every kind: what is wrapped trains and evaluates as it does on one device.

use burn::module::{Lora, Module, Param, ParamId};
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Dropout, DropoutConfig, Embedding, EmbeddingConfig, Linear, LinearConfig, SwiGlu, SwiGluConfig};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::graph::{TensorMapper, TensorTree};
use burn_parallel::partition::{Collective, CollectiveKind};
use burn_parallel::prelude::*;

use crate::common::models::{Cnn, Mlp, Numbers, Rnn, Tied, cross_entropy, device, eager, images, scalar};
use crate::common::reference::{alone, close, gradient_values, own};
use crate::compare::splits_like_one;

fn rows(step: usize) -> (Tensor<2>, Tensor<1, Int>) {
    let mut numbers = Numbers(step as u64 + 40);
    (numbers.tensor([6, 6], &device()), numbers.classes([6], 4, &device()))
}

fn tokens(step: usize) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let mut numbers = Numbers(step as u64 + 60);
    (numbers.classes([4, 5], 11, &device()), numbers.classes([4, 5], 11, &device()))
}

fn mlp_plan() -> Plan {
    Plan::new().shard("first.weight", 1).shard("first.bias", 0).shard("second.weight", 0)
}

fn mlp_loss(model: &Mlp, (x, targets): (Tensor<2>, Tensor<1, Int>)) -> Tensor<1> {
    model.loss(x, targets)
}

#[test]
fn a_record_of_another_run_is_told_where_to_be_loaded() {
    launch::threads(2)
        .run(|rank| {
            let run = || own(&Mlp::new(0.0, &device())).tensor_parallel(&rank, mlp_plan());
            // Parts of the same dims, under other ids.
            let mut loaded = run()?.load_record(run()?.into_record());
            let error = loaded.step(rows(0), mlp_loss).unwrap_err().to_string();
            assert!(error.contains("`first.weight`") && error.contains("before it is wrapped"), "{error}");
            let error = loaded.forward_with(rows(0).0, |model, x| model.forward(x)).unwrap_err().to_string();
            assert!(error.contains("`first.weight`"), "{error}");
            Ok(())
        })
        .unwrap();
}

#[test]
fn frozen_parameters() {
    let mut model = Mlp::new(0.0, &device());
    model.first = model.first.freeze();
    splits_like_one(&model, rows, mlp_loss, &mlp_plan(), &[1, 2, 4]);
    let mut model = Mlp::new(0.0, &device());
    model.second = model.second.freeze();
    splits_like_one(&model, rows, mlp_loss, &mlp_plan(), &[2]);
}

#[test]
fn low_rank_adapters() {
    let model = Mlp::new(0.0, &device()).apply_lora(Lora::new(2, 4.0));
    splits_like_one(&model, rows, mlp_loss, &mlp_plan(), &[2, 4]);
    // The adapters too.
    let table = mlp_plan().table(&model, 2).unwrap();
    let factor = table.rows().iter().find(|row| row.path.starts_with("first.weight.") && row.dims == [2, 16]).unwrap();
    splits_like_one(&model, rows, mlp_loss, &mlp_plan().shard(factor.path.clone(), 1), &[2]);
}

#[test]
fn gradient_checkpointing() {
    fn batch(step: usize) -> (Tensor<2>, Tensor<1, Int>) {
        let (device, mut numbers) = (device().gradient_checkpointing(), Numbers(step as u64));
        (numbers.tensor([6, 6], &device), numbers.classes([6], 4, &device))
    }
    let model = Mlp::new(0.0, &device().gradient_checkpointing());
    let reference = alone(&model, 1, batch, mlp_loss);
    launch::threads(2)
        .run(|rank| {
            let model = model.clone().fork(&device().gradient_checkpointing());
            let step = model.tensor_parallel(&rank, mlp_plan())?.step(batch(0), mlp_loss)?;
            close("loss", reference[0].loss, step.loss.item() as f32);
            Ok(())
        })
        .unwrap();
}

#[test]
fn running_statistics() {
    let plan =
        Plan::new().shard("first.weight", 0).shard("norm.*", 0).shard("second.weight", 1).shard("head.weight", 0);
    let loss = |m: &Cnn, (x, t): (Tensor<4>, Tensor<1, Int>)| m.loss(x, t);
    splits_like_one(&Cnn::new(&device()), |step| images(4, step as u64, &device()), loss, &plan, &[1, 2, 4]);
}

#[test]
fn tied_weights() {
    let loss = |m: &Tied, (x, t): (Tensor<2, Int>, Tensor<2, Int>)| m.loss(x, t);
    let model = Tied::new(&device());
    splits_like_one(&model, tokens, loss, &Plan::new().shard("embedding.weight", 1), &[2, 3]);
    splits_like_one(&model, tokens, loss, &Plan::new().shard("embedding.weight", 1).shard("inner.weight", 0), &[2]);
}

/// With a state that two ranks can share.
fn wider(model: Rnn) -> Rnn {
    let lstm = burn::nn::LstmConfig::new(6, 8, true).init(&device());
    Rnn { lstm, head: LinearConfig::new(8, 11).init(&device()), ..model }
}

#[test]
fn recurrence_by_a_suggested_plan() {
    let loss = |m: &Rnn, (x, t): (Tensor<2, Int>, Tensor<2, Int>)| m.loss(x, t);
    let model = wider(Rnn::new(&device()));
    let plan = Plan::suggest_for(&model, 2, tokens(0), loss).unwrap();
    splits_like_one(&model, tokens, loss, &plan, &[2]);
}

/// Inputs and outputs with names.
#[derive(Clone)]
struct Batch {
    x: Tensor<2>,
    mask: Tensor<2, Bool>,
    more: Vec<(Tensor<1, Int>, Option<Tensor<1>>)>,
}

impl TensorTree for Batch {
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
        let ((x, mask), more) = ((self.x, self.mask), self.more).map_tensors(mapper)?;
        Ok(Self { x, mask, more })
    }
}

fn batch(seed: u64) -> Batch {
    let mut numbers = Numbers(seed);
    let mask = numbers.tensor::<2>([6, 16], &device()).greater_elem(0.3);
    let weights = numbers.tensor::<1>([6], &device()).abs();
    let more = vec![(numbers.classes([6], 4, &device()), Some(weights)), (numbers.classes([6], 4, &device()), None)];
    Batch { x: numbers.tensor([6, 6], &device()), mask, more }
}

#[derive(Clone)]
struct Seen {
    hidden: Tensor<2>,
    classes: Tensor<1, Int>,
    right: (Tensor<1, Bool>, &'static str),
}

impl TensorTree for Seen {
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
        let (hidden, classes, right) = (self.hidden, self.classes, self.right.0).map_tensors(mapper)?;
        Ok(Self { hidden, classes, right: (right, self.right.1) })
    }
}

fn look(model: &Mlp, batch: &Batch) -> (Tensor<2>, Seen) {
    let hidden = activation::gelu(model.first.forward(batch.x.clone())).mask_fill(batch.mask.clone(), 0.0);
    let logits = model.second.forward(hidden.clone());
    let classes = logits.clone().argmax(1).squeeze_dim::<1>(1);
    let right = classes.clone().equal(batch.more[1].0.clone());
    (logits, Seen { hidden, classes, right: (right, "of the second targets") })
}

fn summed(model: &Mlp, batch: Batch) -> (Loss, Seen) {
    let (logits, seen) = look(model, &batch);
    let (targets, weights) = (batch.more[0].0.clone(), batch.more[0].1.clone().unwrap());
    let chosen = activation::log_softmax(logits, 1).gather(1, targets.reshape([6, 1])).squeeze_dim::<1>(1);
    (Loss::sum((chosen * weights.clone()).sum().neg(), weights.sum()), seen)
}

#[test]
fn structures_of_inputs_and_outputs_and_weighted_losses() {
    let model = Mlp::new(0.0, &device());
    let given = batch(5);
    let (loss, gradients) = eager(&model, |m| {
        let (logits, _) = look(m, &given);
        let (targets, weights) = (given.more[0].0.clone(), given.more[0].1.clone().unwrap());
        let chosen = activation::log_softmax(logits, 1).gather(1, targets.reshape([6, 1])).squeeze_dim::<1>(1);
        (chosen * weights.clone()).sum().neg() / weights.sum()
    });
    let expected = gradient_values(&model, &gradients);
    let (_, seen) = look(&model.valid(), &given);
    let weight: f32 = given.more[0].1.clone().unwrap().sum().into_scalar();
    for degree in [2, 4] {
        launch::threads(degree)
            .run(|rank| {
                let mut model = own(&model).tensor_parallel(&rank, mlp_plan())?;
                let step = model.step(given.clone(), summed)?;
                close("loss", loss, step.loss.item() as f32);
                assert!((step.weight - f64::from(weight)).abs() < 1e-6);
                let [hidden, classes, right] = <[_; 3]>::try_from(step.outputs.into_iter().next().unwrap()).unwrap();
                assert_eq!(classes.int::<1>()?.into_data(), seen.classes.clone().into_data());
                assert_eq!(right.bool::<1>()?.into_data(), seen.right.0.clone().into_data());
                let far = (hidden.float::<2>()? - seen.hidden.clone().inner()).abs().max().into_scalar::<f32>();
                assert!(far < 1e-6, "{far}");
                // The part of a gradient that belongs to this rank.
                let width = 16 / degree;
                let found: Vec<f32> =
                    step.grads.get::<2>(model.local().first.weight.id).unwrap().into_data().try_to_vec().unwrap();
                let whole = &expected["first.weight"].values;
                for (place, found) in found.into_iter().enumerate() {
                    let (row, column) = (place / width, place % width + rank.rank() * width);
                    assert!((found - whole[row * 16 + column]).abs() < 1e-6);
                }
                // A forward alone gives the structure back.
                let given = model.forward_with(given.clone(), |m, batch| look(m, &batch).1)?;
                assert_eq!(given.right.1, "of the second targets");
                assert_eq!(given.classes.into_data(), seen.classes.clone().into_data());
                let far = (given.hidden - seen.hidden.clone().inner()).abs().max().into_scalar::<f32>();
                assert!(far < 1e-6, "{far}");
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn evaluation_has_no_dropout_and_takes_running_statistics() {
    let model = own(&Cnn::new(&device()));
    // Statistics that are not those of the batch.
    model.loss(images(4, 8, &device()).0, images(4, 8, &device()).1);
    let model = own(&model);
    let expected = model.valid().first_layer(images(4, 9, &device()).0.inner());
    let plan = Plan::new().shard("first.weight", 0).shard("norm.gamma", 0);
    launch::threads(2)
        .run(|rank| {
            let sharded = own(&model).tensor_parallel(&rank, &plan)?;
            for sharded in [sharded.valid(), sharded] {
                let found = sharded.forward_with(images(4, 9, &device()).0, Cnn::first_layer)?;
                let far = (found - expected.clone()).abs().max().into_scalar::<f32>();
                assert!(far < 1e-5, "{far}");
            }
            let dropped = own(&Mlp::new(0.9, &device())).tensor_parallel(&rank, mlp_plan())?;
            let x = || rows(0).0;
            let twice = [(); 2].map(|()| dropped.forward_with(x(), |m, x| m.forward(x)).map(Tensor::into_data));
            let [first, second] = twice;
            assert_eq!(first?, second?);
            Ok(())
        })
        .unwrap();
}

#[test]
fn two_closures_are_two_graphs_and_one_closure_is_one() {
    launch::threads(2)
        .run(|rank| {
            let mut model = own(&Mlp::new(0.0, &device())).tensor_parallel(&rank, mlp_plan())?;
            for _ in 0..2 {
                let sum = model.forward_with(rows(0).0, |m, x| m.forward(x).sum())?.into_scalar::<f32>();
                let mean = model.forward_with(rows(0).0, |m, x| m.forward(x).mean())?.into_scalar::<f32>();
                close("24 elements", sum, 24.0 * mean);
                let loss = model.step(rows(0).0, |m, x| m.forward(x).sum())?.loss.item() as f32;
                let other = model.step(rows(0).0, |m, x| m.forward(x).mean())?.loss.item() as f32;
                close("24 elements", loss, 24.0 * other);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn dropout_is_that_of_one_rank_whatever_the_degree() {
    let model = Mlp::new(0.4, &device());
    let run = |degree: usize, seed: u64| {
        let losses = launch::threads(degree).run(|rank| {
            let mut model =
                own(&model).tensor_parallel(&rank, TensorParallelConfig::new(mlp_plan()).with_seed(seed))?;
            (0..3).map(|_| Ok(model.step(rows(0), mlp_loss)?.loss.item() as f32)).collect::<Result<Vec<f32>, Error>>()
        });
        losses.unwrap().swap_remove(0)
    };
    let alone = run(1, 3);
    assert!(alone[0] != alone[1] && alone[1] != alone[2], "each step drops others: {alone:?}");
    assert_ne!(alone, run(1, 4));
    for degree in [2, 4] {
        run(degree, 3).iter().zip(&alone).for_each(|(a, b)| close("loss", *a, *b));
    }
}

#[test]
fn dropout_goes_on_where_it_was_when_a_model_is_wrapped_again() {
    let model = Mlp::new(0.4, &device());
    let losses = launch::threads(4).run(|world| {
        let mesh = Mesh::new(&world, [("dp", 2), ("tp", 2)])?;
        let (dp, tp) = (mesh.axis("dp")?, mesh.axis("tp")?);
        let wrap = || Ok::<_, Error>(own(&model).tensor_parallel(&tp, mlp_plan())?.with_seed(3));
        type Model = burn_parallel::tensor_parallel::Sharded<Mlp>;
        let losses = |model: &mut Model, steps: usize| {
            (0..steps)
                .map(|_| Ok(model.step(rows(0), mlp_loss)?.loss.item() as f32))
                .collect::<Result<Vec<f32>, Error>>()
        };
        let mut once = wrap()?;
        let expected = losses(&mut once, 6)?;
        assert_eq!(once.random_step(), 6);

        // As from a checkpoint.
        let mut first = wrap()?;
        let mut found = losses(&mut first, 2)?;
        let mut second = first.assemble()?.tensor_parallel(&tp, mlp_plan())?.with_seed(first.seed());
        second.set_random_step(first.random_step());
        found.extend(losses(&mut second, 2)?);

        // Another wrapper leaves the step where it is.
        let mut replicas = second.data_parallel(&dp, DataParallelConfig::new())?;
        assert_eq!(replicas.random_step(), 4);
        for _ in 0..2 {
            // The loss of the step is the mean over the replicas, but the outputs are each one's own.
            let step = replicas.step(rows(0), |m, x| {
                let loss = mlp_loss(m, x);
                (loss.clone(), loss)
            })?;
            found.push(scalar(step.outputs[0][0].clone().float().unwrap()));
        }
        let back = replicas.into_inner().data_parallel(&dp, DataParallelConfig::new())?;
        assert_eq!(back.random_step(), 6);
        assert_eq!(back.into_inner().with_seed(5).random_step(), 6);
        Ok((expected, found))
    });
    for (rank, (expected, found)) in losses.unwrap().iter().enumerate() {
        let same = if rank < 2 { 6 } else { 4 };
        found[..same].iter().zip(expected).for_each(|(a, b)| close("loss", *a, *b));
        // The second replica has numbers of its own.
        assert!(found[same..].iter().all(|loss| !expected.contains(loss)), "{found:?} {expected:?}");
    }
}

#[derive(Module, Debug)]
struct Gated {
    tokens: Embedding,
    swiglu: SwiGlu,
    down: Linear,
    dropout: Dropout,
    head: Linear,
}

#[test]
fn a_vocabulary_and_a_gated_layer_by_ready_plans() {
    let device = device();
    let model = Gated {
        tokens: EmbeddingConfig::new(12, 8).init(&device),
        swiglu: SwiGluConfig::new(8, 16).with_bias(true).init(&device),
        down: LinearConfig::new(16, 8).init(&device),
        dropout: DropoutConfig::new(0.0).init(),
        head: LinearConfig::new(8, 12).init(&device),
    };
    let loss = |m: &Gated, (x, t): (Tensor<2, Int>, Tensor<2, Int>)| {
        let x = m.tokens.forward(x);
        let x = x.clone() + m.down.forward(m.swiglu.forward(x));
        cross_entropy(m.head.forward(m.dropout.forward(x)).reshape([20, 12]), t.reshape([20]))
    };
    let plan = Plan::swiglu("swiglu").shard("down.weight", 0).then(Plan::vocabulary("tokens", "head"));
    splits_like_one(&model, tokens, loss, &plan, &[2, 4]);
    let reports = launch::threads(2).run(|rank| {
        let mut model = own(&model).tensor_parallel(&rank, &plan)?;
        model.step(tokens(0), loss)?;
        Ok(model.report().shard())
    });
    // Nothing is gathered: neither the embedding, nor the logits, nor the columns of the gated layer.
    let report = &reports.unwrap()[0];
    assert_eq!(report.count(CollectiveKind::AllGather), [0, 0], "{report}");
    assert!(report.fallbacks.is_empty(), "{report}");
}

#[test]
fn sequence_parallelism_by_plan() {
    let model: TransformerEncoder = TransformerEncoderConfig::new(24, 48, 6, 2).with_dropout(0.0).init(&device());
    let loss = |m: &TransformerEncoder, x: Tensor<3>| m.forward(TransformerEncoderInput::new(x)).powi_scalar(2).mean();
    let batch = |step: usize| Numbers(step as u64 + 3).tensor([2, 6, 24], &device());
    let plan = Plan::megatron().sequence_parallel(1);
    splits_like_one(&model, batch, loss, &plan, &[1, 2, 3]);
    for (plan, scattered) in [(&plan, true), (&Plan::megatron(), false)] {
        let reports = launch::threads(2).run(|rank| {
            let mut model = own(&model).tensor_parallel(&rank, plan)?;
            model.step(batch(0), loss)?;
            Ok(model.report().shard())
        });
        let report = &reports.unwrap()[0];
        let activations = |kind, forward| {
            let elements = |c: &Collective| c.dims.iter().product::<usize>();
            let of = |c: &&Collective| c.kind == kind && c.forward == forward && elements(c) == 2 * 6 * 24;
            report.collectives.iter().filter(of).count()
        };
        let counts = |kind| [activations(kind, true), activations(kind, false)];
        // Two a layer and pass, but for the gradient of the input, which nobody asks for.
        let (all_reduces, scattering) = (counts(CollectiveKind::AllReduce), counts(CollectiveKind::ReduceScatter));
        assert_eq!((all_reduces, scattering), if scattered { ([0, 0], [4, 3]) } else { ([4, 3], [0, 0]) }, "{report}");
        // What is scattered is gathered again, but for the output; and its gradient, the output's too.
        let gathers = if scattered { [3, 4] } else { [0, 0] };
        assert_eq!(counts(CollectiveKind::AllGather), gathers, "{report}");
        assert_eq!(report.count(CollectiveKind::AllToAll), [0, 0], "{report}");
        assert!(report.fallbacks.is_empty(), "{report}");
    }
}

#[test]
fn a_suggested_plan_is_no_worse_than_megatrons() {
    let encoder = |d, f, heads, layers| -> TransformerEncoder {
        TransformerEncoderConfig::new(d, f, heads, layers).with_dropout(0.0).init(&device())
    };
    let loss = |m: &TransformerEncoder, x: Tensor<3>| m.forward(TransformerEncoderInput::new(x)).powi_scalar(2).mean();
    for (model, x) in [(encoder(24, 48, 4, 2), [4, 6, 24]), (encoder(64, 256, 4, 3), [4, 16, 64])] {
        for degree in [2, 4] {
            let x = || Tensor::<3>::zeros(x, &device());
            let plan = Plan::suggest_for(&model, degree, x(), loss).unwrap();
            let found = plan.cost(&model, degree, x(), loss).unwrap();
            let megatron = Plan::megatron().cost(&model, degree, x(), loss).unwrap();
            assert!(found.collective_bytes <= megatron.collective_bytes, "{plan:?} {found:?} {megatron:?}");
            assert!(found.parameter_bytes <= megatron.parameter_bytes, "{plan:?} {found:?} {megatron:?}");
            assert!(found.work <= 1.01 * megatron.work, "{plan:?} {found:?} {megatron:?}");
            // From the layers alone it is Megatron's.
            let guess = Plan::suggest(&model, degree).cost(&model, degree, x(), loss).unwrap();
            assert_eq!(guess, megatron);
            assert_eq!(plan, Plan::suggest_for(&model, degree, x(), loss).unwrap(), "the same again");
        }
    }
}

/// Layers of which the first needs the gradient of what it takes, as inside of a model.
#[derive(Module, Debug)]
struct Chain {
    gain: Param<Tensor<2>>,
    layers: Vec<Linear>,
}

#[test]
fn a_plan_from_the_layers_alone_costs_little_more_than_the_best() {
    let loss =
        |m: &Chain, x: Tensor<2>| m.layers.iter().fold(x * m.gain.val(), |x, layer| layer.forward(x).tanh()).sum();
    let named = |cuts: usize, layers: usize| {
        let split = |plan: Plan, layer: usize| match cuts >> layer & 1 {
            0 => plan.shard(format!("layers.{layer}.weight"), 1).shard(format!("layers.{layer}.bias"), 0),
            _ => plan.shard(format!("layers.{layer}.weight"), 0),
        };
        (0..layers).fold(Plan::new(), split)
    };
    let widths: [&[usize]; 6] = [
        &[64, 256, 64],
        &[256, 64, 256],
        &[64, 64, 64, 64],
        &[256, 256, 16],
        &[32, 256, 256, 32, 256],
        &[512, 32, 32, 512],
    ];
    for widths in widths {
        let linear = |pair: &[usize]| LinearConfig::new(pair[0], pair[1]).init(&device());
        let gain = Param::initialized(ParamId::new(), Tensor::ones([1, widths[0]], &device()).require_grad());
        let model = Chain { gain, layers: widths.windows(2).map(linear).collect() };
        let x = || Tensor::<2>::zeros([1024, widths[0]], &device());
        for degree in [2, 4] {
            let cost = |plan: &Plan| plan.cost(&model, degree, x(), loss).unwrap().total();
            let layers = model.layers.len();
            let best = (0..1 << layers).map(|cuts| cost(&named(cuts, layers))).fold(f64::INFINITY, f64::min);
            let found = Plan::suggest(&model, degree);
            assert!(cost(&found) <= 1.2 * best, "{widths:?}: {} of {best}, {found:?}", cost(&found));
        }
    }
}

#[test]
fn a_suggested_plan_splits_most_of_any_model() {
    fn part<M: Module>(plan: &Plan, model: &M) -> f64 {
        let bytes = |plan: &Plan| plan.table(model, 2).unwrap().bytes() as f64;
        bytes(plan) / bytes(&Plan::new())
    }
    let cnn = Cnn::new(&device());
    let loss = |m: &Cnn, (x, t): (Tensor<4>, Tensor<1, Int>)| m.loss(x, t);
    let plan = Plan::suggest_for(&cnn, 2, images(4, 1, &device()), loss).unwrap();
    assert!(part(&plan, &cnn) < 0.65, "{plan:?}");
    assert!(part(&Plan::suggest(&cnn, 2), &cnn) < 0.75);
    splits_like_one(&cnn, |step| images(4, step as u64, &device()), loss, &plan, &[2]);

    let rnn = wider(Rnn::new(&device()));
    let loss = |m: &Rnn, (x, t): (Tensor<2, Int>, Tensor<2, Int>)| m.loss(x, t);
    let plan = Plan::suggest_for(&rnn, 2, tokens(0), loss).unwrap();
    assert!(part(&plan, &rnn) < 0.65, "{plan:?}");
}

#[test]
fn the_gradient_of_a_split_weight_is_computed_in_parts_from_whole_activations() {
    let gain = Param::initialized(ParamId::new(), Tensor::ones([1, 256], &device()).require_grad());
    let model = Chain { gain, layers: vec![LinearConfig::new(256, 64).init(&device())] };
    let loss = |m: &Chain, x: Tensor<2>| m.layers[0].forward(x * m.gain.val()).sum();
    let work = |plan: Plan| plan.cost(&model, 4, Tensor::zeros([1024, 256], &device()), loss).unwrap().work;
    let (rows, whole) = (work(Plan::new().shard("layers.0.weight", 0)), work(Plan::new()));
    // Three products, a quarter of each.
    assert!(rows < 0.35 * whole, "{rows} of {whole}");
}
