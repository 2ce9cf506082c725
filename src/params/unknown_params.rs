//! Finds parameters that a record of another run has put in place of those that were wrapped.

use burn::module::{Module, ParamId};

use super::walk::visit_floats;
use crate::Error;

/// The float parameters whose ids are not known, with their paths, in the order of the module.
pub(crate) fn unknown_params<M: Module>(module: &M, known: &dyn Fn(ParamId) -> bool) -> Vec<(ParamId, String)> {
    let mut unknown = Vec::new();
    visit_floats(module, &mut |param| {
        if !known(param.id()) {
            unknown.push((param.id(), param.path()));
        }
    });
    unknown
}

/// Demands that a model of which ranks hold parts has the parameters that were wrapped.
///
/// # Errors
/// [`Error::InvalidArgument`] that names the first that it did not have then.
pub(crate) fn check_params_known<M: Module>(module: &M, known: &dyn Fn(ParamId) -> bool) -> Result<(), Error> {
    let Some((_, path)) = unknown_params(module, known).into_iter().next() else { return Ok(()) };
    let problem = format!(
        "parameter `{path}` is not the one that was wrapped: load the record of another run into the model before it is \
         wrapped, or its values by `load`"
    );
    Err(Error::invalid("a wrapped model", problem))
}
