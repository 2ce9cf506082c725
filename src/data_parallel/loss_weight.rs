//! The weight of a rank's losses in the average over the group.

/// The weight that a rank's micro-batches have in the average of a step.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LossWeight {
    /// Sum of the weights of its micro-batches.
    pub weight: f64,
    /// The weight that is the unit of the accumulated gradients: they are those of the sum of losses, divided by it.
    pub unit: f64,
}

impl LossWeight {
    /// Adds a micro-batch whose gradients are in units of `unit` items.
    pub fn add(&mut self, weight: f64, unit: f64) {
        if self.unit == 0.0 {
            self.unit = unit;
        }
        self.weight += weight;
    }
}
