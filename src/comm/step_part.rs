//! The parts of a training step in which all its ranks meet. A call carries the part that it belongs to, with the
//! number of the step: ranks that are in different parts call what does not match, and errors say in which part each
//! is.

/// A part of a step that is the same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StepPart {
    /// Forward and backward, up to the averages.
    Step,
    /// The norm of the gradient.
    Norm,
    /// What `optimize` does.
    Update,
}

/// Marks the numbers of parts; names of other numbers leave this bit out, and [`Call`](super::Call) uses the one above.
pub(super) const MARK: u64 = 1 << 62;

/// The lowest bit of the part; those below it are of the step.
const PART: u32 = 48;
const STEP: u64 = (1 << PART) - 1;

impl StepPart {
    const ALL: [Self; 3] = [Self::Step, Self::Norm, Self::Update];

    /// What it is called in errors, before the number of its step.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Step => "step",
            Self::Norm => "the norm of step",
            Self::Update => "the update of step",
        }
    }

    /// The number on which ranks agree that are in this part of a step; 0 is a step that nobody counts.
    pub(crate) fn of(self, step: u64) -> u64 {
        MARK | ((self as u64) << PART) | (step & STEP)
    }

    /// The name of a part with the number of its step, if that is what ranks agree on.
    pub(super) fn described(number: u64) -> Option<String> {
        let (part, step) = ((number & !MARK) >> PART, number & STEP);
        let part = Self::ALL.get(part as usize).filter(|_| number & MARK != 0)?;
        Some(match (part, step) {
            (part, 0) => part.name().replace("step", "a step"),
            (part, step) => format!("{} {step}", part.name()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_tell_the_part_and_the_step() {
        assert_eq!(StepPart::described(StepPart::Step.of(4)).unwrap(), "step 4");
        assert_eq!(StepPart::described(StepPart::Norm.of(3)).unwrap(), "the norm of step 3");
        assert_eq!(StepPart::described(StepPart::Norm.of(0)).unwrap(), "the norm of a step");
        assert_eq!(StepPart::described(StepPart::Update.of(1 << 40)).unwrap(), "the update of step 1099511627776");
        for number in [0, 1, MARK - 1, MARK | 3 << PART, u64::MAX] {
            assert_eq!(StepPart::described(number), None, "{number:x}");
        }
    }
}
