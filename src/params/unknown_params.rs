//! Parameters that a record of another run has put in the place of those that were wrapped.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;

use crate::error::Error;

/// The float parameters whose ids are not known, with their paths, in the order of the module.
pub(crate) fn unknown_params<M: Module>(module: &M, known: &dyn Fn(ParamId) -> bool) -> Vec<(ParamId, String)> {
    let mut visitor = UnknownParams { known, path: Vec::new(), found: Vec::new() };
    module.visit(&mut visitor);
    visitor.found
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

struct UnknownParams<'a> {
    known: &'a dyn Fn(ParamId) -> bool,
    path: Vec<String>,
    found: Vec<(ParamId, String)>,
}

impl ModuleVisitor for UnknownParams<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !(self.known)(param.id) {
            self.found.push((param.id, self.path.join(".")));
        }
    }
}
