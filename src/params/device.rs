//! The device of a module.

use burn::module::Module;
use burn::tensor::Device;

use super::walk::visit_params;
use crate::Error;

/// The one device, without autodiff, of all parameters; `None` if there are none. Lazy ones are not made.
///
/// # Errors
/// [`Error::InvalidArgument`] of `operation` if they are on several, with the first two.
pub(crate) fn one_device<M: Module>(module: &M, operation: &'static str) -> Result<Option<Device>, Error> {
    let mut first: Option<(String, Device)> = None;
    let mut other: Option<(String, Device)> = None;
    visit_params(module, &mut |param| {
        let device = param.device().inner();
        match &first {
            None => first = Some((param.path(), device)),
            Some((_, first)) if *first != device && other.is_none() => other = Some((param.path(), device)),
            Some(_) => {}
        }
    });
    match (first, other) {
        (Some((path, device)), Some((other_path, other))) => {
            let problem = format!(
                "parameter `{path}` is on {device:?}, but `{other_path}` is on {other:?}: move the model to one device, and \
                 split it with tensor or pipeline parallelism if it is too large for that"
            );
            Err(Error::invalid(operation, problem))
        }
        (first, _) => Ok(first.map(|(_, device)| device)),
    }
}
