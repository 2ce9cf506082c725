//! A plan from the layers of a model alone.

mod chain;
mod layers;

use burn::module::Module;

use self::chain::chains;
use self::layers::{Cut, Layer, layers};
use super::{Plan, concise};

impl Plan {
    /// A plan for a model whose step is not known yet, by the cost of the collectives that its layers need.
    ///
    /// Linear layers and convolutions that follow each other in a struct, and whose widths fit, are taken to feed each
    /// other; what is known of burn-nn's attention, feed-forward and `SwiGlu` is used. For each such chain the cheapest way
    /// is found to split its layers by columns, by rows or not at all: by the all-reduces and all-gathers of forward and
    /// backward, the work and the parameters of each rank, for a batch of 1024 rows, weighed as in
    /// [`PlanCost::total`](super::PlanCost::total). Layers that hold nine tenths of the bytes are split whatever it costs.
    /// For burn's transformers that is [`megatron`](Self::megatron)'s plan.
    ///
    /// For the rest it goes by types: embeddings by rows, which costs one all-reduce and leaves a tied output its part of the
    /// vocabulary; gates of recurrent layers by columns; anything else of two dims or more along its last. What the degree
    /// does not divide stays whole, and so do normalisations. Makes no lazy parameter.
    ///
    /// It is a guess at how layers are connected: right in numbers whatever they are, but
    /// [`suggest_for`](Self::suggest_for), which looks at the step itself and counts what is communicated, finds better ones.
    ///
    /// ```
    /// use burn::{nn::{Linear, LinearConfig}, prelude::*};
    /// use burn_parallel::plan::Plan;
    ///
    /// #[derive(Module, Debug)]
    /// struct Mlp { up: Linear, down: Linear }
    ///
    /// let device = Device::flex();
    /// let model = Mlp {
    ///     up: LinearConfig::new(64, 256).init(&device),
    ///     down: LinearConfig::new(256, 64).init(&device),
    /// };
    /// let by_hand = Plan::new().shard("up.weight", 1).shard("up.bias", 0).shard("down.weight", 0);
    /// let suggested = Plan::suggest(&model, 2);
    /// assert_eq!(suggested.table(&model, 2)?, by_hand.table(&model, 2)?);
    /// # Ok::<(), burn_parallel::Error>(())
    /// ```
    pub fn suggest<M: Module>(model: &M, degree: usize) -> Self {
        let layers: Vec<Layer> = layers(model);
        let mut cuts = vec![Cut::Whole; layers.len()];
        for (layer, cut) in chains(&layers, degree) {
            cuts[layer] = cut;
        }
        let mut layouts = Vec::new();
        for (layer, cut) in layers.iter().zip(cuts) {
            layouts.extend(
                layer.fields.iter().map(|(name, dims)| (layer.path(name), layer.layout(cut, name, dims, degree))),
            );
        }
        concise(&layouts)
    }
}
