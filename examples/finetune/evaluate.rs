//! How well the model does on data that it was not trained on.

use burn::tensor::Device;
use burn_parallel::prelude::*;
use burn_parallel::train::Parallel;

use crate::data::row::batch;
use crate::data::set::DataSet;
use crate::model::Llama;

/// The mean loss over all targets of a file, in nats; the same on every rank. The replicas share the work, `rows` rows
/// at once on each, all equally often. Collective.
pub fn held_out_loss(model: &Parallel<Llama>, set: &DataSet, rows: usize, device: &Device) -> Result<f64, Error> {
    let (axis, replica) = (model.mesh().axis("dp")?, model.mesh().coordinate("dp")?);
    let replicas = axis.size();
    let (mut nats, mut targets) = (0.0, 0.0);
    for from in (0..set.rows()).step_by(rows * replicas) {
        let to = set.rows().min(from + (rows * replicas) as u64);
        for chunk in set.share(from..to, replica, replicas, rows).map_err(Error::user)? {
            let losses = model.forward_with(batch(&chunk, device), Llama::losses)?;
            nats += losses.sum().into_scalar::<f64>();
            targets += chunk.iter().flat_map(|row| &row.weights).map(|weight| f64::from(*weight)).sum::<f64>();
        }
    }
    let sums = axis.all_reduce(vec![nats, targets], ReduceOp::Sum)?;
    Ok(sums[0] / sums[1])
}
