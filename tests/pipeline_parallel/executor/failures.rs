//! One rank fails, and every rank returns the same error.

use std::sync::mpsc::channel;
use std::time::Duration;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::quantization::QuantScheme;
use burn::tensor::{Bytes, DType, Shape};
use burn_parallel::pipeline_parallel::schedule::{Action, Direction, Edge, Routes, Schedule, Timetable};
use burn_parallel::pipeline_parallel::{Forwarded, MicroBatch, Pipeline, Stage, StageMessage};
use burn_parallel::prelude::*;
use burn_parallel::tensor::PlainTensor;

use super::messages::{routes, schedules};
use super::probe::{Probe, calm};

/// Longer than any of these tests takes; a rank that waits this long hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs a world on a thread of its own, and fails if not all ranks have returned within the limit.
fn within_limit<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, outcome) = channel();
    std::thread::spawn(move || done.send(work()));
    outcome.recv_timeout(LIMIT).expect("every rank returns")
}

/// The errors of all ranks when `failing` does `what` in place of this action.
fn errors(timetable: &Timetable, failing: Action, panics: bool) -> Vec<Error> {
    let timetable = timetable.clone();
    within_limit(move || {
        let (stages, routes) = (timetable.stages(), routes(timetable.stages()));
        launch::threads(timetable.ranks())
            .threads_per_rank(1)
            .timeout(Duration::from_secs(60))
            .run(|rank| {
                let disturb = |action: Action| match action == failing {
                    true if panics => panic!("the disk is full"),
                    true => Err(Error::user("the disk is full")),
                    false => Ok(()),
                };
                let mine = timetable.stages_of(rank.rank());
                let mut held: Vec<_> = mine.iter().map(|stage| Probe::new(*stage, &routes, stages, disturb)).collect();
                let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
                let error = pipeline.step(&mut held, &vec![1.0; timetable.micro_batches()]).unwrap_err();
                assert!(held.iter().all(|stage| stage.live == 0), "the step is forgotten");
                Ok(error)
            })
            .unwrap()
    })
}

#[test]
fn a_stage_that_fails_at_any_pass_ends_every_rank_with_the_same_error() {
    for schedule in schedules() {
        let timetable = schedule.timetable(3, 3).unwrap();
        for failing in timetable.rows().iter().flatten() {
            // Every kind of pass, on every rank, for the first, a middle and the last micro-batch; panics for one of
            // them.
            for panics in [false, true] {
                if panics && failing.unit().micro_batch != 1 {
                    continue;
                }
                let errors = errors(&timetable, *failing, panics);
                let home = timetable.rank_of(failing.unit().stage).unwrap();
                let Error::Stage { rank, action, cause, .. } = &errors[0] else { panic!("{}", errors[0]) };
                assert_eq!((*rank, action), (home, &failing.to_string()), "{schedule:?}");
                assert!(cause.to_string().contains("the disk is full"), "{cause}");
                assert!(errors.iter().all(|error| error == &errors[0]), "{schedule:?}, {failing}: {errors:?}");
            }
        }
    }
}

/// A stage whose tensors cannot travel, in one direction: the send itself fails.
struct Heavy {
    stage: Probe<fn(Action) -> Result<(), Error>>,
    direction: Direction,
    micro_batch: usize,
}

impl Heavy {
    fn spoil(&self, messages: &mut [StageMessage], direction: Direction, micro_batch: usize) {
        if (direction, micro_batch) == (self.direction, self.micro_batch) {
            for tensor in messages.iter_mut().flat_map(|message| &mut message.tensors) {
                let layout = Layout::contiguous(Shape::from(vec![4]));
                let dtype = DType::QFloat(QuantScheme::default());
                let bytes = Bytes::from_elems(vec![0i8; 8]);
                let tensor_of = FlexTensor::new(bytes, layout, dtype);
                *tensor = Some(PlainTensor::from(burn::tensor::Tensor::<1>::from_primitive::<burn::backend::Flex>(
                    tensor_of,
                )));
            }
        }
    }
}

impl Stage<f64> for Heavy {
    fn index(&self) -> usize {
        self.stage.index()
    }

    fn edges(&self) -> Vec<Edge> {
        self.stage.edges()
    }

    fn forward(&mut self, micro_batch: MicroBatch<'_, f64>, received: Vec<StageMessage>) -> Result<Forwarded, Error> {
        let mut given = self.stage.forward(micro_batch, received)?;
        self.spoil(&mut given.messages, Direction::Forward, micro_batch.index);
        Ok(given)
    }

    fn backward_input(
        &mut self,
        micro_batch: MicroBatch<'_, f64>,
        received: Vec<StageMessage>,
    ) -> Result<Vec<StageMessage>, Error> {
        let mut given = self.stage.backward_input(micro_batch, received)?;
        self.spoil(&mut given, Direction::Backward, micro_batch.index);
        Ok(given)
    }

    fn backward_weight(&mut self, micro_batch: MicroBatch<'_, f64>) -> Result<(), Error> {
        self.stage.backward_weight(micro_batch)
    }

    fn live(&self) -> usize {
        self.stage.live()
    }

    fn discard(&mut self) {
        self.stage.discard();
    }
}

#[test]
fn a_send_that_fails_ends_every_rank_with_the_same_error() {
    let timetable = Schedule::ZeroBubbleH1.timetable(3, 3).unwrap();
    for (direction, senders) in [(Direction::Forward, [0, 1]), (Direction::Backward, [1, 2])] {
        for sender in senders {
            for micro_batch in 0..3 {
                let timetable = timetable.clone();
                let errors = within_limit(move || {
                    launch::threads(3)
                        .timeout(Duration::from_secs(60))
                        .run(|rank| {
                            let stage: Probe<fn(Action) -> Result<(), Error>> =
                                Probe::new(rank.rank(), &routes(3), 3, calm);
                            let micro_batch = if rank.rank() == sender { micro_batch } else { usize::MAX };
                            let mut held = [Heavy { stage, direction, micro_batch }];
                            let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
                            Ok(pipeline.step(&mut held, &[1.0; 3]).unwrap_err())
                        })
                        .unwrap()
                });
                let Error::Stage { rank, action, cause, .. } = &errors[0] else { panic!("{}", errors[0]) };
                let letter = if direction == Direction::Forward { "F" } else { "B" };
                assert_eq!((*rank, action), (sender, &format!("{sender}SEND_{letter}{micro_batch}")));
                assert!(matches!(**cause, Error::UnsupportedDType { .. }), "{cause}");
                assert!(errors.iter().all(|error| error == &errors[0]), "{errors:?}");
            }
        }
    }
}

#[test]
fn a_receive_from_a_rank_that_has_gone_ends_every_rank_with_the_same_error() {
    for schedule in schedules() {
        for leaver in 0..3 {
            let timetable = schedule.timetable(3, 4).unwrap();
            let errors = within_limit(move || {
                let (stages, routes) = (timetable.stages(), routes(timetable.stages()));
                launch::threads(3)
                    .timeout(Duration::from_secs(60))
                    .run(|rank| {
                        let mine = timetable.stages_of(rank.rank());
                        let mut held: Vec<_> =
                            mine.iter().map(|stage| Probe::new(*stage, &routes, stages, calm)).collect();
                        let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
                        if rank.rank() == leaver {
                            return Ok(None);
                        }
                        Ok(Some(pipeline.step(&mut held, &[1.0; 4]).unwrap_err()))
                    })
                    .unwrap()
            });
            let errors: Vec<Error> = errors.into_iter().flatten().collect();
            assert_eq!(errors.len(), 2);
            let Error::RankLost { rank, .. } = errors[0] else { panic!("{}", errors[0]) };
            assert_eq!((rank, &errors[0]), (leaver, &errors[1]));
        }
    }
}

#[test]
fn an_abort_in_the_middle_ends_every_rank_with_its_reason() {
    for at in ["0F0", "1F2", "2B0", "0B3"] {
        let errors = within_limit(move || {
            let timetable = Schedule::OneForwardOneBackward.timetable(3, 4).unwrap();
            launch::threads(3)
                .timeout(Duration::from_secs(60))
                .run(|rank| {
                    let disturb = |action: Action| {
                        if action.to_string() == at {
                            rank.abort("enough");
                        }
                        Ok(())
                    };
                    let mut held = [Probe::new(rank.rank(), &routes(3), 3, disturb)];
                    let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
                    Ok(pipeline.step(&mut held, &[1.0; 4]).unwrap_err())
                })
                .unwrap()
        });
        let Error::Aborted { reason, .. } = &errors[0] else { panic!("{}", errors[0]) };
        assert_eq!(reason, "enough");
        assert!(errors.iter().all(|error| error == &errors[0]), "{errors:?}");
    }
}

#[test]
fn a_rank_with_another_number_of_micro_batches_ends_every_rank() {
    for evaluates in [false, true] {
        let errors = within_limit(move || {
            launch::threads(2)
                .timeout(Duration::from_secs(60))
                .run(|rank| {
                    let mut held = [Probe::new(rank.rank(), &Routes::chain(2), 2, calm)];
                    let timetable = Schedule::GPipe.timetable(2, 3)?;
                    let mut pipeline = Pipeline::new(&rank, timetable, &held)?;
                    let inputs = vec![1.0; 3 - rank.rank()];
                    let outcome = if evaluates {
                        pipeline.evaluate(&mut held, &inputs)
                    } else {
                        pipeline.step(&mut held, &inputs)
                    };
                    Ok(outcome.unwrap_err().to_string())
                })
                .unwrap()
        });
        let reason = if evaluates {
            "every rank must bring the same number of micro-batches, at least 1; they brought [3, 2]"
        } else {
            "rank 1 of group `world/pipeline0` brought 2 micro-batches, and the timetable is for 3"
        };
        assert!(errors[0].contains(reason), "{}", errors[0]);
        assert_eq!(errors[0], errors[1]);
    }
}

#[test]
fn tensors_that_no_edge_is_for_are_an_error_of_the_stage() {
    for tensors in [0, 1, 3] {
        let errors = within_limit(move || {
            launch::threads(2)
                .timeout(Duration::from_secs(60))
                .run(|rank| {
                    let mut held = [Probe::new(rank.rank(), &routes(2), 2, calm)];
                    let mut pipeline = Pipeline::new(&rank, Schedule::GPipe.timetable(2, 2)?, &held)?;
                    if rank.rank() == 0 {
                        held[0].routes = match tensors {
                            0 => Routes::default(),
                            more => Routes::new([Edge::new(0, 1, more), Edge::new(1, 0, 2)]).unwrap(),
                        };
                    }
                    Ok(pipeline.step(&mut held, &[1.0; 2]).unwrap_err())
                })
                .unwrap()
        });
        let Error::Stage { rank: 0, action, cause, .. } = &errors[0] else { panic!("{}", errors[0]) };
        assert_eq!(action, "0F0");
        let reason = if tensors == 0 { "gave no message of 2 tensors" } else { "which none of its edges is for" };
        assert!(cause.to_string().contains(reason), "{cause}");
        assert_eq!(errors[0], errors[1]);
    }
}
