//! The actions of a schedule, in the notation of the field.

use std::fmt;
use std::str::FromStr;

use super::schedule_error;
use crate::Error;

/// A micro-batch in a stage: what every action is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Unit {
    /// The stage, counted from 0 in the order of the model.
    pub stage: usize,
    /// The micro-batch, counted from 0.
    pub micro_batch: usize,
}

impl Unit {
    /// A micro-batch in a stage.
    pub fn new(stage: usize, micro_batch: usize) -> Self {
        Self { stage, micro_batch }
    }
}

/// Which way tensors travel: activations to later stages, gradients to earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// To later stages.
    Forward,
    /// To earlier stages.
    Backward,
}

/// One entry of a [`Timetable`](super::Timetable).
///
/// Prints and parses as Megatron and PyTorch write it: the stage, what is done, the micro-batch.
///
/// | text | meaning |
/// |---|---|
/// | `2F0` | stage 2 runs the forward of micro-batch 0 |
/// | `1B3` | stage 1 runs the whole backward of micro-batch 3 |
/// | `1I3` | ... the half that gives the gradients of its inputs |
/// | `1W3` | ... the half that gives the gradients of its weights |
/// | `1SEND_F3`, `2RECV_F3` | what the forward of stage 1 gives is sent; what that of stage 2 needs is received |
/// | `2SEND_B3`, `1RECV_B3` | the same for the backward, towards earlier stages |
///
/// A send is to all stages of other ranks that need the tensors, a receive from all that give some, so a connection
/// that skips stages needs no notation of its own.
///
/// ```
/// use burn_parallel::pipeline_parallel::schedule::{Action, Direction, Unit};
///
/// let action: Action = "1SEND_F3".parse()?;
/// assert_eq!(action, Action::Send(Direction::Forward, Unit::new(1, 3)));
/// assert_eq!(action.to_string(), "1SEND_F3");
/// # Ok::<(), burn_parallel::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// The forward of a stage.
    Forward(Unit),
    /// The backward of a stage, for inputs and weights.
    Backward(Unit),
    /// The backward of a stage for its inputs.
    BackwardInput(Unit),
    /// The backward of a stage for its weights, after that for its inputs.
    BackwardWeight(Unit),
    /// Sending what the last pass of the stage in that direction gave.
    Send(Direction, Unit),
    /// Receiving what the next pass of the stage in that direction needs.
    Receive(Direction, Unit),
}

impl Action {
    /// The micro-batch and the stage it is about.
    pub fn unit(&self) -> Unit {
        match *self {
            Self::Forward(unit) | Self::Backward(unit) | Self::BackwardInput(unit) | Self::BackwardWeight(unit) => unit,
            Self::Send(_, unit) | Self::Receive(_, unit) => unit,
        }
    }

    /// The same action of another micro-batch or stage.
    pub fn with_unit(self, unit: Unit) -> Self {
        match self {
            Self::Forward(_) => Self::Forward(unit),
            Self::Backward(_) => Self::Backward(unit),
            Self::BackwardInput(_) => Self::BackwardInput(unit),
            Self::BackwardWeight(_) => Self::BackwardWeight(unit),
            Self::Send(direction, _) => Self::Send(direction, unit),
            Self::Receive(direction, _) => Self::Receive(direction, unit),
        }
    }

    /// Whether the stage computes, rather than sends or receives.
    pub fn computes(&self) -> bool {
        !matches!(self, Self::Send(..) | Self::Receive(..))
    }

    /// The direction in which this pass takes and gives tensors; `None` for sends and receives, and for the weights'
    /// backward, which neither needs nor gives any.
    pub fn direction(&self) -> Option<Direction> {
        match self {
            Self::Forward(_) => Some(Direction::Forward),
            Self::Backward(_) | Self::BackwardInput(_) => Some(Direction::Backward),
            Self::BackwardWeight(_) | Self::Send(..) | Self::Receive(..) => None,
        }
    }

    /// The letters between the stage and the micro-batch.
    pub fn letters(&self) -> &'static str {
        match self {
            Self::Forward(_) => "F",
            Self::Backward(_) => "B",
            Self::BackwardInput(_) => "I",
            Self::BackwardWeight(_) => "W",
            Self::Send(Direction::Forward, _) => "SEND_F",
            Self::Send(Direction::Backward, _) => "SEND_B",
            Self::Receive(Direction::Forward, _) => "RECV_F",
            Self::Receive(Direction::Backward, _) => "RECV_B",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unit { stage, micro_batch } = self.unit();
        f.pad(&format!("{stage}{}{micro_batch}", self.letters()))
    }
}

impl FromStr for Action {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        let digit = |c: char| c.is_ascii_digit();
        let (stage, rest) = text.split_at(text.len() - text.trim_start_matches(digit).len());
        let (letters, micro_batch) = rest.split_at(rest.trim_end_matches(digit).len());
        let action: fn(Unit) -> Self = match letters {
            "F" | "" => Self::Forward,
            "B" => Self::Backward,
            "I" => Self::BackwardInput,
            "W" => Self::BackwardWeight,
            "SEND_F" => |unit| Self::Send(Direction::Forward, unit),
            "SEND_B" => |unit| Self::Send(Direction::Backward, unit),
            "RECV_F" => |unit| Self::Receive(Direction::Forward, unit),
            "RECV_B" => |unit| Self::Receive(Direction::Backward, unit),
            other => {
                let known = "F, B, I, W, SEND_F, RECV_F, SEND_B, RECV_B";
                return Err(schedule_error(format!("`{text}` is no action: `{other}` is none of {known}")));
            }
        };
        let number = |digits: &str, what: &str| {
            digits.parse::<usize>().map_err(|_| {
                let found = if digits.is_empty() { "none".into() } else { format!("`{digits}`, which is too large") };
                let expected = format!("the number of the {what} the letters, as in `2F0`");
                schedule_error(format!("`{text}` is no action: {expected}, is expected, and there is {found}"))
            })
        };
        let stage = number(stage, "stage before")?;
        Ok(action(Unit { stage, micro_batch: number(micro_batch, "micro-batch behind")? }))
    }
}
