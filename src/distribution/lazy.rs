//! Parameters that are distributed when they are first used.
//!
//! Then all ranks meet. Rank 0 tells the others how it makes the value: as a whole, or in pieces, where the initialiser
//! of the parameter allows it ([`Initializer`]). A piece is sent as soon as it is made, to those who have part of it,
//! and the next is made when it has arrived: beside its own part rank 0 holds one piece, an eighth of the parameter at
//! most.

use std::ops::Range;

use burn::module::Param;
use burn::tensor::{Device, Shape, Slice, Tensor};

use super::initializer::{Initializer, RecordedParam};
use super::param_part::{ParamPart, nothing, receive};
use crate::Error;
use crate::comm::Communicator;
use crate::layout::{Layout, scatter_from_root};
use crate::params::{LazyParam, LeafKind, leaf, padded};

/// A parameter is made in no fewer pieces, if its dims allow it.
const PIECES: usize = 8;
/// Nor in larger ones.
const PIECE_BYTES: usize = 16 << 20;
/// Of the messages of a group that is there for the parameters of one model.
const TAG: u64 = 0;

/// The parameter with this rank's part of what rank 0 would make, when it is needed.
pub(super) fn lazy_part<const D: usize>(
    param: Param<Tensor<D>>,
    part: ParamPart,
    group: &Communicator,
) -> Param<Tensor<D>> {
    let LazyParam { placeholder, device, trained } = LazyParam::of(&param);
    let (id, one, mapper) = placeholder.consume();
    let (group, one, local_dims) = (group.clone(), one.inner(), part.local_dims.clone());
    // Only rank 0 makes the value as the model says.
    let source = (group.rank() == 0).then_some(param);
    let init = move |device: &Device, trained: bool| {
        let lazy = LazyPart { part: &part, like: &one, group: &group };
        let local = lazy.value(source).unwrap_or_else(|error| {
            // Here no error can be returned: what comes next to communicate returns it.
            group.fail(error);
            lazy.zeros(&part.local_dims)
        });
        leaf(local.to_device(&device.clone().inner()), LeafKind::on(device, trained))
    };
    let (load, save) = (mapper.clone(), mapper);
    Param::uninitialized(id, init, device, trained, Shape::from(local_dims))
        .load_mapper(move |value| load.on_load(value))
        .save_mapper(move |value| save.on_save(value))
}

/// All ranks, at one parameter.
struct LazyPart<'a, const D: usize> {
    part: &'a ParamPart,
    /// A tensor of the device.
    like: &'a Tensor<D>,
    group: &'a Communicator,
}

/// How a value is made in pieces.
struct PiecewiseValue {
    /// The dim that is cut, the size along it, and of a piece.
    along: usize,
    size: usize,
    step: usize,
}

impl<const D: usize> LazyPart<'_, D> {
    fn value(&self, source: Option<Param<Tensor<D>>>) -> Result<Tensor<D>, Error> {
        let Layout::Sharded(dim) = self.part.layout else {
            return self.whole(source.map(Param::into_value));
        };
        let recorded = match source {
            Some(param) if self.part.fresh.is_some() => Some(Initializer::record(param)?),
            Some(param) => Some(RecordedParam::Value(param.into_value())),
            None => None,
        };
        let told = match &recorded {
            Some(RecordedParam::Initializer(initializer)) => {
                self.check(&initializer.dims())?;
                initializer.along().map(|along| self.cut(along, initializer))
            }
            _ => None,
        };
        let words = told.map_or([0; 3], |cut| [cut.along, cut.size, cut.step]).map(|word| word as u64).to_vec();
        let cut = match self.group.broadcast(words, 0)?.as_slice() {
            [along, size, step] if *step > 0 => {
                Some(PiecewiseValue { along: *along as usize, size: *size as usize, step: *step as usize })
            }
            _ => None,
        };
        let device = self.like.device();
        match (cut, recorded) {
            (Some(cut), Some(RecordedParam::Initializer(initializer))) => {
                self.pieces(dim, &cut, |range| initializer.piece(range, &device)?.float().map(Some))
            }
            (Some(cut), _) => self.pieces(dim, &cut, |_| Ok(None)),
            (None, Some(RecordedParam::Initializer(initializer))) => {
                self.whole(Some(initializer.whole(&device)?.float()?))
            }
            (None, Some(RecordedParam::Value(value))) => self.whole(Some(value)),
            (None, None) => self.whole(None),
        }
    }

    fn whole(&self, value: Option<Tensor<D>>) -> Result<Tensor<D>, Error> {
        let value = match value {
            Some(value) => {
                self.check(&value.dims())?;
                padded(value.inner(), &self.part.dims)
            }
            None => nothing(self.part, self.like),
        };
        receive(value, self.part.layout, self.group)
    }

    /// Demands that the parameter has the dims by which the plan was checked.
    fn check(&self, dims: &[usize]) -> Result<(), Error> {
        match &self.part.fresh {
            Some(said) if said != dims => {
                let problem = format!(
                    "a lazy parameter has dims {dims:?} and said {said:?} before, as burn's linear layers of column layout do; \
                     make the parameters before the model is split: `train` makes them"
                );
                Err(Error::Plan { problem })
            }
            _ => Ok(()),
        }
    }

    fn cut(&self, along: usize, initializer: &Initializer) -> PiecewiseValue {
        let dims = initializer.dims();
        let size = dims[along];
        let slice_bytes = dims.iter().product::<usize>() / size.max(1) * self.part.dtype.size();
        let step = size.div_ceil(PIECES).min(PIECE_BYTES / slice_bytes.max(1)).max(1);
        PiecewiseValue { along, size, step }
    }

    /// This rank's part along `dim` of what `make` makes on rank 0, a piece at a time.
    fn pieces(
        &self,
        dim: usize,
        cut: &PiecewiseValue,
        mut make: impl FnMut(Range<usize>) -> Result<Option<Tensor<D>>, Error>,
    ) -> Result<Tensor<D>, Error> {
        // What is padding stays zero.
        let mut local = self.zeros(&self.part.local_dims);
        let part = self.part.local_dims[dim];
        let mut start = 0;
        while start < cut.size {
            let mut end = (start + cut.step).min(cut.size);
            if cut.along == dim {
                // All of a piece is of one rank.
                end = end.min((start / part + 1) * part);
                let owner = start / part;
                if let Some(piece) = self.hand_over(make(start..end)?, owner)? {
                    local = put(local, dim, start - owner * part, piece);
                }
                // Messages are sent before they are wanted: here they are.
                self.group.barrier()?;
            } else {
                let mut dims = self.part.dims.clone();
                dims[cut.along] = end - start;
                let piece = make(start..end)?.map_or_else(|| self.zeros(&[0; D]), |piece| padded(piece, &dims));
                local = put(local, cut.along, start, scatter_from_root(piece, dim, 0, self.group)?);
            }
            start = end;
        }
        Ok(local)
    }

    /// Moves a piece from rank 0 to its owner.
    fn hand_over(&self, piece: Option<Tensor<D>>, owner: usize) -> Result<Option<Tensor<D>>, Error> {
        match (piece, self.group.rank() == owner) {
            (Some(piece), true) => Ok(Some(piece)),
            (Some(piece), false) => self.group.send(piece, owner, TAG).map(|()| None),
            (None, true) => self.group.recv_on(&self.like.device(), 0, TAG).map(Some),
            (None, false) => Ok(None),
        }
    }

    fn zeros(&self, dims: &[usize]) -> Tensor<D> {
        let dims = <[usize; D]>::try_from(dims).unwrap_or([0; D]);
        // Flex makes `zeros` in one place and copies them to another.
        Tensor::full(dims, 0.0, (&self.like.device(), self.part.dtype))
    }
}

/// The tensor with `piece` in it, from `start` on along `dim`.
fn put<const D: usize>(into: Tensor<D>, dim: usize, start: usize, piece: Tensor<D>) -> Tensor<D> {
    let dims = piece.dims();
    let slices: [Slice; D] = std::array::from_fn(|other| match other == dim {
        true => Slice::from(start..start + dims[dim]),
        false => Slice::from(0..dims[other]),
    });
    into.slice_assign(slices, piece)
}
