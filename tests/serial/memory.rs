//! No rank holds more than it must: what is allocated and what is read, in bytes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicIsize, AtomicUsize};

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig};
use burn::optim::{AdamConfig, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::batch::RankMemory;
use burn_parallel::hf::Weights;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;
use safetensors::tensor::{Dtype, TensorView};

/// Knows the largest piece of memory that each thread has asked for, and what all hold. Some machinery asks for 1 MiB,
/// a quarter of a weight.
struct Watched;

thread_local! {
    pub static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// Bytes that are held now, and that were at most.
pub static HELD: AtomicIsize = AtomicIsize::new(0);
pub static MOST: AtomicIsize = AtomicIsize::new(0);
/// A size, and how often any thread has asked for so many bytes or up to a cache line more.
pub static SIZE: AtomicUsize = AtomicUsize::new(usize::MAX);
pub static OF_SIZE: AtomicUsize = AtomicUsize::new(0);
/// How often any thread has asked for memory.
pub static CALLS: AtomicUsize = AtomicUsize::new(0);

/// The bytes that all threads hold now.
pub fn held() -> isize {
    HELD.load(Relaxed)
}

fn asked(size: usize) {
    CALLS.fetch_add(1, Relaxed);
    if size.checked_sub(SIZE.load(Relaxed)).is_some_and(|more| more <= 64) {
        OF_SIZE.fetch_add(1, Relaxed);
    }
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
    change(size as isize);
}

fn change(by: isize) {
    MOST.fetch_max(HELD.fetch_add(by, Relaxed) + by, Relaxed);
}

unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        asked(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        asked(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        change(-(layout.size() as isize));
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        change(-(layout.size() as isize));
        asked(size);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

const WIDTH: usize = 1024;
pub const WHOLE: usize = WIDTH * WIDTH * 4;

#[derive(Module, Debug)]
pub struct Mlp {
    up: Linear,
    down: Linear,
}

impl Mlp {
    pub fn new(device: &Device) -> Self {
        Self { up: LinearConfig::new(WIDTH, WIDTH).init(device), down: LinearConfig::new(WIDTH, WIDTH).init(device) }
    }

    pub fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        self.down.forward(self.up.forward(x).tanh()).powi_scalar(2).mean()
    }
}

pub fn plan() -> Plan {
    Plan::new().shard("up.weight", 1).shard("up.bias", 0).shard("down.weight", 0)
}

fn is_lazy<M: Module>(model: &M) -> bool {
    struct Lazy(bool);
    impl ModuleVisitor for Lazy {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0 &= !param.is_initialized();
        }
    }
    let mut lazy = Lazy(true);
    model.visit(&mut lazy);
    lazy.0
}

/// The bytes that two ranks know a step to need before it has run, and those that they take: in the third step, or in
/// all of the first three.
fn known_and_taken(strategy: &Strategy, in_all: bool) -> (u64, isize) {
    const ROWS: usize = 512;
    let found = launch::threads(2)
        .run(|rank| {
            let device = Device::flex().autodiff();
            let mut model = Mlp::new(&device).parallelize(&rank, strategy)?;
            let x = Tensor::<2>::ones([ROWS, WIDTH], &device);
            let known = RankMemory::of(&mut model, 2, x.clone(), |model, x| model.loss(x))?.step;
            let before = |rank: &Rank| {
                rank.barrier()?;
                let before = held();
                MOST.store(before, Relaxed);
                rank.barrier()?;
                Ok::<_, Error>(before)
            };
            let mut began = before(&rank)?;
            for number in 0..3 {
                if number == 2 && !in_all {
                    began = before(&rank)?;
                }
                let step = model.step(x.clone(), |model, x| model.loss(x))?;
                rank.barrier()?;
                drop(step);
            }
            let taken = MOST.load(Relaxed) - began;
            rank.barrier()?;
            Ok((rank.all_reduce(vec![known as u64], ReduceOp::Sum)?[0], taken))
        })
        .unwrap();
    found[0]
}

/// What a step is known to need before it has run is what it needs, over all ranks.
#[test]
fn a_step_needs_what_is_known_of_it() {
    let _turn = super::turn();
    let divided = DataParallelConfig::new().with_sharding(Sharding::Parameters);
    for (name, mut strategy) in [
        ("dp", Strategy::new().with_dp(2)),
        ("dp, captured", Strategy::new().with_dp(2).with_engine(Engine::Captured)),
        ("ZeRO 3", Strategy::new().with_dp(2).with_data(divided).with_engine(Engine::Captured)),
        ("tp", Strategy::new().with_tp(2, plan())),
        ("pp", Strategy::new().with_pp(2, PipelineConfig::new(2).with_cut(Cut::before(["down.*"])))),
    ] {
        // Steps keep their memory, which stands beside what else is made at another time than its tensors.
        let (known, taken) = known_and_taken(&strategy, true);
        let ratio = taken as f64 / known as f64;
        assert!((0.7..1.9).contains(&ratio), "{name}, three steps: {known} known, {taken} needed: {ratio:.2}");
        strategy.tensor.fusion = false;
        strategy.pipeline = strategy.pipeline.map(|pipeline| pipeline.with_fusion(false));
        let (known, taken) = known_and_taken(&strategy, false);
        let ratio = taken as f64 / known as f64;
        assert!((0.75..1.5).contains(&ratio), "{name}: {known} known, {taken} needed: {ratio:.2}");
    }
}

/// A number for every element of every parameter, as a file has them.
fn store() -> Vec<u8> {
    let value = |seed: usize, index: usize| ((index * 7 + seed) % 13) as f32 / 130.0 - 0.05;
    let tensor = |seed, elements| (0..elements).flat_map(|index| value(seed, index).to_le_bytes()).collect::<Vec<u8>>();
    let (square, row) = (vec![WIDTH, WIDTH], vec![WIDTH]);
    let named = [("up.weight", square.clone()), ("up.bias", row.clone()), ("down.weight", square), ("down.bias", row)];
    let bytes: Vec<Vec<u8>> =
        named.iter().enumerate().map(|(seed, (_, dims))| tensor(seed, dims.iter().product())).collect();
    let views = named
        .iter()
        .zip(&bytes)
        .map(|((name, dims), bytes)| (name.to_string(), TensorView::new(Dtype::F32, dims.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn rows(device: &Device) -> Tensor<2> {
    Tensor::ones([2, WIDTH], device)
}

#[test]
fn a_model_that_is_loaded_is_never_whole_on_any_rank() {
    let _turn = crate::turn();
    let store = store();
    let expected = {
        let device = Device::flex().autodiff();
        let mut source = Weights::from_bytes(store.clone()).unwrap();
        let outcomes = launch::threads(1).run(|rank| {
            let model = Mlp::new(&device).tensor_parallel(&rank, plan())?;
            let mut source = Weights::from_bytes(store.clone())?;
            Ok(model.load(&mut source)?.step(rows(&device), |m, x| m.loss(x))?.loss.item() as f32)
        });
        assert!(source_is_whole(&mut source));
        outcomes.unwrap()[0]
    };
    for degree in [2, 4] {
        launch::threads(degree)
            .run(|rank| {
                let device = rank.device().autodiff();
                let mut source = Weights::from_bytes(store.clone())?;
                LARGEST.set(0);
                let model = Mlp::new(&device).tensor_parallel(&rank, plan())?;
                assert!(is_lazy(model.local()), "wrapping makes no parameter");
                let header = source.bytes_read();
                let mut model = model.load(&mut source)?;
                let loss = model.step(rows(&device), |m, x| m.loss(x))?.loss.item() as f32;
                let largest = LARGEST.get();
                assert!(largest >= WHOLE / degree && largest < WHOLE / degree + 65_536, "{largest} of {WHOLE}");
                assert_eq!((source.bytes_read() - header) as usize, model.table().bytes());
                assert!((loss - expected).abs() < 1e-5 * expected, "{loss} {expected}");
                Ok(())
            })
            .unwrap();
    }
}

fn source_is_whole(source: &mut Weights) -> bool {
    use burn_parallel::params::SliceSource;
    let data = source.read("down.bias", std::slice::from_ref(&(3..5))).unwrap();
    data.iter::<f32>().collect::<Vec<_>>() == [(24 % 13) as f32 / 130.0 - 0.05, (31 % 13) as f32 / 130.0 - 0.05]
}

#[test]
fn a_lazy_model_is_never_whole_on_any_rank() {
    let _turn = crate::turn();
    for degree in [2, 4] {
        launch::threads(degree)
            .run(|rank| {
                let device = rank.device().autodiff();
                LARGEST.set(0);
                let mut model = Mlp::new(&device).tensor_parallel(&rank, plan())?;
                assert!(is_lazy(model.local()));
                assert!(LARGEST.get() <= WHOLE / 4);
                rank.barrier()?;
                let before = HELD.load(Relaxed);
                MOST.store(before, Relaxed);
                rank.barrier()?;
                model = model.train();
                rank.barrier()?;
                assert!(LARGEST.get() < WHOLE / degree + 65_536, "{}", LARGEST.get());
                // The parts of two weights on all ranks, and a piece in the making and on its way: never the
                // parts, and a weight that they come from.
                let most = (MOST.load(Relaxed) - before) as usize;
                assert!(most > 2 * WHOLE && most < 2 * WHOLE + WHOLE / 4 + 65_536, "{most}");
                // All ranks hold parts of one model: put together, it gives the same loss.
                let loss = model.step(rows(&device), |m, x| m.loss(x))?.loss.item() as f32;
                let whole = model.assemble()?.loss(rows(&device)).into_scalar::<f32>();
                assert!((loss - whole).abs() < 1e-5 * whole);
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn sources_that_do_not_fit() {
    let _turn = crate::turn();
    let store = store();
    let load = |model: fn(&Device) -> Mlp, bytes: &[u8]| {
        let error = launch::threads(1).run(|rank| {
            let model = model(&rank.device().autodiff()).tensor_parallel(&rank, plan())?;
            model.load(&mut Weights::from_bytes(bytes.to_vec())?).map(drop)
        });
        error.unwrap_err().to_string()
    };
    let narrow: fn(&Device) -> Mlp = |device| Mlp { up: LinearConfig::new(8, WIDTH).init(device), ..Mlp::new(device) };
    let said = load(narrow, &store);
    assert!(said.contains("`up.weight` has dims [8, 1024] in the model and [1024, 1024] in the source"), "{said}");
    let renamed: Vec<u8> = String::from_utf8_lossy(&store[..400]).replace("down.bias", "down.bios").into_bytes();
    let said = load(Mlp::new, &[&renamed[..400], &store[400..]].concat());
    assert!(said.contains("no parameter `down.bias`"), "{said}");
    // What is cut off is found before anything is read for the model.
    let said = load(Mlp::new, &store[..store.len() - 8]);
    assert!(said.contains("it is cut off"), "{said}");
    let said = load(Mlp::new, b"this is no such file at all");
    assert!(said.contains("too long"), "{said}");
    let said = load(Mlp::new, b"");
    assert!(said.contains("cannot read the header"), "{said}");
}

#[derive(Module, Debug)]
struct Tiny {
    up: Linear,
    norm: BatchNorm,
    down: Linear,
}

impl Tiny {
    fn new(device: &Device) -> Self {
        let (up, down) = (LinearConfig::new(4, 8).init(device), LinearConfig::new(8, 4).init(device));
        Self { up, norm: BatchNormConfig::new(8).init(device), down }
    }

    fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        self.forward(x).powi_scalar(2).mean()
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(self.norm.forward(self.up.forward(x)).tanh())
    }
}

fn few(device: &Device) -> Tensor<2> {
    Tensor::from_floats(
        [[1.0, 0.5, -1.0, 2.0], [0.0, 1.0, 1.0, -0.5], [2.0, 2.0, 0.1, 0.0], [1.0, 0.3, 0.2, 0.1]],
        device,
    )
}

type OneStep = Box<dyn FnMut() -> Result<(), Error>>;

/// Steps of a model, each followed by one of Adam; with `optimize` through that.
macro_rules! training {
    ($model:expr, optimize |$of:ident| $step:expr) => {{
        let mut optim: ModuleOptimizer = AdamConfig::new().init().into();
        let mut model = Some($model);
        let step: OneStep = Box::new(move || {
            let mut $of = model.take().expect("the step before has given it back");
            let step = $step?;
            model = Some($of.optimize(&mut optim, 1e-3, step)?);
            Ok(())
        });
        Ok(step)
    }};
    ($model:expr, |$of:ident| $step:expr) => {{
        let mut optim: ModuleOptimizer = AdamConfig::new().init().into();
        let mut model = Some($model);
        let step: OneStep = Box::new(move || {
            let mut $of = model.take().expect("the step before has given it back");
            let grads = $step?.grads;
            model = Some(optim.step(1e-3, $of, grads));
            Ok(())
        });
        Ok(step)
    }};
}

/// By how many bytes what all ranks hold is more in the steps from 600 to 1,000 than in those from 200 to 600.
fn growth(ranks: usize, start: impl Fn(&Rank, Tensor<2>, Tiny) -> Result<OneStep, Error> + Sync) -> isize {
    let most = launch::threads(ranks).run(|rank| {
        let device = rank.device().autodiff();
        let mut step = start(&rank, few(&device), Tiny::new(&device))?;
        let mut most = [isize::MIN; 2];
        for number in 0..1000_usize {
            step()?;
            if let Some(late) = number.checked_sub(200) {
                let most = &mut most[late / 400];
                *most = (*most).max(HELD.load(Relaxed));
            }
        }
        Ok(most[1] - most[0])
    });
    most.unwrap().into_iter().max().unwrap()
}

#[test]
fn a_thousand_steps_hold_no_more_than_a_few() {
    let _turn = crate::turn();
    let plan = Plan::new().shard("up.weight", 1).shard("up.bias", 0).shard("norm.*", 0).shard("down.weight", 0);
    let tied = |rank: &Rank, axes: [(&str, usize); 2]| {
        let mesh = Mesh::new(rank, axes)?;
        Ok::<_, Error>((mesh.axis(axes[0].0)?, mesh.axis(axes[1].0)?))
    };
    let dp = DataParallelConfig::new;
    let pp = || PipelineConfig::new(2);
    let check = |strategy: &str, grown: isize| assert!(grown < 64 << 10, "{strategy}: {grown} bytes more");

    check(
        "dp",
        growth(2, |rank, x, model| {
            training!(model.data_parallel(rank, dp())?, |m| m.step(x.clone(), |m, x| m.loss(x)))
        }),
    );
    check(
        "dp with synchronised batch norm",
        growth(2, |rank, x, model| {
            let model = model.data_parallel(rank, dp())?;
            training!(model, |m| m.step_sync_batch_norm(vec![(x.clone(), 4.0)], |m, x| m.loss(x)))
        }),
    );
    for level in [Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters] {
        check(
            &format!("dp, {level}"),
            growth(2, |rank, x, model| {
                // With rows of parameters on a device on which burn keeps no views of them.
                let model = match level {
                    Sharding::Parameters => Tiny::new(&rank.device().autodiff().gradient_checkpointing()),
                    _ => model,
                };
                let model = model.data_parallel(rank, dp().with_sharding(level))?;
                training!(model, optimize | m | m.step(x.clone(), |m, x| m.loss(x)))
            }),
        );
    }
    check(
        "captured dp, parameters",
        growth(2, |rank, x, model| {
            let strategy = Strategy::new().with_data(dp().with_sharding(Sharding::Parameters));
            let model = model.parallelize(rank, &strategy.with_engine(Engine::Captured))?;
            training!(model, optimize | m | m.step(x.clone(), |m, x| m.loss(x)))
        }),
    );
    check(
        "tp",
        growth(2, |rank, x, model| {
            training!(model.tensor_parallel(rank, &plan)?, |m| m.step(x.clone(), |m, x| m.loss(x)))
        }),
    );
    check(
        "pp",
        growth(2, |rank, x, model| {
            training!(model.pipeline_parallel(rank, pp())?, |m| m.step(x.clone(), |m, x| m.loss(x)))
        }),
    );
    check(
        "dp x tp",
        growth(4, |rank, x, model| {
            let (outer, tp) = tied(rank, [("dp", 2), ("tp", 2)])?;
            let model = model.tensor_parallel(&tp, &plan)?.data_parallel(&outer, dp())?;
            training!(model, |m| m.step(x.clone(), |m, x| m.loss(x)))
        }),
    );
    check(
        "dp x pp",
        growth(4, |rank, x, model| {
            let (outer, inner) = tied(rank, [("dp", 2), ("pp", 2)])?;
            let mut model = model.pipeline_parallel(&inner, pp())?;
            model.prepare(x.clone(), |m, x| m.loss(x))?;
            training!(model.data_parallel(&outer, dp())?, |m| m.step(x.clone(), |m, x| m.loss(x)))
        }),
    );
    check(
        "pp x tp",
        growth(4, |rank, x, model| {
            let (outer, tp) = tied(rank, [("pp", 2), ("tp", 2)])?;
            let model = model.tensor_parallel(&tp, &plan)?.pipeline_parallel(&outer, pp())?;
            training!(model, |m| m.step(x.clone(), |m, x| m.loss(x)))
        }),
    );
    check(
        "forward_with under tp",
        growth(2, |rank, x, model| {
            let model = model.tensor_parallel(rank, &plan)?;
            let step: OneStep = Box::new(move || model.forward_with(x.clone(), |m, x| m.forward(x)).map(drop));
            Ok(step)
        }),
    );
    check(
        "forward_with under pp",
        growth(2, |rank, x, model| {
            let mut model = model.pipeline_parallel(rank, pp())?;
            model.prepare(x.clone(), |m, x| m.loss(x))?;
            let step: OneStep = Box::new(move || model.forward_with(x.clone(), |m, x| m.forward(x)).map(drop));
            Ok(step)
        }),
    );
}
