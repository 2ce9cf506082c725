//! What replicas divide among themselves.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Error;

/// What the replicas of a model divide among themselves, instead of each holding all of it. Each level divides what the
/// levels before it do, and more.
///
/// In a file: `"none"`, `"optimizer"`, `"gradients"`, `"parameters"`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharding {
    /// Nothing: every replica holds parameters, gradients and optimizer state whole.
    #[default]
    None,
    /// The state of the optimizer (ZeRO 1). Gradients are reduce-scattered once a step, each rank updates its rows of
    /// the parameters, and the updated rows are gathered: the bytes of an all-reduce.
    Optimizer,
    /// Gradients as well (ZeRO 2). Those of each micro-batch are reduce-scattered, and only this rank's rows are kept.
    /// With one micro-batch a step that costs what [`Optimizer`](Self::Optimizer) costs.
    Gradients,
    /// Parameters as well (ZeRO 3). They are gathered, a group at a time, for forward and once more for backward.
    Parameters,
}

impl Sharding {
    /// The level by its ZeRO stage; 0 is [`None`](Self::None).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it is above 3.
    pub fn from_zero_stage(stage: usize) -> Result<Self, Error> {
        match stage {
            0 => Ok(Self::None),
            1 => Ok(Self::Optimizer),
            2 => Ok(Self::Gradients),
            3 => Ok(Self::Parameters),
            _ => {
                Err(Error::invalid("Sharding", format!("there is no ZeRO stage {stage}: the stages are 0, 1, 2 and 3")))
            }
        }
    }

    /// The ZeRO stage: 0 to 3.
    pub fn zero_stage(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Sharding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Optimizer => "optimizer",
            Self::Gradients => "gradients",
            Self::Parameters => "parameters",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Sharding;

    #[test]
    fn levels_are_stages_and_words() {
        for (stage, word) in ["none", "optimizer", "gradients", "parameters"].into_iter().enumerate() {
            let level = Sharding::from_zero_stage(stage).unwrap();
            assert_eq!((level.zero_stage(), level.to_string().as_str()), (stage, word));
            assert_eq!(serde_json::to_string(&level).unwrap(), format!("\"{word}\""));
            assert_eq!(serde_json::from_str::<Sharding>(&format!("\"{word}\"")).unwrap(), level);
        }
        assert!(Sharding::from_zero_stage(4).unwrap_err().to_string().contains("there is no ZeRO stage 4"));
        assert!(Sharding::None < Sharding::Optimizer && Sharding::Gradients < Sharding::Parameters);
    }
}
