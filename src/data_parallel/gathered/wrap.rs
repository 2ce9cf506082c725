//! Leaves each rank its rows of the parameters of a module.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param, ParamId, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Device, Tensor};

use super::adapters::{Adapters, take_adapters};
use super::assemble::shards_of;
use super::gatherer::{Gathered, Gatherer};
use super::kept::check_kept;
use super::row_shard::{GathererHandle, RowShard};
use super::stand_in::stand_in;
use crate::Error;
use crate::comm::Communicator;
use crate::data_parallel::config::DataParallelConfig;
use crate::data_parallel::hook::HookGroup;
use crate::data_parallel::reducer::Reducer;
use crate::data_parallel::same_settings::agree_on_settings;
use crate::data_parallel::structure::{Structure, broadcast_some};
use crate::params::{FoundParams, LazyParam, LeafKind, ShardedIds, leaf, one_device, own_buffers, share_ids};
use crate::sharding::{Member, Pack, RankedParam, Rows, ShardComms, groups};
use crate::tensor::PlainTensor;

/// Gives every rank its rows of rank 0's parameters, and all of rank 0's buffers. No rank but the first makes a lazy
/// parameter, and none holds more than one of them whole at a time. Collective.
///
/// # Errors
/// [`Error::ModelMismatch`] if the ranks' modules differ in structure; [`Error::InvalidArgument`] if parameters are on
/// several devices, settings do not go together, or burn would keep more than `keep` says; those of [`Communicator`].
pub(in crate::data_parallel) fn shard_parameters<M: Module>(
    module: M,
    group: &Communicator,
    config: DataParallelConfig,
    hooks: HookGroup,
) -> Result<(M, Arc<Reducer>, Arc<Gatherer>), Error> {
    config.check()?;
    agree_on_settings(&config, group)?;
    let (keep, different) = (config.keep, config.allow_unused_parameters);
    let device = one_device(&module, "data_parallel")?.unwrap_or_else(Device::flex);
    check_kept(&module, keep, group)?;
    Structure::unmade(&module).agree(group)?;
    let (module, _) = share_ids(module, group)?;
    let module = own_buffers(module);
    let reducer = Arc::new(Reducer::new(Structure::unmade(&module), device, group, config)?);
    let Some(comms) = reducer.shards().cloned() else {
        return Err(Error::invalid("data_parallel", "a single replica has nobody to divide parameters with"));
    };
    let (module, adapters) = take_adapters(module);
    let found = DividedParams::of(&module, comms.ranks(), &adapters);
    let groups = groups(&found.members);
    let wants = match different {
        true => Some(comms.parameters().split_named("said", 0, comms.rank() as i64)?),
        false => None,
    };
    let bytes = found.bytes();
    let gatherer = Arc::new(Gatherer::new(comms.clone(), wants, keep, found.params, groups, &bytes));
    let link = GathererHandle { gatherer: gatherer.clone(), reducer: Arc::downgrade(&reducer), hooks };
    let mut outcome = Ok(());
    let sharder = Sharder { comms: &comms, group, link, adapters, made: HashMap::new(), outcome: &mut outcome };
    let module = module.apply_reparameterization(sharder);
    outcome?;
    let sharded = ShardedIds::of(&module);
    let module = broadcast_some(module, group, &|id, _| !sharded.contains(id))?;
    gatherer.set_stand_ins(sharded.stand_ins);
    gatherer.set_shards(shards_of(&FoundParams::of(&module), &gatherer));
    Ok((module, reducer, gatherer))
}

/// The parameters that have rows to be divided, in the order of the module.
struct DividedParams<'a> {
    ranks: usize,
    adapters: &'a Adapters,
    real: HashSet<ParamId>,
    path: Vec<String>,
    seen: HashSet<ParamId>,
    params: Vec<Gathered>,
    members: Vec<Member>,
}

impl<'a> DividedParams<'a> {
    fn of<M: Module>(module: &M, ranks: usize, adapters: &'a Adapters) -> Self {
        let real = real_params(module);
        let (path, seen) = (Vec::new(), HashSet::new());
        let mut found = Self { ranks, adapters, real, path, seen, params: Vec::new(), members: Vec::new() };
        module.visit(&mut found);
        found
    }

    /// Those of each when it is gathered, with zeros behind its rows.
    fn bytes(&self) -> Vec<usize> {
        let padded = |(param, member): (&Gathered, &Member)| {
            param.rows.padded_dims().iter().product::<usize>() * member.dtype.size()
        };
        self.params.iter().zip(&self.members).map(padded).collect()
    }
}

impl ModuleVisitor for DividedParams<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let (dtype, trained) = match param.is_initialized() {
            true => (param.base().dtype(), param.is_require_grad()),
            false => {
                let lazy = LazyParam::of(param);
                (lazy.placeholder.base().dtype(), lazy.trained)
            }
        };
        let Some(rows) = Rows::new(&param.lazy_shape(), self.ranks) else { return };
        let quantized = matches!(dtype, DType::QFloat(_));
        if quantized || D > 8 || !self.real.contains(&param.id) || !self.seen.insert(param.id) {
            return;
        }
        let path: Arc<str> = self.path.join(".").into();
        let bytes = rows.dims().iter().product::<usize>() * dtype.size();
        self.members.push(Member { path: path.clone(), bytes, dtype, trained });
        let scale = self.adapters.get(&param.id).map(|adapter| adapter.scale);
        self.params.push(Gathered::new(param.id, path, rows, scale));
    }
}

/// The float parameters of a module that are none of its running statistics. These look like frozen parameters, but
/// burn keeps no reparameterization on them.
fn real_params<M: Module>(module: &M) -> HashSet<ParamId> {
    struct Mark;
    impl Reparameterizer for Mark {
        type Reparam = Marked;

        fn reparameterize<const D: usize>(
            &mut self,
            _: &str,
            param: Param<Tensor<D>>,
        ) -> (Param<Tensor<D>>, Option<Marked>) {
            (param, Some(Marked {}))
        }
    }
    #[derive(Default)]
    struct FindMarked {
        last: Option<ParamId>,
        found: HashSet<ParamId>,
    }
    impl ModuleVisitor for FindMarked {
        fn enter_module(&mut self, name: &str, container: &str) {
            if container == "Reparameterization" && name == Marked::NAME {
                self.found.extend(self.last.take());
            }
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.last = Some(param.id);
        }
    }
    let mut find = FindMarked::default();
    module.clone().apply_reparameterization(Mark).visit(&mut find);
    find.found
}

/// Says that something is a parameter.
#[derive(Module, Debug)]
struct Marked {}

impl Reparameterization for Marked {
    const NAME: &'static str = "parameter";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

/// Puts rows in the place of parameters.
struct Sharder<'a> {
    comms: &'a ShardComms,
    group: &'a Communicator,
    link: GathererHandle,
    adapters: Adapters,
    /// The rows that were made already, so that a parameter held in two places stays one.
    made: HashMap<ParamId, RankedParam>,
    outcome: &'a mut Result<(), Error>,
}

impl Sharder<'_> {
    /// This rank's rows of rank 0's value, which that alone brings.
    fn rows(
        &self,
        rows: &Rows,
        whole: Option<PlainTensor>,
        dtype: DType,
        device: &Device,
    ) -> Result<PlainTensor, Error> {
        let pack = Pack::new(vec![rows.clone()]);
        let parameters = self.comms.parameters();
        // The ranks that divide rows with rank 0.
        let first = self.group.rank() < self.comms.ranks();
        let mut mine = match first {
            true => pack.scatter_from(0, whole.into_iter().collect(), (dtype, device), parameters)?.remove(0),
            false => PlainTensor::zeros(rows.shard_dims(), dtype, device),
        };
        if let Some(copies) = self.comms.copies() {
            mine = copies.broadcast(mine, 0)?;
        }
        // Of its own: a part of a larger buffer would keep that.
        mine.packed()
    }

    fn shard<const D: usize>(
        &mut self,
        rows: &Rows,
        param: Param<Tensor<D>>,
    ) -> Result<(Param<Tensor<D>>, RankedParam), Error> {
        let wrong = || Error::invalid("data_parallel", format!("a parameter of rank {D} cannot be divided by rows"));
        let id = param.id;
        let dims = <[usize; D]>::try_from(rows.dims()).map_err(|_| wrong())?;
        let whole =
            (self.group.rank() == 0 && !self.made.contains_key(&id)).then(|| PlainTensor::from(param.base().inner()));
        if let Some(whole) = whole.as_ref().filter(|whole| whole.shape().as_slice() != rows.dims()) {
            let (said, made) = (rows.dims(), whole.shape().to_vec());
            let problem = format!(
                "a lazy parameter says that its dims will be {said:?}, and was made with {made:?}: make it before the model is \
                 wrapped"
            );
            let error = Error::invalid("data_parallel", problem);
            self.group.fail(error.clone());
            return Err(error);
        }
        let (one, kind, mapper) = match param.is_initialized() {
            true => {
                let (_, value, mapper) = param.consume();
                let kind = LeafKind::of(&value);
                (value.inner().slice(vec![0..0; D].as_slice()), kind, mapper)
            }
            false => {
                let LazyParam { placeholder, device, trained } = LazyParam::of(&param);
                let (_, one, mapper) = placeholder.consume();
                (one.inner(), LeafKind::on(&device, trained), mapper)
            }
        };
        let shard = match self.made.get(&id) {
            Some(made) => made.clone(),
            None => {
                let mine = self.rows(rows, whole, one.dtype(), &one.device())?;
                let shard = Param::initialized(id, leaf(mine.float::<D>()?, kind));
                let shard = RankedParam::new(shard.set_require_grad(kind.trained)).ok_or_else(wrong)?;
                self.made.insert(id, shard.clone());
                shard
            }
        };
        Ok((stand_in(dims, &one, kind, mapper), shard))
    }
}

impl Reparameterizer for Sharder<'_> {
    type Reparam = RowShard;

    fn reparameterize<const D: usize>(
        &mut self,
        _: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<RowShard>) {
        let id = param.id;
        let gatherer = self.link.gatherer.clone();
        let Some(rows) = gatherer.rows(id).filter(|_| self.outcome.is_ok()) else { return (param, None) };
        match self.shard(rows, param.clone()) {
            Ok((base, shard)) => {
                let adapter = self.adapters.get(&id).cloned();
                (base, Some(RowShard { shard, adapter, link: self.link.clone() }))
            }
            Err(error) => {
                *self.outcome = Err(error);
                (param, None)
            }
        }
    }
}
