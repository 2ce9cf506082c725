//! No rank ever holds, makes or reads what belongs to another stage.

use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::prelude::*;

use super::parity::{lm, lm_loss, rows_of_tokens, schedules, tied, tied_loss, tokens};
use crate::common::models::{Lm, Tied, device};
use crate::common::reference::{Whole, bytes, filled, values};
use crate::common::store::Store;

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
fn a_model_is_loaded_of_which_each_rank_reads_and_makes_its_stages_only() {
    let trained = filled(lm());
    let expected = values(&trained);
    for schedule in schedules() {
        for cut in [Cut::Balanced, Cut::before(["encoder.layers.2.*"])] {
            // An interleaved schedule has four stages, which the second cut is not for.
            if schedule.stages_per_rank() > 1 && cut != Cut::Balanced {
                continue;
            }
            let read = launch::threads(2)
                .run(|rank| {
                    let config = PipelineConfig::new(4).with_schedule(schedule.clone()).with_cut(cut.clone());
                    // Of other values, and none of them made.
                    let fresh = Lm::lazy(13, 8, 3, &device());
                    assert!(bytes(&fresh).bytes.is_empty());
                    let mut model = fresh.pipeline_parallel(&rank, config)?;
                    model.prepare(tokens(0), lm_loss)?;
                    let all = bytes(&model);
                    assert_eq!(all.bytes.values().sum::<usize>(), 0, "nothing is made before it is loaded");
                    let mut store = Store::of(values(&trained));
                    let mut model = model.load(&mut store)?;
                    let own: u64 = {
                        let report = model.report().cut.unwrap();
                        let mine = model.timetable().stages_of(rank.rank());
                        mine.iter().map(|stage| report.stages[*stage].param_bytes).sum()
                    };
                    let read = store.elements_read();
                    assert_eq!(4 * read as u64, own);
                    let held = bytes(&model);
                    assert_eq!((held.bytes.values().sum::<usize>() as u64, held.lazy), (own, 0));
                    assert_eq!(values(&model.assemble()?), expected);
                    let loss = model.step(tokens(0), lm_loss)?.loss.item();
                    Ok((store.read.into_keys().collect::<Vec<_>>(), loss))
                })
                .unwrap();
            // Every parameter was read by one rank, and by one only.
            let mut all: Vec<&String> = read.iter().flat_map(|(paths, _)| paths).collect();
            all.sort();
            assert_eq!(all, expected.keys().collect::<Vec<_>>());
            assert_eq!(read[0].1, read[1].1);
        }
    }
}

#[test]
fn what_several_stages_use_is_loaded_by_each_of_them() {
    let trained = filled(tied());
    launch::threads(2)
        .run(|rank| {
            let cut = Cut::patterns([vec!["embedding*"], vec!["inner*"]]);
            let model = Tied::new(&device()).pipeline_parallel(&rank, PipelineConfig::new(2).with_cut(cut))?;
            let mut store = Store::of(values(&trained));
            let mut model = model.load(&mut store)?;
            // Before the step is known only the first rank has the embedding, then both.
            assert_eq!(store.read.contains_key("embedding.weight"), rank.rank() == 0);
            model.prepare(tokens(0), tied_loss)?;
            let held = values(model.local());
            assert_eq!(held["embedding.weight"], values(&trained)["embedding.weight"]);
            let model = model.load(&mut store)?;
            assert!(store.read.contains_key("embedding.weight"));
            assert_eq!(values(&model.assemble()?), values(&trained));
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_split_model_is_loaded_by_parts_of_stages() {
    let trained = filled(lm());
    let expected = values(&trained);
    launch::threads(4)
        .run(|world| {
            let mesh = Mesh::new(&world, [("pp", 2), ("tp", 2)])?;
            let (pp, tp) = (mesh.axis("pp")?, mesh.axis("tp")?);
            let config = PipelineConfig::new(2).with_cut(Cut::before(["encoder.layers.1.*"]));
            let model = Lm::lazy(13, 8, 3, &device()).tensor_parallel(&tp, Plan::megatron())?;
            let mut store = Store::of(values(&trained));
            let model = model.pipeline_parallel(&pp, config)?.load(&mut store)?;
            let read = store.elements_read();
            let held: usize = bytes(model.local()).bytes.values().sum();
            assert_eq!(4 * read, held);
            let all: usize = expected.values().map(|whole| whole.values.len()).sum();
            let together = world.all_reduce(vec![read as u64], ReduceOp::Sum)?[0] as usize;
            // Split parameters once, the others once for each part of a layer.
            assert!((all..2 * all).contains(&together), "{together} {all}");
            assert_eq!(values(&model.assemble()?), expected);
            Ok(())
        })
        .unwrap();
}

#[test]
fn what_cannot_be_loaded_is_refused() {
    launch::threads(2)
        .run(|rank| {
            let model = lm().pipeline_parallel(&rank, PipelineConfig::new(2))?;
            let mut store = Store::of(values(&filled(lm())));
            let error = model.clone().load(&mut store).unwrap_err();
            assert!(matches!(&error, Error::Pipeline { problem } if problem.contains("prepare")), "{error}");
            let mut model = model;
            model.prepare(rows_of_tokens(8, 0), lm_loss)?;
            let path = if rank.rank() == 0 { "embedding.weight" } else { "head.weight" };
            let whole = store.whole.remove(path).unwrap();
            let error = model.clone().load(&mut store).unwrap_err();
            assert!(error.to_string().contains(&format!("no parameter `{path}`")), "{error}");
            store.whole.insert(path.into(), Whole { dims: vec![whole.values.len(), 1], ..whole });
            let error = model.load(&mut store).unwrap_err();
            assert!(error.to_string().contains(path) && error.to_string().contains("dims"), "{error}");
            Ok(())
        })
        .unwrap();
}
