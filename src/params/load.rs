//! Parameters from a store, of which only this rank's parts are read.

use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, DType, Int, Tensor, TensorData};

use super::SliceSource;
use super::leaf::{LazyParam, LeafKind, leaf};
use super::pad::padded;
use super::shard::is_shard;
use crate::Error;

/// What this rank holds of a parameter.
#[derive(Debug, Clone)]
pub struct ParamSlice {
    /// The dims of the whole.
    pub dims: Vec<usize>,
    /// Its part.
    pub ranges: Vec<Range<usize>>,
    /// The dims of its part, with zeros behind what is read where they are larger.
    pub local_dims: Vec<usize>,
}

impl ParamSlice {
    /// The whole of a parameter of these dims.
    pub(crate) fn whole(dims: Vec<usize>) -> Self {
        Self { ranges: dims.iter().map(|size| 0..*size).collect(), local_dims: dims.clone(), dims }
    }
}

/// The dims of every parameter. Lazy ones stay lazy.
#[derive(Default)]
pub(crate) struct Dims(pub HashMap<ParamId, Vec<usize>>);

impl ModuleVisitor for Dims {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.insert(param.id, param.lazy_shape().to_vec());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.0.insert(param.id, param.lazy_shape().to_vec());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.0.insert(param.id, param.lazy_shape().to_vec());
    }
}

/// Gives every parameter for which `held` has something its value from a source. The others stay as they are, and so do
/// lazy ones among them.
///
/// # Errors
/// [`Error::InvalidArgument`] if the source lacks a parameter or has it with other dims; those of the source.
pub(crate) fn load<M: Module>(
    module: M,
    source: &mut dyn SliceSource,
    held: &dyn Fn(ParamId) -> Option<ParamSlice>,
) -> Result<M, Error> {
    let mut mapper = Load { source, held, path: Vec::new(), seen: HashMap::new(), outcome: Ok(()) };
    let module = module.map(&mut mapper);
    mapper.outcome.map(|()| module)
}

struct Load<'a> {
    source: &'a mut dyn SliceSource,
    held: &'a dyn Fn(ParamId) -> Option<ParamSlice>,
    path: Vec<String>,
    /// Leaves already made, so that a parameter held in two places stays one.
    seen: HashMap<ParamId, Box<dyn Any>>,
    outcome: Result<(), Error>,
}

impl Load<'_> {
    fn read(&mut self, id: ParamId, dtype: impl FnOnce() -> Option<DType>) -> Option<(TensorData, Vec<usize>)> {
        let ParamSlice { dims, ranges, local_dims } = (self.held)(id).filter(|_| self.outcome.is_ok())?;
        let path = self.path.join(".");
        if self.source.keeps(&path) {
            return None;
        }
        let wrong = |problem| Err(Error::invalid("load", problem));
        let read = match self.source.dims(&path) {
            Ok(Some(found)) if found == dims => match ranges.iter().any(Range::is_empty) {
                true => Ok(TensorData::new(Vec::<f32>::new(), ranges.iter().map(Range::len).collect::<Vec<_>>())),
                false => {
                    let read = match dtype() {
                        Some(dtype) => self.source.read_as(&path, &ranges, dtype),
                        None => self.source.read(&path, &ranges),
                    };
                    read.and_then(|data| {
                        let asked: Vec<usize> = ranges.iter().map(Range::len).collect();
                        match data.shape().as_slice() == asked {
                            true => Ok(data),
                            false => wrong(format!(
                                "the source gave dims {:?} of parameter `{path}`, of which {ranges:?} was asked for",
                                data.shape().as_slice()
                            )),
                        }
                    })
                }
            },
            Ok(Some(found)) => {
                wrong(format!("parameter `{path}` has dims {dims:?} in the model and {found:?} in the source"))
            }
            Ok(None) => wrong(format!("the source has no parameter `{path}`")),
            Err(error) => Err(error),
        };
        read.map(|data| (data, local_dims)).map_err(|error| self.outcome = Err(error)).ok()
    }
}

impl ModuleMapper for Load<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if let Some(made) = self.seen.get(&param.id).and_then(|made| made.downcast_ref::<Param<Tensor<D>>>()) {
            return made.clone();
        }
        let dtype = || match param.is_initialized() {
            true => Some(param.base().dtype()),
            false => Some(LazyParam::of(&param).placeholder.base().dtype()),
        };
        let Some((data, local_dims)) = self.read(param.id, dtype) else { return param };
        let (kind, one) = match param.is_initialized() {
            true => (LeafKind::of(&param.base()), param.base().inner()),
            false => {
                let LazyParam { placeholder, device, trained } = LazyParam::of(&param);
                (LeafKind::on(&device, trained), placeholder.base().inner())
            }
        };
        let value = padded(Tensor::from_data(data, (&one.device(), one.dtype())), &local_dims);
        // What a lazy parameter would have been made of is dropped unmade.
        let (id, _, mapper) = LazyParam::of(&param).placeholder.consume();
        let made = Param::from_mapped_value(id, leaf(value, kind), mapper);
        self.seen.insert(id, Box::new(made.clone()));
        made
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let Some((data, _)) = self.read(param.id, || None) else { return param };
        param.map(|value| Tensor::from_data(data, (&value.device(), value.dtype())))
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        let Some((data, _)) = self.read(param.id, || None) else { return param };
        param.map(|value| Tensor::from_data(data, &value.device()))
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.path.push(name.to_owned());
        }
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.path.pop();
        }
    }
}
