//! The noise of the gradient of a step.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What one step tells of its gradient: unbiased estimates, without any average, of the true gradient's size and of the
/// noise (McCandlish et al. 2018, [arXiv:1812.06162](https://arxiv.org/abs/1812.06162), appendix A).
///
/// With micro-batches of `w_i` items, whose mean gradients are `g_i`, and their average `g` over `w` items: `tr(S) =
/// (sum_i w_i |g_i|^2 - w |g|^2) / (n - 1)` and `|G|^2 = |g|^2 - tr(S) / w`. With two sizes of batches that is the
/// paper's; with unequal ones each counts by its items. Single steps scatter widely:
/// [`NoiseScale`](crate::batch::NoiseScale) averages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradientNoise {
    /// The estimate of `|G|^2`; below 0 where noise hides the gradient.
    pub squared_norm: f64,
    /// The estimate of `tr(S)`, the variance of the gradient of one item of the loss.
    pub trace: f64,
    /// How many gradients it is from: micro-batches over all replicas.
    pub micro_batches: u64,
    /// The items of the step.
    pub items: f64,
}

/// Why a step tells nothing of the noise of its gradient. The same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum NoNoise {
    /// It was not asked for.
    Off,
    /// It is the turn of other steps.
    Interval,
    /// The wrapper has no replicas.
    NoReplicas,
    /// The norm of the gradient was not asked for.
    NoNorm,
    /// The norm is not the L2 norm.
    OtherNorm,
    /// There is nothing to compare.
    OneMicroBatch,
    /// Several stages share a parameter, and each has the replicas sum up its part of the gradient by itself.
    BetweenStages,
    /// Batch norm takes its statistics over the rows of all ranks, so that no gradient is of the rows of one alone.
    BatchNorm,
    /// Gradients came in parts that cannot be told apart from those of other micro-batches.
    InParts,
    /// The gradient is not finite, or its square is too large.
    NotFinite,
    /// The averages do not tell the gradient from its noise yet.
    Drowned,
}

impl fmt::Display for NoNoise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "it was not measured: set `noise_scale_every` in `DataParallelConfig`",
            Self::Interval => "this step was not to measure it: one of every `noise_scale_every` steps does",
            Self::NoReplicas => {
                "the model was wrapped without replicas: wrap it with `data_parallel`, over a group of one if need be"
            }
            Self::NoNorm => {
                "the norm was not measured: call `clip_grad_norm`, with `Clip::never()` to leave the gradient as it is"
            }
            Self::OtherNorm => "it takes the L2 norm, and the gradient was measured by another",
            Self::OneMicroBatch => {
                "one micro-batch on one replica has nothing to be compared with: take two smaller micro-batches, or two replicas; \
                 the micro-batches of a pipeline go through it at once and count as one, so with `pp` take two replicas (`dp`)"
            }
            Self::BetweenStages => {
                "stages share a parameter, and with `sharding` \"parameters\" nobody sees the whole of its gradient: set `sharding` to \
                 \"gradients\", or cut the model so that one stage holds it"
            }
            Self::BatchNorm => {
                "with synchronised batch norm the gradient of a micro-batch depends on the rows of all others, and tells nothing of noise"
            }
            Self::InParts => "a parameter got its gradient in several parts that were not announced",
            Self::NotFinite => "the gradient is not finite",
            Self::Drowned => "the averages do not tell the gradient from its noise yet: it takes more steps",
        })
    }
}

/// What a step knows of the noise: first what micro-batches have brought, then, with the norm of their average, all.
#[derive(Debug, Clone, Copy)]
pub(crate) enum NoiseState {
    None(NoNoise),
    Part(NoisePart),
    Known(GradientNoise),
}

/// What the micro-batches of all replicas have brought.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NoisePart {
    /// The sum of `w_i |g_i|^2`, of the parameters that this rank counts.
    pub squares: f64,
    pub micro_batches: u64,
}

impl NoiseState {
    /// With the squares over all ranks that share the model, and the squared norm of the average over so many items.
    pub fn complete(micro_batches: u64, squares: f64, whole: f64, items: f64) -> Self {
        if micro_batches < 2 {
            return Self::None(NoNoise::OneMicroBatch);
        }
        let trace = (squares - items * whole) / (micro_batches - 1) as f64;
        let squared_norm = whole - trace / items;
        match trace.is_finite() && squared_norm.is_finite() {
            true => Self::Known(GradientNoise { squared_norm, trace, micro_batches, items }),
            false => Self::None(NoNoise::NotFinite),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_equal_sizes_give_the_estimators_of_the_paper() {
        // Gradients (3, 0) and (1, 2) of 4 items each; their average is (2, 1).
        let NoiseState::Known(noise) = NoiseState::complete(2, 4.0 * (9.0 + 5.0), 5.0, 8.0) else { panic!() };
        let (small, big) = (7.0, 5.0); // mean |g_i|^2 and |g|^2
        assert_eq!(noise.squared_norm, (8.0 * big - 4.0 * small) / (8.0 - 4.0));
        assert_eq!(noise.trace, (small - big) / (1.0 / 4.0 - 1.0 / 8.0));
    }

    #[test]
    fn what_cannot_be_told_has_a_reason() {
        assert!(matches!(NoiseState::complete(1, 1.0, 1.0, 1.0), NoiseState::None(NoNoise::OneMicroBatch)));
        assert!(matches!(NoiseState::complete(2, f64::INFINITY, 1.0, 1.0), NoiseState::None(NoNoise::NotFinite)));
        assert!(NoNoise::OneMicroBatch.to_string().contains("with `pp` take two replicas (`dp`)"));
    }
}
