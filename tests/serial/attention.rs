//! Attention never has all its scores in memory.

use std::sync::atomic::Ordering::Relaxed;

use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, generate_autoregressive_mask};
use burn::prelude::*;
use burn_parallel::graph::{CustomOps, Executor, capture_step};

use crate::memory::{MOST, held};

const TOKENS: usize = 512;
const HEADS: usize = 8;
/// Bytes of the scores of one head for each head.
const SCORES: isize = (HEADS * TOKENS * TOKENS * 4) as isize;

#[test]
fn a_step_of_attention_takes_less_than_its_scores() {
    let _turn = crate::turn();
    let device = Device::flex().autodiff();
    let model = MultiHeadAttentionConfig::new(HEADS * 8, HEADS).with_dropout(0.0).init(&device);
    let x = Tensor::<3>::ones([1, TOKENS, HEADS * 8], &device);
    let mask = generate_autoregressive_mask(1, TOKENS, &Device::flex());
    let loss = |model: &MultiHeadAttention, (x, mask): (Tensor<3>, Tensor<3, Bool>)| {
        model.forward(MhaInput::self_attn(x).mask_attn(mask)).context.powi_scalar(2).mean()
    };
    let peak = |fusion: bool| {
        let graph = capture_step(&model, (x.clone(), mask.clone()), loss).unwrap();
        let mut executor = Executor::new(graph, CustomOps::new().with_fusion(fusion)).unwrap();
        let before = held();
        MOST.store(before, Relaxed);
        for _ in 0..2 {
            executor.step(&model, (x.clone(), mask.clone())).unwrap();
        }
        (MOST.load(Relaxed) - before, executor.memory().peak as isize)
    };
    let (taken, planned) = peak(true);
    assert!(taken < SCORES, "{taken} bytes at most, scores are {SCORES}");
    assert!(planned < SCORES / 2, "{planned} bytes are planned");
    let (taken, planned) = peak(false);
    assert!(taken > 2 * SCORES && planned > 2 * SCORES, "one by one {taken} and {planned}");
}
