//! Settings of data parallelism.

use std::sync::Arc;

use burn::config::Config;
use burn::tensor::FloatDType;
use serde::{Deserialize, Serialize};

use super::comm_hook::{AllReduceHook, CastHook, CommHook};
use crate::Error;
use crate::forms::optional_float;
use crate::sharding::{Keep, Sharding};

/// Settings of [`DataParallel::data_parallel`](super::DataParallel::data_parallel).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataParallelConfig {
    /// How many bytes of gradients are reduced together.
    pub bucket_bytes: usize,
    /// The same for the first bucket.
    pub first_bucket_bytes: usize,
    /// The dtype in which gradients are sent; their own if there is none. In a file `"BF16"`, `"F16"`, `"F32"` or
    /// `"F64"`, in capitals or not.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "optional_float")]
    pub reduce_dtype: Option<FloatDType>,
    /// Whether buckets are reduced while backward still runs.
    pub overlap: bool,
    /// After how many steps replicas are compared; 0 for never.
    pub compare_every: u64,
    /// What the replicas divide among themselves.
    pub sharding: Sharding,
    /// Among how many of the replicas they divide it; among all if there is no number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sharding_ranks: Option<usize>,
    /// How long gathered parameters are kept, with [`Sharding::Parameters`].
    pub keep: Keep,
    /// Whether a rank may leave parameters unused that others use, with [`Sharding::Parameters`].
    pub allow_unused_parameters: bool,
    /// After how many steps one measures the noise of its gradient; 0 for never.
    pub noise_scale_every: u64,
    /// A reduction of one's own, which no file knows of.
    #[serde(skip)]
    hook: Option<Arc<dyn CommHook>>,
}

impl Config for DataParallelConfig {}

impl DataParallelConfig {
    /// The default: buckets of 25 MB, the first of 1 MB, gradients reduced in their own dtype while backward runs,
    /// replicas not compared, nothing divided among them.
    pub fn new() -> Self {
        Self {
            bucket_bytes: 25_000_000,
            first_bucket_bytes: 1_000_000,
            reduce_dtype: None,
            overlap: true,
            compare_every: 0,
            sharding: Sharding::None,
            sharding_ranks: None,
            keep: Keep::Pass,
            allow_unused_parameters: false,
            noise_scale_every: 0,
            hook: None,
        }
    }

    /// Sets how many bytes of gradients are reduced together. Larger buckets mean fewer collectives, smaller ones start
    /// earlier. A single larger gradient makes a bucket of its own.
    pub fn with_bucket_bytes(mut self, bytes: usize) -> Self {
        self.bucket_bytes = bytes;
        self.first_bucket_bytes = self.first_bucket_bytes.min(bytes);
        self
    }

    /// Sets the size of the first bucket, the last layers' gradients: small, so that communication starts early.
    pub fn with_first_bucket_bytes(mut self, bytes: usize) -> Self {
        self.first_bucket_bytes = bytes;
        self
    }

    /// Sends gradients in another float dtype, as `FloatDType::BF16`, and casts the sum back. Sums of 16-bit floats are
    /// accumulated in `f32`; each contribution and the result are rounded once. Over NCCL, which cannot do that, they
    /// travel as `f32` all the same, and no bytes are saved.
    pub fn with_reduce_dtype(mut self, dtype: FloatDType) -> Self {
        self.reduce_dtype = Some(dtype);
        self
    }

    /// Sets how a bucket is reduced: a compression of one's own, in place of [`reduce_dtype`](Self::reduce_dtype). See
    /// [`CommHook`].
    pub fn with_comm_hook(mut self, hook: impl CommHook + 'static) -> Self {
        self.hook = Some(Arc::new(hook));
        self
    }

    /// Has all ranks make sure after so many steps that their parameters still are equal to the last bit, and fail with
    /// the first path that is not: replicas drift apart when one loads a record, takes another learning rate, or
    /// changes the model for itself. Reads all parameters, at the speed of memory; on a device they are read back. 0,
    /// the default, for never. Not with [`Sharding::Parameters`], where each rank has rows of its own.
    pub fn with_compare_every(mut self, steps: u64) -> Self {
        self.compare_every = steps;
        self
    }

    /// Sets what the replicas divide among themselves (ZeRO 1, 2 and 3); [`Sharding`] says what each level costs. Steps
    /// are then taken by [`optimize`](crate::train::ParallelModule::optimize) alone: gradients are those of this rank's
    /// rows.
    pub fn with_sharding(mut self, sharding: Sharding) -> Self {
        self.sharding = sharding;
        self
    }

    /// Sets among how many neighbouring replicas rows are divided; they are replicated over the others (PyTorch's
    /// hybrid sharding). It divides the number of replicas.
    pub fn with_sharding_ranks(mut self, ranks: usize) -> Self {
        self.sharding_ranks = Some(ranks);
        self
    }

    /// Sets how long gathered parameters are kept, with [`Sharding::Parameters`]; another than the default is an error
    /// with others, that gather none.
    pub fn with_keep(mut self, keep: Keep) -> Self {
        self.keep = keep;
        self
    }

    /// Lets ranks use different parameters in the same micro-batch with [`Sharding::Parameters`], where the model runs
    /// by its own forward: experts that the data choose, layers that are dropped, a forward that ends early. (PyTorch's
    /// `DistributedDataParallel` calls it `find_unused_parameters`.) The default is `false`: all ranks run the same
    /// layers in the same order, and another order is an error.
    ///
    /// Ranks then say before each gather what they want, in one all-gather of 8 bytes from each, once more when a step
    /// begins, and once when a micro-batch ends. They gather what the first of them wants in the order of the model, in
    /// backward in the reverse; those that do not want it bring their rows. Nothing is gathered ahead. A parameter that
    /// no rank uses is not gathered. Steps average the gradients as always, with zeros from ranks that have not used a
    /// parameter; one that none has used gets none. A forward that is called directly ends with the next
    /// [`backward`](super::Replica::backward), step or `assemble`: until then no rank may wait for the others in
    /// another way. [`forward_with`](crate::train::ParallelModule::forward_with) ends by itself.
    ///
    /// Captured steps allow it as they are, and gather ahead. An error with another sharding, which needs no such
    /// setting.
    pub fn with_allow_unused_parameters(mut self, allow: bool) -> Self {
        self.allow_unused_parameters = allow;
        self
    }

    /// Has every so many steps measure the noise of their gradient ([`Step::noise`](crate::step::Step::noise)): the
    /// square of every micro-batch's gradient is taken while it is in the cache, and three numbers more go with those
    /// that replicas sum up at the end of a step. A parameter that a forward uses several times has its gradient held
    /// once more until the end of the micro-batch. The steps in between measure nothing, and cost nothing. 0, the
    /// default, for never.
    ///
    /// Steps count from the first of the wrapper, or go on from that of the [checkpoint](crate::checkpoint) that was
    /// restored: with 4 the 4th measures, the 8th and so on, the same on all ranks.
    ///
    /// It takes two micro-batches at least, on one replica or on several. What goes through a pipeline at once is one,
    /// but with [`Sharding::Parameters`], where the gradients of each micro-batch of the pipeline leave its stages
    /// apart, and count apart.
    pub fn with_noise_scale_every(mut self, steps: u64) -> Self {
        self.noise_scale_every = steps;
        self
    }

    /// Demands settings that go together.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with the first that do not.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let wrong = |problem: &str| Err(Error::invalid("data_parallel", problem));
        if let Some(dtype) = self.reduce_dtype.filter(|dtype| !CastHook::can_send(*dtype)) {
            let problem = format!("gradients cannot be sent in `reduce_dtype` {dtype:?}: take BF16, F16, F32 or F64");
            return wrong(&problem);
        }
        if let Some((key, _)) = [("bucket_bytes", self.bucket_bytes), ("first_bucket_bytes", self.first_bucket_bytes)]
            .iter()
            .find(|(_, bytes)| *bytes == 0)
        {
            return wrong(&format!("`{key}` is 0: it is 1 at least, with which each gradient is a bucket of its own"));
        }
        if self.compare_every > 0 && self.sharding == Sharding::Parameters {
            return wrong(
                "`compare_every` compares parameters that replicas hold alike, of which with `sharding` \"parameters\" each holds \
                 its rows: leave it out",
            );
        }
        if self.keep != Keep::Pass && self.sharding != Sharding::Parameters {
            let problem = format!(
                "`keep` says how long parameters are kept that are gathered, and with `sharding` \"{}\" none are: set `sharding` to \
                 \"parameters\", or leave `keep` out",
                self.sharding
            );
            return wrong(&problem);
        }
        if self.allow_unused_parameters && self.sharding != Sharding::Parameters {
            let problem = format!(
                "`allow_unused_parameters` is for parameters that are gathered, and with `sharding` \"{}\" none are: any rank may \
                 leave any unused then; leave it out",
                self.sharding
            );
            return wrong(&problem);
        }
        if self.sharding == Sharding::None {
            return match self.sharding_ranks {
                Some(_) => wrong("`sharding_ranks` is set, but `sharding` is \"none\": set what is divided"),
                None => Ok(()),
            };
        }
        match self.hook {
            Some(_) => wrong(
                "a communication hook reduces whole gradients, of which sharded replicas keep their rows only: leave it out \
                 (`with_reduce_dtype` works), or leave `sharding` at \"none\"",
            ),
            None => Ok(()),
        }
    }

    /// Whether a bucket is reduced in a way of one's own.
    pub(super) fn has_hook(&self) -> bool {
        self.hook.is_some()
    }

    /// How a bucket is reduced.
    pub(super) fn hook(&self) -> Arc<dyn CommHook> {
        match (&self.hook, self.reduce_dtype) {
            (Some(hook), _) => hook.clone(),
            (None, Some(dtype)) => Arc::new(CastHook::new(dtype)),
            (None, None) => Arc::new(AllReduceHook),
        }
    }

    /// Sets whether buckets are reduced while backward still runs (default), or all after it.
    pub fn with_overlap(mut self, overlap: bool) -> Self {
        self.overlap = overlap;
        self
    }
}

impl Default for DataParallelConfig {
    fn default() -> Self {
        Self::new()
    }
}
