//! Models cut into pipeline stages train like one device, whatever the schedule.

#[path = "graph/models.rs"]
#[allow(dead_code)]
mod models;

use std::collections::BTreeMap;

use burn::backend::Flex;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::graph::GraphInputs;
use burn_parallel::pipeline_parallel::Pipelined;
use burn_parallel::prelude::*;
use models::{Cnn, Lm, Numbers, Tied, cross_entropy, device, images, scalar};

type Values = BTreeMap<String, Vec<f32>>;

#[derive(Default)]
struct Floats<'a> {
    gradients: Option<&'a GradientsParams>,
    path: Vec<String>,
    values: Values,
}

impl ModuleVisitor for Floats<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = match self.gradients {
            None => Some(param.val().inner()),
            Some(gradients) => gradients.get::<D>(param.id),
        };
        if let Some(value) = value {
            self.values.insert(self.path.join("."), value.into_data().try_to_vec().unwrap());
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

fn values<M: Module>(model: &M) -> Values {
    let mut floats = Floats::default();
    model.valid().visit(&mut floats);
    floats.values
}

fn gradients<M: Module>(model: &M, gradients: &GradientsParams) -> Values {
    let mut floats = Floats { gradients: Some(gradients), ..Floats::default() };
    model.visit(&mut floats);
    floats.values
}

/// The bytes of the buffers behind all initialized parameters.
#[derive(Default)]
struct Bytes {
    bytes: BTreeMap<String, usize>,
    lazy: usize,
}

impl ModuleVisitor for Bytes {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_initialized() {
            self.lazy += 1;
            return;
        }
        let buffer = param.val().inner().try_into_primitive::<Flex>().unwrap();
        self.bytes.insert(param.id.to_string(), buffer.bytes().len());
    }
}

fn bytes<M: Module>(model: &M) -> Bytes {
    let mut bytes = Bytes::default();
    model.visit(&mut bytes);
    bytes
}

/// The same numbers in every model of the same structure.
struct Fill(Numbers);

impl ModuleMapper for Fill {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, mapper) = param.consume();
        if !value.is_require_grad() {
            return Param::from_mapped_value(id, value, mapper);
        }
        let dims = value.dims();
        let scale = if D > 1 { 1.0 / (dims[0] as f32).sqrt() } else { 0.5 };
        let new = self.0.tensor::<D>(dims, &value.device()) * scale + if D == 1 { 0.3 } else { 0.0 };
        Param::from_mapped_value(id, new.detach().require_grad(), mapper)
    }
}

fn filled<M: Module>(model: M) -> M {
    model.train().map(&mut Fill(Numbers(7)))
}

#[track_caller]
fn same(what: &str, expected: &Values, found: &Values, tolerance: f32) {
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{what}");
    for (path, expected) in expected {
        let found = &found[path];
        assert_eq!(expected.len(), found.len(), "{what}: `{path}`");
        let scale = expected.iter().fold(1e-2f32, |most, x| most.max(x.abs()));
        let worst = expected.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / scale;
        assert!(worst <= tolerance, "{what}: `{path}` differs by {worst}");
    }
}

fn optimizer() -> ModuleOptimizer {
    // Gradients that are 0 but for rounding, as that of a key's bias, must not be blown up.
    AdamWConfig::new().with_weight_decay(0.01).with_epsilon(1e-2).init()
}

struct Reference {
    loss: f32,
    gradients: Values,
    after: Values,
}

/// What one device does on the whole batch.
fn reference<M: Module, I>(
    make: impl Fn() -> M,
    batch: fn(u64) -> I,
    loss: fn(&M, I) -> Tensor<1>,
    steps: u64,
) -> Vec<Reference> {
    let mut model = filled(make());
    let mut optim = optimizer();
    let mut done = Vec::new();
    for step in 0..steps {
        let (loss, grads) = models::eager(&model, |m| loss(m, batch(step)));
        let gradients = gradients(&model, &grads);
        model = optim.step(0.05, model, grads);
        done.push(Reference { loss, gradients, after: values(&model) });
    }
    done
}

/// Trains as a pipeline and compares everything with one device.
fn compare<M: Module, I: GraphInputs + Clone>(
    make: impl Fn() -> M + Sync,
    batch: fn(u64) -> I,
    loss: fn(&M, I) -> Tensor<1>,
    ranks: usize,
    config: &PipelineConfig,
    references: &[Reference],
) -> Result<(), Error> {
    let held = launch::threads(ranks).run(|rank| {
        let mut model: Pipelined<M> = filled(make()).pipeline_parallel(&rank, config.clone())?;
        let mut optim = optimizer();
        let mut held = 0;
        for (step, reference) in references.iter().enumerate() {
            let what = format!("rank {} of {ranks}, step {step}, {:?}", rank.rank(), config.schedule);
            let result = model.step(batch(step as u64), loss)?;
            let (found, expected) = (result.loss as f32, reference.loss);
            assert!((found - expected).abs() <= 1e-4 * expected.abs(), "{what}: {found} {expected}");
            let mine = gradients(&model, &result.grads);
            let expected: Values = reference
                .gradients
                .iter()
                .filter(|(path, _)| mine.contains_key(*path))
                .map(|(p, v)| (p.clone(), v.clone()))
                .collect();
            same(&format!("gradients, {what}"), &expected, &mine, 3e-4);
            // Every gradient is somewhere.
            let mut anywhere = Vec::new();
            for path in reference.gradients.keys() {
                anywhere.push(u64::from(mine.contains_key(path)));
            }
            assert!(rank.all_reduce(anywhere, ReduceOp::Max)?.iter().all(|found| *found == 1), "{what}");
            model = optim.step(0.05, model, result.grads);
            same(&format!("after, {what}"), &reference.after, &values(&model.assemble()?), 3e-4);
            held = bytes(model.local()).bytes.values().sum();
        }
        let report = model.report().ok_or_else(|| Error::user("the model was not cut"))?;
        Ok((held, report))
    })?;
    // Nobody holds more than its stages, and together they hold the model.
    let report = &held[0].1;
    let stages = config.schedule.timetable(ranks, config.micro_batches)?;
    for (rank, (held, other)) in held.iter().enumerate() {
        assert_eq!(other, report);
        let own: u64 = stages.stages_of(rank).iter().map(|stage| report.stages[*stage].param_bytes).sum();
        if report.tied.is_empty() {
            assert_eq!(*held as u64, own, "rank {rank}");
        }
    }
    Ok(())
}

fn lm() -> Lm {
    Lm::new(13, 8, 3, &device())
}

fn tokens(seed: u64) -> (Tensor<2, Int>, Tensor<2, Int>) {
    rows_of_tokens(8, seed)
}

fn rows_of_tokens(rows: usize, seed: u64) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let mut numbers = Numbers(seed + 3);
    (numbers.classes([rows, 5], 11, &device()), numbers.classes([rows, 5], 11, &device()))
}

fn lm_loss(model: &Lm, (x, y): (Tensor<2, Int>, Tensor<2, Int>)) -> Tensor<1> {
    model.loss(x, y)
}

fn schedules() -> [Schedule; 4] {
    [
        Schedule::GPipe,
        Schedule::OneForwardOneBackward,
        Schedule::Interleaved { stages_per_rank: 2 },
        Schedule::ZeroBubbleH1,
    ]
}

#[test]
fn a_transformer_trains_alike_with_every_schedule_on_2_3_and_4_ranks() {
    let references = reference(lm, tokens, lm_loss, 3);
    for ranks in [1, 2, 3, 4] {
        for schedule in schedules() {
            // Interleaved schedules want as many micro-batches as ranks, or a multiple.
            let config = PipelineConfig::new(if ranks == 3 { 6 } else { 8 }).with_schedule(schedule);
            compare(lm, tokens, lm_loss, ranks, &config, &references).unwrap();
        }
    }
}

#[test]
fn uneven_and_few_micro_batches_train_alike() {
    let batch = |seed| rows_of_tokens(7, seed);
    let references = reference(lm, batch, lm_loss, 2);
    for (ranks, micro_batches) in [(2, 3), (3, 2), (4, 1), (2, 7), (3, 5)] {
        for schedule in [Schedule::GPipe, Schedule::OneForwardOneBackward, Schedule::ZeroBubbleH1] {
            let config = PipelineConfig::new(micro_batches).with_schedule(schedule);
            compare(lm, batch, lm_loss, ranks, &config, &references).unwrap();
        }
    }
}

fn tied() -> Tied {
    Tied::new(&device())
}

fn tied_loss(model: &Tied, (x, y): (Tensor<2, Int>, Tensor<2, Int>)) -> Tensor<1> {
    model.loss(x, y)
}

#[test]
fn tied_weights_on_two_ranks_stay_one() {
    let references = reference(tied, tokens, tied_loss, 4);
    // The embedding is read by the first stage and, as the head, by the last.
    let cut = Cut::patterns([vec!["embedding*"], vec!["inner*"]]);
    for schedule in [Schedule::GPipe, Schedule::OneForwardOneBackward, Schedule::ZeroBubbleH1] {
        let config = PipelineConfig::new(4).with_schedule(schedule).with_cut(cut.clone());
        compare(tied, tokens, tied_loss, 2, &config, &references).unwrap();
    }
    let reports = launch::threads(2).run(|rank| {
        let config = PipelineConfig::new(4).with_cut(cut.clone());
        let mut model = filled(tied()).pipeline_parallel(&rank, config)?;
        let before = bytes(model.local()).bytes.values().sum::<usize>();
        model.prepare(tokens(0), tied_loss)?;
        let mut optim = optimizer();
        for step in 0..3 {
            let result = model.step(tokens(step), tied_loss)?;
            model = optim.step(0.05, model, result.grads);
        }
        Ok((before, values(model.local())["embedding.weight"].clone(), model.report()))
    });
    let reports = reports.unwrap();
    // Before the step is known the second rank does not have the embedding; then both have it, to the last bit.
    assert_eq!(reports[0].0, 11 * 6 * 4);
    assert_eq!(reports[1].0, 6 * 6 * 4 + 6 * 4);
    assert_eq!(reports[0].1, reports[1].1);
    assert_eq!(reports[0].2.as_ref().unwrap().tied, [("embedding.weight".to_owned(), vec![0, 1])]);
}

#[test]
fn lazy_parameters_of_other_stages_are_never_made() {
    let make = || -> Vec<Linear> { (0..4).map(|_| LinearConfig::new(6, 6).init(&device())).collect() };
    launch::threads(2)
        .run(|rank| {
            let forward = |model: &Vec<Linear>, x: Tensor<2>| {
                let y = model.iter().fold(x, |x, layer| activation::tanh(layer.forward(x)));
                y.powi_scalar(2).mean()
            };
            for by_path in [true, false] {
                let cut = if by_path { Cut::before(["2.*"]) } else { Cut::Balanced };
                let mut model = make().pipeline_parallel(&rank, PipelineConfig::new(2).with_cut(cut))?;
                let wrapped = bytes(model.local());
                assert_eq!(wrapped.bytes.values().sum::<usize>(), 0);
                assert_eq!(wrapped.lazy, if by_path { 4 } else { 8 });
                model.prepare(Tensor::ones([4, 6], &device()), forward)?;
                let cut = bytes(model.local());
                assert_eq!(cut.bytes.values().sum::<usize>(), 0);
                assert!(cut.lazy % 2 == 0 && (2..8).contains(&cut.lazy));
                model.step(Tensor::ones([4, 6], &device()), forward)?;
                let stepped = bytes(model.local());
                assert_eq!((stepped.bytes.values().sum::<usize>(), stepped.lazy), (cut.lazy / 2 * (36 + 6) * 4, 0));
                let all = rank.all_reduce(vec![cut.lazy as u64], ReduceOp::Sum)?;
                assert_eq!(all, [8]);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn token_losses_count_what_is_real() {
    // Rows of different numbers of real tokens, so that a mean of means would be wrong.
    fn loss(model: &Lm, (x, y): (Tensor<2, Int>, Tensor<2, Int>)) -> TokenLoss {
        let [b, s] = x.dims();
        let real = y.clone().greater_elem(3).float().reshape([b * s]);
        let x = model.position.forward(model.embedding.forward(x)).reshape([b * s, 8]);
        let logits = activation::log_softmax(model.head.forward(model.norm.forward(x)), 1);
        let nats = logits.gather(1, y.reshape([b * s, 1])).reshape([b * s]).neg();
        TokenLoss::new((nats * real.clone()).sum(), real.sum())
    }
    let whole = {
        let model = filled(lm());
        let step = burn_parallel::graph::Executor::new(
            burn_parallel::graph::capture_step(&model, tokens(5), loss).unwrap(),
            burn_parallel::graph::CustomOps::new(),
        );
        let step = step.unwrap().step(&model, tokens(5)).unwrap();
        (f64::from(scalar(step.loss)), step.weight, gradients(&model, &step.gradients))
    };
    launch::threads(2)
        .run(|rank| {
            let mut model = filled(lm()).pipeline_parallel(&rank, PipelineConfig::new(3))?;
            let step = model.step(tokens(5), loss)?;
            assert_eq!(step.weight, whole.1);
            assert!((step.loss - whole.0).abs() < 1e-5 * whole.0, "{} {}", step.loss, whole.0);
            let mine = gradients(&model, &step.grads);
            let expected = whole.2.iter().filter(|(path, _)| mine.contains_key(*path));
            same("gradients", &expected.map(|(p, v)| (p.clone(), v.clone())).collect(), &mine, 1e-4);
            Ok(())
        })
        .unwrap();
}

#[test]
fn evaluation_gives_the_whole_output_on_every_rank() {
    let expected = {
        let model = filled(lm()).valid();
        let (x, _) = rows_of_tokens(7, 1);
        let x = model.position.forward(model.embedding.forward(x.inner()));
        let x = model.encoder.forward(burn::nn::transformer::TransformerEncoderInput::new(x));
        model.head.forward(model.norm.forward(x)).into_data().try_to_vec::<f32>().unwrap()
    };
    launch::threads(3)
        .run(|rank| {
            let config = PipelineConfig::new(3).with_schedule(Schedule::Interleaved { stages_per_rank: 2 });
            let mut model = filled(lm()).pipeline_parallel(&rank, config)?;
            let early = model.forward_with(rows_of_tokens(7, 1).0, |model, x| model.embedding.forward(x));
            assert!(matches!(early, Err(Error::Pipeline { .. })));
            model.prepare(tokens(0), lm_loss)?;
            let logits = model.forward_with(rows_of_tokens(7, 1).0, |model, x| {
                let x = model.position.forward(model.embedding.forward(x));
                let x = model.encoder.forward(burn::nn::transformer::TransformerEncoderInput::new(x));
                model.head.forward(model.norm.forward(x))
            })?;
            assert_eq!(logits.dims(), [7, 5, 13]);
            let found = logits.into_data().try_to_vec::<f32>().unwrap();
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5));
            Ok(())
        })
        .unwrap();
}

#[test]
fn running_statistics_take_a_step_for_each_micro_batch() {
    let loss = |model: &Cnn, (x, y): (Tensor<4>, Tensor<1, Int>)| model.loss(x, y);
    let expected = {
        // One device that accumulates over the same micro-batches.
        let model = filled(Cnn::new(&device()));
        let (x, y) = images(5, 3, &device());
        for rows in [0..3, 3..5] {
            let _ = loss(&model, (x.clone().slice([rows.clone()]), y.clone().slice([rows])));
        }
        values(&model)
    };
    let found = launch::threads(2).run(|rank| {
        // Threads share running statistics between clones of a model, so each makes its own.
        let mut model = filled(Cnn::new(&device())).pipeline_parallel(&rank, PipelineConfig::new(2))?;
        model.step(images(5, 3, &device()), loss)?;
        Ok(values(&model.assemble()?))
    });
    for found in found.unwrap() {
        same("running statistics", &expected, &found, 1e-5);
    }
}

/// The first rank's error is everybody's.
fn refused(ranks: usize, config: PipelineConfig, batch: fn(u64) -> (Tensor<2, Int>, Tensor<2, Int>)) -> Error {
    launch::threads(ranks)
        .run(|rank| {
            let mut model = lm().pipeline_parallel(&rank, config.clone())?;
            model.step(batch(0), lm_loss)?;
            Ok(())
        })
        .unwrap_err()
}

#[test]
fn what_makes_no_sense_is_refused_with_the_numbers() {
    let says = |error: Error, words: &[&str]| {
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    says(refused(2, PipelineConfig::new(0), tokens), &["0"]);
    says(refused(2, PipelineConfig::new(9), tokens), &["8 rows", "9 micro-batches"]);
    let by = |cut| PipelineConfig::new(2).with_cut(cut);
    says(refused(2, by(Cut::patterns([vec!["*"]])), tokens), &["1 pipeline stages", "2"]);
    says(refused(2, by(Cut::patterns([vec!["nothing*"], vec!["*"]])), tokens), &["`nothing*`", "none"]);
    says(refused(2, by(Cut::patterns([vec!["embedding*"], vec!["head*"]])), tokens), &["no pattern", "encoder"]);
    says(refused(2, by(Cut::before(["norm*", "head*"])), tokens), &["1 boundaries", "2 patterns"]);
    says(refused(3, by(Cut::before(["head*", "norm*"])), tokens), &["`norm*`", "does not come after"]);
    says(refused(2, by(Cut::listed([("head.weight", 0)])), tokens), &["does not list"]);
    says(refused(2, by(Cut::listed([("foot.weight", 0)])), tokens), &["`foot.weight`"]);
    // The head before the encoder.
    says(refused(2, by(Cut::patterns([vec!["head*"], vec!["*"]])), tokens), &["`head.weight`", "stage 0", "stage 1"]);
    let whole = |path: &str| PipelineConfig::new(2).with_whole_input(path);
    says(refused(2, whole("7"), tokens), &["`7`"]);
    says(refused(2, whole("0").with_whole_input("1"), tokens), &["no input whose rows"]);
    let uneven = |seed| (rows_of_tokens(8, seed).0, rows_of_tokens(6, seed).1);
    says(refused(2, PipelineConfig::new(2), uneven), &["6 rows", "8", "with_whole_input"]);
}

#[test]
fn ranks_with_other_configurations_are_found_out() {
    let error = launch::threads(2)
        .run(|rank| {
            lm().pipeline_parallel(&rank, PipelineConfig::new(2 + rank.rank()))?;
            Ok(())
        })
        .unwrap_err();
    assert!(error.to_string().contains("micro-batches"), "{error}");
    let error = launch::threads(2)
        .run(|rank| {
            let cut = if rank.rank() == 0 { Cut::Balanced } else { Cut::before(["norm*"]) };
            lm().pipeline_parallel(&rank, PipelineConfig::new(2).with_cut(cut))?;
            Ok(())
        })
        .unwrap_err();
    assert!(matches!(&error, Error::ModelMismatch { path, .. } if path.contains("cut")), "{error}");
}

#[test]
fn a_stage_that_fails_ends_every_rank_with_its_error() {
    for failing in [0, 1] {
        let errors = std::sync::Mutex::new(Vec::new());
        let error = launch::threads(2)
            .run(|rank| {
                let mut model = filled(lm()).pipeline_parallel(&rank, PipelineConfig::new(4))?;
                model.step(tokens(0), lm_loss)?;
                let (x, y) = tokens(1);
                // No such token: the embedding fails on the first rank, the loss on the last.
                let (x, y) = if failing == 0 { (x + 1000, y) } else { (x, y + 1000) };
                let failed = model.step((x, y), lm_loss).unwrap_err();
                errors.lock().unwrap().push(failed.clone());
                Err::<(), _>(failed)
            })
            .unwrap_err();
        let errors = errors.into_inner().unwrap();
        assert_eq!(errors, [error.clone(), error.clone()]);
        let action = if failing == 0 { "0F0" } else { "1F0" };
        assert!(matches!(&error, Error::Stage { rank, action: a, .. } if *rank == failing && a == action), "{error}");
    }
}

#[test]
fn dropout_does_not_depend_on_ranks_and_schedules() {
    let make = || burn::nn::transformer::TransformerEncoderConfig::new(8, 16, 2, 3).with_dropout(0.4).init(&device());
    let losses = |ranks: usize, config: PipelineConfig| {
        let run = launch::threads(ranks).run(|rank| {
            let mut model = filled(make()).pipeline_parallel(&rank, config.clone())?;
            let mut losses = Vec::new();
            for _ in 0..2 {
                let step = model.step(Numbers(2).tensor([6, 4, 8], &device()), |model, x: Tensor<3>| {
                    let x = model.forward(burn::nn::transformer::TransformerEncoderInput::new(x));
                    x.powi_scalar(2).mean()
                })?;
                losses.push(step.loss);
            }
            Ok(losses)
        });
        run.unwrap().swap_remove(0)
    };
    let alone = losses(1, PipelineConfig::new(3));
    // Neither do steps draw the same numbers.
    assert!((alone[0] - alone[1]).abs() > 1e-6);
    for schedule in schedules() {
        for ranks in [2, 3] {
            let found = losses(ranks, PipelineConfig::new(3).with_schedule(schedule.clone()));
            assert!(found.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-5), "{schedule:?}: {found:?} {alone:?}");
        }
    }
    let other = losses(2, PipelineConfig::new(3).with_seed(1));
    assert!((other[0] - alone[0]).abs() > 1e-6);
    // Micro-batches of the same rows draw other numbers: their outputs, on the rank that computes them, differ.
    let outputs = launch::threads(2).run(|rank| {
        let mut model = filled(make()).pipeline_parallel(&rank, PipelineConfig::new(3))?;
        let step = model.step(Tensor::<3>::ones([3, 4, 8], &device()), |model, x| {
            let x = model.forward(burn::nn::transformer::TransformerEncoderInput::new(x));
            (x.clone().powi_scalar(2).mean(), x.powi_scalar(2).mean())
        })?;
        let of = |outputs: &Vec<burn_parallel::tensor::PlainTensor>| scalar(outputs[0].clone().float().unwrap());
        Ok(step.outputs.iter().map(of).collect::<Vec<f32>>())
    });
    let outputs = outputs.unwrap();
    assert!(outputs[0].is_empty());
    assert_eq!(outputs[1].len(), 3);
    assert!(outputs[1][0] != outputs[1][1] && outputs[1][1] != outputs[1][2], "{outputs:?}");
}

#[test]
fn live_activations_are_what_the_schedule_promises() {
    let peaks = |schedule: Schedule| {
        let run = launch::threads(3).run(|rank| {
            let config = PipelineConfig::new(6).with_schedule(schedule.clone());
            let mut model = filled(lm()).pipeline_parallel(&rank, config)?;
            let (x, y) = rows_of_tokens(6, 1);
            Ok(model.step((x, y), lm_loss)?.report.peak_activations_of_rank)
        });
        run.unwrap()
    };
    assert_eq!(peaks(Schedule::GPipe), [6, 6, 6]);
    assert_eq!(peaks(Schedule::OneForwardOneBackward), [3, 2, 1]);
}

#[test]
fn more_stages_than_parameters_work() {
    let make = || LinearConfig::new(5, 11).init(&device());
    fn batch(seed: u64) -> (Tensor<2>, Tensor<1, Int>) {
        let mut numbers = Numbers(seed);
        (numbers.tensor([6, 5], &device()), numbers.classes([6], 11, &device()))
    }
    let loss = |model: &Linear, (x, y)| cross_entropy(model.forward(x), y);
    let references = reference(make, batch, loss, 2);
    for schedule in [Schedule::GPipe, Schedule::OneForwardOneBackward, Schedule::ZeroBubbleH1] {
        compare(make, batch, loss, 4, &PipelineConfig::new(3).with_schedule(schedule), &references).unwrap();
    }
}

#[test]
fn pipelines_of_split_models_with_replicas_train_alike() {
    let references = reference(lm, tokens, lm_loss, 3);
    launch::threads(8)
        .run(|world| {
            let mesh = Mesh::new(&world, [("dp", 2), ("pp", 2), ("tp", 2)])?;
            let (dp, pp, tp) = (mesh.axis("dp")?, mesh.axis("pp")?, mesh.axis("tp")?);
            let config = PipelineConfig::new(2).with_cut(Cut::before(["encoder.layers.1.*"]));
            let mut model = filled(lm())
                .tensor_parallel(&tp, &Plan::megatron())?
                .pipeline_parallel(&pp, config)?
                .data_parallel(&dp, DataParallelConfig::new())?;
            let mut optim = optimizer();
            for (step, reference) in references.iter().enumerate() {
                let (x, y) = tokens(step as u64);
                let rows = 4 * dp.rank()..4 * dp.rank() + 4;
                let share = (x.slice([rows.clone()]), y.slice([rows]));
                let result = model.step(share, lm_loss)?;
                assert!((result.loss as f32 - reference.loss).abs() < 1e-4 * reference.loss);
                model = optim.step(0.05, model, result.grads);
                same("after", &reference.after, &values(&model.assemble()?), 3e-4);
            }
            Ok(())
        })
        .unwrap();
}
