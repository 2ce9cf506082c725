//! The device of a module.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Device, Int, Tensor};

use crate::Error;

/// The one device, without autodiff, of all parameters; `None` if there are none. Lazy ones are not made.
///
/// # Errors
/// [`Error::InvalidArgument`] of `operation` if they are on several, with the first two.
pub(crate) fn one_device<M: Module>(module: &M, operation: &'static str) -> Result<Option<Device>, Error> {
    let mut devices = Devices { path: Vec::new(), first: None, other: None };
    module.visit(&mut devices);
    let Devices { first, other, .. } = devices;
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

struct Devices {
    path: Vec<String>,
    first: Option<(String, Device)>,
    /// The first on another device.
    other: Option<(String, Device)>,
}

impl Devices {
    fn add(&mut self, device: Device) {
        let device = device.inner();
        match &self.first {
            None => self.first = Some((self.path.join("."), device)),
            Some((_, first)) if *first != device && self.other.is_none() => {
                self.other = Some((self.path.join("."), device));
            }
            Some(_) => {}
        }
    }
}

impl ModuleVisitor for Devices {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.add(if param.is_initialized() { param.base().device() } else { param.lazy_device() });
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.add(if param.is_initialized() { param.base().device() } else { param.lazy_device() });
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.add(if param.is_initialized() { param.base().device() } else { param.lazy_device() });
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}
