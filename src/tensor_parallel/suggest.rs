//! Suggests a plan by the cost of the captured step.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use burn::module::Module;
use burn_ir::TensorId;

use super::cost::{capture, cost_of};
use super::feeds::feeds;
use crate::Error;
use crate::graph::operation::bytes;
use crate::graph::{StepGraph, TensorTree};
use crate::layout::Layout;
use crate::partition::{PartitionOptions, partition};
use crate::plan::{Plan, from_layouts, like, must_split, warn_of_nothing_split};
use crate::step::Loss;

/// How often the search goes over all parameters after the first time, at most.
const SWEEPS: usize = 3;

impl Plan {
    /// A good plan for splitting a model over `degree` ranks that train it with `loss` on such `inputs`. Nothing is
    /// run: the step is captured, and candidate layouts are compared by the collectives, the work and the bytes of the
    /// graph that each rank would get ([`cost`](Self::cost)).
    ///
    /// Like parameters of repeated layers get like layouts. Those that hold nine tenths of the bytes are split whatever
    /// it costs, if the degree divides one of their dims or can with [padding](Self::shard_padded) of an eighth at
    /// most; the others where that is cheaper. The search begins once with nothing split and once with
    /// [`suggest`](Self::suggest), and changes one layout at a time, or two of layers that feed each other, while that
    /// helps. The same model and shapes give the same plan, on every rank. A warning goes to [`log`] if nothing can be
    /// split.
    ///
    /// ```
    /// use burn::{nn::{Linear, LinearConfig}, prelude::*};
    /// use burn_parallel::plan::Plan;
    ///
    /// #[derive(Module, Debug)]
    /// struct Mlp { up: Linear, down: Linear }
    ///
    /// let device = Device::flex().autodiff();
    /// let model = Mlp {
    ///     up: LinearConfig::new(64, 256).init(&device),
    ///     down: LinearConfig::new(256, 64).init(&device),
    /// };
    /// let x = Tensor::<2>::zeros([32, 64], &device);
    /// let loss = |model: &Mlp, x: Tensor<2>| model.down.forward(model.up.forward(x).tanh()).powi_scalar(2).mean();
    /// let plan = Plan::suggest_for(&model, 2, x.clone(), loss)?;
    /// // Columns, then rows with one all-reduce is what the field does: nothing that costs more is suggested.
    /// let by_hand = Plan::new().shard("up.weight", 1).shard("up.bias", 0).shard("down.weight", 0);
    /// let suggested = plan.cost(&model, 2, x.clone(), loss)?;
    /// assert!(suggested.total() <= by_hand.cost(&model, 2, x, loss)?.total());
    /// assert!(suggested.parameter_bytes < 0.51 * 4.0 * (64.0 * 256.0 * 2.0 + 256.0 + 64.0));
    /// # Ok::<(), burn_parallel::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`] if the step cannot be captured or split.
    pub fn suggest_for<M, I, F, R>(model: &M, degree: usize, inputs: I, loss: F) -> Result<Self, Error>
    where
        M: Module,
        I: TensorTree,
        F: FnOnce(&M, I) -> R,
        R: Into<Loss>,
    {
        let step = Candidate { graph: capture(model, inputs, loss)?, degree };
        let (groups, guess) = (step.groups(), Self::suggest(model, degree));
        let guessed: Vec<Layout> = step.graph.params.iter().map(|param| guess.layout(&param.path)).collect();
        let whole = vec![Layout::Replicated; step.graph.params.len()];
        // The guess may pad what the step cannot go on with.
        step.cost(&whole)?;
        let mut search = Search { step: &step, pairs: step.pairs(&groups), groups, known: HashMap::new() };
        let (from_nothing, from_guess) = (search.improve(whole), search.improve(guessed));
        let (_, best) = if from_guess.0 < from_nothing.0 { from_guess } else { from_nothing };
        warn_of_nothing_split(best.iter().copied(), degree);
        let named = step.graph.params.iter().map(|param| (param.path.clone(), param.tensor.shape.to_vec()));
        Ok(from_layouts(
            &named.zip(best).map(|((path, dims), layout)| (path, dims, layout)).collect::<Vec<_>>(),
            degree,
        ))
    }
}

/// A captured step that is tried with several layouts.
struct Candidate {
    graph: StepGraph,
    degree: usize,
}

/// Like parameters of repeated layers, by their place among the parameters of the graph.
struct LikeParams {
    members: Vec<usize>,
    bytes: usize,
    /// What they may be.
    choices: Vec<Layout>,
}

impl Candidate {
    fn cost(&self, layouts: &[Layout]) -> Result<f64, Error> {
        let inputs = vec![Layout::Replicated; self.graph.inputs.len()];
        let options = PartitionOptions::new("tp", self.degree, 0);
        let (local, _) = partition(&self.graph, layouts, &inputs, &options)?;
        Ok(cost_of(&local, &[("tp", self.degree)]).total())
    }

    /// The groups, the largest first. Those that must be split have no choice but how.
    fn groups(&self) -> Vec<LikeParams> {
        let mut found: BTreeMap<(String, Vec<usize>), LikeParams> = BTreeMap::new();
        let norms = self.graph.batch_norms.iter().flat_map(|norm| [norm.running_mean, norm.running_var]);
        let running: Vec<TensorId> = norms.collect();
        for (place, param) in self.graph.params.iter().enumerate() {
            let dims = param.tensor.shape.to_vec();
            let may = param.tensor.dtype.is_float() && !running.contains(&param.tensor.id);
            // With an eighth more for padding, at most.
            let fits = |size: usize| size > 0 && size.next_multiple_of(self.degree) - size <= size / 8;
            let choices = (0..dims.len()).filter(|dim| may && fits(dims[*dim])).map(Layout::Sharded).collect();
            let group =
                found.entry((like(&param.path), dims)).or_insert(LikeParams { members: vec![], bytes: 0, choices });
            group.members.push(place);
            group.bytes += bytes(&param.tensor) as usize;
        }
        let mut groups: Vec<LikeParams> = found.into_values().filter(|group| !group.choices.is_empty()).collect();
        groups.sort_by_key(|group| std::cmp::Reverse(group.bytes));
        let must = must_split(&groups.iter().map(|group| group.bytes).collect::<Vec<_>>());
        for (group, _) in groups.iter_mut().zip(must).filter(|(_, must)| !must) {
            group.choices.push(Layout::Replicated);
        }
        groups
    }

    /// The groups of which one feeds the other.
    fn pairs(&self, groups: &[LikeParams]) -> Vec<[usize; 2]> {
        let of = |param: usize| groups.iter().position(|group| group.members.contains(&param));
        let pairs = feeds(&self.graph).into_iter().filter_map(|(from, to)| Some([of(from)?, of(to)?]));
        pairs.filter(|[from, to]| from != to).collect::<BTreeSet<_>>().into_iter().collect()
    }
}

struct Search<'a> {
    step: &'a Candidate,
    groups: Vec<LikeParams>,
    pairs: Vec<[usize; 2]>,
    /// What layouts cost, as far as they were tried; of those that the step cannot run in, infinitely much.
    known: HashMap<Vec<Layout>, f64>,
}

impl Search<'_> {
    fn cost(&mut self, layouts: &[Layout]) -> f64 {
        if let Some(known) = self.known.get(layouts) {
            return *known;
        }
        let cost = self.step.cost(layouts).unwrap_or(f64::INFINITY);
        self.known.insert(layouts.to_vec(), cost);
        cost
    }

    /// Changes the layouts of one group at a time, or of two of which one feeds the other, to the best there are, until
    /// nothing helps.
    fn improve(&mut self, mut layouts: Vec<Layout>) -> (f64, Vec<Layout>) {
        let single = (0..self.groups.len()).map(|group| vec![group]);
        let moves: Vec<Vec<usize>> = single.chain(self.pairs.iter().map(|pair| pair.to_vec())).collect();
        let mut least = f64::INFINITY;
        for _ in 0..=SWEEPS {
            let before = layouts.clone();
            for together in &moves {
                if let Some(best) = self.best(together, &layouts) {
                    (least, layouts) = best;
                }
            }
            if layouts == before {
                break;
            }
        }
        (least, layouts)
    }

    /// The best layouts of some groups, given those of the others.
    fn best(&mut self, groups: &[usize], layouts: &[Layout]) -> Option<(f64, Vec<Layout>)> {
        let mut tried = vec![layouts.to_vec()];
        for group in groups {
            let LikeParams { members, choices, .. } = &self.groups[*group];
            let with = |layouts: &Vec<Layout>, choice: Layout| {
                let mut layouts = layouts.clone();
                members.iter().for_each(|place| layouts[*place] = choice);
                layouts
            };
            tried = tried.iter().flat_map(|so_far| choices.iter().map(move |choice| with(so_far, *choice))).collect();
        }
        let costs = tried.into_iter().map(|layouts| (self.cost(&layouts), layouts)).collect::<Vec<_>>();
        costs.into_iter().filter(|(cost, _)| cost.is_finite()).min_by(|a, b| a.0.total_cmp(&b.0))
    }
}
