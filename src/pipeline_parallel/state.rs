//! The state of a pipeline on one rank: captured steps, the cut, and who holds which parameter.

use std::any::Any;
use std::collections::{BTreeSet, HashMap, HashSet};

use burn::module::{Module, ParamId};

use super::captured_step::CapturedStep;
use super::loaded::LoadedFrom;
use super::schedule::{Schedule, Timetable};
use super::tied::TiedParams;
use super::{PipelineConfig, stage_error};
use crate::Error;
use crate::comm::{Communicator, Counters};
use crate::distribution::{ModelSplit, RowShards};
use crate::graph::{CustomOps, RandomSource, Recent, Signature, StepKey, register_counter_based_rng};
use crate::params::{self, FoundParams, NewDims, Renamed, SliceSource};
use crate::partition::ShardReport;
use crate::pipeline_parallel::cut::{Cut, CutGraph};
use crate::plan::{Plan, PlanRow};

/// The captured steps of a pipeline, and what they are cut by.
pub(super) struct PipelineState {
    pub config: PipelineConfig,
    pub timetable: Timetable,
    pub group: Communicator,
    pub split: Option<ModelSplit>,
    /// Every parameter with the dims that it has on the ranks that hold it.
    rows: Vec<PlanRow>,
    dims: HashMap<ParamId, Vec<usize>>,
    /// The stages that hold each parameter; as long as no step was cut, only its own.
    pub holders: Option<HashMap<ParamId, Vec<usize>>>,
    /// The first cut, to which all others keep.
    pub cut: Option<CutGraph>,
    pub tied_params: TiedParams,
    /// Until the first cut, what the model was loaded from.
    loaded_from: LoadedFrom,
    /// The parameters whose moments were restored before the first cut: on the ranks of their own stages alone.
    pub early_moments: HashSet<ParamId>,
    /// What the last captured step of a model that is split as well was given, for each axis.
    pub shards: Vec<ShardReport>,
    /// How replicas divide what each of them would hold, if they do.
    pub row_shards: Option<RowShards>,
    /// What steps have sent from stage to stage.
    pub sent: Counters,
    pub ops: CustomOps,
    /// What random numbers follow from; its step counts micro-batches.
    pub random: RandomSource,
    pub steps: Recent<StepKey, CapturedStep>,
    pub forwards: Recent<StepKey, Box<dyn Any + Send>>,
}

impl PipelineState {
    /// Also gives the model back, with the ids that its parameters have on the first rank.
    pub(super) fn new<M: Module>(
        model: M,
        split: Option<ModelSplit>,
        group: &Communicator,
        config: PipelineConfig,
    ) -> Result<(Self, M), Error> {
        let table = Plan::new().table(&model, 1)?;
        let rows = table.rows();
        enough_parameters(&config.schedule, group.size(), rows.len())?;
        let timetable = config.schedule.timetable(group.size(), config.micro_batches)?;
        let paths: Vec<&str> = rows.iter().map(|row| row.path.as_str()).collect();
        let homes = config.cut.by_path(&paths, timetable.stages())?;

        let line = |row: &PlanRow| (row.path.clone(), format!("{:?} {:?}", row.dtype, row.dims));
        let mut lines: Vec<(String, String)> = rows.iter().map(line).collect();
        let PipelineConfig { micro_batches, schedule, cut, whole_inputs, seed, graphs, .. } = &config;
        lines.push(("the pipeline's micro-batches".into(), micro_batches.to_string()));
        lines.push(("the pipeline's schedule".into(), format!("{schedule:?}").replace('\n', " ")));
        lines.push(("the pipeline's cut".into(), format!("{cut:?}").replace('\n', " ")));
        lines.push(("the pipeline's whole inputs".into(), format!("{whole_inputs:?}")));
        lines.push(("the pipeline's seed".into(), seed.to_string()));
        lines.push(("the pipeline's graphs".into(), graphs.to_string()));
        params::agree(&lines, group)?;
        let (model, renamed) = params::share_ids(model, group)?;
        let rows = table.renamed(&renamed).rows().to_vec();
        let split = split.map(|split| split.renamed(&renamed));

        let group = group.split_named("pipeline", 0, group.rank() as i64)?;
        let mut ops = CustomOps::new().with_fusion(config.fusion);
        let random = match &split {
            Some(split) => {
                split.register(&mut ops);
                split.random().clone()
            }
            None => {
                let random = RandomSource::new(config.seed);
                register_counter_based_rng(&mut ops, &random);
                random
            }
        };
        let holders = homes.map(|homes| rows.iter().zip(homes).map(|(row, home)| (row.id, vec![home])).collect());
        let state = Self {
            dims: rows.iter().map(|row| (row.id, row.dims.clone())).collect(),
            steps: Recent::new(config.graphs),
            forwards: Recent::new(config.graphs),
            config,
            timetable,
            group,
            split,
            rows,
            holders,
            cut: None,
            tied_params: TiedParams::default(),
            loaded_from: LoadedFrom::default(),
            early_moments: HashSet::new(),
            shards: Vec::new(),
            row_shards: None,
            sent: Counters::default(),
            ops,
            random,
        };
        Ok((state, model))
    }

    /// Goes on with rows of the parameters.
    pub(super) fn divide(&mut self, shards: RowShards) {
        shards.register(&mut self.ops);
        self.tied_params.divide(&|id| shards.shard_dims(id));
        self.row_shards = Some(shards);
        self.steps.clear();
        self.forwards.clear();
    }

    /// Goes on with parameters of other ids.
    pub(super) fn rename(&mut self, renamed: &Renamed) {
        self.rows.iter_mut().for_each(|row| row.id = renamed.id(row.id));
        let dims = std::mem::take(&mut self.dims);
        self.dims = dims.into_iter().map(|(id, dims)| (renamed.id(id), dims)).collect();
        let holders = self.holders.take();
        self.holders =
            holders.map(|holders| holders.into_iter().map(|(id, stages)| (renamed.id(id), stages)).collect());
        self.split = self.split.take().map(|split| split.renamed(renamed));
        self.tied_params.rename(renamed);
        self.early_moments = self.early_moments.drain().map(|id| renamed.id(id)).collect();
        // Captured steps know parameters by their ids.
        self.steps.clear();
        self.forwards.clear();
    }

    /// The float parameters and running statistics with the dims that holders have, the rank that holds each, in the
    /// order of the module. `None` if the model is not cut yet.
    pub(super) fn homes(&self) -> Option<Vec<(PlanRow, usize)>> {
        let holders = self.holders.as_ref()?;
        let rank = |row: &PlanRow| self.timetable.rank_of(holders.get(&row.id)?[0]);
        let floats = self.rows.iter().filter(|row| row.dtype.is_float());
        Some(floats.filter_map(|row| Some((row.clone(), rank(row)?))).collect())
    }

    /// The parameters that this rank holds, if that is known.
    fn kept(&self) -> Option<HashSet<ParamId>> {
        let holders = self.holders.as_ref()?;
        let rank = Some(self.group.rank());
        let held = |id: &ParamId| {
            holders.get(id).is_none_or(|stages| stages.iter().any(|stage| self.timetable.rank_of(*stage) == rank))
        };
        // Few numbers, which all clones of a module share: they stay.
        let running = |row: &&PlanRow| row.path.ends_with("running_mean") || row.path.ends_with("running_var");
        let kept = |row: &&PlanRow| held(&row.id) || running(row) || !row.dtype.is_float();
        Some(self.rows.iter().filter(kept).map(|row| row.id).collect())
    }

    /// The stage and the path of every parameter of the cut, a line each.
    pub(super) fn listed_homes(&self) -> String {
        let stage = |row: &PlanRow| Some(self.holders.as_ref()?.get(&row.id)?[0]);
        let rows = self.rows.iter().filter_map(|row| Some(format!("{} {}\n", stage(row)?, row.path)));
        rows.collect()
    }

    /// Cuts the model by such a list.
    pub(super) fn keep_to(&mut self, homes: &str) {
        let line = |line: &str| line.split_once(' ').and_then(|(stage, path)| Some((path.into(), stage.parse().ok()?)));
        self.config.cut = Cut::Listed(homes.lines().filter_map(line).collect());
    }

    /// Drops what this rank does not hold, if that is known.
    pub(super) fn hold<M: Module>(&self, model: M) -> M {
        let Some(kept) = self.kept() else { return model };
        params::retain(model, &|id| kept.contains(&id))
    }

    /// Gives what this rank holds the values that a source has, of which nothing else is read.
    ///
    /// # Errors
    /// [`Error::Pipeline`] if it is not known who holds what; those of [`params::load`].
    pub(super) fn load<M: Module>(&mut self, local: M, source: &mut dyn SliceSource) -> Result<M, Error> {
        let kept = self.kept().ok_or_else(|| {
            stage_error("who holds what is not known yet: `prepare` the model before it is loaded, or cut it by paths")
        })?;
        let loaded = params::load(local, source, &|id| kept.contains(&id).then(|| self.param_slice(id))?)?;
        self.tied_params.loaded = true;
        if self.cut.is_none() && self.group.size() > 1 {
            self.loaded_from.add(source);
        }
        Ok(loaded)
    }

    /// Has all ranks that hold a parameter hold the same of it. They read it where the rank of its own stage has read
    /// it, and are sent what is not to be had there.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(super) fn share<M: Module>(&mut self, model: M) -> Result<M, Error> {
        let sources = std::mem::take(&mut self.loaded_from);
        if sources.is_empty() || self.tied_params.is_empty() {
            return self.tied_params.share(model, false);
        }
        let elsewhere: HashSet<ParamId> = self.tied_params.of_other_stages().collect();
        let model = sources.read(model, &|id| elsewhere.contains(&id).then(|| self.param_slice(id))?);
        self.tied_params.share(model, true)
    }

    /// What this rank holds of each parameter whose own stage is here, or that has none. Of what several stages hold,
    /// tied parameters and running statistics, the rank of their own stage has the value that counts.
    ///
    /// # Errors
    /// [`Error::Pipeline`] if it is not known who holds what.
    pub(super) fn param_slices(&self) -> Result<HashMap<ParamId, params::ParamSlice>, Error> {
        let homes = self.homes().ok_or_else(unknown_holders)?;
        let homes: HashMap<ParamId, usize> = homes.into_iter().map(|(row, home)| (row.id, home)).collect();
        let here = self.rows.iter().filter(|row| homes.get(&row.id).is_none_or(|home| *home == self.group.rank()));
        Ok(here.filter_map(|row| Some((row.id, self.param_slice(row.id)?))).collect())
    }

    /// What this rank holds of each parameter that it keeps.
    ///
    /// # Errors
    /// [`Error::Pipeline`] if it is not known who holds what.
    pub(super) fn held_slices(&self) -> Result<HashMap<ParamId, params::ParamSlice>, Error> {
        let kept = self.kept().ok_or_else(unknown_holders)?;
        Ok(kept.into_iter().filter_map(|id| Some((id, self.param_slice(id)?))).collect())
    }

    /// Optimizers were given moments of these parameters, on each rank of what it kept.
    pub(super) fn moments_restored(&mut self, params: &HashSet<ParamId>) {
        if self.cut.is_none() {
            self.early_moments.extend(params);
        }
    }

    /// What a rank that holds a parameter holds of it.
    fn param_slice(&self, id: ParamId) -> Option<params::ParamSlice> {
        let part = match &self.split {
            Some(split) => split.held(id)?,
            None => params::ParamSlice::whole(self.dims.get(&id)?.clone()),
        };
        Some(match &self.row_shards {
            Some(shards) => shards.slice(id, part),
            None => part,
        })
    }

    /// The whole model without memory behind what this rank does not hold.
    pub(super) fn meta_module<M: Module>(&self, local: &M) -> M {
        params::meta_module(local, &|id, found| self.whole_dims(id, found))
    }

    /// The signature of the [meta module](Self::meta_module), by what was found in this rank's part, for a training
    /// step or else a forward alone.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it has other parameters than the one that was wrapped, or is to be trained on a
    /// device without autodiff.
    pub(super) fn signature<M: Module>(
        &self,
        local: &M,
        params: &FoundParams,
        trains: bool,
    ) -> Result<Signature, Error> {
        let dims: &NewDims = &|id, found| self.whole_dims(id, found);
        let of = if trains { Signature::of_step } else { Signature::of_forward };
        let (signature, known) = (of(params, dims), |id| self.dims.contains_key(&id));
        if trains {
            signature.can_train()?;
        }
        if !signature.is_known(known) {
            params::check_params_known(local, &known)?;
        }
        Ok(signature)
    }

    /// The dims of a parameter in the whole model, if it has others here.
    fn whole_dims(&self, id: ParamId, found: &[usize]) -> Option<Vec<usize>> {
        let whole = self.split.as_ref().and_then(|split| split.whole_dims(id));
        whole.or_else(|| self.dims.get(&id).filter(|dims| dims.as_slice() != found).cloned())
    }

    /// The dims of a parameter on the ranks that hold it.
    pub(super) fn part_dims(&self, id: ParamId) -> Option<Vec<usize>> {
        self.dims.get(&id).cloned()
    }

    /// Whether several stages share a parameter that some step trains. The same on all ranks.
    pub(super) fn shares_between_stages(&self) -> bool {
        let shared = |id: &ParamId| {
            self.holders.as_ref().and_then(|holders| holders.get(id)).is_some_and(|stages| stages.len() > 1)
        };
        self.steps.values().any(|step| step.trained.iter().any(shared))
    }

    /// The parameters of `trained` that this rank gives a gradient of, in the order of the module.
    pub(super) fn gradients(&self, trained: &HashSet<ParamId>) -> Vec<ParamId> {
        let Some(holders) = &self.holders else { return Vec::new() };
        let rank = Some(self.group.rank());
        let here = |id: &ParamId| {
            holders.get(id).is_some_and(|stages| stages.iter().any(|s| self.timetable.rank_of(*s) == rank))
        };
        let mut seen = BTreeSet::new();
        let rows = self.rows.iter().filter(|row| trained.contains(&row.id) && here(&row.id));
        rows.filter(|row| seen.insert(row.path.clone())).map(|row| row.id).collect()
    }
}

/// Stages for each parameter at most: more of them would be empty than anybody can want, and take long to lay out.
const MOST_STAGES: usize = 16;

fn unknown_holders() -> Error {
    stage_error(
        "who holds what is not known yet: `prepare` the model before it is saved or restored, or cut it by paths",
    )
}

fn enough_parameters(schedule: &Schedule, ranks: usize, params: usize) -> Result<(), Error> {
    let per_rank = schedule.stages_per_rank();
    let stages = match schedule {
        Schedule::Custom(timetable) => timetable.stages(),
        _ => ranks.saturating_mul(per_rank),
    };
    if per_rank > 1 && stages > params.saturating_mul(MOST_STAGES) {
        return Err(stage_error(format!(
            "schedule {schedule} makes {stages} stages over {ranks} ranks, but the model has {params} parameters, for {} stages at \
             most: ask for fewer stages on each rank",
            params.saturating_mul(MOST_STAGES)
        )));
    }
    Ok(())
}
