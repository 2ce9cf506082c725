//! A step cut into stages gives what the whole step gives.

use std::collections::{BTreeMap, HashMap};

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::module::{Module, Param, ParamId};
use burn::nn::{Dropout, DropoutConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::{Bool, activation};
use burn_parallel::Error;
use burn_parallel::graph::{CustomOps, Executor, StepGraph, TensorTree, capture_step, gradients_params, graph_tensors};
use burn_parallel::pipeline_parallel::cut::{
    Cut, CutGraph, CutReport, StageRun, Tensors, cut, measure_operations, operation_cost,
};
use burn_parallel::tensor::PlainTensor;
use proptest::prelude::*;

use crate::common::models::{Cnn, Lm, Numbers, Residual, Rnn, Tied, cross_entropy, device, images, scalar};
use crate::common::reference::{difference, gradient_values, values};

/// All stages of a cut, run one after the other in one thread.
struct CutPipeline {
    stages: Vec<StageRun>,
    gradients: HashMap<ParamId, PlainTensor>,
}

fn add(sums: &mut HashMap<ParamId, PlainTensor>, id: ParamId, more: PlainTensor) {
    let sum = match sums.remove(&id) {
        Some(sum) => sum.add(more),
        None => more,
    };
    sums.insert(id, sum);
}

impl CutPipeline {
    fn new(graph: &StepGraph, cut: CutGraph) -> Self {
        let stages = cut.stages.into_iter().map(|part| StageRun::new(graph, part, CustomOps::new()).unwrap()).collect();
        Self { stages, gradients: HashMap::new() }
    }

    /// What came for a stage, by sender.
    fn forward(&mut self, micro_batch: usize, inputs: &[PlainTensor]) -> f32 {
        let mut on_the_way: BTreeMap<(usize, usize), Tensors> = BTreeMap::new();
        let mut loss = None;
        for index in 0..self.stages.len() {
            let received = (0..index).filter_map(|from| Some((from, on_the_way.remove(&(from, index))?))).collect();
            let given = self.stages[index].forward(micro_batch, inputs, received).unwrap();
            on_the_way.extend(given.sends.into_iter().map(|(to, tensors)| ((index, to), tensors)));
            loss = loss.or(given.loss);
        }
        assert!(on_the_way.is_empty());
        scalar(loss.unwrap().float().unwrap())
    }

    fn backward(&mut self, micro_batch: usize) {
        let mut on_the_way: BTreeMap<(usize, usize), Tensors> = BTreeMap::new();
        let count = self.stages.len();
        for index in (0..count).rev() {
            let received = (0..count).filter_map(|from| Some((from, on_the_way.remove(&(from, index))?))).collect();
            let gradients = &mut self.gradients;
            let mut take = |id, gradient| {
                add(gradients, id, gradient);
                Ok(())
            };
            let sends = self.stages[index].backward_input(micro_batch, received, &mut take).unwrap();
            on_the_way.extend(sends.into_iter().map(|(to, tensors)| ((index, to), tensors)));
        }
        assert!(on_the_way.is_empty());
        for stage in &mut self.stages {
            let gradients = &mut self.gradients;
            let mut take = |id, gradient| {
                add(gradients, id, gradient);
                Ok(())
            };
            stage.backward_weight(micro_batch, &mut take).unwrap();
        }
    }
}

/// The whole step against its stages: loss, gradients, running statistics.
#[track_caller]
fn same<M: Module, I: TensorTree + Clone>(
    model: &M,
    inputs: I,
    loss: impl Fn(&M, I) -> Tensor<1>,
    by: &Cut,
    stages: usize,
) -> CutReport {
    let graph = capture_step(model, inputs.clone(), loss).unwrap();
    let homes = by.homes(&graph, stages).unwrap();
    let cut = cut(&graph, &homes, stages).unwrap();
    let report = cut.report.clone();

    let whole = model.clone().train();
    let mut executor = Executor::new(graph.clone(), CustomOps::new()).unwrap();
    let step = executor.step(&whole, inputs.clone()).unwrap();
    let expected = (scalar(step.loss), gradient_values(model, &step.gradients), values(&whole));

    let parts = model.clone().train();
    let mut pipeline = CutPipeline::new(&graph, cut);
    pipeline.stages.iter_mut().for_each(|stage| stage.bind(&parts).unwrap());
    let found = pipeline.forward(0, &graph_tensors(inputs).unwrap());
    pipeline.backward(0);
    for stage in &mut pipeline.stages {
        assert_eq!(stage.under_way(), 0);
        stage.unbind(&parts);
    }
    let gradients = gradient_values(model, &gradients_params(model, pipeline.gradients));
    assert!((found - expected.0).abs() <= 1e-6 * expected.0.abs(), "{found} {}", expected.0);
    let worst = difference(&expected.1, &gradients);
    assert!(worst < 2e-5, "a gradient differs by {worst}\n{report}");
    assert_eq!(difference(&expected.2, &values(&parts)), 0.0);
    report
}

fn lm_batch(rows: usize) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let mut numbers = Numbers(3);
    (numbers.classes([rows, 7], 13, &device()), numbers.classes([rows, 7], 13, &device()))
}

fn lm(layers: usize) -> Lm {
    Lm::new(13, 8, layers, &device())
}

fn lm_loss(model: &Lm, (x, y): (Tensor<2, Int>, Tensor<2, Int>)) -> Tensor<1> {
    model.loss(x, y)
}

fn crossings(report: &CutReport) -> Vec<(usize, usize, Vec<Vec<usize>>)> {
    report.crossings.iter().map(|c| (c.from, c.to, c.tensors.clone())).collect()
}

#[test]
fn a_transformer_cut_between_its_layers_sends_one_tensor_each_way() {
    let by = Cut::before(["encoder.layers.1.*", "encoder.layers.2.*"]);
    let report = same(&lm(3), lm_batch(2), lm_loss, &by, 3);
    let tensor = vec![vec![2, 7, 8]];
    let expected = [(0, 1, tensor.clone()), (1, 0, tensor.clone()), (1, 2, tensor.clone()), (2, 1, tensor)];
    assert_eq!(crossings(&report), expected);
    assert_eq!(report.bytes(), [2 * 448, 2 * 448]);
    assert!(report.tied.is_empty());
    assert!(report.to_string().contains("0 -> 1: 448 bytes"));
}

#[test]
fn a_cut_inside_a_layer_sends_what_it_must() {
    for before in ["encoder.layers.0.mha.key*", "encoder.layers.0.mha.output*", "encoder.layers.1.norm_2*", "head*"] {
        same(&lm(2), lm_batch(3), lm_loss, &Cut::before([before]), 2);
    }
}

#[test]
fn balanced_stages_count_embedding_and_head() {
    // The head costs as much as several layers here.
    let wide = Lm::new(600, 8, 6, &device());
    let mut numbers = Numbers(3);
    let batch = (numbers.classes([4, 16], 600, &device()), numbers.classes([4, 16], 600, &device()));
    for stages in [1, 2, 3] {
        let report = same(&wide, batch.clone(), lm_loss, &Cut::Balanced, stages);
        let shares: Vec<f64> = report.stages.iter().map(|stage| stage.cost).collect();
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        if stages == 2 {
            // By layers alone the last stage would have three of them and the head.
            assert!(shares[0] > 0.3, "{report}");
        }
    }
    let report = same(&lm(8), lm_batch(4), lm_loss, &Cut::Balanced, 4);
    assert!(report.stages.iter().all(|stage| (stage.cost - 0.25).abs() < 0.08), "{report}");
    assert!(report.crossings.iter().all(|c| c.from.abs_diff(c.to) == 1), "{report}");
}

#[test]
fn measured_costs_decide_when_given() {
    let model = lm(4);
    let graph = capture_step(&model, lm_batch(2), lm_loss).unwrap();
    let counted: Vec<f64> = graph.operations.iter().map(|op| operation_cost(op) as f64).collect();
    let homes = |cut: Cut| cut.homes(&graph, 2).unwrap();
    assert_eq!(homes(Cut::Measured(counted)).len(), graph.params.len());
    // If only the second half of the forward pass took time, the first stage would get more.
    let late = |op| if op >= graph.forward_len / 2 && op < graph.forward_len { 1.0 } else { 0.0 };
    let first = |homes: &[usize]| homes.iter().filter(|stage| **stage == 0).count();
    let late = homes(Cut::Measured((0..graph.operations.len()).map(late).collect()));
    assert!(first(&late) > first(&homes(Cut::Balanced)));
    let error = Cut::Measured(vec![1.0]).homes(&graph, 2).unwrap_err();
    assert!(error.to_string().contains("costs of 1 operations"), "{error}");
    for cost in [f64::NAN, -1.0, f64::INFINITY] {
        let mut costs = vec![1.0; graph.operations.len()];
        costs[7] = cost;
        let error = Cut::Measured(costs).homes(&graph, 2).unwrap_err();
        assert!(matches!(&error, Error::Plan { problem } if problem.contains("not negative")), "{error}");
    }
}

#[test]
fn tied_weights_give_a_part_of_the_gradient_on_each_stage() {
    let model = Tied::new(&device());
    let loss = |m: &Tied, (x, y)| m.loss(x, y);
    let mut numbers = Numbers(3);
    let mut batch = || numbers.classes([3, 7], 11, &device());
    let batch = (batch(), batch());
    let report = same(&model, batch.clone(), loss, &Cut::before(["inner*"]), 2);
    assert_eq!(report.tied, [("embedding.weight".to_owned(), vec![0, 1])]);
    // The weight itself does not cross.
    assert_eq!(crossings(&report), [(0, 1, vec![vec![3, 7, 6]]), (1, 0, vec![vec![3, 7, 6]])]);
    assert_eq!(report.stages[1].param_bytes, (11 * 6 + 6 * 6 + 6) * 4);
    // With stages between that have nothing.
    let by = Cut::listed([("embedding.weight", 0), ("inner.weight", 3), ("inner.bias", 3)]);
    same(&model, batch, loss, &by, 5);
}

/// A layer that is used on every level, and one weight used through an operation that is no view.
#[derive(Module, Debug)]
struct Shared {
    first: Linear,
    shared: Linear,
    scale: Param<Tensor<1>>,
    second: Linear,
    last: Linear,
}

#[test]
fn a_layer_used_by_every_stage_is_held_by_every_stage() {
    let linear = || LinearConfig::new(6, 6).init(&device());
    let scale = Param::from_tensor(Tensor::from_floats([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], &device()));
    let model = Shared { first: linear(), shared: linear(), scale, second: linear(), last: linear() }.materialize();
    let loss = |m: &Shared, x: Tensor<2>| {
        let scale = m.scale.val().exp().unsqueeze();
        let x = m.shared.forward(activation::tanh(m.first.forward(x))) * scale.clone();
        let x = m.shared.forward(activation::tanh(m.second.forward(x))) * scale;
        m.shared.forward(activation::tanh(m.last.forward(x))).powi_scalar(2).mean()
    };
    let inputs = Numbers(4).tensor([5, 6], &device());
    let by = Cut::patterns([vec!["first*", "shared*", "scale"], vec!["second*"], vec!["last*"]]);
    let report = same(&model, inputs, loss, &by, 3);
    let tied: Vec<_> = report.tied.iter().map(|(path, stages)| (path.as_str(), stages.clone())).collect();
    assert_eq!(tied, [("shared.weight", vec![0, 1, 2]), ("shared.bias", vec![0, 1, 2])]);
}

/// Skips over all levels, a mask of integers, a mask of bools, and a norm of another dtype.
#[derive(Module, Debug)]
struct Skips {
    layers: Vec<Linear>,
}

fn skips_loss(model: &Skips, (x, chosen): (Tensor<2>, Tensor<1, Int>)) -> Tensor<1> {
    let mut seen = vec![x];
    let mut kept: Option<Tensor<2, Bool>> = None;
    let mut best: Option<Tensor<2, Int>> = None;
    for (level, layer) in model.layers.iter().enumerate() {
        let mut x = activation::gelu(layer.forward(seen[level].clone()));
        for earlier in &seen[..level] {
            x = x + earlier.clone() * 0.5;
        }
        match &kept {
            // Computed by the first level, used by all later ones.
            Some(kept) => x = x.mask_fill(kept.clone(), 0.1),
            None => {
                kept = Some(x.clone().greater_elem(0.8));
                best = Some(x.clone().argmax(1));
            }
        }
        seen.push(x);
    }
    let last = seen.pop().unwrap();
    let best = best.unwrap();
    let of_best = last.clone().gather(1, best);
    let wide = last.clone().cast(burn::tensor::DType::F64).powi_scalar(2).mean().cast(burn::tensor::DType::F32);
    cross_entropy(last, chosen) + of_best.mean() + wide
}

fn skips() -> Skips {
    let layers = (0..4).map(|_| LinearConfig::new(6, 6).init(&device())).collect();
    Skips { layers }.materialize()
}

fn skips_batch() -> (Tensor<2>, Tensor<1, Int>) {
    let mut numbers = Numbers(8);
    (numbers.tensor([5, 6], &device()), numbers.classes([5], 6, &device()))
}

#[test]
fn skip_connections_go_directly_to_each_stage_that_needs_them() {
    let report = same(&skips(), skips_batch(), skips_loss, &Cut::before(["layers.1.*", "layers.2.*", "layers.3.*"]), 4);
    let forward: Vec<(usize, usize)> =
        report.crossings.iter().filter(|c| c.from < c.to).map(|c| (c.from, c.to)).collect();
    assert!(forward.contains(&(1, 3)), "{report}");
    // A mask of bools travels as what it is.
    assert!(report.crossings.iter().any(|c| c.bytes % 4 != 0), "{report}");
}

#[test]
fn indices_cross_instead_of_what_they_were_computed_from() {
    let linear = |n| LinearConfig::new(6, n).init(&device());
    let model = vec![linear(40), linear(40)].materialize();
    let loss = |model: &Vec<Linear>, x: Tensor<2>| {
        let first = model[0].forward(x.clone());
        let best = first.clone().argmax(1);
        model[1].forward(x).gather(1, best).mean() + first.powi_scalar(2).mean()
    };
    let report = same(&model, Numbers(5).tensor([5, 6], &device()), loss, &Cut::before(["1.*"]), 2);
    let forward: Vec<_> = crossings(&report).into_iter().filter(|c| c.0 < c.1).collect();
    assert_eq!(forward.len(), 1);
    assert!(forward[0].2.contains(&vec![5, 1]), "{report}");
    assert!(report.bytes()[0] < 5 * 40 * 4, "{report}");
}

#[test]
fn convolutions_and_batch_norms() {
    let cnn = Cnn::new(&device());
    let loss = |m: &Cnn, (x, y)| m.loss(x, y);
    same(&cnn, images(4, 3, &device()), loss, &Cut::before(["second.*"]), 2);
    same(&cnn, images(4, 3, &device()), loss, &Cut::before(["first.*", "second_norm.*", "head.*"]), 4);
    same(&cnn, images(4, 3, &device()), loss, &Cut::Balanced, 3);
    let residual = Residual::new(&device());
    same(&residual, images(4, 3, &device()), |m: &Residual, (x, y)| m.loss(x, y), &Cut::Balanced, 2);
}

#[test]
fn recurrent_networks() {
    let model = Rnn::new(&device());
    let mut numbers = Numbers(3);
    let mut batch = || numbers.classes([3, 5], 11, &device());
    let batch = (batch(), batch());
    let loss = |m: &Rnn, (x, y)| m.loss(x, y);
    same(&model, batch.clone(), loss, &Cut::before(["lstm*", "head*"]), 3);
    // Gates on different stages: what comes after the first time step needs both, and so do the later gates.
    let report = same(&model, batch, loss, &Cut::before(["lstm.output_gate*", "head*"]), 3);
    assert!(report.tied.iter().any(|(path, _)| path.starts_with("lstm")), "{report}");
}

#[test]
fn parameters_against_the_order_of_their_use_are_refused() {
    let graph = capture_step(&lm(2), lm_batch(2), lm_loss).unwrap();
    let refused = |by: Cut, stages| {
        let homes = by.homes(&graph, stages).unwrap();
        cut(&graph, &homes, stages).map(|_| ()).unwrap_err()
    };
    let by = Cut::patterns([vec!["head*", "encoder.layers.1*"], vec!["*"]]);
    let error = refused(by, 2);
    let says = |problem: &str| ["encoder.layers.1", "stage 0", "stage 1", "order"].iter().all(|w| problem.contains(w));
    assert!(matches!(&error, Error::Plan { problem } if says(problem)), "{error}");
    let homes = vec![7; graph.params.len()];
    let error = cut(&graph, &homes, 2).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("stage 7, but there are 2 stages"), "{error}");
    let error = cut(&graph, &homes[1..], 2).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Graph { .. }), "{error}");
}

#[test]
fn frozen_parameters_have_no_gradient_and_cross_nothing_back() {
    let mut model = lm(2);
    model.embedding = model.embedding.no_grad();
    let report = same(&model, lm_batch(2), lm_loss, &Cut::before(["encoder*"]), 2);
    assert_eq!(crossings(&report), [(0, 1, vec![vec![2, 7, 8]])]);
}

#[test]
fn what_is_computed_again_is_computed_where_it_was() {
    let device = Device::flex().autodiff().gradient_checkpointing();
    let model = Lm::new(13, 8, 3, &device);
    let mut numbers = Numbers(3);
    let batch = (numbers.classes([2, 7], 13, &device), numbers.classes([2, 7], 13, &device));
    let plain = same(&lm(3), lm_batch(2), lm_loss, &Cut::before(["encoder.layers.1.*", "encoder.layers.2.*"]), 3);
    for by in
        [Cut::before(["encoder.layers.1.*", "encoder.layers.2.*"]), Cut::before(["encoder.layers.0.mha.key*", "head*"])]
    {
        same(&model, batch.clone(), lm_loss, &by, 3);
    }
    let by = Cut::before(["encoder.layers.1.*", "encoder.layers.2.*"]);
    let again = same(&model, batch, lm_loss, &by, 3);
    // The same tensors cross, and less is kept for the backward pass.
    assert_eq!(again.crossings, plain.crossings);
    let saved = |report: &CutReport| report.stages.iter().map(|stage| stage.saved_bytes).sum::<u64>();
    assert!(saved(&again) < saved(&plain), "{again}{plain}");
}

/// Dropout whose gradient tells whether forward and backward saw the same mask.
#[derive(Module, Debug)]
struct Dropped {
    first: Linear,
    dropout: Dropout,
    second: Linear,
}

#[test]
fn forward_and_backward_see_the_same_dropout() {
    let linear = || LinearConfig::new(8, 8).with_bias(false).init(&device());
    let model = Dropped { first: linear(), dropout: DropoutConfig::new(0.5).init(), second: linear() }.materialize();
    let loss = |m: &Dropped, x: Tensor<2>| m.second.forward(m.dropout.forward(m.first.forward(x))).sum();
    let x = Numbers(3).tensor::<2>([16, 8], &device());
    let graph = capture_step(&model, x.clone(), loss).unwrap();
    let parts = cut(&graph, &[0, 1], 2).unwrap();
    let mut pipeline = CutPipeline::new(&graph, parts);
    pipeline.stages.iter_mut().for_each(|stage| stage.bind(&model).unwrap());
    let found = pipeline.forward(0, &graph_tensors(x).unwrap());
    pipeline.backward(0);
    // The loss is linear in the first weight: loss = <weight, gradient>, if the mask is the same.
    let gradient = pipeline.gradients[&model.first.weight.id].clone().float::<2>().unwrap();
    let again = scalar((model.first.weight.val().inner() * gradient).sum());
    assert!((found - again).abs() < 1e-4 * found.abs().max(1.0), "{found} {again}");
}

#[test]
fn micro_batches_under_way_do_not_see_each_other() {
    let model = lm(3);
    let (x, y) = lm_batch(6);
    let rows = |micro_batch: usize| {
        let rows = 2 * micro_batch..2 * micro_batch + 2;
        (x.clone().slice([rows.clone()]), y.clone().slice([rows]))
    };
    let graph = capture_step(&model, rows(0), lm_loss).unwrap();
    let mut executor = Executor::new(graph.clone(), CustomOps::new()).unwrap();
    let (mut losses, mut expected) = (Vec::new(), HashMap::new());
    for micro_batch in 0..3 {
        let outputs = executor.step_with(&model, rows(micro_batch), |id, gradient| {
            add(&mut expected, id, gradient);
            Ok(())
        });
        losses.push(scalar(outputs.unwrap().loss));
    }
    let homes = Cut::Balanced.homes(&graph, 3).unwrap();
    let mut pipeline = CutPipeline::new(&graph, cut(&graph, &homes, 3).unwrap());
    pipeline.stages.iter_mut().for_each(|stage| stage.bind(&model).unwrap());
    let found: Vec<f32> = (0..3).map(|m| pipeline.forward(m, &graph_tensors(rows(m)).unwrap())).collect();
    assert_eq!(pipeline.stages[0].under_way(), 3);
    // Backward in another order than forward.
    [1, 2, 0].into_iter().for_each(|micro_batch| pipeline.backward(micro_batch));
    assert_eq!(losses, found);
    let values = |gradients| gradient_values(&model, &gradients_params(&model, gradients));
    assert!(difference(&values(expected), &values(pipeline.gradients)) < 2e-5);
}

#[test]
fn what_only_gradients_of_parameters_need_can_wait() {
    let model = lm(3);
    let graph = capture_step(&model, lm_batch(2), lm_loss).unwrap();
    let homes = Cut::before(["encoder.layers.1.*", "encoder.layers.2.*"]).homes(&graph, 3).unwrap();
    let parts = cut(&graph, &homes, 3).unwrap();
    let cost = |ops: &[burn_parallel::graph::OperationIr]| ops.iter().map(operation_cost).sum::<u64>() as f64;
    // Nobody waits for the first stage; in the middle both halves of the backward pass cost about as much as the
    // forward.
    assert!(parts.stages[0].backward_input.is_empty());
    let middle = &parts.stages[1];
    let [forward, input, weight] =
        [&middle.forward, &middle.backward_input, &middle.backward_weight].map(|ops| cost(ops));
    assert!(input / forward > 0.5 && weight / forward > 0.2 && input / forward < 3.0, "{forward} {input} {weight}");
}

/// Two layers on each of three stages: a zero-bubble schedule can put off all that weights alone need, and nothing
/// else.
#[test]
fn gradients_of_weights_are_computed_in_their_half_and_not_before() {
    let model = (0..6).map(|_| LinearConfig::new(6, 6).init(&device())).collect::<Vec<Linear>>().materialize();
    let loss = |model: &Vec<Linear>, x: Tensor<2>| {
        model.iter().fold(x, |x, layer| activation::tanh(layer.forward(x))).powi_scalar(2).mean()
    };
    let x = Numbers(5).tensor::<2>([5, 6], &device());
    let graph = capture_step(&model, x.clone(), loss).unwrap();
    let homes = Cut::before(["2.*", "4.*"]).homes(&graph, 3).unwrap();
    let parts = cut(&graph, &homes, 3).unwrap();
    // Operations that multiply a batch with a matrix, forward or backward.
    let products = |ops: &[burn_parallel::graph::OperationIr]| {
        let is_product = |op: &&burn_parallel::graph::OperationIr| {
            let text = format!("{op:?}");
            (text.contains("Matmul(") || text.contains("Linear")) && !text.contains("BiasBackward")
        };
        ops.iter().filter(is_product).count()
    };
    let found: Vec<[usize; 3]> = parts
        .stages
        .iter()
        .map(|part| [&part.forward, &part.backward_input, &part.backward_weight].map(|ops| products(ops)))
        .collect();
    // Nobody waits for the first stage: the gradient of its second layer's input is only for weights.
    assert_eq!(found, [[2, 0, 3], [2, 2, 2], [2, 2, 2]]);

    let mut stages: Vec<StageRun> =
        parts.stages.into_iter().map(|part| StageRun::new(&graph, part, CustomOps::new()).unwrap()).collect();
    stages.iter_mut().for_each(|stage| stage.bind(&model).unwrap());
    let inputs = graph_tensors(x).unwrap();
    let mut received = BTreeMap::new();
    for (index, stage) in stages.iter_mut().enumerate() {
        let mut given = stage.forward(0, &inputs, std::mem::take(&mut received)).unwrap();
        received.extend(given.sends.remove(&(index + 1)).map(|tensors| (index, tensors)));
    }
    let mut received = BTreeMap::new();
    for (index, stage) in stages.iter_mut().enumerate().rev() {
        let mut early = 0;
        let mut sends = stage
            .backward_input(0, std::mem::take(&mut received), &mut |_, _| {
                early += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!((early, stage.under_way()), (0, 1), "stage {index}");
        received.extend(index.checked_sub(1).and_then(|to| Some((index, sends.remove(&to)?))));
    }
    for (index, stage) in stages.iter_mut().enumerate() {
        let mut late = Vec::new();
        stage
            .backward_weight(0, &mut |id, _| {
                late.push(id);
                Ok(())
            })
            .unwrap();
        late.sort();
        let mut own: Vec<ParamId> = model[2 * index..2 * index + 2]
            .iter()
            .flat_map(|layer| [layer.weight.id, layer.bias.as_ref().unwrap().id])
            .collect();
        own.sort();
        assert_eq!((late, stage.under_way()), (own, 0), "stage {index}");
    }
}

/// Not only counted: what a stage has got is held by nobody once its backward is over.
#[test]
fn a_micro_batch_leaves_nothing_behind() {
    let model = lm(2);
    let graph = capture_step(&model, lm_batch(2), lm_loss).unwrap();
    let homes = Cut::before(["encoder.layers.1.*"]).homes(&graph, 2).unwrap();
    let mut pipeline = CutPipeline::new(&graph, cut(&graph, &homes, 2).unwrap());
    pipeline.stages.iter_mut().for_each(|stage| stage.bind(&model).unwrap());
    let inputs = graph_tensors(lm_batch(2)).unwrap();
    let [first, second] = &mut pipeline.stages[..] else { panic!("two stages") };
    let given = first.forward(0, &inputs, BTreeMap::new()).unwrap();
    let flex = |tensor: &PlainTensor| tensor.clone().float::<3>().unwrap().try_into_primitive::<Flex>().unwrap();
    let crossing: Vec<FlexTensor> = given.sends[&1].iter().map(flex).collect();
    second.forward(0, &inputs, BTreeMap::from([(0, given.sends[&1].clone())])).unwrap();
    drop(given);
    assert!(!crossing.is_empty() && crossing.iter().all(|tensor| !tensor.is_unique()), "kept for the backward");
    let mut ignore = |_, _| Ok(());
    let mut back = second.backward_input(0, BTreeMap::new(), &mut ignore).unwrap();
    first.backward_input(0, BTreeMap::from([(1, back.remove(&0).unwrap())]), &mut ignore).unwrap();
    second.backward_weight(0, &mut ignore).unwrap();
    first.backward_weight(0, &mut ignore).unwrap();
    assert!(crossing.iter().all(FlexTensor::is_unique));
    for input in inputs {
        let input = input.int::<2>().unwrap().try_into_primitive::<Flex>().unwrap();
        assert!(input.is_unique(), "inputs are let go of");
    }
}

#[test]
fn operations_are_measured_one_by_one() {
    let model = lm(2);
    let graph = capture_step(&model, lm_batch(2), lm_loss).unwrap();
    let costs = measure_operations(&graph, &Device::flex(), 2).unwrap();
    assert_eq!(costs.len(), graph.operations.len());
    assert!(costs.iter().all(|cost| cost.is_finite() && *cost >= 0.0));
    for (op, cost) in graph.operations.iter().zip(&costs) {
        // Views take nothing, everything else takes time.
        assert_eq!(operation_cost(op) == 0, *cost == 0.0, "{op:?} {cost}");
    }
    // The same operation on the same shapes is measured once.
    let distinct: std::collections::BTreeSet<u64> = costs.iter().map(|cost| cost.to_bits()).collect();
    assert!(distinct.len() < costs.len() / 2, "{} of {}", distinct.len(), costs.len());
    let report = same(&model, lm_batch(2), lm_loss, &Cut::Measured(costs), 3);
    assert_eq!(report.stages.len(), 3);

    // A matrix of 256 times the elements takes longer, however noisy the machine.
    let pair = vec![LinearConfig::new(16, 16).init(&device()), LinearConfig::new(16, 4096).init(&device())];
    let loss = |model: &Vec<Linear>, x: Tensor<2>| model[1].forward(model[0].forward(x)).powi_scalar(2).mean();
    let graph = capture_step(&pair, Tensor::<2>::ones([64, 16], &device()), loss).unwrap();
    let costs = measure_operations(&graph, &Device::flex(), 5).unwrap();
    let forward: Vec<f64> = costs[..graph.forward_len].iter().copied().filter(|cost| *cost > 0.0).collect();
    assert!(forward[0] * 4.0 < forward.iter().copied().fold(0.0, f64::max), "{forward:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_boundaries(mut starts in proptest::collection::vec(0usize..80, 1..4), which in 0usize..3) {
        let stages = starts.len() + 1;
        starts.sort_unstable();
        let order = |graph: &StepGraph| -> Vec<usize> {
            // In the order of use: fields may be in another one.
            let first = |place: usize| {
                let id = graph.params[place].tensor.id;
                graph.operations.iter().position(|op| op.inputs().any(|input| input.id == id))
            };
            let mut order: Vec<usize> = (0..graph.params.len()).collect();
            order.sort_by_key(|place| first(*place));
            let mut stages = vec![0; order.len()];
            for (rank, place) in order.into_iter().enumerate() {
                stages[place] = starts.iter().filter(|start| **start * graph.params.len() / 80 < rank).count();
            }
            stages
        };
        let listed = |graph: StepGraph| {
            Cut::listed(graph.params.iter().map(|param| param.path.clone()).zip(order(&graph)))
        };
        match which {
            0 => {
                let by = listed(capture_step(&lm(2), lm_batch(2), lm_loss).unwrap());
                same(&lm(2), lm_batch(2), lm_loss, &by, stages);
            }
            1 => {
                let model = Tied::new(&device());
                let mut numbers = Numbers(3);
                let mut batch = || numbers.classes([3, 7], 11, &device());
                let batch = (batch(), batch());
                let loss = |m: &Tied, (x, y): (Tensor<2, Int>, Tensor<2, Int>)| m.loss(x, y);
                let by = listed(capture_step(&model, batch.clone(), loss).unwrap());
                same(&model, batch, loss, &by, stages);
            }
            _ => {
                let model = skips();
                let by = listed(capture_step(&model, skips_batch(), skips_loss).unwrap());
                same(&model, skips_batch(), skips_loss, &by, stages);
            }
        }
    }
}
