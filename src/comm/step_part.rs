//! The parts of a training step, by which its ranks find out that they are in different ones: the first call of each
//! part carries its name, with the number of the step. Calls of different parts do not match, and errors say in which
//! each rank is.

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

/// Marks the numbers of parts; hashes on which ranks agree leave this bit out, and [`Call`](super::Call) uses the one
/// above.
pub(super) const MARK: u64 = 1 << 62;

/// The lowest bit of the part; those below it are of the step.
const PART: u32 = 48;
const STEP: u64 = (1 << PART) - 1;

impl StepPart {
    pub(crate) const ALL: [Self; 3] = [Self::Step, Self::Norm, Self::Update];

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

    /// Whether a number on which ranks agree says a part.
    pub(super) fn is_number(number: u64) -> bool {
        number & MARK != 0
    }

    /// Whether words are what [`described`](Self::described) says of some part.
    pub(crate) fn is_described(words: &str) -> bool {
        let of = |part: Self| {
            let number = words.strip_prefix(part.name()).and_then(|number| number.strip_prefix(' '));
            number.is_some_and(|number| number.parse::<u64>().is_ok()) || words == part.of_no_step()
        };
        Self::ALL.into_iter().any(of)
    }

    /// What it is called where nobody counts steps.
    fn of_no_step(self) -> String {
        self.name().replace("step", "a step")
    }

    /// The name of a part with the number of its step, if that is what ranks agree on.
    pub(super) fn described(number: u64) -> Option<String> {
        let (part, step) = ((number & !MARK) >> PART, number & STEP);
        let part = Self::ALL.get(part as usize).filter(|_| Self::is_number(number))?;
        Some(match (part, step) {
            (part, 0) => part.of_no_step(),
            (part, step) => format!("{} {step}", part.name()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::ReduceOp;
    use crate::launch;

    #[test]
    fn numbers_tell_the_part_and_the_step() {
        assert_eq!(StepPart::described(StepPart::Step.of(4)).unwrap(), "step 4");
        assert_eq!(StepPart::described(StepPart::Norm.of(3)).unwrap(), "the norm of step 3");
        assert_eq!(StepPart::described(StepPart::Norm.of(0)).unwrap(), "the norm of a step");
        assert_eq!(StepPart::described(StepPart::Update.of(1 << 40)).unwrap(), "the update of step 1099511627776");
        for number in [0, 1, MARK - 1, MARK | 3 << PART, u64::MAX] {
            assert_eq!(StepPart::described(number), None, "{number:x}");
        }
        for part in StepPart::ALL {
            assert!(
                [0, 1, 77].into_iter().all(|step| StepPart::is_described(&StepPart::described(part.of(step)).unwrap()))
            );
        }
        for words in ["steps", "stepper 3", "step", "step 3x", "the norm of steps 3", ""] {
            assert!(!StepPart::is_described(words), "{words}");
        }
    }

    /// A member that counts apart is the same one: its calls come between those of the other, and meet them.
    #[test]
    fn parts_meet_wherever_they_are_counted() {
        let ran = launch::threads(2).run(|rank| {
            let between = rank.counted_apart();
            let before = rank.counters().total().calls;
            let step = rank.all_reduce_agreed(vec![1.0f64], ReduceOp::Sum, StepPart::Step.of(1))?;
            let norm = between.all_gather_agreed(vec![rank.rank() as u64], StepPart::Norm.of(1))?;
            assert_eq!((step, norm), (vec![2.0], vec![0, 1]));
            assert_eq!((rank.counters().total().calls - before, between.counters().total().calls), (1, 1));
            match rank.rank() {
                0 => between.all_gather_agreed(vec![0u64], StepPart::Update.of(1)).map(drop),
                _ => rank.all_reduce_agreed(vec![0.0f64, 0.0], ReduceOp::Sum, StepPart::Step.of(2)).map(drop),
            }
        });
        let error = ran.unwrap_err().to_string();
        assert!(error.contains("(the update of step 1)") && error.contains("(step 2)"), "{error}");
    }
}
