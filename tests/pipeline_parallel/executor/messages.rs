//! What the executor does, counts and refuses, whatever the stages compute.

use std::cell::Cell;
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use burn_parallel::pipeline_parallel::Pipeline;
use burn_parallel::pipeline_parallel::schedule::{Action, Direction, Edge, Routes, Schedule, Timetable};
use burn_parallel::prelude::*;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::probe::{ELEMENTS, Probe, calm};

pub fn schedules() -> Vec<Schedule> {
    use Schedule::*;
    vec![
        GPipe,
        OneForwardOneBackward,
        ZeroBubbleH1,
        Interleaved { stages_per_rank: 2 },
        Interleaved { stages_per_rank: 3 },
    ]
}

/// A chain with two tensors an edge, and an edge from the first stage to the last.
pub fn routes(stages: usize) -> Routes {
    let neighbours = (1..stages).map(|stage| Edge::new(stage - 1, stage, 2));
    let far = (stages > 2).then(|| Edge::new(0, stages - 1, 1));
    Routes::new(neighbours.chain(far).flat_map(|edge| [edge, edge.reversed()])).unwrap()
}

#[test]
fn every_schedule_runs_as_its_timetable_says() {
    for schedule in schedules() {
        for (ranks, micro_batches) in [(1, 1), (1, 3), (2, 1), (2, 5), (3, 2), (4, 3), (4, 8), (8, 9)] {
            let timetable = schedule.timetable(ranks, micro_batches).unwrap();
            let (stages, routes) = (timetable.stages(), routes(timetable.stages()));
            let full = timetable.with_communication(&routes).unwrap();
            let peak = full.validate(&routes).unwrap();
            let inputs: Vec<f64> = (0..micro_batches).map(|index| index as f64).collect();
            let name = format!("{schedule:?} with {ranks} ranks and {micro_batches} micro-batches");
            let all = launch::threads(ranks)
                .threads_per_rank(1)
                .run(|rank| {
                    let mine = timetable.stages_of(rank.rank());
                    let mut held: Vec<_> = mine.iter().map(|stage| Probe::new(*stage, &routes, stages, calm)).collect();
                    let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
                    assert_eq!(pipeline.timetable(), &full, "{name}");
                    assert_eq!(pipeline.peak_activations(), &peak, "{name}");
                    // Twice, to see that a run leaves nothing behind.
                    let mut last = None;
                    for _ in 0..2 {
                        held.iter_mut().for_each(|stage| stage.log.clear());
                        last = Some(pipeline.step(&mut held, &inputs)?);
                        assert!(held.iter().all(|stage| stage.live == 0), "{name}");
                    }
                    let run = last.unwrap();
                    assert_eq!(run.loss.sum, inputs.iter().sum::<f64>(), "{name}");
                    assert_eq!(run.loss.weight, 2.0 * micro_batches as f64, "{name}");
                    assert_eq!(run.gradient_factor, 1.0 / run.loss.weight);
                    // As the timetable says, and no more alive than the validator says.
                    for stage in &held {
                        let row = full.rows()[rank.rank()].iter();
                        let expected: Vec<Action> = row
                            .filter(|action| action.computes() && action.unit().stage == stage.index)
                            .copied()
                            .collect();
                        assert_eq!(stage.log, expected, "{name}");
                        assert_eq!(run.report.peak_activations[&stage.index], peak.per_stage[stage.index], "{name}");
                    }
                    assert_eq!(run.report.peak_activations_of_rank, peak.per_rank[rank.rank()], "{name}");
                    assert_eq!(run.report.actions, full.rows()[rank.rank()].len(), "{name}");
                    assert_eq!(run.outputs.len(), mine.len() * micro_batches, "{name}");
                    // Every tensor that crosses ranks is one message, and no other is.
                    let crossing = |end: fn(&Edge) -> usize| {
                        let crosses = |edge: &Edge| full.rank_of(edge.from) != full.rank_of(edge.to);
                        let mine = |edge: &Edge| full.rank_of(end(edge)) == Some(rank.rank());
                        let tensors: usize =
                            routes.edges().filter(|edge| crosses(edge) && mine(edge)).map(|edge| edge.tensors).sum();
                        (tensors * micro_batches) as u64
                    };
                    let (sent, received) = (run.report.counters.of("send"), run.report.counters.of("recv"));
                    let bytes = 4 * ELEMENTS as u64;
                    let (out, into) = (crossing(|edge| edge.from), crossing(|edge| edge.to));
                    assert_eq!((sent.calls, sent.bytes), (out, out * bytes), "{name}");
                    assert_eq!((received.calls, received.bytes), (into, into * bytes), "{name}");
                    let report = &run.report;
                    assert!(report.busy + report.waited <= report.elapsed, "{name}");
                    assert!((0.0..=1.0).contains(&report.idle_share), "{name}");
                    Ok(())
                })
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(all.len(), ranks);
        }
    }
}

/// The second rank's first pass lasts until the first rank has run all of its forwards: so these went on, and their
/// tensors were sent, while nobody received.
#[test]
fn a_rank_computes_on_while_its_tensors_travel() {
    let (all_forwards, gate) = channel();
    let (all_forwards, gate) = (Mutex::new(Some(all_forwards)), Mutex::new(gate));
    launch::threads(2)
        .run(|rank| {
            let disturb = |action: Action| {
                if action.to_string() == "0F3" {
                    all_forwards.lock().unwrap().take();
                }
                if action.to_string() == "1F0" {
                    // Ends when the sender is dropped.
                    let outcome = gate.lock().unwrap().recv_timeout(Duration::from_secs(60));
                    assert_eq!(outcome, Err::<(), _>(RecvTimeoutError::Disconnected));
                }
                Ok(())
            };
            let mut held = [Probe::new(rank.rank(), &routes(2), 2, disturb)];
            let mut pipeline = Pipeline::new(&rank, Schedule::GPipe.timetable(2, 4)?, &held)?;
            pipeline.step(&mut held, &[1.0; 4])
        })
        .unwrap();
}

#[test]
fn evaluation_runs_forwards_alone_of_any_number_of_micro_batches() {
    for schedule in schedules() {
        let timetable = schedule.timetable(3, 4).unwrap();
        let (stages, routes) = (timetable.stages(), routes(timetable.stages()));
        launch::threads(3)
            .run(|rank| {
                let mine = timetable.stages_of(rank.rank());
                let mut held: Vec<_> = mine.iter().map(|stage| Probe::new(*stage, &routes, stages, calm)).collect();
                let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
                for micro_batches in [1, 7, 7, 2] {
                    let run = pipeline.evaluate(&mut held, &vec![0.5; micro_batches])?;
                    assert_eq!(run.mean_loss(), 0.25);
                    assert_eq!(run.report.peak_activations_of_rank, 0);
                }
                let trained = pipeline.step(&mut held, &[0.5; 4])?;
                assert_eq!(trained.mean_loss(), 0.25);
                assert!(held.iter().all(|stage| stage.log.len() > 17));
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn a_timetable_read_from_text_runs_with_its_own_sends_and_receives() {
    // Backwards in the other order than forwards, and sends put off.
    let text =
        "0F0,0F1,0SEND_F1,0SEND_F0,0RECV_B1,0RECV_B0,0B1,0B0\n1RECV_F1,1RECV_F0,1F1,1F0,1B1,1SEND_B1,1B0,1SEND_B0";
    let timetable: Timetable = text.parse().unwrap();
    launch::threads(2)
        .run(|rank| {
            let mut held = [Probe::new(rank.rank(), &Routes::chain(2), 2, calm)];
            let mut pipeline = Pipeline::new(&rank, Schedule::Custom(timetable.clone()).timetable(2, 2)?, &held)?;
            assert_eq!(pipeline.timetable(), &timetable);
            pipeline.step(&mut held, &[1.0, 2.0])?;
            let log: Vec<String> = held[0].log.iter().map(|action| action.to_string()).collect();
            let expected = [["0F0", "0F1", "0B1", "0B0"], ["1F1", "1F0", "1B1", "1B0"]];
            assert_eq!(log, expected[rank.rank()]);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_rank_without_a_stage_takes_part() {
    let timetable: Timetable = "0F0,0B0\n\"\"\n1F0,1B0".parse().unwrap();
    let losses = launch::threads(3)
        .run(|rank| {
            let mine = timetable.stages_of(rank.rank());
            let mut held: Vec<_> = mine.iter().map(|stage| Probe::new(*stage, &Routes::chain(2), 2, calm)).collect();
            let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
            Ok(pipeline.step(&mut held, &[3.0])?.mean_loss())
        })
        .unwrap();
    assert_eq!(losses, [1.5; 3]);
}

/// What each of two ranks gets when they put a pipeline together.
fn refused(timetables: [Timetable; 2], stages: [Vec<(usize, Routes)>; 2]) -> Vec<String> {
    launch::threads(2)
        .run(|rank| {
            let held: Vec<_> =
                stages[rank.rank()].iter().map(|(stage, routes)| Probe::new(*stage, routes, 2, calm)).collect();
            Ok(Pipeline::new(&rank, timetables[rank.rank()].clone(), &held).unwrap_err().to_string())
        })
        .unwrap()
}

#[test]
fn stages_that_do_not_fit_are_refused_alike_on_every_rank() {
    let two = || Schedule::GPipe.timetable(2, 2).unwrap();
    let chain = || Routes::chain(2);
    let wide = || Routes::new([Edge::new(0, 1, 2), Edge::new(1, 0, 1)]).unwrap();
    let three = Schedule::GPipe.timetable(3, 2).unwrap();
    let cases = [
        (
            refused([two(), Schedule::GPipe.timetable(2, 3).unwrap()], [vec![(0, chain())], vec![(1, chain())]]),
            "rank 1 of group `world/pipeline0` brought another timetable than rank 0",
        ),
        (
            refused([three.clone(), three], [vec![(0, chain())], vec![(1, chain())]]),
            "the timetable is for 3 ranks, and group `world/pipeline0` has 2",
        ),
        (
            refused([two(), two()], [vec![(1, chain())], vec![(0, chain())]]),
            "rank 0 of group `world/pipeline0` brought the stages [1], and the timetable gives it [0]",
        ),
        (
            refused([two(), two()], [vec![(0, chain())], vec![]]),
            "rank 1 of group `world/pipeline0` brought the stages [], and the timetable gives it [1]",
        ),
        (
            refused([two(), two()], [vec![(0, wide())], vec![(1, chain())]]),
            "stage 0 says that 2 tensors go from stage 0 to stage 1, and stage 1 says 1 tensors",
        ),
        (
            refused([two(), two()], [vec![(0, chain())], vec![(1, Routes::default())]]),
            "stage 0 says that 1 tensors go from stage 0 to stage 1, and stage 1 says nothing of it",
        ),
    ];
    for (errors, reason) in cases {
        assert!(errors[0].contains(reason), "{}", errors[0]);
        assert_eq!(errors[0], errors[1]);
    }
    let far = Routes::new([Edge::new(0, 1, 1), Edge::new(1, 2, 1)]).unwrap();
    let errors = refused([two(), two()], [vec![(0, far.clone())], vec![(1, far)]]);
    assert!(errors[0].contains("stage 2 says nothing of it"), "{}", errors[0]);
}

#[test]
fn directions_follow_from_the_ends_of_an_edge() {
    assert_eq!(Edge::new(0, 2, 1).direction(), Direction::Forward);
    assert_eq!(Edge::new(0, 2, 1).reversed().direction(), Direction::Backward);
}

/// What the validator accepts, the executor runs: timetables whose actions, sends and receives among them, have been
/// mixed up.
#[test]
fn every_valid_timetable_runs() {
    let accepted = Cell::new(0);
    let swaps = prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1..6usize), 0..5);
    let strategy = (0..5usize, 2..5usize, 1..6usize, swaps);
    let mut runner = TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) });
    let outcome = runner.run(&strategy, |(schedule, ranks, micro_batches, swaps)| {
        let timetable = schedules()[schedule].timetable(ranks, micro_batches).unwrap();
        let (stages, routes) = (timetable.stages(), routes(timetable.stages()));
        let mut rows = timetable.with_communication(&routes).unwrap().rows().to_vec();
        for (rank, place, distance) in swaps {
            let row = &mut rows[rank.index(ranks)];
            let place = place.index(row.len());
            let other = (place + distance).min(row.len() - 1);
            row.swap(place, other);
        }
        let timetable = Timetable::new(rows).unwrap();
        let Ok(peak) = timetable.validate(&routes) else { return Ok(()) };
        accepted.set(accepted.get() + 1);
        let inputs = vec![1.0; micro_batches];
        let outcome = launch::threads(ranks).threads_per_rank(1).timeout(Duration::from_secs(60)).run(|rank| {
            let mine = timetable.stages_of(rank.rank());
            let mut held: Vec<_> = mine.iter().map(|stage| Probe::new(*stage, &routes, stages, calm)).collect();
            let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
            Ok(pipeline.step(&mut held, &inputs)?.report.peak_activations_of_rank)
        });
        prop_assert_eq!(outcome, Ok(peak.per_rank), "\n{}", timetable);
        Ok(())
    });
    outcome.unwrap_or_else(|problem| panic!("{problem}"));
    assert!(accepted.get() > 40, "only {} timetables were valid", accepted.get());
}
