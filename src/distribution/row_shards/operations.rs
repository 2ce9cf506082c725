//! How the operations run that exchange parameters and gradients with the replicas.

use burn_ir::CustomOpIr;

use super::RowShards;
use crate::Error;
use crate::comm::Pending;
use crate::graph::{CustomOps, graph_error};
use crate::partition::{Exchange, START_GATHER, START_SCATTER, WAIT_GATHER, WAIT_SCATTER, exchanged, tokens};
use crate::tensor::PlainTensor;

impl RowShards {
    /// Says how the operations are run that [`apply`](Self::apply) puts in.
    pub(crate) fn register(&self, ops: &mut CustomOps) {
        let shards = self.clone();
        ops.register_maker(START_GATHER, move |op, inputs, device| {
            let own = Exchange { gathers: true, numbers: exchanged(op) };
            let bundle = shards.bundle(&own.numbers)?;
            let pending = shards.comms.parameters().start(move |comm| bundle.gather(inputs, comm));
            shards.keep_pending(true, op, pending)?;
            shards.has_started(&own)?;
            Ok(tokens(op, device))
        });
        let shards = self.clone();
        ops.register_maker(START_SCATTER, move |op, inputs, device| {
            let own = Exchange { gathers: false, numbers: exchanged(op) };
            shards.look_at(&own.numbers, &inputs);
            let (bundle, factor) = (shards.bundle(&own.numbers)?, shards.lock().factor);
            let copies = shards.comms.copies().cloned();
            let pending =
                shards.comms.gradients().start(move |comm| bundle.reduce(inputs, factor, (comm, copies.as_ref())));
            shards.keep_pending(false, op, pending)?;
            shards.has_started(&own)?;
            Ok(tokens(op, device))
        });
        for (gathers, id) in [(true, WAIT_GATHER), (false, WAIT_SCATTER)] {
            let shards = self.clone();
            ops.register(id, move |op, _| {
                let pending = shards.lock().in_flight.remove(&(gathers, ticket(op)?));
                let started = || graph_error(format!("custom operation `{}` waits for what was not started", op.id));
                let pending = pending.ok_or_else(started)?;
                shards.waiting(|| pending.wait())
            });
        }
    }

    /// Notes what of these gradients is not finite, and measures them if that was asked for.
    fn look_at(&self, numbers: &[usize], gradients: &[PlainTensor]) {
        let measures = self.lock().noise.is_some();
        let looks: Vec<_> = gradients.iter().map(|gradient| gradient.look_on_host(measures)).collect();
        let mut step = self.lock();
        let step = &mut *step;
        for ((number, gradient), look) in numbers.iter().zip(gradients).zip(looks) {
            if look.finite == Some(false) {
                step.non_finite = Some(step.non_finite.map_or(*number, |first| first.min(*number)));
            }
            if let Some(noise) = &mut step.noise {
                noise.add(step.micro_batch, *number, gradient, look.squares);
            }
        }
    }

    fn keep_pending(&self, gathers: bool, op: &CustomOpIr, pending: Pending<Vec<PlainTensor>>) -> Result<(), Error> {
        self.lock().in_flight.insert((gathers, ticket(op)?), pending);
        Ok(())
    }
}

fn ticket(op: &CustomOpIr) -> Result<u64, Error> {
    let [.., ticket, _] = op.scalars.as_slice() else {
        return Err(graph_error(format!("custom operation `{}` lacks its number", op.id)));
    };
    Ok(ticket.elem())
}
