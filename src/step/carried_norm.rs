//! The norm of a gradient that comes with the step: where it is likely to be asked for, the ranks that divide rows
//! among themselves measure theirs before they tell each other how the step went, and tell that as well.

use std::collections::HashMap;
use std::fmt;

use burn::module::ParamId;

use crate::sharding::ShardComms;
use crate::tensor::{Norm, PartialNorm, PlainTensor};

/// How the norm of a step was asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AskedNorm {
    /// How it is measured.
    pub norm: Norm,
    /// The largest that is left as it is.
    pub max: f64,
    /// Whether a gradient that is not finite skips the step.
    pub skips: bool,
}

impl AskedNorm {
    pub(crate) const WORDS: usize = 2;

    /// As ranks tell it each other; zeros if it was not asked for.
    pub(crate) fn words(asked: Option<Self>) -> [u64; Self::WORDS] {
        asked.map_or([0; Self::WORDS], |Self { norm, max, skips }| {
            [max.to_bits(), 1 + u64::from(norm == Norm::Infinity) + 2 * u64::from(skips)]
        })
    }

    pub(crate) fn of_words([max, options]: [u64; Self::WORDS]) -> Option<Self> {
        let options = options.checked_sub(1)?;
        let norm = if options & 1 == 1 { Norm::Infinity } else { Norm::L2 };
        Some(Self { norm, max: f64::from_bits(max), skips: options & 2 == 2 })
    }
}

impl fmt::Display for AskedNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let skips = if self.skips { ", skipping what is not finite" } else { "" };
        match self.max.is_finite() {
            true => write!(f, "to the {:?} norm {}{skips}", self.norm, self.max),
            false => write!(f, "by no norm, with the {:?} norm measured{skips}", self.norm),
        }
    }
}

/// The norm of all rows of a gradient.
#[derive(Debug, Clone)]
pub(crate) struct CarriedNorm {
    pub asked: AskedNorm,
    /// How large it is; finite.
    pub size: PartialNorm,
    /// The ranks that divide the rows, all of which have it.
    pub comms: ShardComms,
    /// The gradients that this rank has measured. While they are held here nobody changes them in place.
    pub gradients: HashMap<ParamId, PlainTensor>,
}
