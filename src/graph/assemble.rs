//! Makes a [`StepGraph`] of what burn has recorded: names inputs and results, removes placeholders, numbers tensors
//! canonically.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn::module::ParamId;
use burn::tensor::{DType, Shape};
use burn_capture::CapturedGraph;
use burn_ir::{OperationIr, TensorId, TensorIr};

use super::edges::EdgeTensor;
use super::graph_error;
use super::module::{Inventory, InventoryEntry};
use super::operation;
use super::recording::Recording;
use super::step::{BatchNormBinding, InputBinding, ParamBinding, Rename, StepGraph, Uses};
use crate::Error;

pub(super) fn assemble(captured: CapturedGraph, recording: Recording) -> Result<StepGraph, Error> {
    let Recording { inventory, params, running, gradients, inputs, outputs, loss, weight, marker } = recording;

    // Parameters and inputs were recorded as operations that make tensors without data.
    let edge: HashSet<TensorId> = params.values().copied().chain(inputs.iter().map(|i| i.id)).collect();
    let mut forward_len = 0;
    let mut operations = Vec::with_capacity(captured.graph.operations.len());
    for op in captured.graph.operations {
        let made = op.outputs().next().map(|out| out.id);
        match made {
            Some(id) if Some(id) == marker => forward_len = operations.len(),
            Some(id) if edge.contains(&id) => {}
            _ if matches!(op, OperationIr::Init(_) | OperationIr::Drop(_)) => {}
            _ => operations.push(op),
        }
    }

    if marker.is_none() {
        forward_len = operations.len();
    }

    let updates = running_updates(&inventory, &running, &params, &operations[..forward_len])?;

    let ids = Canonical::default();
    let mut bindings: Vec<ParamBinding> = Vec::new();
    let mut seen = HashSet::new();
    for InventoryEntry { path, id, shape, dtype, trainable, .. } in &inventory.tensors {
        if !seen.insert(*id) {
            continue;
        }
        let tensor = params.get(id).map(|tensor| ids.tensor(*tensor, shape, *dtype));
        let tensor = tensor.ok_or_else(|| graph_error(format!("parameter `{path}` was not recorded")))?;
        bindings.push(ParamBinding {
            path: path.clone(),
            id: *id,
            tensor,
            trainable: *trainable,
            gradient: None,
            update: None,
        });
    }
    let inputs = inputs.into_iter().map(|i| InputBinding { tensor: ids.edge(&i), path: i.path }).collect();

    let mut read: HashSet<TensorId> = operations.iter().flat_map(|op| op.inputs().map(|t| t.id)).collect();
    read.extend(outputs.iter().chain(&loss).chain(&weight).map(|o| o.id));
    let constants: BTreeMap<_, _> = captured.values.into_iter().filter(|(id, _)| read.contains(id)).collect();
    let constants = constants.into_iter().map(|(id, value)| (ids.of(id), value)).collect();

    for op in &mut operations {
        op.visit_mut(&mut Rename(|id| ids.of(id)));
    }
    for (binding, inventory) in bindings.iter_mut().zip(first_of_each_id(&inventory.tensors)) {
        let (shape, dtype) = (&inventory.shape, inventory.dtype);
        binding.gradient = gradients.get(&binding.id).map(|id| ids.tensor(*id, shape, dtype));
        binding.update = updates.get(&binding.id).map(|id| ids.tensor(*id, shape, dtype));
    }
    let batch_norms = batch_norms(&inventory).into_iter().map(|norm| {
        let tensor = |id| ids.of(params[&id]);
        BatchNormBinding {
            path: norm.path,
            gamma: tensor(norm.gamma),
            running_mean: tensor(norm.running_mean),
            running_var: tensor(norm.running_var),
            training: norm.training,
        }
    });
    let batch_norms = batch_norms.collect();
    Ok(StepGraph {
        operations,
        forward_len,
        params: bindings,
        inputs,
        constants,
        loss: loss.as_ref().map(|loss| ids.edge(loss)),
        weight: weight.as_ref().map(|weight| ids.edge(weight)),
        outputs: outputs.iter().map(|o| ids.edge(o)).collect(),
        batch_norms,
        unpadded: HashMap::new(),
        next_id: ids.0.borrow().len() as u64,
    })
}

fn first_of_each_id(tensors: &[InventoryEntry]) -> impl Iterator<Item = &InventoryEntry> {
    let mut seen = HashSet::new();
    tensors.iter().filter(move |t| seen.insert(t.id))
}

/// Tensor ids counted from 0 in the order in which they are asked for. burn counts them over the whole process.
#[derive(Default)]
struct Canonical(std::cell::RefCell<HashMap<TensorId, TensorId>>);

impl Canonical {
    fn of(&self, id: TensorId) -> TensorId {
        let mut ids = self.0.borrow_mut();
        let next = TensorId::new(ids.len() as u64);
        *ids.entry(id).or_insert(next)
    }

    fn tensor(&self, id: TensorId, shape: &Shape, dtype: DType) -> TensorIr {
        TensorIr::uninit(self.of(id), shape.clone(), dtype)
    }

    fn edge(&self, edge: &EdgeTensor) -> TensorIr {
        self.tensor(edge.id, &edge.shape, edge.dtype)
    }
}

struct BatchNormIds {
    path: String,
    gamma: ParamId,
    running_mean: ParamId,
    running_var: ParamId,
    training: bool,
}

/// burn's `BatchNorm`s: structs of that name with exactly its fields.
fn batch_norms(inventory: &Inventory) -> Vec<BatchNormIds> {
    let field = |prefix: &str, name: &str| {
        let path = format!("{prefix}{name}");
        inventory.tensors.iter().find(|t| t.path == path).map(|t| t.id)
    };
    let holders = inventory.tensors.iter().filter(|t| t.holder == "Struct:BatchNorm");
    let gammas = holders.filter_map(|t| t.path.strip_suffix("gamma").filter(|p| p.is_empty() || p.ends_with('.')));
    gammas
        .filter_map(|prefix| {
            let flag = format!("{prefix}training");
            Some(BatchNormIds {
                path: prefix.trim_end_matches('.').into(),
                gamma: field(prefix, "gamma")?,
                running_mean: field(prefix, "running_mean")?,
                running_var: field(prefix, "running_var")?,
                training: inventory.flags.iter().find(|(path, ..)| *path == flag)?.2,
            })
        })
        .collect()
}

/// The next value of every running statistic that the forward pass updates.
///
/// burn hands an update to the `RunningState`, which keeps it out of reach of visitors. So it is found in the
/// operations: `BatchNorm` computes `running * (1 - momentum) + batch * momentum` and nothing reads the sum.
fn running_updates(
    inventory: &Inventory,
    running: &HashSet<ParamId>,
    params: &HashMap<ParamId, TensorId>,
    forward: &[OperationIr],
) -> Result<HashMap<ParamId, TensorId>, Error> {
    let mut known = HashMap::new();
    for norm in batch_norms(inventory) {
        known.insert(norm.running_mean, norm.path.clone());
        known.insert(norm.running_var, norm.path);
    }
    let uses = Uses::of(forward);
    let mut updates = HashMap::new();
    for tensor in first_of_each_id(&inventory.tensors).filter(|t| running.contains(&t.id)) {
        if !known.contains_key(&tensor.id) {
            return Err(graph_error(format!(
                "`{}` is a `RunningState` of a module that is not burn's `BatchNorm`: how the step updates it cannot be \
                 seen. Train this module eagerly",
                tensor.path
            )));
        }
        let running = params[&tensor.id];
        let mut readers = uses.readers(running).iter().map(|reader| &forward[*reader]);
        if let Some(update) = updated(running, forward, &uses) {
            updates.insert(tensor.id, update);
        } else if !readers.all(|op| {
            // Evaluation reads running statistics in the normalisation only, which autodiff takes apart.
            operation::batch_norm(op).is_some() || operation::reshape(op).is_some()
        }) {
            return Err(graph_error(format!(
                "cannot find how the step updates `{}`: this burn release updates it in another way than 0.22. Freeze the \
                 batch norm, or train this module eagerly",
                tensor.path
            )));
        }
    }
    Ok(updates)
}

fn updated(running: TensorId, forward: &[OperationIr], uses: &Uses) -> Option<TensorId> {
    let mut readers = uses.readers(running).iter().map(|reader| &forward[*reader]);
    let scaled = readers.find_map(operation::scaled)?.out.id;
    let mut sums = uses.readers(scaled).iter().filter_map(|reader| operation::sum(&forward[*reader]));
    sums.find(|sum| sum.lhs.id == scaled).map(|sum| sum.out.id)
}
