//! What the pipeline's executor costs beside what the stages compute: stages that do nothing but hand on a small
//! tensor.
//!
//! Two figures for each schedule, divided by the actions of a rank: the time of a step; and what the executor itself
//! takes of it on the host, without waiting for the other rank. With one rank they are the same. With two, and nothing
//! to compute, every pass waits for a message of the other rank, so that the first is the time in which a thread is
//! woken up.
//!
//! `cargo bench --bench pipeline`

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use burn_parallel::pipeline_parallel::schedule::{Direction, Edge, Routes, Schedule};
use burn_parallel::pipeline_parallel::{Forwarded, LossSum, MicroBatch, Pipeline, Stage, StageMessage};
use burn_parallel::prelude::*;
use burn_parallel::tensor::PlainTensor;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const MICRO_BATCHES: usize = 32;

/// Hands on the same tensor for ever.
struct Idle {
    index: usize,
    routes: Routes,
    tensor: PlainTensor,
    live: usize,
}

impl Idle {
    fn new(index: usize, routes: &Routes) -> Self {
        let tensor = Tensor::<1>::ones([16], &Device::flex());
        Self { index, routes: routes.clone(), tensor: tensor.into(), live: 0 }
    }

    fn give(&self, direction: Direction) -> Vec<StageMessage> {
        let edges = self.routes.out_of_stage(self.index, direction);
        edges.map(|edge| StageMessage::new(edge.from, edge.to, [self.tensor.clone()])).collect()
    }
}

impl Stage<()> for Idle {
    fn index(&self) -> usize {
        self.index
    }

    fn edges(&self) -> Vec<Edge> {
        self.routes.edges().filter(|edge| edge.from == self.index || edge.to == self.index).collect()
    }

    fn forward(&mut self, _: MicroBatch<'_, ()>, received: Vec<StageMessage>) -> Result<Forwarded, Error> {
        black_box(received);
        self.live += 1;
        let loss = Some(LossSum { sum: 1.0, weight: 1.0 });
        Ok(Forwarded { messages: self.give(Direction::Forward), loss, outputs: Vec::new() })
    }

    fn backward_input(
        &mut self,
        _: MicroBatch<'_, ()>,
        received: Vec<StageMessage>,
    ) -> Result<Vec<StageMessage>, Error> {
        black_box(received);
        Ok(self.give(Direction::Backward))
    }

    fn backward_weight(&mut self, _: MicroBatch<'_, ()>) -> Result<(), Error> {
        self.live -= 1;
        Ok(())
    }

    fn live(&self) -> usize {
        self.live
    }

    fn discard(&mut self) {
        self.live = 0;
    }
}

/// The time of so many steps, on the slowest rank, and how much of it was neither waiting nor in the stages.
fn steps(schedule: &Schedule, ranks: usize, iterations: u64) -> (Duration, Duration) {
    let times = launch::threads(ranks).threads_per_rank(1).run(|rank| {
        let timetable = schedule.timetable(ranks, MICRO_BATCHES)?;
        let routes = Routes::chain(timetable.stages());
        let mut stages: Vec<Idle> =
            timetable.stages_of(rank.rank()).into_iter().map(|stage| Idle::new(stage, &routes)).collect();
        let mut pipeline = Pipeline::new(&rank, timetable, &stages)?;
        pipeline.step(&mut stages, &[(); MICRO_BATCHES])?;
        rank.barrier()?;
        let (began, mut own) = (Instant::now(), Duration::ZERO);
        for _ in 0..iterations {
            let report = pipeline.step(&mut stages, &[(); MICRO_BATCHES])?.report;
            own += report.elapsed - report.waited - report.busy;
        }
        Ok((began.elapsed(), own))
    });
    times.expect("a world of threads").into_iter().max().unwrap_or_default()
}

/// The most actions of any rank, sends and receives included.
fn actions(schedule: &Schedule, ranks: usize) -> usize {
    let timetable = schedule.timetable(ranks, MICRO_BATCHES).unwrap();
    let full = timetable.with_communication(&Routes::chain(timetable.stages())).unwrap();
    full.rows().iter().map(Vec::len).max().unwrap_or_default()
}

fn overhead(criterion: &mut Criterion) {
    let cases = [
        ("1f1b", Schedule::OneForwardOneBackward, 1),
        ("interleaved_v4", Schedule::Interleaved { stages_per_rank: 4 }, 1),
        ("gpipe", Schedule::GPipe, 2),
        ("1f1b", Schedule::OneForwardOneBackward, 2),
        ("interleaved_v2", Schedule::Interleaved { stages_per_rank: 2 }, 2),
        ("zb_h1", Schedule::ZeroBubbleH1, 2),
    ];
    let mut group = criterion.benchmark_group("pipeline step of idle stages");
    for (name, schedule, ranks) in cases {
        let actions = actions(&schedule, ranks);
        group.throughput(Throughput::Elements(actions as u64));
        let mut per_action = Vec::new();
        group.bench_function(BenchmarkId::new(name, format!("{ranks} ranks, {actions} actions")), |bencher| {
            bencher.iter_custom(|iterations| {
                let (time, own) = steps(&schedule, ranks, iterations);
                let of_action = |time: Duration| time.as_secs_f64() * 1e6 / (iterations * actions as u64) as f64;
                per_action.push((of_action(own), of_action(time)));
                time
            });
        });
        per_action.sort_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((own, time)) = per_action.get(per_action.len() / 2) {
            println!(
                "    an action: {own:.2} us on the host, {time:.2} us of the step (median of {})",
                per_action.len()
            );
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_secs(1));
    targets = overhead
}
criterion_main!(benches);
