//! A stage of a captured step fails at any action, and every rank returns the same error.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use burn::backend::flex::{FlexTensor, Layout};
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::quantization::QuantScheme;
use burn::tensor::{Bytes, DType, Device, Shape, Tensor, activation};
use burn_ir::{CustomOpIr, OperationIr};

use super::GraphStage;
use crate::Error;
use crate::graph::{CustomOps, StepGraph, StepParams, capture_step, graph_tensors};
use crate::launch;
use crate::pipeline_parallel::cut::{Cut, CutGraph, StageRun, cut};
use crate::pipeline_parallel::schedule::{Action, Direction, Edge, Schedule, Timetable};
use crate::pipeline_parallel::step::bound;
use crate::pipeline_parallel::{Forwarded, MicroBatch, Pipeline, Stage, StageMessage};
use crate::tensor::PlainTensor;

const RANKS: usize = 2;
const MICRO_BATCHES: usize = 3;
const FAULT: &str = "fault";

fn schedules() -> [Schedule; 4] {
    [
        Schedule::GPipe,
        Schedule::OneForwardOneBackward,
        Schedule::Interleaved { stages_per_rank: 2 },
        Schedule::ZeroBubbleH1,
    ]
}

fn rows() -> Tensor<2> {
    Tensor::ones([2, 6], &Device::flex())
}

fn step(stages: usize) -> (Vec<Linear>, StepGraph, CutGraph) {
    let layers = (0..6).map(|_| LinearConfig::new(6, 6).init(&Device::flex().autodiff()));
    let model = layers.collect::<Vec<Linear>>().materialize();
    let loss = |model: &Vec<Linear>, x: Tensor<2>| {
        model.iter().fold(x, |x, layer| activation::tanh(layer.forward(x))).powi_scalar(2).mean()
    };
    let graph = capture_step(&model, rows(), loss).unwrap();
    let homes = Cut::Balanced.homes(&graph, stages).unwrap();
    let parts = cut(&graph, &homes, stages).unwrap();
    (model, graph, parts)
}

/// This rank's stages. Where `failing` is, an operation fails, or panics, when the micro-batch comes.
fn stages(
    (graph, parts): (&StepGraph, &CutGraph),
    mine: &[usize],
    failing: Option<Action>,
    panics: bool,
) -> Vec<GraphStage> {
    let stage = |stage: &usize| {
        let mut part = parts.stages[*stage].clone();
        let mut ops = CustomOps::new();
        if let Some(failing) = failing.filter(|failing| failing.unit().stage == *stage) {
            let fault = OperationIr::Custom(CustomOpIr::new(FAULT, &[], &[]));
            match failing {
                Action::Forward(_) => part.forward.push(fault),
                Action::BackwardInput(_) => part.backward_input.push(fault),
                Action::Backward(_) | Action::BackwardWeight(_) => part.backward_weight.push(fault),
                Action::Send(..) | Action::Receive(..) => {}
            }
            // Micro-batches come in order.
            let (calls, when) = (AtomicUsize::new(0), failing.unit().micro_batch);
            ops.register(FAULT, move |_, _| match calls.fetch_add(1, Ordering::Relaxed) == when {
                true if panics => panic!("the disk is full"),
                true => Err(Error::user("the disk is full")),
                false => Ok(Vec::new()),
            });
        }
        GraphStage::new(*stage, vec![StageRun::new(graph, part, ops).unwrap()], vec![0; MICRO_BATCHES])
    };
    mine.iter().map(stage).collect()
}

fn inputs() -> Vec<Vec<PlainTensor>> {
    vec![graph_tensors(rows()).unwrap(); MICRO_BATCHES]
}

fn world() -> launch::Threads {
    launch::threads(RANKS).timeout(Duration::from_secs(60))
}

fn errors(timetable: &Timetable, failing: Option<Action>, panics: bool) -> Vec<Error> {
    let (model, graph, parts) = step(timetable.stages());
    let run = world().run(|rank| {
        let mine = timetable.stages_of(rank.rank());
        let mut held = stages((&graph, &parts), &mine, failing, panics);
        let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
        let outcome = bound(&mut held, &model, StepParams::default(), |stages| pipeline.step(stages, &inputs()));
        assert!(held.iter().all(|stage| stage.live() == 0), "nothing of the step is left");
        Ok(outcome.err())
    });
    run.unwrap().into_iter().flatten().collect()
}

#[test]
fn a_pass_that_fails_ends_every_rank_with_the_same_error() {
    for schedule in schedules() {
        let timetable = schedule.timetable(RANKS, MICRO_BATCHES).unwrap();
        assert!(errors(&timetable, None, false).is_empty(), "{schedule:?}: it runs, if nothing fails");
        for failing in timetable.rows().iter().flatten() {
            for panics in [false, true] {
                if panics && failing.unit().micro_batch != 1 {
                    continue;
                }
                let errors = errors(&timetable, Some(*failing), panics);
                assert_eq!(errors.len(), RANKS, "{schedule:?}, {failing}");
                let home = timetable.rank_of(failing.unit().stage).unwrap();
                let Error::Stage { rank, action, cause, .. } = &errors[0] else { panic!("{}", errors[0]) };
                assert_eq!((*rank, action), (home, &failing.to_string()), "{schedule:?}");
                let told = cause.to_string();
                assert!(told.contains("the disk is full") && told.contains("panicked") == panics, "{told}");
                assert!(errors.iter().all(|error| error == &errors[0]), "{schedule:?}, {failing}: {errors:?}");
            }
        }
    }
}

/// A stage that gives what cannot travel.
struct Heavy {
    stage: GraphStage,
    failing: Action,
}

impl Heavy {
    fn spoil(&self, mut messages: Vec<StageMessage>, direction: Direction, micro_batch: usize) -> Vec<StageMessage> {
        let Action::Send(of, unit) = self.failing else { return messages };
        if (of, unit.stage, unit.micro_batch) == (direction, self.stage.index, micro_batch) {
            for tensor in messages.iter_mut().flat_map(|message| &mut message.tensors) {
                let (layout, scheme) = (Layout::contiguous(Shape::from(vec![4])), QuantScheme::default());
                let bytes = Bytes::from_elems(vec![0i8; 8]);
                *tensor = Some(PlainTensor::from_flex(FlexTensor::new(bytes, layout, DType::QFloat(scheme))));
            }
        }
        messages
    }
}

impl Stage<Vec<PlainTensor>> for Heavy {
    fn index(&self) -> usize {
        self.stage.index()
    }

    fn edges(&self) -> Vec<Edge> {
        self.stage.edges()
    }

    fn forward(
        &mut self,
        micro_batch: MicroBatch<'_, Vec<PlainTensor>>,
        received: Vec<StageMessage>,
    ) -> Result<Forwarded, Error> {
        let given = self.stage.forward(micro_batch, received)?;
        Ok(Forwarded { messages: self.spoil(given.messages, Direction::Forward, micro_batch.index), ..given })
    }

    fn backward_input(
        &mut self,
        micro_batch: MicroBatch<'_, Vec<PlainTensor>>,
        received: Vec<StageMessage>,
    ) -> Result<Vec<StageMessage>, Error> {
        let given = self.stage.backward_input(micro_batch, received)?;
        Ok(self.spoil(given, Direction::Backward, micro_batch.index))
    }

    fn backward_weight(&mut self, micro_batch: MicroBatch<'_, Vec<PlainTensor>>) -> Result<(), Error> {
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
    for schedule in schedules() {
        let timetable = schedule.timetable(RANKS, MICRO_BATCHES).unwrap();
        let (model, graph, parts) = step(timetable.stages());
        let routes = crate::pipeline_parallel::schedule::Routes::chain(timetable.stages());
        let full = timetable.with_communication(&routes).unwrap();
        for failing in full.rows().iter().flatten().filter(|action| matches!(action, Action::Send(..))) {
            let run = world().run(|rank| {
                let mine = timetable.stages_of(rank.rank());
                let mut plain = stages((&graph, &parts), &mine, None, false);
                GraphStage::bind(&mut plain, &model, StepParams::default())?;
                let mut held: Vec<Heavy> = plain.into_iter().map(|stage| Heavy { stage, failing: *failing }).collect();
                let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
                Ok(pipeline.step(&mut held, &inputs()).unwrap_err())
            });
            let errors = run.unwrap();
            let Error::Stage { rank, action, cause, .. } = &errors[0] else { panic!("{}", errors[0]) };
            let home = timetable.rank_of(failing.unit().stage).unwrap();
            assert_eq!((*rank, action), (home, &failing.to_string()));
            assert!(matches!(**cause, Error::UnsupportedDType { .. }), "{cause}");
            assert!(errors.iter().all(|error| error == &errors[0]), "{errors:?}");
        }
    }
}

#[test]
fn a_receive_from_a_rank_that_has_gone_ends_the_others() {
    for schedule in schedules() {
        for leaver in 0..RANKS {
            let timetable = schedule.timetable(RANKS, MICRO_BATCHES).unwrap();
            let (model, graph, parts) = step(timetable.stages());
            let run = world().run(|rank| {
                let mine = timetable.stages_of(rank.rank());
                let mut held = stages((&graph, &parts), &mine, None, false);
                let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
                if rank.rank() == leaver {
                    return Ok(None);
                }
                Ok(bound(&mut held, &model, StepParams::default(), |stages| pipeline.step(stages, &inputs())).err())
            });
            let errors: Vec<Error> = run.unwrap().into_iter().flatten().collect();
            assert_eq!(errors.len(), RANKS - 1);
            assert!(matches!(errors[0], Error::RankLost { rank, .. } if rank == leaver), "{}", errors[0]);
        }
    }
}
