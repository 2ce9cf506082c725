//! A step cut into stages gives what the whole step gives.

#[path = "graph/models.rs"]
#[allow(dead_code)]
mod models;

use std::collections::{BTreeMap, HashMap};

use burn::backend::GradientCheckpointingStrategy;
use burn::backend::flex::FlexTensor;
use burn::module::{Module, ParamId};
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Dropout, DropoutConfig, Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, attention};
use burn::prelude::*;
use burn::tensor::{Bool, activation};
use burn_parallel::Error;
use burn_parallel::graph::cut::{Cut, CutGraph, CutReport, StageRun, Tensors, cut};
use burn_parallel::graph::{
    CustomOps, Executor, GraphInputs, GraphTensor, StepGraph, capture_step, gradients_params, graph_tensors,
};
use models::{Cnn, Lm, Numbers, Residual, Rnn, Tied, Values, cross_entropy, device, difference, floats, grad_floats, images, scalar};
use proptest::prelude::*;

/// All stages of a cut, run one after the other in one thread.
struct Pipeline {
    stages: Vec<StageRun>,
    gradients: HashMap<ParamId, FlexTensor>,
}

fn add(sums: &mut HashMap<ParamId, FlexTensor>, id: ParamId, more: FlexTensor) {
    use burn::backend::{Flex, ops::FloatTensorOps};
    let sum = match sums.remove(&id) {
        Some(sum) => Flex::float_add(sum, more),
        None => more,
    };
    sums.insert(id, sum);
}

impl Pipeline {
    fn new(graph: &StepGraph, cut: CutGraph) -> Self {
        let stages = cut.stages.into_iter().map(|part| StageRun::new(graph, part, CustomOps::new()).unwrap()).collect();
        Self { stages, gradients: HashMap::new() }
    }

    /// What came for a stage, by sender.
    fn forward(&mut self, micro_batch: usize, inputs: &[GraphTensor]) -> f32 {
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
fn same<M: Module, I: GraphInputs + Clone>(
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
    let expected = (scalar(step.loss), grad_floats(model, &step.gradients), floats(&whole));

    let parts = model.clone().train();
    let mut pipeline = Pipeline::new(&graph, cut);
    pipeline.stages.iter_mut().for_each(|stage| stage.bind(&parts).unwrap());
    let found = pipeline.forward(0, &graph_tensors(inputs).unwrap());
    pipeline.backward(0);
    for stage in &mut pipeline.stages {
        assert_eq!(stage.under_way(), 0);
        stage.unbind(&parts);
    }
    let gradients = grad_floats(model, &gradients_params(model, pipeline.gradients));
    assert!((found - expected.0).abs() <= 1e-6 * expected.0.abs(), "{found} {}", expected.0);
    let worst = difference(&expected.1, &gradients);
    assert!(worst < 2e-5, "a gradient differs by {worst}\n{report}");
    assert_eq!(difference(&expected.2, &floats(&parts)), 0.0);
    report
}

fn lm_batch(rows: usize) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let mut numbers = Numbers(3);
    (numbers.classes([rows, 7], 13, &device()), numbers.classes([rows, 7], 13, &device()))
}

fn lm(layers: usize) -> Lm {
    Lm::new(13, 8, layers, &device())
}

#[test]
fn a_transformer_cut_between_its_layers_sends_one_tensor_each_way() {
    let by = Cut::before(["encoder.layers.1.*"]);
    let report = same(&lm(2), lm_batch(2), |m, (x, y)| m.loss(x, y), &by, 2);
    println!("{report}");
    let crossings: Vec<_> = report.crossings.iter().map(|c| (c.from, c.to, c.tensors.clone())).collect();
    assert_eq!(crossings, [(0, 1, vec![vec![2, 7, 8]]), (1, 0, vec![vec![2, 7, 8]])]);
}
