//! How checkpoints are kept and read.

use burn::config::Config;
use serde::{Deserialize, Serialize};

/// How a [`Checkpointer`](super::Checkpointer) keeps checkpoints, and how strictly it reads them. The same on all
/// ranks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) keep_last: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) keep_every: Option<u64>,
    pub(super) allow_missing: Vec<String>,
    pub(super) allow_unexpected: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) strategy: Option<String>,
}

impl Config for CheckpointConfig {}

impl CheckpointConfig {
    /// Keeps all, and reads strictly.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps the `count` checkpoints that were written last, at least the one just saved, and removes the others after
    /// each save: where a run has gone back to an earlier step, those of the run before, of higher steps, go first. The
    /// one that was restored counts as written then. The last of this order is the
    /// [latest](super::Checkpointer::latest). One in which somebody has put something stays. All by default.
    pub fn with_keep_last(mut self, count: usize) -> Self {
        self.keep_last = Some(count);
        self
    }

    /// Keeps those whose step is a multiple of `steps` as well, however long ago they were written.
    pub fn with_keep_every(mut self, steps: u64) -> Self {
        self.keep_every = Some(steps);
        self
    }

    /// Lets parameters whose paths match a pattern be missing in a checkpoint: they stay as they are. `*` stands for
    /// any characters.
    pub fn with_allow_missing(mut self, patterns: impl IntoIterator<Item: Into<String>>) -> Self {
        self.allow_missing.extend(patterns.into_iter().map(Into::into));
        self
    }

    /// Lets a checkpoint have parameters, optimizers, schedulers and values that the state does not have, if their
    /// paths or names match a pattern: they are not read.
    pub fn with_allow_unexpected(mut self, patterns: impl IntoIterator<Item: Into<String>>) -> Self {
        self.allow_unexpected.extend(patterns.into_iter().map(Into::into));
        self
    }

    /// Writes into each checkpoint how it was made, as the text of a [`Strategy`](crate::train::Strategy): for people,
    /// and scripts. Nothing that reads checkpoints depends on it.
    pub fn with_strategy(mut self, strategy: impl std::fmt::Display) -> Self {
        self.strategy = Some(strategy.to_string());
        self
    }
}

/// Whether one of the patterns, in which `*` stands for any characters, matches all of `name`.
pub(super) fn matches(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| {
        let mut pieces = pattern.split('*');
        let Some(mut rest) = pieces.next().and_then(|first| name.strip_prefix(first)) else { return false };
        let pieces: Vec<&str> = pieces.collect();
        let Some((last, between)) = pieces.split_last() else { return rest.is_empty() };
        for piece in between {
            match rest.split_once(piece) {
                Some((_, behind)) => rest = behind,
                None => return false,
            }
        }
        rest.ends_with(last)
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn patterns() {
        let matches = |pattern: &str, name| super::matches(&[pattern.into()], name);
        assert!(matches("head.*", "head.weight") && matches("*", "") && matches("a*b*c", "a-b-b-c"));
        assert!(matches("a", "a") && !matches("a", "ab") && !matches("a*a", "a") && !matches("*.w", "x.wb"));
    }
}
