//! Checks that the moments of an optimizer belong to the parameters of the model.

use std::collections::HashMap;

use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn_pack::Reader;

use super::optimizer_error::optimizer_error;
use crate::Error;
use crate::params::visit_floats;

/// Demands that an optimizer has moments of no other parameters than those of `local`, and of their dims. Copies them
/// once, if there are any.
///
/// # Errors
/// [`Error::Optimizer`] with the first that does not fit.
pub(super) fn check<M: Module>(optim: &ModuleOptimizer, local: &M) -> Result<(), Error> {
    let record = optim.to_record();
    if record.is_empty() {
        return Ok(());
    }
    let unreadable = |problem: String| optimizer_error(format!("its state cannot be read: {problem}"));
    let bytes = record.into_bytes().map_err(|problem| unreadable(problem.to_string()))?;
    let reader = Reader::from_bytes(bytes).map_err(|problem| unreadable(problem.to_string()))?;
    let paths = reader.metadata().clone();
    let mut params: HashMap<u64, (usize, String, Vec<usize>)> = HashMap::new();
    visit_floats(local, &mut |param| {
        let index = params.len();
        params.entry(param.id().val()).or_insert_with(|| (index, param.path(), param.dims()));
    });
    let mut moments = Vec::new();
    for tensor in reader.into_tensors().map_err(|problem| unreadable(problem.to_string()))? {
        let (name, _, shape, id, _) = tensor.into_parts().map_err(|problem| unreadable(problem.to_string()))?;
        moments.extend(id.map(|id| (id, name, shape)));
    }
    // The record is in the order of ids, which are random.
    moments.sort_by_key(|(id, ..)| params.get(id).map_or(usize::MAX, |(index, ..)| *index));
    for (id, name, shape) in moments {
        let Some((_, path, dims)) = params.get(&id) else {
            let path = paths.get(&id.to_string()).map_or("a parameter without a path", String::as_str);
            return Err(optimizer_error(format!(
                "it has moments of `{path}` by an id that no parameter here has: load the state that was saved with this \
                 model, into an optimizer of its own for each rank of a split or a pipeline, and the model's record before the \
                 model is wrapped"
            )));
        };
        let shape = shape.to_vec();
        // Factored moments have 1 where they are sums over a dim.
        let fits = shape.len() == dims.len() && shape.iter().zip(dims).all(|(size, dim)| size == dim || *size == 1);
        if !fits {
            let moment = name.split_once('.').map_or(name.as_str(), |(_, moment)| moment);
            return Err(optimizer_error(format!(
                "its moment `{moment}` of `{path}` has dims {shape:?}, but this rank holds {dims:?} of that: each rank loads the state \
                 of its own parts"
            )));
        }
    }
    Ok(())
}
