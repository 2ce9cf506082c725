//! Models split by a plan train like one device, with no collective too many.

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::transformer::{TransformerDecoder, TransformerDecoderConfig, TransformerDecoderInput};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn_parallel::graph::{TensorTree, capture_step};
use burn_parallel::partition::{CollectiveKind, PartitionOptions, ShardReport, partition};
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::Sharded;

use crate::common::models::{Cnn, Lm, Numbers, Rnn, Tied, Tokens, cross_entropy, device, images};
use crate::common::reference::{Reference, all_same, bytes, filled, gradient_values, optimizer, reference, values};

/// Puts gradients where the parameters are, so that they can be assembled like them.
struct Put<'a>(&'a GradientsParams);

impl ModuleMapper for Put<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.get::<D>(param.id) {
            Some(gradient) => Param::initialized(param.id, Tensor::from_inner(gradient)),
            None => param,
        }
    }
}

/// Trains with a plan on `degree` ranks and compares everything with one device.
fn compare<M: Module, I: TensorTree + Clone>(
    make: fn(&Device) -> M,
    batch: fn(u64) -> I,
    loss: fn(&M, I) -> Tensor<1>,
    plan: &Plan,
    degree: usize,
    references: &[Reference],
) -> Result<ShardReport, Error> {
    let reports = launch::threads(degree).run(|rank| {
        let model = make(&device());
        // What the others bring is not used.
        let model = if rank.rank() == 0 { filled(model) } else { model };
        let mut model: Sharded<M> = model.tensor_parallel(&rank, plan)?;
        for row in model.table().rows() {
            assert_eq!(row.local_dims.iter().product::<usize>() * 4, row.bytes);
        }
        let mut optim = optimizer();
        for (step, reference) in references.iter().enumerate() {
            let result = model.step(batch(step as u64), loss)?;
            let found = result.loss.item() as f32;
            assert!((found - reference.loss).abs() <= 1e-4 * reference.loss.abs(), "{found} {}", reference.loss);
            assert_eq!(gradient_values(&model, &result.grads).len(), reference.gradients.len());
            let whole = model.clone().map(&mut Put(&result.grads)).assemble()?;
            let mut found = values(&whole);
            found.retain(|path, _| reference.gradients.contains_key(path));
            all_same(&format!("gradient {step}"), &reference.gradients, &found, 3e-4);
            model = optim.step(0.05, model, result.grads);
            all_same(&format!("after {step}"), &reference.after, &values(&model.assemble()?), 3e-4);
        }
        // Nobody keeps more than the table says, views of something larger included.
        assert_eq!(bytes(model.local()).bytes.values().sum::<usize>(), model.table().bytes());
        Ok(model.report().shard())
    })?;
    assert!(reports.iter().all(|report| *report == reports[0]));
    Ok(reports[0].clone())
}

#[derive(Module, Debug)]
struct NormedMlp {
    first: Linear,
    norm: LayerNorm,
    second: Linear,
    third: Linear,
}

impl NormedMlp {
    fn new(device: &Device) -> Self {
        Self {
            first: LinearConfig::new(12, 24).init(device),
            norm: LayerNormConfig::new(24).init(device),
            second: LinearConfig::new(24, 36).init(device),
            third: LinearConfig::new(36, 12).with_bias(false).init(device),
        }
    }

    fn loss(&self, (x, targets): (Tensor<2>, Tensor<1, Int>)) -> Tensor<1> {
        let x = burn::tensor::activation::gelu(self.norm.forward(self.first.forward(x)));
        let x = burn::tensor::activation::relu(self.second.forward(x));
        cross_entropy(self.third.forward(x), targets)
    }
}

fn rows(seed: u64) -> (Tensor<2>, Tensor<1, Int>) {
    let mut numbers = Numbers(seed + 50);
    (numbers.tensor([12, 12], &device()), numbers.classes([12], 12, &device()))
}

fn post(device: &Device) -> Lm {
    Lm::wide(12, 0.0, false, 2, device)
}

fn pre(device: &Device) -> Lm {
    Lm::wide(12, 0.0, true, 3, device)
}

fn lm_loss(model: &Lm, (x, y): Tokens) -> Tensor<1> {
    model.loss(x, y)
}

fn tokens(seed: u64) -> Tokens {
    let mut numbers = Numbers(seed + 50);
    (numbers.classes([12, 5], 12, &device()), numbers.classes([12, 5], 12, &device()))
}

fn few_tokens(seed: u64) -> Tokens {
    let mut numbers = Numbers(seed + 50);
    (numbers.classes([4, 5], 11, &device()), numbers.classes([4, 5], 11, &device()))
}

const KINDS: [CollectiveKind; 3] =
    [CollectiveKind::AllReduce, CollectiveKind::AllGather, CollectiveKind::ReduceScatter];

#[test]
fn mlp_by_columns_and_rows() {
    let references = reference(|| NormedMlp::new(&device()), rows, NormedMlp::loss, 4);
    let plan = Plan::new().shard("second.weight", 1).shard("second.bias", 0).shard("third.*", 0);
    for degree in [1, 2, 3, 4] {
        let report = compare(NormedMlp::new, rows, NormedMlp::loss, &plan, degree, &references).unwrap();
        let counts = KINDS.map(|kind| report.count(kind));
        let expected = if degree == 1 { [[0, 0]; 3] } else { [[1, 1], [0, 0], [0, 0]] };
        assert_eq!(counts, expected, "{report}");
        assert!(report.fallbacks.is_empty(), "{report}");
    }
}

#[test]
fn transformers_with_megatrons_plan_and_its_collectives() {
    type Case = (fn(&Device) -> Lm, usize);
    let cases: [Case; 2] = [(post, 2), (pre, 3)];
    for (make, layers) in cases {
        let references = reference(|| make(&device()), tokens, lm_loss, 3);
        for degree in [1, 2, 3, 4] {
            let report = compare(make, tokens, lm_loss, &Plan::megatron(), degree, &references).unwrap();
            let counts = KINDS.map(|kind| report.count(kind));
            let expected = if degree == 1 { [[0, 0]; 3] } else { [[2 * layers, 2 * layers], [0, 0], [0, 0]] };
            assert_eq!(counts, expected, "{report}");
            assert!(report.fallbacks.is_empty(), "{report}");
        }
    }
}

#[derive(Module, Debug)]
struct Translator {
    embedding: Embedding,
    decoder: TransformerDecoder,
}

impl Translator {
    fn new(device: &Device) -> Self {
        let decoder = TransformerDecoderConfig::new(24, 48, 4, 2).with_dropout(0.0).init(device);
        Self { embedding: EmbeddingConfig::new(12, 24).init(device), decoder }
    }

    fn loss(&self, (source, target): Tokens) -> Tensor<1> {
        let (memory, target) = (self.embedding.forward(source), self.embedding.forward(target));
        self.decoder.forward(TransformerDecoderInput::new(target, memory)).powi_scalar(2).sub_scalar(0.5).abs().mean()
    }
}

#[test]
fn decoder_with_megatrons_plan() {
    let references = reference(|| Translator::new(&device()), tokens, Translator::loss, 2);
    for degree in [2, 4] {
        let report =
            compare(Translator::new, tokens, Translator::loss, &Plan::megatron(), degree, &references).unwrap();
        assert!(report.fallbacks.is_empty(), "{report}");
        // Three blocks a layer; the gradients that reach the memory are summed over the layers before they are reduced.
        assert_eq!(report.count(CollectiveKind::AllReduce), [6, 7], "{report}");
        assert_eq!(report.count(CollectiveKind::AllGather), [0, 0], "{report}");
    }
}

#[test]
fn inputs_split_along_the_batch_are_data_parallelism() {
    let plan = Plan::new().shard_input("0", 0).shard_input("1", 0);
    let references = reference(|| NormedMlp::new(&device()), rows, NormedMlp::loss, 3);
    for degree in [2, 3, 4] {
        let report = compare(NormedMlp::new, rows, NormedMlp::loss, &plan, degree, &references).unwrap();
        // The loss, and each gradient.
        let gradients = references[0].gradients.len();
        let counts = KINDS.map(|kind| report.count(kind));
        assert_eq!(counts, [[1, gradients], [0, 0], [0, 0]], "{report}");
    }
    let references = reference(|| post(&device()), tokens, lm_loss, 2);
    let report = compare(post, tokens, lm_loss, &plan, 2, &references).unwrap();
    let gradients = references[0].gradients.len();
    assert_eq!(KINDS.map(|kind| report.count(kind)), [[1, gradients], [0, 0], [0, 0]], "{report}");
}

/// Random dims for random parameters, and sometimes a split batch.
fn random_plan<M: Module>(model: &M, degree: usize, numbers: &mut Numbers) -> Plan {
    let mut draw = move |n: usize| ((numbers.next() + 1.0) / 2.0 * n as f32) as usize % n;
    let mut plan = Plan::new();
    for row in Plan::new().table(model, degree).unwrap().rows() {
        let dims: Vec<usize> = (0..row.dims.len()).filter(|dim| row.dims[*dim].is_multiple_of(degree)).collect();
        if draw(3) > 0 && !dims.is_empty() && !row.path.contains("running") {
            plan = plan.shard(row.path.clone(), dims[draw(dims.len())]);
        }
    }
    if draw(3) == 0 {
        plan = plan.shard_input("0", 0);
    }
    if draw(3) == 0 {
        plan = plan.shard_input("1", 0);
    }
    plan
}

fn random_plans<M: Module, I: TensorTree + Clone>(
    make: fn(&Device) -> M,
    batch: fn(u64) -> I,
    loss: fn(&M, I) -> Tensor<1>,
    degrees: &[usize],
    number: u64,
) {
    let references = reference(|| make(&device()), batch, loss, 1);
    for seed in 0..number {
        let mut numbers = Numbers(seed * 977 + 5);
        for _ in 0..5 {
            numbers.next();
        }
        let degree = degrees[seed as usize % degrees.len()];
        let plan = random_plan(&make(&device()), degree, &mut numbers);
        if let Err(error) = compare(make, batch, loss, &plan, degree, &references) {
            panic!("plan {seed} over {degree} ranks: {plan:?}: {error}");
        }
    }
}

#[test]
fn random_plans_of_an_mlp() {
    random_plans(NormedMlp::new, rows, NormedMlp::loss, &[2, 3, 4], 80);
}

#[test]
fn random_plans_of_transformers() {
    random_plans(post, tokens, lm_loss, &[2, 3, 4], 48);
    random_plans(pre, tokens, lm_loss, &[4, 2], 16);
}

#[test]
fn random_plans_of_models_with_convolutions_recurrence_and_tied_weights() {
    random_plans(Cnn::new, |seed| images(4, seed, &device()), |m, (x, t)| m.loss(x, t), &[2, 4], 24);
    random_plans(Rnn::new, few_tokens, |m, (x, t)| m.loss(x, t), &[2], 8);
    random_plans(Tied::new, few_tokens, |m, (x, t)| m.loss(x, t), &[2], 12);
}

#[test]
fn gradient_checkpointing() {
    fn make(_: &Device) -> Lm {
        post(&device().gradient_checkpointing())
    }
    fn batch(seed: u64) -> Tokens {
        let (device, mut numbers) = (device().gradient_checkpointing(), Numbers(seed));
        (numbers.classes([12, 5], 12, &device), numbers.classes([12, 5], 12, &device))
    }
    let references = reference(|| make(&device()), batch, lm_loss, 2);
    compare(make, batch, lm_loss, &Plan::megatron(), 2, &references).unwrap();
}

#[test]
fn every_rank_gets_the_same_collectives() {
    let model = pre(&device());
    let graph = capture_step(&model, tokens(0), lm_loss).unwrap();
    let plan = Plan::megatron();
    let layouts: Vec<Layout> = graph.params.iter().map(|param| plan.layout(&param.path)).collect();
    for degree in [2, 4] {
        let parts: Vec<_> = (0..degree)
            .map(|rank| {
                let options = PartitionOptions::new("tp", degree, rank);
                partition(&graph, &layouts, &[Layout::Replicated; 2], &options).unwrap().0
            })
            .collect();
        assert_ne!(parts[0].collective_fingerprint(), graph.collective_fingerprint());
        assert!(parts.iter().all(|part| part.collective_fingerprint() == parts[0].collective_fingerprint()));
        assert!(parts.iter().all(|part| part.operations.len() == parts[0].operations.len()));
    }
}

#[test]
fn plans_that_do_not_fit() {
    let model = NormedMlp::new(&device());
    let problem = |plan: Plan, degree| match plan.table(&model, degree) {
        Err(Error::Plan { problem }) => problem,
        other => panic!("{other:?}"),
    };
    let said = problem(Plan::new().shard("nothing.*", 0), 2);
    assert!(said.contains("`nothing.*`") && said.contains("first.weight"), "{said}");
    let said = problem(Plan::new().shard("first.bias", 1), 2);
    assert!(said.contains("`first.bias` of dims [24]") && said.contains("no dim 1"), "{said}");
    let said = problem(Plan::new().shard("second.*", 0), 5);
    assert!(said.contains("`second.weight` of dims [24, 36]") && said.contains("5 does not divide 24"), "{said}");
    assert!(problem(Plan::megatron(), 2).contains("none of the parameters"));

    // The first rule that matches counts.
    let plan = Plan::new().replicate("first.*").shard("*.weight", 0);
    let table = plan.table(&model, 3).unwrap();
    assert_eq!(table.rows()[0].layouts, [Layout::Replicated]);
    let text = table.to_string();
    assert!(text.contains("second.weight  [24, 36]  sharded along dim 0  [8, 36]"), "{text}");
}

#[test]
fn an_input_that_is_not_there() {
    let plan = Plan::new().shard_input("2", 0);
    let error = launch::threads(2)
        .run(|rank| {
            let mut model = NormedMlp::new(&device()).tensor_parallel(&rank, &plan)?;
            model.step(rows(0), NormedMlp::loss).map(drop)
        })
        .unwrap_err();
    assert!(error.to_string().contains("no input `2`"), "{error}");
}

#[test]
fn ranks_with_different_plans() {
    let error = launch::threads(3)
        .run(|rank| {
            let plan = Plan::new().shard("first.weight", usize::from(rank.rank() == 2));
            NormedMlp::new(&device()).tensor_parallel(&rank, &plan).map(drop)
        })
        .unwrap_err();
    assert!(matches!(error, Error::ModelMismatch { rank: 2, .. }), "{error}");
}
