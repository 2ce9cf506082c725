//! Parameters of which each replica holds rows, in captured steps.
//!
//! The third way in which the parameters of a model are divided, behind splits by a plan and stages: by rows over the
//! replicas, whatever the layer. So nothing of a step follows from it but where parameters are gathered and gradients
//! scattered ([`shard_parameters`]), and it goes with any split: the rows are those of this rank's part.

mod bundle;
mod lending;
mod noise;
mod operations;
mod own_rows;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use burn::module::{Module, ParamId};
use burn::tensor::FloatDType;

use self::bundle::Bundle;
use self::lending::Lending;
use self::noise::RowNoise;
use self::own_rows::{RowParam, TakeRows, Trained};
use super::assemble::assemble;
use super::distribute::{Round, agree_on_layouts, distribute};
use crate::Error;
use crate::comm::{Communicator, GATHERED_PARAMETERS, Pending};
use crate::graph::{StepGraph, graph_error, read_found};
use crate::lock::lock;
use crate::params::{FoundParams, ParamSlice, Renamed, map_params};
use crate::partition::{Gathering, InRows, shard_parameters};
use crate::plan::PlanTable;
use crate::sharding::{Keep, Member, Pack, Rows, ShardComms, ShardParams, groups, owners};
use crate::tensor::{PlainTensor, Pool};

/// The name of the axis of the replicas in tables.
const AXIS: &str = "replicas";

/// How the parameters of this rank's part of a model are divided by rows over its replicas. Cheap to clone; all clones
/// are of one step.
#[derive(Debug, Clone)]
pub(crate) struct RowShards {
    /// What this rank holds of them when they are divided.
    table: Arc<PlanTable>,
    params: Arc<Vec<RowParam>>,
    /// The place of each among these.
    numbers: Arc<HashMap<ParamId, usize>>,
    keep: Keep,
    /// The dtype in which gradients travel, if not their own.
    reduce_dtype: Option<FloatDType>,
    comms: ShardComms,
    /// Joins all replicas; carries what is neither parameters nor gradients.
    replicas: Communicator,
    step: Arc<Mutex<StepState>>,
    /// The memory in which parameters are gathered for a pass: that of the group in use, and of the next. What is kept
    /// for longer goes back to the system, which would have nothing of it between steps else.
    gathered: Option<Arc<Pool>>,
    /// The memory in which this rank's rows of gradients are made. In one with that of the others, which are there at
    /// other times, they would push each other out.
    sums: Arc<Pool>,
    /// For how many nanoseconds this rank had nothing to do but wait for what is exchanged.
    waited: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct StepState {
    /// What this rank's gradients are multiplied by before they are summed.
    factor: f64,
    /// What the gradients are in units of: they are those of the sum over the items, divided by this and by the factor.
    unit: f64,
    /// The micro-batch of a pipeline that a stage runs.
    micro_batch: usize,
    /// Measures the gradients, if that was asked for.
    noise: Option<RowNoise>,
    /// The first parameter of which this rank has brought a gradient that is not finite.
    non_finite: Option<usize>,
    /// Whether a step is under way.
    under_way: bool,
    /// The parameters as they are whole, where they are gathered for the step.
    whole: Option<HashMap<ParamId, PlainTensor>>,
    in_flight: HashMap<(bool, u64), Pending<Vec<PlainTensor>>>,
    /// What only other replicas exchange in this micro-batch.
    lending: Lending,
}

impl RowShards {
    /// Finds out what of `model`, this rank's part of one, is divided over the `replicas`, who all hold the same part:
    /// float parameters, but for running statistics. `later` are the dims of the parts of parameters that it does not
    /// hold, but may once the model is cut. With `ranks` they are divided over so many neighbours. Collective.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`](crate::Error::ModelMismatch) if replicas bring other parameters; those of
    /// [`ShardComms::new`] and of [`Communicator`].
    pub(crate) fn new<M: Module>(
        model: &M,
        later: &dyn Fn(ParamId) -> Option<Vec<usize>>,
        replicas: &Communicator,
        ranks: Option<usize>,
        keep: Keep,
        reduce_dtype: Option<FloatDType>,
    ) -> Result<Self, Error> {
        let control = format!("{GATHERED_PARAMETERS}_control");
        let (group, replicas) = (replicas, replicas.split_named(&control, 0, replicas.rank() as i64)?);
        let comms = ShardComms::new(group, ranks, &replicas, Some(GATHERED_PARAMETERS))?;
        let table = PlanTable::by_rows(model, AXIS, comms.ranks(), &|_| None);
        let all = PlanTable::by_rows(model, AXIS, comms.ranks(), later);
        agree_on_layouts(&all, group)?;
        let mut trained = Trained::default();
        model.visit(&mut trained);
        let (mut params, mut members) = (Vec::new(), Vec::new());
        for row in all.rows().iter().filter(|row| row.is_split()) {
            let Some(rows) = Rows::new(&row.dims, comms.ranks()) else { continue };
            let path: Arc<str> = row.path.as_str().into();
            members.push(Member {
                path: path.clone(),
                bytes: row.dims.iter().product::<usize>() * row.dtype.size(),
                dtype: row.dtype,
                trained: trained.0.contains(&row.id),
            });
            params.push(RowParam { id: row.id, path, dtype: row.dtype.into(), group: 0, rows });
        }
        for (group, places) in groups(&members).into_iter().enumerate() {
            places.into_iter().for_each(|place| params[place].group = group);
        }
        let numbers = params.iter().enumerate().map(|(number, param)| (param.id, number)).collect();
        Ok(Self {
            table: Arc::new(table),
            params: Arc::new(params),
            numbers: Arc::new(numbers),
            keep,
            reduce_dtype,
            comms,
            replicas,
            step: Arc::default(),
            gathered: (keep == Keep::Pass).then(Arc::default),
            sums: Arc::default(),
            waited: Arc::default(),
        })
    }

    /// The same of parameters of other ids.
    pub(crate) fn renamed(&self, renamed: &Renamed) -> Self {
        let params: Vec<RowParam> =
            self.params.iter().map(|param| RowParam { id: renamed.id(param.id), ..param.clone() }).collect();
        let numbers = params.iter().enumerate().map(|(number, param)| (param.id, number)).collect();
        let table = Arc::new(self.table.renamed(renamed));
        Self { table, params: Arc::new(params), numbers: Arc::new(numbers), ..self.clone() }
    }

    /// Who divides what with whom.
    pub(crate) fn comms(&self) -> &ShardComms {
        &self.comms
    }

    /// Joins all replicas; carries what is neither parameters nor gradients.
    pub(crate) fn replicas(&self) -> &Communicator {
        &self.replicas
    }

    /// Whether a parameter is one of those that are divided.
    pub(crate) fn divides(&self, id: ParamId) -> bool {
        self.numbers.contains_key(&id)
    }

    /// The dims of the rows that a rank holds of a parameter.
    pub(crate) fn shard_dims(&self, id: ParamId) -> Option<Vec<usize>> {
        Some(self.params[*self.numbers.get(&id)?].rows.shard_dims())
    }

    /// Leaves this rank its rows of the parameters of the first replica's model; everything else takes that one's
    /// values. What is lazy there stays lazy. Collective.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(crate) fn distribute<M: Module>(&self, model: M) -> Result<M, Error> {
        let control = self.comms.control();
        let split = distribute(model, &self.table, (0, Round::Split), control)?;
        let split = distribute(split, &self.table, (0, Round::Copy), control)?;
        let Some(copies) = self.comms.copies() else { return Ok(split) };
        let table = PlanTable::by_rows(&split, AXIS, 1, &|_| None).whole();
        distribute(split, &table, (0, Round::Copy), copies)
    }

    /// Puts the rows of all replicas together, on each of them. Collective.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(crate) fn assemble<M: Module>(&self, local: M) -> Result<M, Error> {
        assemble(local, &self.table, 0, self.comms.control())
    }

    /// This rank's rows of what it would otherwise read from a store.
    pub(crate) fn slice(&self, id: ParamId, mut part: ParamSlice) -> ParamSlice {
        let Some(param) = self.numbers.get(&id).map(|number| &self.params[*number]) else { return part };
        let (rows, real) = (param.rows.rows(self.comms.rank()), part.ranges[0].clone());
        // Padding of the part is behind its last row, as that of the rows is.
        part.ranges[0] = (real.start + rows.start).min(real.end)..(real.start + rows.end).min(real.end);
        part.local_dims = param.rows.shard_dims();
        part
    }

    /// Takes this rank's rows of the parameters that are trained out of a module, as an optimizer is given them: what
    /// the module held as well could not be updated in place, so it has stand-ins.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a parameter of a rank that burn's optimizers do not know.
    pub(crate) fn take_rows<M: Module>(&self, module: M) -> Result<(M, ShardParams), Error> {
        let dims = self.params.iter().map(|param| param.rows.dims());
        let owners = owners(dims, self.comms.ranks());
        let taken = Ok(ShardParams::default());
        let mut take = TakeRows { params: &self.params, numbers: &self.numbers, owners, taken };
        let module = map_params(module, &mut take);
        Ok((module, take.taken?))
    }

    /// Has a step run on what this rank holds.
    pub(crate) fn apply(&self, graph: &mut StepGraph) {
        shard_parameters(graph, &|id| self.in_rows(id), self.gathering());
    }

    pub(crate) fn in_rows(&self, id: ParamId) -> Option<InRows> {
        let number = *self.numbers.get(&id)?;
        let param = &self.params[number];
        Some(InRows { number, group: param.group, dims: param.rows.shard_dims() })
    }

    pub(crate) fn gathering(&self) -> Gathering {
        Gathering { gathers: self.keep != Keep::Step, keeps: self.keep == Keep::MicroBatch }
    }

    /// How long this rank had nothing to do but wait for what is exchanged.
    pub(crate) fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited.load(Relaxed))
    }

    fn waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let done = wait();
        self.waited.fetch_add(began.elapsed().as_nanos() as u64, Relaxed);
        done
    }

    /// Begins a step. With `elsewhere` it measures the gradients of all parameters but those that another rank counts.
    pub(crate) fn begin_step(&self, elsewhere: Option<HashSet<ParamId>>) {
        let numbers = |ids: HashSet<ParamId>| ids.iter().filter_map(|id| self.numbers.get(id).copied()).collect();
        let noise = elsewhere.map(|ids| RowNoise::new(numbers(ids)));
        *self.lock() = StepState { under_way: true, noise, ..StepState::default() };
    }

    /// Has the gradients that come now be those of this micro-batch of a pipeline.
    pub(crate) fn run_micro_batch(&self, micro_batch: usize) {
        self.lock().micro_batch = micro_batch;
    }

    /// Ends a micro-batch of so many items; those of a pipeline, with the items of each.
    pub(crate) fn end_micro_batch(&self, items: &[f64]) {
        let mut step = self.lock();
        let unit = step.unit * step.factor;
        step.noise.iter_mut().for_each(|noise| noise.end(items, unit));
    }

    /// What this rank has measured in the step: the numbers that replicas sum up.
    pub(crate) fn take_noise(&self) -> Option<[f64; 3]> {
        let noise = self.lock().noise.take();
        noise.map(RowNoise::numbers)
    }

    /// Begins a micro-batch whose gradients are multiplied by `factor` before they are summed over the replicas. `unit`
    /// is what the replicas have agreed on that the sums are in.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if they have not: the model is not trained as one of its replicas.
    pub(crate) fn begin_micro_batch(&self, unit: Option<f64>, factor: f64) -> Result<(), Error> {
        let Some(unit) = unit else {
            let problem = "its replicas divide the parameters among themselves, so it trains as one of them only: keep the wrapper \
                           of `data_parallel`, or `assemble` the model";
            return Err(Error::invalid("step", problem));
        };
        let mut step = self.lock();
        (step.factor, step.unit, step.micro_batch) = (factor, unit, 0);
        // What a step that failed has left.
        step.in_flight.clear();
        step.lending = Lending::default();
        step.noise.iter_mut().for_each(RowNoise::forget);
        Ok(())
    }

    /// The path of the first parameter of which this rank has brought a gradient to the last step that was not finite.
    /// Of gradients that are not in host memory none is known.
    pub(crate) fn non_finite(&self) -> Option<Arc<str>> {
        let number = self.lock().non_finite?;
        self.params.get(number).map(|param| param.path.clone())
    }

    /// Ends a step: lets go of what was gathered for it.
    pub(crate) fn end_step(&self) {
        let mut step = self.lock();
        (step.under_way, step.whole) = (false, None);
    }

    /// What captured steps take in the place of this rank's rows, if they do: all parameters whole, which are gathered
    /// by the first call in a step, or now for a forward alone. Collective then. Of what was `found` in this rank's
    /// part, if it was.
    ///
    /// # Errors
    /// Those of [`Communicator`] and of reading parameters.
    pub(crate) fn whole<M: Module>(
        &self,
        local: &M,
        found: Option<&FoundParams>,
    ) -> Result<Option<HashMap<ParamId, PlainTensor>>, Error> {
        if self.keep != Keep::Step {
            return Ok(None);
        }
        let kept = self.lock().whole.clone();
        let whole = kept.map_or_else(|| self.gather_all(local, found), Ok)?;
        let mut step = self.lock();
        if step.under_way {
            step.whole = Some(whole.clone());
        }
        drop(step);
        Ok(Some(whole))
    }

    /// All parameters that this rank holds rows of, whole.
    fn gather_all<M: Module>(
        &self,
        local: &M,
        found: Option<&FoundParams>,
    ) -> Result<HashMap<ParamId, PlainTensor>, Error> {
        let params = match found {
            Some(found) => found,
            None => &FoundParams::of(local),
        };
        let mut values = read_found(params, local, &self.numbers.keys().copied().collect())?;
        // What another stage holds has no elements here.
        values.retain(|_, value| value.elements() > 0);
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (number, param) in self.params.iter().enumerate().filter(|(_, param)| values.contains_key(&param.id)) {
            groups.entry(param.group).or_default().push(number);
        }
        let mut whole = HashMap::new();
        for numbers in groups.into_values() {
            let ids: Vec<ParamId> = numbers.iter().map(|number| self.params[*number].id).collect();
            let shards = ids.iter().filter_map(|id| values.remove(id)).collect();
            let bundle = self.bundle(&numbers)?;
            let gathered = self.waiting(|| bundle.gather(shards, self.comms.parameters()))?;
            whole.extend(ids.into_iter().zip(gathered));
        }
        Ok(whole)
    }

    fn bundle(&self, numbers: &[usize]) -> Result<Bundle, Error> {
        let rows = |number: &usize| self.params.get(*number).map(|param| param.rows.clone());
        let rows: Option<Vec<Rows>> = numbers.iter().map(rows).collect();
        let unknown = || graph_error("replicas exchange a parameter that this one has not");
        // The highest bits are left to say where buffers are, and that a number is a part of a step.
        let number = numbers.iter().fold(HASH, |hash, number| hashed(hash, *number as u64 + 1)) >> 2;
        let (pack, gathered, sums) = (Pack::new(rows.ok_or_else(unknown)?), self.gathered.clone(), self.sums.clone());
        Ok(Bundle { pack, number, reduce_dtype: self.reduce_dtype, gathered, sums })
    }

    fn lock(&self) -> MutexGuard<'_, StepState> {
        lock(&self.step)
    }
}

/// What a hash begins with (FNV-1a).
const HASH: u64 = 0xcbf2_9ce4_8422_2325;

/// The hash of one word more.
fn hashed(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(0x100_0000_01b3)
}
