//! Models cut into pipeline stages train like one device, whatever the schedule.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::pipeline_parallel::schedule::Routes;
use burn_parallel::prelude::*;

use super::compare::compare;
use crate::common::models::{Cnn, Lm, Numbers, Tied, Tokens, cross_entropy, device, images, scalar};
use crate::common::reference::{all_same, bytes, filled, gradient_values, optimizer, reference, values};

pub fn lm() -> Lm {
    Lm::new(13, 8, 3, &device())
}

pub fn tokens(seed: u64) -> Tokens {
    rows_of_tokens(8, seed)
}

pub fn rows_of_tokens(rows: usize, seed: u64) -> Tokens {
    let mut numbers = Numbers(seed + 3);
    (numbers.classes([rows, 5], 11, &device()), numbers.classes([rows, 5], 11, &device()))
}

pub fn lm_loss(model: &Lm, (x, y): Tokens) -> Tensor<1> {
    model.loss(x, y)
}

pub fn schedules() -> [Schedule; 4] {
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
        for schedule in schedules() {
            let config = PipelineConfig::new(micro_batches).with_schedule(schedule);
            compare(lm, batch, lm_loss, ranks, &config, &references).unwrap();
        }
    }
}

pub fn tied() -> Tied {
    Tied::new(&device())
}

pub fn tied_loss(model: &Tied, (x, y): Tokens) -> Tensor<1> {
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
        Ok((before, values(model.local())["embedding.weight"].clone(), model.report().cut))
    });
    let reports = reports.unwrap();
    // Before the step is known the second rank does not have the embedding; then both have it, to the last bit.
    assert_eq!(reports[0].0, 11 * 6 * 4);
    assert_eq!(reports[1].0, 6 * 6 * 4 + 6 * 4);
    assert_eq!(reports[0].1, reports[1].1);
    assert_eq!(reports[0].2.as_ref().unwrap().tied, [("embedding.weight".to_owned(), vec![0, 1])]);
}

#[test]
fn token_losses_count_what_is_real() {
    // Rows of different numbers of real tokens, so that a mean of means would be wrong.
    fn loss(model: &Lm, (x, y): Tokens) -> Loss {
        let [b, s] = x.dims();
        let real = y.clone().greater_elem(3).float().reshape([b * s]);
        let x = model.embed(x).reshape([b * s, 8]);
        let logits = activation::log_softmax(model.head.forward(model.norm.forward(x)), 1);
        let nats = logits.gather(1, y.reshape([b * s, 1])).reshape([b * s]).neg();
        Loss::sum((nats * real.clone()).sum(), real.sum())
    }
    let whole = {
        let model = filled(lm());
        let step = burn_parallel::graph::Executor::new(
            burn_parallel::graph::capture_step(&model, tokens(5), loss).unwrap(),
            burn_parallel::graph::CustomOps::new(),
        );
        let step = step.unwrap().step(&model, tokens(5)).unwrap();
        (f64::from(scalar(step.loss)), step.weight, gradient_values(&model, &step.gradients))
    };
    launch::threads(2)
        .run(|rank| {
            let mut model = filled(lm()).pipeline_parallel(&rank, PipelineConfig::new(3))?;
            let step = model.step(tokens(5), loss)?;
            assert_eq!(step.weight, whole.1);
            let loss = step.loss.item();
            assert!((loss - whole.0).abs() < 1e-5 * whole.0, "{loss} {}", whole.0);
            let mine = gradient_values(&model, &step.grads);
            let expected = whole.2.iter().filter(|(path, _)| mine.contains_key(*path));
            all_same("gradients", &expected.map(|(p, v)| (p.clone(), v.clone())).collect(), &mine, 1e-4);
            Ok(())
        })
        .unwrap();
}

#[test]
fn evaluation_gives_the_whole_output_on_every_rank() {
    let expected = {
        let model = filled(lm()).valid();
        let (x, _) = rows_of_tokens(7, 1);
        model.logits(x.inner()).into_data().try_to_vec::<f32>().unwrap()
    };
    launch::threads(3)
        .run(|rank| {
            let config = PipelineConfig::new(3).with_schedule(Schedule::Interleaved { stages_per_rank: 2 });
            let mut model = filled(lm()).pipeline_parallel(&rank, config)?;
            let early = model.forward_with(rows_of_tokens(7, 1).0, |model, x| model.embedding.forward(x));
            assert!(matches!(early, Err(Error::Pipeline { .. })));
            model.prepare(tokens(0), lm_loss)?;
            let logits = model.forward_with(rows_of_tokens(7, 1).0, |model, x| model.logits(x))?;
            assert_eq!(logits.dims(), [7, 5, 13]);
            let found = logits.into_data().try_to_vec::<f32>().unwrap();
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5));
            Ok(())
        })
        .unwrap();
}

#[test]
fn wherever_a_trained_model_was_cut_it_can_be_evaluated() {
    // With many stages some are cut beside a normalisation.
    for stages_per_rank in [2, 3, 4, 6, 9] {
        launch::threads(2)
            .run(|rank| {
                let config = PipelineConfig::new(2).with_schedule(Schedule::Interleaved { stages_per_rank });
                let mut model = filled(lm()).pipeline_parallel(&rank, config)?;
                model.prepare(tokens(0), lm_loss)?;
                let logits = model.forward_with(rows_of_tokens(4, 1).0, Lm::logits)?;
                assert_eq!(logits.dims(), [4, 5, 13]);
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{stages_per_rank} stages a rank: {error}"));
    }
}

#[test]
fn a_record_of_another_run_is_told_where_to_be_loaded() {
    let record = filled(lm()).into_record();
    launch::threads(2)
        .run(|rank| {
            let model = filled(lm()).pipeline_parallel(&rank, PipelineConfig::new(2))?;
            let mut loaded = model.load_record(record.clone());
            let error = loaded.step(tokens(0), lm_loss).unwrap_err().to_string();
            assert!(error.contains("is not the one that was wrapped"), "{error}");
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_model_is_evaluated_that_was_never_trained() {
    let expected = {
        let (x, _) = rows_of_tokens(6, 1);
        filled(lm()).valid().logits(x.inner()).into_data().try_to_vec::<f32>().unwrap()
    };
    let references = reference(lm, tokens, lm_loss, 1);
    launch::threads(2)
        .run(|rank| {
            let mut model = filled(lm()).pipeline_parallel(&rank, PipelineConfig::new(2))?;
            let before = bytes(model.local()).bytes.values().sum::<usize>();
            model.prepare_forward(rows_of_tokens(6, 1).0, Lm::logits)?;
            let report = model.report().cut.unwrap();
            let held = bytes(model.local()).bytes.values().sum::<usize>();
            assert_eq!(held as u64, report.stages[rank.rank()].param_bytes);
            assert!(held < before);
            // Nothing goes back.
            assert!(report.crossings.iter().all(|crossing| crossing.from < crossing.to), "{report}");
            let logits = model.forward_with(rows_of_tokens(6, 1).0, Lm::logits)?;
            let found = logits.into_data().try_to_vec::<f32>().unwrap();
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5));
            // A step that is trained later keeps to the cut.
            let step = model.step(tokens(0), lm_loss)?;
            assert!((step.loss.item() as f32 - references[0].loss).abs() < 1e-4);
            assert_eq!(bytes(model.local()).bytes.values().sum::<usize>(), held);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_schedule_without_backward_gives_the_loss_and_no_gradient() {
    let references = reference(tied, tokens, tied_loss, 1);
    launch::threads(2)
        .run(|rank| {
            let config = PipelineConfig::new(4)
                .with_schedule(Schedule::ForwardOnly { stages_per_rank: 1 })
                .with_cut(Cut::patterns([vec!["embedding*"], vec!["inner*"]]));
            let mut model = filled(tied()).pipeline_parallel(&rank, config)?;
            let step = model.step(tokens(0), tied_loss)?;
            assert!((step.loss.item() as f32 - references[0].loss).abs() < 1e-4);
            assert_eq!((step.grads.len(), step.runs[0].peak_activations_of_rank), (0, 0));
            Ok(())
        })
        .unwrap();
}

#[test]
fn measured_costs_cut_a_model_that_trains_alike() {
    let references = reference(lm, tokens, lm_loss, 2);
    for ranks in [2, 3] {
        let config = PipelineConfig::new(3);
        let costs = launch::threads(ranks)
            .run(|rank| {
                let model = Lm::lazy(13, 8, 3, &device()).pipeline_parallel(&rank, config.clone())?;
                let costs = model.measure(tokens(0), lm_loss, 2)?;
                // No parameter is needed.
                assert_eq!(bytes(model.local()).bytes.values().sum::<usize>(), 0);
                assert!(!model.is_cut());
                rank.broadcast(costs, 0)
            })
            .unwrap()
            .swap_remove(0);
        compare(lm, tokens, lm_loss, ranks, &config.with_cut(Cut::Measured(costs)), &references).unwrap();
    }
    // Ranks that bring costs of their own are found out.
    let error = launch::threads(2)
        .run(|rank| {
            let model = lm().pipeline_parallel(&rank, PipelineConfig::new(2))?;
            let costs = model.measure(tokens(0), lm_loss, 1)?;
            let costs = costs.into_iter().map(|cost| cost + rank.rank() as f64).collect();
            let config = PipelineConfig::new(2).with_cut(Cut::Measured(costs));
            lm().pipeline_parallel(&rank, config).map(|_| ())
        })
        .unwrap_err();
    assert!(matches!(&error, Error::ModelMismatch { path, .. } if path.contains("cut")), "{error}");
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
        all_same("running statistics", &expected, &found, 1e-5);
    }
}

/// The first rank's error is everybody's.
fn refused(ranks: usize, config: PipelineConfig, batch: fn(u64) -> Tokens) -> Error {
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
    says(refused(2, PipelineConfig::new(usize::MAX), tokens), &["fewer micro-batches"]);
    let by = |cut| PipelineConfig::new(2).with_cut(cut);
    says(refused(2, by(Cut::patterns([vec!["*"]])), tokens), &["1 pipeline stages", "2"]);
    says(refused(2, by(Cut::patterns([vec!["nothing*"], vec!["*"]])), tokens), &["`nothing*`", "none"]);
    says(refused(2, by(Cut::patterns([vec!["embedding*"], vec!["head*"]])), tokens), &["no pattern", "encoder"]);
    says(refused(2, by(Cut::before(["norm*", "head*"])), tokens), &["1 boundaries", "2 patterns"]);
    says(refused(3, by(Cut::before(["head*", "norm*"])), tokens), &["`norm*`", "does not come after"]);
    says(refused(2, by(Cut::listed([("head.weight", 0)])), tokens), &["does not list"]);
    says(refused(2, by(Cut::Measured(vec![1.0; 3])), tokens), &["costs of 3 operations"]);
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
                losses.push(step.loss.item());
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
    // A model that is wrapped again goes on from the step that it is told.
    let second = launch::threads(2).run(|rank| {
        let mut model = filled(make()).pipeline_parallel(&rank, PipelineConfig::new(3))?;
        assert_eq!(model.random_step(), 0);
        model.set_random_step(3);
        let step = model.step(Numbers(2).tensor([6, 4, 8], &device()), |model, x: Tensor<3>| {
            let x = model.forward(burn::nn::transformer::TransformerEncoderInput::new(x));
            x.powi_scalar(2).mean()
        })?;
        assert_eq!(model.random_step(), 6, "micro-batches count");
        Ok(step.loss.item())
    });
    assert!((second.unwrap()[0] - alone[1]).abs() < 1e-5);
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
            let report = model.step((x, y), lm_loss)?.runs.remove(0);
            let timetable = model.timetable();
            let promised = timetable.validate(&Routes::chain(timetable.stages()))?;
            for (stage, peak) in &report.peak_activations {
                assert_eq!(*peak, promised.per_stage[*stage], "{schedule:?}, stage {stage}");
            }
            assert_eq!(report.peak_activations_of_rank, promised.per_rank[rank.rank()], "{schedule:?}");
            Ok(report.peak_activations_of_rank)
        });
        run.unwrap()
    };
    assert_eq!(peaks(Schedule::GPipe), [6, 6, 6]);
    assert_eq!(peaks(Schedule::OneForwardOneBackward), [3, 2, 1]);
    assert_eq!(peaks(Schedule::ZeroBubbleH1), [3, 3, 3]);
    assert_eq!(peaks(Schedule::Interleaved { stages_per_rank: 2 }), [8, 6, 4]);
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
    for schedule in schedules() {
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
                .tensor_parallel(&tp, Plan::megatron())?
                .pipeline_parallel(&pp, config)?
                .data_parallel(&dp, DataParallelConfig::new())?;
            let mut optim = optimizer();
            for (step, reference) in references.iter().enumerate() {
                let (x, y) = tokens(step as u64);
                let rows = 4 * dp.rank()..4 * dp.rank() + 4;
                let share = (x.slice([rows.clone()]), y.slice([rows]));
                let result = model.step(share, lm_loss)?;
                assert!((result.loss.item() as f32 - reference.loss).abs() < 1e-4 * reference.loss);
                model = optim.step(0.05, model, result.grads);
                all_same("after", &reference.after, &values(&model.assemble()?), 3e-4);
            }
            Ok(())
        })
        .unwrap();
}
