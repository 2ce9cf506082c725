//! Loads parameters from a store, of which only this rank's parts are read.

use std::collections::HashMap;
use std::ops::Range;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Bool, DType, Int, Tensor, TensorData};

use super::SliceSource;
use super::leaf::{LazyParam, LeafKind, leaf};
use super::map::{MapParams, MappedParam, map_params};
use super::pad::padded;
use super::sweep::sweep_leaves;
use super::walk::{ModulePath, visit_params};
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
pub(crate) fn dims_of<M: Module>(module: &M) -> HashMap<ParamId, Vec<usize>> {
    let mut dims = HashMap::new();
    visit_params(module, &mut |param| {
        dims.insert(param.id(), param.dims());
    });
    dims
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
    let mut mapper = Load { source, held, outcome: Ok(()) };
    let module = map_params(module, &mut mapper);
    // Each value is a new leaf, and the old ones go.
    sweep_leaves();
    mapper.outcome.map(|()| module)
}

struct Load<'a> {
    source: &'a mut dyn SliceSource,
    held: &'a dyn Fn(ParamId) -> Option<ParamSlice>,
    outcome: Result<(), Error>,
}

impl Load<'_> {
    fn read(
        &mut self,
        id: ParamId,
        path: &ModulePath,
        dtype: impl FnOnce() -> Option<DType>,
    ) -> Option<(TensorData, Vec<usize>)> {
        let ParamSlice { dims, ranges, local_dims } = (self.held)(id).filter(|_| self.outcome.is_ok())?;
        let path = path.text();
        if self.source.keeps(&path) {
            return None;
        }
        let read = self.read_slice(&path, &dims, &ranges, dtype);
        read.map(|data| (data, local_dims)).map_err(|error| self.outcome = Err(error)).ok()
    }

    fn read_slice(
        &mut self,
        path: &str,
        dims: &[usize],
        ranges: &[Range<usize>],
        dtype: impl FnOnce() -> Option<DType>,
    ) -> Result<TensorData, Error> {
        let wrong = |problem| Err(Error::invalid("load", problem));
        match self.source.dims(path)? {
            Some(found) if found == dims => {}
            Some(found) => {
                return wrong(format!("parameter `{path}` has dims {dims:?} in the model and {found:?} in the source"));
            }
            None => return wrong(format!("the source has no parameter `{path}`")),
        }
        let asked: Vec<usize> = ranges.iter().map(Range::len).collect();
        if asked.contains(&0) {
            return Ok(TensorData::new(Vec::<f32>::new(), asked));
        }
        let data = match dtype() {
            Some(dtype) => self.source.read_as(path, ranges, dtype)?,
            None => self.source.read(path, ranges)?,
        };
        if data.shape().as_slice() != asked {
            return wrong(format!(
                "the source gave dims {:?} of parameter `{path}`, of which {ranges:?} was asked for",
                data.shape().as_slice()
            ));
        }
        Ok(data)
    }
}

impl MapParams for Load<'_> {
    fn float<const D: usize>(&mut self, param: Param<Tensor<D>>, path: &ModulePath) -> MappedParam<D> {
        let dtype = || match param.is_initialized() {
            true => Some(param.base().dtype()),
            false => Some(LazyParam::of(&param).placeholder.base().dtype()),
        };
        let Some((data, local_dims)) = self.read(param.id, path, dtype) else { return MappedParam::Same(param) };
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
        MappedParam::New(Param::from_mapped_value(id, leaf(value, kind), mapper))
    }

    fn int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>, path: &ModulePath) -> Param<Tensor<D, Int>> {
        let Some((data, _)) = self.read(param.id, path, || None) else { return param };
        param.map(|value| Tensor::from_data(data, (&value.device(), value.dtype())))
    }

    fn bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>, path: &ModulePath) -> Param<Tensor<D, Bool>> {
        let Some((data, _)) = self.read(param.id, path, || None) else { return param };
        param.map(|value| Tensor::from_data(data, &value.device()))
    }
}
