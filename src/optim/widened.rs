//! An optimizer of burn for parameters of fewer bits than the moments that it loads.
//!
//! burn loads all moments in the default dtype of its default device, `f32` as a rule, and has no other way to give an
//! optimizer moments. Its first step then adds a gradient of `bf16` to a moment of `f32`, and panics. So value and
//! gradient are cast to the dtype of the moments, the optimizer updates what they are there, and the new value is
//! rounded to the dtype of the parameter.

use burn::module::{Param, ParamId};
use burn::optim::{
    DynOptimizer, DynState, GradientsParams, LearningRate, ModuleOptimizer, OptimizerRecord, StateSink, StateSource,
    join_path,
};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{DType, Device, Tensor};
use burn_pack::{Scalar, Writer};

use super::{ParamState, StateNames, record_of};
use crate::Error;
use crate::error::throw;
use crate::sharding::{RankedParam, Rows, ShardParam, ShardParams};

/// What burn calls the number of dims of a parameter in a record.
const RANK: &str = "__rank";

/// A number in a record for a parameter that only asks how it would be loaded. Of all optimizers [`Widened`] alone
/// gives it out again.
pub(crate) const ASKED: &str = "__widened";

/// The optimizer of one parameter.
pub(crate) struct Widened {
    id: ParamId,
    path: String,
    /// What updates it, with its groups, and without any state.
    inner: ModuleOptimizer,
    names: StateNames,
    /// The dtype of the moments.
    dtype: DType,
}

/// What it keeps of its parameter.
#[derive(Clone)]
struct WidenedState {
    inner: ModuleOptimizer,
    /// Whether the record only [asked](ASKED).
    asked: bool,
}

impl Widened {
    /// One that updates a parameter as `inner` does, with moments of a dtype; `names` are those of its state.
    pub(crate) fn new(id: ParamId, path: &str, inner: &ModuleOptimizer, names: StateNames, dtype: DType) -> Self {
        let inner = inner.clone().load_record(OptimizerRecord::default());
        Self { id, path: path.to_owned(), inner, names, dtype }
    }

    /// Whether all numbers of a parameter's dtype are numbers of this one.
    pub(crate) fn takes(param: DType, dtype: DType) -> bool {
        match dtype {
            DType::F32 => matches!(param, DType::BF16 | DType::F16),
            DType::F64 => matches!(param, DType::BF16 | DType::F16 | DType::F32),
            _ => false,
        }
    }

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        (tensor, gradient): (BridgeTensor, BridgeTensor),
        state: Option<DynState>,
    ) -> Result<(BridgeTensor, DynState), Error> {
        let tensor = Tensor::<D>::from_bridge(tensor);
        let dtype = tensor.dtype();
        if dtype != self.dtype && !Self::takes(dtype, self.dtype) {
            let problem = format!(
                "it was restored with moments of {:?}, and `{}` is {dtype:?} now, which would lose digits: take a new optimizer",
                self.dtype, self.path
            );
            return Err(Error::Optimizer { problem });
        }
        let mut optim = state.map_or_else(|| self.inner.clone(), |state| state.downcast::<WidenedState>().inner);
        let mut grads = GradientsParams::new();
        grads.register(self.id, Tensor::<D>::from_bridge(gradient).cast(self.dtype));
        // Optimizers take values off their tape.
        let dims = tensor.dims();
        let param = RankedParam::new(Param::initialized(self.id, tensor.cast(self.dtype).autodiff().require_grad()));
        let (Some(param), Some(rows)) = (param, Rows::new(&dims, 1)) else {
            let problem = format!("`{}` has {D} dims: its moments are of 1 to 8", self.path);
            return Err(Error::Optimizer { problem });
        };
        let model = ShardParams(vec![ShardParam { path: self.path.clone(), rows, owner: 0, param }]);
        let mut updated = optim.step(lr, model, grads);
        let value = updated.0.remove(0).param.value().float::<D>()?;
        let state = DynState::create(WidenedState { inner: optim, asked: false }, D);
        Ok((value.cast(dtype).into_bridge(), state))
    }

    /// The record of the parameter for the optimizer inside.
    fn record(&self, rank: usize, state: ParamState) -> Option<OptimizerRecord> {
        let id = self.id.val().to_string();
        let writer = Writer::new(Vec::new()).with_scalar(&join_path(&id, RANK), Scalar::from(rank));
        let outline = writer.with_metadata(&id, &self.path).into_bytes().ok()?;
        Some(record_of(OptimizerRecord::from_bytes(outline).ok()?, move |prefix, into| {
            state.moments.iter().for_each(|(name, data)| into.push_tensor(prefix, name, data.clone()));
            state.scalars.iter().for_each(|(name, scalar)| into.push_scalar(prefix, name, *scalar));
        }))
    }
}

impl DynOptimizer for Widened {
    fn step_dyn(
        &self,
        rank: usize,
        lr: LearningRate,
        tensor: BridgeTensor,
        gradient: BridgeTensor,
        state: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        let both = (tensor, gradient);
        let stepped = match rank {
            1 => self.step::<1>(lr, both, state),
            2 => self.step::<2>(lr, both, state),
            3 => self.step::<3>(lr, both, state),
            4 => self.step::<4>(lr, both, state),
            5 => self.step::<5>(lr, both, state),
            6 => self.step::<6>(lr, both, state),
            7 => self.step::<7>(lr, both, state),
            _ => self.step::<8>(lr, both, state),
        };
        match stepped {
            Ok((tensor, state)) => (tensor, Some(state)),
            // There is no other way out of an optimizer.
            Err(error) => throw(error),
        }
    }

    fn to_device_dyn(&self, state: DynState, _: &Device) -> DynState {
        // The optimizer inside moves it in its step.
        state
    }

    fn state_flatten(&self, prefix: &str, state: &DynState, into: &mut StateSink) {
        let WidenedState { inner, asked } = state.downcast_ref();
        if *asked {
            into.push_scalar(prefix, ASKED, Scalar::from(1_usize));
        }
        let states = self.names.clone().read(inner, &[self.id]);
        let Some(state) = states.ok().and_then(|mut states| states.remove(&self.id)) else { return };
        state.moments.into_iter().for_each(|(name, data)| into.push_tensor(prefix, &name, data));
        state.scalars.iter().for_each(|(name, scalar)| into.push_scalar(prefix, name, *scalar));
    }

    fn state_unflatten(&self, rank: usize, prefix: &str, from: &mut StateSource, _: &Device) -> Option<DynState> {
        let (state, asked) = (self.names.take(prefix, from), from.take_scalar(prefix, ASKED).is_some());
        let inner = self.inner.clone().load_record(self.record(rank, state)?);
        Some(DynState::create(WidenedState { inner, asked }, rank))
    }
}
