//! What updates take: burn's SGD, Adam and AdamW, and those of `init_fused`, which update a parameter in one pass.
//!
//! For the parameters of the MLP and the GPT of these benches, and for those of 200 layers of 4 x 4, where nearly all
//! of it is host time, both take turns in changing order, in one thread: processor time of an update of the whole
//! module, medians over rounds. With `threads` the time that passes in fused updates of one thread and of two.
//!
//! `cargo bench --bench optimizers -- [threads] [ROUNDS]`

mod figures;
#[allow(dead_code)]
mod models;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, AdamWConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Tensor};
use burn_parallel::prelude::*;
use figures::{Figures, clock, median};
use models::{Gpt, Mlp};

/// Optimizers of burn and fused ones.
type Both = [fn() -> ModuleOptimizer; 2];

const OPTIMIZERS: [(&str, Both); 3] = [
    ("SGD", [|| SgdConfig::new().init(), || SgdConfig::new().init_fused()]),
    ("Adam", [|| AdamConfig::new().init(), || AdamConfig::new().init_fused()]),
    ("AdamW", [|| AdamWConfig::new().init(), || AdamWConfig::new().init_fused()]),
];

/// Gradients of all parameters, each in memory of its own.
struct Gradients(GradientsParams);

impl ModuleVisitor for Gradients {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val().inner();
        self.0.register(param.id, value * 1e-3 + 1e-3);
    }
}

/// A model, its optimizer, and the threads that update it.
struct Trained<M> {
    /// There between updates.
    model: Option<M>,
    optim: ModuleOptimizer,
    threads: rayon::ThreadPool,
}

impl<M: Module> Trained<M> {
    fn new(model: &M, optim: fn() -> ModuleOptimizer, threads: usize) -> Self {
        let device = Device::flex().autodiff();
        let threads = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        Self { model: Some(model.clone().fork(&device)), optim: optim(), threads }
    }

    /// Milliseconds of an update.
    fn update(&mut self, clock: fn() -> f64) -> f64 {
        let model = self.model.take().expect("the update before has given it back");
        let mut gradients = Gradients(GradientsParams::new());
        model.visit(&mut gradients);
        let optim = &mut self.optim;
        let (model, took) = self.threads.install(move || {
            let began = clock();
            let model = optim.step(1e-5, model, gradients.0);
            (model, clock() - began)
        });
        self.model = Some(model);
        1e3 * took
    }
}

/// Milliseconds of an update of each, by turns. The first makes moments, and does not count.
fn by_turns<M: Module>(mut ways: [Trained<M>; 2], rounds: usize, clock: fn() -> f64) -> [f64; 2] {
    let mut times = [const { Vec::new() }; 2];
    for round in 0..=rounds {
        for turn in 0..2 {
            let way = (round + turn) % 2;
            let took = ways[way].update(clock);
            if round > 0 {
                times[way].push(took);
            }
        }
    }
    times.map(median)
}

fn compare<M: Module>(figures: &mut Figures, name: &str, model: M, threads: bool, rounds: usize) {
    let model = model.materialize();
    for (optimizer, [burns, fused]) in OPTIMIZERS {
        let (of, clock, ways): (_, fn() -> f64, _) = match threads {
            true => (["fused, one thread", "fused, two threads"], clock::passed, [(fused, 1), (fused, 2)]),
            false => (["burn's", "fused"], clock::of_thread, [(burns, 1), (fused, 1)]),
        };
        let took = by_turns(ways.map(|(optim, threads)| Trained::new(&model, optim, threads)), rounds, clock);
        let (what, ratio) = (format!("{name}, {optimizer}"), took[1] / took[0]);
        println!("{what}: {} {:.3} ms, {} {:.3} ms, {ratio:.3}", of[0], took[0], of[1], took[1]);
        for (of, took) in of.iter().zip(took) {
            figures.note(format!("{what}: {of}"), took, "ms");
        }
        figures.note(format!("{what}: {} over {}", of[1], of[0]), ratio, "ratio");
    }
}

fn main() {
    let (arguments, mut figures) = (figures::arguments(), Figures::of("optimizers"));
    let rounds = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(9);
    let threads = arguments.iter().any(|argument| argument == "threads");
    let device = Device::flex().autodiff();
    compare(&mut figures, "mlp", Mlp::new(&device), threads, rounds);
    compare(&mut figures, "gpt", Gpt::new(&device), threads, rounds);
    let tiny: Vec<Linear> = (0..200).map(|_| LinearConfig::new(4, 4).init(&device)).collect();
    compare(&mut figures, "200 tiny layers", tiny, threads, rounds);
    figures.finish();
}
