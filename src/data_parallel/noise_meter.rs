//! Measures the gradient of each micro-batch as it comes, for the noise of the step's gradient.

use std::collections::{HashMap, HashSet};

use crate::step::{NoNoise, NoisePart, NoiseState};
use crate::tensor::{PlainTensor, Squares};

/// Adds up `w |g|^2` over micro-batches, with `g` the mean gradient over the `w` items of one.
#[derive(Default)]
pub(super) struct NoiseMeter {
    /// The parameters that another rank counts.
    elsewhere: HashSet<usize>,
    /// Over the micro-batches that are done.
    done: Squares,
    micro_batches: u64,
    /// Of the one that runs.
    running: Squares,
    weight: Option<(f64, f64)>,
    /// The sums of the gradients of parameters that it uses several times, whose square is not the sum of those of the
    /// parts.
    held: HashMap<usize, PlainTensor>,
    in_parts: bool,
}

impl NoiseMeter {
    pub fn new(elsewhere: HashSet<usize>) -> Self {
        Self { elsewhere, ..Self::default() }
    }

    /// A micro-batch counts for so many items; its gradients are those of the sum over them, divided by `unit`.
    pub fn weigh(&mut self, weight: f64, unit: f64) {
        self.weight = Some((weight, unit));
    }

    /// Takes a gradient of a parameter that the micro-batch uses so often, of which so many have arrived with this;
    /// with the sum of its squares, if that is known.
    pub fn add(&mut self, param: usize, (uses, arrived): (usize, usize), gradient: &PlainTensor, squares: Option<f64>) {
        if self.elsewhere.contains(&param) {
            return;
        }
        if uses > 1 {
            let (sum, squares) = match self.held.remove(&param) {
                None => {
                    self.in_parts |= arrived > uses;
                    (gradient.clone(), None)
                }
                Some(sum) if arrived < uses => (sum.add(gradient.clone()), None),
                Some(sum) => sum.add_and_measure(gradient),
            };
            match squares {
                Some(_) if arrived == uses => self.in_parts |= self.running.add(&sum, squares).is_err(),
                _ => drop(self.held.insert(param, sum)),
            }
        } else if arrived > 1 {
            self.in_parts = true;
        } else {
            self.in_parts |= self.running.add(gradient, squares).is_err();
        }
    }

    /// Notes that a gradient came whose parameter is not known yet.
    pub fn add_unknown(&mut self) {
        self.in_parts = true;
    }

    /// Ends a micro-batch.
    pub fn end_micro_batch(&mut self) {
        for (_, gradient) in std::mem::take(&mut self.held) {
            self.in_parts |= self.running.add(&gradient, None).is_err();
        }
        let running = std::mem::take(&mut self.running);
        if let Some((weight, unit)) = self.weight.take().filter(|(weight, _)| *weight > 0.0) {
            self.done.add_scaled(running, unit * unit / weight);
            self.micro_batches += 1;
        }
    }

    /// What this rank brings to the sum over the replicas.
    pub fn numbers(self) -> [f64; NUMBERS] {
        [self.done.read(), self.micro_batches as f64, f64::from(u8::from(self.in_parts))]
    }
}

/// Whether a step measures that has so many before it, where one of `every` so many does; or why not.
pub(super) fn turn(every: u64, before: u64) -> Result<(), NoNoise> {
    match every {
        0 => Err(NoNoise::Off),
        _ if before.wrapping_add(1).is_multiple_of(every) => Ok(()),
        _ => Err(NoNoise::Interval),
    }
}

/// How many numbers a rank brings.
pub(super) const NUMBERS: usize = 3;

/// What the sums over the replicas say.
pub(super) fn of_sums(sums: &[f64]) -> NoiseState {
    match *sums {
        [squares, micro_batches, 0.0] => NoiseState::Part(NoisePart { squares, micro_batches: micro_batches as u64 }),
        _ => NoiseState::None(NoNoise::InParts),
    }
}

/// What two reductions of one step say together.
pub(super) fn together(one: NoiseState, two: NoiseState) -> NoiseState {
    match (one, two) {
        (NoiseState::Part(one), NoiseState::Part(two)) => NoiseState::Part(NoisePart {
            squares: one.squares + two.squares,
            micro_batches: one.micro_batches + two.micro_batches,
        }),
        (NoiseState::Part(_), other) | (other, _) => other,
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use super::*;

    fn gradient(values: [f32; 2]) -> PlainTensor {
        Tensor::<1>::from_data(values, &Device::flex()).into()
    }

    #[test]
    fn a_tied_parameter_counts_by_the_sum_of_its_parts() {
        let mut meter = NoiseMeter::new(HashSet::from([7]));
        meter.weigh(4.0, 2.0);
        meter.add(0, (2, 1), &gradient([1.0, 0.0]), None);
        meter.add(7, (1, 1), &gradient([9.0, 9.0]), None);
        meter.add(0, (2, 2), &gradient([2.0, -1.0]), None);
        assert!(meter.held.is_empty(), "it is measured with its last part");
        meter.add(1, (1, 1), &gradient([0.0, 2.0]), None);
        meter.end_micro_batch();
        // One that counts for nothing.
        meter.weigh(0.0, 2.0);
        meter.add(1, (1, 1), &gradient([5.0, 5.0]), None);
        meter.end_micro_batch();
        assert_eq!(meter.numbers(), [(9.0 + 1.0 + 4.0) * 4.0 / 4.0, 1.0, 0.0]);
    }

    #[test]
    fn one_step_of_so_many_measures() {
        let measure = |every| (0..9).filter(|before| turn(every, *before).is_ok()).collect::<Vec<_>>();
        assert_eq!((measure(1).len(), measure(4), measure(0)), (9, vec![3, 7], vec![]));
        assert_eq!((turn(0, 3), turn(4, 0)), (Err(NoNoise::Off), Err(NoNoise::Interval)));
    }

    #[test]
    fn parts_that_nobody_announced_are_no_number() {
        let mut meter = NoiseMeter::default();
        meter.weigh(1.0, 1.0);
        meter.add(0, (1, 1), &gradient([1.0, 0.0]), None);
        meter.add(0, (1, 2), &gradient([1.0, 0.0]), None);
        meter.end_micro_batch();
        assert!(matches!(of_sums(&meter.numbers()), NoiseState::None(NoNoise::InParts)));
    }
}
