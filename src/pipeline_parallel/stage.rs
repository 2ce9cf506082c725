//! The trait of stages, which the executor drives.

use super::schedule::Edge;
use super::stage_message::StageMessage;
use crate::Error;
use crate::tensor::PlainTensor;

/// A micro-batch, as a stage sees it.
#[derive(Debug)]
pub struct MicroBatch<'a, I> {
    /// Its number in the step, counted from 0.
    pub index: usize,
    /// How many there are in the step.
    pub count: usize,
    /// What the rank of the stage was given for it: tokens, masks, targets.
    pub input: &'a I,
    /// Whether a backward follows. If not, nothing need be kept.
    pub trains: bool,
    /// What the gradient of the *summed* loss is multiplied by, at the stage where the loss is: 1 unless small dtypes
    /// need another. Gradients are divided by it, and by the weight of the whole step, when the step is over.
    pub scale: f64,
}

impl<I> Clone for MicroBatch<'_, I> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<I> Copy for MicroBatch<'_, I> {}

/// The loss of a micro-batch: the sum over its items, and their number (or whatever weighs them).
///
/// The loss of the step is the sum of the sums over the sum of the weights: the mean over all tokens, never a mean of
/// means.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossSum {
    /// Sum of the items' losses.
    pub sum: f64,
    /// Their weight in the mean.
    pub weight: f64,
}

/// What the forward of a stage gives.
#[derive(Debug, Default)]
pub struct Forwarded {
    /// One message for each edge to a later stage.
    pub messages: Vec<StageMessage>,
    /// The loss, from the stage that computes it. When several stages give some, the sums and weights add up.
    pub loss: Option<LossSum>,
    /// What else it has to show for the micro-batch: predictions, statistics. They stay on this rank.
    pub outputs: Vec<PlainTensor>,
}

/// Consecutive layers of a model on one rank. `I` is what the rank gets for each micro-batch.
///
/// The executor calls the passes in the order of the timetable: for each micro-batch `forward`, then either `backward`,
/// or `backward_input` and some time later `backward_weight`. Several micro-batches are in flight at once, and their
/// backwards need not come in the order of the forwards. A pass gets one message for each edge into the stage in its
/// direction, in the order of the giving stages, and returns one for each edge out of it, in any order.
///
/// The stage keeps what its backward needs, and drops it there: that is what the schedule's promise about memory rests
/// on. It owns the gradients of its parameters, and adds up those of all micro-batches.
///
/// [`EagerStage`](super::EagerStage) makes a stage of any burn module and a closure.
pub trait Stage<I> {
    /// Which stage this is, counted from 0 in the order of the model.
    fn index(&self) -> usize;

    /// The edges that begin or end here, in both directions: those to later stages with activations, those to earlier
    /// ones with gradients. The stage at the other end must say the same.
    fn edges(&self) -> Vec<Edge>;

    /// Runs the forward.
    ///
    /// # Errors
    /// Whatever goes wrong; every rank then returns it.
    fn forward(&mut self, micro_batch: MicroBatch<'_, I>, received: Vec<StageMessage>) -> Result<Forwarded, Error>;

    /// Runs the backward for the inputs of the stage: takes the gradients of what its forward gave, and returns those
    /// of what it had received. The stage that computes the loss begins with the gradient of the summed loss, which is
    /// [`MicroBatch::scale`].
    ///
    /// # Errors
    /// Whatever goes wrong; every rank then returns it.
    fn backward_input(
        &mut self,
        micro_batch: MicroBatch<'_, I>,
        received: Vec<StageMessage>,
    ) -> Result<Vec<StageMessage>, Error>;

    /// Runs the rest of the backward: adds the gradients of this micro-batch to those of the stage's parameters.
    ///
    /// # Errors
    /// Whatever goes wrong; every rank then returns it.
    fn backward_weight(&mut self, micro_batch: MicroBatch<'_, I>) -> Result<(), Error>;

    /// Runs the whole backward.
    ///
    /// # Errors
    /// Whatever goes wrong; every rank then returns it.
    fn backward(
        &mut self,
        micro_batch: MicroBatch<'_, I>,
        received: Vec<StageMessage>,
    ) -> Result<Vec<StageMessage>, Error> {
        let given = self.backward_input(micro_batch, received)?;
        self.backward_weight(micro_batch)?;
        Ok(given)
    }

    /// How many micro-batches it keeps something of for their backward.
    fn live(&self) -> usize;

    /// Forgets every micro-batch and gradient: the step has failed.
    fn discard(&mut self);
}

macro_rules! by_reference {
    ($($pointer:ty),*) => {$(
        impl<I, S: Stage<I> + ?Sized> Stage<I> for $pointer {
            fn index(&self) -> usize {
                (**self).index()
            }

            fn edges(&self) -> Vec<Edge> {
                (**self).edges()
            }

            fn forward(&mut self, micro_batch: MicroBatch<'_, I>, received: Vec<StageMessage>) -> Result<Forwarded, Error> {
                (**self).forward(micro_batch, received)
            }

            fn backward_input(&mut self, micro_batch: MicroBatch<'_, I>, received: Vec<StageMessage>) -> Result<Vec<StageMessage>, Error> {
                (**self).backward_input(micro_batch, received)
            }

            fn backward_weight(&mut self, micro_batch: MicroBatch<'_, I>) -> Result<(), Error> {
                (**self).backward_weight(micro_batch)
            }

            fn backward(&mut self, micro_batch: MicroBatch<'_, I>, received: Vec<StageMessage>) -> Result<Vec<StageMessage>, Error> {
                (**self).backward(micro_batch, received)
            }

            fn live(&self) -> usize {
                (**self).live()
            }

            fn discard(&mut self) {
                (**self).discard();
            }
        }
    )*};
}
by_reference!(&mut S, Box<S>);
