//! The crate's error type (the lead's file replaces this one).

/// Everything that can go wrong.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A training step could not be captured, rewritten or executed as a graph.
    #[error("graph: {problem}")]
    Graph {
        /// What is wrong and what to do about it.
        problem: String,
    },
}
