//! How a gradient is measured and clipped.

use crate::step::AskedNorm;
use crate::tensor::Norm;

/// What becomes of a step whose gradient has an element that is NaN or infinite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NonFinite {
    /// All ranks return [`Error::NonFinite`](crate::Error::NonFinite).
    #[default]
    Stop,
    /// On all ranks the step comes back without gradients, so that the optimizer changes neither parameters nor its
    /// state.
    Skip,
}

/// How gradients are clipped: a largest norm, how it is measured, and what becomes of a gradient that is not finite.
///
/// A number is a largest L2 norm: `step.clip_grad_norm(&model, 1.0)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clip {
    pub(super) max: f64,
    pub(super) norm: Norm,
    pub(super) non_finite: NonFinite,
}

impl Clip {
    /// Scales a gradient whose L2 norm is larger than `max` to that norm, and stops at one that is not finite.
    ///
    /// The factor is that of PyTorch's `clip_grad_norm_`, `max / (norm + 1e-6)`, where it is less than 1.
    pub fn at(max: f64) -> Self {
        Self { max, norm: Norm::default(), non_finite: NonFinite::default() }
    }

    /// Measures the norm, and leaves a finite gradient as it is.
    pub fn never() -> Self {
        Self::at(f64::INFINITY)
    }

    /// Measures by another norm.
    pub fn with_norm(mut self, norm: Norm) -> Self {
        self.norm = norm;
        self
    }

    /// Sets what becomes of a gradient that is not finite.
    pub fn with_non_finite(mut self, non_finite: NonFinite) -> Self {
        self.non_finite = non_finite;
        self
    }

    /// The norm by which it measures.
    pub(crate) fn measures(&self) -> Norm {
        self.norm
    }

    /// Whether it changes gradients that are finite.
    pub(crate) fn clips(&self) -> bool {
        self.max.is_finite()
    }

    /// What is remembered of a step whose norm is asked for like this.
    pub(crate) fn asked(&self) -> AskedNorm {
        AskedNorm { norm: self.norm, max: self.max, skips: self.non_finite == NonFinite::Skip }
    }

    /// Norm and choice as a number, for the other ranks.
    pub(super) fn number(&self) -> f64 {
        f64::from(u8::from(self.norm == Norm::Infinity) + 2 * u8::from(self.non_finite == NonFinite::Skip))
    }

    pub(super) fn of_numbers(max: f64, number: f64) -> Self {
        let number = number as u8;
        let norm = if number & 1 == 1 { Norm::Infinity } else { Norm::L2 };
        let non_finite = if number & 2 == 2 { NonFinite::Skip } else { NonFinite::Stop };
        Self { max, norm, non_finite }
    }

    /// What a gradient of this norm is multiplied by.
    pub(super) fn factor(&self, norm: f64) -> f64 {
        if self.clips() { (self.max / (norm + 1e-6)).min(1.0) } else { 1.0 }
    }
}

impl From<f64> for Clip {
    fn from(max: f64) -> Self {
        Self::at(max)
    }
}
