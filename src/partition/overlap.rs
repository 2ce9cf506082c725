//! Overlaps collectives with operations that do not depend on them.
//!
//! A collective becomes two operations. The first starts it, right behind what makes its input, in the background of
//! the communicator ([`Communicator::start`]); the second waits for it, right before what reads its result. What stands
//! between runs meanwhile: in the backward pass the gradient of a weight, while that of the layer's input is reduced.
//!
//! Of a product that is [fused](super::fuse_products) with its reduction, the first operation multiplies and has all
//! chunks on their way, and the second waits for them; or, where nothing would be hidden by that, the first does it
//! all, by the same rule as in the explicit layers.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use burn::tensor::Device;
use burn_ir::{CustomOpIr, OperationIr, ScalarIr, TensorId, TensorIr};

use super::buckets::move_up;
use super::collectives::{CollectiveKind, CollectiveOp};
use super::products::{ProductKind, ProductOp};
use crate::Error;
use crate::collective_matmul::PendingProduct;
use crate::comm::Communicator;
use crate::graph::operation::only_moves;
use crate::graph::{CustomOps, StepGraph, graph_error};
use crate::lock::lock;
use crate::tensor::PlainTensor;

/// Takes collectives apart into start and wait, as far from each other as the data allow. Those between which nothing
/// would run stay as they are. Returns how many were taken apart.
///
/// The order of starts is that of the list, the same on all ranks of an axis that have the same list. A result that
/// nothing reads is waited for at the end. Run it last: nothing else knows the operations that it puts in.
pub fn overlap(graph: &mut StepGraph) -> usize {
    move_up(graph);
    let mut next = graph.next_id;
    let (forward_len, mut forward) = (graph.forward_len, None);
    let mut scheduled = AsyncSchedule::default();
    for (index, op) in std::mem::take(&mut graph.operations).into_iter().enumerate() {
        if index == forward_len {
            forward = Some(scheduled.operations.len());
        }
        let inputs: Vec<TensorId> = op.inputs().map(|input| input.id).collect();
        scheduled.wait_for(&inputs);
        match startable(&op) {
            Some((axis, name, custom)) => {
                let collective = AsyncCollective::of(axis, name, custom, scheduled.tickets, &mut next);
                scheduled.start(collective);
            }
            None => scheduled.run(op),
        }
    }
    let forward = forward.unwrap_or(scheduled.operations.len());
    scheduled.wait_for_all();
    graph.next_id = next;
    let apart = scheduled.apart;
    (graph.operations, graph.forward_len) = scheduled.finish(forward);
    apart
}

/// What can be started and waited for: its axis and its name.
fn startable(op: &OperationIr) -> Option<(&str, &'static str, &CustomOpIr)> {
    if let Some((CollectiveOp { axis, kind }, op)) = CollectiveOp::of(op) {
        return Some((axis, kind.name(), op));
    }
    let (ProductOp { axis, kind }, op) = ProductOp::of(op)?;
    kind.runs_async().then_some((axis, kind.name(), op))
}

/// A collective, taken apart.
struct AsyncCollective {
    whole: OperationIr,
    start: OperationIr,
    wait: OperationIr,
}

impl AsyncCollective {
    fn of(axis: &str, name: &str, op: &CustomOpIr, ticket: u64, next_id: &mut u64) -> Self {
        // What is in flight stands for the memory that the result will take.
        let tokens: Vec<TensorIr> = op
            .outputs
            .iter()
            .map(|out| {
                *next_id += 1;
                TensorIr { id: TensorId::new(*next_id - 1), ..out.clone() }
            })
            .collect();
        // The dims come first and the scalar that does not count in the fingerprint last.
        let mut scalars = op.scalars.clone();
        scalars.insert(scalars.len().saturating_sub(1), ScalarIr::UInt(ticket));
        let start = CustomOpIr {
            id: start_id(axis, name),
            inputs: op.inputs.clone(),
            outputs: tokens.clone(),
            scalars: scalars.clone(),
        };
        let wait = CustomOpIr { id: wait_id(axis), inputs: tokens, outputs: op.outputs.clone(), scalars };
        Self {
            whole: OperationIr::Custom(op.clone()),
            start: OperationIr::Custom(start),
            wait: OperationIr::Custom(wait),
        }
    }
}

#[derive(Default)]
struct AsyncSchedule {
    operations: Vec<OperationIr>,
    /// What was started and not yet waited for: the number of its collective, by each tensor that it will give.
    waiting: HashMap<TensorId, u64>,
    started: HashMap<u64, (AsyncCollective, usize)>,
    tickets: u64,
    apart: usize,
    /// Places of starts of which it turned out that nothing runs beside them.
    together: HashMap<usize, OperationIr>,
    /// Places of their waits.
    needless: HashSet<usize>,
}

impl AsyncSchedule {
    fn run(&mut self, op: OperationIr) {
        self.operations.push(op);
    }

    fn start(&mut self, collective: AsyncCollective) {
        for out in collective.wait.outputs() {
            self.waiting.insert(out.id, self.tickets);
        }
        let place = self.operations.len();
        self.operations.push(collective.start.clone());
        self.started.insert(self.tickets, (collective, place));
        self.tickets += 1;
    }

    fn wait_for(&mut self, tensors: &[TensorId]) {
        let mut tickets: Vec<u64> = tensors.iter().filter_map(|id| self.waiting.get(id).copied()).collect();
        tickets.sort_unstable();
        tickets.dedup();
        for ticket in tickets {
            self.wait(ticket);
        }
    }

    fn wait_for_all(&mut self) {
        for ticket in 0..self.tickets {
            self.wait(ticket);
        }
    }

    fn wait(&mut self, ticket: u64) {
        let Some((collective, start)) = self.started.remove(&ticket) else { return };
        for out in collective.wait.outputs() {
            self.waiting.remove(&out.id);
        }
        let idle = |op: &OperationIr| only_moves(op) || matches!(op, OperationIr::Custom(_));
        if self.operations[start + 1..].iter().all(idle) {
            self.together.insert(start, collective.whole);
            self.needless.insert(self.operations.len());
        } else {
            self.apart += 1;
        }
        self.operations.push(collective.wait);
    }

    fn finish(self, forward_len: usize) -> (Vec<OperationIr>, usize) {
        let mut together = self.together;
        let mut forward = 0;
        let mut operations = Vec::with_capacity(self.operations.len());
        for (place, op) in self.operations.into_iter().enumerate() {
            if self.needless.contains(&place) {
                continue;
            }
            operations.push(together.remove(&place).unwrap_or(op));
            forward += usize::from(place < forward_len);
        }
        (operations, forward)
    }
}

fn start_id(axis: &str, name: &str) -> String {
    format!("{axis}.start_{name}")
}

fn wait_id(axis: &str) -> String {
    format!("{axis}.wait")
}

type PendingProducts = Arc<Mutex<HashMap<u64, PendingProduct<Vec<PlainTensor>>>>>;

/// Registers the operations that [`overlap`] puts in.
pub(super) fn register(ops: &mut CustomOps, axis: &str, group: &Communicator) {
    let in_flight = PendingProducts::default();
    let keep_pending = |in_flight: &PendingProducts,
                        op: &CustomOpIr,
                        collective: PendingProduct<Vec<PlainTensor>>,
                        device: &Device| {
        // A collective of a step that failed is forgotten here.
        lock(in_flight).insert(ticket(op)?, collective);
        Ok(op.outputs.iter().map(|out| token(out, device)).collect())
    };
    for kind in CollectiveKind::ALL {
        let (comm, in_flight) = (group.clone(), in_flight.clone());
        ops.register_maker(&start_id(axis, kind.name()), move |op, inputs, device| {
            let own = op.clone();
            let pending = comm.start(move |comm| kind.run(&own, inputs, comm));
            keep_pending(&in_flight, op, PendingProduct::Running(Box::new(move || pending.wait())), device)
        });
    }
    for kind in ProductKind::ALL.into_iter().filter(|kind| kind.runs_async()) {
        let (comm, in_flight) = (group.clone(), in_flight.clone());
        ops.register_maker(&start_id(axis, kind.name()), move |op, inputs, device| {
            keep_pending(&in_flight, op, kind.start(op, inputs, &comm, true)?, device)
        });
    }
    ops.register(&wait_id(axis), move |op, _| {
        let pending = lock(&in_flight).remove(&ticket(op)?);
        pending
            .ok_or_else(|| graph_error(format!("custom operation `{}` waits for what was not started", op.id)))?
            .wait()
    });
}

fn ticket(op: &CustomOpIr) -> Result<u64, Error> {
    let [.., ticket, _] = op.scalars.as_slice() else {
        return Err(graph_error(format!("custom operation `{}` lacks the number of its collective", op.id)));
    };
    Ok(ticket.elem())
}

/// One element in the shape of a tensor.
pub(super) fn token(of: &TensorIr, device: &Device) -> PlainTensor {
    PlainTensor::zeros(vec![1; of.shape.num_dims()], of.dtype, device).expand(of.shape.clone())
}
