//! Parts of parameters that are split along axes, joined on one rank where an update depends on the whole of them.
//!
//! The ranks that hold parts of a parameter deal out the parameters among themselves, those of equal dims in turn. The
//! owner of one gets the parts of its value and of its gradient, updates the whole, and sends each rank its part of
//! that. Along several axes this is done one axis after the other, the last one first.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use burn::module::ParamId;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device};

use crate::Error;
use crate::comm::Communicator;
use crate::graph::{SplitOver, SplitParam};
use crate::sharding::{ShardParam, ShardParams, owners};
use crate::tensor::PlainTensor;

/// Parameters that one rank updates as a whole, with what the others need to get their parts back.
#[derive(Default)]
pub(super) struct Joined {
    packs: Vec<JoinedPack>,
}

/// Parameters of the same axes, owner and dtypes: what is sent together.
struct JoinedPack {
    /// The rank of the owner along each axis.
    owner: Vec<usize>,
    over: Vec<SplitOver>,
    /// On every rank its parts.
    parts: Vec<ShardParam>,
}

/// What parameters of one pack have in common.
#[derive(PartialEq)]
struct Key {
    groups: Vec<Arc<str>>,
    owner: Vec<usize>,
    dtypes: [DType; 2],
}

/// A part of a parameter and of its gradient.
pub(super) type PartWithGradient = (ShardParam, PlainTensor);

impl Joined {
    /// Joins parts of parameters among those that are `split`, all of which are the same on all ranks that hold parts
    /// of one, as are `parts` but for what they hold. What this rank owns comes back, with the gradients put into
    /// `grads`. Collective.
    ///
    /// # Errors
    /// Those of [`Communicator::gather`](crate::comm::Communicator::gather).
    pub fn join(
        parts: Vec<PartWithGradient>,
        split: &[SplitParam],
        grads: &mut GradientsParams,
    ) -> Result<(ShardParams, Self), Error> {
        let dealt = deal(split);
        // In the order of the parts, which all ranks have in common.
        let mut packs: Vec<(Key, Vec<SplitOver>, Vec<PartWithGradient>)> = Vec::new();
        for (shard, gradient) in parts {
            let Some((over, owner)) = dealt.get(&shard.param.id()) else {
                return Err(Error::invalid("optimize", format!("`{}` is no part of a parameter", shard.path)));
            };
            let groups = over.axes.iter().map(|(_, group)| group.group().clone()).collect();
            let key = Key { groups, owner: owner.clone(), dtypes: [shard.dtype(), gradient.dtype()] };
            let place = packs.iter().position(|(known, ..)| *known == key).unwrap_or_else(|| {
                packs.push((key, Vec::new(), Vec::new()));
                packs.len() - 1
            });
            packs[place].1.push((*over).clone());
            packs[place].2.push((shard, gradient));
        }
        Self::put_together(packs, grads)
    }

    fn put_together(
        members: Vec<(Key, Vec<SplitOver>, Vec<PartWithGradient>)>,
        grads: &mut GradientsParams,
    ) -> Result<(ShardParams, Self), Error> {
        let (mut owned, mut packs) = (ShardParams::default(), Vec::new());
        for (Key { owner, .. }, over, members) in members {
            let (parts, gradients): (Vec<ShardParam>, Vec<PlainTensor>) = members.into_iter().unzip();
            let pack = JoinedPack { owner, over, parts };
            let values = pack.put_together(pack.parts.iter().map(|part| part.param.value()).collect())?;
            let gradients = pack.put_together(gradients)?;
            if let (Some(values), Some(gradients)) = (values, gradients) {
                for ((part, value), gradient) in pack.parts.iter().zip(values).zip(gradients) {
                    let param = part.param.clone().with_value(value)?;
                    param.put_gradient(gradient, grads)?;
                    owned.0.push(ShardParam { param, ..part.clone() });
                }
            }
            packs.push(pack);
        }
        Ok((owned, Self { packs }))
    }

    /// This rank's parts of what the owners have updated; `owned` is what this rank has. Collective.
    ///
    /// # Errors
    /// Those of [`Communicator::scatter`](crate::comm::Communicator::scatter).
    pub fn divide(self, owned: Vec<ShardParam>) -> Result<Vec<ShardParam>, Error> {
        let mut updated: HashMap<ParamId, PlainTensor> =
            owned.into_iter().map(|shard| (shard.param.id(), shard.param.value())).collect();
        let mut divided = Vec::new();
        for pack in self.packs {
            let wholes = pack.parts.iter().filter_map(|part| updated.remove(&part.param.id())).collect();
            let values = pack.take_apart(wholes)?;
            for (part, value) in pack.parts.into_iter().zip(values) {
                divided.push(ShardParam { param: part.param.with_value(value)?, ..part });
            }
        }
        Ok(divided)
    }
}

/// What each parameter is split over, and the rank of its owner along each axis. Dealt out over all parameters that are
/// split, trained or not: the state of an optimizer stays where it is when others are frozen.
fn deal(split: &[SplitParam]) -> HashMap<ParamId, (&SplitOver, Vec<usize>)> {
    let mut by_size: BTreeMap<usize, Vec<(ParamId, &SplitOver)>> = BTreeMap::new();
    for param in split {
        if let Some(over) = &param.over {
            let ranks = over.axes.iter().map(|(_, group)| group.size()).product();
            by_size.entry(ranks).or_default().push((param.id, over));
        }
    }
    let mut dealt = HashMap::new();
    for (ranks, params) in by_size {
        let owners = owners(params.iter().map(|(_, over)| over.dims.as_slice()), ranks);
        for ((id, over), mut owner) in params.into_iter().zip(owners) {
            let coordinate = |(_, group): &(usize, Communicator)| {
                let along = owner % group.size();
                owner /= group.size();
                along
            };
            dealt.insert(id, (over, over.axes.iter().map(coordinate).collect()));
        }
    }
    dealt
}

/// The parameters among those that are split that this rank updates if they are updated as wholes.
pub(super) fn owned(split: &[SplitParam]) -> HashSet<ParamId> {
    let is_here = |(over, owner): &(&SplitOver, Vec<usize>)| {
        over.axes.iter().zip(owner).all(|((_, group), along)| group.rank() == *along)
    };
    deal(split).into_iter().filter(|(_, dealt)| is_here(dealt)).map(|(id, _)| id).collect()
}

impl JoinedPack {
    fn axes(&self) -> usize {
        self.owner.len()
    }

    /// The communicator of an axis.
    fn group(&self, axis: usize) -> &Communicator {
        &self.over[0].axes[axis].1
    }

    /// Whether this rank is where the owner is, along the axes behind this one.
    fn is_owner_behind(&self, axis: usize) -> bool {
        (axis + 1..self.axes()).all(|axis| self.group(axis).rank() == self.owner[axis])
    }

    /// The dims of each parameter before it is divided along an axis and those behind it.
    fn dims_before(&self, axis: usize) -> Vec<Vec<usize>> {
        let divided = |over: &SplitOver| {
            let mut dims = over.padded_dims.clone();
            over.axes[..axis].iter().for_each(|(dim, group)| dims[*dim] /= group.size());
            dims
        };
        self.over.iter().map(divided).collect()
    }

    /// The whole of each parameter, on the owner, of the parts of all.
    fn put_together(&self, parts: Vec<PlainTensor>) -> Result<Option<Vec<PlainTensor>>, Error> {
        let mut tensors = parts;
        for axis in (0..self.axes()).rev() {
            let group = self.group(axis);
            let shapes: Vec<Vec<usize>> = tensors.iter().map(|tensor| tensor.shape().to_vec()).collect();
            let packed = cat(tensors.into_iter().map(flat).collect(), 0)?;
            let elements = packed.elements();
            let Some(all) = group.gather(packed, self.owner[axis])? else { return Ok(None) };
            let by_rank = all.reshape([group.size(), elements]);
            let (mut begin, mut joined) = (0, Vec::new());
            for (dims, over) in shapes.into_iter().zip(&self.over) {
                let end = begin + dims.iter().product::<usize>();
                let mine = by_rank.clone().narrow(1, begin..end);
                let part = |rank: usize| mine.clone().narrow(0, rank..rank + 1).reshape(dims.clone());
                joined.push(cat((0..group.size()).map(part).collect(), over.axes[axis].0)?);
                begin = end;
            }
            tensors = joined;
        }
        Ok(Some(
            tensors.into_iter().zip(&self.over).map(|(tensor, over)| without_padding(tensor, &over.dims)).collect(),
        ))
    }

    /// This rank's part of each parameter, of the wholes that the owner brings.
    fn take_apart(&self, wholes: Vec<PlainTensor>) -> Result<Vec<PlainTensor>, Error> {
        let value = self.parts[0].param.value();
        let (dtype, device) = (value.dtype(), value.device());
        let pad = |(whole, over): (PlainTensor, &SplitOver)| with_padding(whole, &over.padded_dims);
        let mut tensors = wholes.into_iter().zip(&self.over).map(pad).collect::<Result<Vec<_>, _>>()?;
        for axis in (0..self.axes()).filter(|axis| self.is_owner_behind(*axis)) {
            tensors = self.divide_along(axis, tensors, (dtype, &device))?;
        }
        Ok(tensors)
    }

    fn divide_along(
        &self,
        axis: usize,
        tensors: Vec<PlainTensor>,
        (dtype, device): (DType, &Device),
    ) -> Result<Vec<PlainTensor>, Error> {
        let (group, owner) = (self.group(axis), self.owner[axis]);
        let ranks = group.size();
        let packed = match group.rank() == owner {
            true => {
                let by_rank = |(tensor, over): (PlainTensor, &SplitOver)| {
                    let dim = over.axes[axis].0;
                    let share = tensor.shape()[dim] / ranks;
                    let part = |rank| flat(tensor.clone().narrow(dim, rank * share..(rank + 1) * share));
                    let elements = tensor.elements() / ranks;
                    Ok(cat((0..ranks).map(part).collect(), 0)?.reshape([ranks, elements]))
                };
                flat(cat(tensors.into_iter().zip(&self.over).map(by_rank).collect::<Result<_, Error>>()?, 1)?)
            }
            false => PlainTensor::zeros([1], dtype, device),
        };
        let packed = group.scatter_alike(packed, owner)?;
        let mut begin = 0;
        let unpack = |dims: Vec<usize>| {
            let end = begin + dims.iter().product::<usize>();
            let part = packed.clone().narrow(0, begin..end).packed()?.reshape(dims);
            begin = end;
            Ok(part)
        };
        self.dims_before(axis + 1).into_iter().map(unpack).collect()
    }
}

fn flat(tensor: PlainTensor) -> PlainTensor {
    let elements = tensor.elements();
    tensor.reshape([elements])
}

/// The tensors one behind the other along a dim; one alone as it is.
fn cat(mut tensors: Vec<PlainTensor>, dim: usize) -> Result<PlainTensor, Error> {
    match tensors.len() {
        1 => Ok(tensors.remove(0)),
        _ => PlainTensor::cat(tensors, dim),
    }
}

fn without_padding(mut tensor: PlainTensor, dims: &[usize]) -> PlainTensor {
    for (dim, size) in dims.iter().enumerate() {
        if tensor.shape()[dim] > *size {
            tensor = tensor.narrow(dim, 0..*size);
        }
    }
    tensor
}

fn with_padding(mut tensor: PlainTensor, dims: &[usize]) -> Result<PlainTensor, Error> {
    for (dim, size) in dims.iter().enumerate() {
        let mut missing = tensor.shape().to_vec();
        if missing[dim] < *size {
            missing[dim] = size - missing[dim];
            let zeros = PlainTensor::zeros(missing, tensor.dtype(), &tensor.device());
            tensor = PlainTensor::cat(vec![tensor, zeros], dim)?;
        }
    }
    Ok(tensor)
}
