//! The tensors that one stage sends to another.

use super::stage_error;
use crate::Error;
use crate::tensor::PlainTensor;

/// The tensors that one stage gives to another for one micro-batch: activations, or their gradients.
///
/// They may be of any dtype and rank, and of other shapes in every micro-batch; how many there are is said by the
/// [`Edge`](super::schedule::Edge). They are plain: no graph of burn's autodiff crosses a stage.
#[derive(Debug, Clone)]
pub struct StageMessage {
    /// The stage that gives them.
    pub from: usize,
    /// The stage that takes them.
    pub to: usize,
    /// The tensors in the order of the giving stage. In a backward message, in the order of the activations that they
    /// are gradients of; `None` where there is no gradient, as for a mask of integers.
    pub tensors: Vec<Option<PlainTensor>>,
}

impl StageMessage {
    /// A message without gaps.
    pub fn new(from: usize, to: usize, tensors: impl IntoIterator<Item = PlainTensor>) -> Self {
        Self { from, to, tensors: tensors.into_iter().map(Some).collect() }
    }

    /// The tensors of a message without gaps.
    ///
    /// # Errors
    /// [`Error::Pipeline`] if one is missing.
    pub fn into_tensors(self) -> Result<Vec<PlainTensor>, Error> {
        let Self { from, to, tensors } = self;
        let missing = tensors.iter().position(Option::is_none);
        match missing {
            None => Ok(tensors.into_iter().flatten().collect()),
            Some(place) => Err(stage_error(format!("tensor {place} from stage {from} to stage {to} is missing"))),
        }
    }
}
