//! Finds moments of another rank.
//!
//! Ranks that hold different parts of a parameter have the same id for it and, as a rule, the same dims: the state that
//! one of them has saved fits on another. Once it is loaded there, two ranks have the same moments of different parts.
//!
//! Ranks may have the same moments by themselves as well: moments are made of gradients, and those of parts may be
//! equal in every step, where the parts themselves are, or where the loss is linear in them. Then the gradients of this
//! step are equal too.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::meeting::error_of;
use super::moments::MomentDigests;
use super::optimizer_error::optimizer_error;
use crate::Error;
use crate::comm::{Communicator, NEW_OPTIMIZER, agreed_number};
use crate::graph::SplitParam;
use crate::tensor::PlainTensor;

/// Parameters that are divided over the same groups, one behind the other: each of all these ranks holds another part.
pub(super) struct Divided<'a> {
    groups: Vec<&'a Communicator>,
    params: HashSet<ParamId>,
}

/// The groups over which a parameter is split.
pub(super) fn groups_of(param: &SplitParam) -> Vec<&Communicator> {
    param.over.iter().flat_map(|over| over.axes.iter().map(|(_, group)| group)).collect()
}

/// The groups over which any of these parameters are split.
pub(super) fn holders(split: &[SplitParam]) -> Vec<&Communicator> {
    let mut all: Vec<&Communicator> = Vec::new();
    for group in split.iter().flat_map(groups_of) {
        if all.iter().all(|known| known.group() != group.group()) {
            all.push(group);
        }
    }
    all
}

/// Parameters with the groups over which each is divided, those of the same groups together.
pub(super) fn divided<'a>(params: impl Iterator<Item = (ParamId, Vec<&'a Communicator>)>) -> Vec<Divided<'a>> {
    let mut all: Vec<Divided<'a>> = Vec::new();
    for (id, groups) in params {
        let names = || groups.iter().map(|group| group.group());
        let place = all.iter().position(|known| known.groups.iter().map(|group| group.group()).eq(names()));
        match place {
            Some(place) => {
                all[place].params.insert(id);
            }
            None => all.push(Divided { groups, params: HashSet::from([id]) }),
        }
    }
    all
}

impl Divided<'_> {
    /// Demands that no two ranks have the same `moments` of these parameters, but where the gradients of their parts,
    /// or the parts themselves, are the same as well. A rank that has an error in their place brings that, and all get
    /// it. Collective over the groups.
    ///
    /// # Errors
    /// [`Error::Optimizer`], the same on all ranks; those of [`Communicator::all_gather`].
    pub fn check<M: Module>(
        &self,
        moments: Result<MomentDigests, Error>,
        (module, grads): (&M, &GradientsParams),
    ) -> Result<MomentDigests, Error> {
        let Some(first) = self.groups.first() else { return moments };
        let number = moments.as_ref().map_or(0, |moments| moments.of(&self.params));
        let all = self.gather(vec![first.world_rank() as u64, u64::from(moments.is_err()), number])?;
        let ranks: Vec<u64> = all.chunks_exact(3).map(|said| said[0]).collect();
        if let Some(failed) = all.chunks_exact(3).find(|said| said[1] != 0) {
            return Err(error_of(&self.groups, failed[0], moments.err())?);
        }
        let moments = moments?;
        let alike = first_alike(&all.chunks_exact(3).map(|said| said[2]).collect::<Vec<_>>());
        if alike.is_empty() {
            return Ok(moments);
        }
        let mut digests = Digests { params: &self.params, grads, seen: HashSet::new(), all: Ok([0; 2]) };
        module.visit(&mut digests);
        let digests = digests.all.inspect_err(|error| first.fail(error.clone()))?;
        let all = self.gather(digests.to_vec())?;
        let differ = |(one, two): &(usize, usize)| (0..2).all(|of| all[2 * one + of] != all[2 * two + of]);
        let Some((one, two)) = alike.into_iter().find(differ) else { return Ok(moments) };
        let error = optimizer_error(format!(
            "ranks {} and {} of the world hold different parts of the parameters, and their optimizers have the same moments of them: \
             each rank loads the state that it has saved itself, or all restore a checkpoint, which gives each its part",
            ranks[one], ranks[two]
        ));
        first.fail(error.clone());
        Err(error)
    }

    /// The numbers of all ranks. Ranks whose optimizer is not new go on without: the name of the call tells them.
    fn gather(&self, mine: Vec<u64>) -> Result<Vec<u64>, Error> {
        self.groups.iter().try_fold(mine, |all, group| group.all_gather_agreed(all, agreed_number(NEW_OPTIMIZER)))
    }
}

/// Places of equal numbers other than 0: of each but the first, with that.
fn first_alike(numbers: &[u64]) -> Vec<(usize, usize)> {
    let mut first: HashMap<u64, usize> = HashMap::new();
    let numbers = numbers.iter().enumerate().filter(|(_, number)| **number != 0);
    let with_first = numbers.map(|(place, number)| (*first.entry(*number).or_insert(place), place));
    with_first.filter(|(first, place)| first != place).collect()
}

/// Digests of the gradients and of the values of some parameters.
struct Digests<'a> {
    params: &'a HashSet<ParamId>,
    grads: &'a GradientsParams,
    seen: HashSet<ParamId>,
    all: Result<[u64; 2], Error>,
}

impl ModuleVisitor for Digests<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !self.params.contains(&param.id) || !self.seen.insert(param.id) {
            return;
        }
        let gradient = || self.grads.get::<D>(param.id).map_or(Ok(0), |gradient| PlainTensor::from(gradient).digest());
        let digests = gradient().and_then(|gradient| Ok([gradient, PlainTensor::from(param.base()).digest()?]));
        self.all = std::mem::replace(&mut self.all, Ok([0; 2])).and_then(|all| {
            let digests = digests?;
            // Ranks visit them in the same order.
            Ok([0, 1].map(|of| all[of].rotate_left(7) ^ digests[of]))
        });
    }
}
