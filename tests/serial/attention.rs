//! Attention never has all its scores in memory.

use std::sync::atomic::Ordering::Relaxed;

use burn::nn::Linear;
use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, generate_autoregressive_mask};
use burn::prelude::*;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn_parallel::graph::{CustomOps, Executor, capture_step};

use crate::memory::{MOST, held};

const TOKENS: usize = 512;
const HEADS: usize = 8;
/// Bytes of the scores of one head for each head.
const SCORES: isize = (HEADS * TOKENS * TOKENS * 4) as isize;

type Inputs = (Tensor<3>, Tensor<3, Bool>);

#[test]
fn a_step_of_attention_takes_less_than_its_scores() {
    take_less_than_scores(|model, (x, mask)| {
        model.forward(MhaInput::self_attn(x).mask_attn(mask)).context.powi_scalar(2).mean()
    });
    // burn's own, with a mask that it makes and with one that it is given.
    take_less_than_scores(|model, (x, mask)| {
        let by_head = |linear: &Linear| linear.forward(x.clone()).reshape([1, TOKENS, HEADS, 8]).swap_dims(1, 2);
        let [query, key, value] = [&model.query, &model.key, &model.value].map(by_head);
        let causal = AttentionModuleOptions { is_causal: true, ..Default::default() };
        let first = attention(query.clone(), key.clone(), value.clone(), None, None, causal);
        let mask = mask.unsqueeze_dim::<4>(1).expand([1, HEADS, TOKENS, TOKENS]);
        let second = attention(query, key, value, Some(mask), None, Default::default());
        (first + second).powi_scalar(2).mean()
    });
}

fn take_less_than_scores(loss: impl Fn(&MultiHeadAttention, Inputs) -> Tensor<1>) {
    let _turn = crate::turn();
    let device = Device::flex().autodiff();
    let model = MultiHeadAttentionConfig::new(HEADS * 8, HEADS).with_dropout(0.0).init(&device);
    let x = Tensor::<3>::ones([1, TOKENS, HEADS * 8], &device);
    let mask = generate_autoregressive_mask(1, TOKENS, &Device::flex());
    let peak = |fusion: bool| {
        let graph = capture_step(&model, (x.clone(), mask.clone()), &loss).unwrap();
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
