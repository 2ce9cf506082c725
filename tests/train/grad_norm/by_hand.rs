//! Models that are split by hand: explicit layers, and stages that differ from rank to rank.

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::layers::{
    ParallelAttention, ParallelAttentionConfig, ParallelFeedForward, ParallelFeedForwardConfig, VocabParallelEmbedding,
    VocabParallelEmbeddingConfig,
};
use burn_parallel::train::{Clip, HandSplit, Norm};

use crate::common::models::Numbers;

#[derive(Module, Debug)]
struct Block {
    table: VocabParallelEmbedding,
    attention: ParallelAttention,
    feed_forward: ParallelFeedForward,
}

impl Block {
    /// Fewer key/value heads than ranks, and widths and words that ranks do not divide.
    fn new(group: &Communicator, device: &Device) -> Result<Self, Error> {
        Ok(Self {
            table: VocabParallelEmbeddingConfig::new(11, 16).with_seed(Some(1)).init(group, device)?,
            attention: ParallelAttentionConfig::new(16, 4)
                .with_n_kv_heads(Some(2))
                .with_seed(Some(2))
                .init(group, device)?,
            feed_forward: ParallelFeedForwardConfig::new(16, 9).with_seed(Some(3)).init(group, device)?,
        })
    }

    fn gradients(&self, group: &Communicator) -> Result<GradientsParams, Error> {
        let device = Device::flex().autodiff();
        let ids = Numbers(4).classes::<2>([2, 5], 11, &device);
        let x = self.table.forward(ids)?;
        let x = self.feed_forward.forward(self.attention.forward(x, None)?)?;
        let loss = x.powi_scalar(2).sum() * 20.0;
        Ok(GradientsParams::from_grads(layout::backward(&loss, group)?, self))
    }

    fn split(&self, group: &Communicator) -> HandSplit {
        let attention = ["query", "key", "value"].map(|layer| format!("attention.{layer}.*"));
        let split = ["table.weight", "attention.output.weight", "feed_forward.up.*", "feed_forward.down.weight"];
        let split = HandSplit::new().over(group, split.map(String::from).into_iter().chain(attention));
        match self.attention.sharers() {
            Some(sharers) => split.copied(sharers, ["attention.key.*", "attention.value.*"]),
            None => split,
        }
    }
}

#[test]
fn explicit_layers_have_the_norm_of_one_rank() {
    let norms = |ranks: usize, norm| {
        launch::threads(ranks)
            .run(|rank| {
                let block = Block::new(&rank, &rank.device().autodiff())?;
                let clip = Clip::at(1.0).with_norm(norm);
                let clipped = block.split(&rank).clip_grad_norm(&block, block.gradients(&rank)?, clip)?;
                // What is left has the largest norm.
                let again = block.split(&rank).clip_grad_norm(&block, clipped.grads, clip)?;
                assert!(clipped.factor < 1.0 && (again.norm - 1.0).abs() < 1e-4, "{} {}", clipped.factor, again.norm);
                Ok(clipped.norm)
            })
            .unwrap()
    };
    for norm in [Norm::L2, Norm::Infinity] {
        let alone = norms(1, norm)[0];
        for ranks in [2, 4] {
            for found in norms(ranks, norm) {
                assert!((found / alone - 1.0).abs() < 1e-5, "{norm:?} on {ranks} ranks: {found}, not {alone}");
            }
        }
    }
}

#[test]
fn a_wrapper_that_does_not_know_of_explicit_layers_says_so() {
    launch::threads(2)
        .run(|rank| {
            // Each rank is a replica of its own of one that is split over both.
            let alone = rank.split(rank.rank() as u64, 0)?;
            let block = Block::new(&rank, &rank.device().autodiff())?;
            let grads = block.gradients(&rank)?;
            let model = block.data_parallel(&alone, DataParallelConfig::new())?;
            let problem = model.clip_grad_norm(grads, 1.0).unwrap_err().to_string();
            assert!(problem.contains("VocabParallelEmbedding") && problem.contains("HandSplit"), "{problem}");
            Ok(())
        })
        .unwrap();
}

#[test]
fn stages_of_different_modules_are_one_model() {
    // Three linear layers with weights of ones and gradients of their stage's number; the middle one has no bias.
    let found = launch::threads(3)
        .run(|rank| {
            let device = rank.device().autodiff();
            let stage: Linear = LinearConfig::new(2, 2).with_bias(rank.rank() != 1).init(&device);
            let mut grads = GradientsParams::new();
            let value = rank.rank() as f32 + 1.0;
            grads.register(stage.weight.id, Tensor::<2>::full([2, 2], value, &rank.device()));
            if let Some(Param { id, .. }) = &stage.bias {
                let bad = if rank.rank() == 2 { f32::NAN } else { value };
                grads.register(*id, Tensor::<1>::full([2], bad, &rank.device()));
            }
            let split = HandSplit::new().over(&rank, ["*"]);
            let error = split.clip_grad_norm(&stage, grads, 1.0).unwrap_err();

            let mut grads = GradientsParams::new();
            grads.register(stage.weight.id, Tensor::<2>::full([2, 2], value, &rank.device()));
            let norm = split.clip_grad_norm(&stage, grads, Clip::never())?.norm;
            Ok((error, norm))
        })
        .unwrap();
    let error = Error::NonFinite { path: "bias".into(), rank: 2 };
    assert_eq!(found, vec![(error, (4.0f64 * (1.0 + 4.0 + 9.0)).sqrt()); 3]);
}

#[test]
fn patterns_without_a_parameter_are_refused() {
    launch::threads(1)
        .run(|rank| {
            let layer: Linear = LinearConfig::new(2, 2).init(&rank.device().autodiff());
            let split = HandSplit::new().over(&rank, ["wieght"]);
            let problem = split.clip_grad_norm(&layer, GradientsParams::new(), 1.0).unwrap_err().to_string();
            assert!(problem.contains("`wieght`") && problem.contains("weight"), "{problem}");
            Ok(())
        })
        .unwrap();
}
