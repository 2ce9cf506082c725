//! Places every operation on a stage.
//!
//! Parameters fix the operations that read them. The others may run anywhere between what they read and who reads them:
//! in the forward pass stages only go up, in the backward pass only down. Between two stages the cheapest place is the
//! minimum cut of a network in which a tensor costs its bytes if it is on one side and a reader on the other, which is
//! found for the forward and the backward pass at once, since what the backward pass needs of the forward pass crosses
//! too unless it runs beside it. The cuts of all boundaries are nested, so each operation gets one stage. Of equally
//! cheap places an operation takes the latest.

use std::collections::{BTreeSet, HashMap};

use burn_ir::{TensorId, TensorIr};

use super::analysis::{Analysis, ValueSource};
use super::flow::{FlowNetwork, NEVER, SINK, SOURCE};
use crate::Error;
use crate::graph::graph_error;
use crate::graph::operation::{bytes, op_name};
use crate::graph::step::ParamBinding;

/// What parameters say about the stages of operations.
#[derive(Debug)]
pub(super) struct Bounds {
    /// The stage of operations that read a parameter.
    pub pinned: Vec<Option<usize>>,
    /// Of operations of the forward pass the earliest stage, of the backward pass the latest.
    pub bound: Vec<usize>,
    /// The stages that hold each parameter: first its own, then others that read it.
    pub holders: Vec<Vec<usize>>,
}

impl Bounds {
    /// `homes` is the stage of each parameter.
    pub(super) fn new(
        analysis: &Analysis<'_>,
        params: &[ParamBinding],
        homes: &[usize],
        stages: usize,
    ) -> Result<Self, Error> {
        let mut bounds = Self {
            pinned: vec![None; analysis.operations.len()],
            bound: vec![0; analysis.operations.len()],
            holders: homes.iter().map(|home| vec![*home]).collect(),
        };
        let mut readers: Vec<Vec<usize>> = vec![Vec::new(); params.len()];
        for op in analysis.placed().filter(|op| analysis.is_forward(*op)) {
            let read = params_of(analysis, op);
            let made = analysis.origins(op).filter_map(|(origin, _)| match origin {
                ValueSource::Op(maker) => Some(bounds.bound[maker]),
                _ => None,
            });
            let stage = read.iter().map(|param| homes[*param]).chain(made).max().unwrap_or(0);
            bounds.bound[op] = stage;
            if !read.is_empty() {
                bounds.pinned[op] = Some(stage);
            }
            for param in read {
                readers[param].push(op);
            }
        }
        for (param, readers) in readers.iter().enumerate() {
            let stages: BTreeSet<usize> = readers.iter().map(|op| bounds.bound[*op]).collect();
            if let Some(stage) = stages.first().filter(|_| !stages.contains(&homes[param])) {
                return Err(Error::Plan {
                    problem: format!(
                        "parameter `{}` is given to pipeline stage {}, but {} that reads it also needs what stage {stage} \
                         computes: give parameters to stages in the order in which the model uses them",
                        params[param].path,
                        homes[param],
                        op_name(&analysis.operations[readers[0]])
                    ),
                });
            }
            bounds.holders[param].extend(stages.into_iter().filter(|stage| *stage != homes[param]));
        }
        bounds.backward(analysis, params, &readers, stages)?;
        Ok(bounds)
    }

    fn backward(
        &mut self,
        analysis: &Analysis<'_>,
        params: &[ParamBinding],
        readers: &[Vec<usize>],
        stages: usize,
    ) -> Result<(), Error> {
        let backward: Vec<usize> = analysis.placed().filter(|op| !analysis.is_forward(*op)).collect();
        let mut again: Vec<Vec<usize>> = vec![Vec::new(); params.len()];
        for op in &backward {
            params_of(analysis, *op).into_iter().for_each(|param| again[param].push(*op));
        }
        for op in backward {
            let made = analysis.origins(op).filter_map(|(origin, _)| match origin {
                ValueSource::Op(maker) if !analysis.is_forward(maker) => Some(self.bound[maker]),
                _ => None,
            });
            let mut stage = made.min().unwrap_or(stages - 1);
            let read = params_of(analysis, op);
            for param in &read {
                // The backward pass meets the readers of a parameter in reverse.
                let place = again[*param].iter().rev().position(|reader| reader == &op);
                let mate = place
                    .filter(|_| again[*param].len() == readers[*param].len())
                    .map_or(stage, |place| self.bound[readers[*param][place]]);
                stage = self.holder(*param, stage.min(mate)).ok_or_else(|| {
                    graph_error(format!(
                        "the backward pass reads parameter `{}` of pipeline stage {} on stage {stage} already: this step \
                         cannot be cut there",
                        params[*param].path, self.holders[*param][0]
                    ))
                })?;
            }
            self.bound[op] = stage;
            if !read.is_empty() {
                self.pinned[op] = Some(stage);
            }
        }
        Ok(())
    }

    /// The last stage up to `stage` that holds a parameter.
    pub(super) fn holder(&self, param: usize, stage: usize) -> Option<usize> {
        self.holders[param].iter().copied().filter(|holder| *holder <= stage).max()
    }
}

fn params_of(analysis: &Analysis<'_>, op: usize) -> BTreeSet<usize> {
    let params = analysis.origins(op).filter_map(|(origin, _)| match origin {
        ValueSource::Param(param) => Some(param),
        _ => None,
    });
    params.collect()
}

/// A result of the step that a stage must have.
#[derive(Clone, Debug)]
pub(super) struct StageResult {
    pub tensor: TensorIr,
    pub stage: usize,
}

/// The stage of every operation that runs on one stage; of the others, 0.
pub(super) fn place(analysis: &Analysis<'_>, bounds: &Bounds, wanted: &[StageResult], stages: usize) -> Vec<usize> {
    let mut placed = vec![0; analysis.operations.len()];
    for boundary in 0..stages.saturating_sub(1) {
        let late = after(analysis, bounds, wanted, boundary);
        placed.iter_mut().zip(late).for_each(|(stage, late)| *stage += usize::from(late));
    }
    placed
}

/// Whether each operation runs on a later stage than `boundary`.
fn after(analysis: &Analysis<'_>, bounds: &Bounds, wanted: &[StageResult], boundary: usize) -> Vec<bool> {
    let mut network = FlowNetwork::new();
    let side = |stage: usize| if stage <= boundary { SOURCE } else { SINK };
    let mut nodes = vec![SOURCE; analysis.operations.len()];
    for op in analysis.placed() {
        nodes[op] = match bounds.pinned[op] {
            Some(stage) => side(stage),
            // What can only be late, or only early, need not be asked.
            None if analysis.is_forward(op) && bounds.bound[op] > boundary => SINK,
            None if !analysis.is_forward(op) && bounds.bound[op] <= boundary => SOURCE,
            None => network.node(),
        };
    }
    let mut readers: HashMap<TensorId, Vec<usize>> = HashMap::new();
    for op in analysis.placed() {
        for (origin, input) in analysis.origins(op) {
            let ValueSource::Op(maker) = origin else { continue };
            let input = analysis.twin(input.id).unwrap_or(input.id);
            readers.entry(input).or_default().push(nodes[op]);
            match (analysis.is_forward(maker), analysis.is_forward(op)) {
                (true, true) => link(&mut network, nodes[op], nodes[maker], NEVER),
                (false, _) => link(&mut network, nodes[maker], nodes[op], NEVER),
                (true, false) => {}
            }
        }
    }
    for StageResult { tensor, stage } in wanted {
        if let ValueSource::Op(maker) = analysis.origin(tensor.id) {
            readers.entry(analysis.twin(tensor.id).unwrap_or(tensor.id)).or_default().push(side(*stage));
            match analysis.is_forward(maker) {
                true => link(&mut network, side(*stage), nodes[maker], NEVER),
                false => link(&mut network, nodes[maker], side(*stage), NEVER),
            }
        }
    }
    for op in analysis.placed() {
        for out in analysis.operations[op].outputs() {
            let Some(readers) = readers.get(&out.id) else { continue };
            // One more, so that of equal bytes fewer tensors win.
            let price = bytes(out) + 1;
            let [up, down] = [network.node(), network.node()];
            link(&mut network, nodes[op], up, price);
            link(&mut network, down, nodes[op], price);
            for reader in readers {
                link(&mut network, up, *reader, NEVER);
                link(&mut network, *reader, down, NEVER);
            }
        }
    }
    let early = network.source_side();
    nodes.into_iter().map(|node| !early[node]).collect()
}

fn link(network: &mut FlowNetwork, from: usize, to: usize, capacity: u64) {
    if from != to && from != SINK && to != SOURCE {
        network.edge(from, to, capacity);
    }
}
