//! Models that have changed since they were wrapped.
//!
//! A model may come to train parameters that the replicas do not know: frozen ones that are trained now, and layers put in
//! after wrapping. Each rank sees it in its own model before a step. As all ranks run the same program, all of them do; they
//! meet, make sure of it, and know the parameters from then on.
//!
//! A rank that sees nothing is on its way to the *head* of the step, the sum of the weights. So those that see something bring
//! to that sum what no weight is, and all learn of each other in the collective that they come to in any case.

use std::collections::HashSet;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Tensor, TensorData};

use super::known_params::{CHANGED, KnownParams};
use super::reducer::Reducer;
use super::structure::{Structure, broadcast_some};
use crate::Error;
use crate::comm::{Communicator, ReduceOp};
use crate::graph::read_params;
use crate::params::{ShardedIds, agree, own_buffers};

/// Whether a forward has run already with the parameters as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ForwardState {
    /// It is still to run: new parameters are given the values of rank 0.
    Pending,
    /// It has: the ranks must have brought equal ones.
    Done,
}

impl Reducer {
    /// Makes sure that everything that `module` trains takes part in the reduction. Collective if it has changed, and then it
    /// returns the module to go on with.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`], the same on all ranks, if it has not changed in the same way on all, or if a forward has run
    /// with new parameters of unequal values; [`Error::Graph`] if parameters of one id have different values; those of
    /// [`Communicator`].
    pub(crate) fn admit<M: Module>(&self, module: &M, forward: ForwardState) -> Result<Option<M>, Error> {
        let (changed, repeated) = FindChanges::over(module, &self.known());
        if !repeated.is_empty() {
            // burn's optimizers would move one of them.
            read_params(module, &repeated).inspect_err(|error| self.control().fail(error.clone()))?;
        }
        if !changed {
            return Ok(None);
        }
        let (structure, group, mut module) = (Structure::of(module), self.control(), module.clone());
        if group.size() > 1 {
            let sum = group.all_reduce(vec![CHANGED], ReduceOp::Sum)?[0];
            let all = (sum / CHANGED).round() as usize == group.size();
            let lines = self.known().lines_of(&structure, all);
            agree(&lines, group)?;
            let unknown: HashSet<ParamId> = {
                let known = self.known();
                structure.ids.iter().copied().filter(|id| !known.ids.contains(id)).collect()
            };
            match forward {
                _ if unknown.is_empty() => {}
                ForwardState::Done => equal(&module, &unknown, group)?,
                ForwardState::Pending => {
                    let trains = |id| structure.trained.iter().any(|param| param.id == id);
                    if !unknown.iter().all(|id| trains(*id)) {
                        // There may be running statistics among them.
                        module = own_buffers(module);
                    }
                    module = broadcast_some(module, group, &|id, _| unknown.contains(&id))?;
                }
            }
        }
        self.learn(|known| known.learn(structure));
        Ok(Some(module))
    }
}

/// Looks for what has changed in a module.
struct FindChanges<'a> {
    known: &'a KnownParams,
    /// What stands for parameters is none itself.
    stand_ins: HashSet<ParamId>,
    seen: HashSet<ParamId>,
    changed: bool,
    /// The trained parameters that are in several places.
    repeated: HashSet<ParamId>,
}

impl<'a> FindChanges<'a> {
    fn over<M: Module>(module: &M, known: &'a KnownParams) -> (bool, HashSet<ParamId>) {
        let stand_ins = ShardedIds::of(module).stand_ins;
        let mut watch = Self { known, stand_ins, seen: HashSet::new(), changed: false, repeated: HashSet::new() };
        module.visit(&mut watch);
        (watch.changed, watch.repeated)
    }
}

impl ModuleVisitor for FindChanges<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.stand_ins.contains(&param.id) {
            return;
        }
        let trained = param.is_require_grad();
        self.changed |= self.known.is_new(param.id, trained);
        if !self.seen.insert(param.id) && trained {
            self.repeated.insert(param.id);
        }
    }
}

/// Demands that all ranks hold the same values of some float parameters.
///
/// # Errors
/// [`Error::ModelMismatch`], the same on all ranks, with the first parameter that differs; those of [`Communicator`].
fn equal<M: Module>(module: &M, wanted: &HashSet<ParamId>, group: &Communicator) -> Result<(), Error> {
    let mut compare = Compare { wanted, group, path: Vec::new(), paths: Vec::new(), different: None, failed: None };
    module.visit(&mut compare);
    let Compare { paths, different, failed, .. } = compare;
    failed.map_or(Ok(()), Err)?;
    let (size, rank) = (group.size() as u64, group.rank() as u64);
    let mine = different.map_or(u64::MAX, |place| place as u64 * size + rank);
    let first = group.all_reduce(vec![mine], ReduceOp::Min)?[0];
    if first == u64::MAX {
        return Ok(());
    }
    let problem = "it was put in after wrapping, and its values are not those of rank 0: replicas that are trained by \
                   `backward` bring equal ones, `step` makes them equal before it runs the forward";
    let path = paths.into_iter().nth((first / size) as usize).unwrap_or_default();
    let error = Error::ModelMismatch {
        group: group.group().clone(),
        rank: (first % size) as usize,
        path,
        problem: problem.into(),
    };
    group.fail(error.clone());
    Err(error)
}

struct Compare<'a> {
    wanted: &'a HashSet<ParamId>,
    group: &'a Communicator,
    path: Vec<String>,
    /// Those that were compared.
    paths: Vec<String>,
    /// The place of the first that differs.
    different: Option<usize>,
    failed: Option<Error>,
}

impl ModuleVisitor for Compare<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.failed.is_some() || !self.wanted.contains(&param.id) {
            return;
        }
        let mine = param.base().inner();
        match self.group.broadcast(mine.clone(), 0) {
            Ok(theirs) => {
                if !same(&mine.into_data(), &theirs.into_data()) {
                    self.different.get_or_insert(self.paths.len());
                }
                self.paths.push(self.path.join("."));
            }
            Err(error) => self.failed = Some(error),
        }
    }
}

fn same(a: &TensorData, b: &TensorData) -> bool {
    a.as_bytes() == b.as_bytes()
}
