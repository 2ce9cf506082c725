//! Measures the gradient of each micro-batch as it comes, for the noise of the step's gradient.

use std::collections::{HashMap, HashSet};

use burn::tensor::{DType, Tensor};

use super::reduction_state::accumulate;
use crate::Error;
use crate::step::{NoNoise, NoisePart, NoiseState};
use crate::tensor::{PlainTensor, magnitude};

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

/// A sum of squares: of tensors in host memory, and of those on a device, which is read at the end.
#[derive(Default)]
struct Squares {
    host: f64,
    device: Option<Tensor<1>>,
}

impl Squares {
    fn add(&mut self, gradient: &PlainTensor) -> Result<(), Error> {
        if gradient.on_flex() {
            self.host += magnitude::squares(&gradient.clone().into_flex()?, 1.0)?;
            return Ok(());
        }
        let elements = gradient.elements();
        if elements == 0 {
            return Ok(());
        }
        let flat = gradient.clone().reshape([elements]).float::<1>()?;
        let flat = if flat.dtype() == DType::F64 { flat } else { flat.cast(DType::F32) };
        self.add_on_device((flat.clone() * flat).sum());
        Ok(())
    }

    fn add_on_device(&mut self, sum: Tensor<1>) {
        self.device = Some(match self.device.take() {
            Some(before) if before.dtype() != sum.dtype() => before.cast(DType::F64) + sum.cast(DType::F64),
            Some(before) => before + sum,
            None => sum,
        });
    }

    fn add_scaled(&mut self, other: Self, factor: f64) {
        self.host += other.host * factor;
        if let Some(sum) = other.device {
            self.add_on_device(sum.mul_scalar(factor));
        }
    }

    fn read(self) -> f64 {
        self.host + self.device.map_or(0.0, Tensor::into_scalar::<f64>)
    }
}

impl NoiseMeter {
    pub fn new(elsewhere: HashSet<usize>) -> Self {
        Self { elsewhere, ..Self::default() }
    }

    /// A micro-batch counts for so many items; its gradients are those of the sum over them, divided by `unit`.
    pub fn weigh(&mut self, weight: f64, unit: f64) {
        self.weight = Some((weight, unit));
    }

    /// Takes a gradient of a parameter that the micro-batch uses so often, of which so many have arrived with this.
    pub fn add(&mut self, param: usize, uses: usize, arrived: usize, gradient: &PlainTensor) {
        if self.elsewhere.contains(&param) {
            return;
        }
        if uses > 1 {
            let sum = accumulate(self.held.remove(&param), gradient.clone());
            self.held.insert(param, sum);
        } else if arrived > 1 {
            self.in_parts = true;
        } else {
            self.in_parts |= self.running.add(gradient).is_err();
        }
    }

    /// Notes that a gradient came whose parameter is not known yet.
    pub fn add_unknown(&mut self) {
        self.in_parts = true;
    }

    /// Ends a micro-batch.
    pub fn end_micro_batch(&mut self) {
        for (_, gradient) in std::mem::take(&mut self.held) {
            self.in_parts |= self.running.add(&gradient).is_err();
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
    use burn::tensor::Device;

    use super::*;

    fn gradient(values: [f32; 2]) -> PlainTensor {
        Tensor::<1>::from_data(values, &Device::flex()).into()
    }

    #[test]
    fn a_tied_parameter_counts_by_the_sum_of_its_parts() {
        let mut meter = NoiseMeter::new(HashSet::from([7]));
        meter.weigh(4.0, 2.0);
        meter.add(0, 2, 1, &gradient([1.0, 0.0]));
        meter.add(7, 1, 1, &gradient([9.0, 9.0]));
        meter.add(0, 2, 2, &gradient([2.0, -1.0]));
        meter.add(1, 1, 1, &gradient([0.0, 2.0]));
        meter.end_micro_batch();
        // One that counts for nothing.
        meter.weigh(0.0, 2.0);
        meter.add(1, 1, 1, &gradient([5.0, 5.0]));
        meter.end_micro_batch();
        assert_eq!(meter.numbers(), [(9.0 + 1.0 + 4.0) * 4.0 / 4.0, 1.0, 0.0]);
    }

    #[test]
    fn parts_that_nobody_announced_are_no_number() {
        let mut meter = NoiseMeter::default();
        meter.weigh(1.0, 1.0);
        meter.add(0, 1, 1, &gradient([1.0, 0.0]));
        meter.add(0, 1, 2, &gradient([1.0, 0.0]));
        meter.end_micro_batch();
        assert!(matches!(of_sums(&meter.numbers()), NoiseState::None(NoNoise::InParts)));
    }
}
