//! Vocabularies and widths that the number of ranks does not divide: `Plan::vocabulary` and `Plan::shard_padded`.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::hf::Weights;
use burn_parallel::partition::{Collective, CollectiveKind, ShardReport};
use burn_parallel::prelude::*;
use safetensors::tensor::{Dtype, TensorView};

use crate::common::models::{Numbers, Tied, cross_entropy, device};
use crate::common::reference::close;
use crate::compare::trains_like_one;

/// Words, a prime; and a prime width inside.
const WORDS: usize = 13;
const WIDTH: usize = 8;
const INNER: usize = 7;

type Tokens = (Tensor<2, Int>, Tensor<2, Int>);

#[derive(Module, Debug)]
struct Lm {
    tokens: Embedding,
    up: Linear,
    down: Linear,
    head: Linear,
}

impl Lm {
    fn new(device: &Device) -> Self {
        Self {
            tokens: EmbeddingConfig::new(WORDS, WIDTH).init(device),
            up: LinearConfig::new(WIDTH, INNER).init(device),
            down: LinearConfig::new(INNER, WIDTH).init(device),
            head: LinearConfig::new(WIDTH, WORDS).init(device),
        }
    }

    fn logits(&self, x: Tensor<2, Int>) -> Tensor<3> {
        let x = self.tokens.forward(x);
        self.head.forward(x.clone() + self.down.forward(activation::gelu(self.up.forward(x))))
    }

    fn loss(&self, (x, t): Tokens) -> Tensor<1> {
        let [b, s] = x.dims();
        cross_entropy(self.logits(x).reshape([b * s, WORDS]), t.reshape([b * s]))
    }
}

fn lm_loss(model: &Lm, batch: Tokens) -> Tensor<1> {
    model.loss(batch)
}

fn words(step: usize, words: usize) -> Tokens {
    let mut numbers = Numbers(step as u64 + 60);
    (numbers.classes([4, 5], words, &device()), numbers.classes([4, 5], words, &device()))
}

fn whole_plan() -> Plan {
    let inner = Plan::new().shard_padded("up.*", 1).shard_padded("down.weight", 0);
    let bias = Plan::new().shard_padded("up.bias", 0);
    bias.then(inner).then(Plan::vocabulary("tokens", "head"))
}

/// No collective over something as large as the logits or as a padded parameter.
#[track_caller]
fn nothing_large(report: &ShardReport) {
    let large = |c: &Collective| c.dims.iter().product::<usize>() >= 20 * WORDS.min(11);
    assert!(report.fallbacks.is_empty(), "{report}");
    assert_eq!(report.count(CollectiveKind::AllGather), [0, 0], "{report}");
    assert!(!report.collectives.iter().any(large), "{report}");
}

#[test]
fn a_vocabulary_of_a_prime_number_of_words() {
    for degree in [1, 2, 3, 4, 8] {
        let wrap = |model: Lm, rank: &Rank| model.tensor_parallel(rank, Plan::vocabulary("tokens", "head"));
        let batch = |step| words(step, WORDS);
        nothing_large(&trains_like_one(&Lm::new(&device()), batch, lm_loss, wrap, degree));
        let all = |model: Lm, rank: &Rank| model.tensor_parallel(rank, whole_plan());
        nothing_large(&trains_like_one(&Lm::new(&device()), batch, lm_loss, all, degree));
    }
}

#[test]
fn a_tied_vocabulary() {
    for degree in [2, 3, 4] {
        let wrap = |model: Tied, rank: &Rank| model.tensor_parallel(rank, Plan::tied_vocabulary("embedding"));
        let report = trains_like_one(
            &Tied::new(&device()),
            |step| words(step, 11),
            |m: &Tied, (x, t)| m.loss(x, t),
            wrap,
            degree,
        );
        nothing_large(&report);
    }
}

#[test]
fn over_two_axes() {
    let batch = |step| words(step, WORDS);
    // Both axes share out the words: 13 over 2 x 3 are 18.
    let both = |model: Lm, world: &Rank| {
        let mesh = Mesh::new(world, [("tp", 2), ("more", 3)])?;
        let plan = Plan::vocabulary("tokens", "head").on("more", Plan::vocabulary("tokens", "head"));
        let model = model.tensor_parallel_over(&mesh, &["tp", "more"], &plan)?;
        let row = &model.table().rows()[0];
        assert_eq!(
            (&row.dims[..], &row.padded_dims[..], &row.local_dims[..]),
            (&[13, 8][..], &[18, 8][..], &[3, 8][..])
        );
        Ok(model)
    };
    trains_like_one(&Lm::new(&device()), batch, lm_loss, both, 6);
    // The second axis alone does, or shares out the batch.
    let second = |model: Lm, world: &Rank| {
        let mesh = Mesh::new(world, [("tp", 2), ("more", 3)])?;
        let plan = Plan::new().shard("tokens.weight", 1).on("more", Plan::vocabulary("tokens", "head"));
        model.tensor_parallel_over(&mesh, &["tp", "more"], &plan)
    };
    trains_like_one(&Lm::new(&device()), batch, lm_loss, second, 6);
    let rows = |model: Lm, world: &Rank| {
        let mesh = Mesh::new(world, [("dp", 2), ("tp", 3)])?;
        let plan = whole_plan().on("dp", Plan::new().shard_input("0", 0).shard_input("1", 0));
        model.tensor_parallel_over(&mesh, &["tp", "dp"], &plan)
    };
    trains_like_one(&Lm::new(&device()), batch, lm_loss, rows, 6);
}

#[test]
fn logits_come_without_padding_and_lazy_models_stay_lazy() {
    for degree in [2, 3, 4, 8] {
        launch::threads(degree)
            .run(|rank| {
                let mut model = Lm::new(&device()).tensor_parallel(&rank, whole_plan())?;
                assert!(!model.local().tokens.weight.is_initialized());
                model.step(words(0, WORDS), lm_loss)?;
                let whole = model.assemble()?;
                assert_eq!(whole.tokens.weight.dims(), [WORDS, WIDTH]);
                assert_eq!(model.local().tokens.weight.dims(), [WORDS.div_ceil(degree), WIDTH]);
                let logits = model.forward_with(words(1, WORDS).0, |m: &Lm, x| m.logits(x))?;
                let expected = whole.valid().logits(words(1, WORDS).0.inner());
                assert_eq!(logits.dims(), [4, 5, WORDS]);
                let worst: f32 = (logits - expected).abs().max().into_scalar();
                assert!(worst < 1e-5, "{worst}");
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn parts_are_loaded_from_a_store_of_whole_parameters() {
    let dims = [
        ("tokens.weight", vec![WORDS, WIDTH]),
        ("up.weight", vec![WIDTH, INNER]),
        ("up.bias", vec![INNER]),
        ("down.weight", vec![INNER, WIDTH]),
        ("down.bias", vec![WIDTH]),
        ("head.weight", vec![WIDTH, WORDS]),
        ("head.bias", vec![WORDS]),
    ];
    let value = |seed: usize, index: usize| ((index * 7 + seed) % 13) as f32 / 26.0 - 0.25;
    let bytes: Vec<Vec<u8>> = dims
        .iter()
        .enumerate()
        .map(|(seed, (_, dims))| {
            (0..dims.iter().product()).flat_map(|index| value(seed, index).to_le_bytes()).collect()
        })
        .collect();
    let views = dims
        .iter()
        .zip(&bytes)
        .map(|((name, dims), bytes)| (name.to_string(), TensorView::new(Dtype::F32, dims.clone(), bytes).unwrap()));
    let store = safetensors::serialize(views, None).unwrap();
    for degree in [1, 2, 3, 4, 8] {
        launch::threads(degree)
            .run(|rank| {
                let model = Lm::new(&device()).tensor_parallel(&rank, whole_plan())?;
                let model = model.load(&mut Weights::from_bytes(store.clone())?)?;
                let head: Vec<f32> = model.assemble()?.head.weight.val().into_data().try_to_vec().unwrap();
                let expected: Vec<f32> = (0..WIDTH * WORDS).map(|index| value(5, index)).collect();
                assert_eq!(head, expected);
                // What is padding is 0.
                let held: f32 = model.local().tokens.weight.val().abs().sum().into_scalar();
                let rows = WORDS.div_ceil(rank.world().size());
                let (from, to) = (rank.rank() * rows * WIDTH, (rank.rank() + 1) * rows * WIDTH);
                let real = (from.min(WORDS * WIDTH)..to.min(WORDS * WIDTH)).map(|index| value(0, index).abs());
                close("sum of a part", real.sum(), held);
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn what_is_not_to_be_padded_or_cannot_be() {
    let error = launch::threads(2).run(|rank| {
        let model = Lm::new(&device()).tensor_parallel(&rank, Plan::new().shard("tokens.weight", 0));
        model.map(drop)
    });
    let said = error.unwrap_err().to_string();
    assert!(said.contains("`tokens.weight` of dims [13, 8]") && said.contains("`shard_padded`"), "{said}");
    let error = launch::threads(2).run(|rank| {
        let mut model = Lm::new(&device()).tensor_parallel(&rank, Plan::new().shard_padded("tokens.weight", 0))?;
        let step = |m: &Lm, (x, _): Tokens| m.tokens.forward(x).sum() + m.tokens.weight.val().cumsum(0).mean();
        model.step(words(0, WORDS), step).map(drop)
    });
    let said = error.unwrap_err().to_string();
    assert!(said.contains("`tokens.weight` of dims [13, 8]") && said.contains("CumSum"), "{said}");
    let text = toml::to_string(&Plan::vocabulary("tokens", "head")).unwrap();
    assert!(text.contains("padded = true"), "{text}");
    assert_eq!(toml::from_str::<Plan>(&text).unwrap(), Plan::vocabulary("tokens", "head"));
    let wrong = toml::from_str::<Plan>("parameters = [{ pattern = 'a', replicate = true, padded = true }]");
    assert!(wrong.unwrap_err().to_string().contains("cannot be `padded`"));
}
