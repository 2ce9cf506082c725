//! Suggests a plan from the layers of a model alone.

mod chain;
mod layers;

use burn::module::Module;

use self::chain::chains;
use self::layers::{Layer, LinearSplit, layers};
use super::{Plan, from_layouts, warn_of_nothing_split};

impl Plan {
    /// A plan for a model whose step is not known yet, by the cost of the collectives that its layers need.
    ///
    /// Linear layers and convolutions that follow each other in a struct, or in a block with no norm between, and whose
    /// widths fit, are taken to feed each other; layers of burn-nn's attention and `SwiGlu`, and those named as
    /// attention and gated feed-forward commonly are (`q_proj`, `k_proj`, `v_proj`; `gate_proj`, `up_proj`; ..), to be
    /// beside each other. For each such chain the cheapest way is found to split its layers by columns, by rows or not
    /// at all: by the all-reduces and all-gathers of forward and backward, the work and the parameters of each rank,
    /// for a batch of 1024 rows, weighed as in [`PlanCost::total`](super::PlanCost::total). Layers that hold nine
    /// tenths of the bytes are split whatever it costs. For burn's transformers that is [`megatron`](Self::megatron)'s
    /// plan.
    ///
    /// For the rest it goes by types: embeddings by rows, which costs one all-reduce and leaves a tied output its part
    /// of the vocabulary; gates of recurrent layers by columns; anything else of two dims or more along its last. What
    /// of this is less than a twentieth of the model stays whole. What the degree does not divide is
    /// [padded](Self::shard_padded) in linear layers and embeddings, if that takes an eighth more at most and heads are
    /// not cut by it, and else stays whole, as normalisations do. A warning goes to [`log`] if nothing can be split.
    /// Makes no lazy parameter.
    ///
    /// It is a guess at how layers are connected: right in numbers whatever they are, but
    /// [`suggest_for`](Self::suggest_for), which looks at the step itself and counts what is communicated, finds better
    /// ones.
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
        let mut cuts = vec![LinearSplit::Columns; layers.len()];
        small(&layers).into_iter().for_each(|layer| cuts[layer] = LinearSplit::Whole);
        for (layer, cut) in chains(&layers, degree) {
            cuts[layer] = cut;
        }
        let mut layouts = Vec::new();
        for (layer, cut) in layers.iter().zip(cuts) {
            let fields = layer.fields.iter();
            layouts.extend(
                fields.map(|(name, dims)| (layer.path(name), dims.clone(), layer.layout(cut, name, dims, degree))),
            );
        }
        warn_of_nothing_split(layouts.iter().map(|(_, _, layout)| *layout), degree);
        from_layouts(&layouts, degree)
    }
}

/// Embeddings, as of positions and segments, and parameters of other kinds that are nothing beside the rest: each that
/// is split takes a collective.
fn small(layers: &[Layer]) -> Vec<usize> {
    let elements = |layer: &Layer| layer.fields.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum::<usize>();
    let all: usize = layers.iter().map(elements).sum();
    let small = |layer: &Layer| layer.ends().is_none() && 20 * elements(layer) < all;
    (0..layers.len()).filter(|layer| small(&layers[*layer])).collect()
}
