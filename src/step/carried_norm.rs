//! The norm of a gradient that comes with the step: where the norm of the step before was asked for, the ranks that
//! divide rows among themselves measure theirs before they tell each other how the step went, and tell that as well.

use std::collections::HashMap;

use burn::module::ParamId;

use crate::comm::Communicator;
use crate::tensor::{Norm, PartialNorm, PlainTensor};

/// The norm that is likely to be asked for: as it was of the step before.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpectedNorm {
    /// How it is measured.
    pub norm: Norm,
    /// The numbers of all options, on which the ranks have agreed.
    pub asked: [f64; 2],
}

/// The norm of all rows of a gradient.
#[derive(Debug, Clone)]
pub(crate) struct CarriedNorm {
    pub expected: ExpectedNorm,
    /// How large it is; finite.
    pub size: PartialNorm,
    /// The ranks that hold the rows.
    pub over: Communicator,
    /// The gradients that this rank has measured. While they are held here nobody changes them in place.
    pub gradients: HashMap<ParamId, PlainTensor>,
}
