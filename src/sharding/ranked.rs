//! Parameters whose rank is known at run time only.

use std::any::Any;

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};

use crate::Error;
use crate::params::{LeafKind, leaf};
use crate::tensor::PlainTensor;

/// Evaluates an expression with the parameter of a [`RankedParam`], whatever its rank.
macro_rules! with_param {
    ($ranked:expr, $param:ident => $body:expr) => {
        match $ranked {
            RankedParam::One($param) => $body,
            RankedParam::Two($param) => $body,
            RankedParam::Three($param) => $body,
            RankedParam::Four($param) => $body,
            RankedParam::Five($param) => $body,
            RankedParam::Six($param) => $body,
            RankedParam::Seven($param) => $body,
            RankedParam::Eight($param) => $body,
        }
    };
}

/// As [`with_param`], where the expression gives the parameter anew.
macro_rules! renew_param {
    ($ranked:expr, $param:ident => $body:expr) => {
        match $ranked {
            RankedParam::One($param) => RankedParam::One($body),
            RankedParam::Two($param) => RankedParam::Two($body),
            RankedParam::Three($param) => RankedParam::Three($body),
            RankedParam::Four($param) => RankedParam::Four($body),
            RankedParam::Five($param) => RankedParam::Five($body),
            RankedParam::Six($param) => RankedParam::Six($body),
            RankedParam::Seven($param) => RankedParam::Seven($body),
            RankedParam::Eight($param) => RankedParam::Eight($body),
        }
    };
}

/// A float parameter of any rank that burn's optimizers take.
#[derive(Debug, Clone)]

pub enum RankedParam {
    One(Param<Tensor<1>>),
    Two(Param<Tensor<2>>),
    Three(Param<Tensor<3>>),
    Four(Param<Tensor<4>>),
    Five(Param<Tensor<5>>),
    Six(Param<Tensor<6>>),
    Seven(Param<Tensor<7>>),
    Eight(Param<Tensor<8>>),
}

impl RankedParam {
    /// A parameter of rank 1 to 8; `None` for another rank.
    pub(crate) fn new<const D: usize>(param: Param<Tensor<D>>) -> Option<Self> {
        fn take<T: 'static>(param: Box<dyn Any>) -> Option<T> {
            param.downcast().ok().map(|param| *param)
        }
        let any: Box<dyn Any> = Box::new(param);
        Some(match D {
            1 => Self::One(take(any)?),
            2 => Self::Two(take(any)?),
            3 => Self::Three(take(any)?),
            4 => Self::Four(take(any)?),
            5 => Self::Five(take(any)?),
            6 => Self::Six(take(any)?),
            7 => Self::Seven(take(any)?),
            8 => Self::Eight(take(any)?),
            _ => return None,
        })
    }

    /// The parameter, if it is of rank `D`.
    pub(crate) fn get<const D: usize>(&self) -> Option<&Param<Tensor<D>>> {
        with_param!(self, param => (param as &dyn Any).downcast_ref())
    }

    /// Its id.
    pub(crate) fn id(&self) -> ParamId {
        with_param!(self, param => param.id)
    }

    /// Its value, off its tape.
    pub(crate) fn value(&self) -> PlainTensor {
        with_param!(self, param => PlainTensor::from(param.base()))
    }

    /// The same, which nobody holds but whoever has it then, if nobody else does.
    pub(crate) fn into_value(self) -> PlainTensor {
        with_param!(self, param => PlainTensor::from(param.base()))
    }

    /// The parameter with another value, of any dims; trained or not as before.
    ///
    /// # Errors
    /// [`Error::Graph`] if the value is of another rank.
    pub(crate) fn with_value(self, value: PlainTensor) -> Result<Self, Error> {
        Ok(renew_param!(self, param => {
            let (id, old, mapper) = param.consume();
            Param::from_mapped_value(id, leaf(value.float()?, LeafKind::of(&old)), mapper)
        }))
    }

    /// Takes the gradient of this parameter.
    pub(crate) fn take_gradient(&self, grads: &mut GradientsParams) -> Option<PlainTensor> {
        fn take<const D: usize>(param: &Param<Tensor<D>>, grads: &mut GradientsParams) -> Option<PlainTensor> {
            grads.remove::<D>(param.id).map(PlainTensor::from)
        }
        with_param!(self, param => take(param, grads))
    }

    /// Puts in a gradient of this parameter.
    ///
    /// # Errors
    /// [`Error::Graph`] if it is of another rank.
    pub(crate) fn put_gradient(&self, gradient: PlainTensor, grads: &mut GradientsParams) -> Result<(), Error> {
        fn put<const D: usize>(
            param: &Param<Tensor<D>>,
            gradient: PlainTensor,
            grads: &mut GradientsParams,
        ) -> Result<(), Error> {
            grads.register::<D>(param.id, gradient.float()?);
            Ok(())
        }
        with_param!(self, param => put(param, gradient, grads))
    }
}

/// A module of one parameter, whose path is that of the module.
impl Module for RankedParam {
    fn collect_devices(&self, devices: Devices) -> Devices {
        with_param!(self, param => param.collect_devices(devices))
    }

    fn fork(self, device: &Device) -> Self {
        renew_param!(self, param => param.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        renew_param!(self, param => param.to_device(device))
    }

    fn train(self) -> Self {
        renew_param!(self, param => Module::train(param))
    }

    fn valid(&self) -> Self {
        renew_param!(self, param => Module::valid(param))
    }

    fn materialize(self) -> Self {
        renew_param!(self, param => Module::materialize(param))
    }

    fn visit<Visitor: ModuleVisitor>(&self, visitor: &mut Visitor) {
        with_param!(self, param => Module::visit(param, visitor));
    }

    fn map<Mapper: ModuleMapper>(self, mapper: &mut Mapper) -> Self {
        renew_param!(self, param => Module::map(param, mapper))
    }
}
