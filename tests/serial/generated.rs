//! What ranks hold while a model that is spread over them writes a text.

#[path = "../common/finetune.rs"]
#[allow(dead_code, unused_imports, reason = "what tests need that train")]
mod finetune;

use burn::module::Module;
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;

use self::finetune::directory;
use self::finetune::generate::{Continuation, generate};
use self::finetune::model::{Autocast, Batch, Llama, LlamaConfig, Rope, Scaling};
use crate::directories::most;

/// Many layers, each a small part of the model.
const CONFIG: LlamaConfig = LlamaConfig {
    vocab: 96,
    width: 192,
    inner: 768,
    layers: 12,
    heads: 4,
    kv_heads: 4,
    head_size: 48,
    epsilon: 1e-5,
    tied: true,
    qkv_bias: false,
    output_bias: false,
    mlp_bias: false,
    qk_norm: false,
    rope: Rope { theta: 10_000.0, scaling: Scaling::None },
    positions: 64,
    autocast: Autocast(None),
};

/// Each of two ranks has half of the weights. If one had the other half as well, for a moment, it would hold so much
/// more; of divided weights both gather what they need, and would both.
#[test]
fn no_rank_holds_the_whole_while_it_writes() {
    let _turn = crate::turn();
    let device = Device::flex().autodiff();
    let model = CONFIG.init(&device).materialize();
    let half = 2 * model.num_params();
    let divided = DataParallelConfig::new().with_sharding(Sharding::Parameters);
    for (strategy, rows, bound) in [
        (Strategy::new().with_tp(2, directory::plan()), 1, half),
        (Strategy::new().with_pp(2, PipelineConfig::new(2)), 2, half),
        (Strategy::new().with_data(divided), 1, 2 * half),
    ] {
        let texts = launch::threads(2).run(|rank| {
            let mut model = model.clone().fork(&device).parallelize(&rank, &strategy)?;
            model.prepare(Batch::of_documents(Tensor::ones([2, 9], &device)), Llama::loss)?;
            let config = Continuation { length: 3, longest: 64, ends: Vec::new(), temperature: 0.0, seed: 0, rows };
            let write = || generate(&model, &rank.device(), &[5, 9, 2, 40], &config);
            let (text, held) = most(&rank, write)?;
            assert!(held < bound, "{held} bytes were held beside the parts, of {bound}:\n{strategy}");
            Ok(text)
        });
        assert_eq!(texts.unwrap()[0].len(), 3);
    }
}
