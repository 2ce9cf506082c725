//! What a checkpoint holds.

use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::optim::ModuleOptimizer;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::value;
use crate::train::ParallelModule;

/// What training needs to go on: the model, and what is added. [`Checkpointer::save`](super::Checkpointer::save) reads
/// it, [`Checkpointer::restore`](super::Checkpointer::restore) gives it the values of a checkpoint.
///
/// It borrows all of that; make one for each save. Optimizers, schedulers and values go by names, which are the same on
/// all ranks and in all runs.
///
/// With the model goes the number of the step whose random numbers come next, where its steps are captured
/// ([`Sharded::random_step`](crate::tensor_parallel::Sharded::random_step)): dropout goes on with those on the same
/// mesh, and with [`draw_rows`](ParallelModule::draw_rows) on any. Eager steps draw from burn's own generator, which no
/// checkpoint holds. And the number of the step goes with it, by which
/// [some steps](crate::data_parallel::DataParallelConfig::with_noise_scale_every) measure.
pub struct TrainState<'a, P> {
    pub(super) model: &'a mut P,
    pub(super) optimizers: Vec<(String, &'a mut ModuleOptimizer)>,
    pub(super) schedulers: Vec<(String, &'a mut ModuleLrScheduler)>,
    pub(super) values: Vec<(String, Box<dyn Slot + 'a>)>,
}

impl<'a, P: ParallelModule> TrainState<'a, P> {
    /// The parameters of a model, whatever it is spread over.
    pub fn new(model: &'a mut P) -> Self {
        Self { model, optimizers: Vec::new(), schedulers: Vec::new(), values: Vec::new() }
    }

    /// Adds the moments of an optimizer of this model. They go by the paths of their parameters. When they are
    /// restored, the optimizer must be of the same kind as the one that was saved; its settings are its own. burn does
    /// not tell of which kind an optimizer is: a `name` that does, as `"adamw"`, makes another one an error.
    pub fn with_optimizer(mut self, name: impl Into<String>, optimizer: &'a mut ModuleOptimizer) -> Self {
        self.optimizers.push((name.into(), optimizer));
        self
    }

    /// Adds a learning rate schedule. When it is restored, it must be of the same kind; its settings are its own.
    pub fn with_scheduler(mut self, name: impl Into<String>, scheduler: &'a mut ModuleLrScheduler) -> Self {
        self.schedulers.push((name.into(), scheduler));
        self
    }

    /// Adds a value of your own: the [place in the data](super::DataPosition), a config, counters. That of rank 0 is
    /// saved, and restored on all ranks. It becomes JSON, with floats as they are, NaN and infinities among them, but
    /// for those that are keys of maps; what the type does not read again is an error when it is saved.
    pub fn with_value<T: Serialize + DeserializeOwned>(mut self, name: impl Into<String>, value: &'a mut T) -> Self {
        self.values.push((name.into(), Box::new(ValueSlot { value, read: None })));
        self
    }
}

/// A value whose type is forgotten.
pub(super) trait Slot {
    fn to_json(&self) -> Result<Value, String>;

    /// Reads a value and keeps it aside, in the place of one that is there still; or has none.
    fn read(&mut self, json: Option<Value>) -> Result<(), String>;

    /// Takes the value that was read.
    fn take(&mut self);
}

struct ValueSlot<'a, T> {
    value: &'a mut T,
    read: Option<T>,
}

impl<T: Serialize + DeserializeOwned> Slot for ValueSlot<'_, T> {
    fn to_json(&self) -> Result<Value, String> {
        value::to_json(&*self.value)
    }

    fn read(&mut self, json: Option<Value>) -> Result<(), String> {
        let read = json.map(value::from_json).transpose();
        self.read = read.map_err(|problem| problem.to_string())?;
        Ok(())
    }

    fn take(&mut self) {
        if let Some(value) = self.read.take() {
            *self.value = value;
        }
    }
}
