//! Fused products over an engine that works beside the ranks' threads: chunks travel while others are multiplied.

use std::sync::Arc;
use std::time::Duration;

use burn::backend::Flex;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::{DType, activation};
use burn_parallel::comm::{Call, CallLog, Communicator, Message, Operation, Transfer, Transport};
use burn_parallel::graph::shard::{fold_reductions, fuse_products, overlap, register_collectives};
use burn_parallel::graph::{CustomOps, Executor, capture_step};
use burn_parallel::prelude::*;

use crate::harness::{Axis, Case, cut, filled, gradients, optimizer, same, split, values};
use crate::models::{Numbers, device, scalar};

/// The embedded engine, as one that is elsewhere: it does not say that it works on the threads that call it.
#[derive(Debug)]
struct Elsewhere(Communicator);

impl Transport for Elsewhere {
    fn collective(&self, call: &Call, transfer: Transfer<'_, '_>) -> Result<u64, Error> {
        if call.dtype != Some(DType::F32) {
            return Err(Error::user(format!("this engine carries no {call}")));
        }
        match transfer {
            Transfer::InPlace(buffers) => {
                for buffer in buffers {
                    let (data, elements) = (buffer.as_mut_ptr().cast::<f32>(), buffer.elements());
                    // SAFETY: it is of f32, and lent for writing.
                    self.0.all_reduce_in_place(
                        unsafe { std::slice::from_raw_parts_mut(data, elements) },
                        ReduceOp::Sum,
                    )?;
                }
            }
            Transfer::Through { input, output } => {
                // SAFETY: it is of f32, and lent for reading.
                let rows = unsafe { std::slice::from_raw_parts(input.as_ptr().cast::<f32>(), input.elements()) };
                let (result, share) = match call.operation {
                    Operation::AllGather => (self.0.all_gather(rows.to_vec())?, 1),
                    Operation::ReduceScatter(op) => (self.0.reduce_scatter(rows.to_vec(), op)?, self.size()),
                    _ => return Err(Error::user(format!("this engine carries no {call}"))),
                };
                let whole = if share == 1 { self.size() } else { 1 };
                let mut dims = call.extent.dims().to_vec();
                dims[0] = dims[0] / share * whole;
                let mut place = output.allocate(&dims, DType::F32)?;
                assert_eq!(place.elements(), result.len());
                // SAFETY: it is of f32, lent for writing, and as long.
                unsafe { place.as_mut_ptr().cast::<f32>().copy_from(result.as_ptr(), result.len()) };
            }
            Transfer::Nothing => self.0.barrier()?,
        }
        Ok(0)
    }

    fn engine(&self) -> &'static str {
        "elsewhere"
    }

    fn group(&self) -> &Arc<str> {
        self.0.group()
    }

    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn world_rank(&self) -> usize {
        self.0.rank()
    }

    fn size(&self) -> usize {
        self.0.size()
    }

    fn send(&self, to: usize, tag: u64, Message(data): Message) -> Result<(), Error> {
        self.0.send(Tensor::<1>::from_primitive::<Flex>(data), to, tag)
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Message, Error> {
        Err(Error::user(format!("this engine carries no message {tag} of {from}")))
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(60)
    }

    fn split(&self, name: &str, color: u64, key: i64) -> Result<Arc<dyn Transport>, Error> {
        Ok(Arc::new(Elsewhere(self.0.split_named(name, color, key)?)))
    }

    fn abort(&self, error: Error) {
        self.0.abort(error);
    }

    fn leave(&self) {}

    fn failure(&self) -> Option<Error> {
        self.0.failure()
    }

    fn log(&self) -> CallLog {
        self.0.log()
    }
}

#[derive(Module, Debug)]
struct Block {
    entry: Linear,
    up: Linear,
    down: Linear,
}

type Batch = (Tensor<3>, Tensor<3>);

const WIDTH: usize = 512;

/// Large enough to be cut into chunks.
const BLOCK: Case<Block, Batch> = Case {
    make: |d| Block {
        entry: LinearConfig::new(WIDTH, WIDTH).init(d),
        up: LinearConfig::new(WIDTH, 516).init(d),
        down: LinearConfig::new(516, WIDTH).init(d),
    },
    batch: |seed| {
        let mut numbers = Numbers(seed);
        let mut draw = || numbers.tensor([2, 512, WIDTH], &device());
        (draw(), draw())
    },
    loss: |block, (x, y)| {
        let x = block.entry.forward(x);
        let z = block.down.forward(activation::gelu(block.up.forward(x.clone()))) + x;
        (z - y).powi_scalar(2).mean()
    },
};

#[test]
fn chunks_travel_beside_the_products() {
    let references = BLOCK.alone(2);
    let plan = || Plan::new().shard("up.weight", 1).shard("up.bias", 0).shard("down.weight", 0);
    for axis in [Axis::new("tp", 2, plan()), Axis::new("tp", 3, plan()), Axis::new("tp", 2, plan()).sequence(1)] {
        let (axes, sequence) = ([axis.clone()], axis.sequence.is_some());
        let calls = launch::threads(axis.degree)
            .threads_per_rank(1)
            .run(|rank| {
                let comm = Communicator::new(Arc::new(Elsewhere(rank.split(0, rank.rank() as i64)?)));
                let (whole, place) = (filled((BLOCK.make)(&device())), [rank.rank()]);
                let graph = capture_step(&whole, (BLOCK.batch)(0), BLOCK.loss)?;
                let (mut graph, _) = split(graph, &axes, &place);
                assert_eq!(fuse_products(&mut graph).len(), if sequence { 4 } else { 2 });
                fold_reductions(&mut graph, 1 << 20);
                overlap(&mut graph);
                let mut ops = CustomOps::new();
                register_collectives(&mut ops, "tp", &comm);
                let mut executor = Executor::new(graph, ops)?;
                let (mut model, mut optim) = (cut(whole, &axes, &place), optimizer());
                for (step, reference) in references.iter().enumerate() {
                    let result = executor.step(&model, (BLOCK.batch)(step as u64))?;
                    let found = scalar(result.loss);
                    assert!((found - reference.loss).abs() < 1e-4 * reference.loss, "{found} {}", reference.loss);
                    let part = |path: &str, whole: &crate::harness::Whole| {
                        whole.part(axis.plan.layout(path), axis.degree, place[0])
                    };
                    for (path, found) in &gradients(&model, &result.gradients) {
                        same(path, &part(path, &reference.gradients[path]), found, 3e-4);
                    }
                    model = optim.step(0.05, model, result.gradients);
                    for (path, found) in &values(&model) {
                        same(path, &part(path, &reference.after[path]), found, 3e-4);
                    }
                }
                let counters = comm.counters();
                Ok(["all_reduce", "reduce_scatter", "all_gather"].map(|name| counters.of(name).calls))
            })
            .unwrap();
        // One product in each direction, two steps; of two chunks each, or of one where a third of it is too little to cut.
        let [sums, scatters, gathers] = calls[0];
        match (sequence, axis.degree) {
            (false, 2) => assert_eq!(sums, 8, "{calls:?}"),
            (false, _) => assert_eq!(sums, 4, "{calls:?}"),
            (true, _) => assert_eq!((scatters, gathers), (8, 8), "{calls:?}"),
        }
    }
}
