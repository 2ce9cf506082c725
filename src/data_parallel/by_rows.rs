//! Captured steps of replicas that divide the parameters by rows.
//!
//! The collectives over the replicas are in the graph: each micro-batch gathers parameters and leaves this rank its
//! rows of the sum of the gradients over all replicas, which are added up here. What is left are a few numbers.
//!
//! 1. Before each micro-batch the replicas tell each other how many rows theirs has, if they have one, and whether more
//!    come; and make sure that they have updated the model alike. The rows of the first are the unit in which all
//!    gradients of the step are summed.
//! 2. They make sure that all exchange the same in it. A replica that has none, or uses other parameters than others,
//!    takes part in what it does not exchange itself with nothing of its own ([`RowShards::agree`]).
//! 3. After the last one losses and weights are summed: the gradients are divided by the weight. Their norm goes with
//!    that, if it is likely to be asked for.

use std::collections::HashMap;

use burn::module::ParamId;
use burn::tensor::Tensor;

use super::config::DataParallelConfig;
use super::noise_meter;
use super::norm_carrier::NormCarrier;
use super::reduction_state::accumulate;
use super::replica::{Averaging, Replica};
use super::same_settings::agree_on_settings;
use crate::Error;
use crate::comm::{Communicator, ReduceOp, StepPart};
use crate::distribution::RowShards;
use crate::graph::{Compared, GradientSink, StepEngine, Updates, found_gradients};
use crate::params::FoundParams;
use crate::sharding::Sharding;
use crate::step::{LossValue, NoNoise, NoiseState, Step, StepFn};
use crate::tensor::{PlainTensor, TensorTree, rows_of_step};

impl<E: StepEngine> Replica<E> {
    /// A replica of a model that is split or cut. If the replicas divide its parameters, `divide` leaves the engine its
    /// rows.
    ///
    /// # Errors
    /// Those of [`Self::new`] and [`Self::by_rows`].
    pub(crate) fn of_parts(
        engine: E,
        group: &Communicator,
        config: DataParallelConfig,
        divide: impl FnOnce(E, RowShards) -> Result<E, Error>,
    ) -> Result<Self, Error> {
        match group.size() > 1 && config.sharding == Sharding::Parameters {
            true => Self::by_rows(engine, group, &config, divide),
            false => Self::new(engine, group, config),
        }
    }

    /// A replica of a model that runs captured steps, of which replicas divide the parameters. `divide` leaves the
    /// engine its rows.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the config asks for what goes with whole gradients or parameters only, or is not
    /// that of all ranks; [`Error::ModelMismatch`] if the ranks bring different models; those of [`Communicator`].
    fn by_rows(
        engine: E,
        group: &Communicator,
        config: &DataParallelConfig,
        divide: impl FnOnce(E, RowShards) -> Result<E, Error>,
    ) -> Result<Self, Error> {
        config.check()?;
        agree_on_settings(config, group)?;
        let engine = engine.share_ids(group)?;
        let DataParallelConfig { sharding_ranks, keep, reduce_dtype, noise_scale_every, .. } = *config;
        let shards =
            RowShards::new(engine.local(), &|id| engine.later_dims(id), group, sharding_ranks, keep, reduce_dtype)?;
        let engine = divide(engine, shards.clone())?;
        Ok(Self::with(engine, Averaging::ByRows { shards, noise_scale_every }))
    }

    /// Runs forward and backward on every micro-batch and averages over all of them and over the group.
    pub(super) fn run_by_rows<I: TensorTree + Clone>(
        &mut self,
        shards: &RowShards,
        micro_batches: impl IntoIterator<Item = I>,
        mut step: StepFn<'_, E::Model, I>,
    ) -> Result<Step, Error> {
        let mut micro_batches = micro_batches.into_iter().peekable();
        if !self.engine.is_prepared() {
            let Some(first) = micro_batches.peek() else {
                let problem = "the first step cuts the model into stages, and shows which of them share parameters: every replica \
                               must bring a micro-batch to it";
                return Err(Error::Pipeline { problem: problem.into() });
            };
            if !self.engine.is_settled() {
                self.engine.settle(first.clone(), step.again(), shards.replicas())?;
            }
        }
        let before = self.counters();
        let mut params = self.engine.find_params()?;
        let turn = match self.averaging {
            Averaging::ByRows { noise_scale_every, .. } => noise_meter::turn(noise_scale_every, self.steps),
            Averaging::Ready(_) | Averaging::Deferred(..) => Err(NoNoise::Off),
        };
        shards.begin_step(turn.is_ok().then(|| self.engine.gradient_layout().elsewhere));
        let (mut sums, mut unit) = (Sums::new(shards), None);
        let (mut losses, mut outputs, mut runs) = (Vec::new(), Vec::new(), Vec::new());
        let ran = (|| {
            loop {
                let inputs = micro_batches.next();
                let updates = self.engine.checked_optimizers().updates();
                let head = Head::of(inputs.as_ref(), micro_batches.peek().is_some())?;
                let head = head.meet(updates, shards.replicas(), StepPart::Step.of(self.steps.saturating_add(1)))?;
                if !head.any() {
                    return Ok(());
                }
                let unit = *unit.get_or_insert(head.rows());
                match inputs {
                    Some(inputs) => {
                        let gave = self.engine.run(&mut params, inputs, step.again(), Some(unit), &mut sums)?;
                        losses.extend(gave.loss);
                        outputs.extend(gave.outputs);
                        runs.extend(gave.run);
                    }
                    None => self.take_part(shards, &params, &mut sums)?,
                }
                if !head.more() {
                    return Ok(());
                }
            }
        })();
        // What it kept whole is of no step that follows, however it ended.
        shards.end_step();
        ran?;
        let shared = turn.is_ok() && self.engine.shares_between_stages();
        let noise = shards.take_noise().map(|noise| (noise, f64::from(u8::from(shared))));
        let carrier = NormCarrier::of(&self.engine, Some(shards.comms()));
        let sizes = carrier.as_ref().map_or(Vec::new(), |carrier| {
            // In an order that is the same in every run.
            let mut gradients: Vec<(&ParamId, &PlainTensor)> = sums.gradients.iter().collect();
            gradients.sort_by_cached_key(|(id, _)| shards.in_rows(**id).map(|rows| rows.number));
            let measured = gradients.into_iter().map(|(id, sum)| (sum, !carrier.elsewhere.contains(id)));
            carrier.numbers(&measured.collect::<Vec<_>>())
        });
        let Total { loss, weight, noise, sizes } = Total::of(&losses, sums.weight, noise, sizes, shards.replicas())?;
        let noise = noise.unwrap_or_else(|| NoiseState::None(turn.err().unwrap_or(NoNoise::Off)));
        self.steps = self.steps.saturating_add(1);
        let factor = if weight > 0.0 { unit.unwrap_or(1.0) / weight } else { 0.0 };
        let (ids, sums): (Vec<ParamId>, Vec<PlainTensor>) = sums.gradients.into_iter().unzip();
        let gradients: HashMap<ParamId, PlainTensor> =
            ids.into_iter().zip(PlainTensor::scale_all(sums, factor)).collect();
        let norm = carrier.and_then(|carrier| carrier.of_sums(&sizes, factor, gradients.clone()));
        let grads = found_gradients(&params, gradients);
        let counters = self.counters() - before;
        Ok(Step { outputs, counters, runs, norm, ..Step::new(LossValue::known(loss), weight, grads, noise) })
    }

    /// Takes part in the micro-batch of the others.
    fn take_part(&mut self, shards: &RowShards, params: &FoundParams, sums: &mut Sums<'_>) -> Result<(), Error> {
        let mut lent = HashMap::new();
        for (id, sum) in shards.take_part(self.engine.local(), params)? {
            let sum = accumulate(lent.remove(&id), sum);
            lent.insert(id, sum);
        }
        self.engine.complete(&mut lent)?;
        lent.into_iter().for_each(|(id, sum)| sums.add(id, sum));
        Ok(())
    }
}

/// What all replicas together know of a step.
struct Total {
    /// The mean loss over everything that made it up, and its weight.
    loss: f64,
    weight: f64,
    /// What the gradients say of their noise, if they were measured.
    noise: Option<NoiseState>,
    /// The sums of the numbers of their sizes.
    sizes: Vec<f64>,
}

impl Total {
    fn of(
        losses: &[(Tensor<1>, f64)],
        weight: f64,
        noise: Option<([f64; noise_meter::NUMBERS], f64)>,
        sizes: Vec<f64>,
        control: &Communicator,
    ) -> Result<Self, Error> {
        let sum: f64 = losses.iter().map(|(loss, by)| loss.clone().into_scalar::<f64>() * by).sum();
        let mut own = vec![sum, weight];
        if let Some((noise, shared)) = noise {
            own.push(shared);
            own.extend(noise);
        }
        let numbers = own.len();
        own.extend(sizes);
        let mut sums = control.all_reduce(own, ReduceOp::Sum)?;
        let sizes = sums.split_off(numbers);
        let (loss, weight, noise) = match sums[..] {
            [sum, weight] => (sum, weight, None),
            [sum, weight, 0.0, ref noise @ ..] => (sum, weight, Some(noise_meter::of_sums(noise))),
            [sum, weight, ..] => (sum, weight, Some(NoiseState::None(NoNoise::BetweenStages))),
            _ => return Err(Error::invalid("step", "the losses of the replicas came back incomplete")),
        };
        Ok(Self { loss: loss / weight, weight, noise, sizes })
    }
}

/// What a replica says of its next micro-batch.
struct Head {
    here: bool,
    rows: usize,
    more: bool,
}

impl Head {
    fn of<I: TensorTree + Clone>(inputs: Option<&I>, more: bool) -> Result<Self, Error> {
        let Some(inputs) = inputs else { return Ok(Self { here: false, rows: 0, more }) };
        let (_, rows) = rows_of_step(inputs.clone())?;
        Ok(Self { here: true, rows: rows.unwrap_or(1), more })
    }

    /// Those of all replicas, who have updated the model alike. Calls of this step agree on a number.
    ///
    /// # Errors
    /// [`Error::Optimizer`] if they have not; those of [`Communicator`].
    fn meet(self, updates: &Updates, control: &Communicator, agreed: u64) -> Result<Heads, Error> {
        let digest = updates.digest(Compared::Replicas);
        let mine = vec![u64::from(self.here), self.rows as u64, u64::from(self.more), digest];
        let all = control.all_gather_agreed(mine, agreed)?;
        if all.chunks_exact(4).any(|words| words[3] != digest) {
            updates.explain(Compared::Replicas, control)?;
        }
        let head = |words: &[u64]| Self { here: words[0] == 1, rows: words[1] as usize, more: words[2] == 1 };
        Ok(Heads(all.chunks_exact(4).map(head).collect()))
    }
}

struct Heads(Vec<Head>);

impl Heads {
    /// Whether any replica has a micro-batch.
    fn any(&self) -> bool {
        self.0.iter().any(|head| head.here)
    }

    fn more(&self) -> bool {
        self.0.iter().any(|head| head.more)
    }

    fn rows(&self) -> f64 {
        self.0.iter().map(|head| head.rows).sum::<usize>().max(1) as f64
    }
}

/// Adds up the rows of the gradients of several micro-batches.
struct Sums<'a> {
    shards: &'a RowShards,
    gradients: HashMap<ParamId, PlainTensor>,
    weight: f64,
}

impl<'a> Sums<'a> {
    fn new(shards: &'a RowShards) -> Self {
        Self { shards, gradients: HashMap::new(), weight: 0.0 }
    }

    fn add(&mut self, id: ParamId, gradient: PlainTensor) {
        let sum = accumulate(self.gradients.remove(&id), gradient);
        self.gradients.insert(id, sum);
    }
}

impl GradientSink for Sums<'_> {
    fn expect(&mut self, gradients: &[ParamId]) -> Result<(), Error> {
        if gradients.iter().all(|id| self.shards.divides(*id)) {
            return Ok(());
        }
        let problem = "a parameter is trained that is called `running_mean` or `running_var`, which replicas take for running \
                       statistics and do not divide: call it something else";
        Err(Error::invalid("step", problem))
    }

    fn weight(&mut self, weight: f64, _: f64) -> Result<(), Error> {
        self.weight += weight;
        Ok(())
    }

    fn gradient(&mut self, id: ParamId, gradient: PlainTensor) -> Result<(), Error> {
        self.add(id, gradient);
        Ok(())
    }
}
