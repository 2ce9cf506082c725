//! The result of a training step.

use std::fmt;
use std::sync::{Arc, OnceLock};

use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::{AskedNorm, CarriedNorm, GradientNoise, NoNoise, NoiseState, RunReport, StepCounters};
use crate::tensor::PlainTensor;

/// What a training step gives, whatever the model is spread over.
#[derive(Debug)]
#[non_exhaustive]
pub struct Step {
    /// The mean loss over everything that all ranks brought; NaN if no rank brought anything. The same on every rank.
    pub loss: LossValue,
    /// The number of items that the mean is over, on all ranks together: what a [`Loss`](super::Loss) counts for.
    pub weight: f64,
    /// The gradients of that mean loss, for burn's optimizers: of this rank's parts of a model that is split,
    /// bit-identical on all replicas; of this rank's rows, if the replicas are [sharded](crate::sharding), for
    /// [`optimize`](crate::train::ParallelModule::optimize) alone. Empty if the step is [`skipped`](Self::skipped).
    pub grads: GradientsParams,
    /// The further outputs of the closure, for each micro-batch of this replica: whole on every rank of a model that is
    /// split, and on the rank that computes them in a pipeline, where each micro-batch of the pipeline counts.
    pub outputs: Vec<Vec<PlainTensor>>,
    /// What the step cost in communication on this rank.
    pub counters: StepCounters,
    /// What each run of the pipeline took on this rank, one for each batch that went through it; none without a
    /// pipeline.
    pub runs: Vec<RunReport>,
    /// The norm of the gradient as [`clip_grad_norm`](Self::clip_grad_norm) found it, before it clipped; `None` if it
    /// was not asked.
    pub grad_norm: Option<f64>,
    /// Whether the step is not to change the model: [`optimize`](crate::train::ParallelModule::optimize) leaves
    /// parameters and moments as they are.
    pub skipped: bool,
    /// What was not finite, if the step is skipped for that.
    pub not_finite: Option<NotFinite>,
    /// What is known of the noise of its gradient so far.
    pub(crate) noise: NoiseState,
    /// What is known of its norm.
    pub(crate) norm: Option<CarriedNorm>,
    /// How it was asked for, as far as ranks that train one model do that alike.
    pub(crate) asked: Option<AskedNorm>,
}

impl Step {
    /// What a step gives before anything is made of it. Outputs, counters and runs are the caller's to add.
    pub(crate) fn new(loss: LossValue, weight: f64, grads: GradientsParams, noise: NoiseState) -> Self {
        Self {
            loss,
            weight,
            grads,
            outputs: Vec::new(),
            counters: StepCounters::default(),
            runs: Vec::new(),
            grad_norm: None,
            skipped: false,
            not_finite: None,
            noise,
            norm: None,
            asked: None,
        }
    }

    /// The noise of the gradient, in the steps that
    /// [`noise_scale_every`](crate::data_parallel::DataParallelConfig::with_noise_scale_every) has measure it, after
    /// [`clip_grad_norm`](Self::clip_grad_norm): estimates from this step alone; or why there are none. The same on all
    /// ranks.
    ///
    /// Before `clip_grad_norm` it is [`NoNoise::NoNorm`] where the norm is all that is missing: a training that does
    /// not take the norm anyway takes it in these steps alone.
    ///
    /// # Errors
    /// The reason, if nothing was measured.
    pub fn noise(&self) -> Result<GradientNoise, NoNoise> {
        match self.noise {
            NoiseState::Known(noise) => Ok(noise),
            NoiseState::Part(_) => Err(NoNoise::NoNorm),
            NoiseState::None(why) => Err(why),
        }
    }
}

/// A gradient that has an element that is NaN or infinite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotFinite {
    /// The path of the first such parameter.
    pub path: String,
    /// The world rank that brought it.
    pub rank: usize,
}

/// A loss that is read from the device when it is asked for.
///
/// Cheap to clone: keep it, and read it steps later, when the device is done with it.
#[derive(Clone)]
pub struct LossValue {
    /// Tensors of one element, each with the factor with which it counts.
    terms: Vec<(Tensor<1>, f64)>,
    read: Arc<OnceLock<f64>>,
}

impl LossValue {
    /// A loss that is known.
    pub(crate) fn known(loss: f64) -> Self {
        Self { terms: Vec::new(), read: Arc::new(OnceLock::from(loss)) }
    }

    /// The sum of the terms, each with its factor, over a weight.
    pub(crate) fn mean(terms: Vec<(Tensor<1>, f64)>, weight: f64) -> Self {
        if terms.is_empty() {
            return Self::known(f64::NAN);
        }
        // Of no items at all the mean is NaN.
        let terms = terms.into_iter().map(|(term, factor)| (term, factor / weight)).collect();
        Self { terms, read: Arc::default() }
    }

    /// The number. The first call waits until the device has computed it.
    pub fn item(&self) -> f64 {
        let read = |(term, factor): &(Tensor<1>, f64)| match *factor {
            1.0 => term.clone().into_scalar::<f64>(),
            factor => term.clone().into_scalar::<f64>() * factor,
        };
        *self.read.get_or_init(|| self.terms.iter().map(read).sum())
    }
}

impl fmt::Debug for LossValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.read.get() {
            Some(loss) => write!(f, "{loss}"),
            None => f.write_str("not read yet"),
        }
    }
}
