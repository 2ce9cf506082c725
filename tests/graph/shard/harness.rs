//! Trains the same step on one rank and, partitioned, on the ranks of a mesh, and compares.

use burn::module::{Module, ModuleMapper, Param};
use burn::prelude::*;
use burn_parallel::graph::{
    CustomOps, Executor, RandomSource, StepGraph, TensorTree, capture_step, counter_based_rng,
    register_counter_based_rng,
};
use burn_parallel::partition::{PartitionOptions, ShardReport, partition, register_collectives};
use burn_parallel::prelude::*;

use crate::common::models::{device, scalar};
use crate::common::reference::{Reference, Whole, filled, gradient_values, optimizer, same, values};

/// How a step is split over one axis.
#[derive(Debug, Clone)]
pub struct Axis {
    pub name: &'static str,
    pub degree: usize,
    pub plan: Plan,
    pub inputs: Vec<Layout>,
    pub sequence: Option<usize>,
}

impl Axis {
    pub fn new(name: &'static str, degree: usize, plan: Plan) -> Self {
        Self { name, degree, plan, inputs: Vec::new(), sequence: None }
    }

    /// Data parallelism: all inputs split along their first dim.
    pub fn batch(degree: usize) -> Self {
        Self { inputs: vec![Layout::Sharded(0); 2], ..Self::new("dp", degree, Plan::new()) }
    }

    pub fn sequence(self, dim: usize) -> Self {
        Self { sequence: Some(dim), ..self }
    }

    fn input(&self, place: usize) -> Layout {
        self.inputs.get(place).copied().unwrap_or(Layout::Replicated)
    }
}

impl Whole {
    /// This, as a rank has it.
    pub fn part(&self, layout: Layout, degree: usize, rank: usize) -> Self {
        let Layout::Sharded(dim) = layout else { return self.clone() };
        let (before, size) = (self.dims[..dim].iter().product::<usize>(), self.dims[dim]);
        let behind: usize = self.dims[dim + 1..].iter().product();
        // What is not divided evenly is padded with zeros.
        let share = size.div_ceil(degree);
        let mut values = Vec::new();
        for block in 0..before {
            let (from, to) = (size.min(rank * share), size.min((rank + 1) * share));
            values.extend_from_slice(&self.values[(block * size + from) * behind..(block * size + to) * behind]);
            values.resize((block + 1) * share * behind, 0.0);
        }
        let mut dims = self.dims.clone();
        dims[dim] = share;
        Self { dims, values }
    }
}

/// This rank's part of a model.
pub fn cut<M: Module>(model: M, axes: &[Axis], place: &[usize]) -> M {
    model.map(&mut CutParams { axes, place, path: Vec::new() })
}

/// Leaves this rank's part of every parameter.
struct CutParams<'a> {
    axes: &'a [Axis],
    place: &'a [usize],
    path: Vec<String>,
}

impl ModuleMapper for CutParams<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        let (id, mut value, mapper) = param.consume();
        let trained = value.is_require_grad();
        for (axis, rank) in self.axes.iter().zip(self.place) {
            if let Layout::Sharded(dim) = axis.plan.layout(&path) {
                let share = value.dims()[dim].div_ceil(axis.degree);
                let mut padding = value.dims();
                padding[dim] = share * axis.degree - value.dims()[dim];
                if padding[dim] > 0 {
                    let zeros = Tensor::zeros(padding, &value.device());
                    value = Tensor::cat(vec![value, zeros], dim);
                }
                value = value.narrow(dim, rank * share, share);
            }
        }
        Param::from_mapped_value(id, value.detach().set_require_grad(trained), mapper)
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

/// A model, its batches and its loss.
pub struct Case<M, I> {
    pub make: fn(&Device) -> M,
    pub batch: fn(u64) -> I,
    pub loss: fn(&M, I) -> Tensor<1>,
}

impl<M: Module, I: TensorTree + Clone> Case<M, I> {
    pub fn capture(&self) -> StepGraph {
        let mut graph = capture_step(&(self.make)(&device()), (self.batch)(0), self.loss).unwrap();
        counter_based_rng(&mut graph);
        graph
    }

    /// Trains on one rank.
    pub fn alone(&self, steps: u64) -> Vec<Reference> {
        let mut model = filled((self.make)(&device()));
        let mut graph = capture_step(&model, (self.batch)(0), self.loss).unwrap();
        counter_based_rng(&mut graph);
        let (mut ops, source) = (CustomOps::new(), RandomSource::new(5));
        register_counter_based_rng(&mut ops, &source);
        let mut executor = Executor::new(graph, ops).unwrap();
        let mut optim = optimizer();
        (0..steps)
            .map(|step| {
                let result = executor.step(&model, (self.batch)(step)).unwrap();
                source.advance();
                let gradients = gradient_values(&model, &result.gradients);
                model = optim.step(0.05, model.clone(), result.gradients);
                Reference { loss: scalar(result.loss), gradients, after: values(&model) }
            })
            .collect()
    }

    /// Partitions the step for one rank.
    pub fn split(&self, axes: &[Axis], place: &[usize]) -> (StepGraph, Vec<ShardReport>) {
        split(self.capture(), axes, place)
    }

    /// Trains on a mesh of ranks, and compares every step with the reference.
    pub fn compare(&self, axes: &[Axis], references: &[Reference]) -> Result<Vec<ShardReport>, Error> {
        self.compare_rewritten(axes, references, |_| {})
    }

    /// As [`compare`](Self::compare), with graphs that are rewritten before they run.
    pub fn compare_rewritten(
        &self,
        axes: &[Axis],
        references: &[Reference],
        rewrite: fn(&mut StepGraph),
    ) -> Result<Vec<ShardReport>, Error> {
        self.compare_within(axes, references, rewrite, 3e-4)
    }

    /// As [`compare_rewritten`](Self::compare_rewritten), with differences up to a fraction of the largest value.
    pub fn compare_within(
        &self,
        axes: &[Axis],
        references: &[Reference],
        rewrite: fn(&mut StepGraph),
        tolerance: f32,
    ) -> Result<Vec<ShardReport>, Error> {
        let ranks = axes.iter().map(|axis| axis.degree).product();
        let (make, batch, loss) = (self.make, self.batch, self.loss);
        let reports = launch::threads(ranks).threads_per_rank(1).run(|rank| {
            let mesh = Mesh::new(&rank, axes.iter().map(|axis| (axis.name, axis.degree)))?;
            let place = mesh.coordinates();
            let whole = filled(make(&device()));
            let mut graph = capture_step(&whole, batch(0), loss)?;
            counter_based_rng(&mut graph);
            let (mut graph, reports) = split(graph, axes, &place);
            rewrite(&mut graph);
            let (mut ops, source) = (CustomOps::new(), RandomSource::new(5));
            register_counter_based_rng(&mut ops, &source);
            for axis in axes {
                let group = mesh.axis(axis.name)?;
                register_collectives(&mut ops, axis.name, &group);
                let prints = group.all_gather(vec![graph.axis_fingerprint(axis.name)])?;
                assert!(prints.iter().all(|print| *print == prints[0]));
            }
            let mut executor = Executor::new(graph, ops)?;
            let mut model = cut(whole, axes, &place);
            let mut optim = optimizer();
            let part = |path: &str, whole: &Whole| {
                axes.iter()
                    .zip(&place)
                    .fold(whole.clone(), |whole, (axis, rank)| whole.part(axis.plan.layout(path), axis.degree, *rank))
            };
            for (step, reference) in references.iter().enumerate() {
                let result = executor.step(&model, batch(step as u64))?;
                source.advance();
                let found = scalar(result.loss);
                let difference = (found - reference.loss).abs() / reference.loss.abs();
                assert!(difference <= tolerance / 3.0, "{found} {}", reference.loss);
                let gradients = gradient_values(&model, &result.gradients);
                assert_eq!(gradients.len(), reference.gradients.len());
                for (path, expected) in &reference.gradients {
                    same(
                        &format!("gradient of {path} in step {step}"),
                        &part(path, expected),
                        &gradients[path],
                        tolerance,
                    );
                }
                model = optim.step(0.05, model, result.gradients);
                let after = values(&model);
                for (path, expected) in &reference.after {
                    same(&format!("{path} after step {step}"), &part(path, expected), &after[path], tolerance);
                }
            }
            Ok(reports)
        })?;
        assert!(reports.iter().all(|report| *report == reports[0]));
        Ok(reports[0].clone())
    }
}

/// Partitions a step over several axes for one rank.
pub fn split(mut graph: StepGraph, axes: &[Axis], place: &[usize]) -> (StepGraph, Vec<ShardReport>) {
    let mut reports = Vec::new();
    for (axis, rank) in axes.iter().zip(place) {
        let params: Vec<Layout> = graph.params.iter().map(|param| axis.plan.layout(&param.path)).collect();
        let inputs: Vec<Layout> = (0..graph.inputs.len()).map(|input| axis.input(input)).collect();
        let mut options = PartitionOptions::new(axis.name, axis.degree, *rank);
        options.sequence_dim = axis.sequence;
        let (local, report) = partition(&graph, &params, &inputs, &options).unwrap();
        graph = local;
        reports.push(report);
    }
    (graph, reports)
}
